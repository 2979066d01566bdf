# SPDX-License-Identifier: Apache-2.0
"""Updates/s of TD3+BC against CORL's file and of SAC against CleanRL's, side by side; eager and captured on a
GPU.

HalfCheetah sizes (17 observations, 6 actions, 256-256 networks, batch 256). Sampling and what is done with
metrics are included on both sides as shipped. The originals are read at run time from a folder with clones of
their repositories:

    git clone https://github.com/corl-team/CORL   $ROBOPOST_REFERENCE_DIR/CORL
    git clone https://github.com/vwxyzjn/cleanrl  $ROBOPOST_REFERENCE_DIR/cleanrl

(default: `../reference` beside the checkout). CORL's module is imported with empty stand-ins for d4rl, gym,
pyrallis and wandb. CleanRL's training code is the body of a script: the statements from `actor = Actor(envs)`
to the replay buffer and the block under `if global_step > args.learning_starts` are cut out of its syntax
tree and run as they are; tyro and the TensorBoard writer are stand-ins that do nothing.

Before any timing, both sides get the same weights, batches and noise, and their losses have to agree to 1e-5.
One difference of SAC lies in the method as shipped: CleanRL samples new actions for the temperature loss
after each actor step, robopost (like the paper's algorithm and stable-baselines3) takes the actor's own. The
cell `cpu/sac/extra forward` times robopost with that forward pass added, so that its share can be seen.

Where torch's oneDNN kernels are used (robopost/nets/fused.py) a further row is measured without them.
"""

import contextlib
import io
import types

import numpy as np
import torch
from sides.cleanrl_sac import CleanRL
from sides.originals import Recorder, copy_critic, copy_linear, load_module, reference, repeat, stub

from robopost import accel
from robopost.algos.offline.td3_bc import TD3BC, TD3BCConfig
from robopost.algos.online.sac import SAC, SACConfig
from robopost.algos.online.td3 import TD3, TD3Config
from robopost.bench import Bench
from robopost.config import AccelConfig
from robopost.data.batch import Batch, Spec
from robopost.data.buffer import ReplayBuffer
from robopost.data.dataset import Dataset
from robopost.data.episode import Episode
from robopost.interleave import interleave
from robopost.nets import fused
from robopost.policies.deterministic import Deterministic, DeterministicConfig
from robopost.policies.gaussian import Gaussian, GaussianConfig

OBS, ACT, BATCH, THREADS = 17, 6, 256, 2
SPEC = Spec({"state": ((OBS,), "float32")}, ACT, (-1.0,) * ACT, (1.0,) * ACT, 1000)
CLASSES = {
    "td3": (TD3, TD3Config, Deterministic, DeterministicConfig),
    "td3_bc": (TD3BC, TD3BCConfig, Deterministic, DeterministicConfig),
    "sac": (SAC, SACConfig, Gaussian, GaussianConfig),
}


def experience(steps, seed=0):
    """Random transitions in episodes of 1000 steps, as flat arrays."""
    rng = np.random.default_rng(seed)
    obs = rng.standard_normal((steps + 1, OBS), dtype=np.float32)
    return {
        "observations": obs[:-1],
        "actions": rng.uniform(-1, 1, (steps, ACT)).astype(np.float32),
        "rewards": rng.standard_normal(steps, dtype=np.float32),
        "next_observations": obs[1:],
        "terminals": np.zeros(steps, np.float32),
    }


def make(name, device="cpu", mode="eager", **options):
    """Our algorithm at HalfCheetah sizes."""
    cls, config, policy_cls, policy_config = CLASSES[name]
    torch.manual_seed(0)
    policy = policy_cls(policy_config(), SPEC).to(device)
    device = torch.device(device)
    generator = torch.Generator(device=device).manual_seed(0)
    algo = cls(config(**options), policy, SPEC, device=device, generator=generator)
    algo.accelerate(mode)
    return algo


def our_td3_bc(data, steps):
    """A function that does one update as the offline loop does."""
    algo = make("td3_bc")
    length = 1000
    episodes = [
        Episode(
            obs={"state": data["observations"][i : i + length + 1]},
            action=data["actions"][i : i + length],
            reward=data["rewards"][i : i + length],
            terminated=False,
            truncated=True,
        )
        for i in range(0, steps - length, length)
    ]
    dataset = Dataset.from_episodes(episodes, SPEC).normalise(algo.policy.normaliser)
    generator, record = torch.Generator().manual_seed(1), Recorder()

    def update():
        record(algo.update(dataset.sample(BATCH, generator)))

    return algo, update


