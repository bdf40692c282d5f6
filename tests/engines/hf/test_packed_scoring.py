"""A packed cache, scored: every way to feed a text gives the same losses, and one reference serves all caches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hf_sessions import case, random_tokens, session
from synthetic_session import ENVIRONMENT
from tiny_checkpoint import TEXT, save_checkpoint

from kvsuite.engines.hf.session import HfSession
from kvsuite.engines.registry import SessionPool
from kvsuite.errors import CaseInvalid
from kvsuite.measure.divergence import CACHE_DIVERGENCE
from kvsuite.measure.runner import CaseRunner
from kvsuite.meters.divergence import row_divergence
from kvsuite.metrics.registry import MetricRegistry
from kvsuite.options.resolve import default_options
from kvsuite.record import Record
from kvsuite.suites.registry import cases_of, suite_named
from kvsuite.workloads.texts import TextSource
from kvsuite.workloads.windows import plan_windows

TOKENS = random_tokens(40)


def stored(name: str, **fields: Any) -> Any:
    return case(params={"kv_cache_dtype": name}, **fields)


@pytest.mark.parametrize("name", ["int8", "int4(group=8,residual=6)", "kivi_int4(group=8,residual=4)"])
def test_windows_read_what_is_stored_as_steps_do(name: str) -> None:
    on = session()
    on.prepare(stored(name))
    steps = on.score(TOKENS, "streaming-decode", 0)
    windows = plan_windows("disjoint", 40, 40, 40)
    whole = on.score_windows(TOKENS, windows, prefix="none", prefix_token=None).tokens
    on.prepare(case())
    plain = on.score(TOKENS, "streaming-decode", 0)
    effect = (torch.tensor(plain.nll) - torch.tensor(steps.nll)).abs().mean()
    apart = (torch.tensor(whole.nll) - torch.tensor(steps.nll)).abs().mean()
    # float32 sums in another order round a code elsewhere now and then
    assert apart < effect / 5
    assert effect > 1e-5


def test_rows_of_the_full_cache_are_those_of_the_case_without_a_method() -> None:
    on = session()
    on.prepare(case())
    own: list[torch.Tensor] = []
    on.score_rows(TOKENS, "prefix-continuation", 20, lambda at, row: own.append(row.clone()), full=False)
    on.prepare(stored("int4", policy="streaming_llm", policy_params={"start_size": 2, "recent_size": 6}))
    full: list[torch.Tensor] = []
    scores = on.score_rows(TOKENS, "prefix-continuation", 20, lambda at, row: full.append(row.clone()), full=True)
    assert torch.equal(torch.cat(own), torch.cat(full))
    assert len(scores.nll) == len(full) == 19
    arm: list[torch.Tensor] = []
    on.score_rows(TOKENS, "prefix-continuation", 20, lambda at, row: arm.append(row.clone()), full=False)
    assert row_divergence(torch.cat(arm), torch.cat(full))[0].mean() > 1e-3


def test_caches_of_one_text_cost_one_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    on, texts = session(), TextSource()
    passes = []
    score_rows = HfSession.score_rows

    def counted(self: HfSession, *args: Any, **kwargs: Any) -> Any:
        passes.append(kwargs["full"])
        return score_rows(self, *args, **kwargs)

    monkeypatch.setattr(HfSession, "score_rows", counted)
    for name in ("int8", "int4"):
        on.prepare(stored(name))
        texts.reference_rows(on, TOKENS, "streaming-decode", 0, lambda done, of: None)
    assert passes == [True]


@pytest.mark.parametrize(
    ("name", "fields", "said"),
    [
        ("int4(group=24)", {}, "group=24 does not divide the head size 16; group=16 does"),
        (
            "kivi_int4",
            {"policy": "streaming_llm", "policy_params": {"start_size": 2, "recent_size": 6}},
            "removes tokens",
        ),
        ("int8", {"policy": "kvpress:SnapKV", "policy_params": {"keep_ratio": 0.5}}, "the model's own numbers"),
    ],
)
def test_what_cannot_be_packed_is_refused_with_the_reason(name: str, fields: dict[str, Any], said: str) -> None:
    if "kvpress" in str(fields):
        pytest.importorskip("kvpress")
    with pytest.raises(CaseInvalid, match=r"^--kv-cache-dtype=.*" + said):
        session().prepare(stored(name, **fields))


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Record]]:
    """Records of the compression suite on a model with a tokenizer: two policies in three formats."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "danube.txt").write_text(TEXT * 3, encoding="utf-8")
    model = save_checkpoint(folder)
    options = default_options(
        model=str(model), device="cpu", engine="hf", rounds="1", num_warmup="0", prompt_tokens="24", max_new_tokens="6",
        corpus=str(folder / "danube.txt"), max_tokens="30", method="recent_only", recent_sizes="12", start_size="4",
        protocol="prefix-continuation", cache_dtype="auto,int8:int4,int4(group=4,residual=8)",
    )  # fmt: skip
    sessions = SessionPool(threads=1)
    runner = CaseRunner(
        options=options, registry=MetricRegistry(), environment=ENVIRONMENT, sessions=sessions, suite=suite_named
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvsuite.meters.bandwidth.copy_bandwidth", lambda device: 1e10)
        found = {one.name: runner.run(one, f"tests::{one.id}").record for one in cases_of("compression", options)}
    yield found
    sessions.close()


def test_every_cache_has_its_divergence_and_the_full_one_is_the_reference(records: dict[str, Record]) -> None:
    assert {record.status for record in records.values()} == {"ok"}
    assert len(records) == 6
    for name, record in records.items():
        values = {one: record.metrics[one]["value"] for one in CACHE_DIVERGENCE}
        if name == "baseline":
            assert set(values.values()) == {None}
            assert record.metrics["kld"]["reason"] == "this is the reference"
        else:
            assert values["kld"] > 0
            assert values["kld_max"] >= values["kld"]
            assert values["nll_difference_se"] > 0
    assert records["baseline_int8:int4"].metrics["kld"]["value"] < records["recent_only_16"].metrics["kld"]["value"]


def test_bytes_of_records_are_predicted_and_smaller(records: dict[str, Record]) -> None:
    for record in records.values():
        exact, planned = (record.metrics[name]["value"] for name in ("kv_bytes_exact", "mem_predicted_kv_bytes"))
        assert exact == planned
        assert not [text for text in record.warnings if "kept alive" in text]
    full, packed = (records[name].metrics["kv_bytes_exact"]["value"] for name in ("baseline", "baseline_int8:int4"))
    assert packed < full / 3
    assert records["baseline_int8:int4"].effective["kv_cache_dtype"] == "int8:int4"
