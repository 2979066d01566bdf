# SPDX-License-Identifier: Apache-2.0
"""Lets torchvision's CUDA wheel import beside a CPU torch. Tests only: put this folder on PYTHONPATH.

The wheel's compiled operators do not load there, and torchvision fails on `torchvision::nms`, which it
registers a fake kernel for. Declaring the two schemas is enough to import it; the operators themselves stay
uncallable, and datasets call none of them.
"""

import importlib.abc
import sys

SCHEMAS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


class DeclareOperators(importlib.abc.MetaPathFinder):
    """Declares the schemas when torchvision is first imported, so that other programs don't pay for torch."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            import torch

            if torch.version.cuda is None:
                for name, schema in SCHEMAS.items():
                    torch.library.define(f"torchvision::{name}", schema)
        return None


sys.meta_path.insert(0, DeclareOperators())
