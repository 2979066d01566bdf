# SPDX-License-Identifier: Apache-2.0
"""One process of two with accel.fsdp: trains the jobs of a JSON file, lists of words, one after another.

What each process held lies in <out>/held_<rank>.json then. In the last job the second process is killed at step 7; the
first runs it by the command line and ends with its exit code.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch

from robopost.cli import main as command_line
from robopost.cli.train import resolve
from robopost.loops import train
from robopost.loops.ranks import join
from robopost.loops.run import Run

torch.set_num_threads(1)
seen = {"last": False}


def watch():
    build, after = Run.build, Run.after

    def noted(self, *args):
        seen["algo"] = build(self, *args)
        return seen["algo"]

    def dying(self, step, *args):
        if seen["last"] and step == 7 and self.ranks.index == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return after(self, step, *args)

    Run.build, Run.after = noted, dying


def held(algo):
    return {
        "all": sum(p.numel() for p in algo._flat.params),
        "weights": sum(p.numel() for p in algo._flat.shards),
        "gradients": sum(p.grad.numel() for p in algo._flat.shards),
        "moments": sum(slots["exp_avg"].numel() for slots in algo.optimizer.state.values()),
        "average": sum(p.numel() for p in algo._ema_flat.shards) if getattr(algo, "ema", None) else 0,
    }


def main(path):
    *jobs, last = json.loads(Path(path).read_text())
    watch()
    with join(resolve(jobs[0])) as ranks:
        for words in jobs:
            folder = train(resolve(words))
            (folder / f"held_{ranks.index}.json").write_text(json.dumps(held(seen["algo"])))
    seen["last"] = True
    return command_line(["train", *last])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
