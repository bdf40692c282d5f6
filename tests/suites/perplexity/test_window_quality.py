"""Every formula of a perplexity record, exactly, on a synthetic engine whose losses are known."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from tiny_checkpoint import TEXT, byte_tokenizer
from window_bench import Bench, N, WindowSession, loss, value

from kvsuite.errors import UserError
from kvsuite.record import schema
from kvsuite.workloads.windows import plan_windows

PACKED = {
    "format": "q4f16_1", "quality_only": False, "predicted_weight_bytes": 4096, "bits_per_weight": 4.5,
    "bits_per_weight_without_embeddings": 4.25,
}  # fmt: skip


def test_perplexity_and_its_error(tmp_path: Path) -> None:
    measured = Bench(tmp_path).run()
    record = measured.record
    assert (record.status, record.reason, record.error) == ("ok", None, None)
    nll = [loss(p) for p in range(1, N)]
    mean = statistics.fmean(nll)
    assert value(measured, "nll_sum") == sum(nll)
    assert value(measured, "nll_tokens") == N - 1
    assert value(measured, "perplexity") == pytest.approx(math.exp(mean), rel=1e-12)
    error = math.exp(mean) * math.sqrt(statistics.pvariance(nll) / (N - 2))
    assert value(measured, "perplexity_se") == pytest.approx(error, rel=1e-12)
    assert value(measured, "next_token_acc") == sum(p % 4 == 0 for p in range(1, N)) / (N - 1)
    for name in ("perplexity", "nll_sum", "next_token_acc"):
        entry = record.metrics[name]
        assert {key: entry[key] for key in ("protocol", "max_length", "stride", "bos")} == {
            "protocol": "hf-strided", "max_length": 32, "stride": 16, "bos": "none",
        }  # fmt: skip


def test_a_constant_loss_is_its_exponential_in_every_form(tmp_path: Path) -> None:
    measured = Bench(tmp_path, WindowSession(lambda position: math.log(50))).run()
    assert value(measured, "perplexity") == pytest.approx(50, rel=1e-12)
    assert value(measured, "ppl_original_formula") == pytest.approx(50, rel=1e-12)
    assert value(measured, "perplexity_se") == pytest.approx(0, abs=1e-9)


def test_the_originals_formula_is_beside_it(tmp_path: Path) -> None:
    # by hand: 40 tokens, windows add 16, 16, 8 of them, and the first one scores 15
    measured = Bench(tmp_path, WindowSession(lambda position: position / 10), text=TEXT[:40]).run()
    windows = [range(1, 16), range(16, 32), range(32, 40)]
    added = (16, 16, 8)
    total = sum(statistics.fmean(window) / 10 * tokens for window, tokens in zip(windows, added, strict=True))
    assert value(measured, "ppl_original_formula") == pytest.approx(math.exp(total / 40), rel=1e-12)
    assert value(measured, "ppl_original_formula") != pytest.approx(value(measured, "perplexity"), rel=1e-6)


def test_the_documentations_perplexity_has_its_weights(tmp_path: Path) -> None:
    # by hand: 40 tokens at 16/6 begin at 0, 6, ..., 24 and have 16, 6, 6, 6, 6 labels, of which the first one scores 15
    options = {"ppl_protocol": "hf-docs", "max_length": "16", "stride": "6"}
    measured = Bench(tmp_path, WindowSession(lambda position: position / 10), text=TEXT[:40], options=options).run()
    windows = [range(1, 16), range(16, 22), range(22, 28), range(28, 34), range(34, 40)]
    counts = (15, 5, 5, 5, 5)
    total = sum(statistics.fmean(window) / 10 * count for window, count in zip(windows, counts, strict=True))
    assert value(measured, "nll_tokens") == 35
    assert value(measured, "nll_sum") == pytest.approx(total, rel=1e-12)
    assert value(measured, "perplexity") == pytest.approx(math.exp(total / 35), rel=1e-12)
    (text,) = measured.record.samples["texts"]
    assert (text["nll_sum"], text["tokens"]) == (pytest.approx(total, rel=1e-12), 35)
    # tokens that were scored, whatever they weigh
    assert measured.record.tokens["scored"] == 39
    assert value(measured, "score_tok_s") == pytest.approx(39 / value(measured, "score_s"))
    assert "ppl_original_formula" not in measured.record.metrics


@pytest.mark.parametrize(
    "options",
    [{"bos": "bos_first"}, {"ppl_protocol": "lm-eval-rolling"}, {"ppl_protocol": "llama.cpp-half", "bos": "bos_over_first"}],
    ids=str,
)  # fmt: skip
def test_other_protocols_and_rules_have_no_original(options: dict[str, str], tmp_path: Path) -> None:
    assert "ppl_original_formula" not in Bench(tmp_path, options=options).run().record.metrics


def test_a_window_of_one_token_has_no_original(tmp_path: Path) -> None:
    # disjoint, 33 tokens: the last window holds one token and scores none
    measured = Bench(tmp_path, options={"ppl_protocol": "disjoint"}, text=TEXT[:33]).run()
    assert value(measured, "nll_tokens") == 31
    entry = measured.record.metrics["ppl_original_formula"]
    assert (entry["value"], entry["reason"]) == (None, "several texts, or a window of one token")


def test_words_and_bytes(tmp_path: Path) -> None:
    measured = Bench(tmp_path, options={"ppl_protocol": "lm-eval-rolling"}).run()
    total = sum(loss(p) for p in range(N))
    assert value(measured, "nll_tokens") == N
    assert value(measured, "word_perplexity") == pytest.approx(math.exp(total / len([*TEXT.split(), ""])))
    assert value(measured, "byte_perplexity") == pytest.approx(math.exp(total / N))
    assert value(measured, "bits_per_byte") == pytest.approx(total / N / math.log(2))
    assert "word_perplexity" not in Bench(tmp_path).run().record.metrics


def test_words_of_several_texts_are_not_known(tmp_path: Path) -> None:
    options = {"ppl_protocol": "lm-eval-rolling", "dataset": "default", "num_samples": "2", "eval_tokens": "40"}
    measured = Bench(tmp_path, options=options).run()
    for name in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        assert value(measured, name) is None
        assert measured.record.metrics[name]["reason"].startswith("several texts")


def test_texts_are_pooled_by_token(tmp_path: Path) -> None:
    options = {"dataset": "default", "num_samples": "2", "eval_tokens": "40"}
    bench = Bench(tmp_path, options=options)
    measured = bench.run()
    record = measured.record
    assert value(measured, "nll_tokens") == 78
    assert [(each["index"], each["tokens"]) for each in record.samples["texts"]] == [(0, 39), (1, 39)]
    assert sum(each["nll_sum"] for each in record.samples["texts"]) == value(measured, "nll_sum")
    assert sum(each["correct"] for each in record.samples["texts"]) == pytest.approx(
        78 * value(measured, "next_token_acc")
    )
    assert measured.tokens is not None
    assert measured.tokens["text"] == [0] * 39 + [1] * 39
    assert measured.tokens["position"] == list(range(1, 40)) * 2
    assert [call[0] for call in bench.said if call[0].startswith("scoring")] == ["scoring text 1/2", "scoring text 2/2"]


def test_the_sidecar_holds_every_scored_token(tmp_path: Path) -> None:
    measured = Bench(tmp_path).run()
    assert measured.tokens is not None
    ids = byte_tokenizer()(TEXT)["input_ids"]
    assert measured.tokens == {
        "text": [0] * (N - 1),
        "position": list(range(1, N)),
        "token": ids[1:],
        "nll": [loss(p) for p in range(1, N)],
        "correct": [p % 4 == 0 for p in range(1, N)],
    }


def test_counts_of_tokens(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    record = bench.run().record
    windows = plan_windows("hf-strided", N, 32, 16)
    assert {name: record.tokens[name] for name in ("text", "scored", "scored_forward")} == {
        "text": N, "scored": N - 1, "scored_forward": 7 * len(windows),
    }  # fmt: skip
    assert record.effective["scoring"] == {"head": "split"}
    assert record.dataset is not None
    assert record.dataset["windows"] == len(windows)


def test_windows_and_prefix_reach_the_engine(tmp_path: Path) -> None:
    plain = Bench(tmp_path, options={"max_length": "16", "stride": "4", "eval_tokens": "30"})
    plain.run()
    assert plain.session.scored == [
        (byte_tokenizer()(TEXT)["input_ids"][:30], plan_windows("hf-strided", 30, 16, 4), "none", 256)
    ]
    bench = Bench(tmp_path, options={"bos": "bos_each_window"})
    bench.run()
    ((tokens, windows, prefix, token),) = bench.session.scored
    assert (prefix, token) == ("bos_each_window", 256)
    assert windows == plan_windows("hf-strided", len(tokens), 32, 16, prefix="bos_each_window")


def test_the_scoring_pass_is_timed(tmp_path: Path) -> None:
    measured = Bench(tmp_path).run()
    assert value(measured, "score_s") > 0
    assert value(measured, "score_tok_s") == pytest.approx((N - 1) / value(measured, "score_s"))
    assert "perf_counter" in measured.record.metrics["score_s"]["clock"]


@pytest.mark.parametrize("stride", ["16", "1"])
def test_a_gpu_is_warmed_up_by_a_window_that_scores(stride: str, tmp_path: Path) -> None:
    # with stride 1 the first window holds one token
    bench = Bench(tmp_path, options={"device": "cuda:0", "stride": stride})
    assert bench.run().record.status == "ok"
    warm, whole = bench.session.scored
    (window,) = warm[1]
    assert window.targets > 0
    assert len(whole[1]) > 1
    quality_only = Bench(
        tmp_path, WindowSession(quantization=PACKED | {"quality_only": True}), options={"device": "cuda:0"}
    )
    quality_only.run()
    assert len(quality_only.session.scored) == 1


def test_quality_comes_before_speed(tmp_path: Path) -> None:
    bench = Bench(tmp_path, beside=WindowSession(), options={"quantization": "q4f16_1", "reference": "none"})
    bench.run()
    order = [name for name, *_ in bench.session.calls if name in ("score", "memory", "generate", "compare")]
    assert list(dict.fromkeys(order)) == ["score", "memory", "generate", "compare"]
    assert order.count("score") == 1


def test_prompts_need_no_text(tmp_path: Path) -> None:
    bench = Bench(tmp_path, text=TEXT[:20], options={"prompt_tokens": "300"})
    assert bench.run().record.status == "ok"
    prompts = [call[1] for call in bench.session.called("generate") if call[2] > 1]
    assert {len(prompt) for prompt in prompts} == {300}
    assert len(set(prompts)) == 2


def test_a_weight_format_has_its_bytes(tmp_path: Path) -> None:
    measured = Bench(tmp_path, WindowSession(quantization=PACKED)).run()
    assert value(measured, "mem_predicted_weights_bytes") == 4096
    assert (value(measured, "bits_per_weight"), value(measured, "bits_per_weight_without_embeddings")) == (4.5, 4.25)
    assert value(measured, "mem_weights_bytes") == 10_000


def test_a_quality_only_format_has_nothing_but_quality(tmp_path: Path) -> None:
    bench = Bench(
        tmp_path, WindowSession(quantization=PACKED | {"quality_only": True}), options={"quantization": "fake_q3"}
    )
    record = bench.run().record
    assert record.status == "ok"
    assert set(record.metrics) == {
        "perplexity", "perplexity_se", "nll_sum", "nll_tokens", "next_token_acc", "ppl_original_formula",
    }  # fmt: skip
    assert record.inert["speed"] == "fake_q3 is rounded and kept dense: quality only"
    assert not bench.session.called("generate")
    assert not bench.session.called("memory")


def test_one_token_has_no_error_bar(tmp_path: Path) -> None:
    options = {"quantization": "q4f16_1", "reference": "none"}
    record = Bench(tmp_path, beside=WindowSession(), options=options, text="ab").run().record
    assert record.status == "ok"
    for name in ("perplexity_se", "ppl_ratio_reference_se"):
        assert (record.metrics[name]["value"], record.metrics[name]["reason"]) == (None, "one token only")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_no_perplexity(bad: float, tmp_path: Path) -> None:
    session = WindowSession(lambda position: bad if position in (5, 6) else 1.0)
    record = Bench(tmp_path, session).run().record
    assert record.status == "invalid"
    assert record.reason is not None
    assert record.reason.startswith(f"2 of {N - 1} losses are not finite: the model overflows in float16")
    assert record.metrics == {}


def test_the_record_is_valid_and_its_key_holds_the_text(tmp_path: Path) -> None:
    keys = set()
    for text in (TEXT, TEXT[:100]):
        bench = Bench(tmp_path, WindowSession(quantization=PACKED), beside=WindowSession(), text=text,
                      options={"quantization": "q4f16_1", "reference": "none"})  # fmt: skip
        record = bench.run().record
        record.env = "sha256:" + "0" * 64
        jsonschema.validate(json.loads(json.dumps(record.to_dict())), schema("record"))
        assert record.case_key == bench.cases[0].key(
            model_revision="sha256:weights", dataset_revision=record.dataset["tokens_hash"]
        )
        keys.add(record.case_key)
    assert len(keys) == 2, "another text is another case"


def test_windows_beyond_the_trained_length_are_invalid(tmp_path: Path) -> None:
    bench = Bench(tmp_path, options={"max_length": "65", "stride": "16"})
    record = bench.run().record
    assert (record.status, record.metrics) == ("invalid", {})
    assert record.reason == "--kv-max-length=65: longer than the 64 tokens that the model was trained for"
    assert Bench(tmp_path, options={"max_length": "64"}).run().record.status == "ok"
    # a model that does not say
    endless = Bench(tmp_path, WindowSession(trained_length=None), options={"max_length": "65"})
    assert endless.run().record.status == "ok"


def test_random_weights_are_skipped_before_anything_is_loaded(tmp_path: Path) -> None:
    bench = Bench(tmp_path, options={"model": "dummy:tiny"})
    record = bench.run().record
    assert record.status == "skipped"
    assert record.reason == "--kv-model=dummy:tiny: random weights have no perplexity; name a real model"
    assert bench.session.calls == []


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "there is no text in it, or blanks only"),
        ("a", {}, "text.txt: the text has one token only"),
        ("ab" * 20, {"ppl_protocol": "llama.cpp-half"}, "--kv-max-length=32: llama.cpp-half needs a text of at least 64"),
    ],
)  # fmt: skip
def test_a_text_that_is_too_short_ends_the_run(
    text: str, options: dict[str, str], message: str, tmp_path: Path
) -> None:
    bench = Bench(tmp_path, options=options, text=text)
    with pytest.raises(UserError) as refused:
        bench.run()
    assert message in str(refused.value)
    assert ("finish",) in bench.session.calls, "the session is left clean"


def twice(folder: Path, **fields: Any) -> Bench:
    """The text under a second name."""
    for name in ("text.txt", "copy.txt"):
        (folder / name).write_text(TEXT, newline="")
    return Bench(
        folder, options={"dataset": f"{folder}/text.txt,{folder}/copy.txt"} | fields.pop("options", {}), **fields
    )


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_of_one_text_the_first_that_was_named_is_the_result(order: tuple[int, int], tmp_path: Path) -> None:
    bench = twice(tmp_path)
    found = {index: bench.run(index).record for index in order}
    assert (found[0].status, found[1].status) == ("ok", "skipped")
    assert found[1].reason == "the same text as text.txt, whose result it is: never two results of one text"
    assert found[1].metrics == {}


def test_a_copy_that_alone_was_selected_is_the_result(tmp_path: Path) -> None:
    bench = twice(tmp_path)
    bench.runner.planned = bench.cases[1:]
    assert bench.run(1).record.status == "ok"


def test_the_same_text_otherwise_is_another_result(tmp_path: Path) -> None:
    bench = twice(tmp_path, options={"quantization": "none,q4f16_1", "ppl_protocol": "hf-strided,disjoint"})
    records = [bench.run(index).record for index in range(8)]
    assert [record.status for record in records] == ["ok"] * 4 + ["skipped"] * 4
    assert all("the same text as text.txt" in str(record.reason) for record in records[4:])


def test_progress_has_the_running_perplexity(tmp_path: Path) -> None:
    bench = Bench(tmp_path, WindowSession(lambda position: math.log(20)))
    bench.run()
    (call,) = [call for call in bench.said if call[0] == "scoring text 1/1"]
    assert call == ("scoring text 1/1", N - 1, N - 1, ", perplexity so far 20.000")
    # a mean that no float can hold the exponential of
    huge = Bench(tmp_path, WindowSession(lambda position: 1e6))
    assert huge.run().record.status != "ok"
    assert any("perplexity so far" in call[3] for call in huge.said if len(call) > 3)
