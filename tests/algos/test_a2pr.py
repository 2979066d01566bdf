# SPDX-License-Identifier: Apache-2.0
"""A2PR: the acceptance checks of its losses, agreement with the formulas, and the toy task of its reference."""

import copy

import pytest
import torch
from torch import nn

from robopost.algos.offline import a2pr
from robopost.algos.offline.a2pr import A2PRConfig
from robopost.algos.offline.td3_bc import td3_bc_loss
from robopost.data.batch import Batch, Spec
from robopost.errors import ConfigError
from robopost.nets import fused
from robopost.nets.vae import ActionVAE, kl_divergence


def gradient(loss, module):
    grads = torch.autograd.grad(loss, list(module.parameters()), retain_graph=True)
    return torch.cat([g.flatten() for g in grads])


def judged(algo, batch, value=None, seed=0, q_action=None):
    """The actor's loss and metrics at fixed noise; V(s) and Q1(s, a) are the networks' unless given."""
    noise = torch.randn(len(batch), algo.latent, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        value = algo.value(batch.obs) if value is None else value
        q_action = algo.critic(batch.obs, batch.action)[0] if q_action is None else q_action
    return algo.judged_actor_loss(batch, q_action, value, noise)


def shift_value(algo, bias):
    with torch.no_grad():
        list(algo.value.parameters())[-1].fill_(bias)


def linear_critic(algo):
    """Critics that are exactly Q(s, a) = a_0; built with hidden=[]."""
    with torch.no_grad():
        algo.critic.net[0].weight.zero_()
        algo.critic.net[0].bias.zero_()
        algo.critic.net[0].weight[:, -2] = 1.0


def test_omega_zero_is_td3_with_normalised_q(lab):
    algo, batch = lab.make("a2pr", mask=0.0), lab.make_batch()
    action = algo.policy(batch.obs)[:, 0]
    q = algo.critic(batch.obs, action)[0]
    plain = gradient(-2.5 * q.mean() / q.abs().mean().detach(), algo.policy)
    assert torch.allclose(gradient(judged(algo, batch)[0], algo.policy), plain, atol=1e-7)


def test_with_the_data_cloned_everywhere_it_is_td3_bc(lab, monkeypatch):
    monkeypatch.setattr(a2pr, "regularised_action", lambda _, a, q, __: (a, torch.zeros_like(q).bool()))
    monkeypatch.setattr(a2pr, "cloning_mask", lambda q, _, __: torch.ones_like(q).bool())
    ours, theirs = lab.make("a2pr", mask=1.0), lab.make("td3_bc")
    for step in range(6):
        batch = lab.make_batch(seed=step)
        for algo in (ours, theirs):
            algo.generator.manual_seed(step)
            algo.update(batch)
    for name in ("policy", "policy_target", "critic", "critic_target"):
        for a, b in zip(getattr(ours, name).parameters(), getattr(theirs, name).parameters(), strict=True):
            assert torch.allclose(a, b, atol=1e-6)


def test_infinite_value_switches_both_imitations_off(lab):
    algo, batch = lab.make("a2pr", mask=1.0, policy_delay=1), lab.make_batch()
    shift_value(algo, 1e8)
    encoder, decoder = (copy.deepcopy(net.state_dict()) for net in (algo.vae.encoder, algo.vae.decoder))
    metrics = algo.update(batch)
    assert metrics["loss/vae_reconstruction"] == 0
    assert metrics["loss/vae"] == 0.5 * metrics["loss/vae_kl"] > 0
    assert metrics["policy/vae_share"] == metrics["policy/cloned_share"] == metrics["loss/bc"] == 0
    assert all(torch.equal(v, decoder[k]) for k, v in algo.vae.decoder.state_dict().items())
    assert all(not torch.equal(v, encoder[k]) for k, v in algo.vae.encoder.state_dict().items())


def test_minus_infinite_value_gives_a_plain_conditional_vae(lab):
    algo, batch = lab.make("a2pr", mask=0.4, vae_weight=1.5, policy_delay=1), lab.make_batch()
    shift_value(algo, -1e8)
    vae = copy.deepcopy(algo.vae)
    g = torch.Generator().set_state(algo.generator.get_state())
    metrics = algo.update(batch)
    torch.randn(batch.action.shape, generator=g)  # target smoothing comes first
    decoded, mean, log_std = vae(batch.obs, batch.action, torch.randn(len(batch), algo.latent, generator=g))
    plain = 1.5 * nn.functional.mse_loss(decoded, batch.action) + 0.5 * kl_divergence(mean, log_std)
    assert metrics["loss/vae"] == pytest.approx(plain.item(), rel=1e-6)
    assert metrics["policy/vae_share"] == metrics["policy/cloned_share"] == 1


def test_the_candidate_is_chosen_where_its_q_is_at_least_the_data_s():
    candidate, action = torch.full((3, 2), 0.3), torch.full((3, 2), -0.7)
    cloned, chosen = a2pr.regularised_action(
        candidate, action, torch.tensor([1.0, 2.0, 2.0]), torch.tensor([2.0, 1.0, 2.0])
    )
    assert chosen.tolist() == [False, True, True]
    assert torch.equal(cloned[:, 0], torch.tensor([-0.7, 0.3, 0.3]))


@pytest.mark.parametrize("constant", [0.0, 3.0, -1e4])
def test_the_choice_follows_a_known_q_and_ignores_constants_in_v(lab, constant):
    algo, batch = lab.make("a2pr", hidden=[], alpha=0.0, mask=0.5), lab.make_batch()
    linear_critic(algo)
    noise = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    action = algo.policy(batch.obs)[:, 0]
    candidate = algo.vae(batch.obs, action, noise)[0]
    chosen = candidate[:, 0] >= batch.action[:, 0]
    assert 0 < chosen.sum() < 32
    value = torch.linspace(-1, 1, 32) + constant
    on = torch.maximum(candidate[:, 0], batch.action[:, 0]) > value
    loss, metrics = judged(algo, batch, value)
    assert metrics["policy/candidate_share"] == chosen.float().mean()
    assert metrics["policy/cloned_share"] == on.float().mean()
    cloned = torch.where(chosen[:, None], candidate, batch.action)
    assert loss.item() == pytest.approx(
        (0.5 * on[:, None] * (action - cloned).square()).mean().item(), rel=1e-5
    )


def test_the_weight_is_zero_or_omega_never_twice():
    q_candidate, q_action = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.5]), torch.tensor([0.0, 0.0, 1.0, 1.0, 0.5])
    mask = a2pr.cloning_mask(q_candidate, q_action, torch.full((5,), 0.5))
    assert mask.tolist() == [False, True, True, True, True]  # a tie counts for the candidate
    assert not a2pr.cloning_mask(torch.tensor([0.0]), torch.tensor([0.5]), torch.tensor([0.5])).any()
    for row, weight in enumerate([0.0, 0.4, 0.4, 0.4, 0.4]):
        one = slice(row, row + 1)
        ones, zeros = torch.ones(1, 2), torch.zeros(1, 2)
        assert a2pr.a2pr_loss(q_action[one], ones, zeros, mask[one], 0.0, 0.4)[0] == pytest.approx(weight)


