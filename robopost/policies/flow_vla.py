# SPDX-License-Identifier: Apache-2.0
"""Flow VLA of the pi0 class: a vision-language model reads, an expert beside it carries noise to action chunks."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from robopost.data.batch import Obs, Spec
from robopost.errors import ConfigError, unknown
from robopost.nets.encoder import INSTRUCTION
from robopost.nets.masked import masked_mean
from robopost.nets.vla.commands import commands
from robopost.nets.vla.lora import add_lora, merge_lora
from robopost.nets.vla.pi0 import ActionExpert, PrefixEncoder, build_pi0, load_pi0, tiny_arch
from robopost.nets.vla.prompts import Prompts, pack, read_tokenizer, train_tokenizer, unpack
from robopost.policies.chain import ChainConfig, with_frozen
from robopost.policies.flow import FlowPolicy, TimeGrid
from robopost.registry import POLICIES

TIMES = ("beta", "uniform")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TRAINED = ("words", "bpe")
STATE = "state"
TEMPLATE = "{instruction}\n"  # what pi0 was trained with


@dataclass
class FlowVLAConfig(ChainConfig):
    """Config of `FlowVLA`: sizes of a model built anew, or `path` of one that exists.

    `arch` and `tokenizer_json` are filled when the policy is made, so that its checkpoint is complete.
    """

    name: str = "flow_vla"
    horizon: int = 8
    path: str = ""  # folder or hub id of a pi0 of transformers; empty = a new model of the sizes below
    tokenizer: str = "bpe"  # words | bpe: trained on `texts`; or a tokenizer.json, or a folder that holds one
    texts: list[str] = field(default_factory=list[str])  # to train a tokenizer on, empty = tabletop commands
    text_tokens: int = 512  # vocabulary of a new model
    prompt_length: int = 24  # tokens of an instruction, pi0 itself: 48
    image_size: int = 64  # pixels; images are scaled to fit, with edges where they are no squares
    patch: int = 8  # pixels
    vision_width: int = 96
    vision_layers: int = 3
    width: int = 128  # of the language model
    layers: int = 4  # of the language model and of the expert
    heads: int = 4
    expert_width: int = 96
    state_dim: int = 0  # state the expert takes, zero-padded; 0 = what the observations have
    action_dim: int = 0  # actions the expert takes, padded; 0 = the task's
    times: str = "beta"  # training times: beta = pi0's, dense near noise | uniform
    freeze_vision: bool = False
    freeze_vlm: bool = False  # train the action expert alone
    lora_rank: int = (
        0  # adapters in language model and expert, and their projections, are trained; 0 = all weights
    )
    lora_alpha: float = 16.0
    lora_targets: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )  # names of linear layers
    proprio: list[int] = field(
        default_factory=lambda: [0, 0]
    )  # first column of `state` and how many (0 = the rest); [] = none
    dtype: str = "float32"  # float32 | bfloat16, of weights and activations; times and chunks stay float32
    gradient_checkpointing: bool = False  # compute activations again in the backward pass
    image_shift: int = 4  # random shift in pixels when training, 0 = none
    pad_noise: bool = False  # padded action dimensions hold noise, as in pi0's own training; set with `path`
    arch: str = ""
    tokenizer_json: str = ""
    source: str = ""  # the `path` it came from

    def __post_init__(self) -> None:
        if self.times not in TIMES:
            raise unknown("policy.times", self.times, TIMES)
        check_columns(self.proprio)
        if self.dtype not in DTYPES:
            raise unknown("policy.dtype", self.dtype, DTYPES)
        sizes = ("steps", "prompt_length", "vision_width", "vision_layers", "width", "layers", "heads")
        for name in (*sizes, "expert_width", "patch", "text_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"policy.{name}={getattr(self, name)} must be at least 1")
        for name in ("state_dim", "action_dim", "image_shift", "lora_rank"):
            if getattr(self, name) < 0:
                raise ConfigError(f"policy.{name}={getattr(self, name)} must be 0 or more")
        if self.image_size < self.patch or self.image_size % self.patch:
            raise ConfigError(
                f"policy.image_size={self.image_size} must be a multiple of policy.patch={self.patch}"
            )
        for name in ("vision_width", "width"):
            if getattr(self, name) % self.heads:
                raise ConfigError(
                    f"policy.{name}={getattr(self, name)} must be a multiple of policy.heads={self.heads}"
                )
        if self.width // self.heads % 2 or self.expert_width % 2:
            raise ConfigError(
                f"policy.width / policy.heads = {self.width // self.heads} and policy.expert_width="
                f"{self.expert_width} must be even: positions and times are embedded as pairs"
            )


class PrefixFlow(FlowPolicy):
    """A flow VLA: what pi0 and SmolVLA share. `cond` is the packed prefix, see `PrefixLayout`."""

    config: Any

    def features(self, cond: Tensor) -> Tensor:
        """Mean hidden state of the prefix: `cond` itself is far too large for a small network."""
        return cond[:, -self.feature_dim :]

    @property
    def feature_dim(self) -> int:
        """See `ChainPolicy.feature_dim`."""
        return cast(Any, self.encoder).layout.summary

    def time_embedding(self, steps: range) -> Tensor:
        """See `FlowPolicy.time_embedding`."""
        return cast(Any, self.net).time(self.grid.starts(steps.start, len(steps), self.device))

    def draw_times(self, batch: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        """Training times (batch,), 0 = noise: uniform, or pi0's 1 - t = .001 + .999 Beta(1.5, 1)."""
        draw = self.grid.draw(batch, generator, device)
        if self.config.times == "uniform":
            return draw
        return 1 - (
            0.001 + 0.999 * draw.pow(1 / 1.5)
        )  # the inverse of Beta(1.5, 1)'s distribution function u^1.5

    def bc_loss(self, obs: Obs, chunk: Tensor, mask: Tensor, generator: torch.Generator | None) -> Tensor:
        """Flow-matching loss (Black et al. 2024, eq. 1): a mean over valid steps and the task's action dimensions.

        Neither padded steps nor padded dimensions count, above or below the fraction bar; without a valid step it is 0.
        """
        cond = self.encoder(obs, generator)
        chunk = chunk * mask.unsqueeze(-1)  # padding must not reach the network's input either
        noise = torch.randn(chunk.shape, generator=generator, device=chunk.device)
        t = self.draw_times(len(chunk), generator, chunk.device)
        at = t[:, None, None]
        velocity = self.velocity((1 - at) * noise + at * chunk, t, cond)
        return masked_mean((velocity - (chunk - noise)).square(), mask)


