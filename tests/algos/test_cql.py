# SPDX-License-Identifier: Apache-2.0
"""CQL: its losses by hand, and twenty updates of CQL and Cal-QL beside a plain implementation of the formulas."""

import copy
import math

import pytest
import torch
from torch import nn

from robopost.algos.offline.cql import (
    CQLConfig,
    conservative_gap,
    max_backup,
    multiplier_loss,
    push_down,
    push_down_plain,
    temperature_loss,
)
from robopost.errors import ConfigError

ANTMAZE = {"lagrange_gap": 0.8, "max_backup": True, "diff_min": -200.0, "min_q_weight": 5.0}


class PlainCQL:
    """CQL(H) and Cal-QL as the formulas say: one network per critic, one forward pass per set of actions."""

    def __init__(self, lab, algo):
        self.cfg, self.calibrate = algo.config, algo.registry_name == "cal_ql"
        self.noise = torch.Generator()
        self.noise.set_state(algo.generator.get_state())
        self.bounds = algo.policy.config.log_std_min, algo.policy.config.log_std_max
        self.actor = lab.plain_layers(algo.policy.net)
        self.critics = [lab.plain_layers(algo.critic.net, member) for member in range(2)]
        self.targets = copy.deepcopy(self.critics)
        self.log_alpha = nn.Parameter(torch.zeros(()))
        self.log_multiplier = nn.Parameter(torch.ones(()))
        adam = torch.optim.Adam
        self.optimizers = {
            "actor": adam(self.actor.parameters(), self.cfg.actor_lr),
            "critic": adam([p for c in self.critics for p in c.parameters()], self.cfg.critic_lr),
            "alpha": adam([self.log_alpha], self.cfg.temperature_lr),
            "multiplier": adam([self.log_multiplier], self.cfg.multiplier_lr),
        }

    def act(self, obs, count):
        """(B, count, A) actions and their log-densities, one network row per action."""
        obs = obs[:, None].repeat(1, count, 1)
        mean, raw = self.actor(obs).chunk(2, -1)
        low, high = self.bounds
        std = torch.exp(low + (high - low) * (torch.tanh(raw) + 1) / 2)
        pre = mean + std * torch.randn(mean.shape, generator=self.noise)
        normal = torch.distributions.Normal(mean, std)
        slope = torch.distributions.TanhTransform().log_abs_det_jacobian(pre, None)
        return torch.tanh(pre), (normal.log_prob(pre) - slope).sum(-1)

    @staticmethod
    def q(net, obs, actions):
        return net(torch.cat([obs[:, None].repeat(1, actions.shape[1], 1), actions], -1)).squeeze(-1)

    def apply(self, name, loss):
        optimizer = self.optimizers[name]
        optimizer.zero_grad()
        loss.backward()
        return optimizer

    def update(self, batch):
        cfg, s, s2 = self.cfg, batch.obs["state"], batch.next_obs["state"]
        alpha = self.log_alpha.exp().item()
        action, log_prob = self.act(s, 1)
        q = torch.min(*(self.q(critic, s, action) for critic in self.critics))
        actor = (alpha * log_prob - q).mean()
        with torch.no_grad():
            after, after_log_prob = self.act(s2, cfg.num_actions if cfg.max_backup else 1)
            best = torch.min(*(self.q(target, s2, after) for target in self.targets)).max(1)
            bonus = alpha * after_log_prob.gather(1, best.indices[:, None])[:, 0]
            value = best.values - (bonus if cfg.entropy_in_target else 0.0)
            y = batch.reward + 0.99 * (1 - batch.terminated.float()) * value
            uniform = torch.rand(len(s), cfg.num_actions, 2, generator=self.noise) * 2 - 1
            here, here_log_prob = self.act(s, cfg.num_actions)
            ahead, ahead_log_prob = self.act(s2, cfg.num_actions)
        bellman, gaps = torch.zeros(()), []
        for critic in self.critics:
            q_data = self.q(critic, s, batch.action[:, None])
            bellman = bellman + ((q_data[:, 0] - y) ** 2).mean()
            sampled = [self.q(critic, s, actions) for actions in (uniform, here, ahead)]
            if self.calibrate:
                floor = batch.extra["return_to_go"][:, None]
                sampled[1:] = [torch.where(part > floor, part, floor) for part in sampled[1:]]
            if cfg.importance_sampling:
                log_density = (math.log(0.25), here_log_prob, ahead_log_prob)
                sampled = [part - density for part, density in zip(sampled, log_density, strict=True)]
            else:
                sampled.append(q_data)
            diff = torch.log(torch.exp(torch.cat(sampled, 1)).sum(1)) - q_data[:, 0]
            gaps.append(diff.clamp(min=cfg.diff_min).mean())
        conservative = cfg.min_q_weight * sum(gaps)
        optimizers = []
        if cfg.lagrange_gap is not None:
            multiplier = self.log_multiplier.exp()
            excess = sum(gap - cfg.lagrange_gap for gap in gaps) * cfg.min_q_weight
            optimizers.append(self.apply("multiplier", -multiplier * excess.detach() / 2))
            conservative = multiplier.detach() * excess
        optimizers.append(self.apply("actor", actor))
        optimizers.append(self.apply("critic", bellman + conservative))
        optimizers.append(self.apply("alpha", -(self.log_alpha * (log_prob.detach() - 2)).mean()))
        for optimizer in optimizers:
            optimizer.step()
        for target, critic in zip(self.targets, self.critics, strict=True):
            for old, new in zip(target.parameters(), critic.parameters(), strict=True):
                old.data.mul_(0.995).add_(0.005 * new.data)
        return {"loss/actor": actor, "loss/critic": bellman, "loss/conservative": conservative}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cql", {}),
        ("cql", ANTMAZE),
        ("cql", {"importance_sampling": False, "entropy_in_target": True, "diff_min": 3.3}),
        ("cal_ql", {"min_q_weight": 1.0}),
        ("cal_ql", ANTMAZE),
    ],
    ids=["locomotion", "antmaze", "data action in the set", "cal_ql", "cal_ql antmaze"],
)
def test_twenty_updates_agree_with_the_formulas(lab, name, options):
    algo = lab.make(name, **({"actor_lr": 3e-4, "temperature_lr": 3e-4, "diff_min": -1e9} | options))
    plain = PlainCQL(lab, algo)
    for step in range(20):
        batch = lab.any_batch(algo, step)
        ours, theirs = algo.update(batch), plain.update(batch)
        for key, value in theirs.items():
            tolerance = 1e-6 if step == 0 else 1e-5
            assert ours[key].item() == pytest.approx(value.item(), rel=tolerance, abs=tolerance), (step, key)
    lab.assert_same_net(algo.policy.net, plain.actor)
    for member in range(2):
        lab.assert_same_net(algo.critic.net, plain.critics[member], member)
        lab.assert_same_net(algo.critic_target.net, plain.targets[member], member)
    assert algo.temperature.log.item() == pytest.approx(plain.log_alpha.item(), abs=1e-5)
    assert plain.log_alpha.item() != 0
    if algo.config.lagrange_gap is not None:
        assert algo.multiplier.log.item() == pytest.approx(plain.log_multiplier.item(), abs=1e-5)
        assert plain.log_multiplier.item() != 1


