# SPDX-License-Identifier: Apache-2.0
"""Weight merging: operators, module groups, streamed safetensors, coefficient sweeps, model cards."""
