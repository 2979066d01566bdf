# SPDX-License-Identifier: Apache-2.0
"""Updates/s of A2PR against its original, side by side on the same cores.

HalfCheetah sizes (17 observations, 6 actions, batch 256; actor 256 x 3, critics and V 256 x 4, VAE 750 x 2), 100k
and 1M transitions, sampling a batch and reading metrics now and then included on both sides, equal threads. The
original is read at run time from a clone:

    git clone https://github.com/ltlhuuu/A2PR $ROBOPOST_REFERENCE_DIR/A2PR

Its launcher, which needs d4rl, is left out: a side is its agent with its own replay buffer. The launcher writes
every number to TensorBoard at every step; here they are dropped, which favours the original.

Before any timing both sides get the same weights, batches and noise for two updates, of which the second includes the
actor's, and all losses have to agree to 1e-5 of max(1, |loss|); the largest difference of any parameter afterwards is
recorded. Later updates can differ by more: the algorithm compares Q with V per sample, and a rounding error that turns
one comparison shows as a jump. What the original computes and never uses (V(s'), gradients of VAE and critic in the
actor's step) doesn't show in any loss.

Rates are per second of this process's CPU time: with one thread that is the time on a free core, and other load on the
machine is left out.

Rows without a target: ours without torch's oneDNN kernels (robopost/nets/fused.py), ours with a detached candidate
(another algorithm: no gradient through the VAE), and how much longer an update of ours takes than TD3+BC's.
"""

import contextlib
import io
import time

import numpy as np
import torch
from sides.originals import Recorder, agent_and_buffer, copy_linear, loss_difference, repeat, train_on

from robopost import accel
from robopost.algos.offline.a2pr import A2PR, A2PRConfig
from robopost.algos.offline.td3_bc import TD3BC, TD3BCConfig
from robopost.bench import Bench
from robopost.config import AccelConfig
from robopost.data.batch import Batch, Spec
from robopost.data.dataset import Dataset
from robopost.data.episode import Episode
from robopost.interleave import interleave
from robopost.nets import fused
from robopost.nets.ensemble import EnsembleLinear
from robopost.policies.deterministic import Deterministic, DeterministicConfig

SUITE = "offline"
OBS, ACT, BATCH, EPISODE, THREADS = 17, 6, 256, 1000, 1
SPEC = Spec({"state": ((OBS,), "float32")}, ACT, (-1.0,) * ACT, (1.0,) * ACT, EPISODE)
LOSSES = {
    "critic_loss": "loss/critic",
    "vae_loss": "loss/vae",
    "recon_loss": "loss/vae_reconstruction",
    "KL_loss": "loss/vae_kl",
    "bc_loss": "loss/bc",
    "combined_loss": "loss/actor",
}
SETTINGS = {"alpha": 40.0, "mask": 1.0, "vae_weight": 1.0}  # the original's for halfcheetah-medium


