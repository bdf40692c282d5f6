"""Cases of the perplexity suite: order, names, dtypes, the original's model rule, and what is refused."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsuite.case import Case
from kvsuite.errors import UserError
from kvsuite.options.resolve import default_options
from kvsuite.quantization.registry import QUANTIZATIONS
from kvsuite.suites.compression.cases import compression_cases
from kvsuite.suites.perplexity.cases import perplexity_cases
from kvsuite.suites.registry import cases_of, require_measurable

MLC = "HF://mlc-ai/Llama-3-8B-Instruct-q0f16-MLC"
PROTOCOLS = ("hf-strided", "hf-docs", "disjoint", "lm-eval-rolling", "llama.cpp-half")


def cases(**options: str) -> list[Case]:
    return perplexity_cases(default_options(**({"device": "cpu"} | options)))


def ids(**options: str) -> list[str]:
    return [case.id for case in cases(**options)]


def refusal(**options: str) -> str:
    with pytest.raises(UserError) as refused:
        cases(**options)
    return str(refused.value)


def test_the_default_is_three_formats_of_the_embedded_text() -> None:
    assert ids() == ["default-none", "default-q4f16_1", "default-fake_q3"]
    assert [case.quantization for case in cases()] == [None, "q4f16_1", "fake_q3"]
    assert {(case.suite, case.engine, case.policy) for case in cases()} == {("perplexity", "hf", None)}


def test_ids_are_data_set_and_format() -> None:
    found = ids(dataset="wikitext2,c4", quantization="none,4bit,fake_q3")
    assert found == ["wikitext2-none", "wikitext2-4bit", "wikitext2-fake_q3", "c4-none", "c4-4bit", "c4-fake_q3"]


def test_the_protocol_is_in_the_name_only_where_there_are_several() -> None:
    assert ids(ppl_protocol="disjoint", quantization="none") == ["default-none"]
    found = cases(ppl_protocol="hf-strided,llama.cpp-half", quantization="none,8bit", dataset="wikitext2,pg19")
    assert [case.name for case in found] == [
        "wikitext2-none-hf-strided", "wikitext2-8bit-hf-strided", "wikitext2-none-llama.cpp-half",
        "wikitext2-8bit-llama.cpp-half", "pg19-none-hf-strided", "pg19-8bit-hf-strided", "pg19-none-llama.cpp-half",
        "pg19-8bit-llama.cpp-half",
    ]  # fmt: skip
    assert [case.workload["protocol"] for case in found[1:3]] == ["hf-strided", "llama.cpp-half"]


def test_every_id_can_be_selected_and_written() -> None:
    found = ids(
        dataset="default,wikitext2,wikitext103,pg19,c4",
        quantization=",".join(QUANTIZATIONS),
        ppl_protocol=",".join(PROTOCOLS),
        max_length="512",
        stride="512",
    )
    assert len(found) == len(set(found)) == 5 * len(QUANTIZATIONS) * len(PROTOCOLS)
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+", one) for one in found)


def test_a_file_is_named_without_its_folder() -> None:
    (case,) = cases(dataset="/some/where/my text.txt", quantization="none")
    assert (case.name, case.id) == ("my text.txt-none", "my_text.txt-none")
    assert case.workload["dataset"] == "my text.txt"


def test_two_files_of_one_name_are_refused() -> None:
    message = refusal(dataset="a/wiki.txt,b/wiki.txt")
    assert message.startswith("--kv-dataset=a/wiki.txt,b/wiki.txt: two of the files have one name")
    assert "run them apart" in message


def test_one_path_for_two_data_sets_is_refused() -> None:
    message = refusal(dataset="wikitext2,c4", dataset_path="wiki.test.raw")
    assert message.startswith("--kv-dataset-path=wiki.test.raw: ")
    assert "--kv-dataset names 2" in message
    assert ids(dataset="wikitext2", dataset_path="wiki.test.raw", quantization="none") == ["wikitext2-none"]


def test_the_original_switches() -> None:
    assert ids(load_in_4bit="true") == ["default-4bit"]
    assert ids(load_in_8bit="true") == ["default-8bit"]
    assert ids(fake_q3bit="true") == ["default-fake_q3"]


@pytest.mark.parametrize(
    ("options", "typed", "mend"),
    [
        (("load_in_4bit", "load_in_8bit"), "--kv-load-in-4bit and --kv-load-in-8bit", "4bit,8bit"),
        (("load_in_4bit", "fake_q3bit"), "--kv-load-in-4bit and --kv-fake-q3bit", "4bit,fake_q3"),
        (("load_in_8bit", "fake_q3bit"), "--kv-load-in-8bit and --kv-fake-q3bit", "8bit,fake_q3"),
        (("load_in_4bit", "load_in_8bit", "fake_q3bit"), "--kv-load-in-4bit and --kv-load-in-8bit and", "4bit,8bit,fake_q3"),
    ],
)  # fmt: skip
def test_switches_exclude_each_other(options: tuple[str, ...], typed: str, mend: str) -> None:
    message = refusal(**dict.fromkeys(options, "true"))
    assert message.startswith(typed)
    assert message.endswith(f"--kv-quantization={mend}")


@pytest.mark.parametrize("switch", ["load_in_4bit", "load_in_8bit", "fake_q3bit"])
def test_a_switch_beside_the_list_is_refused(switch: str) -> None:
    message = refusal(**{switch: "true", "quantization": "none,q4f16_1"})
    assert message.startswith(f"--kv-{switch.replace('_', '-')} and --kv-quantization: ")


def test_a_switch_that_is_off_hides_nothing() -> None:
    assert ids(load_in_4bit="false", quantization="none") == ["default-none"]


def test_an_unknown_format_lists_the_known_ones() -> None:
    message = refusal(quantization="q5")
    assert message.startswith("--kv-quantization=q5: unknown weight format q5; use none, ")
    assert all(name in message for name in QUANTIZATIONS)


def test_stride_beyond_the_window_names_both() -> None:
    message = refusal(max_length="32", stride="33")
    assert message.startswith("--kv-stride=33: ")
    assert "window of 32 tokens" in message
    assert "--kv-stride of at most 32" in message
    assert "--kv-max-length" in message
    assert [case.workload["stride"] for case in cases(max_length="32", stride="32", quantization="none")] == [32]


def test_a_prefix_in_each_window_takes_a_token_of_it() -> None:
    assert "window of 31 tokens" in refusal(max_length="32", stride="32", bos="bos_each_window")
    assert ids(max_length="32", stride="31", bos="bos_each_window", quantization="none") == ["default-none"]


def test_a_rule_that_the_protocol_cannot_have_is_refused() -> None:
    message = refusal(ppl_protocol="lm-eval-rolling", bos="none")
    assert message.startswith("--kv-bos=none: lm-eval-rolling cannot have it; choose one of auto, bos_first or another")
    # also where only one of several protocols cannot
    assert refusal(ppl_protocol="hf-strided,llama.cpp-half", bos="bos_first").startswith(
        "--kv-bos=bos_first: llama.cpp"
    )


@given(
    max_length=st.integers(1, 5000),
    stride=st.integers(-2, 6000),
    protocols=st.lists(st.sampled_from(PROTOCOLS), min_size=1, unique=True),
)
def test_sizes(max_length: int, stride: int, protocols: list[str]) -> None:
    options = {"max_length": str(max_length), "stride": str(stride), "ppl_protocol": ",".join(protocols)}
    impossible = max_length < 3 or stride < 1
    # only two protocols have a stride of their own to be wrong
    strided = {"hf-strided", "hf-docs"}
    if impossible or (stride > max_length and strided & set(protocols)):
        message = refusal(**options)
        assert message.startswith("--kv-max-length=" if max_length < 3 else f"--kv-stride={stride}: ")
        return
    found = cases(**options, quantization="none,fake_q3")
    assert [(case.workload["protocol"], case.workload["stride"]) for case in found] == [
        (protocol, stride if protocol in strided else max_length) for protocol in protocols for _ in range(2)
    ]
    assert {case.workload["max_length"] for case in found} == {max_length}


@pytest.mark.parametrize("asked", ["auto", "float32", "bfloat16"])
@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_dtype_is_the_formats_before_the_users(asked: str, device: str) -> None:
    found = {c.quantization: c.dtype for c in cases(dtype=asked, device=device, quantization=",".join(QUANTIZATIONS))}
    free = {"auto": {"cpu": "float32", "cuda:0": "checkpoint"}[device]}.get(asked, asked)
    assert {name: found[name] for name in (None, "fake_q3", "4bit", "8bit")} == dict.fromkeys(
        (None, "fake_q3", "4bit", "8bit"), free
    )
    half = {name for name in found if name and "f16" in name}
    assert {"q0f16", "q3f16_1", "q4f16_0", "q4f16_1"} <= half
    assert {found[name] for name in half} == {"float16"}
    assert (found["q0f32"], found["q4f32_1"]) == ("float32", "float32")


def test_the_label_of_an_mlc_model_names_its_counterpart() -> None:
    found = cases(mlc_model=MLC)
    assert {case.model for case in found} == {"meta-llama/Meta-Llama-3-8B"}
    assert {case.params["mlc_model"] for case in found} == {MLC}
    # a model of one's own is scored, and the label stands beside it
    (case,) = cases(mlc_model=MLC, model="org/mine", quantization="none")
    assert (case.model, case.params["mlc_model"]) == ("org/mine", MLC)
    (case,) = cases(mlc_model="HF://mlc-ai/Qwen3-8B-q4f16_1-MLC", model="Qwen/Qwen3-8B", quantization="none")
    assert case.model == "Qwen/Qwen3-8B"
    assert cases(quantization="none")[0].params["mlc_model"] is None


def test_another_label_names_no_model() -> None:
    message = refusal(mlc_model="HF://mlc-ai/Qwen3-8B-q4f16_1-MLC")
    assert message.startswith("--kv-mlc-model=HF://mlc-ai/Qwen3-8B-q4f16_1-MLC: ")
    assert message.endswith("give --kv-hf-model as well")


def test_the_original_preset() -> None:
    (case,) = cases(preset="original", quantization="none")
    assert (case.id, case.model) == ("wikitext2-none", "meta-llama/Meta-Llama-3-8B")
    workload = case.workload
    assert (workload["max_length"], workload["stride"], workload["split"]) == (2048, 512, "test")
    assert (workload["protocol"], workload["blank_rows"], workload["eval_tokens"]) == ("hf-strided", "drop", None)
    assert case.params["mlc_model"] == MLC
    (case,) = cases(preset="original", quantization="none", model="smollm2", max_length="1024", eval_tokens="5000")
    assert (case.model, case.workload["max_length"], case.workload["eval_tokens"]) == ("smollm2", 1024, 5000)


def test_the_reference_is_part_of_every_case() -> None:
    assert {case.params["reference"] for case in cases()} == {None}
    found = cases(reference="none", dtype="bfloat16")
    assert all(case.params["reference"] == {"quantization": None, "dtype": "bfloat16"} for case in found)
    found = cases(reference="q4f16_1", dtype="bfloat16")
    assert all(case.params["reference"] == {"quantization": "q4f16_1", "dtype": "float16"} for case in found)
    assert refusal(reference="q5").startswith("--kv-reference=q5: unknown weight format")


def test_whatever_decides_the_number_decides_the_key() -> None:
    def key(**options: str) -> str:
        (case,) = cases(**({"quantization": "none"} | options))
        return case.key(model_revision=None, dataset_revision=None)

    changes = (
        {"max_length": "256"}, {"stride": "128"}, {"bos": "bos_first"}, {"eval_tokens": "all"}, {"blank_rows": "drop"},
        {"split": "train"}, {"num_samples": "2"}, {"dataset": "pydoc"}, {"ppl_protocol": "disjoint"}, {"dtype": "float16"},
        {"quantization": "q0f32"},
    )  # fmt: skip
    keys = [key(), *(key(**change) for change in changes)]
    assert len(set(keys)) == len(keys)
    # how often and where is not what
    assert key(rounds="3", device="cpu", num_warmup="1", seed="9") == key()


def test_compression_groups_by_format() -> None:
    found = compression_cases(
        default_options(device="cpu", quantization="none,q4f16_1", recent_sizes="60", no_recent_only="true")
    )
    assert [(case.name, case.quantization, case.dtype) for case in found] == [
        ("baseline", None, "float32"),
        ("streaming_64", None, "float32"),
        ("baseline_q4f16_1", "q4f16_1", "float16"),
        ("streaming_64_q4f16_1", "q4f16_1", "float16"),
    ]
    assert found[3].id == "hf-streaming_64_q4f16_1"
    assert found[1].policy_params == found[3].policy_params
    assert [case.quantization for case in compression_cases(default_options(device="cpu", load_in_4bit="true"))] == [
        "4bit"
    ] * 7


def test_a_dummy_has_no_perplexity() -> None:
    options = default_options(model="dummy:tiny", device="cpu")
    with pytest.raises(UserError, match=r"^--kv-model=dummy:tiny: random weights have no perplexity"):
        require_measurable(cases_of("perplexity", options))
    # beside a suite that has more to say, its rows say so
    require_measurable(cases_of("perplexity", options) + cases_of("compression", options))
    require_measurable(cases_of("perplexity", default_options(device="cpu")))
    require_measurable([])
