# SPDX-License-Identifier: Apache-2.0
"""Flow VLA: against transformers' pi0, masks, cached prefix, padding, over-fitting."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from robopost.nets.flat import Flat
from robopost.nets.vla.pi0 import expert_mask, token_positions

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


# --- against transformers


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
