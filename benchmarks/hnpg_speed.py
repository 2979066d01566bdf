# SPDX-License-Identifier: Apache-2.0
"""Time of one HNPG iteration on the combination lock, ours against the released code, interleaved.

An iteration is 1,000 environment steps of whole episodes, the backward pass over the critics (30 Adam steps per step of
the episode) and the natural-gradient step of every policy; evaluation and logging are in neither side. Horizons: 5, the
released code's default, 20, and 50, that of its README; networks and settings are the released ones on both sides. The
figure is the smallest of the three medians. CPU time, one thread.

Ours computes in float32, the released code in float64; ours leaves out the released code's first pass over the values,
whose result it overwrites. Before anything is timed, both sides' critic fit and policy step are compared from equal
weights and data in float64.

The released code (`sides/hnpg_original.py` says what newer libraries force):

    git clone https://github.com/YifeiZhou02/HNPG $ROBOPOST_REFERENCE_DIR/HNPG
"""

import tempfile
import time
from pathlib import Path

import torch
from robopost_envs.lock import LockConfig
from sides.hnpg_original import Original, double
from sides.originals import repeat

from robopost.accel import configure
from robopost.algos.natural import natural_step
from robopost.algos.online.hnpg import halves, surrogate
from robopost.bench import Bench
from robopost.collect import collect
from robopost.compose import compose
from robopost.config import AccelConfig, CollectConfig
from robopost.data.batch import Spec
from robopost.data.dataset import Dataset
from robopost.interleave import interleave
from robopost.loops.collector import Collector
from robopost.loops.onpolicy import collect_steps
from robopost.loops.run import Run
from robopost.nets.rows import Regression, Rows, StackedQ
from robopost.policies.gaussian import gaussian_kl, normal_log_density
from robopost.policies.stepwise import Stepwise, StepwiseConfig
from robopost.vector import make_vec

SUITE = "onpolicy"
HORIZONS = (5, 20, 50)


def ours(horizon: int, episodes: int, folder: Path):
    """A function that does one iteration of ours, as the training loop does it."""
    data = folder / f"h{horizon}.zarr"
    env = LockConfig(horizon=horizon)
    collect(CollectConfig(env=env, episodes=episodes, quality=1 - 1 / horizon, num_envs=100, out=str(data)))
    words = [
        f"recipe=hnpg/lock_h{min(horizon, 20)}",
        f"env.horizon={horizon}",
        f"env.num_envs={1000 // horizon}",
    ]
    config = compose([*words, "data.collect=0", f"data.path={data}", "device=cpu", "seed=0"])
    run = Run(config, folder / "run")
    vec = make_vec(config.env, config.env.num_envs)
    dataset = Dataset.load(config.data, device=run.device)
    algo = run.build(vec.spec, dataset.stats, dataset.dataset_id)
    algo.attach(dataset.normalise(algo.policy.normaliser))
    collector = Collector(vec, run)
    collector.start(None)

    def iterate():
        batch = collect_steps(collector, algo, algo.needs.rollout_steps)
        run.record(algo.update(algo.policy.normaliser.batch(batch)))

    return iterate


def copy_net(linears, net, head: int) -> None:
    """The released code's linear layers into one head of our stacked ones."""
    stacked = [layer for layer in net if hasattr(layer, "weight")]
    for layer, source in zip(stacked, linears, strict=True):
        layer.weight.data[head].copy_(source.weight.data.t())
        layer.bias.data[head, 0].copy_(source.bias.data)


