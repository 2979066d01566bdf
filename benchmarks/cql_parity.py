# SPDX-License-Identifier: Apache-2.0
"""CQL and Cal-QL beside CORL's files: the same losses, and updates/s in turns.

HalfCheetah sizes (17 observations, 6 actions), batch 256, CORL's locomotion preset for CQL and its AntMaze preset
(Lagrange form, max-backup, clipped differences) for both, one CPU thread, sampling and what is done with
metrics included on both sides. The originals are read at run time from a clone:

    git clone https://github.com/corl-team/CORL $ROBOPOST_REFERENCE_DIR/CORL

and imported with empty stand-ins for d4rl, gym, pyrallis and wandb.

Before any timing both sides get the same weights, batches and noise (the critics' last layers scaled up, so that
Q-values differ from 0 and from each other), and all losses have to agree to 1e-5 (of max(1, |loss|)): in one
update, and in six of float64, because Adam's first steps turn the sign of a gradient near 0 into a whole step.
Two things are changed on CORL's side: its policy's learned scale and offset of the log-std stay at their start
(robopost has none), and its second critic is as deep as its first (its `cql.py` builds it with three layers
whatever the config says).

Ratios have no target. Where torch's oneDNN kernels are used (robopost/nets/fused.py) a further row is measured
without them.
"""

import contextlib
import io
from dataclasses import replace

import numpy as np
import torch
from sides.originals import Recorder, copy_critic, copy_linear, load_module, reference, repeat, stub

from robopost import accel
from robopost.algos.offline.cal_ql import CalQL, CalQLConfig
from robopost.algos.offline.cql import CQL, CQLConfig
from robopost.bench import Bench
from robopost.config import AccelConfig
from robopost.data.batch import Batch, Spec
from robopost.data.dataset import Dataset
from robopost.data.episode import Episode
from robopost.interleave import interleave
from robopost.nets import fused
from robopost.policies.gaussian import Gaussian, GaussianConfig

SUITE = "offline"
OBS, ACT, BATCH, THREADS, EPISODE, UPDATES = 17, 6, 256, 1, 1000, 6
SPEC = Spec({"state": ((OBS,), "float32")}, ACT, (-1.0,) * ACT, (1.0,) * ACT, EPISODE)
ANTMAZE = {"lagrange_gap": 0.8, "max_backup": True, "diff_min": -200.0, "min_q_weight": 5.0}
ANTMAZE |= {"actor_lr": 1e-4, "temperature_lr": 1e-4, "hidden": [256] * 5}
CASES = {
    "cql/locomotion": ("cql", {}),
    "cql/antmaze": ("cql", ANTMAZE),
    "cal_ql/antmaze": ("cal_ql", ANTMAZE),
}
# Ours -> those of CORL's whose sum it is.
LOSSES = {
    "loss/critic": ("qf1_loss", "qf2_loss"),
    "loss/conservative": ("cql_min_qf1_loss", "cql_min_qf2_loss"),
    "loss/actor": ("policy_loss",),
    "loss/temperature": ("alpha_loss",),
    "loss/multiplier": ("alpha_prime_loss",),
}


def experience(steps):
    """Random transitions in episodes of 1000 steps, as flat arrays."""
    rng = np.random.default_rng(0)
    obs = rng.standard_normal((steps + 1, OBS), dtype=np.float32)
    return {
        "observations": obs[:-1],
        "actions": rng.uniform(-1, 1, (steps, ACT)).astype(np.float32),
        "rewards": rng.standard_normal(steps, dtype=np.float32),
        "next_observations": obs[1:],
        "terminals": np.zeros(steps, np.float32),
        "mc_returns": rng.standard_normal(steps, dtype=np.float32) * 5,
    }


def our_algo(name, options):
    """Our algorithm with a policy like CORL's."""
    torch.manual_seed(0)
    settings = {"std_map": "clamp", "log_std_init": -1.0, "log_std_min": -20.0, "init": "orthogonal"}
    policy = Gaussian(GaussianConfig(hidden=[256] * 3, **settings), SPEC)
    cls, config = {"cql": (CQL, CQLConfig), "cal_ql": (CalQL, CalQLConfig)}[name]
    generator = torch.Generator().manual_seed(0)
    return cls(config(**options), policy, SPEC, device=torch.device("cpu"), generator=generator)


