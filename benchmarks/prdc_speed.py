# SPDX-License-Identifier: Apache-2.0
"""Updates/s of PRDC against its original and against our TD3+BC, and what the neighbour index costs.

HalfCheetah (17 observations, 6 actions, 256-256 networks, batch 256, beta 2) at 100k and 1M transitions, recorded here
from six published actors at two levels of noise (data/prdc_speed, kept). The original is read at run time from a clone:

    git clone https://github.com/LAMDA-RL/PRDC $ROBOPOST_REFERENCE_DIR/PRDC

Its launcher, which needs d4rl, is left out: a side is its agent with its own replay buffer, whose arrays hold the same
normalised rows. Queries get harder as the policy leaves the data, so both sides are timed with the same trained
networks: PRDC after some thousand updates with the original's alpha=40 of halfcheetah (the figures) and with 2.5. Rates
are per second of this process's CPU time, since the original's search uses all cores: with one thread that is the time
on a free core.

Before any timing both sides get the same weights, batches and noise for two updates, of which the second includes the
actor's, and all losses have to agree to 1e-5 of max(1, |loss|). The exact rate is the share of queries, of batches that
training at alpha=40 and 2.5 meets on both datasets, whose answer is as near (to 1e-5) as that of an exhaustive search
in float64.
"""

import contextlib
import io
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from sides.originals import (
    Recorder,
    agent_and_buffer,
    copy_critic,
    copy_linear,
    loss_difference,
    repeat,
    train_on,
)

from robopost import accel
from robopost.algos.offline.prdc import PRDC, PRDCConfig
from robopost.algos.offline.td3_bc import TD3BC, TD3BCConfig
from robopost.bench import Bench, find_checkout
from robopost.config import AccelConfig, DataConfig
from robopost.data.batch import Batch
from robopost.data.dataset import Dataset
from robopost.interleave import interleave
from robopost.policies.deterministic import Deterministic, DeterministicConfig
from robopost.suite import Source, SuiteSet, collect_set

SUITE = "offline"
BATCH, BETA, THREADS = 256, 2.0, 1
FOLDER = find_checkout() / "data" / "prdc_speed"
ACTORS = ("sac", "tqc", "ppo", "trpo", "ars", "a2c")
NOISES = (0.15, 0.5)
LOSSES = {"critic_loss": "loss/critic", "dc_loss": "loss/constraint", "combined_loss": "loss/actor"}


