# SPDX-License-Identifier: Apache-2.0
"""FamO2O: encoding and range, V and Q of the base algorithm, weights of the same c, the balance model, the switch."""

import math
from dataclasses import replace

import pytest
import torch
from scipy import stats
from torch import nn

from robopost.algos.offline import famo2o_iql
from robopost.algos.offline.famo2o_cql import (
    FamO2OCalQL,
    FamO2OCalQLConfig,
    FamO2OCQL,
    FamO2OCQLConfig,
    family_actor_loss,
)
from robopost.algos.offline.famo2o_iql import (
    FamO2OIQL,
    FamO2OIQLConfig,
    balance_loss,
    balance_temperature_loss,
)
from robopost.algos.offline.iql import IQL, IQLConfig, advantage_weights
from robopost.data.batch import Batch, Spec
from robopost.errors import ConfigError
from robopost.policies.family import Family, FamilyConfig, encode, frequencies
from robopost.policies.gaussian import Gaussian, GaussianConfig

IQL_POLICY = {"squash": False, "mean_tanh": True, "state_std": False}
CQL_POLICY = {"squash": True, "mean_tanh": False, "state_std": True, "balance_state_std": True}
OVER = {
    "iql": (FamO2OIQL, FamO2OIQLConfig, IQL_POLICY),
    "cql": (FamO2OCQL, FamO2OCQLConfig, CQL_POLICY),
    "cal_ql": (FamO2OCalQL, FamO2OCalQLConfig, CQL_POLICY),
}


def make_family(spec, **options):
    torch.manual_seed(0)
    small = {"hidden": [16, 16], "balance_hidden": [16, 16]}
    return Family(FamilyConfig(**(small | IQL_POLICY | options)), spec)


def make(lab, base="iql", spec=None, policy=None, generator_seed=100, **config):
    cls, config_cls, options = OVER[base]
    spec = spec or lab.SPEC
    policy = make_family(spec, **(options | (policy or {}))) if not isinstance(policy, Family) else policy
    torch.manual_seed(1)
    generator = torch.Generator().manual_seed(generator_seed)
    config = config_cls(**({"hidden": [16, 16]} | config))
    return cls(config, policy, spec, device=torch.device("cpu"), generator=generator)


def make_batch(lab, base="iql", seed=0, size=32):
    batch = lab.make_batch(size, seed)
    if base == "cal_ql":
        batch = replace(batch, extra={"return_to_go": torch.zeros(size)})
    return batch


def same(a, b):
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    return all(torch.equal(left[key], right[key]) for key in left)


# -- encoding and range -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("base", "low", "high"), [("iql", 8.0, 14.0), ("cql", 0.5, 1.5)])
def test_coefficients_stay_in_range_and_are_uniform_offline(lab, base, low, high):
    algo = make(lab, base, policy={"coefficient_low": low, "coefficient_high": high})
    policy, rows = algo.policy, 100_000
    with torch.no_grad():  # far from its start, where the mode may sit anywhere
        for parameter in policy.balance.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    obs = {"state": 3 * torch.randn(rows, 5, generator=torch.Generator().manual_seed(2))}
    action = torch.zeros(rows, 2)
    batch = Batch(obs, action, action[:, 0], obs, action[:, 0] > 1, action[:, 0] > 1, action[:, 0])

    def drawn():
        if base == "iql":
            return algo.draw_coefficient(policy.features(obs))
        return algo.with_coefficients(batch).extra["coefficient"]

    offline = drawn()
    algo.begin_online()
    for values in (offline, drawn(), policy.coefficient(obs)):
        assert values.shape == (rows,)
        assert values.min() >= low
        assert values.max() <= high
    assert policy.coefficient(obs).std() > 0.05 * (high - low)
    test = stats.kstest(offline[:20_000].numpy(), stats.uniform(low, high - low).cdf)
    assert test.pvalue > 0.01


# -- the base algorithm's part ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("low", "high"), [(1.0, 5.0), (8.0, 14.0), (0.0, 0.0)])
@pytest.mark.parametrize("variant", ["original", "corl"])
def test_v_and_q_are_those_of_iql_to_the_bit(lab, variant, low, high):
    ranges = {"coefficient_low": low, "coefficient_high": high}
    family = make(lab, policy=ranges, variant=variant, balance_every=3)
    torch.manual_seed(2)
    plain = IQL(
        IQLConfig(hidden=[16, 16], variant=variant),
        Gaussian(GaussianConfig(hidden=[16, 16], **IQL_POLICY), lab.SPEC),
        lab.SPEC,
        device=torch.device("cpu"),
        generator=torch.Generator(),
    )
    for name in ("critic", "critic_target", "value"):
        getattr(plain, name).load_state_dict(getattr(family, name).state_dict())
    for step in range(50):
        if step == 30:
            family.begin_online()
        family.update(lab.make_batch(seed=step))
        plain.update(lab.make_batch(seed=step))
    for name in ("critic", "critic_target", "value"):
        assert same(getattr(family, name), getattr(plain, name)), name


