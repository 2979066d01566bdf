# SPDX-License-Identifier: Apache-2.0
"""Latency of a token VLA's `act` against the bare transformers forward of the same modules, batch 1.

`act` takes a raw observation (uint8 image, state, instruction bytes) to an action chunk in environment units: pixels
standardised, state normalised, instruction looked up, the model, a greedy choice of all slots with its
log-probability, un-normalisation and clipping. The bare side does the model's part alone, on tensors prepared
beforehand (float pixels, embeddings of prompt and slots, mask, positions), with transformers' own forward passes:
`SiglipVisionModel`, the projector, `LlamaForCausalLM` with `logits_to_keep` on the slots, and an argmax; in the
layout `openvla` it decodes slot by slot with a `DynamicCache`. Both sides run the same weights in the same modules
(`sdpa`), and have to agree on the chunk before anything is timed.

Both are timed in turn. Overhead of a cell = median over rounds of (time of act / bare time) - 1; below 0 where `act` is
the faster one. `vla_latency_overhead` is the worst (largest) of all cells: two sizes times two layouts. The table
has the 50th and 99th percentile of single `act` calls.
"""

import statistics
import time

import torch

from robopost import accel
from robopost.bench import Bench
from robopost.config import AccelConfig
from robopost.data.batch import Spec
from robopost.interleave import interleave
from robopost.nets.vla.language import LanguageConfig
from robopost.nets.vla.prompts import to_bytes
from robopost.nets.vla.towers import TowerConfig
from robopost.policies.token_vla import TokenVLA, positions_of
from robopost.policies.token_vla_config import TokenVLAConfig

SUITE = "vla"
THREADS = 1
SPEC = Spec(
    {"image": ((96, 96, 3), "uint8"), "state": ((10,), "float32"), "instruction": ((64,), "uint8")},
    4,
    (-1.0,) * 4,
    (1.0,) * 4,
)
SIZES = {
    "small": {},
    "large": {
        "siglip": TowerConfig(width=384, layers=6, heads=6, mlp=1536),
        "language": LanguageConfig(width=512, layers=8, heads=8, mlp=1376),
    },
}
LAYOUTS = ("oft", "openvla")


def make(size, layout):
    """A policy with random weights and one raw observation."""
    torch.manual_seed(0)
    policy = TokenVLA(TokenVLAConfig(layout=layout, **SIZES[size]), SPEC).eval()
    draw = torch.Generator().manual_seed(0)
    obs = {
        "image": torch.randint(0, 256, (1, 96, 96, 3), generator=draw, dtype=torch.uint8),
        "state": torch.randn(1, 10, generator=draw),
        "instruction": to_bytes("put the red cube in the yellow zone")[None],
    }
    return policy, obs


