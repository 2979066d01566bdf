# SPDX-License-Identifier: Apache-2.0
"""The training code of `YifeiZhou02/HNPG`, run as it is.

Its loop's statements from `memory = Memory()` to `agent.update_params(...)` are cut out of the syntax tree of `main.py`
and run as they are; evaluation and logging, which follow them, are left out. What newer versions force:

- `gym` is replaced by gymnasium's `Env` and spaces, which is all that the lock takes from it;
- `numpy.float` and `numpy.int`, removed in numpy 1.24, are Python's `float` and `int`, which they were names of;
- `transformers`, `torchvision` and `tqdm` are stand-ins: the plain lock imports and never uses the first two, the
  third only draws a progress bar.

Its modules set torch's default type to float64, so everything of it runs within `double`.
"""

import argparse
import ast
import contextlib
import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from sides.originals import load_module, reference, stub

MODULES = ("utils", "models", "replay_memory", "trpo", "collect_offline", "lock_continuous", "running_state")


@contextlib.contextmanager
def double() -> Iterator[None]:
    """Within this context torch's default type is float64 and numpy has two of its old names."""
    torch.set_default_dtype(torch.float64)
    np.float, np.int = float, int  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        del np.float, np.int  # type: ignore[attr-defined]


@dataclass
class Original:
    """An agent, a lock and offline data of the released code.

    Attributes:
        space: the names its loop sees.
    """

    space: dict[str, Any]
    body: Any

    @classmethod
    def load(cls, horizon: int, episodes: int, seed: int = 0) -> "Original":
        """For a lock of `horizon` steps and `episodes` offline episodes; everything else as published."""
        path = reference("HNPG", "main.py")
        names = ("CenterCrop", "Compose", "Normalize", "Resize", "ToTensor")
        stubs = [
            stub("gym", Env=gym.Env),
            stub("gym.spaces", Discrete=gym.spaces.Discrete, Box=gym.spaces.Box),
            stub("torchvision"),
            stub("torchvision.models", resnet18=None),
            stub("torchvision.transforms", **dict.fromkeys(names)),
            stub("transformers", **dict.fromkeys(("CLIPModel", "ViTFeatureExtractor", "ViTModel"))),
            stub("tqdm", tqdm=lambda items: items),
        ]
        before = {name: sys.modules.pop(name, None) for name in MODULES}
        sys.path.insert(0, str(path.parent))
        try:
            with double():
                module = load_module("reference_hnpg", path, stubs)
        finally:
            sys.path.remove(str(path.parent))
            for name, old in before.items():
                sys.modules.pop(name, None)
                if old is not None:
                    sys.modules[name] = old
        body = next(n for n in ast.parse(path.read_text()).body if getattr(n, "name", "") == "main").body
        loop = next(n for n in body if isinstance(n, ast.For))
        last = next(i for i, n in enumerate(loop.body) if "update_params" in ast.unparse(n))
        code = compile(ast.Module(loop.body[: last + 1], []), str(path), "exec")
        space = vars(module)
        argv, sys.argv = sys.argv, ["main.py", "--horizon", str(horizon), "--seed", str(seed)]
        try:
            args: argparse.Namespace = space["parse_args"]()
        finally:
            sys.argv = argv
        with double(), contextlib.redirect_stdout(io.StringIO()):
            space["set_seed_everywhere"](seed)
            env = space["Lock"]()
            env.init(horizon=horizon, action_dim=10)
            device = torch.device("cpu")
            agent = space["TRPO"](
                env.observation_space.shape[0],
                env.action_space.shape[0],
                horizon,
                args.l2_reg,
                args.gamma,
                args.tau,
                args.max_kl,
                args.damping,
                args.critic_ratio,
                device=device,
            )
            buffers = space["collect_offline_buffer"](256, env, episodes, device=device)
        space |= {"args": args, "env": env, "agent": agent, "off_buffers": buffers, "i_episode": 0}
        space |= {"print": lambda *a, **k: None}
        return cls(space, code)

    def iterate(self) -> None:
        """One iteration: 1000 environment steps, critics, policies."""
        with double():
            exec(self.body, self.space)