def test_value_target_never_exceeds_the_critics_target():
    g = torch.Generator().manual_seed(0)
    y, reward, discount = (torch.randn(500, generator=g) for _ in range(3))
    next_q = torch.randn(2, 500, generator=g)
    target = a2pr.value_target(y, reward, discount.abs(), next_q)
    assert (target <= y).all()
    assert (target <= (reward + discount.abs() * next_q).amax(0)).all()
    assert (target < y).any()
    assert (target == y).any()


def test_scaling_q_v_and_reward_leaves_the_actor_gradient_unchanged(lab):
    algo, batch = lab.make("a2pr", mask=1.0), lab.make_batch()
    with torch.no_grad():
        value = algo.critic(batch.obs, batch.action)[0] + 0.05 * torch.randn(32)
    before = gradient(judged(algo, batch, value)[0], algo.policy)
    with torch.no_grad():
        last = algo.critic.net[len(algo.critic.net) - 1]
        last.weight.mul_(37.0)
        last.bias.mul_(37.0)
    assert torch.allclose(
        gradient(judged(algo, batch, 37.0 * value)[0], algo.policy), before, rtol=1e-4, atol=1e-7
    )


@pytest.mark.parametrize("detach", [False, True])
def test_the_cloning_gradient_runs_through_the_vae_unless_detached(lab, detach):
    """d/d pi of mean m (pi - a~)^2 is 2 m (pi - a~) (1 - da~/dpi) / (B A), without the factor where detached."""
    algo, batch = lab.make("a2pr", hidden=[], alpha=0.0, mask=0.8, detach_candidate=detach), lab.make_batch()
    linear_critic(algo)
    noise = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    action = algo.policy(batch.obs)[:, 0]
    leaf = action.detach().requires_grad_()
    candidate = algo.vae(batch.obs, leaf, noise)[0]
    chosen = (candidate[:, 0] >= batch.action[:, 0])[:, None]
    difference = 2 * 0.8 * (leaf - torch.where(chosen, candidate, batch.action)) / leaf.numel()
    expected = difference.detach()
    if not detach:
        through = torch.autograd.grad(candidate, leaf, torch.where(chosen, difference, 0.0).detach())[0]
        assert through.abs().max() > 0
        expected = expected - through
    expected = torch.autograd.grad(action, list(algo.policy.parameters()), expected)
    loss = judged(algo, batch, torch.full((32,), -9.0))[0]
    got = torch.autograd.grad(loss, list(algo.policy.parameters()), retain_graph=True)
    for a, b in zip(got, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-7)
    with pytest.raises(RuntimeError, match=r"unused|not have been used|does not require"):
        torch.autograd.grad(loss, list(algo.vae.parameters()) + list(algo.critic.parameters()))