def their_td3_bc(data, steps):
    """CORL's trainer, buffer and a function that does one update as its loop does."""
    nothing = stub("wandb", log=lambda *a, **k: None)
    gym = stub("gym", Env=object)
    pyrallis = stub("pyrallis", wrap=lambda *a, **k: lambda fn: fn)
    path = reference("CORL", "algorithms", "offline", "td3_bc.py")
    corl = load_module("reference_td3_bc", path, [stub("d4rl"), gym, pyrallis, nothing])
    actor, critics = corl.Actor(OBS, ACT, 1.0), [corl.Critic(OBS, ACT) for _ in range(2)]
    adam = lambda module: torch.optim.Adam(module.parameters(), lr=3e-4)  # noqa: E731
    first, second = critics
    trainer = corl.TD3_BC(1.0, actor, adam(actor), first, adam(first), second, adam(second))
    buffer = corl.ReplayBuffer(OBS, ACT, steps)
    with contextlib.redirect_stdout(io.StringIO()):
        buffer.load_d4rl_dataset(data)

    def update():
        batch = [item.to("cpu") for item in buffer.sample(BATCH)]
        nothing.log(trainer.train(batch), step=trainer.total_it)

    return trainer, update


def td3_bc_parity(algo, trainer, data):
    """Largest difference of any loss over six updates from the same weights, batches and noise."""
    ours = [layer for layer in algo.policy.net if hasattr(layer, "weight")]
    theirs = [layer for layer in trainer.actor.net if hasattr(layer, "weight")]
    for a, b in zip(ours, theirs, strict=True):
        copy_linear(b, a.weight, a.bias)
    for member, critic in enumerate((trainer.critic_1, trainer.critic_2)):
        copy_critic(algo.critic, member, [layer for layer in critic.net if hasattr(layer, "weight")])
    for name in ("actor", "critic_1", "critic_2"):
        getattr(trainer, f"{name}_target").load_state_dict(getattr(trainer, name).state_dict())
    worst = 0.0
    for step in range(6):
        rows = slice(step * BATCH, (step + 1) * BATCH)
        s, a, r, s2, d = (torch.from_numpy(data[key][rows]) for key in data)
        torch.manual_seed(step)
        algo.generator.manual_seed(step)
        expected = trainer.train([s, a, r[:, None], s2, d[:, None]])
        got = algo.update(make_batch(s, a, r, s2))
        worst = max(worst, abs(expected["critic_loss"] - got["loss/critic"].item()))
        if "actor_loss" in expected:
            worst = max(worst, abs(expected["actor_loss"] - got["loss/actor"].item()))
    return worst


def make_batch(s, a, r, s2):
    flags = torch.zeros(len(r), dtype=torch.bool, device=r.device)
    return Batch({"state": s}, a, r, {"state": s2}, flags, flags, torch.full_like(r, 0.99))


def our_sac(data, steps, fresh=False):
    """A function that does one update as the off-policy loop does, with CleanRL's settings."""
    algo = make("sac", critic_lr=1e-3, temperature_lr=1e-3, policy_delay=2)
    buffer = ReplayBuffer(SPEC, steps, 1)
    for i in range(steps):
        row = slice(i, i + 1)
        buffer.add(
            {"state": data["observations"][row]},
            data["actions"][row],
            data["rewards"][row],
            {"state": data["next_observations"][row]},
            np.zeros(1, bool),
            np.full(1, i % 1000 == 999),
        )
    generator, record = torch.Generator().manual_seed(1), Recorder()

    def update():
        batch = algo.policy.normaliser.batch(buffer.sample(BATCH, generator))
        record(algo.update(batch))
        if fresh:
            with torch.no_grad():
                algo.policy.sample(batch.obs, generator=algo.generator)

    return algo, update


def sac_parity(data):
    """Largest difference of the critic's and the actor's loss of one update, all else equal."""
    steps = 10 * BATCH
    algo = make("sac", critic_lr=1e-3, temperature_lr=1e-3, temperature=0.2)
    theirs = CleanRL.load(OBS, ACT, steps, policy_frequency=1)
    space = theirs.space
    space["alpha"] = 0.2  # both sides; CleanRL's 1e-6 inside the logarithm weighs less than at 1
    space["log_alpha"].data.fill_(algo.log_temperature.item())
    ours = [layer for layer in algo.policy.net if hasattr(layer, "weight")]
    actor = space["actor"]
    copy_linear(actor.fc1, ours[0].weight, ours[0].bias)
    copy_linear(actor.fc2, ours[1].weight, ours[1].bias)
    copy_linear(actor.fc_mean, ours[2].weight[:ACT], ours[2].bias[:ACT])
    copy_linear(actor.fc_logstd, ours[2].weight[ACT:], ours[2].bias[ACT:])
    for member, name in enumerate(("qf1", "qf2")):
        net = space[name]
        copy_critic(algo.critic, member, [net.fc1, net.fc2, net.fc3])
        space[f"{name}_target"].load_state_dict(net.state_dict())
    s, a, r, s2, _ = (torch.from_numpy(data[key][:BATCH]) for key in data)
    given = types.SimpleNamespace(
        observations=s, actions=a, rewards=r[:, None], next_observations=s2, dones=torch.zeros(BATCH, 1)
    )
    space["rb"] = types.SimpleNamespace(sample=lambda size: given)
    torch.manual_seed(7)
    algo.generator.manual_seed(7)
    theirs.update()
    got = algo.update(make_batch(s, a, r, s2))
    pairs = (("qf_loss", "loss/critic"), ("actor_loss", "loss/actor"))
    return max(abs(space[a].item() - got[b].item()) for a, b in pairs)