def experience(steps, seed=0):
    """Random transitions in episodes without a terminal, in D4RL's fields."""
    rng = np.random.default_rng(seed)
    obs = rng.standard_normal((steps // EPISODE, EPISODE + 1, OBS), dtype=np.float32)
    return {
        "observations": obs[:, :-1].reshape(-1, OBS),
        "actions": rng.uniform(-1, 1, (steps, ACT)).astype(np.float32),
        "rewards": rng.standard_normal(steps, dtype=np.float32),
        "next_observations": obs[:, 1:].reshape(-1, OBS),
        "terminals": np.zeros(steps, np.float32),
        "final": obs[:, -1],
    }


def our_agent(cls=A2PR, config=None):
    """An algorithm at its reference's sizes."""
    torch.manual_seed(0)
    depth = 3 if cls is A2PR else 2
    policy = Deterministic(DeterministicConfig(hidden=[256] * depth), SPEC)
    generator = torch.Generator().manual_seed(0)
    config = A2PRConfig(**SETTINGS) if config is None else config
    return cls(config, policy, SPEC, device=torch.device("cpu"), generator=generator)


def our_side(algo, data):
    """A function that does one update as the offline loop does."""
    episodes = [
        Episode(
            obs={"state": np.concatenate([data["observations"][i : i + EPISODE], final[None]])},
            action=data["actions"][i : i + EPISODE],
            reward=data["rewards"][i : i + EPISODE],
            terminated=False,
            truncated=True,
        )
        for i, final in zip(range(0, len(data["rewards"]), EPISODE), data["final"], strict=True)
    ]
    dataset = Dataset.from_episodes(episodes, SPEC).normalise(algo.policy.normaliser)
    generator, record = torch.Generator().manual_seed(1), Recorder()

    def update():
        record(algo.update(dataset.sample(BATCH, generator)))

    return update


def their_agent():
    with contextlib.redirect_stdout(io.StringIO()):
        return agent_and_buffer("A2PR", "A2PR.py")[0].A2PR(OBS, ACT, 1.0, "cpu", **SETTINGS)


def their_side(data):
    """A function that does one update as its launcher's loop does."""
    agent = their_agent()
    buffer = agent_and_buffer("A2PR", "A2PR.py")[1].ReplayBuffer(OBS, ACT, "cpu", "none", 1, 0, max_size=1)
    buffer.D4RL_convert(data)
    return lambda: agent.train(buffer, BATCH)


def linears(module, kind=torch.nn.Linear):
    return [layer for layer in module.modules() if isinstance(layer, kind)]


def members(net, theirs, member=0):
    """(weight, bias, their linear) of one member of stacked networks."""
    layers = linears(net, EnsembleLinear)
    return [(a.weight[member].t(), a.bias[member, 0], b) for a, b in zip(layers, theirs, strict=True)]


def pairs(algo, agent):
    """(our weight, our bias, their linear) of all networks; their two heads of the encoder are one of ours."""
    vae, critics, half = agent.vae, linears(agent.critic), algo.latent
    plain = [(linears(algo.policy), linears(agent.actor)), (linears(algo.value), linears(agent.value))]
    found = [(a.weight, a.bias, b) for ours, theirs in plain for a, b in zip(ours, theirs, strict=True)]
    found += members(algo.critic, critics[:5]) + members(algo.critic, critics[5:], 1)
    found += members(algo.vae.decoder, [vae.d1, vae.d2, vae.d3])
    *hidden, (weight, bias, _) = members(algo.vae.encoder, [vae.e1, vae.e2, None])
    return [
        *found,
        *hidden,
        (weight[:half], bias[:half], vae.mean),
        (weight[half:], bias[half:], vae.log_std),
    ]


def parity(data):
    """Largest difference of losses over two updates and of parameters after them, all else equal."""
    algo, agent = our_agent(), their_agent()
    for weight, bias, theirs in pairs(algo, agent):
        copy_linear(theirs, weight, bias)
    for name in ("actor", "critic"):
        getattr(agent, f"{name}_target").load_state_dict(getattr(agent, name).state_dict())
    worst = 0.0
    done = torch.arange(BATCH) % 5 == 0
    for step in range(2):
        rows = slice(step * BATCH, (step + 1) * BATCH)
        names = ("observations", "actions", "rewards", "next_observations")
        s, a, r, s2 = (torch.from_numpy(data[key][rows]) for key in names)
        given = [s, a, r[:, None], s2, 1.0 - done.float()[:, None]]
        torch.manual_seed(step)
        algo.generator.manual_seed(step)
        expected = train_on(agent, given)
        discount = torch.where(done, 0.0, 0.99)
        got = algo.update(Batch({"state": s}, a, r, {"state": s2}, done, torch.zeros_like(done), discount))
        worst = max(worst, loss_difference(expected, got, LOSSES))
    both = pairs(algo, agent)
    params = max((ours - theirs.weight).abs().max().item() for ours, _, theirs in both)
    params = max(params, *((ours - theirs.bias).abs().max().item() for _, ours, theirs in both))
    return worst, params


def compare(bench, key, data, *, config=None, plain=False):
    """One cell: parity, then the interleaved ratio."""
    count = bench.scale(smoke=20, small=40, paper=500)
    rounds = bench.scale(smoke=3, small=9, paper=15)

    def measure():
        fused.force(False if plain else None)
        try:
            worst, params = parity(data)
            if not worst < 1e-5:
                raise AssertionError(f"losses differ by {worst:.2g}: not the same computation")
            ours, theirs = our_side(our_agent(config=config), data), their_side(data)
            row = interleave(
                repeat(ours, count), repeat(theirs, count), rounds, clock=time.process_time
            ).row()
        finally:
            fused.force(None)
        return row | {
            "largest_loss_difference": worst,
            "largest_parameter_difference": params,
            "fused": fused.preferred() and not plain,
        }

    params = {"threads": THREADS, "updates": count, "rounds": rounds, "transitions": len(data["rewards"])}
    return bench.cell(key, measure, params=params)


def against_td3_bc(bench, data):
    """How much longer an update takes than TD3+BC's, both ours."""
    count = bench.scale(smoke=20, small=40, paper=500)
    rounds = bench.scale(smoke=3, small=9, paper=15)

    def measure():
        a2pr = our_side(our_agent(), data)
        td3_bc = our_side(our_agent(TD3BC, TD3BCConfig()), data)
        return interleave(repeat(td3_bc, count), repeat(a2pr, count), rounds, clock=time.process_time).row()

    return bench.cell("td3_bc", measure, params={"threads": THREADS, "updates": count, "rounds": rounds})


def run(bench: Bench) -> None:
    """Parity and CPU ratios."""
    bench.packages("torch")
    before = torch.get_num_threads()
    accel.configure(AccelConfig(threads=THREADS))
    large = bench.scale(smoke=100_000, small=1_000_000, paper=1_000_000)
    rows = []
    try:
        data = experience(100_000)
        main = compare(bench, "100k", data)
        rows.append(_row("100k transitions", main))
        if fused.preferred():
            rows.append(_row("100k, without fused kernels", compare(bench, "100k/plain", data, plain=True)))
        config = A2PRConfig(**SETTINGS, detach_candidate=True)
        rows.append(_row("100k, detached candidate", compare(bench, "100k/detached", data, config=config)))
        slower = against_td3_bc(bench, data)
        more = compare(bench, "1m", experience(large))
        rows.append(_row("1M transitions", more))
    finally:
        torch.set_num_threads(before)
    note = f"CPU time, {THREADS} thread, 100k transitions, sampling included"
    span = (main["min"], main["max"])
    bench.figure("a2pr_updates_vs_original", main["median"], interval=span, unit="x", target=2.0, note=note)
    span = (more["min"], more["max"])
    bench.figure("a2pr_updates_vs_original_1m", more["median"], interval=span, unit="x")
    span = (slower["min"], slower["max"])
    note = "update time, both ours"
    bench.figure("a2pr_time_vs_td3bc", slower["median"], interval=span, unit="x", better="lower", note=note)
    bench.table("cpu", rows, caption="Updates per second of CPU time, ours and the original's, interleaved.")


def _row(what, row):
    return {
        "case": what,
        "ours (1/s)": row["ours_per_s"],
        "original (1/s)": row["theirs_per_s"],
        "ratio": row["median"],
        "min": row["min"],
        "max": row["max"],
        "loss difference": row["largest_loss_difference"],
    }
