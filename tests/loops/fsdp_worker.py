# SPDX-License-Identifier: Apache-2.0
"""One process of a run with accel.fsdp: trains the jobs of a JSON file one after another, as torchrun starts it.

A job is {"words": [...], "die": {"rank": 1, "step": 3}}; what each process held is in <out>/held_<rank>.json then.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch

from robopost.cli.train import resolve
from robopost.loops import train
from robopost.loops.ranks import join
from robopost.loops.run import Run

torch.set_num_threads(1)
seen = {}


def watch(die):
    build, after = Run.build, Run.after

    def noted(self, *args):
        seen["algo"] = build(self, *args)
        return seen["algo"]

    def dying(self, step, *args):
        if die and step == die["step"] and self.ranks.index == die["rank"]:
            os.kill(os.getpid(), signal.SIGKILL)
        return after(self, step, *args)

    Run.build, Run.after = noted, dying


def held(algo):
    optimizer = algo.optimizer.state.values()
    return {
        "all": sum(p.numel() for p in algo._flat.params),
        "weights": sum(p.numel() for p in algo._flat.shards),
        "gradients": sum(p.grad.numel() for p in algo._flat.shards),
        "moments": sum(slots["exp_avg"].numel() for slots in optimizer),
        "average": sum(p.numel() for p in algo._ema_flat.shards) if getattr(algo, "ema", None) else 0,
    }


def main(path):
    jobs = json.loads(Path(path).read_text())
    watch(jobs[0].get("die"))
    with join(resolve(jobs[0]["words"])) as ranks:
        for job in jobs:
            folder = train(resolve(job["words"]))
            (folder / f"held_{ranks.index}.json").write_text(json.dumps(held(seen["algo"])))


if __name__ == "__main__":
    main(sys.argv[1])