def test_one_coefficient_is_iql_on_extended_observations(lab):
    c = 3.0
    family = make(lab, policy={"coefficient_low": c, "coefficient_high": c})
    spec = replace(lab.SPEC, obs={"state": ((11,), "float32")})
    torch.manual_seed(0)
    plain = Gaussian(GaussianConfig(hidden=[16, 16], **IQL_POLICY), spec)
    plain.net.load_state_dict(family.policy.net.state_dict())
    batch, advantage = lab.make_batch(), torch.linspace(-1, 1.5, 32)
    code = encode(torch.full((32,), c), frequencies())
    extended = {"state": torch.cat([batch.obs["state"], code], 1)}
    weights = advantage_weights(advantage, c, 100.0)
    expected = -(weights * plain.action_log_prob(extended, batch.action[:, None])).mean()
    metrics = family._universal_step(batch, advantage)
    assert metrics["loss/actor"] == pytest.approx(expected.item(), rel=1e-6)


def test_without_the_encodings_weights_the_first_gradient_is_iqls(lab):
    c = 2.0
    family = make(lab, policy={"coefficient_low": c, "coefficient_high": c})
    plain = Gaussian(GaussianConfig(hidden=[16, 16], **IQL_POLICY), lab.SPEC)
    with torch.no_grad():
        family.policy.net[0].weight[:, 5:] = 0
        for ours, theirs in zip(family.policy.net.parameters(), plain.net.parameters(), strict=True):
            theirs.copy_(ours[:, :5] if ours.shape[-1] == 11 else ours)
    batch, advantage = lab.make_batch(), torch.linspace(-1, 1.5, 32)
    weights = advantage_weights(advantage, c, 100.0)
    loss = -(weights * plain.action_log_prob(batch.obs, batch.action[:, None])).mean()
    expected = torch.autograd.grad(loss, [*plain.net.parameters(), plain.log_std])
    named = {name: parameter for name, parameter in family.policy.named_parameters() if "balance" not in name}
    family._universal_step(batch, advantage)
    pieces = family._actor_flat.grad.split([parameter.numel() for parameter in named.values()])
    found = {name: piece.view(named[name].shape) for name, piece in zip(named, pieces, strict=True)}
    assert torch.allclose(found["net.0.weight"][:, :5], expected[0], atol=1e-6)
    for name, gradient in zip(list(found)[2:], [expected[-1], *expected[1:-1]][1:], strict=False):
        assert torch.allclose(found[name], gradient, atol=1e-6), name
    assert torch.allclose(found["log_std"], expected[-1], atol=1e-6)


# -- weights and losses by hand -----------------------------------------------------------------------------------


def test_every_sample_is_weighted_with_the_coefficient_its_member_sees(lab, monkeypatch):
    algo = make(lab, policy={"coefficient_low": 2.0, "coefficient_high": 14.0})
    weights = advantage_weights(torch.tensor([1.0, 1.0]), torch.tensor([2.0, 14.0]), 100.0)
    assert weights.tolist() == pytest.approx([math.e**2, 100.0], rel=1e-6)
    batch, advantage = lab.make_batch(8), torch.ones(8)
    seen, used = [], []
    real = advantage_weights

    def recorded(advantage, beta, limit):
        used.append(real(advantage, beta, limit))
        return used[-1]

    monkeypatch.setattr(famo2o_iql, "advantage_weights", recorded)
    algo.policy.net.register_forward_pre_hook(lambda module, args: seen.append(args[0][:, 5:]))
    metrics = algo._universal_step(batch, advantage)
    # e(c) determines c: its third and fourth entries are sin and cos of c / 10000^(1/3).
    c = torch.atan2(seen[0][:, 2], seen[0][:, 3]) * 10_000 ** (1 / 3)
    assert c.std() > 0.5
    assert torch.allclose(used[0], (c.double().exp()).clamp(max=100).float(), rtol=1e-3)
    assert metrics["policy/weight_clipped"] == pytest.approx((c > math.log(100)).float().mean().item())
    assert used[0].shape == (8,), "one weight per sample, not one per pair of samples"