def recorded(count):
    """Exactly `count` transitions of HalfCheetah as a normalised dataset with its policy's normaliser."""
    share = count // (len(ACTORS) * len(NOISES) * 1000) * 1000 + 1000
    sources = [
        Source(f"actor/halfcheetah_{actor}", steps=share, seed=9_000_000 + 10_000 * index, noise=noise)
        for index, (actor, noise) in enumerate((a, n) for a in ACTORS for n in NOISES)
    ]
    name = f"halfcheetah-{count}"
    collect_set(SuiteSet("prdc_speed", name, 1, "halfcheetah", tuple(sources)), FOLDER, num_envs=20)
    config = DataConfig(path=str(FOLDER / f"{name}.zarr"), episodes=count // 1000)
    dataset = Dataset.load(config, device="cpu")
    assert dataset.num_steps == count, dataset.num_steps
    return dataset


def our_agent(cls, dataset, **options):
    """An algorithm of ours, attached to the dataset in its policy's units; returns both."""
    torch.manual_seed(0)
    policy = Deterministic(DeterministicConfig(), dataset.spec)
    policy.normaliser.fit(dataset.stats, obs="meanstd", action="bounds", source=dataset.dataset_id)
    config = PRDCConfig(beta=BETA, **options) if cls is PRDC else TD3BCConfig(**options)
    generator = torch.Generator().manual_seed(0)
    algo = cls(config, policy, dataset.spec, device=torch.device("cpu"), generator=generator)
    scaled = dataset.normalise(policy.normaliser)
    algo.attach(scaled)
    return algo, scaled


def our_side(algo, dataset, seed=1):
    """A function that does one update as the offline loop does."""
    generator, record = torch.Generator().manual_seed(seed), Recorder()

    def update():
        record(algo.update(dataset.sample(BATCH, generator, extra=algo.needs.extra)))

    return update


def rows_of(dataset):
    """All transitions in D4RL's fields, normalised."""
    batch = dataset.transitions_at(torch.arange(dataset.num_steps))
    values = {
        "observations": batch.obs["state"],
        "actions": batch.action,
        "rewards": batch.reward,
        "next_observations": batch.next_obs["state"],
        "terminals": batch.terminated.float(),
    }
    return {key: value.numpy() for key, value in values.items()}


def their_agent(algo, data):
    """The original with our networks' weights, its tree over the same pairs."""
    pairs = np.hstack([BETA * data["observations"], data["actions"]])
    sizes = {"state_dim": data["observations"].shape[1], "action_dim": data["actions"].shape[1]}
    with contextlib.redirect_stdout(io.StringIO()):
        agent = agent_and_buffer("PRDC", "prdc.py")[0].PRDC(
            pairs, **sizes, max_action=1.0, device="cpu", alpha=algo.config.alpha, beta=BETA
        )
    linears = lambda module: [x for x in module.modules() if isinstance(x, torch.nn.Linear)]  # noqa: E731
    for ours, theirs in ((algo.policy, agent.actor), (algo.policy_target, agent.actor_target)):
        for layer, target in zip(linears(ours), linears(theirs), strict=True):
            copy_linear(target, layer.weight.detach(), layer.bias.detach())
    for ours, theirs in ((algo.critic, agent.critic), (algo.critic_target, agent.critic_target)):
        for member in range(2):
            copy_critic(ours, member, linears(theirs)[3 * member : 3 * member + 3])
    return agent


def their_side(agent, data):
    """A function that does one update as its launcher's loop does."""
    sizes = (data["observations"].shape[1], data["actions"].shape[1])
    buffer = agent_and_buffer("PRDC", "prdc.py")[1].ReplayBuffer(*sizes, "cpu", "none", 1, 0, max_size=1)
    buffer.convert_D4RL(data)
    np.random.seed(0)
    return lambda: agent.train(buffer, BATCH)


def parity(dataset):
    """Largest relative difference of losses over two updates, all else equal."""
    algo, scaled = our_agent(PRDC, dataset, alpha=40.0)
    data = rows_of(scaled)
    agent = their_agent(algo, data)
    worst = 0.0
    for step in range(2):
        steps = torch.randperm(scaled.num_steps, generator=torch.Generator().manual_seed(step))[:BATCH]
        batch = scaled.transitions_at(steps, extra=("step",))
        done = torch.arange(BATCH) % 5 == 0
        given = [batch.obs["state"], batch.action, batch.reward[:, None], batch.next_obs["state"]]
        given.append(1.0 - done.float()[:, None])
        torch.manual_seed(step)
        algo.generator.manual_seed(step)
        expected = train_on(agent, given)
        ours = Batch(
            batch.obs,
            batch.action,
            batch.reward,
            batch.next_obs,
            done,
            batch.truncated,
            torch.where(done, 0.0, 0.99),
            extra=batch.extra,
        )
        worst = max(worst, loss_difference(expected, algo.update(ours), LOSSES))
    return worst


def exact_rate(algo, dataset, queries=512):
    """Share of answers as near as an exhaustive float64 search's, and of answers certified by the lists."""
    steps = torch.randint(dataset.num_steps, (queries,), generator=torch.Generator().manual_seed(7))
    obs = dataset.transitions_at(steps).obs
    with torch.no_grad():
        action = algo.policy.sample(obs, deterministic=True)[0][:, 0]
    found = algo.neighbours.search(steps, action)
    key = torch.cat([BETA * obs["state"], action], 1).double()
    least = torch.full((queries,), torch.inf, dtype=torch.float64)
    for part in torch.arange(dataset.num_steps).split(20_000):
        pairs = torch.cat(
            [BETA * dataset.transitions_at(part).obs["state"], dataset.action[part]], 1
        ).double()
        least = torch.minimum(
            least, torch.cdist(key, pairs, compute_mode="donot_use_mm_for_euclid_dist").amin(1)
        )
    distance = found.squared[:, 0].double().sqrt()
    right = (distance - least).abs() <= 1e-5 * (1 + least)
    return {
        "exact": right.double().mean().item(),
        "certified": found.certified.float().mean().item(),
        "own": (found.ids[:, 0] == steps).float().mean().item(),
    }


def index_cell(bench, count):
    """Build time and size of the index, from an empty folder."""

    def measure():
        dataset = recorded(count)
        folder = FOLDER / f"index-{count}"
        shutil.rmtree(folder, ignore_errors=True)
        began = time.process_time()
        our_agent(PRDC, dataset, index=str(folder))
        seconds = time.process_time() - began
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
        return {"cpu_seconds": seconds, "bytes": size, "bytes_per_step": size / count}

    return bench.cell(f"{count}/index", measure, params={"threads": THREADS, "transitions": count})


def speed_cell(bench, count, alpha):
    """Parity (on the small set), then both interleaved ratios with trained networks, then the exact rate."""
    warm = bench.scale(smoke=20, small=4000, paper=20_000)
    rounds = bench.scale(smoke=3, small=7, paper=15)
    ours_per_round = bench.scale(smoke=10, small=60, paper=500)
    theirs_per_round = bench.scale(smoke=2, small=2 if count >= 500_000 else 10, paper=50)

    def measure():
        dataset = recorded(count)
        worst = parity(dataset) if count < 500_000 else None
        if worst is not None and not worst < 1e-5:
            raise AssertionError(f"losses differ by {worst:.2g}: not the same computation")
        algo, scaled = our_agent(PRDC, dataset, alpha=alpha, index=str(FOLDER / f"index-{count}"))
        ours = our_side(algo, scaled)
        repeat(ours, warm)()
        data = rows_of(scaled)
        theirs = their_side(their_agent(algo, data), data)
        plain = our_side(*our_agent(TD3BC, dataset))
        clock = time.process_time
        against_td3_bc = interleave(
            repeat(plain, ours_per_round), repeat(ours, ours_per_round), rounds, clock=clock
        ).row()
        row = interleave(
            repeat(ours, ours_per_round), repeat(theirs, theirs_per_round), rounds, clock=clock
        ).row()
        return row | {
            "time_vs_td3_bc": {key: against_td3_bc[key] for key in ("median", "min", "max")},
            "td3_bc_per_s": against_td3_bc["ours_per_s"],
            "largest_loss_difference": worst,
            **exact_rate(algo, scaled),
        }

    params = {"threads": THREADS, "transitions": count, "alpha": alpha, "warm": warm, "rounds": rounds}
    params |= {"ours": ours_per_round, "theirs": theirs_per_round}
    return bench.cell(f"{count}/alpha{alpha:g}", measure, params=params)


def run(bench: Bench) -> None:
    """Index, parity, ratios and exact rate."""
    bench.packages("torch", "scipy", "mujoco")
    before = torch.get_num_threads()
    accel.configure(AccelConfig(threads=THREADS))
    counts = bench.scale(smoke=(12_000,), small=(100_000, 1_000_000), paper=(100_000, 1_000_000))
    rows, built, cells = [], [], {}
    try:
        for count in counts:
            index = index_cell(bench, count)
            built.append(
                {
                    "transitions": count,
                    "build (CPU s)": index["cpu_seconds"],
                    "size (MB)": index["bytes"] / 1e6,
                }
            )
            for alpha in (40.0, 2.5):
                cell = cells[count, alpha] = speed_cell(bench, count, alpha)
                slower = cell["time_vs_td3_bc"] or {}
                rows.append(
                    {
                        "transitions": count,
                        "alpha": alpha,
                        "ours (1/s)": cell["ours_per_s"],
                        "original (1/s)": cell["theirs_per_s"],
                        "ratio": cell["median"],
                        "min": cell["min"],
                        "max": cell["max"],
                        "time / TD3+BC's": slower.get("median", float("nan")),
                        "own neighbour": cell["own"],
                        "certified": cell["certified"],
                        "exact": cell["exact"],
                    }
                )
    finally:
        torch.set_num_threads(before)
    targets = {
        100_000: ("prdc_updates_vs_original_100k", 20.0),
        1_000_000: ("prdc_updates_vs_original_1m", 100.0),
    }
    for count, (name, target) in targets.items():
        if count in counts:
            cell = cells[count, 40.0]
            note = f"CPU time, {THREADS} thread, alpha 40, trained networks, sampling included"
            span = (cell["min"], cell["max"])
            bench.figure(name, cell["median"], interval=span, unit="x", target=target, note=note)
    slower = cells[counts[-1], 40.0]["time_vs_td3_bc"] or {}
    span = (slower.get("min", float("nan")), slower.get("max", float("nan")))
    note = f"update time, both ours, {counts[-1]} transitions, alpha 40, trained networks"
    value = slower.get("median", float("nan"))
    bench.figure("prdc_time_vs_td3bc", value, interval=span, unit="x", target=1.25, better="lower", note=note)
    rate = min(cell["exact"] for cell in cells.values())
    bench.figure("prdc_exact_rate", rate, target=1.0, note="smallest of all cells, 512 queries each")
    bench.table("speed", rows, caption="PRDC's updates per second of CPU time, ours and the original's.")
    bench.table("index", built, caption="The neighbour index, built once per dataset.")
