"""Options of the perplexity suite."""

# no postponed annotations: an option that is written wrongly is an error where it stands

from typing import Annotated

from kvsuite.options.option import Option, OptionGroup, choice, label, list_of, off_or, path_or_name, text, whole_number


def _reference(typed: str) -> str | None:
    if "," in typed:
        raise ValueError("one weight format is wanted, not a list")
    return off_or(text)(typed)


class PerplexityOptions(OptionGroup, frozen=True, kw_only=True):
    """Texts, windows, and what they are compared with."""

    # fmt: off
    dataset: Annotated[tuple[str, ...], Option(
        list_of(path_or_name), "default",
        "Texts of the perplexity suite, comma separated: default (embedded), pydoc, wikitext2, wikitext103, "
        "pg19, c4, or a local file or folder, e.g. --kv-dataset=wikitext2,c4.",
        original="wikitext2",
    )]
    dataset_path: Annotated[str | None, Option(
        path_or_name, "",
        "Local text, parquet, arrow or saved data set to read for the one --kv-dataset, which stays its name, "
        "e.g. --kv-dataset=wikitext2 --kv-dataset-path=wiki.test.raw.",
    )]
    split: Annotated[str, Option(
        choice("auto", "train", "validation", "test"), "auto",
        "Split of a data set; auto is test, or validation of c4, which has no test split.",
        original="test",
    )]
    blank_rows: Annotated[str, Option(
        choice("keep", "drop"), "keep",
        "Whether blank rows of WikiText belong to its text: keep (the Hugging Face documentation), drop (the "
        "original program).",
        original="drop",
    )]
    ppl_protocol: Annotated[tuple[str, ...], Option(
        list_of(choice("hf-strided", "hf-docs", "disjoint", "lm-eval-rolling", "llama.cpp-half")), "hf-strided",
        "Windows of the perplexity suite, comma separated: hf-strided (the original program's), hf-docs "
        "(the Hugging Face documentation's), disjoint, lm-eval-rolling, llama.cpp-half.",
    )]
    max_length: Annotated[int, Option(
        whole_number(3), "512",
        "Tokens in a window of the perplexity suite.",
        original="2048",
    )]
    stride: Annotated[int, Option(
        whole_number(1), "256",
        "Step from window to window of hf-strided and hf-docs, at most --kv-max-length.",
        original="512",
    )]
    bos: Annotated[str, Option(
        choice("auto", "none", "bos_first", "bos_each_window", "bos_over_first"), "auto",
        "Token before a text or window: auto is the protocol's own rule; the others are in docs/perplexity.md.",
    )]
    reference: Annotated[str | None, Option(
        _reference, "off",
        "Weight format that the others of a run are compared with, token by token (KL divergence, same top-1, "
        "paired ratio), e.g. --kv-reference=none, or off.",
        example="none",
    )]
    mlc_model: Annotated[str | None, Option(
        label, "",
        "Label of the MLC model beside a perplexity; none is run. Without --kv-model it names the Hugging Face "
        "model too, for Llama-3-8B-Instruct as in the original program.",
        original="HF://mlc-ai/Llama-3-8B-Instruct-q0f16-MLC", example="Llama-3-8B-Instruct-q4f16_1-MLC",
    )]
    # fmt: on
