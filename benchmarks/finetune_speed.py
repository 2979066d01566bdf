# SPDX-License-Identifier: Apache-2.0
"""Time of one optimiser step of ReinFlow and DPPO, ours against the released code, interleaved, one thread, CPU time.

Sizes are the published ones for Hopper: chunks of 4 actions, networks 512-512-512, critic 256-256-256, K = 4 (ReinFlow)
or 20 with the last 10 fine-tuned (DPPO), minibatches of 50,000 rows. Both sides have the same layers; the released
actor has no activation before its last layer, its critic has skip connections.

ReinFlow as shipped repeats each of a rollout's 20,000 decisions ten times "to align with the batch size" of DPPO, so a
minibatch of 50,000 rows holds about 18,900 different decisions. `reinflow_update_vs_original` compares that step with
ours on all 20,000 decisions once: as many steps per rollout, each from at least as many decisions. `equal rows` has
5,000 decisions on both sides and no repeats, the ratio of the code alone.

DPPO's rows are (decision, denoising step) pairs; ours are 5,000 decisions with 10 steps each. `as shipped` includes the
list comprehension over the minibatch, `vectorised` replaces it (`sides/finetuning_originals.py`).

Before anything is timed, loss and gradient of both sides are compared with one network in both.

    git clone https://github.com/ReinFlow/ReinFlow $ROBOPOST_REFERENCE_DIR/ReinFlow
    git clone https://github.com/irom-princeton/dppo $ROBOPOST_REFERENCE_DIR/dppo
"""

import time

import torch
from sides import finetuning_originals as originals
from sides.finetuning_originals import CHUNK
from torch import nn

from robopost.accel import configure
from robopost.algos.generative.dppo import DPPO, DPPOConfig
from robopost.algos.generative.reinflow import ReinFlow, ReinFlowConfig
from robopost.bench import Bench
from robopost.config import AccelConfig
from robopost.data.batch import Spec
from robopost.interleave import interleave
from robopost.policies.diffusion import Diffusion, DiffusionConfig
from robopost.policies.flow import Flow, FlowConfig

SUITE = "generative"
OBS, ACT = 11, 3
SPEC = Spec({"state": ((OBS,), "float32")}, ACT, (-1.0,) * ACT, (1.0,) * ACT, 1000)
FLOW_STEPS, DENOISING, TUNED = 4, 20, 10
REPEATS = 10
WIDTHS = {"published": 512, "narrow": 128}
SHAPE = {"horizon": CHUNK, "depth": 1, "activation": "relu", "layernorm": False, "normalise_action": "bounds"}


def our_reinflow(width: int, batch: int) -> ReinFlow:
    """Ours at the published sizes."""
    policy = Flow(FlowConfig(steps=FLOW_STEPS, width=width, prediction="velocity", **SHAPE), SPEC)
    config = ReinFlowConfig(batch_size=batch, target_kl=0.0)
    generator = torch.Generator().manual_seed(0)
    return ReinFlow(config, policy, SPEC, device=torch.device("cpu"), generator=generator)


def our_dppo(width: int, batch: int) -> DPPO:
    """Ours at the published sizes."""
    settings = {"steps": DENOISING, "train_steps": DENOISING, "sampler": "ddpm", "prediction": "epsilon"}
    policy = Diffusion(DiffusionConfig(width=width, **settings, **SHAPE), SPEC)
    config = DPPOConfig(batch_size=batch, finetune_steps=TUNED, target_kl=0.0)
    generator = torch.Generator().manual_seed(0)
    return DPPO(config, policy, SPEC, device=torch.device("cpu"), generator=generator)


class TheirNet(nn.Module):
    """Their network where ours stands."""

    def __init__(self, net: nn.Module, scale: int) -> None:
        super().__init__()
        self.net, self.scale = net, scale  # our time inputs are fractions of `scale`

    def time(self, value):
        return self.net.time_embedding((value * self.scale).view(-1, 1)).view(len(value), -1)

    def forward(self, x, cond, value):
        return self.net(x, value * self.scale, {"state": cond[:, None]})


