"""Losses and rows of engine vllm, every token a step of its own: recorded answers of a real vLLM beside engine hf.

What this cannot prove: that vLLM still answers so, and anything about CUDA.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from vllm_sessions import case, load, save_small

from kvsuite.case import Case
from kvsuite.engines.capabilities import GivesLogits, ScoresThroughCache
from kvsuite.engines.engine import EngineSettings
from kvsuite.engines.hf.session import HfSession
from kvsuite.engines.vllm.session import VllmSession
from kvsuite.meters.divergence import row_divergence
from kvsuite.meters.quality import TokenScores

TOKENS = [(7 * at + at * at) % 512 for at in range(14)]


def scoring(model: Path, engine: str = "vllm", **params: str) -> Case:
    return case(
        suite="compression", engine=engine, model=str(model), dtype="float32", params=params,
        workload={"protocol": "streaming-decode", "prompt_tokens": 6, "max_new_tokens": 4, "max_tokens": len(TOKENS)},
    )  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def session(checkpoint: Path) -> Iterator[VllmSession]:
    found = load(scoring(checkpoint))
    yield found
    found.close()


def rows_of(session: Any, protocol: str, prefix: int, *, full: bool) -> tuple[TokenScores, list[Tensor]]:
    rows: list[Tensor] = []

    def take(at: int, logits: Tensor) -> None:
        assert at == len(rows)
        assert logits.shape == (1, 512)
        rows.append(logits)

    return session.score_rows(TOKENS, protocol, prefix, take, full=full), rows


@pytest.mark.parametrize(("protocol", "prefix"), [("streaming-decode", 0), ("prefix-continuation", 6)])
def test_losses_and_rows_are_those_of_transformers(
    session: VllmSession, checkpoint: Path, protocol: str, prefix: int
) -> None:
    assert isinstance(session, ScoresThroughCache)
    assert isinstance(session, GivesLogits)
    reference = HfSession(scoring(checkpoint, "hf"), EngineSettings(threads=1))
    reference.prepare(scoring(checkpoint, "hf"))
    session.prepare(scoring(checkpoint))
    found, rows = rows_of(session, protocol, prefix, full=False)
    expected, others = rows_of(reference, protocol, prefix, full=False)
    assert (found.targets, found.positions) == (expected.targets, expected.positions)
    assert found.nll == pytest.approx(expected.nll, abs=2e-3)
    assert len(rows) == len(others) == len(found.nll)
    for row, other, target, nll in zip(rows, others, found.targets, found.nll, strict=True):
        kld, _ = row_divergence(row, other)
        assert 0 <= float(kld) < 1e-5
        assert -float(row[0, target]) == pytest.approx(nll, abs=1e-5)
    # losses alone are asked for without the rows
    assert session.score(TOKENS, protocol, prefix).nll == pytest.approx(found.nll, abs=1e-5)
    together = session.score_reference(TOKENS, found.positions[0])
    assert together.nll == pytest.approx(expected.nll, abs=2e-3)
    reference.close()


def test_a_format_is_scored_through_and_the_full_cache_is_the_models_dtype(
    session: VllmSession, checkpoint: Path
) -> None:
    session.prepare(scoring(checkpoint))
    plain, _ = rows_of(session, "streaming-decode", 0, full=False)
    session.prepare(scoring(checkpoint, kv_cache_dtype="fp8_e4m3"))
    packed, rows = rows_of(session, "streaming-decode", 0, full=False)
    full, references = rows_of(session, "streaming-decode", 0, full=True)
    assert full.nll == pytest.approx(plain.nll, abs=1e-6)
    distances = [float(row_divergence(row, other)[0]) for row, other in zip(rows, references, strict=True)]
    # the first token attends to itself alone, through what was stored of it
    assert 1e-5 < max(distances) < 0.5
    assert packed.nll != full.nll
    assert session.effective["scored"] == "every token a step of its own, eager"
