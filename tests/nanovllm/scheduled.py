"""The scheduler over block tables with no model: a loop that does to the tables what a runtime does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvsuite.compression.base import Policy
from kvsuite.nanovllm.block_pool import BlockPool
from kvsuite.nanovllm.block_table import BlockTables
from kvsuite.nanovllm.limits import Limits
from kvsuite.nanovllm.request import Request, Status
from kvsuite.nanovllm.sampling import SamplingParameters
from kvsuite.nanovllm.scheduler import Scheduler, StepPlan