def make_constant(algo, value):
    with torch.no_grad():
        last = algo.critic.net[len(algo.critic.net) - 1]
        last.weight.zero_()
        last.bias.fill_(value)


def test_constant_q_without_importance_sampling_costs_log_31(lab):
    algo = lab.make("cql", importance_sampling=False)
    make_constant(algo, 7.0)
    metrics = algo.update(lab.make_batch())
    assert metrics["value/q_gap"].item() == pytest.approx(math.log(31), rel=1e-6)
    assert metrics["loss/conservative"].item() == pytest.approx(2 * 10 * math.log(31), rel=1e-6)


def test_importance_sampling_sums_exactly_thirty_terms(lab, monkeypatch):
    algo = lab.make("cql")
    make_constant(algo, 7.0)
    kept = []
    draw = type(algo)._proposals
    monkeypatch.setattr(type(algo), "_proposals", lambda *a: kept.append(draw(*a)) or kept[-1])
    gap = algo.update(lab.make_batch())["value/q_gap"]
    ((actions, density),) = kept
    assert actions.shape == (32, 30, 2)
    assert density.shape == (32, 30)
    assert not actions.requires_grad
    assert not density.requires_grad
    assert (density[:, :10] == 2 * math.log(0.5)).all()
    assert (actions[:, :10].abs() <= 1).all()
    # Q cancels: what is left is the log of the sum of 1 / density.
    assert gap.item() == pytest.approx(torch.exp(-density.double()).sum(1).log().mean().item(), rel=1e-6)
    # The densities are those of the policy at s, then at s'.
    fresh, batch = lab.make("cql"), lab.make_batch()
    for rows, obs in ((slice(10, 20), batch.obs), (slice(20, 30), batch.next_obs)):
        for k in range(rows.start, rows.stop):
            expected = fresh.policy.action_log_prob(obs, actions[:, k : k + 1])
            assert torch.allclose(density[:, k], expected, atol=1e-3)