def test_threshold_keeps_only_larger_advantages(lab):
    batch = lab.make_batch()
    low, high = lab.make("a2pr"), lab.make("a2pr", advantage_threshold=0.05)
    shares = [algo.update(batch)["policy/vae_share"].item() for algo in (low, high)]
    assert 0 < shares[1] < shares[0] < 1


def test_losses_by_hand():
    action = torch.zeros(2, 2)
    decoded = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    kept = torch.tensor([True, False])
    assert a2pr.reconstruction_loss(decoded, action, kept, 2.0) == pytest.approx(2 * (1 + 4) / 4)
    q = torch.tensor([2.0, -4.0])
    loss, cloning = a2pr.a2pr_loss(q, decoded, action, kept, 2.5, 0.4)
    assert cloning == pytest.approx(0.4 * 5 / 4)
    assert loss == pytest.approx(0.5 - 2.5 / 3 * -1.0)
    assert torch.allclose(
        a2pr.a2pr_loss(q, decoded, action, torch.tensor([True, True]), 2.5, 1.0)[0],
        td3_bc_loss(q, decoded, action, 2.5)[0],
    )


def test_kl_by_hand_and_at_the_clamp_s_ends():
    zero = torch.zeros(3, 2)
    assert kl_divergence(zero, zero) == 0
    assert kl_divergence(zero + 2.0, zero) == pytest.approx(2.0)
    spec = Spec({"state": ((3,), "float32")}, 1, (-1.0,), (1.0,), 10)
    for sign in (-1.0, 1.0):
        vae = ActionVAE(spec, ["state"], [8], 2)
        with torch.no_grad():
            vae.encoder[2].bias.copy_(torch.tensor([[0.0, 0.0, sign * 1e4, sign * 1e4]]))
        decoded, mean, log_std = vae({"state": torch.ones(5, 3)}, torch.zeros(5, 1), torch.randn(5, 2))
        assert torch.equal(log_std, torch.full((5, 2), -4.0 if sign < 0 else 15.0))
        loss = kl_divergence(mean, log_std) + decoded.square().mean()
        grads = torch.autograd.grad(loss, list(vae.parameters()))
        assert torch.isfinite(loss)
        assert all(torch.isfinite(g).all() for g in grads)


