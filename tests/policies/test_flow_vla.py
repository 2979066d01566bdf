# SPDX-License-Identifier: Apache-2.0
"""Flow VLA: against transformers' pi0, masks, cached prefix, padding, over-fitting, checkpoints, bad input."""

import json
from dataclasses import asdict

import pytest
import torch
from torch.nn import functional as F

from robopost.artefacts.checkpoint import load_policy, policy_files, save_folder
from robopost.data.batch import Spec
from robopost.errors import CheckpointError, ConfigError, MissingExtraError
from robopost.nets.flat import Flat, frozen_copy
from robopost.nets.vla.pi0 import expert_mask, token_positions
from robopost.nets.vla.pixels import square_pixels
from robopost.nets.vla.prompts import to_bytes
from robopost.policies.flow_vla import FlowVLA, FlowVLAConfig, gemma_tokenizer

pytest.importorskip("transformers")
BOX = ((-1.0,) * 3, (1.0,) * 3)
SPEC = Spec(
    {"image": ((24, 32, 3), "uint8"), "state": ((5,), "float32"), "instruction": ((64,), "uint8")}, 3, *BOX
)
TEXTS = ("lift the red cube", "put the green cube in the yellow zone", "touch the blue cube", "open the box")
TINY = {
    "horizon": 4,
    "image_size": 16,
    "vision_width": 16,
    "vision_layers": 1,
    "width": 32,
    "layers": 2,
    "heads": 2,
    "expert_width": 24,
    "text_tokens": 300,
    "prompt_length": 40,
    "image_shift": 0,
}


def make(spec=SPEC, seed=0, **options) -> FlowVLA:
    torch.manual_seed(seed)
    return FlowVLA(FlowVLAConfig(**(TINY | options)), spec)


@pytest.fixture(scope="module")
def tiny():
    return make(action_dim=7, state_dim=6)


def observe(batch=4, seed=3):
    g = torch.Generator().manual_seed(seed)
    return {
        "image": torch.randint(0, 256, (batch, 24, 32, 3), generator=g).to(torch.uint8),
        "state": torch.randn(batch, 5, generator=g),
        "instruction": torch.stack([to_bytes(TEXTS[i % 4]) for i in range(batch)]),
    }


def draw(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- against transformers


def released_inputs(policy, obs):
    """The same observations as pi0 of transformers takes them: image tokens, then the prompt padded on the RIGHT."""
    encoder = policy.encoder
    vlm = policy.encoder.vlm.config
    prompts = [
        encoder.prompts.encode(bytes(row.tolist()).rstrip(b"\0").decode()) for row in obs["instruction"]
    ]
    images = (encoder.size // vlm.vision_config.patch_size) ** 2
    ids = torch.zeros(len(prompts), images + max(map(len, prompts)), dtype=torch.long)
    mask = torch.zeros_like(ids)
    ids[:, :images], mask[:, :images] = vlm.image_token_id, 1
    for row, prompt in enumerate(prompts):
        ids[row, images : images + len(prompt)] = torch.tensor(prompt)
        mask[row, images : images + len(prompt)] = 1
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": square_pixels(obs["image"], encoder.size)[:, None],
        "pixel_attention_mask": torch.ones(len(ids), 1, dtype=torch.bool),
        "state": F.pad(obs["state"], (0, policy.net.layout.state - 5)),
    }


@torch.no_grad()
def test_velocity_is_that_of_transformers(tiny):
    obs, x, t = observe(), draw(4, 4, 3), torch.tensor([0.0, 0.3, 0.7, 0.95])
    model = tiny.export().eval()
    theirs = model(noise=F.pad(x, (0, 4)), timestep=1 - t, **released_inputs(tiny, obs)).logits
    ours = tiny.velocity(x, t, tiny.encoder(obs))
    assert ours.abs().max() > 0.05
    torch.testing.assert_close(ours, -theirs[..., :3], rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 10])
def test_chunks_are_those_that_transformers_samples(steps):
    policy = make(steps=steps)  # no padded dimensions: there transformers denoises noise, see the page
    x, obs = draw(4, 4, 3), observe()
    theirs = policy.export().eval().sample_actions(noise=x, num_steps=steps, **released_inputs(policy, obs))
    torch.testing.assert_close(policy.chain(obs, x)[-1], theirs, rtol=1e-5, atol=1e-5)


# --- the joint sequence, without a cache


