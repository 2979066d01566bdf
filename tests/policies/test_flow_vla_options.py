# SPDX-License-Identifier: Apache-2.0
"""Flow VLA: precision, adapters, frozen parts, cameras, checkpoints, bad input."""

import importlib.util
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from robopost.artefacts.checkpoint import load_policy, policy_files, save_folder
from robopost.data.batch import Spec
from robopost.errors import CheckpointError, ConfigError, MissingExtraError
from robopost.nets.flat import Flat, frozen_copy
from robopost.nets.vla.pixels import square_pixels
from robopost.nets.vla.prompts import to_bytes
from robopost.policies.flow_vla import FlowVLA, FlowVLAConfig, gemma_tokenizer

pytest.importorskip("transformers")
found = importlib.util.spec_from_file_location("flow_vla_lab", Path(__file__).parent / "flow_vla_lab.py")
lab = importlib.util.module_from_spec(found)
found.loader.exec_module(lab)
SPEC, BOX, make, observe, draw, released_inputs = (
    getattr(lab, name) for name in ("SPEC", "BOX", "make", "observe", "draw", "released_inputs")
)


@pytest.fixture(scope="module")
def tiny():
    return make(action_dim=7, state_dim=6)


# --- precision, memory, parts that are frozen


def test_recomputed_activations_give_the_same_gradients():
    obs, chunk, mask = observe(), draw(4, 4, 3), torch.ones(4, 4).bool()
    grads = []
    for recompute in (False, True):
        policy = make(gradient_checkpointing=recompute).train()
        flat = Flat(policy)
        flat.backward(policy.bc_loss(obs, chunk, mask, torch.Generator().manual_seed(0)))
        grads.append(flat.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-7)


def test_bfloat16_weights_keep_times_and_chunks_in_float32():
    policy, full = make(dtype="bfloat16"), make()
    assert {p.dtype for p in policy.parameters()} == {torch.bfloat16}
    assert policy.net.embed_action_time.sinusoid_embeds.sinusoid_freq.dtype == torch.float32
    assert torch.equal(policy.time_embedding(range(10)), full.time_embedding(range(10)))
    obs, x, t = observe(), draw(4, 4, 3), torch.rand(4)
    with torch.no_grad():
        low, high = (p.velocity(x, t, p.encoder(obs)) for p in (policy, full))
    assert low.dtype == torch.float32
    assert 0 < (low - high).abs().max() < 0.1
    flat = Flat(policy)
    flat.backward(policy.bc_loss(obs, x, torch.ones(4, 4).bool(), torch.Generator()))
    assert flat.grad.float().norm() > 0