def agreement(episodes: int) -> dict[str, float]:
    """Largest difference of weights after one critic fit and one policy step from equal weights and data."""
    horizon, obs, act, rows = 5, 16, 10, 40
    original = Original.load(horizon, episodes)
    agent, module = original.space["agent"], original.space
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    state, action, target = draw(rows, obs), draw(rows, act), draw(rows, 1)
    old_state, old_action, old_target = draw(rows, obs), draw(rows, act), draw(rows, 1)
    critic = StackedQ(horizon, obs, act, [64, 64]).double()
    spec = Spec({"state": ((obs,), "float32")}, act, (0.0,) * act, (1.0,) * act, horizon)
    policy = Stepwise(StepwiseConfig(), spec).double()
    q, pi = agent.q_net[1], agent.policy_net[1]
    copy_net([q.affine1, q.affine2, q.value_head], critic.net, 1)
    copy_net([pi.affine1, pi.affine2, pi.action_mean], policy.net, 1)
    fit, matrix = Regression(critic.net), Rows(policy, horizon)
    x = torch.cat([torch.cat([state, action], 1), torch.cat([old_state, old_action], 1)])
    fit.fit(1, x, torch.cat([target, old_target]), halves(rows, rows, x), steps=30, lr=3e-4)
    with double():
        agent.update_q(state, action, target, old_state, old_action, old_target, q)
    after = StackedQ(horizon, obs, act, [64, 64]).double()
    copy_net([q.affine1, q.affine2, q.value_head], after.net, 1)
    pairs = zip(critic.parameters(), after.parameters(), strict=True)
    out = {"critic": max(float((a.detach() - b.detach())[1].abs().max()) for a, b in pairs)}

    states, chain = state.expand(horizon, rows, obs), draw(horizon, rows, act)
    advantage = draw(horizon, rows)
    with torch.no_grad():
        mean, log_std = (value.clone() for value in policy.heads(states))
        before = normal_log_density(chain, mean, log_std).sum(-1)
    natural_step(
        matrix,
        lambda: surrogate(advantage, normal_log_density(chain, *policy.heads(states)).sum(-1) - before),
        lambda: gaussian_kl(mean, log_std, *policy.heads(states)).sum(-1).mean(1),
        max_kl=1e-2,
        damping=0.1,
        iterations=10,
        backtracks=10,
    )
    with double():
        module["update_policy"] = module["TRPO"].update_params.__globals__["update_policy"]
        module["update_policy"](pi, state, chain[1], advantage[1][:, None], 1e-2, 0.1, torch.device("cpu"))
    after = Stepwise(StepwiseConfig(), spec).double()
    copy_net([pi.affine1, pi.affine2, pi.action_mean], after.net, 1)
    after.log_std.data[1].copy_(pi.action_log_std.data)
    pairs = zip(policy.parameters(), after.parameters(), strict=True)
    return out | {"policy": max(float((a.detach() - b.detach())[1].abs().max()) for a, b in pairs)}


def measure(horizon: int, episodes: int, rounds: int, iterations: int) -> dict[str, float]:
    """Rates of both sides in iterations per second of CPU time."""
    configure(AccelConfig())
    original = Original.load(horizon, episodes)
    with tempfile.TemporaryDirectory() as folder:
        side = ours(horizon, episodes, Path(folder))
        ratio = interleave(
            repeat(side, iterations),
            repeat(original.iterate, iterations),
            rounds=rounds,
            clock=time.process_time,
        )
    return ratio.row()


def run(bench: Bench) -> None:
    """Agreement, then one cell per horizon."""
    rounds = bench.scale(smoke=2, small=7, paper=11)
    iterations = bench.scale(smoke=1, small=3, paper=5)
    episodes = bench.scale(smoke=100, small=2000, paper=2000)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    rows, cells = [], []
    try:
        same = bench.cell("agreement", lambda: agreement(20), params={})
        for horizon in HORIZONS:
            params = {"rounds": rounds, "iterations": iterations, "episodes": episodes}
            cell = bench.cell(
                f"h{horizon}", lambda h=horizon: measure(h, episodes, rounds, iterations), params=params
            )
            cells.append(cell)
            rows.append(
                {
                    "horizon": horizon,
                    "ours (ms)": 1e3 / cell["ours_per_s"],
                    "released (ms)": 1e3 / cell["theirs_per_s"],
                    "ratio": cell["median"],
                    "min": cell["min"],
                    "max": cell["max"],
                    "critics differ by": same["critic"],
                    "policies differ by": same["policy"],
                }
            )
    finally:
        torch.set_num_threads(before)
    smallest = min(cells, key=lambda cell: cell["median"])
    value = smallest["median"] if all(cell["median"] == cell["median"] for cell in cells) else float("nan")
    bench.figure(
        "hnpg_iteration_vs_original",
        value,
        interval=(smallest["min"], smallest["max"]),
        unit="x",
        target=10.0,
        note=f"CPU time, 1 thread, smallest of the medians at H = {', '.join(map(str, HORIZONS))}",
    )
    bench.table("iterations", rows, caption="CPU time of an iteration, ours and the released code's.")
