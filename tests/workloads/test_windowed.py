"""Texts to windows: what is tokenised how, what a prefix rule becomes, what is counted, what is cached."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_checkpoint import TEXT, byte_tokenizer

from kvsuite.case import digest
from kvsuite.errors import CaseInvalid, UserError
from kvsuite.workloads.texts import TextSource
from kvsuite.workloads.windowed import WindowRule, adds_bos, prefix_token
from kvsuite.workloads.windows import plan_windows

BOS, EOS = 256, 257


class Counted:
    """A tokenizer that counts its calls on more than a probe."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.texts = tokenizer, []

    def __call__(self, text: str, **options: Any) -> Any:
        if len(text) > 1:
            self.texts.append(text)
        return self.tokenizer(text, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


@pytest.fixture(scope="module")
def plain() -> Any:
    """Does not begin a text with BOS by itself."""
    return byte_tokenizer()


@pytest.fixture(scope="module")
def beginning() -> Any:
    """Does."""
    return byte_tokenizer(adds_bos=True)


def rule(protocol: str = "hf-strided", **fields: Any) -> WindowRule:
    return WindowRule(
        **({"protocol": protocol, "max_length": 16, "stride": 8, "rule": None, "eval_tokens": None} | fields)
    )


def ids_of(text: str) -> list[int]:
    return byte_tokenizer()(text)["input_ids"]


def workload(**fields: Any) -> dict[str, Any]:
    return {"dataset": "text.txt", "split": "auto", "blank_rows": "keep", "num_samples": 1} | fields


def test_whether_a_tokenizer_begins_with_bos(plain: Any, beginning: Any) -> None:
    assert not adds_bos(plain)
    assert adds_bos(beginning)
    assert not adds_bos(byte_tokenizer(special=False))


def test_the_prefix_token_is_bos_else_eos(plain: Any) -> None:
    assert prefix_token(plain) == BOS
    assert prefix_token(SimpleNamespace(bos_token_id=None, eos_token_id=7)) == 7
    assert prefix_token(SimpleNamespace(bos_token_id=0, eos_token_id=7)) == 0
    assert prefix_token(byte_tokenizer(special=False)) is None


def test_a_protocol_has_its_programs_rule(plain: Any, beginning: Any) -> None:
    assert rule("hf-strided").resolved(beginning) == "none"
    assert rule("disjoint").resolved(beginning) == "none"
    assert rule("lm-eval-rolling").resolved(plain) == "bos_first"
    assert rule("llama.cpp-half").resolved(plain) == "none"
    assert rule("llama.cpp-half").resolved(beginning) == "bos_over_first"
    assert rule("hf-strided", rule="bos_first").resolved(plain) == "bos_first"


def test_a_rule_that_puts_bos_there_takes_the_text_without_it(beginning: Any) -> None:
    bare = ids_of("abcdef")
    for name in ("none", "bos_over_first"):
        assert rule().cut(beginning, "abcdef", name).tokens == [BOS, *bare]
    for name in ("bos_first", "bos_each_window"):
        assert rule().cut(beginning, "abcdef", name).tokens == bare


def test_windows_are_planned_for_the_tokens(plain: Any) -> None:
    found = rule().cut(plain, TEXT, "none")
    assert found.tokens == ids_of(TEXT)
    assert found.windows == plan_windows("hf-strided", len(found.tokens), 16, 8)
    rolling = rule("lm-eval-rolling", stride=16).cut(plain, TEXT, "bos_first")
    assert sum(window.targets for window in rolling.windows) == len(found.tokens)


@given(most=st.integers(2, 60), n=st.integers(2, 60))
def test_the_first_tokens_and_exactly_their_characters(most: int, n: int) -> None:
    text = (TEXT[8:] * 2)[:n]
    found = rule("lm-eval-rolling", eval_tokens=most).cut(byte_tokenizer(), text, "bos_first")
    kept = text[: min(most, n)]
    assert found.tokens == ids_of(kept)
    assert found.counts is not None
    assert (found.counts.utf8_bytes, found.counts.words) == (len(kept.encode()), len(re.split(r"\s+", kept)))


def test_a_cut_inside_text_with_bos_counts_no_characters_for_it(beginning: Any) -> None:
    found = rule(eval_tokens=5).cut(beginning, "ab cd ef", "none")
    assert found.tokens == [BOS, *ids_of("ab c")]
    assert found.counts is not None
    assert (found.counts.utf8_bytes, found.counts.words) == (4, 2)


def test_a_tokenizer_that_cannot_say_what_it_cut(plain: Any) -> None:
    class Slow:
        """Knows no offsets, as tokenizers written in Python."""

        is_fast = False

        def __call__(self, text: str, *, return_offsets_mapping: bool, **options: Any) -> Any:
            assert not return_offsets_mapping, "it would raise"
            return {"input_ids": list(text.encode())}

    assert rule(eval_tokens=5).cut(Slow(), "ab cd ef", "none").counts is None
    # the whole text is what was scored
    whole = rule(eval_tokens=8).cut(Slow(), "ab cd ef", "none")
    assert whole.counts is not None
    assert whole.counts.utf8_bytes == 8


@pytest.mark.parametrize(
    ("text", "asked", "message"),
    [
        ("", rule(), "--kv-dataset: the text is empty"),
        ("a", rule(), "--kv-dataset: the text has one token only, and a perplexity needs at least 2"),
        ("ab" * 15, rule("llama.cpp-half"), "--kv-max-length=16: llama.cpp-half needs a text of at least 32 tokens, this"),
        ("abc", rule(stride=17), "--kv-stride=17: longer than the window of 16 tokens"),
    ],
)  # fmt: skip
def test_too_short(plain: Any, text: str, asked: WindowRule, message: str) -> None:
    with pytest.raises(UserError) as refused:
        asked.cut(plain, text, asked.resolved(plain))
    assert str(refused.value).startswith(message)


def source(tmp_path: Path, text: str = TEXT, name: str = "text.txt") -> TextSource:
    (tmp_path / name).write_text(text, newline="")
    return TextSource(datasets={name: str(tmp_path / name)})


def test_without_a_tokenizer_no_text_can_be_cut(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--kv-model: .*no tokenizer"):
        source(tmp_path).windowed(SimpleNamespace(tokenizer=None, vocab_size=258), workload(), rule())


@pytest.mark.parametrize("given", ["text", "bos_first"])
def test_a_token_without_a_row_is_named_with_rows_and_tokenizer(given: str, tmp_path: Path) -> None:
    session = SimpleNamespace(tokenizer=byte_tokenizer(), vocab_size=60 if given == "text" else 256)
    asked = rule(rule=None if given == "text" else given)
    with pytest.raises(CaseInvalid, match=r"the text has token \d+, .* has \d+ rows: the tokenizer \(.*, 258 tokens\)"):
        source(tmp_path).windowed(session, workload(), asked)


def test_the_record_knows_where_the_tokens_come_from(tmp_path: Path, plain: Any) -> None:
    found = source(tmp_path).windowed(SimpleNamespace(tokenizer=plain, vocab_size=258), workload(), rule())
    (text,) = found.texts
    assert found.revision == digest([digest(ids_of(TEXT))])
    assert (found.rule, found.prefix_token) == ("none", BOS)
    facts = found.facts
    assert (facts["name"], facts["bos"], facts["texts"], facts["split"]) == ("text.txt", "none", 1, None)
    assert facts["windows"] == len(text.windows)
    assert facts["text_hash"] == "sha256:" + hashlib.sha256(TEXT.encode()).hexdigest()
    assert facts["tokens_hash"] == found.revision
    assert facts["source"] == str(tmp_path / "text.txt")


def test_fewer_tokens_are_another_revision_of_the_same_text(tmp_path: Path, plain: Any) -> None:
    texts, session = source(tmp_path), SimpleNamespace(tokenizer=plain, vocab_size=258)
    whole = texts.windowed(session, workload(), rule())
    part = texts.windowed(session, workload(), rule(eval_tokens=20))
    assert whole.facts["text_hash"] == part.facts["text_hash"]
    assert whole.revision != part.revision
    # windows are not text
    assert texts.windowed(session, workload(), rule(stride=4)).revision == whole.revision


def test_a_text_is_tokenised_once_for_a_session(tmp_path: Path, plain: Any) -> None:
    texts, tokenizer = source(tmp_path), Counted(plain)
    session = SimpleNamespace(tokenizer=tokenizer, vocab_size=258)
    first = texts.windowed(session, workload(), rule())
    assert texts.windowed(session, workload(), rule()).texts is first.texts
    assert tokenizer.texts == [TEXT]
    # another model may have another tokenizer
    other = SimpleNamespace(tokenizer=Counted(byte_tokenizer(adds_bos=True)), vocab_size=258)
    assert texts.windowed(other, workload(), rule()).texts[0].tokens == [BOS, *ids_of(TEXT)]
    assert texts.windowed(session, workload(), rule()).texts[0].tokens == ids_of(TEXT)


def test_a_path_is_read_in_place_of_the_named_data_set(tmp_path: Path, plain: Any) -> None:
    path = tmp_path / "wiki.test.raw"
    path.write_text(TEXT, newline="")
    texts = TextSource(datasets={"wikitext2": "wikitext2"}, dataset_path=str(path))
    found = texts.windowed(SimpleNamespace(tokenizer=plain, vocab_size=258), workload(dataset="wikitext2"), rule())
    assert found.texts[0].tokens == ids_of(TEXT)
    assert (found.facts["name"], found.facts["source"]) == ("wikitext2", str(path))


def test_several_texts_have_windows_of_their_own(plain: Any) -> None:
    texts = TextSource(datasets={"default": "default"})
    found = texts.windowed(
        SimpleNamespace(tokenizer=plain, vocab_size=258),
        workload(dataset="default", num_samples=2),
        rule(eval_tokens=40),
    )
    assert [len(text.tokens) for text in found.texts] == [40, 40]
    assert found.texts[0].tokens != found.texts[1].tokens
    assert all(text.windows == plan_windows("hf-strided", 40, 16, 8) for text in found.texts)
    assert found.facts["windows"] == 2 * len(found.texts[0].windows)


def test_a_text_of_one_token_is_named(tmp_path: Path, plain: Any) -> None:
    session, texts = SimpleNamespace(tokenizer=plain, vocab_size=258), source(tmp_path, "a")
    with pytest.raises(UserError) as refused:
        texts.windowed(session, workload(), rule())
    assert str(refused.value).startswith(f"--kv-dataset={tmp_path / 'text.txt'}: the text has one token only")
    named = TextSource(datasets={"wikitext2": "wikitext2"}, dataset_path=str(tmp_path / "text.txt"))
    with pytest.raises(UserError) as refused:
        named.windowed(session, workload(dataset="wikitext2"), rule())
    assert str(refused.value).startswith(f"--kv-dataset-path={tmp_path / 'text.txt'}: the text has one token only")


def test_an_empty_file_is_named(tmp_path: Path, plain: Any) -> None:
    with pytest.raises(UserError) as refused:
        source(tmp_path, " \n").windowed(SimpleNamespace(tokenizer=plain, vocab_size=258), workload(), rule())
    assert str(refused.value).startswith(f"--kv-dataset={tmp_path / 'text.txt'}: there is no text in it")


@pytest.mark.parametrize(
    ("asked", "mend"),
    [
        (rule("lm-eval-rolling"), "give another --kv-ppl-protocol"),
        (rule("hf-strided", rule="bos_first"), "give --kv-bos=none"),
        (rule("llama.cpp-half", rule="bos_over_first"), "give --kv-bos=none"),
    ],
)
def test_a_rule_without_its_token(asked: WindowRule, mend: str) -> None:
    bare = byte_tokenizer(special=False)
    with pytest.raises(UserError) as refused:
        asked.resolved(bare)
    assert str(refused.value).startswith("--kv-bos=bos_")
    assert "neither a BOS nor an EOS token" in str(refused.value)
    assert str(refused.value).endswith(mend)
    assert rule("llama.cpp-half").resolved(bare) == "none"
