# SPDX-License-Identifier: Apache-2.0
"""Post-training of vision-language-action policies: on-policy distillation, and reinforcement learning on tokens."""