def test_the_vae_s_sizes_are_the_reference_s():
    spec = Spec({"state": ((17,), "float32")}, 6, (-1.0,) * 6, (1.0,) * 6, 10)
    vae = ActionVAE(spec, ["state"], [750, 750], 12)
    assert sum(p.numel() for p in vae.parameters()) == 1_189_530
    with pytest.raises(ConfigError, match="latent size 0"):
        ActionVAE(spec, ["state"], [8], 0)


@pytest.mark.parametrize("kept", [0, 5, 200])
def test_decoding_only_what_is_needed_changes_no_loss(kept):
    if not fused.available():
        pytest.skip("this torch has no oneDNN linear on CPU")
    spec = Spec({"state": ((17,), "float32")}, 6, (-1.0,) * 6, (1.0,) * 6, 10)
    vae, g = ActionVAE(spec, ["state"], [256, 256], 12), torch.Generator().manual_seed(0)
    obs, action = {"state": torch.randn(256, 17, generator=g)}, torch.rand(256, 6, generator=g)
    noise, keep = torch.randn(256, 12, generator=g), torch.randperm(256, generator=g) < kept
    results = []
    for enabled, needed in ((True, keep), (False, keep), (False, None)):
        fused.force(enabled)
        decoded, mean, log_std = vae(obs, action, noise, needed=needed)
        loss = a2pr.reconstruction_loss(decoded, action, keep, 1.0) + kl_divergence(mean, log_std)
        results.append((loss.detach(), *torch.autograd.grad(loss, list(vae.parameters()))))
    fused.force(None)
    for row in zip(*results, strict=True):
        assert all(torch.allclose(row[0], other, atol=1e-7, rtol=1e-4) for other in row[1:])


def test_twenty_updates_agree_with_the_formulas(lab):
    """Separate networks, default Adam, one operation per line, the reference's order and its boolean sum."""
    algo = lab.make("a2pr", mask=0.4, vae_weight=1.5)
    actor, value = lab.plain_layers(algo.policy.net), lab.plain_layers(algo.value.net)
    critics = [lab.plain_layers(algo.critic.net, member) for member in range(2)]
    encoder, decoder = lab.plain_layers(algo.vae.encoder, 0), lab.plain_layers(algo.vae.decoder, 0)
    targets = copy.deepcopy([actor, *critics])
    opts = [torch.optim.Adam(net.parameters(), lr=3e-4) for net in (actor, *critics, value)]
    vae_opt = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()])
    g = torch.Generator().set_state(algo.generator.get_state())
    draw = lambda *shape: torch.randn(shape, generator=g)  # noqa: E731

    def descend(loss, *optimizers):
        for opt in optimizers:
            opt.zero_grad()
        loss.backward()
        for opt in optimizers:
            opt.step()

    def vae(s, a, noise):
        mean, log_std = encoder(torch.cat([s, a], 1)).split(4, 1)
        std = log_std.clamp(-4, 15).exp()
        return torch.tanh(decoder(torch.cat([s, mean + std * noise], 1))), mean, std

    for step in range(1, 21):
        batch = lab.make_batch(seed=step)
        metrics = algo.update(batch)
        s, a, s2 = batch.obs["state"], batch.action, batch.next_obs["state"]
        both = lambda nets, s, a: [net(torch.cat([s, a], 1)) for net in nets]  # noqa: E731
        with torch.no_grad():
            a2 = (torch.tanh(targets[0](s2)) + (draw(32, 2) * 0.2).clamp(-0.5, 0.5)).clamp(-1, 1)
            not_done = (~batch.terminated).float()[:, None] * 0.99
            y = batch.reward[:, None] + not_done * torch.min(*both(targets[1:], s2, a2))
        vae_noise = draw(32, 4)
        critic = sum(nn.functional.mse_loss(q, y) for q in both(critics, s, a))
        descend(critic, *opts[1:3])
        with torch.no_grad():
            t = torch.min(y, batch.reward[:, None] + not_done * torch.min(*both(critics, s2, a2)))
            q_a = both(critics, s, a)[0]
        v = value(s)
        descend(nn.functional.mse_loss(v, t), opts[3])
        recon, mean, std = vae(s, a, vae_noise)
        kl = -0.5 * (1 + torch.log(std.pow(2)) - mean.pow(2) - std.pow(2)).mean()
        vae_loss = (1.5 * (q_a > v) * (recon - a).square()).mean() + 0.5 * kl
        descend(vae_loss, vae_opt)
        pairs = [(critic, "loss/critic"), (vae_loss, "loss/vae")]
        if step % 2 == 0:
            pi = torch.tanh(actor(s))
            q = both(critics, s, pi)[0]
            candidate = vae(s, pi, draw(32, 4))[0]
            q_c = both(critics, s, candidate)[0]
            adv_c, adv_a = q_c - v, q_a - v
            cloned = candidate * (adv_c >= adv_a) + a * (adv_a > adv_c)
            m = 0.4 * ((q_c >= v) + (q_a > v))
            bc = (m.detach() * (pi - cloned).square()).mean()
            loss = -2.5 / q.abs().mean().detach() * q.mean() + bc
            descend(loss, opts[0])
            pairs += [(loss, "loss/actor"), (bc, "loss/bc")]
            for target, net in zip(targets, [actor, *critics], strict=True):
                for old, new in zip(target.parameters(), net.parameters(), strict=True):
                    old.data.mul_(0.995).add_(0.005 * new.data)
        for theirs, name in pairs:
            assert metrics[name].item() == pytest.approx(theirs.item(), abs=1e-5), (step, name)
    lab.assert_same_net(algo.policy.net, actor)
    lab.assert_same_net(algo.policy_target.net, targets[0])
    lab.assert_same_net(algo.value.net, value)
    lab.assert_same_net(algo.vae.encoder, encoder, 0)
    lab.assert_same_net(algo.vae.decoder, decoder, 0)
    for member in range(2):
        lab.assert_same_net(algo.critic.net, critics[member], member)
        lab.assert_same_net(algo.critic_target.net, targets[1 + member], member)


