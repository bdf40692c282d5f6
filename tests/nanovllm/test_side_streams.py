"""Streams that are used at the same time are different ones, however many runtimes there were."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import pytest
import torch

from kvsuite.nanovllm import side_streams
from kvsuite.nanovllm.decode_graphs import capture_stream
from kvsuite.nanovllm.prompt_lane import LaneStreams
from kvsuite.nanovllm.stage_streams import SideStream

DEVICE = torch.device("cuda", 0)


@pytest.fixture
def handles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Streams as torch makes them: numbers 1 to 32 in turn, and 0 for the default one."""
    made = count()
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: 1 + next(made) % 32)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: 0)
    side_streams._made.cache_clear()
    yield
    side_streams._made.cache_clear()


@pytest.mark.usefixtures("handles")
def test_no_runtime_gets_the_stream_of_the_captures() -> None:
    captures = capture_stream(0)
    for _ in range(40):
        compression, lanes = SideStream(DEVICE).stream, LaneStreams(DEVICE)
        assert len({captures, compression, lanes._decode, lanes._prompt}) == 4