def test_losses_by_hand():
    log_prob, q = torch.tensor([-1.0, 0.5]), torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    assert balance_loss(log_prob, q, torch.tensor(0.5)) == pytest.approx(((-0.5 - 1.0) + (0.25 - 0.0)) / 2)
    c = torch.tensor([0.5, 2.0])
    assert family_actor_loss(log_prob, q, torch.tensor(0.1), c) == pytest.approx(((-0.1 - 0.5) + 0.05) / 2)
    assert balance_temperature_loss(torch.tensor(2.0), torch.tensor(0.3), -0.5) == pytest.approx(1.6)


# -- the balance model --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["iql", "cql", "cal_ql"])
def test_the_balance_step_changes_the_balance_model_alone(lab, base, monkeypatch):
    algo, batch = make(lab, base), make_batch(lab, base)
    watched = {"critic": algo.critic, "critic_target": algo.critic_target, "net": algo.policy.net}
    before = {name: {k: v.clone() for k, v in net.state_dict().items()} for name, net in watched.items()}
    start = {k: v.clone() for k, v in algo.policy.balance.state_dict().items()}
    losses = []
    real = type(algo._balance_flat).backward

    def backward(flat, loss):
        if flat is algo._balance_flat:
            losses.append(loss)
            others = [*algo.policy.net.parameters(), *algo.critic.parameters()]
            assert all(
                g is None for g in torch.autograd.grad(loss, others, retain_graph=True, allow_unused=True)
            )
        real(flat, loss)

    monkeypatch.setattr(type(algo._balance_flat), "backward", backward)
    if base == "iql":
        monkeypatch.setattr(algo, "_clone", lambda *args: {})
        algo._family_step(batch, torch.zeros(32))
    else:
        algo._balance_step(batch)
    assert len(losses) == 1
    assert algo._balance_flat.grad.abs().max() > 0
    for name, net in watched.items():
        assert all(torch.equal(before[name][k], v) for k, v in net.state_dict().items()), name
    assert any(not torch.equal(start[k], v) for k, v in algo.policy.balance.state_dict().items())


def test_entropy_meets_its_target_where_q_does_not_care(lab):
    algo = make(lab, balance_lr=1e-2, temperature_lr=1e-2)
    with torch.no_grad():
        for weight in algo.critic_target.parameters():
            weight.zero_()
    batch, entropies, temperatures = lab.make_batch(256), [], []
    for _ in range(400):
        metrics = algo._family_step(batch, torch.zeros(256))
        entropies.append(metrics["policy/balance_entropy"].item())
        temperatures.append(metrics["policy/temperature"].item())
    assert entropies[0] > -0.5  # so eta falls until the entropy does
    assert temperatures[20] < temperatures[0]
    # With eta > 0 and a constant Q the model can only widen; below the target eta would rise again.
    narrow = make(lab, balance_lr=1e-3, temperature_lr=1e-2)
    with torch.no_grad():
        for weight in narrow.critic_target.parameters():
            weight.zero_()
        narrow.policy.balance.log_std.fill_(-3.0)
    rows = [narrow._family_step(batch, torch.zeros(256)) for _ in range(30)]
    assert rows[0]["policy/balance_entropy"] < -0.5
    assert rows[-1]["policy/temperature"] > rows[0]["policy/temperature"]
    assert rows[-1]["policy/balance_entropy"] > rows[0]["policy/balance_entropy"]


def test_the_balance_model_is_updated_at_its_interval(lab):
    algo = make(lab, balance_every=3)
    keys = ["loss/balance" in algo.update(lab.make_batch(seed=step)) for step in range(6)]
    assert keys == [False, False, True, False, False, True]


def test_coefficient_and_action_noise_are_independent(lab):
    algo = make(lab)
    size = 20_000
    like = torch.zeros(size)
    first, second = algo._noise(like), algo._noise(torch.zeros(size, 2))
    assert abs(torch.corrcoef(torch.stack([first, second[:, 0]]))[0, 1]) < 0.03
    assert not torch.equal(first[:10], second.flatten()[:10])


# -- phases and acting --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["iql", "cql", "cal_ql"])
def test_only_the_source_of_the_coefficient_changes_online(lab, base, monkeypatch):
    """With pi_b replaced by U(lo, hi) as the source, one online update is one offline update, to the bit."""
    algos = [make(lab, base), make(lab, base)]
    algos[1].begin_online()
    if base == "iql":
        uniform = lambda *_: algos[1].policy.uniform_coefficient(32, algos[1].generator)  # noqa: E731
        monkeypatch.setattr(algos[1], "draw_coefficient", uniform)
    else:
        real, calls = algos[1]._draw, []

        def draw(features):
            calls.append(1)  # at s' first, then at s
            return (
                real(features)
                if len(calls) == 1
                else algos[1].policy.uniform_coefficient(32, algos[1].generator)
            )

        monkeypatch.setattr(algos[1], "_draw", draw)
    batch = make_batch(lab, base)
    offline, online = (algo.balanced_step(batch) for algo in algos)
    assert offline.keys() == online.keys()
    for key in offline:
        assert torch.equal(offline[key], online[key]), key
    assert same(algos[0].policy, algos[1].policy)


