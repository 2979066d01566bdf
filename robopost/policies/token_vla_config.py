# SPDX-License-Identifier: Apache-2.0
"""Config of the token VLA, and what follows from it: the tokenizer, the vocabulary, settings of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from robopost.errors import ConfigError, unknown
from robopost.nets.vla import prompts as text
from robopost.nets.vla.language import LanguageConfig
from robopost.nets.vla.openvla import Shards, read_settings
from robopost.nets.vla.towers import DTYPES, DinoConfig, TowerConfig
from robopost.policies.tokens import TokenConfig

LAYOUTS = ("oft", "openvla")
ATTENTION = ("full", "block")
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
CHECKPOINT_PROMPT = 48  # tokens: OpenVLA's template takes 13, 64 bytes of instruction rarely 30
WORDS = (  # every word of arm_language's instructions
    "touch the red cube",
    "lift the green cube",
    "put the blue cube in the yellow zone",
    "purple orange cyan",
)


@dataclass
class TokenVLAConfig(TokenConfig):
    """Config of `TokenVLA`; docs/vla.md explains the keys."""

    name: str = "token_vla"
    checkpoint: str = ""  # folder in OpenVLA's layout to begin from: it fixes sizes, tokenizer and statistics
    unnorm_key: str = ""  # which action statistics of the checkpoint, empty = the only ones
    layout: str = "oft"  # oft: all slots in one pass | openvla: one after another, each sees those before it
    attention: str = "full"  # oft: full = all tokens see all | block = only the slots see each other
    slots: str = "learned"  # oft: learned embeddings of the slots | zero, as released OFT checkpoints have
    # First column of `state` and how many (0 = the rest); [] = none.
    proprio: list[int] = field(default_factory=lambda: [0, 0])
    image_size: int = 0  # pixels the towers see, 0 = those of the observation
    image_shift: int = 4  # random shift in pixels when cloning, 0 = none
    siglip: TowerConfig = field(default_factory=TowerConfig)
    dino: DinoConfig = field(default_factory=DinoConfig)
    language: LanguageConfig = field(default_factory=LanguageConfig)
    vocab: int = 0  # ids without padding rows, actions last; 0 = text_tokens + bins, 32000 = Llama-2
    text_tokens: int = 64  # of a tokenizer made here
    tokenizer: str = "words"  # words | bpe: made from `texts` | path of a tokenizer.json
    texts: list[str] = field(default_factory=lambda: list(WORDS))
    # OpenVLA's: "In: What action should the robot take to {instruction}?\nOut:"
    template: str = "{instruction}"
    prompt_length: int = 12  # tokens that instructions are padded to
    tokenizer_json: str = ""  # the tokenizer itself, written when a policy is built
    dtype: str = "float32"  # float32 | bfloat16: weights of towers and language model
    freeze_vision: bool = False
    gradient_checkpointing: bool = False
    lora_rank: int = 0  # 0 = train all weights
    lora_alpha: float = 16.0
    # Names of linear layers of the language model.
    lora_targets: list[str] = field(default_factory=lambda: list(LINEAR))

    def check(self) -> None:
        """Raise ConfigError where a value is out of range."""
        super().check()
        for name, allowed in (("layout", LAYOUTS), ("attention", ATTENTION), ("dtype", tuple(DTYPES))):
            if getattr(self, name) not in allowed:
                raise unknown(f"policy.{name}", getattr(self, name), allowed)
        if self.slots not in ("learned", "zero"):
            raise unknown("policy.slots", self.slots, ("learned", "zero"))
        if self.proprio and (len(self.proprio) != 2 or min(self.proprio) < 0):
            raise ConfigError(f"policy.proprio={self.proprio} must be [] or [first column, how many]")
        if self.lora_alpha <= 0:
            raise ConfigError(f"policy.lora_alpha={self.lora_alpha} must be above 0")
        if self.history != 1:
            raise ConfigError(
                f"policy.history={self.history}: token_vla reads one observation. Fix: history=1"
            )
        for name, least in (("image_size", 0), ("image_shift", 0), ("lora_rank", 0), ("prompt_length", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"policy.{name}={getattr(self, name)} must be {least} or more")


def make_tokenizer(config: TokenVLAConfig) -> str:
    """The JSON of the tokenizer that `config` holds or describes."""
    if config.tokenizer_json:
        return text.unpack(config.tokenizer_json)
    if config.tokenizer not in ("words", "bpe"):
        return text.read_tokenizer(config.tokenizer)
    known = [config.template.replace("{instruction}", item) for item in config.texts]
    return text.train_tokenizer(known, config.tokenizer, config.text_tokens)


def vocabulary(config: TokenVLAConfig, text_tokens: int) -> int:
    """Ids in use: text first, the actions last.

    OpenVLA writes its actions over the rarest 256 of Llama-2's own 32000 ids, a vocabulary made here keeps them apart.

    Raises:
        ConfigError: actions would overlap the words of a tokenizer made here.
    """
    if config.vocab == 0:
        return max(config.text_tokens, text_tokens) + config.bins
    made_here = config.tokenizer in ("words", "bpe")
    if config.vocab < config.bins or text_tokens > config.vocab - config.bins * made_here:
        raise ConfigError(
            f"policy.vocab={config.vocab} must hold {text_tokens} text tokens and {config.bins} action ids. "
            "Fix: policy.vocab=0"
        )
    return config.vocab


def from_checkpoint(config: TokenVLAConfig, shards: Shards) -> TokenVLAConfig:
    """`config` with the sizes, vocabulary, tokenizer and prompt of a checkpoint."""
    settings = read_settings(shards, config.siglip.heads, config.dino.heads)
    if not config.tokenizer_json and config.tokenizer in ("words", "bpe"):
        settings["tokenizer"] = str(shards.folder)
    if config.template == "{instruction}":
        settings["template"] = text.OPENVLA_TEMPLATE
    sizes = [shape for name, shape in shards.shapes.items() if name == "proprio_projector.fc1.weight"]
    if config.proprio == [0, 0] and not sizes:
        settings["proprio"] = []
    return replace(config, **settings, prompt_length=max(config.prompt_length, CHECKPOINT_PROMPT))
