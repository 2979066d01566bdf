# SPDX-License-Identifier: Apache-2.0
"""Environments of robopost, registered on import."""

from . import adapters as adapters
from . import arms as arms
from . import lock as lock
from . import multigoal as multigoal
from .rendering import select_gl

select_gl()