def compare(bench, name, parity, ours, theirs):
    """One cell: parity, then the interleaved ratio."""
    count = bench.scale(smoke=40, small=300, paper=1000)
    rounds = bench.scale(smoke=3, small=9, paper=15)

    def measure():
        worst = parity()
        if not worst < 1e-5:
            raise AssertionError(f"losses differ by {worst:.2g}: not the same computation")
        row = interleave(repeat(ours(), count), repeat(theirs(), count), rounds).row()
        return row | {"largest_loss_difference": worst, "fused": fused.preferred()}

    params = {"threads": THREADS, "updates": count, "rounds": rounds}
    return bench.cell(name, measure, params=params)


def on_gpu(name, mode, count):
    """Updates/s on CUDA from a dataset that lies on the device."""
    device = torch.device("cuda")
    algo = make(name, device, mode)
    data = {key: torch.from_numpy(value).to(device) for key, value in experience(100_000).items()}
    generator = torch.Generator(device=device).manual_seed(1)
    record = Recorder()

    def update():
        rows = torch.randint(100_000, (BATCH,), generator=generator, device=device)
        s, a, r, s2, _ = (data[key].index_select(0, rows) for key in data)
        record(algo.update(make_batch(s, a, r, s2)))

    return repeat(update, count)


def run(bench: Bench) -> None:
    """Parity, CPU ratios, and GPU rates where there is one."""
    bench.packages("torch")
    steps = bench.scale(smoke=20_000, small=200_000, paper=1_000_000)
    data = experience(steps)
    before = torch.get_num_threads()
    accel.configure(AccelConfig(threads=THREADS))
    rows = []
    try:
        parity = lambda: td3_bc_parity(our_td3_bc(data, steps)[0], their_td3_bc(data, steps)[0], data)  # noqa: E731
        cases = {
            "td3_bc": (parity, lambda: our_td3_bc(data, steps)[1], lambda: their_td3_bc(data, steps)[1]),
            "sac": (lambda: sac_parity(data), lambda: our_sac(data, steps)[1], lambda: _filled(data, steps)),
        }
        for name, (check, ours, theirs) in cases.items():
            row = compare(bench, f"cpu/{name}", check, ours, theirs)
            rows.append(_row(name, "", row))
            figure = {"td3_bc": "td3bc_updates_vs_corl", "sac": "sac_updates_vs_cleanrl"}[name]
            span = (row["min"], row["max"])
            note = f"CPU, {THREADS} threads, sampling included"
            bench.figure(figure, row["median"], interval=span, unit="x", target=1.3, note=note)
            if fused.preferred():
                fused.force(False)
                row = compare(bench, f"cpu/{name}/without fused kernels", check, ours, theirs)
                fused.force(None)
                rows.append(_row(name, "without fused kernels", row))
        check, _, theirs = cases["sac"]
        row = compare(
            bench, "cpu/sac/extra forward", check, lambda: our_sac(data, steps, fresh=True)[1], theirs
        )
        rows.append(_row("sac", "with CleanRL's extra forward pass", row))
        bench.table(
            "cpu", rows, caption="Updates per second on CPU, ours and the original file's, interleaved."
        )
        if torch.cuda.is_available():
            run_gpu(bench)
    finally:
        fused.force(None)
        torch.set_num_threads(before)


def _filled(data, steps):
    theirs = CleanRL.load(OBS, ACT, steps)
    theirs.fill(data)
    return theirs.update


def _row(name, what, row):
    return {
        "algorithm": name,
        "variant": what,
        "ours (1/s)": row["ours_per_s"],
        "original (1/s)": row["theirs_per_s"],
        "ratio": row["median"],
        "min": row["min"],
        "max": row["max"],
    }


def run_gpu(bench: Bench) -> None:
    """Captured against eager, for TD3, SAC and TD3+BC."""
    count = bench.scale(smoke=100, small=1000, paper=5000)
    rounds = bench.scale(smoke=3, small=7, paper=15)
    rows = []
    for name in CLASSES:

        def measure(name=name):
            sides = [on_gpu(name, mode, count) for mode in ("cudagraph", "eager")]
            return interleave(*sides, rounds, sync=torch.cuda.synchronize).row()

        row = bench.cell(f"gpu/{name}", measure, params={"updates": count, "rounds": rounds})
        bench.figure(f"gpu_{name}_captured_updates", row["ours_per_s"], unit="1/s")
        bench.figure(
            f"gpu_{name}_captured_vs_eager", row["median"], interval=(row["min"], row["max"]), unit="x"
        )
        rows.append(
            {"algorithm": name, "captured (1/s)": row["ours_per_s"], "eager (1/s)": row["theirs_per_s"]}
        )
    bench.table("gpu", rows, caption="Updates per second on one GPU, batch on the device.")
