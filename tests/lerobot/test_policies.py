# SPDX-License-Identifier: Apache-2.0
"""policy=lerobot: the same chunks and losses as lerobot's own, SmolVLA as a flow."""

import pytest
import torch
from policy_lab import draw, frames, make, observe, theirs

from robopost.nets.flat import frozen_copy
from robopost.policies.lerobot import seeded
from robopost.policies.smolvla import SmolVLA, block_mask

# --- the same as lerobot


@pytest.mark.parametrize("kind", ["act", "smolvla"])
def test_chunks_are_lerobots(kind, tmp_path):
    # As many action dimensions as the task: SmolVLA itself denoises the padded ones, ours follow a fixed path.
    policy = make(kind, tmp_path, **({"max_action_dim": 4} if kind == "smolvla" else {}))
    obs = observe()
    model, pre, post = theirs(tmp_path / kind)
    batch = pre(frames(obs))
    generator = torch.Generator().manual_seed(5)
    chunk = policy.act(obs, generator=generator).chunk
    if kind == "smolvla":
        noise = torch.randn(4, 6, 4, generator=torch.Generator().manual_seed(5))
        wanted = post(model.predict_action_chunk(batch, noise=noise))
    else:
        wanted = post(model.predict_action_chunk(batch))
    assert wanted.std() > 0.1
    torch.testing.assert_close(chunk, wanted.clamp(-5, 5), rtol=1e-5, atol=1e-5)


def test_diffusion_sees_a_history_and_gives_what_lerobot_executes(tmp_path):
    policy = make("diffusion", tmp_path)
    assert (policy.history, policy.horizon, policy.execute) == (2, 7, 6)
    obs = observe(history=2)
    with seeded(torch.Generator().manual_seed(5), torch.device("cpu")):
        model, pre, post = theirs(tmp_path / "diffusion")
    model.reset()
    for step in (0, 1):  # lerobot collects its history itself; the first call acts too
        batch = pre(
            frames(
                {"image": obs["image"][:, step], "state": obs["state"][:, step]}
                | {"instruction": obs["instruction"]}
            )
        )
        if step:
            model._queues["action"].clear()
        with seeded(torch.Generator().manual_seed(5), torch.device("cpu")):
            first = post(model.select_action(batch))
    chunk = policy.act(obs, generator=torch.Generator().manual_seed(5)).chunk
    assert chunk.shape == (4, 7, 4)
    torch.testing.assert_close(chunk[:, 0], first.clamp(-5, 5), rtol=1e-4, atol=1e-5)