def test_toy_with_a_good_and_a_bad_mode(lab):
    """Half the actions near 0.5 pay 1, half near -0.5 nothing: the VAE and the policy settle on the good ones."""
    spec = Spec({"state": ((2,), "float32")}, 1, (-1.0,), (1.0,), 1)
    g = torch.Generator().manual_seed(0)
    rows = 2000
    good = torch.arange(rows) % 2 == 0
    state = torch.randn(rows, 2, generator=g)
    action = (torch.where(good, 0.5, -0.5) + 0.05 * torch.randn(rows, generator=g))[:, None]
    done = torch.ones(rows, dtype=torch.bool)
    data = Batch(
        {"state": state}, action, good.float(), {"state": state}, done, torch.zeros_like(done), 0.0 * good
    )
    options = {"mask": 1.0, "hidden": [64] * 4, "vae_hidden": [64, 64], "value_lr": 1e-3}
    options |= {"actor_lr": 1e-3, "critic_lr": 1e-3, "policy_options": {"hidden": [64] * 3}}
    algo = lab.make("a2pr", spec=spec, **options)
    vae_share = []
    for step in range(1, 1201):
        pick = torch.randint(rows, (128,), generator=g)
        algo.update(data.map(lambda tensor, pick=pick: tensor[pick]))
        if step >= 200 and step % 200 == 0:
            with torch.no_grad():
                latent = torch.randn(rows, algo.latent, generator=g)
                decoded = algo.vae.decode({"state": state}, latent)
            vae_share.append(((decoded - 0.5).abs() < 0.15).float().mean().item())
    assert min(vae_share) >= 0.95
    assert 0.4 < algo.value({"state": state}).mean() < 0.6
    assert 0.4 < algo.policy({"state": state}).mean() < 0.7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -1.0}, "algo.alpha=-1.0 must be 0 or more"),
        ({"mask": -0.1}, "algo.mask=-0.1 must be 0 or more"),
        ({"vae_weight": float("nan")}, "algo.vae_weight=nan must be 0 or more"),
        ({"vae_lr": 0.0}, "algo.vae_lr=0.0 must be above 0"),
        ({"latent": -2}, r"algo.latent=-2 must be 0 \(twice"),
    ],
)
def test_config(options, message):
    with pytest.raises(ConfigError, match=message):
        A2PRConfig(**options)
