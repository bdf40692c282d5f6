"""Events that no protocol has, and a prompt that is counted otherwise: one line, and no exception of Python's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from openai_double import ODD, Double, serving

from kvsuite.engines.server.dialect import Dialect, find_dialect
from kvsuite.engines.server.endpoint import Endpoint
from kvsuite.engines.server.failure import ServerFailed
from kvsuite.engines.server.served_model import ServedModel
from kvsuite.engines.server.streams import Streams
from kvsuite.errors import CaseInvalid
from kvsuite.meters.clock import ClientClock

pytest.importorskip("httpx", reason='pip install "httpx>=0.28"')
MODEL = ServedModel("tiny", ("tiny",), None, {})


@pytest.fixture(scope="module")
def double() -> Iterator[Double]:
    with serving(lambda tokens: [], lambda text: []) as found:
        yield found


@pytest.fixture
def endpoint(double: Double) -> Iterator[Endpoint]:
    found = Endpoint(double.url, 5)
    yield found
    found.close()


@pytest.mark.parametrize("fault", ODD)
def test_values_that_no_protocol_has_are_a_failure_of_the_server(
    double: Double, endpoint: Endpoint, fault: str
) -> None:
    body = Dialect("token ids", True, None).body(MODEL, [1, 2, 3], 4, None, salt=None)
    double.fault = fault
    said = "answered for the model ['tiny'], not for tiny" if fault == "models" else "no event of a completion: {"
    with pytest.raises(ServerFailed) as failed:
        Streams(endpoint, MODEL.names, ClientClock()).complete([body])
    assert str(failed.value).startswith(f"{double.url}/v1/completions: ")
    assert said in str(failed.value)
    assert "\n" not in str(failed.value)


def test_ids_that_are_counted_otherwise_are_no_prompt(double: Double, endpoint: Endpoint) -> None:
    double.told_prompt = 9
    try:
        with pytest.raises(
            CaseInvalid,
            match=r"refuses a completion: it takes a prompt of 8 token ids for 9 tokens, and the model has no tokenizer here",
        ):
            find_dialect(endpoint, MODEL, None)
    finally:
        double.told_prompt = None
