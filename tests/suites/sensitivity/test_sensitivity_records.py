"""The suite on a small model: a record a case, an assignment that is what its parts say, and the files it leaves."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from synthetic_session import ENVIRONMENT
from tiny_checkpoint import TEXT, save_checkpoint

from kvsuite.cache_formats.by_layer import ByLayerFormat
from kvsuite.cache_formats.chosen_format import parse_format
from kvsuite.console import console_text
from kvsuite.engines.hf.session import HfSession
from kvsuite.engines.registry import SessionPool
from kvsuite.errors import UserError
from kvsuite.measure.runner import CaseRunner
from kvsuite.metrics.registry import MetricRegistry
from kvsuite.options.resolve import Options, default_options
from kvsuite.record import Record, schema
from kvsuite.suites.registry import cases_of, suite_named

FORMATS = ("auto", "int8", "int4", "int8:int4", "int4:int8")
TOKENS = 48


class Ran:
    """What a run left: records by the case's name, and how often a text went through a cache."""

    def __init__(self, options: Options, skip: tuple[str, ...] = ()) -> None:
        self.passes = {True: 0, False: 0}
        self.options, self.records = options, dict[str, Record]()
        whole = HfSession.score_whole

        def counted(session: HfSession, tokens: Any, take: Any, *, full: bool) -> Any:
            self.passes[full] += 1
            return whole(session, tokens, take, full=full)

        sessions = SessionPool(threads=1)
        runner = CaseRunner(options, MetricRegistry(), ENVIRONMENT, sessions, suite_named)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(HfSession, "score_whole", counted)
            for case in cases_of("sensitivity", options):
                if not case.name.startswith(skip or "no name"):
                    self.records[case.name] = runner.run(case, f"tests::{case.id}").record
        sessions.close()

    def value(self, name: str, metric: str) -> Any:
        return self.records[name].metrics[metric]["value"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    (folder / "danube.txt").write_text(TEXT, encoding="utf-8")
    return save_checkpoint(folder)


def options_of(checkpoint: Path, **options: str) -> Options:
    small = {"model": str(checkpoint), "device": "cpu", "corpus": str(checkpoint / "danube.txt")}
    return default_options(**(small | {"sensitivity_tokens": str(TOKENS), "sensitivity_budget": "8.2,22%"} | options))


@pytest.fixture(scope="module")
def ran(checkpoint: Path) -> Ran:
    return Ran(options_of(checkpoint))


def test_every_layers_keys_and_values_have_a_valid_record(ran: Ran) -> None:
    layers = [f"int4_{side}{layer:02}" for side in "kv" for layer in range(2)]
    assert list(ran.records) == [*FORMATS, *layers, "mixed_8.2bits", "mixed_22percent"]
    for record in ran.records.values():
        assert (record.status, record.reason, record.error) == ("ok", None, None)
        jsonschema.validate(json.loads(json.dumps(record.to_dict())), schema("record"))
    assert ran.value("auto", "kld") is None
    assert all(ran.value(name, "kld") > 0 for name in ran.records if name != "auto")
    assert ran.value("int4", "kld") > 5 * ran.value("int8", "kld")


def test_one_reference_and_one_pass_a_format_serve_all(ran: Ran) -> None:
    """Layers that a mixed assignment builds on, and the base, are scored once: 4 formats, 4 layers, 2 assignments."""
    assert ran.passes == {True: 1, False: 10}


def test_a_layer_alone_is_what_its_format_says(ran: Ran) -> None:
    assert ran.records["int4_v01"].case.params["kv_cache_dtype"] == "by_layer(auto|auto:int4)"
    # 4 bytes a number in float32, of which one layer's values take half a byte and 4 for scale and least value
    plain = 2 * 2 * 2 * 16 * 4 * TOKENS
    assert ran.value("auto", "kv_bytes_exact") == plain
    assert ran.value("int4_v01", "kv_bytes_exact") == plain - 2 * TOKENS * (16 * 4 - 8 - 4)
    for name in ran.records:
        assert ran.value(name, "kv_bytes_exact") == ran.value(name, "mem_predicted_kv_bytes")
    assert ran.value("int8", "kv_bits") == 9


def test_an_assignment_is_within_its_budget_lowers_the_cheapest_and_is_measured_itself(ran: Ran) -> None:
    alone = {name: ran.value(name, "kld") for name in ran.records if name[:6] in ("int4_k", "int4_v")}
    found = ran.records["mixed_8.2bits"]
    assert ran.value("mixed_8.2bits", "kv_bits") <= 8.2
    names = found.samples["assignment"]
    chosen = parse_format(found.effective["kv_cache_dtype"])
    assert isinstance(chosen, ByLayerFormat)
    assert [str(one) for one in chosen.layers] == names
    # a side of a layer saves 3 of 9 bits of a quarter of all numbers: two of them go, the cheapest
    wanted = [["int8", "int8"], ["int8", "int8"]]
    for name in sorted(alone, key=lambda name: alone[name])[:2]:
        wanted[int(name[6:])]["kv".index(name[5])] = "int4"
    assert [":".join(dict.fromkeys(pair)) for pair in wanted] == names
    assert ran.value("mixed_8.2bits", "kld") > 0
    difference = ran.value("mixed_8.2bits", "kld") - ran.value("int8", "kld")
    assert ran.value("mixed_8.2bits", "kld_difference") == pytest.approx(difference, abs=1e-9)
    assert ran.value("mixed_8.2bits", "kld_difference_se") > 0
    assert ran.value("int8", "kld_difference") is None


def test_an_assignment_alone_measures_what_it_needs(checkpoint: Path, ran: Ran) -> None:
    alone = Ran(options_of(checkpoint, sensitivity_budget="22%"), skip=(*FORMATS, "int4_"))
    assert alone.passes == {True: 1, False: 6}
    [name] = alone.records
    for metric in ("kld", "kv_bytes_exact", "kld_difference"):
        assert alone.value(name, metric) == pytest.approx(ran.value(name, metric), rel=1e-5)


def test_the_file_of_an_assignment_is_a_format_that_other_runs_take(ran: Ran, tmp_path: Path) -> None:
    rows = [record.to_dict() for record in ran.records.values()]
    files = suite_named("sensitivity").files({}, rows)
    path = tmp_path / "mixed.json"
    path.write_text(files["mixed_22percent.json"])
    [case] = cases_of("perplexity", default_options(cache_dtype=f"by_layer({path})", quantization="none", device="cpu"))
    assert case.params["kv_cache_dtype"] == ran.records["mixed_22percent"].effective["kv_cache_dtype"]


def test_table_and_figure_come_from_rows_alone(ran: Ran) -> None:
    suite = suite_named("sensitivity")
    rows = [record.to_dict() for record in ran.records.values()]
    shown = console_text(suite.table({}, rows))
    formats, layers = shown.split("Layer alone")
    assert all(name in formats for name in (*FORMATS, "mixed_22percent"))
    ranking = [line.split()[0] for line in layers.splitlines() if line.startswith("int4_")]
    assert ranking == sorted(ranking, key=lambda name: -ran.value(name, "kld"))
    assert len(ranking) == 4
    drawn = suite.figures({}, rows)
    assert list(drawn) == ["sensitivity.png", "sensitivity.svg"]
    svg = drawn["sensitivity.svg"].decode()
    assert all(name in svg for name in ("keys in int4", "int8:int4", "mixed by layer"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sensitivity": "int4,auto"}, "--kv-sensitivity=auto: .*give a packed format"),
        ({"sensitivity": "int4,int4:int4"}, "names one format twice"),
        ({"sensitivity": "int5"}, "--kv-sensitivity=int5: .*unknown format"),
        ({"sensitivity": "int4(residual=8)"}, "leave residual out"),
        ({"sensitivity": "int4_channel(group=8),int4_channel(group=16)"}, "groups per channel must be equal"),
        ({"sensitivity_base": "int8_channel", "sensitivity": "int4_channel(group=16)"}, "groups per channel"),
        ({"sensitivity_base": "int3"}, "--kv-sensitivity-base=int3: "),
        ({"quantization": "none,q4f16_1"}, "one weight format"),
    ],
)
def test_what_cannot_be_tried_is_refused_in_one_line(options: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=f"^[^\n]*{said}[^\n]*$"):
        cases_of("sensitivity", default_options(device="cpu", **options))


def test_keys_and_values_may_be_tried_in_different_formats(checkpoint: Path) -> None:
    options = options_of(checkpoint, sensitivity="int4_channel(group=8):int4,auto:int8", sensitivity_base="auto")
    names = [case.name for case in cases_of("sensitivity", options) if case.params["kind"] == "layer"]
    tried = ("int4_channel(group=8)_k", "int4_v", "int8_v")
    assert names == [f"{name}{layer:02}" for name in tried for layer in range(2)]


@pytest.mark.parametrize(
    ("budget", "said"),
    [("9", "nothing to lower; give less"), ("10%", "for all layers takes .* bits an element; give more")],
)
def test_a_budget_that_has_no_assignment_is_invalid_with_the_reason(checkpoint: Path, budget: str, said: str) -> None:
    found = Ran(options_of(checkpoint, sensitivity_budget=budget), skip=(*FORMATS, "int4_"))
    [record] = found.records.values()
    assert record.status == "invalid"
    assert re.search(said, str(record.reason))
