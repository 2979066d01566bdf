# SPDX-License-Identifier: Apache-2.0
"""LeRobotDataset's side of benchmarks/store.py. Runs where lerobot is installed; robopost isn't needed.

Reads one JSON request per line from stdin and answers each with one line:
`{"check": [indices], "out": path}` saves that batch as .npz, `{"prepare": n, "seed": s}` chooses the indices
of n random batches and starts the workers, `{"batches": n}` reads them.
"""

import json
import sys

import numpy as np
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset


def main(root, horizon, batch_size, workers):
    torch.set_num_threads(1)
    fps = json.load(open(f"{root}/meta/info.json"))["fps"]  # noqa: SIM115
    dataset = LeRobotDataset(
        "local/bench",
        root=root,
        delta_timestamps={
            "observation.state": [i / fps for i in range(1 - horizon, 1)],
            "action": [i / fps for i in range(horizon)],
        },
    )

    def join(items):
        names = ("observation.state", "action", "action_is_pad")
        return {name: torch.stack([item[name] for item in items]) for name in names}

    def draw(seed, count):
        indices = np.random.default_rng(seed).integers(len(dataset), size=(count, batch_size)).tolist()
        if not workers:
            return lambda: [join([dataset[i] for i in batch]) for batch in indices]
        # The workers start before the clock does, as in a training run that goes on for long.
        loader = torch.utils.data.DataLoader(
            dataset, batch_sampler=[indices[0]] * workers + indices, num_workers=workers, collate_fn=join
        )
        stream = iter(loader)
        for _ in range(workers):
            next(stream)
        return lambda: list(stream)

    def answer(value):
        sys.stdout.write(json.dumps(value) + "\n")
        sys.stdout.flush()

    answer({"frames": len(dataset)})
    for line in sys.stdin:
        request = json.loads(line)
        if "check" in request:
            batch = join([dataset[i] for i in request["check"]])
            np.savez(request["out"], **{name: value.numpy() for name, value in batch.items()})
            answer({})
        elif "prepare" in request:
            work = draw(request["seed"], request["prepare"])
            answer({})
        else:
            answer({"batches": len(work())})


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:5]))