def test_one_critic_pass_serves_all_actions(lab, monkeypatch):
    algo = lab.make("cql")
    shapes, real = [], type(algo.critic.net).forward
    monkeypatch.setattr(
        type(algo.critic.net), "forward", lambda self, x: shapes.append(tuple(x.shape)) or real(self, x)
    )
    evaluations = []
    policy = type(algo.policy).distribution
    monkeypatch.setattr(
        type(algo.policy), "distribution", lambda self, obs: evaluations.append(1) or policy(self, obs)
    )
    algo.update(lab.make_batch())
    assert sorted(shapes) == [(32, 7), (32, 7), (32 * 31, 7)]  # actor, target, everything else
    assert len(evaluations) == 2  # at s and at s'


def test_gradient_on_the_data_q_is_minus_w_over_b():
    generator = torch.Generator().manual_seed(0)
    q_data = torch.randn(2, 8, generator=generator, requires_grad=True)
    q_uniform, q_policy = (
        torch.randn(2, 8, 10, generator=generator),
        torch.randn(2, 8, 20, generator=generator),
    )
    density = torch.randn(8, 30, generator=generator)
    loss = 10.0 * conservative_gap(push_down(q_uniform, q_policy, density), q_data, None, None).sum()
    (grad,) = torch.autograd.grad(loss, q_data)
    assert torch.allclose(grad, torch.full_like(grad, -10.0 / 8))
    # Without importance sampling the data's action also sits in the sum.
    pushed = push_down_plain(q_uniform, q_policy, q_data)
    (grad,) = torch.autograd.grad(10.0 * conservative_gap(pushed, q_data, None, None).sum(), q_data)
    share = torch.cat([q_uniform, q_policy, q_data[..., None]], -1).softmax(-1)[..., -1]
    assert torch.allclose(grad, -10.0 / 8 * (1 - share), atol=1e-6)


def test_losses_by_hand():
    pushed, q_data = torch.tensor([[5.0, 1.0]]), torch.tensor([[1.0, 4.0]])
    assert conservative_gap(pushed, q_data, None, None).tolist() == [0.5]
    assert conservative_gap(pushed, q_data, -1.0, None).tolist() == [1.5]
    assert conservative_gap(pushed, q_data, -1.0, 2.0).tolist() == [0.5]
    q = torch.tensor([[[1.0, 5.0, 3.0]], [[2.0, 0.0, 4.0]]])  # minima 1, 0, 3
    value, log_prob = max_backup(q, torch.tensor([[-1.0, -2.0, -3.0]]))
    assert (value.item(), log_prob.item()) == (3.0, -3.0)
    # Two critics with gaps 1 and 3 over a target of 0.5, alpha' = 2, w = 5: -2 * 5 * (0.5 + 2.5) / 2.
    assert multiplier_loss(torch.tensor(2.0), torch.tensor([1.0, 3.0]), 5.0, 0.5).item() == -15.0
    log_temperature = torch.tensor(0.5, requires_grad=True)
    loss = temperature_loss(log_temperature, torch.tensor([-3.0, -1.0]), -6.0)
    assert loss.item() == 0.5 * 8.0
    (grad,) = torch.autograd.grad(loss, log_temperature)
    assert grad.item() == 8.0  # entropy 2 is above the target -6: alpha falls