@POLICIES.register("flow_vla", config=FlowVLAConfig)
class FlowVLA(PrefixFlow):
    """pi0 (Black et al. 2024): images, an instruction and the state to chunks, by Euler steps of a flow.

    The prefix (images and instruction) is encoded once per observation; its keys and values are `cond`, and every
    Euler step reads them. Actions of the task are the first of the model's; the loss knows no others.
    """

    registry_name = "flow_vla"
    module_groups: ClassVar[dict[str, tuple[str, ...]]] = with_frozen(
        {
            "vision": ("encoder.vlm.vision_tower", "encoder.vlm.multi_modal_projector"),
            "language": ("encoder.vlm.language_model",),
            "action": ("net",),
        }
    )
    config: FlowVLAConfig
    encoder: PrefixEncoder
    net: ActionExpert

    def __init__(self, config: FlowVLAConfig, spec: Spec) -> None:
        super().__init__(config, spec)
        self.grid = TimeGrid(config.steps)

    def build(self, config: FlowVLAConfig) -> tuple[nn.Module, nn.Module]:
        """See `ChainPolicy.build`.

        Raises:
            ConfigError: no image is observed, more numbers than the model has room for, or a history.
            CheckpointError: nothing usable at `path`.
        """
        images, floats = self._keys()
        state = sum(columns.stop - columns.start for columns in floats.values())
        vocabulary = self._vocabulary(config)
        if config.path:
            model, config.arch = load_pi0(config.path, DTYPES[config.dtype])
            config.source, config.path, config.pad_noise = config.path, "", True
        else:
            config.arch = config.arch or self._arch(config, state)
            model = build_pi0(config.arch, DTYPES[config.dtype])
        pi0 = model.config
        for what, have, room in (
            ("a state of", state, pi0.max_state_dim),
            ("actions of", self.spec.action_dim, pi0.max_action_dim),
        ):
            if have > room:
                raise ConfigError(f"the task has {what} {have} numbers, the model has room for {room}")
        prompts = None
        if INSTRUCTION in self.obs_keys:
            prompts = Prompts(vocabulary, config.prompt_length, TEMPLATE, empty=False)
            if prompts.tokenizer.get_vocab_size() > pi0.vlm_config.text_config.vocab_size:
                raise ConfigError(
                    f"the tokenizer has {prompts.tokenizer.get_vocab_size()} tokens, the model knows "
                    f"{pi0.vlm_config.text_config.vocab_size}. Fix: policy.tokenizer=<the model's own>"
                )
        config.tokenizer_json = pack(vocabulary)
        encoder = PrefixEncoder(
            model.model.vlm,
            prompts,
            images,
            floats,
            pi0.max_state_dim,
            shift=config.image_shift,
            recompute=config.gradient_checkpointing,
        )
        expert = ActionExpert(
            model,
            encoder.layout,
            self.horizon,
            self.spec.action_dim,
            pad_noise=config.pad_noise,
            recompute=config.gradient_checkpointing,
        )
        if config.freeze_vision:
            encoder.vlm.vision_tower.requires_grad_(False)
        if config.lora_rank:
            encoder.vlm.requires_grad_(False)
            for decoder in [expert.dit] if config.freeze_vlm else [encoder.vlm.language_model, expert.dit]:
                add_lora(decoder, config.lora_rank, config.lora_alpha, config.lora_targets)
            for head in (
                expert.embed_action_time,
                expert.action_out_proj,
            ):  # trained in full, beside adapters
                for parameter in head.parameters():
                    parameter.data = parameter.data.float()
        elif config.freeze_vlm:
            encoder.vlm.requires_grad_(False)
        return encoder, expert

    def _keys(self) -> tuple[list[str], dict[str, slice]]:
        """Keys of cameras; keys of vectors with the columns that are read."""
        obs = self.spec.obs
        images = [key for key in self.obs_keys if obs[key][1] == "uint8" and len(obs[key][0]) == 3]
        sizes = {
            key: torch.Size(obs[key][0]).numel() for key in self.obs_keys if obs[key][1].startswith("float")
        }
        floats = {key: slice(0, size) for key, size in sizes.items()}
        if STATE in floats:
            floats[STATE] = columns_of(self.config.proprio, sizes[STATE])
        floats = {key: columns for key, columns in floats.items() if columns.stop > columns.start}
        if not images:
            raise ConfigError(
                f"policy=flow_vla needs an image, it observes {', '.join(self.obs_keys)}. "
                "Fix: env.obs=pixels96, or policy=flow"
            )
        if self.history != 1:
            raise ConfigError(f"policy.history={self.history} must be 1 with policy=flow_vla")
        other = set(self.obs_keys) - {*images, *sizes, INSTRUCTION}
        if other:
            key = sorted(other)[0]
            raise ConfigError(
                f"observation key {key!r} is {obs[key][1]} {obs[key][0]}: "
                "expected float, a uint8 image (H, W, 3) or 'instruction'"
            )
        self.obs_keys = [key for key in self.obs_keys if key in {*images, *floats, INSTRUCTION}]
        return images, floats

    def _vocabulary(self, config: FlowVLAConfig) -> str:
        """JSON of the tokenizer: the stored one, one trained in place, or one from a file."""
        if config.tokenizer_json:
            return unpack(config.tokenizer_json)
        if config.path and config.tokenizer in TRAINED:
            return gemma_tokenizer(read_tokenizer(config.path))
        if config.tokenizer in TRAINED:
            return train_tokenizer(config.texts or commands(), config.tokenizer, config.text_tokens)
        return gemma_tokenizer(read_tokenizer(Path(config.tokenizer)))

    def _arch(self, config: FlowVLAConfig, state: int) -> str:
        return tiny_arch(
            image_size=config.image_size,
            patch=config.patch,
            vision_width=config.vision_width,
            vision_layers=config.vision_layers,
            width=config.width,
            layers=config.layers,
            expert_width=config.expert_width,
            heads=config.heads,
            vocab=config.text_tokens,
            state_dim=config.state_dim or max(1, state),
            action_dim=config.action_dim or self.spec.action_dim,
            horizon=self.horizon,
        )

    def export(self) -> nn.Module:
        """The weights as a `PI0ForConditionalGeneration`, whose `save_pretrained` writes what `path` reads."""
        model = build_pi0(self.config.arch, DTYPES[self.config.dtype])
        vlm, net = copy.deepcopy(self.encoder.vlm), copy.deepcopy(self.net)
        if self.config.lora_rank:
            for decoder in (vlm, net.dit):
                merge_lora(decoder)
        model.model.vlm.load_state_dict(vlm.state_dict())
        model.model.dit.load_state_dict(net.dit.state_dict(), strict=False)  # without word embeddings
        model.embed_action_time.load_state_dict(net.embed_action_time.state_dict())
        model.action_out_proj.load_state_dict(net.action_out_proj.state_dict())
        return cast(nn.Module, model)


def check_columns(proprio: list[int]) -> None:
    """Raise ConfigError where `proprio` is neither [] nor [first column, how many]."""
    if proprio and (len(proprio) != 2 or min(proprio) < 0):
        raise ConfigError(f"policy.proprio={proprio} must be [] or [first column, how many]")


def columns_of(proprio: list[int], size: int) -> slice:
    """The columns of a state of `size` numbers that `proprio` chooses.

    Raises:
        ConfigError: columns that the state doesn't have.
    """
    if not proprio:
        return slice(0, 0)
    first, last = proprio[0], proprio[0] + proprio[1] if proprio[1] else size
    if not first < last <= size:
        raise ConfigError(f"policy.proprio={proprio} must choose columns 0..{size - 1} of `state`")
    return slice(first, last)


def gemma_tokenizer(text: str) -> str:
    """A tokenizer's JSON with the names of special tokens that prompts ask for: Gemma calls `<s>` `<bos>`."""
    tokens = json.loads(text)
    names = {item["content"] for item in tokens.get("added_tokens", [])}
    for ours, theirs in (("<s>", "<bos>"), ("</s>", "<eos>")):
        if ours not in names and theirs in names:
            text = text.replace(json.dumps(theirs), json.dumps(ours))
    return text
