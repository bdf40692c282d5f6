"""``python -m kvsuite parity``: the same numbers where they are promised, and what the exit code says where they are not."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from msgspec import structs
from tiny_checkpoint import TEXT, save_checkpoint

from kvsuite.__main__ import USAGE_ERROR, main
from kvsuite.case import Case
from kvsuite.engines.engine import EngineSettings
from kvsuite.engines.hf.engine import HfEngine
from kvsuite.engines.nano.engine import NanoEngine
from kvsuite.errors import CaseSkipped
from kvsuite.options.common import CommonOptions
from kvsuite.options.groups import option_groups
from kvsuite.options.resolve import Options, default_options
from kvsuite.parity.measure import Parity

RunParity = Callable[..., tuple[int, str, dict[str, Any]]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parity") / "tiny"
    folder.mkdir()
    (folder / "danube.txt").write_text(TEXT, encoding="utf-8")
    return save_checkpoint(folder)


@pytest.fixture
def parity(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> RunParity:
    """Exit code, what was printed, and the engines of parity.json by name."""
    monkeypatch.setenv("KV_THREADS", "1")

    def run(*words: str) -> tuple[int, str, dict[str, Any]]:
        code = main(
            ["parity", "--model", str(checkpoint), "--corpus", str(checkpoint / "danube.txt"), "--device", "cpu",
             "--prompt-tokens", "20", "--tokens", "24", "--new-tokens", "4", "--rounds", "2", "--out", str(tmp_path), *words]
        )  # fmt: skip
        found = json.loads((tmp_path / "parity.json").read_text()) if (tmp_path / "parity.json").exists() else {}
        printed = capsys.readouterr()
        return code, printed.out or printed.err, {one["engine"]: one for one in found.get("engines", ())}

    return run


def test_engines_that_promise_the_same_numbers_give_them(parity: RunParity, tmp_path: Path) -> None:
    code, printed, found = parity("--engines", "nano")
    assert code == 0, printed
    assert list(found) == ["hf", "nano"]
    hf, nano = found["hf"], found["nano"]
    assert abs(nano["difference_se"]) < 1e-5
    assert abs(nano["difference"]) <= nano["bound"] == NanoEngine.perplexity_bounds["float32"]
    assert nano["perplexity"] == pytest.approx(hf["perplexity"], rel=1e-4)
    # 2 layers, keys and values of 2 heads of 16 numbers of 4 bytes
    assert hf["kv_bytes_token"] == nano["kv_bytes_token"] == 2 * 2 * 2 * 16 * 4
    assert 0 <= nano["kld"] < 1e-6
    assert nano["same_top1"] == 1
    assert nano["ttft_s"] > 0
    assert nano["tpot_s"] > 0
    assert re.search(r"^nano +float32 .* 0\.01% ", printed, re.MULTILINE)
    assert (tmp_path / "parity.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "parity.svg").read_text()


class OtherWeights(NanoEngine):
    """Promises the numbers of one model and gives those of another, with the same vocabulary."""

    folder: ClassVar[str]

    def load(self, case: Case, settings: EngineSettings) -> Any:
        return super().load(replace(case, model=self.folder), settings)


class Missing(NanoEngine):
    def load(self, case: Case, settings: EngineSettings) -> Any:
        raise CaseSkipped("engine nano: not here; pip install nano")


class Broken(NanoEngine):
    def load(self, case: Case, settings: EngineSettings) -> Any:
        raise ValueError("no\nroom")


class Short(NanoEngine):
    """Ends every timed request a token early."""

    def load(self, case: Case, settings: EngineSettings) -> Any:
        session: Any = super().load(case, settings)
        serve = session.serve

        def served(requests: Any, clock: Any = None) -> Any:
            found = serve(requests, clock)
            return replace(found, times=[replace(one, chunks=one.chunks[:-1]) for one in found.times])

        session.serve = served
        return session


@pytest.mark.parametrize(
    ("engine", "named", "code", "said"),
    [
        (
            OtherWeights,
            ("--engines", "nano"),
            1,
            r"^nano promises hf's perplexity within 0.01% in float32 and differs by",
        ),
        (Missing, ("--engines", "nano"), 3, "^nano +missing: engine nano: not here; pip install nano$"),
        (Missing, (), 0, "^nano +missing: engine nano: not here; pip install nano$"),
        (Broken, (), 3, r"^nano +error: ValueError: no\\nroom$"),
        (Short, ("--engines", "nano"), 3, "^nano +invalid: generated 3 tokens instead of 4, so its times are those"),
    ],
)
def test_a_broken_promise_a_missing_engine_and_one_that_fails(
    engine: type[NanoEngine],
    named: tuple[str, ...],
    code: int,
    said: str,
    parity: RunParity,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    OtherWeights.folder = str(save_checkpoint(tmp_path / "other", seed=1))
    monkeypatch.setattr(
        "kvsuite.parity.measure.get_engine", lambda name, options: (HfEngine if name == "hf" else engine)(options)
    )
    # the installed ones of the default list are not what is tested
    monkeypatch.setattr("kvsuite.commands.parity._USUAL", "hf,nano")
    found_code, printed, found = parity(*named)
    assert found_code == code, printed
    assert re.search(said, printed, re.MULTILINE), printed
    assert found["nano"]["exceeds"] is (engine is OtherWeights)
    if engine is not OtherWeights:
        assert [found["nano"][name] for name in ("ttft_s", "tpot_s", "clock")] == [None] * 3


def test_a_request_of_one_token_has_no_time_between_tokens(checkpoint: Path) -> None:
    options = default_options(
        model=str(checkpoint), corpus=str(checkpoint / "danube.txt"), device="cpu", prompt_tokens="20", rounds="2",
        threads="1",
    )  # fmt: skip
    # fewer than the option takes
    groups = [options.of(group) for group in option_groups()]
    one = [structs.replace(group, max_new_tokens=1) if isinstance(group, CommonOptions) else group for group in groups]
    [hf] = Parity(Options(one, options.given), 24).run([])
    assert hf.state == "ok", hf.reason
    assert hf.ttft_s is not None
    assert hf.tpot_s is None


def test_bad_input_is_a_line(parity: RunParity) -> None:
    for words, said in (
        (("--engines", "hf,llama"), "--engines=llama: unknown engine; use "),
        (("--engines", ","), "--engines=,: names no engine; for example --engines=hf,nano"),
        (("--model", "dummy:tiny"), "--model=dummy:tiny: random weights have no perplexity; name a real model"),
        (("--tokens", "100000"), "--kv-max-tokens: text 1 of corpus"),
    ):
        code, printed, _ = parity(*words)
        assert code == USAGE_ERROR
        assert f"error: {said}" in printed
