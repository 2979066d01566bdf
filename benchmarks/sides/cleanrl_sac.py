# SPDX-License-Identifier: Apache-2.0
"""The training code of CleanRL's SAC script, run as it is."""

import ast
import sys
import types
from dataclasses import dataclass

import numpy as np
import torch
from gymnasium import spaces
from sides.originals import load_module, reference, stub


@dataclass
class CleanRL:
    """CleanRL's SAC script cut into its setup and its training block.

    The statements from `actor = Actor(envs)` to the replay buffer and the block under
    `if global_step > args.learning_starts` are cut out of its syntax tree and run as they are.
    """

    space: dict

    @classmethod
    def load(cls, obs, act, steps, seed=0, **changes):
        """For `obs` observations, `act` actions and a buffer of `steps`; `changes` to its arguments."""
        path = reference("cleanrl", "cleanrl", "sac_continuous_action.py")
        root = str(reference("cleanrl"))
        sys.path.insert(0, root)
        try:
            module = load_module("reference_sac", path, [stub("tyro", cli=lambda kind: kind())])
        finally:
            sys.path.remove(root)
        main = next(node for node in ast.parse(path.read_text()).body if isinstance(node, ast.If)).body
        loop = next(node for node in main if isinstance(node, ast.For))
        block = next(
            node
            for node in loop.body
            if isinstance(node, ast.If) and "> args.learning_starts" in ast.unparse(node.test)
        )
        first = next(i for i, node in enumerate(main) if ast.unparse(node).startswith("actor = "))
        last = next(i for i, node in enumerate(main) if ast.unparse(node).startswith("rb = "))
        compiled = lambda nodes: compile(ast.Module(list(nodes), []), str(path), "exec")  # noqa: E731
        args = module.Args()
        vars(args).update({"buffer_size": steps, "cuda": False, **changes})
        box = lambda n, high: spaces.Box(-high, high, (n,), np.float32)  # noqa: E731
        envs = types.SimpleNamespace(
            single_observation_space=box(obs, np.inf), single_action_space=box(act, 1.0), num_envs=1
        )
        writer = types.SimpleNamespace(add_scalar=lambda *a: None)
        space = vars(module) | {
            "args": args,
            "envs": envs,
            "device": torch.device("cpu"),
            "writer": writer,
            "start_time": 0.0,
            "global_step": 0,
            "print": lambda *a: None,
        }
        torch.manual_seed(seed)
        exec(compiled(main[first : last + 1]), space)
        space["_block"] = compiled(block.body)
        return cls(space)

    def fill(self, data):
        """Put experience into its buffer as its loop would, in one go."""
        buffer = self.space["rb"]
        steps = buffer.buffer_size
        buffer.observations[:] = data["observations"][:steps, None]
        buffer.next_observations[:] = data["next_observations"][:steps, None]
        buffer.actions[:] = data["actions"][:steps, None]
        buffer.rewards[:] = data["rewards"][:steps, None]
        buffer.full = True

    def update(self):
        """One pass of the training block."""
        self.space["global_step"] += 1
        exec(self.space["_block"], self.space)
