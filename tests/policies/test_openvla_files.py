# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in OpenVLA's layout, written here by its own names (timm's for the towers)."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from robopost.artefacts.checkpoint import load_policy, policy_files, save_folder
from robopost.data.batch import Spec
from robopost.errors import CheckpointError, ConfigError
from robopost.nets.vla import prompts
from robopost.nets.vla.towers import TowerConfig
from robopost.policies.token_vla import TokenVLA
from robopost.policies.token_vla_config import TokenVLAConfig

SPEC = Spec(
    {"image": ((16, 16, 3), "uint8"), "state": ((4,), "float32"), "instruction": ((64,), "uint8")},
    3,
    (-10.0,) * 3,
    (10.0,) * 3,
)
STATS = {
    "bridge": {
        "action": {"q01": [-1.0, -2.0, 0.0], "q99": [3.0, 2.0, 1.0], "mask": [True, True, False]},
        "proprio": {"q01": [0.0, 0.0], "q99": [1.0, 4.0]},
    }
}
WIDTH, TEXT, LLM = {"dino": 8, "siglip": 12}, 64, 16


def vit(kind, draw, blocks=3):
    """A timm vision transformer: what OpenVLA's towers hold, unused parts included."""
    width = WIDTH[kind]
    rand = lambda *shape: torch.randn(shape, generator=draw) * 0.3  # noqa: E731
    out = {"patch_embed.proj.weight": rand(width, 3, 8, 8), "patch_embed.proj.bias": rand(width)}
    out |= {"pos_embed": rand(1, 4, width), "norm.weight": rand(width), "norm.bias": rand(width)}
    if kind == "dino":
        out |= {"cls_token": rand(1, 1, width), "reg_token": rand(1, 2, width)}
    else:
        out |= {"attn_pool.latent": rand(1, 1, width), "attn_pool.kv.weight": rand(2 * width, width)}
    for index in range(blocks):
        block = f"blocks.{index}."
        for name, shape in {
            "norm1": (width,),
            "attn.qkv": (3 * width, width),
            "attn.proj": (width, width),
            "norm2": (width,),
            "mlp.fc1": (2 * width, width),
            "mlp.fc2": (width, 2 * width),
        }.items():
            out |= {f"{block}{name}.weight": rand(*shape), f"{block}{name}.bias": rand(shape[0])}
        if kind == "dino":
            out |= {f"{block}ls{i}.scale_factor": rand(width) for i in (1, 2)}
    return out


def tensors(seed=0):
    """A whole checkpoint, fused towers."""
    draw = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(shape, generator=draw) * 0.3  # noqa: E731
    out = {f"vision_backbone.featurizer.{k}": v for k, v in vit("dino", draw).items()}
    out |= {f"vision_backbone.fused_featurizer.{k}": v for k, v in vit("siglip", draw).items()}
    wide = 4 * sum(WIDTH.values())
    for name, shape in {
        "fc1": (wide, sum(WIDTH.values())),
        "fc2": (LLM, wide),
        "fc3": (LLM, LLM),
    }.items():
        out |= {f"projector.{name}.weight": rand(*shape), f"projector.{name}.bias": rand(shape[0])}
    rows = 64 + 256 + 64
    model = "language_model.model."
    out |= {f"{model}embed_tokens.weight": rand(rows, LLM), "language_model.lm_head.weight": rand(rows, LLM)}
    out |= {f"{model}norm.weight": rand(LLM)}
    for index in range(2):
        layer = f"{model}layers.{index}."
        out |= {f"{layer}self_attn.{n}_proj.weight": rand(LLM, LLM) for n in "qkvo"}
        out |= {f"{layer}mlp.{n}_proj.weight": rand(24, LLM) for n in ("gate", "up")}
        out |= {f"{layer}mlp.down_proj.weight": rand(LLM, 24)}
        out |= {f"{layer}{n}_layernorm.weight": rand(LLM) for n in ("input", "post_attention")}
        out |= {f"{layer}self_attn.rotary_emb.inv_freq": rand(4)}
    return out