def decisions(algo, count: int) -> dict[str, torch.Tensor]:
    """Random decisions as our update sees them; chains near what a policy draws, so that no clamp is active."""
    g = torch.Generator().manual_seed(1)
    obs = {"state": torch.randn(count, OBS, generator=g)}
    action = algo.decide(obs, g)
    return {
        "obs/state": obs["state"],
        "chain": action.chain,
        "log_prob": action.log_prob,
        "advantage": torch.randn(count, generator=g),
        "returns": torch.randn(count, generator=g),
    }


def our_step(algo, rows):
    """One step of critic and actor."""
    critic = {key: rows[key] for key in ("obs/state", "returns")}
    actor = {key: value for key, value in rows.items() if key != "returns"}

    def step():
        algo.critic_step(critic)
        algo.actor_step(actor)

    return step


def reinflow_rows(rows, repeats: int = 1, size: int = 0):
    """Arguments of the released ReinFlow loss: rows drawn as its generator draws them."""
    total = len(rows["advantage"])
    index = (
        torch.randperm(total * repeats, generator=torch.Generator().manual_seed(2))[: size or total]
        // repeats
    )
    pick = {key: value[index] for key, value in rows.items()}
    return {
        "obs": {"state": pick["obs/state"][:, None]},
        "chains": pick["chain"],
        "returns": pick["returns"],
        "oldvalues": pick["returns"],
        "advantages": pick["advantage"],
        "oldlogprobs": pick["log_prob"],
    }


REINFLOW_OPTIONS = {
    "normalize_denoising_horizon": True,
    "normalize_act_space_dimension": True,
    "verbose": False,
}


def dppo_rows(rows, algo, size: int):
    """Arguments of the released DPPO loss: `size` (decision, step) pairs of our decisions."""
    total = len(rows["advantage"])
    index = torch.randperm(total * TUNED, generator=torch.Generator().manual_seed(2))[:size]
    which, step = index // TUNED, index % TUNED
    chain = rows["chain"][:, DENOISING - TUNED :]
    return {
        "obs": {"state": rows["obs/state"][which, None]},
        "chains_prev": chain[which, step],
        "chains_next": chain[which, step + 1],
        "denoising_inds": step,
        "returns": rows["returns"][which],
        "oldvalues": rows["returns"][which],
        "advantages": rows["advantage"][which].clone(),
        "oldlogprobs": rows["log_prob"][which, step][:, None, None].expand(-1, CHUNK, ACT),
    }


def gradients(loss, net):
    """Gradient of a loss in the parameters of a network, as one vector."""
    grads = torch.autograd.grad(loss, [p for p in net.parameters() if p.requires_grad], allow_unused=True)
    return torch.cat([g.flatten() for g in grads if g is not None])


def agreement() -> dict[str, float]:
    """Relative difference of the actor's gradients with one network and the same decisions on both sides."""
    torch.manual_seed(0)
    out = {}
    algo, theirs = our_reinflow(64, 64), originals.reinflow(OBS, ACT, 64, FLOW_STEPS)
    theirs.denoised_clip_value = 1e9  # ours clips nothing between the steps
    algo.policy.net = TheirNet(theirs.actor_ft.policy, 1)
    noise = theirs.actor_ft.explore_noise_net.mlp_logvar
    algo.noise.net = nn.Sequential(*[layer for part in noise.moduleList for layer in part])
    rows = decisions(algo, 64)
    normal = rows["advantage"] - rows["advantage"].mean()
    rows["advantage"] = normal / normal.std()
    rows["log_prob"] = rows["log_prob"] + 0.02 * torch.randn(64)
    loss = algo.actor_loss(rows, {"state": rows["obs/state"]})[0]
    policy, entropy, *_ = theirs.loss(**reinflow_rows(rows), **REINFLOW_OPTIONS)
    ours, released = (gradients(x, theirs.actor_ft) for x in (loss, policy + 0.03 * entropy))
    out["reinflow"] = float((ours - released).norm() / released.norm())

    algo = our_dppo(64, 64)
    released_model = originals.dppo(OBS, ACT, 64, DENOISING, TUNED, vectorised=False)
    algo.policy.net = TheirNet(released_model.actor_ft, DENOISING)
    algo.policy.frozen["net"] = TheirNet(released_model.actor, DENOISING)
    rows = decisions(algo, 64)
    rows["advantage"] = normal / normal.std()
    rows["log_prob"] = rows["log_prob"] + 0.02 * torch.randn(rows["log_prob"].shape)
    loss = algo.actor_loss(rows, {"state": rows["obs/state"]})[0]
    both = []
    for vectorised in (False, True):
        model = originals.dppo(OBS, ACT, 64, DENOISING, TUNED, vectorised=vectorised)
        model.load_state_dict(released_model.state_dict())
        model.norm_adv = False
        both.append(
            gradients(
                model.loss(**dppo_rows(rows, algo, 64 * TUNED), reward_horizon=CHUNK)[0], model.actor_ft
            )
        )
    ours = gradients(loss, released_model.actor_ft)
    out["dppo"] = float((ours - both[0]).norm() / both[0].norm())
    out["dppo vectorised"] = float((both[1] - both[0]).norm() / both[0].norm())
    return out