@pytest.mark.parametrize(
    ("option", "part"), [("freeze_vision", "encoder.vlm.vision_tower."), ("freeze_vlm", "encoder.vlm.")]
)
def test_frozen_parts_are_not_trained(option, part):
    policy = make(**{option: True})
    fixed = {name for name, p in policy.named_parameters() if not p.requires_grad}
    assert fixed == {name for name, _ in policy.named_parameters() if name.startswith(part)}
    copy, flat = frozen_copy(policy)  # what averages of weights and frozen steps are made of
    assert len(flat.params) == len(list(policy.parameters())) - len(fixed)
    assert torch.equal(copy.encoder(observe()), policy.encoder(observe()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_begin_at_nothing_and_are_merged_into_the_export(dtype, tmp_path):
    policy = make(lora_rank=2, dtype=dtype)
    obs, x, t = observe(), draw(4, 4, 3), torch.full((4,), 0.4)
    with torch.no_grad():
        plain = make(dtype=dtype)
        tolerance = {"rtol": 0, "atol": 1e-6 if dtype == "float32" else 0.02}
        torch.testing.assert_close(
            policy.velocity(x, t, policy.encoder(obs)), plain.velocity(x, t, plain.encoder(obs)), **tolerance
        )
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert all(
        ".lora_" in name or name.startswith(("net.embed_action", "net.action_out")) for name in trained
    )
    assert {p.dtype for p in policy.parameters() if p.requires_grad} == {torch.float32}
    flat = Flat(policy)
    flat.backward(policy.bc_loss(obs, x, torch.ones(4, 4).bool(), torch.Generator()))
    assert flat.grad.norm() > 0
    with torch.no_grad():
        flat.data.add_(0.1 * draw(flat.data.numel()))
        wanted = policy.velocity(x, t, policy.encoder(obs))
        assert (wanted - plain.velocity(x, t, plain.encoder(obs))).abs().max() > 0.1
    save_folder(tmp_path / "p", policy_files(policy))
    with torch.no_grad():
        loaded = load_policy(tmp_path / "p")
        assert torch.equal(loaded.velocity(x, t, loaded.encoder(obs)), wanted)
        if dtype == "float32":
            theirs = policy.export().eval()(noise=x, timestep=1 - t, **released_inputs(policy, obs)).logits
            torch.testing.assert_close(-theirs, wanted, rtol=1e-4, atol=1e-5)


def test_columns_of_the_state():
    policy = make(proprio=[1, 3])
    obs = observe()
    other = obs | {"state": obs["state"].clone()}
    other["state"][:, [0, 4]] += 1.0
    assert policy.net.layout.state == 3
    assert torch.equal(policy.encoder(obs), policy.encoder(other))
    blind = make(proprio=[])
    assert blind.obs_keys == ["image", "instruction"]
    assert blind.encoder(observe()).isfinite().all()


def test_first_steps_can_be_left_to_a_frozen_copy():
    policy = make(steps=4)
    x, obs = draw(4, 4, 3), observe()
    before = policy.chain(obs, x)
    policy.freeze_first(2)
    after = policy.chain(obs, x)
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a, b)
    cond = policy.encoder(obs)
    batch = policy.means(torch.stack(before[2:4], 1), 2, cond)
    torch.testing.assert_close(batch, torch.stack(before[3:], 1), rtol=1e-5, atol=1e-5)
    assert policy.features(cond).shape == (4, policy.feature_dim)


# --- images, cameras


def test_images_are_scaled_to_fit_and_centred():
    image = torch.full((1, 24, 32, 3), 255, dtype=torch.uint8)
    x = square_pixels(image, 16)
    assert x.shape == (1, 3, 16, 16)
    assert (x[0, :, :2] == -1).all()
    assert (x[0, :, 14:] == -1).all()
    torch.testing.assert_close(x[0, :, 2:14], torch.ones(3, 12, 16))
    assert torch.equal(square_pixels(image[:, :, :24], 24), torch.ones(1, 3, 24, 24))
    assert square_pixels(image[:, :8, :16], 64).shape == (1, 3, 64, 64)  # enlarged


def test_cameras_come_in_the_order_of_their_keys_and_words_are_optional():
    spec = Spec({"image_a": ((16, 16, 3), "uint8"), "image_b": ((16, 16, 3), "uint8")}, 3, *BOX)
    policy = make(spec)
    assert policy.encoder.layout.length == 2 * 4
    assert policy.encoder.prompts is None
    images = {key: torch.randint(0, 256, (2, 16, 16, 3)).to(torch.uint8) for key in ("image_a", "image_b")}
    tokens, valid = policy.encoder.tokens(images)
    swapped, _ = policy.encoder.tokens({"image_a": images["image_b"], "image_b": images["image_a"]})
    assert valid.all()
    torch.testing.assert_close(tokens[:, :4], swapped[:, 4:], rtol=1e-5, atol=1e-6)
    chunk, log_prob, chain = policy.sample(images, generator=torch.Generator())
    assert (chunk.shape, log_prob, chain.shape) == ((2, 4, 3), None, (2, 11, 4, 3))


# --- checkpoints


def test_a_checkpoint_is_complete(tiny, tmp_path):
    save_folder(tmp_path / "p", policy_files(tiny))
    loaded = load_policy(tmp_path / "p")
    assert isinstance(loaded, FlowVLA)
    obs = observe()
    obs["instruction"][0] = to_bytes("Grüße an die rote Dose")  # bytes nobody has trained on
    for key in ("chunk", "chain"):
        ours, theirs = (p.act(obs, generator=torch.Generator().manual_seed(0)) for p in (tiny, loaded))
        assert torch.equal(getattr(ours, key), getattr(theirs, key))
    assert loaded.encoder.prompts.tokenizer.to_str() == tiny.encoder.prompts.tokenizer.to_str()


def test_weights_go_to_transformers_and_come_back(tiny, tmp_path):
    tiny.export().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(tiny.encoder.prompts.tokenizer.to_str())
    config = FlowVLAConfig(horizon=4, prompt_length=40, path=str(tmp_path))
    policy = FlowVLA(config, SPEC)
    policy.net.padding.zero_()
    assert (config.path, config.source, config.pad_noise) == ("", str(tmp_path), True)
    obs, x, t = observe(), draw(4, 4, 3), torch.rand(4)
    with torch.no_grad():
        wanted = tiny.velocity(x, t, tiny.encoder(obs))
        torch.testing.assert_close(policy.velocity(x, t, policy.encoder(obs)), wanted)
    # A checkpoint of it needs the folder no more.
    save_folder(tmp_path / "p", policy_files(policy))
    (tmp_path / "model.safetensors").unlink()
    load_policy(tmp_path / "p")
    with pytest.raises(CheckpointError, match=r"no pi0 at policy.path="):
        FlowVLA(FlowVLAConfig(horizon=4, path=str(tmp_path)), SPEC)


def test_missing_weights_are_named(tiny, tmp_path):
    from safetensors.torch import load_file, save_file

    tiny.export().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(tiny.encoder.prompts.tokenizer.to_str())
    tensors = load_file(tmp_path / "model.safetensors")
    lost = next(key for key in tensors if "action_out_proj" in key)
    del tensors[lost]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks '.*action_out_proj.*' and 0 more weights"):
        FlowVLA(FlowVLAConfig(horizon=4, prompt_length=40, path=str(tmp_path)), SPEC)


def test_gemmas_special_tokens_get_the_names_that_prompts_ask_for():
    text = json.dumps(
        {"added_tokens": [{"content": "<bos>"}, {"content": "<eos>"}], "model": {"vocab": {"<bos>": 2}}}
    )
    renamed = json.loads(gemma_tokenizer(text))
    assert [item["content"] for item in renamed["added_tokens"]] == ["<s>", "</s>"]
    assert renamed["model"]["vocab"] == {"<s>": 2}
    assert gemma_tokenizer(json.dumps(renamed)) == json.dumps(renamed)


# --- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"times": "cosine"}, "policy.times"),
        ({"proprio": [2]}, r"policy.proprio=\[2\] must be"),
        ({"proprio": [2, 9]}, r"must choose columns 0..4 of `state`"),
        ({"lora_rank": 2, "lora_targets": ["no_proj"]}, r"policy.lora_targets=\['no_proj'\]"),
        ({"dtype": "float16"}, "policy.dtype"),
        ({"layers": 0}, r"policy.layers=0 must be at least 1"),
        ({"image_size": 20}, r"policy.image_size=20 must be a multiple of policy.patch=8"),
        ({"heads": 3}, r"policy.vision_width=16 must be a multiple of policy.heads=3"),
        ({"width": 6, "vision_width": 16}, r"must be even"),
        ({"action_dim": -1}, r"policy.action_dim=-1 must be 0 or more"),
        ({"action_dim": 2}, r"actions of 3 numbers, the model has room for 2"),
        ({"state_dim": 4}, r"a state of 5 numbers, the model has room for 4"),
        ({"history": 2}, r"policy.history=2 must be 1"),
        ({"obs_keys": ["state", "instruction"]}, r"needs an image"),
        ({"text_tokens": 40}, r"policy.text_tokens=40"),
        ({"arch": "{"}, r"policy.arch"),
    ],
)
def test_bad_values_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        make(**options)


def test_a_tokenizer_too_large_for_the_model_is_refused(tiny):
    config = FlowVLAConfig(**(asdict(tiny.config) | {"tokenizer_json": "", "text_tokens": 400}))
    with pytest.raises(
        ConfigError, match=r"the tokenizer has 4\d\d tokens|the tokenizer has 3\d\d tokens, the model"
    ):
        FlowVLA(config, SPEC)


def test_without_transformers_the_extra_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "tokenizers", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"robopost\[vla\]"):
        make()