@pytest.mark.parametrize(("gap", "sign"), [(-50.0, 1), (50.0, -1)])
def test_multiplier_rises_while_the_gap_is_too_large(lab, gap, sign):
    algo = lab.make("cql", lagrange_gap=gap)
    first = algo.update(lab.make_batch())
    assert first["value/multiplier"].item() == pytest.approx(math.e)  # the critic's loss uses it from before
    assert algo.multiplier().item() == pytest.approx(math.exp(1 + sign * 3e-4), rel=1e-6)


def test_weight_zero_is_sac(lab):
    """One update of each part equals SAC's, from the same weights and noise."""
    batch = lab.make_batch()
    same = {"actor_lr": 3e-4, "temperature_lr": 3e-4}
    algo = lab.make("cql", min_q_weight=0.0, orthogonal=False, **same)
    sac = {key: lab.make("sac", entropy_in_target=False, **same) for key in ("critic", "actor")}
    for other in sac.values():
        assert torch.equal(other.critic.net[0].weight, algo.critic.net[0].weight)
    ours = algo.update(batch)
    assert "loss/conservative" not in ours
    torch.randn(32, 1, 2, generator=sac["critic"].generator)  # CQL draws the actor's noise first
    theirs = sac["critic"].critic_step(batch, None) | sac["actor"].actor_step(batch)
    for key in ("loss/critic", "loss/actor", "policy/entropy", "value/q_mean"):
        assert ours[key].item() == pytest.approx(theirs[key].item(), rel=1e-6)
    pairs = [(algo.critic, sac["critic"].critic), (algo.critic_target, sac["critic"].critic_target)]
    for a, b in [*pairs, (algo.policy, sac["actor"].policy)]:
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            assert torch.allclose(p, q, atol=1e-7)
    assert algo.temperature.log.item() == pytest.approx(sac["actor"].log_temperature.item(), rel=1e-6)


def test_critics_start_orthogonal_and_near_zero(lab):
    algo = lab.make("cql")
    weight = algo.critic.net[2].weight[1]
    assert torch.allclose(weight @ weight.t(), 2 * torch.eye(16), atol=1e-5)
    last = algo.critic.net[len(algo.critic.net) - 1].weight
    assert torch.allclose(last.norm(dim=1), torch.full((2, 1), 0.01), atol=1e-7)


def test_policies_and_values_that_do_not_fit_are_refused(lab):
    with pytest.raises(ConfigError, match=r"Fix: policy=gaussian policy.squash=true"):
        lab.make("cql", policy=lab.make_policy("deterministic"))
    with pytest.raises(ConfigError, match=r"Fix: policy=gaussian policy.squash=true"):
        lab.make("cql", policy_options={"squash": False})
    with pytest.raises(ConfigError, match=r"algo.min_q_weight=-1.0 must be 0"):
        CQLConfig(min_q_weight=-1.0)
    with pytest.raises(ConfigError, match=r"algo.num_actions=0 must be at least 1"):
        CQLConfig(num_actions=0)
    with pytest.raises(ConfigError, match=r"algo.diff_min=3.0 must be below algo.diff_max=2.0"):
        CQLConfig(diff_min=3.0, diff_max=2.0)
    with pytest.raises(ConfigError, match=r"algo.temperature=0.0 must be above 0"):
        CQLConfig(temperature=0.0)
