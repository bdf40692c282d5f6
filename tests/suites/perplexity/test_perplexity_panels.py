from __future__ import annotations

from typing import Any

import pytest
from matplotlib.axes import Axes
from perplexity_samples import drawn_row as row
from perplexity_samples import original

from kvsuite.suites.perplexity.figure import build_figures


def caption(figure: Any) -> str:
    return figure.get_supxlabel().replace("\n", " ")


def bars(axes: Axes) -> dict[str, float]:
    labels = [text.get_text() for text in axes.get_xticklabels()]
    return dict(zip(labels, (patch.get_height() for patch in axes.containers[0]), strict=True))


def panels(figure: Any) -> dict[str, dict[str, float]]:
    return {axes.get_title().replace("\n", " "): bars(axes) for axes in figure.axes}


def train(dataset: str) -> list[dict[str, Any]]:
    return [each | {"split": "train"} for each in original(dataset)]


def test_wikitext103_is_never_a_second_result() -> None:
    figures = build_figures(original("wikitext2") + original("wikitext103"))
    assert list(figures) == ["wikitext2"]
    (axes,) = figures["wikitext2"].axes
    assert len(bars(axes)) == 3
    assert "wikitext103 (test): same text as wikitext2, one result." in caption(figures["wikitext2"])
    alone = build_figures(original("wikitext103"))
    assert list(alone) == ["wikitext103"]
    assert "wikitext103 (test): same text as wikitext2, not a second result." in caption(alone["wikitext103"])


@pytest.mark.parametrize("names", [("wikitext2", "wikitext103"), ("wikitext103", "wikitext2"), ("mine", "copy")])
def test_equal_hashes_are_one_text(names: tuple[str, str]) -> None:
    figures = build_figures([row(20.0, dataset=names[0]), row(20.0, dataset=names[1])])
    (dataset,) = figures
    assert dataset == ("wikitext2" if "wikitext2" in names else names[0])
    assert len(bars(figures[dataset].axes[0])) == 1
    assert "same text as" in caption(figures[dataset])


def test_other_texts_are_other_figures() -> None:
    figures = build_figures([row(20.0), row(30.0, dataset="pg19", text_sha256="aa"), *original("c4")])
    assert list(figures) == ["wikitext2", "pg19", "c4"]
    # the training split of wikitext103 is a text of its own
    trained = [each | {"split": "train"} for each in original("wikitext103")]
    assert list(build_figures(original("wikitext2") + trained)) == ["wikitext2", "wikitext103"]


def test_two_texts_under_one_name_are_two_panels_of_one_figure() -> None:
    figures = build_figures(original("wikitext103") + train("wikitext103"))
    assert list(figures) == ["wikitext103"]
    found = panels(figures["wikitext103"])
    assert [len(each) for each in found.values()] == [3, 3]
    assert [title.rpartition("512 ")[2] for title in found] == ["test split", "train split"]
    # the claim is for one of the panels
    assert "wikitext103 (test): same text as wikitext2" in caption(figures["wikitext103"])


@pytest.mark.parametrize("ours_first", [True, False])
def test_the_originals_rows_stay_beside_ours(ours_first: bool) -> None:
    ours, theirs = [row(20.0, dataset="wikitext103", text_sha256="ab" * 32)], original("wikitext103")
    figures = build_figures(ours + theirs if ours_first else theirs + ours)
    assert list(figures) == ["wikitext103"]
    assert sorted(len(each) for each in panels(figures["wikitext103"]).values()) == [1, 3]


@pytest.mark.parametrize(
    "rows",
    [
        [*original("wikitext2"), row(20.0, dataset="wikitext103", text_sha256="ab" * 32)],
        [*original("wikitext103"), row(20.0, text_sha256="ab" * 32)],
        [row(20.0, text_sha256="ab" * 32), *original("wikitext103")],
    ],
)
def test_what_is_published_as_one_text_is_one_figure(rows: list[dict[str, Any]]) -> None:
    figures = build_figures(rows)
    assert list(figures) == ["wikitext2"]
    found = panels(figures["wikitext2"])
    assert sorted(len(each) for each in found.values()) == [1, 3]
    assert sum("wikitext103" in title for title in found) == 1
    assert "wikitext103 (test): published as the text of wikitext2, which the hashes here do not show" in caption(
        figures["wikitext2"]
    )


def test_the_originals_text_is_known_by_its_hash() -> None:
    known = "c5b5caea5bd655cb221545a484f2f0f59d35092a17a66840d7b9513d0b99687d"
    figures = build_figures([*original("wikitext2"), row(20.0, dataset="wikitext103", text_sha256=known)])
    assert list(figures) == ["wikitext2"]
    assert "wikitext103 (test): same text as wikitext2, one result." in caption(figures["wikitext2"])


def test_no_claim_over_texts_that_are_shown_different() -> None:
    figures = build_figures([row(20.0), row(30.0, dataset="wikitext103", text_sha256="ab" * 32)])
    assert list(figures) == ["wikitext2", "wikitext103"]
    for figure in figures.values():
        assert "text" not in caption(figure)
    # nor where nothing is known of a hashed text
    (alone,) = build_figures([row(30.0, dataset="wikitext103", text_sha256="ab" * 32)]).values()
    assert "text" not in caption(alone)


def test_no_row_is_lost_to_another_of_the_same_name() -> None:
    rows = [
        row(20.0, dataset=dataset, text_sha256=text, split=split)
        for dataset in ("wikitext2", "wikitext103", "mine")
        for text in ("aa", "bb", None)
        for split in ("test", "train", None)
    ]
    texts = {(each["text_sha256"] or (each["dataset"].replace("103", "2"), each["split"])) for each in rows}
    texts |= {("wikitext103", "train"), ("wikitext103", None)}
    figures = build_figures(rows)
    assert sum(len(figure.axes) for figure in figures.values()) == len(texts)


def test_two_revisions_of_a_model_are_two_panels() -> None:
    rows = [
        row(20.0, model_revision="sha256:" + "1" * 64),
        row(21.0, model_revision="sha256:" + "2" * 64),
        row(22.0),
        row(9.0, hf_model="other", model_revision="sha256:" + "3" * 64),
    ]
    found = panels(build_figures(rows)["wikitext2"])
    assert [list(each.values()) for each in found.values()] == [[20.0], [21.0], [22.0], [9.0]]
    ends = [title.partition("text c5b5caea")[2].strip() for title in found]
    assert ends == ["revision 111111111111", "revision 222222222222", "revision not in the file", ""]


def test_two_tokenizers_are_two_panels() -> None:
    found = panels(build_figures([row(20.0, tokenizer_hash="aa"), row(21.0, tokenizer_hash="bb")])["wikitext2"])
    assert [title.rpartition("caea ")[2] for title in found] == ["tokenizer aa", "tokenizer bb"]


def test_texts_without_a_split_show_none() -> None:
    figure = build_figures([row(20.0, dataset="mine", split=None), row(20.0, dataset="copy", split=None)])["mine"]
    assert "split" not in figure.axes[0].get_title()
    assert "copy: same text as mine, one result." in caption(figure)