@pytest.mark.parametrize("base", ["iql", "cql", "cal_ql"])
def test_online_coefficients_come_from_the_balance_model(lab, base):
    algo, batch = make(lab, base), make_batch(lab, base, size=512)
    with torch.no_grad():
        algo.policy.balance.net[4].bias[0] = 1.5
        algo.policy.balance.net[4].weight[0] = 0
        if base == "iql":
            algo.policy.balance.log_std.fill_(-4.0)
        else:
            algo.policy.balance.net[4].bias[1] = -4.0
            algo.policy.balance.net[4].weight[1] = 0

    def drawn():
        if base == "iql":
            return algo.draw_coefficient(algo.policy.features(batch.obs))
        return algo.with_coefficients(batch).extra["coefficient"]

    middle = 1 + (math.tanh(1.5) + 1) / 2 * 4
    assert drawn().std() > 1.0
    algo.begin_online()
    assert drawn().mean() == pytest.approx(middle, abs=0.02)
    assert drawn().std() < 0.1


def test_the_next_states_coefficient_is_its_own(lab):
    algo, batch = make(lab, "cql"), lab.make_batch()
    with torch.no_grad():
        for weight in algo.policy.balance.net.parameters():
            weight.mul_(30)
    torch.manual_seed(0)
    algo._like = lambda tensor: torch.zeros_like(tensor)
    found = algo.with_coefficients(batch).extra["next_coefficient"]
    assert torch.allclose(found, algo.policy.coefficient(batch.next_obs))
    assert not torch.allclose(found, algo.policy.coefficient(batch.obs), atol=1e-2)


# -- toy ----------------------------------------------------------------------------------------------------------


def two_clusters():
    """One-step episodes. State -1: the data's common action is best. State +1: a rare action is far better."""
    g = torch.Generator().manual_seed(0)
    rows = 512
    state = torch.where(torch.arange(rows) % 2 == 0, -1.0, 1.0)
    rare = torch.rand(rows, generator=g) < 0.1
    action = torch.where(rare, 0.6, -0.6) + 0.05 * torch.randn(rows, generator=g)
    good = torch.where(state > 0, action > 0, action < 0)
    ends = torch.ones(rows, dtype=torch.bool)
    obs = {"state": state[:, None]}
    reward = good.float() * 0.5
    return Batch(obs, action[:, None].clamp(-1, 1), reward, obs, ends, ~ends, torch.zeros(rows))


def test_the_coefficient_is_larger_where_the_data_is_worse(lab):
    spec = Spec({"state": ((1,), "float32")}, 1, (-1.0,), (1.0,), 1)
    rates = dict.fromkeys(("actor_lr", "critic_lr", "balance_lr", "temperature_lr"), 3e-3)
    policy = {"coefficient_low": 0.0, "coefficient_high": 10.0}
    algo = make(lab, spec=spec, policy=policy, tau=0.05, target_entropy=-2.0, **rates)
    batch = two_clusters()
    for _ in range(700):
        algo.update(batch)
    optimal, poor = algo.policy.coefficient({"state": torch.tensor([[-1.0], [1.0]])}).tolist()
    # Seeds 0 to 2 gave 5.2 and 7.7, 5.2 and 7.8, 5.2 and 7.7 after 1000 updates.
    assert poor > optimal + 1.0


# -- refusals -----------------------------------------------------------------------------------------------------


def test_wrong_policies_and_values_are_refused(lab):
    plain = Gaussian(GaussianConfig(hidden=[16]), lab.SPEC)
    parts = {"device": torch.device("cpu"), "generator": torch.Generator()}
    for cls, config, _ in OVER.values():
        with pytest.raises(ConfigError, match=r"policy=gaussian is one. Fix: policy=family"):
            cls(config(), plain, lab.SPEC, **parts)
    with pytest.raises(ConfigError, match=r"policy.squash=true"):
        FamO2OCQL(FamO2OCQLConfig(), make_family(lab.SPEC), lab.SPEC, **parts)
    with pytest.raises(ConfigError, match=r"balance_every=0"):
        FamO2OIQLConfig(balance_every=0)
    with pytest.raises(ConfigError, match=r"target_entropy=1.0 must be below"):
        FamO2OIQLConfig(target_entropy=1.0)
    assert isinstance(make(lab).temperature, nn.Module)
