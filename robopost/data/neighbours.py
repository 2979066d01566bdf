# SPDX-License-Identifier: Apache-2.0
"""Exact nearest neighbours of (beta * s) ++ a in a dataset, for queries whose state is the dataset's own.

On a CPU the few pairs that can be nearest to a step's state with any action at all are listed once
(`robopost.data.neighbour_cells`); a query looks at the list of its step.

**Certificate.** A list answers exactly for every action of the box [-1, 1], unless it was cut off to bound memory:
then where the k-th best squared distance is below the weight from which on pairs were cut. **Fallback.** Other
queries are scored against all pairs by matrix products: every answer is exact, beta = 0 included.

On a GPU all queries are scored against all pairs: a matrix product whose blockwise minima are taken piece by
piece, and the pairs of the best blocks again in difference form. No shape depends on the data, so that it can be
captured, and no index is needed. An answer counts as certified where rounding can't have hidden a nearer block;
there is no second search for the rest.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robopost.data.neighbour_cells import ENTRY, Write, build_cells, rounding
from robopost.data.neighbour_index import VERSION, in_memory, load_or_build
from robopost.data.neighbour_search import CellSearch, Found, Keys, pair_distance
from robopost.errors import ConfigError, DataError

log = logging.getLogger(__name__)
BLOCK = 128  # pairs per minimum of the brute-force search
BLOCKS = 8  # blocks it scores again
PIECE = 1 << 16  # pairs per matrix product, a multiple of BLOCK
SEARCHES = ("exact", "lists")
LIST_BYTES = 32768  # 4096 pairs


class Neighbours:
    """The state-action pairs of a dataset, searchable by (step, action).

    Attributes:
        state: (N, S) normalised.
        action: (N, A) normalised.
        beta: weight of the state in the distance.
        k: how many neighbours a search finds.
        lists: the search on a CPU, None on a GPU.
        seconds: what building the index took, 0 where it was opened.
    """

    def __init__(self, state: Tensor, action: Tensor, beta: float, k: int, lists: CellSearch | None) -> None:
        """Use `open`."""
        self.state = state
        self.action = action
        self.beta = beta
        self.k = k
        self.lists = lists
        self.seconds = 0.0
        self._table: tuple[Tensor, Tensor, Tensor] | None = None

    @classmethod
    def open(
        cls,
        state: Tensor,
        action: Tensor,
        *,
        beta: float,
        k: int = 1,
        name: str = "memory",
        folder: str | Path | None = None,
        cache: Path | None = None,
        list_bytes: int = LIST_BYTES,
    ) -> Neighbours:
        """Check the pairs and open or build their index (none is needed on a GPU, nor with beta = 0).

        Args:
            state: (N, S) normalised states, one per dataset step.
            action: (N, A) normalised actions.
            beta: weight of the state, 0 or more.
            k: how many neighbours; needs N > k.
            name: id of the dataset.
            folder: where the index is kept; None = a folder in `cache` that is named by its content.
            cache: None, with `folder` None, keeps the index in memory.
            list_bytes: most bytes of a step's list, which bounds the index: N * list_bytes.

        Raises:
            DataError: no more than k pairs, NaN or inf, `folder` holds other files or the index of another dataset,
                beta, k, list_bytes or format, or the disk is full.
            ConfigError: `list_bytes` is negative.
        """
        if list_bytes < 0:
            raise ConfigError(f"algo.list_bytes={list_bytes} must be 0 (no lists) or more")
        if len(state) != len(action):
            raise DataError(f"dataset {name} has {len(state)} states and {len(action)} actions")
        if len(state) == 0:
            raise DataError(f"dataset {name} has no steps: there is nothing to search in")
        if k >= len(state):
            raise DataError(f"algo.k={k} needs at least {k + 1} dataset steps, {name} has {len(state)}")
        for what, values in (("state", state), ("action", action)):
            if not bool(torch.isfinite(values).all()):
                raise DataError(f"dataset {name} has NaN or inf in {what}. Fix: robopost data verify")
        state, action = (values.detach().to(torch.float32).contiguous() for values in (state, action))
        if state.is_cuda:
            return cls(state, action, beta, k, None)
        identity: dict[str, Any] = {
            "version": VERSION,
            "dataset": name,
            "content": _digest(state, action),
            "steps": len(state),
            "beta": beta,
            "k": k,
            "list_bytes": list_bytes,
        }
        started = time.perf_counter()
        built = []

        def make(write: Write) -> tuple[Tensor, Tensor, Tensor]:
            built.append(True)
            log.info("building the neighbour index of %s: %d steps", name, len(state))
            return build_cells(state, action, beta, k, list_bytes // ENTRY, write)

        if folder is None and cache is not None and beta > 0:
            mark = hashlib.blake2b(repr(sorted(identity.items())).encode(), digest_size=6).hexdigest()
            folder = cache / f"neighbours-{mark}"
        cells = in_memory(make) if folder is None else load_or_build(Path(folder), identity, make)
        out = cls(state, action, beta, k, CellSearch(state, action, beta, k, cells))
        out.seconds = time.perf_counter() - started if built else 0.0
        return out

    def __len__(self) -> int:
        return len(self.state)

    @torch.no_grad()
    def lookup(self, steps: Tensor, action: Tensor, *, kth: bool = False, exact: bool = True) -> Tensor:
        """The nearest neighbours of (state of `steps`, `action`), row by row.

        Args:
            steps: (B,) int64 dataset steps.
            action: (B, A) normalised; no gradient flows through it.
            kth: the k-th alone instead of the mean of all k.
            exact: False takes answers without a certificate as they are (CPU only).

        Returns:
            (B, A + 4): mean action of the k nearest, distance of the k-th, share of them that are the step
            itself, 1 where the answer is certified without the fallback, 1 where the fallback was asked.
        """
        found = self.search(steps, action, exact=exact)
        ids = found.ids[:, -1:] if kth else found.ids
        mean = self.action.index_select(0, ids.reshape(-1)).view(*ids.shape, -1).mean(1)
        own = (ids == steps[:, None]).float().mean(1)
        rest = (found.squared[:, -1].sqrt(), own, found.certified.float(), found.asked.float())
        return torch.cat([mean, torch.stack(rest, 1)], 1)

    @torch.no_grad()
    def search(self, steps: Tensor, action: Tensor, *, exact: bool = True) -> Found:
        """The k nearest pairs of each (state of `steps` (B,), `action` (B, A)), ties to the earlier step.

        (On a GPU: where certified.)
        """
        if self.lists is None:
            return self.brute(steps, action)
        return self.lists(steps, action, exact=exact)

    @torch.no_grad()
    def brute(self, steps: Tensor, action: Tensor) -> Found:
        """As `search`, by scoring every pair; shapes depend on nothing but B, N and k."""
        count, k = len(self), self.k
        keys = Keys(self.state.index_select(0, steps), action, self.beta, k)
        table, norm, reach = self._keys()
        query = torch.cat([keys.state * self.beta, action], 1)
        matmul = torch.backends.cuda.matmul
        before, matmul.allow_tf32 = matmul.allow_tf32, False  # ten bits of mantissa would choose wrong blocks
        try:
            least = []
            for first in range(0, len(table), PIECE):
                part = slice(first, first + PIECE)
                product = torch.addmm(norm[part], query, table[part].t(), alpha=-2)
                least.append(product.view(len(steps), -1, BLOCK).amin(2))
        finally:
            matmul.allow_tf32 = before
        blocks = torch.cat(least, 1)
        scored = min(BLOCKS + k - 1, blocks.shape[1])
        value, chosen = blocks.topk(min(scored + 1, blocks.shape[1]), largest=False)
        step = (chosen[:, :scored, None] * BLOCK + torch.arange(BLOCK, device=chosen.device)).flatten(1)
        # In order of steps, so that equal distances go to the earlier one; what pads the last block comes last.
        step = step.sort(dim=1).values
        row = torch.arange(len(steps), device=step.device).repeat_interleave(step.shape[1])
        held = step.clamp(max=count - 1).view(-1)
        squared = pair_distance(self.state, self.action, keys, row, held).view(step.shape)
        squared, order = squared.masked_fill(step >= count, math.inf).sort(dim=1, stable=True)
        ids, squared = step.gather(1, order[:, :k]), squared[:, :k]
        # No block that wasn't scored again may hold a nearer pair, whatever the products' rounding.
        size = query.square().sum(1)
        rest = value[:, -1] + size - rounding(query.shape[1]) * (size + reach)
        certified = (squared[:, -1] < rest) | (scored == blocks.shape[1])  # equal: an earlier step may tie
        return Found(ids, squared, certified, torch.zeros_like(certified))

    def _keys(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys of all pairs (N', S + A), padded to whole blocks, their squared norms, inf on padding, the largest."""
        if self._table is None:
            table = torch.cat([self.state * self.beta, self.action], 1)
            holes = -len(table) % BLOCK
            norm = table.square().sum(1)
            pad = torch.nn.functional.pad
            self._table = (pad(table, (0, 0, 0, holes)), pad(norm, (0, holes), value=math.inf), norm.max())
        return self._table


def _digest(*values: Tensor) -> str:
    out = hashlib.blake2b(digest_size=16)
    for value in values:
        out.update(str(tuple(value.shape)).encode())
        out.update(value.numpy().data)
    return out.hexdigest()