def ours(name, options, data):
    """A function that does one update as the offline loop does."""
    algo = our_algo(name, options)
    steps = len(data["rewards"])
    episodes = [
        Episode(
            obs={"state": np.concatenate([data["observations"][i:j], data["next_observations"][j - 1 : j]])},
            action=data["actions"][i:j],
            reward=data["rewards"][i:j],
            terminated=False,
            truncated=True,
        )
        for i, j in zip(range(0, steps, EPISODE), range(EPISODE, steps + 1, EPISODE), strict=True)
    ]
    dataset = Dataset.from_episodes(episodes, SPEC).normalise(algo.policy.normaliser)
    generator, record, extra = torch.Generator().manual_seed(1), Recorder(), algo.needs.extra
    return lambda: record(algo.update(dataset.sample(BATCH, generator, extra=extra)))


def corl(name):
    """CORL's module."""
    stubs = [stub("d4rl"), stub("gym", Env=object), stub("pyrallis", wrap=lambda *a, **k: lambda fn: fn)]
    folder = {"cql": "offline", "cal_ql": "finetune"}[name]
    path = reference("CORL", "algorithms", folder, f"{name}.py")
    return load_module(f"reference_{name}", path, [*stubs, stub("wandb", log=lambda *a, **k: None)])


def their_trainer(name, options):
    """CORL's trainer, built as its `train()` builds it."""
    torch.manual_seed(0)
    module, cfg = corl(name), our_algo(name, options).config
    adam = lambda net, lr: torch.optim.Adam(net.parameters(), lr)  # noqa: E731
    actor = module.TanhGaussianPolicy(OBS, ACT, 1.0, orthogonal_init=True)
    first, second = (module.FullyConnectedQFunction(OBS, ACT, True, len(cfg.hidden)) for _ in range(2))
    trainer = module.ContinuousCQL if name == "cql" else module.CalQL
    return trainer(
        critic_1=first,
        critic_1_optimizer=adam(first, cfg.critic_lr),
        critic_2=second,
        critic_2_optimizer=adam(second, cfg.critic_lr),
        actor=actor,
        actor_optimizer=adam(actor, cfg.actor_lr),
        target_entropy=-float(ACT),
        policy_lr=cfg.actor_lr,
        qf_lr=cfg.critic_lr,
        bc_steps=0,
        cql_n_actions=cfg.num_actions,
        cql_alpha=cfg.min_q_weight,
        cql_lagrange=cfg.lagrange_gap is not None,
        cql_target_action_gap=-1.0 if cfg.lagrange_gap is None else cfg.lagrange_gap,
        cql_max_target_backup=cfg.max_backup,
        cql_clip_diff_min=-np.inf if cfg.diff_min is None else cfg.diff_min,
    )


def theirs(name, options, data):
    """A function that does one update as CORL's loop does."""
    trainer, module = their_trainer(name, options), corl(name)
    buffer = module.ReplayBuffer(OBS, ACT, len(data["rewards"]))
    with contextlib.redirect_stdout(io.StringIO()):
        buffer.load_d4rl_dataset(data)
    return lambda: module.wandb.log(trainer.train([item.to("cpu") for item in buffer.sample(BATCH)]))


def copy_weights(algo, trainer):
    """Our weights into CORL's networks; its extra scalars of the log-std stay as they are."""
    linears = [layer for layer in trainer.actor.base_network if hasattr(layer, "weight")]
    layers = [layer for layer in algo.policy.net if hasattr(layer, "weight")]
    for source, target in zip(layers, linears, strict=True):
        copy_linear(target, source.weight, source.bias)
    for scalar in (trainer.actor.log_std_multiplier, trainer.actor.log_std_offset):
        scalar.constant.requires_grad_(False)
    pairs = [(trainer.critic_1, trainer.target_critic_1), (trainer.critic_2, trainer.target_critic_2)]
    for member, (critic, target) in enumerate(pairs):
        copy_critic(algo.critic, member, [layer for layer in critic.network if hasattr(layer, "weight")])
        target.load_state_dict(critic.state_dict())


