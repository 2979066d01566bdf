# SPDX-License-Identifier: Apache-2.0
"""For benchmarks that run another project's files beside ours: `from sides.originals import reference, ...`.

The originals are read at run time from a folder of clones, `$ROBOPOST_REFERENCE_DIR` or `../reference` beside
the checkout.
"""

import importlib.util
import os
import sys
import types
from pathlib import Path

import torch

from robopost.errors import ConfigError


def reference(*parts):
    """A file of the cloned originals, e.g. `reference("CORL", "algorithms", "offline", "iql.py")`."""
    beside = Path(__file__).resolve().parents[3] / "reference"
    path = Path(os.environ.get("ROBOPOST_REFERENCE_DIR", beside)).joinpath(*parts)
    if not path.exists():
        raise ConfigError(
            f"{path} is absent. Fix: clone it (the benchmark's docstring says from where) and set "
            "ROBOPOST_REFERENCE_DIR to the folder of the clones"
        )
    return path


def load_module(name, path, stubs=()):
    """Import a file whose unavailable imports are replaced by `stubs` while it loads."""
    missing = {stub.__name__: stub for stub in stubs}
    before = {key: sys.modules.get(key) for key in missing}
    sys.modules.update(missing)
    try:
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
    finally:
        for key, value in before.items():
            if value is None:
                del sys.modules[key]
            else:
                sys.modules[key] = value
    return module


def agent_and_buffer(name, file):
    """The modules of an original's agent (`file`) and of its replay buffer, which import packages beside them."""
    root = str(reference(name))
    sys.path.insert(0, root)
    try:
        agent = load_module(f"reference_{name.lower()}", reference(name, file))
        buffer = load_module(f"reference_{name.lower()}_buffer", reference(name, "utils", "buffer.py"))
    finally:
        sys.path.remove(root)
    return agent, buffer


def train_on(agent, batch):
    """One update of an original's agent on `batch`, whose first tensor tells the size; returns its losses."""
    return agent.train(types.SimpleNamespace(sample=lambda size: batch), len(batch[0]))


def loss_difference(expected, got, names):
    """Largest |theirs - ours| / max(1, |theirs|) of the losses in `expected`; `names` maps theirs to ours."""
    pairs = [(expected[theirs], got[ours].item()) for theirs, ours in names.items() if theirs in expected]
    return max(abs(theirs - ours) / max(1.0, abs(theirs)) for theirs, ours in pairs)


def stub(name, **content):
    """A stand-in module that holds `content`."""
    module = types.ModuleType(name)
    vars(module).update(content)
    return module


def copy_linear(target, weight, bias):
    """Weights (out, in) and bias into a torch linear."""
    target.weight.data.copy_(weight)
    target.bias.data.copy_(bias)


def copy_critic(net, member, layers):
    """Our stacked weights (E, in, out) into torch linears."""
    stacked = [layer for layer in net.net if hasattr(layer, "weight")]
    for layer, target in zip(stacked, layers, strict=True):
        copy_linear(target, layer.weight[member].t(), layer.bias[member].view(-1))


class Recorder:
    """What a loop does with metrics: sums on the device, read every 500 updates."""

    def __init__(self):
        self.sums, self.count = {}, 0

    def __call__(self, metrics):
        for key, value in metrics.items():
            self.sums[key] = self.sums[key] + value if key in self.sums else value.clone()
        self.count += 1
        if self.count % 500 == 0:
            torch.stack(list(self.sums.values())).tolist()
            self.sums = {}


def repeat(update, count):
    """A function for `robopost.interleave` that does `count` updates."""

    def run():
        for _ in range(count):
            update()
        return count

    return run
