# SPDX-License-Identifier: Apache-2.0
"""Parts of vision-language-action models: prompts, image towers, the language model, adapters, released files."""