def write(folder, held, shards=3, stats=STATS):
    folder.mkdir(exist_ok=True)
    names = sorted(held)
    index = {}
    for part in range(shards):
        file = f"model-{part + 1:05d}-of-{shards:05d}.safetensors"
        mine = names[part::shards]
        save_file({name: held[name] for name in mine}, folder / file)
        index |= dict.fromkeys(mine, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    config = {
        "text_config": {"model_type": "llama", "num_attention_heads": 2, "vocab_size": 384},
        "pad_to_multiple_of": 64,
        "n_action_bins": 256,
        "timm_model_ids": ["tiny_dino", "tiny_siglip"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "dataset_statistics.json").write_text(json.dumps(stats))
    words = [prompts.OPENVLA_TEMPLATE.format(instruction="pick up the red cube")]
    (folder / "tokenizer.json").write_text(prompts.train_tokenizer(words, "words", TEXT), encoding="utf-8")
    return folder


def load(folder, **changes):
    heads = {"siglip": TowerConfig(heads=2), "dino": TowerConfig(heads=2)}
    settings = {"checkpoint": str(folder), "horizon": 2, "prompt_length": 20} | heads
    return TokenVLA(TokenVLAConfig(**settings | changes), SPEC)


def observe(rows=2):
    draw = torch.Generator().manual_seed(5)
    texts = ("pick up the red cube", "pick up the cube")
    return {
        "image": torch.randint(0, 256, (rows, 16, 16, 3), generator=draw, dtype=torch.uint8),
        "state": torch.randn(rows, 4, generator=draw),
        "instruction": torch.stack([prompts.to_bytes(text) for text in texts[:rows]]),
    }


def reference_block(x, held, prefix, index):
    """A timm block by hand: pre-norm attention with joint qkv and layer scale where there is some."""
    get = lambda name: held[f"{prefix}blocks.{index}.{name}"]  # noqa: E731
    width = x.shape[-1]

    def norm(v, n):
        return torch.nn.functional.layer_norm(v, (width,), get(f"{n}.weight"), get(f"{n}.bias"), 1e-6)

    scale = lambda n: held.get(f"{prefix}blocks.{index}.ls{n}.scale_factor", 1.0)  # noqa: E731
    h = norm(x, "norm1") @ get("attn.qkv.weight").T + get("attn.qkv.bias")
    q, k, v = h.view(*x.shape[:2], 3, 2, width // 2).permute(2, 0, 3, 1, 4)
    weight = (q @ k.transpose(-1, -2) / (width // 2) ** 0.5).softmax(-1)
    h = (weight @ v).transpose(1, 2).flatten(2) @ get("attn.proj.weight").T + get("attn.proj.bias")
    x = x + h * scale(1)
    h = norm(x, "norm2") @ get("mlp.fc1.weight").T + get("mlp.fc1.bias")
    h = torch.nn.functional.gelu(h) @ get("mlp.fc2.weight").T + get("mlp.fc2.bias")
    return x + h * scale(2)


def reference_features(image, held):
    """OpenVLA's fused features: the last but one block of both towers, without a norm, patches alone."""
    out = []
    ranges = {
        "featurizer": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        "fused_featurizer": ((0.5,) * 3, (0.5,) * 3),
    }
    for name, (mean, std) in ranges.items():
        prefix = f"vision_backbone.{name}."
        pixels = (image.float() / 255 - torch.tensor(mean)) / torch.tensor(std)
        x = torch.nn.functional.conv2d(
            pixels.movedim(-1, 1),
            held[f"{prefix}patch_embed.proj.weight"],
            held[f"{prefix}patch_embed.proj.bias"],
            stride=8,
        )
        x = x.flatten(2).transpose(1, 2) + held[f"{prefix}pos_embed"]
        lead = [held[f"{prefix}{t}"] for t in ("cls_token", "reg_token") if f"{prefix}{t}" in held]
        x = torch.cat([*(t.expand(len(x), -1, -1) for t in lead), x], dim=1)
        for index in range(2):  # of three
            x = reference_block(x, held, prefix, index)
        out.append(x[:, sum(t.shape[1] for t in lead) :])
    return torch.cat(out, dim=-1)


@pytest.mark.parametrize("layout", ["oft", "openvla"])
def test_every_weight_finds_its_place(tmp_path, layout):
    held = tensors()
    policy = load(write(tmp_path / "vla", held), layout=layout)
    assert policy.vocab == 320
    assert policy.slots is None
    obs = observe()
    features = policy.vision_features(obs)
    torch.testing.assert_close(features, reference_features(obs["image"], held), atol=1e-4, rtol=1e-4)
    x = features
    for index, name in enumerate(("fc1", "fc2", "fc3")):
        x = x @ held[f"projector.{name}.weight"].T + held[f"projector.{name}.bias"]
        x = torch.nn.functional.gelu(x) if index < 2 else x
    torch.testing.assert_close(policy.projector(features), x, atol=1e-4, rtol=1e-4)
    # The language model: stock transformers over the whole sequence of one sample, no padding.
    import transformers

    settings = transformers.LlamaConfig(
        vocab_size=384, hidden_size=LLM, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    stock = transformers.LlamaForCausalLM(settings)
    renamed = {
        name.removeprefix("language_model."): value
        for name, value in held.items()
        if name.startswith("language_model.") and "inv_freq" not in name
    }
    stock.load_state_dict(renamed)
    ids = torch.tensor([policy.prompts.encode("pick up the red cube")])
    assert policy.prompts.tokenizer.id_to_token(int(ids[0, -1])) == prompts.EMPTY
    embed = stock.model.embed_tokens
    tokens = torch.randint(0, 256, (1, 2, 3), generator=torch.Generator().manual_seed(0))
    row = {key: value[:1] for key, value in obs.items()}
    start = [embed(ids[:, :1]), x[:1], embed(ids[:, 1:])]
    if layout == "openvla":
        # 31999 for bin 0 in Llama-2's vocabulary: here 319.
        whole = torch.cat([*start, embed(319 - tokens.flatten(1))], dim=1)
        logits = stock(inputs_embeds=whole).logits[:, -7:-1]
    else:
        # The released code: zeroed embeddings in the slots, a stop token, no causal mask, read one earlier.
        end = embed(torch.tensor([[policy.prompts.end]]))
        whole = torch.cat([*start, torch.zeros(1, 6, LLM), end], dim=1)
        everywhere = torch.ones(1, 1, whole.shape[1], whole.shape[1], dtype=torch.bool)
        logits = stock(inputs_embeds=whole, attention_mask=everywhere).logits[:, -8:-2]
    want = logits[..., 64:320].flip(-1).view(1, 2, 3, 256)
    torch.testing.assert_close(policy.logits(row, tokens), want, atol=1e-4, rtol=1e-4)


def test_statistics_come_along_and_stay(tmp_path):
    folder = write(tmp_path / "vla", tensors())
    policy = load(folder)
    assert policy.normaliser_fixed
    assert policy.obs_keys == ["image", "instruction"]  # no projector of a state in the files
    assert policy.normaliser.provenance["source"] == "vla:bridge"
    out = policy.normaliser.unnormalise_action(torch.tensor([[-1.0, 1.0, 0.25]]))
    torch.testing.assert_close(out, torch.tensor([[-1.0, 2.0, 0.25]]))
    save_folder(tmp_path / "policy", policy_files(policy))
    for path in folder.iterdir():
        path.unlink()
    again = load_policy(tmp_path / "policy")
    assert torch.equal(again.logits(observe()), policy.logits(observe()))
    assert again.normaliser.fingerprint() == policy.normaliser.fingerprint()


def test_a_projector_of_the_state_is_found_beside_the_shards(tmp_path):
    folder = write(tmp_path / "vla", tensors())
    draw = torch.Generator().manual_seed(1)
    shapes = {"fc1.weight": (LLM, 2), "fc1.bias": (LLM,), "fc2.weight": (LLM, LLM), "fc2.bias": (LLM,)}
    held = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    save_file(held, folder / "proprio_projector.safetensors")
    policy = load(folder, proprio=[1, 2])
    assert torch.equal(policy.proprio_projector[2].weight, held["fc2.weight"])
    got = policy.normaliser.obs({"state": torch.tensor([[9.0, 1.0, 0.0, 9.0]])})["state"]
    torch.testing.assert_close(got, torch.tensor([[9.0, 1.0, -1.0, 9.0]]))
    with pytest.raises(CheckpointError, match="proprio_projector"):
        load(folder, proprio=[1, 3])


@pytest.mark.parametrize(
    "lost", ["language_model.lm_head.weight", "vision_backbone.featurizer.blocks.0.attn.qkv.bias"]
)
def test_a_missing_tensor_is_named(tmp_path, lost):
    held = tensors()
    held.pop(lost)
    with pytest.raises(CheckpointError, match=r"has nothing for '.*'.*missing\)"):
        load(write(tmp_path / "vla", held))


def test_an_extra_tensor_is_named(tmp_path):
    held = tensors() | {"language_model.model.layers.0.self_attn.q_norm.weight": torch.ones(3)}
    with pytest.raises(CheckpointError, match=r"extra tensor 'language_model.*q_norm"):
        load(write(tmp_path / "vla", held))


def test_damaged_files_are_named(tmp_path):
    folder = write(tmp_path / "vla", tensors())
    shard = folder / "model-00002-of-00003.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"00002-of-00003.*damaged or truncated"):
        load(folder)
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"00002-of-00003.*missing"):
        load(folder)
    save_file({"other": torch.zeros(1)}, shard)
    with pytest.raises(CheckpointError, match="which the index says"):
        load(folder)
    (folder / "config.json").write_text("{")
    shard.write_bytes(whole)
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load(folder)


def test_another_shape_is_named(tmp_path):
    held = tensors()
    held["projector.fc3.weight"] = torch.zeros(LLM, LLM + 1)
    with pytest.raises(CheckpointError, match=r"projector\.fc3\.weight"):
        load(write(tmp_path / "vla", held))


def test_statistics_that_do_not_fit_are_said(tmp_path):
    two = STATS | {"other": {"action": {"q01": [0.0], "q99": [1.0]}}}
    folder = write(tmp_path / "vla", tensors(), stats=two)
    with pytest.raises(ConfigError, match="bridge, other"):
        load(folder)
    with pytest.raises(ConfigError, match="1 actions"):
        load(folder, unnorm_key="other")
    assert load(folder, unnorm_key="bridge").normaliser_fixed
    (folder / "dataset_statistics.json").write_text("{}")
    with pytest.raises(CheckpointError, match="dataset_statistics"):
        load(folder)


def test_one_file_and_one_tower(tmp_path):
    held = {
        name.replace("fused_featurizer", "featurizer"): value
        for name, value in tensors().items()
        if not name.startswith("vision_backbone.featurizer.") and not name.startswith("projector.")
    }
    draw = torch.Generator().manual_seed(2)
    for name, size in (("fc1", 12), ("fc2", LLM)):
        held[f"projector.{name}.weight"] = torch.randn(LLM, size, generator=draw)
        held[f"projector.{name}.bias"] = torch.randn(LLM, generator=draw)
    folder = write(tmp_path / "vla", held, shards=1)
    (folder / "model-00001-of-00001.safetensors").rename(folder / "model.safetensors")
    (folder / "model.safetensors.index.json").unlink()
    assert load_file(folder / "model.safetensors").keys() == held.keys()
    policy = load(folder, dtype="bfloat16")
    assert list(policy.vision.towers) == ["siglip"]
    assert policy.vision.towers["siglip"].model.dtype == torch.bfloat16
    assert torch.isfinite(policy.logits(observe())).all()