def parity(name, options, data):
    """Largest difference of any loss, over max(1, |loss|): of one update, and of `UPDATES` in float64."""
    row = {"one_update": losses_apart(name, options, data, 1)}
    torch.set_default_dtype(torch.float64)
    try:
        row["more_updates"] = losses_apart(name, options, data, UPDATES)
    finally:
        torch.set_default_dtype(torch.float32)
    if not max(row.values()) < 1e-5:
        raise AssertionError(f"losses differ: {row}: not the same computation")
    return row


def losses_apart(name, options, data, updates):
    """Largest difference of any loss or bound rate in torch's default dtype."""
    algo, trainer = our_algo(name, options), their_trainer(name, options)
    with torch.no_grad():
        algo.critic.net[-1].weight.mul_(200.0)
    algo.critic_target.load_state_dict(algo.critic.state_dict())
    copy_weights(algo, trainer)
    worst = 0.0
    for step in range(updates):
        rows = slice(step * BATCH, (step + 1) * BATCH)
        kind = torch.get_default_dtype()
        s, a, r, s2, d, returns = (torch.from_numpy(data[key][rows]).to(kind) for key in data)
        flags = torch.zeros(BATCH, dtype=torch.bool)
        batch = Batch({"state": s}, a, r, {"state": s2}, flags, flags, torch.full((BATCH,), 0.99))
        columns = [s, a, r[:, None], s2, d[:, None], returns[:, None]]
        torch.manual_seed(step)
        algo.generator.manual_seed(step)
        expected = trainer.train(columns if name == "cal_ql" else columns[:5])
        got = algo.update(replace(batch, extra={"return_to_go": returns}))
        pairs = [(sum(expected[part] for part in LOSSES[key]), got[key]) for key in LOSSES if key in got]
        if name == "cal_ql":
            keys = [f"bound_rate_cql_q{i}_{which}_actions" for i in (1, 2) for which in ("current", "next")]
            pairs.append((np.mean([expected[key] for key in keys]), got["value/bound_rate"]))
        worst = max(worst, *(abs(value - own.item()) / max(1.0, abs(value)) for value, own in pairs))
    return float(worst)


def compare(bench, key, name, options, data):
    """One cell: parity, then the interleaved ratio."""
    count, rounds = bench.scale(smoke=3, small=8, paper=100), bench.scale(smoke=3, small=7, paper=15)

    def measure():
        row = parity(name, options, data)
        mine, other = repeat(ours(name, options, data), count), repeat(theirs(name, options, data), count)
        return row | interleave(mine, other, rounds).row() | {"fused": fused.preferred()}

    return bench.cell(key, measure, params={"threads": THREADS, "updates": count, "rounds": rounds})


def run(bench: Bench) -> None:
    """Parity and ratio of every preset."""
    bench.packages("torch")
    data = experience(bench.scale(smoke=20_000, small=100_000, paper=1_000_000))
    before = torch.get_num_threads()
    accel.configure(AccelConfig(threads=THREADS))
    rows = []
    try:
        for case, (name, options) in CASES.items():
            row = compare(bench, case, name, options, data)
            rows.append(_row(case, "", row))
            figure = f"{case.replace('/', '_')}_updates_vs_corl"
            note = f"CPU, {THREADS} thread, sampling included"
            bench.figure(figure, row["median"], interval=(row["min"], row["max"]), unit="x", note=note)
            if fused.preferred():
                fused.force(False)
                row = compare(bench, f"{case}/without fused kernels", name, options, data)
                fused.force(None)
                rows.append(_row(case, "without fused kernels", row))
    finally:
        fused.force(None)
        torch.set_num_threads(before)
        torch.set_flush_denormal(False)
    caption = (
        "Largest difference of a loss (over max(1, |loss|)) and updates per second on CPU, CORL's in turns."
    )
    bench.table("cpu", rows, caption=caption)


def _row(case, variant, row):
    algorithm, preset = case.split("/")
    keys = {"one update": "one_update", f"{UPDATES} updates": "more_updates"}
    rates = {
        "ours (1/s)": "ours_per_s",
        "CORL (1/s)": "theirs_per_s",
        "ratio": "median",
        "min": "min",
        "max": "max",
    }
    cells = {title: row[key] for title, key in (keys | rates).items()}
    return {"algorithm": algorithm, "preset": preset, "variant": variant} | cells
