"""What is written of a cache's distance to the full one, and the mark of a better loss with other tokens."""

from __future__ import annotations

import pytest

from kvsuite.measure.divergence import CACHE_DIVERGENCE, put_cache_divergence, trap
from kvsuite.measure.measurement import Measurement
from kvsuite.meters.divergence import TokenDivergence
from kvsuite.metrics.registry import MetricRegistry


def tokens(nll: list[float], reference: list[float], same: list[bool]) -> TokenDivergence:
    return TokenDivergence(nll, reference, [0.01 * (i + 1) for i in range(len(nll))], same)


def test_a_better_loss_with_other_most_likely_tokens_is_marked() -> None:
    marked = trap(tokens([1.0, 2.0, 2.9, 4.0], [1.0, 2.0, 3.1, 4.0], [True, True, True, False]))
    assert marked is not None
    assert marked.startswith("trap: the mean loss is 0.0500 nats better")
    assert "25.0% of the most likely tokens" in marked


@pytest.mark.parametrize(
    ("nll", "same"),
    [
        ([1.0, 2.0, 3.2, 4.0], [True, True, True, False]),  # worse
        ([1.0, 2.0, 3.1, 4.0], [True, True, True, False]),  # equal
        ([1.0, 2.0, 2.9, 4.0], [True, True, True, True]),  # better, and the same tokens
    ],
)
def test_what_is_no_trap_is_not_marked(nll: list[float], same: list[bool]) -> None:
    assert trap(tokens(nll, [1.0, 2.0, 3.1, 4.0], same)) is None


def test_every_metric_is_written_by_hand() -> None:
    found = Measurement(MetricRegistry())
    put_cache_divergence(
        found, tokens([1.0, 2.0, 2.9, 4.0], [1.0, 2.2, 3.1, 4.0], [True, True, True, False]), reference="x"
    )
    values = {name: found.metrics[name]["value"] for name in CACHE_DIVERGENCE}
    assert values["kld"] == pytest.approx(0.025)
    assert values["kld_se"] == pytest.approx((5 / 3) ** 0.5 * 0.01 / 2)
    assert values["kld_p99"] is None
    assert values["kld_max"] == pytest.approx(0.04)
    assert values["same_top1"] == 0.75
    assert values["nll_difference"] == pytest.approx(-0.1)
    assert values["nll_difference_se"] == pytest.approx((0.04 / 3) ** 0.5 / 2)
    assert [text[:5] for text in found.warnings] == ["trap:"]
    assert found.metrics["kld"]["reference"] == "x"