def bare(policy, obs):
    """A function that gives the greedy bins (H A,) by stock forward passes on prepared tensors."""
    import transformers

    with torch.no_grad():
        model = transformers.LlamaForCausalLM(policy.language.settings).eval()
        model.model, model.lm_head = policy.language.model, policy.language.lm_head
        tower = policy.vision.towers["siglip"]
        pixels = tower.pixels(obs["image"])
        prefix, valid = policy.prefix(policy.vision_features(obs), policy.normaliser.obs(obs))
        count, last, length = policy.patches, policy.vocab - 1, policy.length
        before, behind = prefix[:, :1].clone(), prefix[:, 1 + count :].clone()
        lead = prefix.shape[1]
        if policy.slots is not None:
            end = policy.language.embed(torch.tensor([[policy.prompts.end]]))
            behind = torch.cat([behind, policy.slots[None], end], dim=1)
        valid = torch.cat([valid, valid.new_ones(1, length + (policy.slots is not None))], dim=1)
        positions = positions_of(valid)
        size = lead if policy.autoregressive else valid.shape[1]
        mask = (policy.allowed[:, :, :size, :size] & valid[:, None, None, :size]).contiguous()
        text_ids = policy.vocab - policy.bins

    def start():
        features = tower.model(pixel_values=pixels).last_hidden_state
        return torch.cat([before, policy.projector(features), behind], dim=1)

    @torch.no_grad()
    def parallel():
        out = model(
            inputs_embeds=start(),
            attention_mask=mask,
            position_ids=positions,
            use_cache=False,
            logits_to_keep=length + 2,
        )
        return last - (out.logits[0, :length, text_ids : last + 1].argmax(-1) + text_ids)

    @torch.no_grad()
    def one_by_one():
        cache = transformers.DynamicCache(config=model.config)
        out = model(
            inputs_embeds=start(),
            attention_mask=mask,
            position_ids=positions[:, :lead],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        ids = []
        for slot in range(length):
            ids.append(out.logits[:, -1, text_ids : last + 1].argmax(-1) + text_ids)
            if slot < length - 1:
                at = lead + slot
                out = model(
                    input_ids=ids[-1][:, None],
                    attention_mask=valid[:, None, None, : at + 1],
                    position_ids=positions[:, at : at + 1],
                    past_key_values=cache,
                    use_cache=True,
                )
        return last - torch.cat(ids)

    return one_by_one if policy.autoregressive else parallel


def measure(size, layout, rounds, calls, samples):
    """One cell: the same chunk on both sides, then rounds in turn, then single calls."""
    policy, obs = make(size, layout)
    theirs = bare(policy, obs)
    act = lambda: policy.act(obs, deterministic=True)  # noqa: E731
    chain = act().chain
    assert chain is not None
    if not torch.equal(chain.flatten(), theirs()):
        raise AssertionError(f"{size}/{layout}: act and the bare forward disagree on the chunk")

    def repeat(fn):
        def run():
            for _ in range(calls):
                fn()
            return calls

        return run

    ratio = interleave(repeat(act), repeat(theirs), rounds, warmup=2)
    overheads = [1 / value - 1 for value in ratio.ratios]
    singles = []
    for _ in range(samples):
        began = time.perf_counter()
        act()
        singles.append(1000 * (time.perf_counter() - began))
    cuts = statistics.quantiles(singles, n=100)
    return {
        "parameters": sum(p.numel() for p in policy.parameters()),
        "overhead": statistics.median(overheads),
        "overhead_min": min(overheads),
        "overhead_max": max(overheads),
        "act_ms": 1000 / statistics.median(ratio.ours),
        "bare_ms": 1000 / statistics.median(ratio.theirs),
        "act_p50_ms": cuts[49],
        "act_p99_ms": cuts[98],
        "overhead_rounds": overheads,
    }


def run(bench: Bench) -> None:
    """Two sizes times two layouts."""
    bench.packages("torch", "transformers")
    rounds = bench.scale(smoke=3, small=15, paper=41)
    before = torch.get_num_threads()
    accel.configure(AccelConfig(threads=THREADS))
    rows, cells = [], []
    try:
        for size in SIZES:
            for layout in LAYOUTS:
                heavy = (4 if size == "large" else 1) * (8 if layout == "openvla" else 1)
                calls = max(1, bench.scale(smoke=8, small=32, paper=64) // heavy)
                samples = max(20, bench.scale(smoke=50, small=400, paper=2000) // heavy)
                params = {"threads": THREADS, "rounds": rounds, "calls": calls, "samples": samples}
                work = lambda s=size, y=layout, c=calls, n=samples: measure(s, y, rounds, c, n)  # noqa: E731
                row = bench.cell(f"{size}/{layout}", work, params=params)
                cells.append(row)
                rows.append(
                    {
                        "size": size,
                        "layout": layout,
                        "parameters (M)": row["parameters"] / 1e6,
                        "act (ms)": row["act_ms"],
                        "bare (ms)": row["bare_ms"],
                        "overhead": row["overhead"],
                        "p50 (ms)": row["act_p50_ms"],
                        "p99 (ms)": row["act_p99_ms"],
                    }
                )
    finally:
        torch.set_num_threads(before)
    worst = max(cells, key=lambda row: row["overhead"])
    bench.figure(
        "vla_latency_overhead",
        worst["overhead"],
        interval=(worst["overhead_min"], worst["overhead_max"]),
        unit="fraction",
        target=0.05,
        better="lower",
        note=f"act / bare transformers forward - 1, batch 1, CPU, {THREADS} thread; worst of 2 sizes x 2 layouts",
    )
    bench.table("latency", rows, caption="One action chunk (8 x 4), batch 1, one CPU thread.")
