"""Options that a run does not read: one that several suites have only if none of those that ran does."""

from __future__ import annotations

from pathlib import Path

import pytest
from compressor_weights import written

from kvsuite.options.resolve import default_options
from kvsuite.suites.compression.suite import CompressionSuite
from kvsuite.suites.dse.suite import DseSuite
from kvsuite.suites.outputs import unread_options
from kvsuite.suites.perplexity.suite import PerplexitySuite
from kvsuite.suites.pipeline.suite import PipelineSuite
from kvsuite.suites.retrieval.suite import RetrievalSuite
from kvsuite.suites.sensitivity.suite import SensitivitySuite
from kvsuite.suites.suite import Suite

WEIGHTS = "--kv-compressor-path"


@pytest.mark.parametrize(
    "suite", [DseSuite, PerplexitySuite, SensitivitySuite, RetrievalSuite, PipelineSuite, CompressionSuite]
)
def test_weights_that_no_method_takes(suite: type[Suite], tmp_path: Path) -> None:
    options = default_options(compressor_path=written(tmp_path / "weights.pth"))
    assert unread_options([suite()], options) == [WEIGHTS]
    assert unread_options([suite()], default_options()) == []


def test_what_one_suite_reads_is_read(tmp_path: Path) -> None:
    path = written(tmp_path / "weights.pth")
    of_all = default_options(compressor_path=path, method="mlp", strategies="random")
    # a suite's own option is its own to tell of
    assert unread_options([CompressionSuite(), DseSuite(), PipelineSuite()], of_all) == ["--kv-strategies"]
    asked = default_options(compressor_path=path, task_methods="mlp")
    assert unread_options([RetrievalSuite(), DseSuite()], asked) == []
    assert unread_options([DseSuite(), PipelineSuite()], asked) == [WEIGHTS]