def measure(case: str, width: int, batch: int, rounds: int) -> dict[str, float]:
    """Rates of both sides in minibatches per second of CPU time; `batch` rows on the released side."""
    configure(AccelConfig())
    torch.manual_seed(0)
    if case.startswith("reinflow"):
        shipped = case == "reinflow as shipped"
        count = batch * 2 // 5 if shipped else batch // REPEATS
        algo = our_reinflow(width, count)
        rows = decisions(algo, count)
        model = originals.reinflow(OBS, ACT, width, FLOW_STEPS)
        given = reinflow_rows(rows, REPEATS, batch) if shipped else reinflow_rows(rows)
        theirs = originals.minibatch(model, given, **REINFLOW_OPTIONS)
    else:
        algo = our_dppo(width, batch // TUNED)
        rows = decisions(algo, batch // TUNED)
        model = originals.dppo(OBS, ACT, width, DENOISING, TUNED, vectorised=case == "dppo vectorised")
        given = dppo_rows(rows, algo, batch)

        step, kept = originals.minibatch(model, given, reward_horizon=CHUNK), given["advantages"].clone()

        def theirs():
            given["advantages"].copy_(kept)  # the released loss scales it in place
            step()

    return interleave(our_step(algo, rows), theirs, rounds=rounds, clock=time.process_time).row()


def run(bench: Bench) -> None:
    """Agreement, then one cell per case and width."""
    rounds = bench.scale(smoke=2, small=7, paper=11)
    batch = bench.scale(smoke=1000, small=50_000, paper=50_000)
    cases = ("reinflow as shipped", "reinflow equal rows", "dppo as shipped", "dppo vectorised")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    rows, found = [], {}
    try:
        same = bench.cell("agreement", agreement, params={})
        for name, width in WIDTHS.items():
            for case in cases:
                cell = bench.cell(
                    f"{name}/{case}",
                    lambda c=case, w=width: measure(c, w, batch, rounds),
                    params={"batch": batch, "rounds": rounds, "width": width},
                )
                found[name, case] = cell
                rows.append(
                    {
                        "sizes": name,
                        "released side": case,
                        "ours (ms)": 1e3 / cell["ours_per_s"],
                        "released (ms)": 1e3 / cell["theirs_per_s"],
                        "ratio": cell["median"],
                        "min": cell["min"],
                        "max": cell["max"],
                    }
                    if cell
                    else {"sizes": name, "released side": case}
                )
    finally:
        torch.set_num_threads(before)
    figures = {
        "reinflow_update_vs_original": ("reinflow as shipped", 3.0),
        "dppo_update_vs_original": ("dppo as shipped", 20.0),
        "dppo_update_vs_vectorised": ("dppo vectorised", 2.0),
    }
    for figure, (case, target) in figures.items():
        cell = found["published", case]
        bench.figure(
            figure,
            cell["median"] if cell else float("nan"),
            interval=(cell["min"], cell["max"]) if cell else None,
            unit="x",
            target=target,
            note=f"CPU time, 1 thread, published sizes, {batch} rows, {case}",
        )
    bench.table("speed", rows, caption="CPU time of one optimiser step, ours and the released code's.")
    if same:
        bench.table(
            "agreement",
            [{"code": key, "relative difference of gradients": value} for key, value in same.items()],
            caption="Actor's gradient, ours against the released code's, one network in both.",
        )
