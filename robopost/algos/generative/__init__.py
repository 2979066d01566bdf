# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning of flow and diffusion policies."""