def joint_velocity(policy, obs, x, t):
    """pi0 as one sequence [prefix | state | actions]: per-layer queries, keys and values of both experts, one mask."""
    prefix, valid = policy.encoder.tokens(obs)
    net = policy.net
    state = F.pad(obs["state"], (0, net.layout.state - 5))
    suffix = net.embed_action_time(state, F.pad(x, (0, net.padding.shape[1])), 1 - t)
    pad = torch.cat([valid, torch.ones(suffix.shape[:2], dtype=torch.bool)], 1)
    block = torch.cat([torch.zeros(valid.shape[1]), torch.ones(1), torch.full((x.shape[1],), 2.0)])
    mask = (block[None, :] <= block[:, None]) & pad[:, None, :]
    positions = token_positions(pad)
    models = (policy.encoder.vlm.language_model, net.dit)
    cos, sin = models[0].rotary_emb(prefix, positions)
    streams, cut = [prefix, suffix], prefix.shape[1]

    def rotate(y):
        a, b = y.chunk(2, -1)
        return y * cos[:, None] + torch.cat([-b, a], -1) * sin[:, None]

    for layers in zip(*(model.layers for model in models), strict=True):
        parts = []
        for layer, h in zip(layers, streams, strict=True):
            h, att = layer.input_layernorm(h), layer.self_attn
            parts.append(
                [
                    p(h).unflatten(-1, (-1, att.head_dim)).transpose(1, 2)
                    for p in (att.q_proj, att.k_proj, att.v_proj)
                ]
            )
        q, k, v = (torch.cat([parts[0][i], parts[1][i]], 2) for i in range(3))
        q, k = rotate(q), rotate(k)
        weights = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~mask[:, None], float("-inf")).softmax(-1)
        out = (weights @ v).transpose(1, 2).flatten(2)
        for i, layer in enumerate(layers):
            part = out[:, :cut] if i == 0 else out[:, cut:]
            h = streams[i] + layer.self_attn.o_proj(part)
            streams[i] = h + layer.mlp(layer.post_attention_layernorm(h))
    hidden = models[1].norm(streams[1])[:, 1:]
    return -net.action_out_proj(hidden)[..., : x.shape[-1]], models[0].norm(streams[0])


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 10])
def test_cached_prefix_equals_the_whole_forward_with_padded_language(steps):
    policy = make(steps=steps, action_dim=7, state_dim=6)
    obs, x = observe(), draw(4, 4, 3)
    assert not policy.encoder.tokens(obs)[1].all()  # prompts of different lengths
    chain = policy.chain(obs, x)
    for k in range(steps):
        velocity, _ = joint_velocity(policy, obs, x, torch.full((4,), k / steps))
        x = x + velocity / steps
        torch.testing.assert_close(chain[k + 1], x, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_padding_of_the_prompt_changes_nothing(tiny):
    policy = make(action_dim=7, state_dim=6, prompt_length=30)
    policy.load_state_dict(tiny.state_dict())
    obs, x, t = observe(), draw(4, 4, 3), torch.rand(4)
    longer = tiny.velocity(x, t, tiny.encoder(obs))
    torch.testing.assert_close(policy.velocity(x, t, policy.encoder(obs)), longer, rtol=1e-5, atol=1e-6)


# --- masks


def test_who_sees_whom():
    valid = torch.tensor([[True, True, False]])
    wanted = [[1, 1, 0, 1, 0, 0], [1, 1, 0, 1, 1, 1], [1, 1, 0, 1, 1, 1]]
    assert expert_mask(valid, 3)[0, 0].int().tolist() == wanted


@torch.no_grad()
def test_prefix_is_blind_to_actions_and_actions_see_each_other(tiny):
    obs, x, t = observe(), draw(4, 4, 3), torch.full((4,), 0.4)
    cond = tiny.encoder(obs)
    last = x.clone()
    last[:, -1] += 1.0
    change = (tiny.velocity(last, t, cond) - tiny.velocity(x, t, cond)).abs().amax((0, 2))
    assert (change > 1e-4).all()  # the first action sees the last
    first, second = (joint_velocity(tiny, obs, chunk, t)[1] for chunk in (x, last))
    assert torch.equal(first, second)  # hidden states of the prefix
    # The state token is blind to actions: its keys in the second layer stay the same.
    seen = []
    hook = tiny.net.dit.layers[1].self_attn.k_proj.register_forward_hook(lambda _, __, out: seen.append(out))
    for chunk in (x, last):
        tiny.velocity(chunk, t, cond)
    hook.remove()
    assert torch.equal(seen[0][:, 0], seen[1][:, 0])
    assert not torch.equal(seen[0][:, 1], seen[1][:, 1])


@torch.no_grad()
def test_every_input_matters(tiny):
    obs, x, t = observe(), draw(4, 4, 3), torch.full((4,), 0.4)
    base = tiny.velocity(x, t, tiny.encoder(obs))
    other = observe(seed=9) | {"instruction": obs["instruction"].roll(1, 0)}
    for key in obs:
        changed = tiny.velocity(x, t, tiny.encoder(obs | {key: other[key]}))
        assert (changed - base).abs().amax((1, 2)).min() > 1e-5, key


# --- the loss


def test_padding_counts_neither_above_nor_below_the_fraction_bar(tiny):
    obs, chunk = observe(), draw(4, 4, 3, seed=5)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
    generator = torch.Generator().manual_seed(7)
    loss = tiny.bc_loss(obs, chunk, mask, generator)
    generator = torch.Generator().manual_seed(7)
    noise = torch.randn(4, 4, 3, generator=generator)
    t = 1 - (0.001 + 0.999 * torch.rand(4, generator=generator) ** (2 / 3))
    at = t[:, None, None]
    clean = chunk * mask[..., None]
    velocity = tiny.velocity((1 - at) * noise + at * clean, t, tiny.encoder(obs))
    total, count = 0.0, 0
    for b in range(4):
        steps = int(mask[b].sum())  # the truncated chunk
        total += (velocity[b, :steps] - (chunk[b, :steps] - noise[b, :steps])).square().sum().item()
        count += 3 * steps
    assert loss.item() == pytest.approx(total / count, rel=1e-5)
    chunk[~mask] = 1e6
    assert tiny.bc_loss(obs, chunk, mask, torch.Generator().manual_seed(7)).item() == loss.item()
    none = tiny.bc_loss(obs, chunk, torch.zeros_like(mask), torch.Generator())
    assert none.item() == 0.0
    gradients = torch.autograd.grad(none, [p for p in tiny.parameters()], allow_unused=True)
    assert all(g is None or not g.any() for g in gradients)


@pytest.mark.parametrize("pad_noise", [False, True])
def test_padded_dimensions_carry_no_gradient(pad_noise):
    policy = make(action_dim=7, state_dim=9, pad_noise=pad_noise)
    assert policy.net.padding.any().item() is pad_noise
    policy.bc_loss(observe(), draw(4, 4, 3), torch.ones(4, 4).bool(), torch.Generator()).backward()
    out, into = policy.net.action_out_proj, policy.net.embed_action_time
    assert out.weight.grad[:3].abs().min() > 0
    assert not out.weight.grad[3:].any()
    assert not out.bias.grad[3:].any()
    assert into.action_in_proj.weight.grad[:, :3].abs().sum() > 0
    assert into.action_in_proj.weight.grad[:, 3:].any().item() is pad_noise  # inputs, where they hold noise
    assert not into.state_proj.weight.grad[:, 5:].any()
    unused = {name for name, p in policy.named_parameters() if p.grad is None or not p.grad.any()}
    # The last layer of the language model acts through its keys and values alone.
    allowed = (
        "language_model.norm",
        "layers.1.self_attn.q_proj",
        "layers.1.self_attn.o_proj",
        "layers.1.mlp",
    )
    allowed += ("layers.1.post_attention_layernorm",)
    assert all(
        name.startswith("encoder.vlm.language_model") and any(a in name for a in allowed) for name in unused
    )


def test_padded_noise_follows_the_flow_of_a_released_model():
    policy = make(action_dim=7, pad_noise=True)
    seen = []
    hook = policy.net.embed_action_time.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    policy.velocity(draw(4, 4, 3), torch.tensor([0.0, 0.25, 0.5, 1.0]), policy.encoder(observe()))
    hook.remove()
    rest = seen[0][..., 3:]
    torch.testing.assert_close(rest[1], 0.75 * rest[0])
    assert 0.5 < rest[0].std() < 1.5
    assert not rest[3].any()


def test_training_times_are_those_of_pi0(tiny):
    late = 1 - tiny.draw_times(200_000, torch.Generator().manual_seed(0), torch.device("cpu"))
    assert late.min() >= 0.001
    assert late.max() <= 1.0
    u = (late - 0.001) / 0.999
    assert u.mean().item() == pytest.approx(0.6, abs=2e-3)  # Beta(1.5, 1): a / (a + b)
    assert u.var().item() == pytest.approx(1.5 / (2.5**2 * 3.5), abs=2e-3)
    for x in (0.1, 0.5, 0.9):
        assert (u <= x).float().mean().item() == pytest.approx(x**1.5, abs=4e-3)
    even = make(times="uniform").draw_times(100_000, torch.Generator().manual_seed(0), torch.device("cpu"))
    assert even.mean().item() == pytest.approx(0.5, abs=5e-3)


def test_a_tiny_model_fits_four_samples_and_uses_what_it_sees():
    policy = make(steps=10)
    obs, chunk, mask = observe(), draw(4, 4, 3, seed=8), torch.ones(4, 4).bool()
    flat = Flat(policy)
    optimizer = torch.optim.AdamW([flat.param], lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    several = {key: value.repeat(4, *[1] * (value.dim() - 1)) for key, value in obs.items()}
    losses = []
    for _ in range(250):
        loss = policy.bc_loss(several, chunk.repeat(4, 1, 1), mask.repeat(4, 1), generator)
        flat.backward(loss)
        flat.clip(1.0)
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        end = policy.chain(obs, draw(4, 4, 3, seed=2))[-1]
    error = (end - chunk).square().mean().sqrt().item()
    swapped = (end.roll(1, 0) - chunk).square().mean().sqrt().item()
    assert sum(losses[:10]) / 10 > 1.5
    assert sum(losses[-20:]) / 20 < 0.4
    assert error < 0.45
    assert swapped > 2.5 * error  # the chunk belongs to its observation


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