def test_randomness_is_ours_and_leaves_torchs_alone(tmp_path):
    policy = make("diffusion", tmp_path)
    obs = observe(history=2)
    state = torch.get_rng_state()
    a, b, c = (policy.act(obs, generator=torch.Generator().manual_seed(s)).chunk for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    same = [policy.act(obs, deterministic=True).chunk for _ in range(2)]
    assert torch.equal(*same)
    loss = [
        policy.bc_loss(obs, draw(4, 7, 4), torch.ones(4, 7).bool(), torch.Generator()).item()
        for _ in range(2)
    ]
    assert loss[0] == loss[1]
    assert torch.equal(torch.get_rng_state(), state)


# --- losses


def test_act_leaves_padding_out(tmp_path):
    policy = make("act", tmp_path, use_vae=False, dropout=0.0)
    obs, chunk = observe(), draw(4, 6, 4)
    mask = torch.ones(4, 6).bool()
    mask[:, 3:] = False
    loss = policy.bc_loss(obs, chunk, mask, torch.Generator())
    model, pre, _ = theirs(tmp_path / "act")
    batch = pre(frames(obs) | {"action": chunk})
    with torch.no_grad():
        error = (model.predict_action_chunk(batch) - batch["action"]).abs()
    assert loss.item() == pytest.approx(
        error[:, :3].sum().item() / error.numel(), rel=1e-4
    )  # lerobot's denominator
    chunk[:, 3:] = 99.0
    assert policy.bc_loss(obs, chunk, mask, torch.Generator()).item() == loss.item()


def test_diffusion_leaves_padding_and_the_past_out(tmp_path):
    policy = make("diffusion", tmp_path, do_mask_loss_for_padding=False)
    obs, chunk = observe(history=2), draw(4, 7, 4)
    none = policy.bc_loss(obs, chunk, torch.zeros(4, 7).bool(), torch.Generator())
    every = policy.bc_loss(obs, chunk, torch.ones(4, 7).bool(), torch.Generator())
    assert none.item() == 0.0
    assert every.item() > 0.1


def test_smolvla_reads_a_key_that_nobody_writes(tmp_path):
    """If the first half fails, lerobot has mended it; ours masks by itself either way."""
    policy = make("smolvla", tmp_path)
    obs, chunk = observe(), draw(4, 6, 4)
    model, pre, _ = theirs(tmp_path / "smolvla")
    batch = pre(frames(obs) | {"action": chunk})
    padded = torch.zeros(4, 6).bool()
    padded[:, 3:] = True
    noise, time = draw(4, 6, 7), torch.full((4,), 0.5)
    losses = [
        model.forward(dict(batch) | extra, noise=noise, time=time)[0].item()
        for extra in ({}, {"action_is_pad": padded}, {"actions_id_pad": padded})
    ]
    assert losses[0] == losses[1]
    assert losses[2] < losses[0]
    full, half = (
        policy.bc_loss(obs, policy.normaliser.action(chunk), mask, torch.Generator()).item()
        for mask in (~torch.zeros_like(padded), ~padded)
    )
    assert full != half


@pytest.fixture
def smolvla(tmp_path) -> SmolVLA:
    return make("smolvla", tmp_path)


def test_smolvla_loss_by_hand(smolvla):
    obs, chunk = observe(), draw(4, 6, 4)
    mask = torch.ones(4, 6).bool()
    mask[0, 3:], mask[1, 1:], mask[2] = False, False, False
    loss = smolvla.bc_loss(obs, chunk, mask, torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(7)
    noise = torch.randn(4, 6, 4, generator=generator)
    t = 1 - (0.001 + 0.999 * torch.rand(4, generator=generator) ** (2 / 3))
    clean, at = chunk * mask[..., None], t[:, None, None]
    # lerobot's training forward of the whole sequence, element by element, the truncated chunks of it
    x, padding = (1 - at) * noise + at * clean, (1 - at) * smolvla.net.padding
    velocity, _ = joint(smolvla, obs, torch.cat([x, padding], -1), t)
    error = (velocity[..., :4] - (chunk - noise)).square()
    wanted = sum(error[b, : int(mask[b].sum())].sum() for b in range(4)) / (4 * mask.sum())
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-4)
    none = smolvla.bc_loss(obs, chunk, torch.zeros_like(mask), torch.Generator())
    assert none.item() == 0.0


def test_smolvla_padded_dimensions_carry_no_gradient(smolvla):
    smolvla.bc_loss(observe(), draw(4, 6, 4), torch.ones(4, 6).bool(), torch.Generator()).backward()
    out = smolvla.encoder.policy.model.action_out_proj
    assert out.weight.grad[:4].abs().min() > 0
    assert not out.weight.grad[4:].any()
    assert not out.bias.grad[4:].any()
    assert smolvla.encoder.policy.model.state_proj.weight.grad[:, :6].any()
    assert not smolvla.encoder.policy.model.state_proj.weight.grad[:, 6:].any()


# --- masks and the cache


def joint(policy, obs, x, t):
    """(velocity, hidden prefix) of lerobot's training forward: one sequence [prefix | actions], no cache."""
    from lerobot.policies.smolvla.modeling_smolvla import make_att_2d_masks

    model = policy.encoder.policy.model
    prefix, valid, blocks = policy.encoder.tokens(obs)
    suffix, own, causal = model.embed_suffix(x, 1 - t)
    pad = torch.cat([valid, own], 1)
    mask = make_att_2d_masks(pad, torch.cat([blocks, causal], 1))
    (hidden, out), _ = model.vlm_with_expert.forward(
        attention_mask=mask,
        position_ids=torch.cumsum(pad, 1) - 1,
        past_key_values=None,
        inputs_embeds=[prefix, suffix],
        use_cache=False,
        fill_kv_cache=False,
    )
    return -model.action_out_proj(out[:, -x.shape[1] :].float()), hidden


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 10])
def test_cached_prefix_equals_the_whole_forward_with_padded_language(tmp_path, steps):
    policy = make("smolvla", tmp_path, num_steps=steps)
    assert policy.num_steps == steps
    obs, x = observe(), draw(4, 6, 4)
    assert not policy.encoder.tokens(obs)[1].all()
    chain = policy.chain(obs, x)
    for k in range(steps):
        t = torch.full((4,), k / steps)
        padding = (1 - t)[:, None, None] * policy.net.padding
        velocity, _ = joint(policy, obs, torch.cat([x, padding], -1), t)
        x = x + velocity[..., :4] / steps
        torch.testing.assert_close(chain[k + 1], x, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_actions_are_causal_and_the_prefix_is_blind_to_them(smolvla):
    obs, x, t = observe(), draw(4, 6, 4), torch.full((4,), 0.4)
    last, first = x.clone(), x.clone()
    last[:, -1] += 1.0
    first[:, 0] += 1.0
    cond = smolvla.encoder(obs)
    base = smolvla.velocity(x, t, cond)
    change = (smolvla.velocity(last, t, cond) - base).abs().amax((0, 2))
    assert not change[:-1].any()
    assert change[-1] > 1e-4
    assert (smolvla.velocity(first, t, cond) - base).abs().amax((0, 2)).min() > 1e-6
    padding = (1 - t)[:, None, None] * smolvla.net.padding
    hidden = [joint(smolvla, obs, torch.cat([chunk, padding], -1), t)[1] for chunk in (x, last)]
    valid = smolvla.encoder.tokens(obs)[1]  # a padded token looks at everything alike, and nobody looks at it
    assert torch.equal(hidden[0][valid], hidden[1][valid])


def test_blocks_see_up_to_their_own():
    valid = torch.tensor([[True, False, True, True]])
    mask = block_mask(valid, torch.tensor([[0, 0, 1, 1]]))
    assert mask[0].int().tolist() == [[1, 0, 0, 0], [0, 0, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]


@torch.no_grad()
def test_every_input_of_smolvla_matters(smolvla):
    obs, x, t = observe(), draw(4, 6, 4), torch.full((4,), 0.4)
    base = smolvla.velocity(x, t, smolvla.encoder(obs))
    other = observe(seed=9) | {"instruction": obs["instruction"].roll(1, 0)}
    for key in obs:
        changed = smolvla.velocity(x, t, smolvla.encoder(obs | {key: other[key]}))
        assert (changed - base).abs().amax((1, 2)).min() > 1e-6, key


def test_first_steps_of_smolvla_can_be_left_to_a_frozen_copy(smolvla):
    x, obs = draw(4, 6, 4), observe()
    before = smolvla.chain(obs, x)
    smolvla.freeze_first(2)
    for a, b in zip(before, smolvla.chain(obs, x), strict=True):
        torch.testing.assert_close(a, b)
    frozen = {name for name, p in smolvla.named_parameters() if name.startswith("frozen.")}
    assert len(frozen) * 2 == len(dict(smolvla.named_parameters()))
    copy, flat = frozen_copy(smolvla)
    assert torch.equal(copy.chain(obs, x)[-1], smolvla.chain(obs, x)[-1])
    flat.data.zero_()
    assert not torch.equal(copy.chain(obs, x)[-1], smolvla.chain(obs, x)[-1])
