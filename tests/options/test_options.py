"""Options: where a value comes from, how it is parsed, what is refused."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from resolved_values import value_of

from kvsuite.errors import UserError
from kvsuite.foreign_text import VALUE_LIMIT, visible
from kvsuite.options.common import CommonOptions
from kvsuite.options.groups import all_options
from kvsuite.options.numbers import LEAST_RATIO, MOST_TOKENS
from kvsuite.options.option import Option
from kvsuite.options.resolve import Options, add_options, default_options, resolve_options
from kvsuite.options.shard import Shard
from kvsuite.suites.compression.options import CompressionOptions

OPTIONS = all_options()
BY_NAME = {option.name: option for option in OPTIONS}


def resolve(cli: dict[str, str] | None = None, ini: dict[str, str] | None = None) -> Options:
    return resolve_options(lambda dest: (cli or {}).get(dest), lambda dest: (ini or {}).get(dest))


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for option in OPTIONS:
        monkeypatch.delenv(option.dest.upper(), raising=False)


# another value than the default for each option, as typed and as resolved
OTHER: dict[str, tuple[str, Any]] = {
    "cluster": ("ray://head:10001", "ray://head:10001"),
    "cluster-cores": ("8", 8),
    "model": ("dummy:tiny", "dummy:tiny"),
    "device": ("vulkan:1", "vulkan:1"),
    "dtype": ("bf16", "bfloat16"),
    "engine": ("hf", "hf"),
    "quantization": ("none,q4f16_1", ("none", "q4f16_1")),
    "load-in-4bit": ("true", True),
    "load-in-8bit": ("true", True),
    "fake-q3bit": ("true", True),
    "dataset": ("wikitext2,c4", ("wikitext2", "c4")),
    "dataset-path": ("/texts/wiki.raw", "/texts/wiki.raw"),
    "split": ("validation", "validation"),
    "blank-rows": ("drop", "drop"),
    "ppl-protocol": ("disjoint,llama.cpp-half", ("disjoint", "llama.cpp-half")),
    "max-length": ("2048", 2048),
    "stride": ("512", 512),
    "bos": ("bos_first", "bos_first"),
    "eval-tokens": ("all", None),
    "reference": ("none", "none"),
    "mlc-python": ("/opt/mlc/bin/python", "/opt/mlc/bin/python"),
    "model-lib": ("model-vulkan.so", "model-vulkan.so"),
    "flash-attention": ("off", "off"),
    "ubatch": ("64", 64),
    "gguf-type": ("q8_0", "q8_0"),
    "mlc-opt": ("cudagraph=1;flashinfer=0", "cudagraph=1;flashinfer=0"),
    "mlc-timeout": ("20", 20),
    "mlc-compile-timeout": ("60", 60),
    "mlc-model": ("HF://mlc-ai/any-q4f16_1-MLC", "HF://mlc-ai/any-q4f16_1-MLC"),
    "task": ("facts1,copy", ("facts1", "copy")),
    "task-lengths": ("128,512", (128, 512)),
    "task-depths": ("0.25,1", (0.25, 1.0)),
    "task-samples": ("48", 48),
    "task-methods": ("full,snapkv(keep_ratio=[0.2,0.5])", ("full", "snapkv(keep_ratio=[0.2,0.5])")),
    "task-bound": ("0.5", 0.5),
    "lm-eval": ("arc_easy,mine.yaml", ("arc_easy", "mine.yaml")),
    "tasks-path": ("LongBench/hotpotqa.jsonl", "LongBench/hotpotqa.jsonl"),
    "server-url": ("http://gpu:8000/v1/", "http://gpu:8000"),
    "server-model": ("my-llama", "my-llama"),
    "server-timeout": ("20", 20),
    "vllm-python": ("/opt/vllm/bin/python", "/opt/vllm/bin/python"),
    "vllm-timeout": ("20", 20),
    "vllm-block-size": ("32", 32),
    "vllm-pool-bytes": ("1073741824", 1073741824),
    "vllm-tensor-parallel-size": ("2", 2),
    "vllm-attention-backend": ("FLASH_ATTN", "FLASH_ATTN"),
    "vllm-max-capture-size": ("128", 128),
    "models": ("smollm2,dummy:tiny", ("smollm2", "dummy:tiny")),
    "workloads": ("heavy-trace, synthetic-identical", ("heavy-trace", "synthetic-identical")),
    "variants": ("baseline,auto-tune+greenctx", ("baseline", "auto-tune+greenctx")),
    "pipeline-method": ("snapkv(window=[8,16]),knorm", ("snapkv(window=[8,16])", "knorm")),
    "factors": ("1,2.5", (1, 2.5)),
    "async-compression": ("off", False),
    "decode-layers-per-step": ("off,4", (None, 4)),
    "dataset-dir": ("/data/prompts", "/data/prompts"),
    "trace-conv": ("/data/trace.csv", "/data/trace.csv"),
    "synthetic-context": ("4096", 4096),
    "synthetic-output": ("0", 0),
    "synthetic-dialogue": ("true", True),
    "synthetic-token": ("Hello", "Hello"),
    "synthetic-num-batches": ("2", 2),
    "synthetic-batch-sizes": ("32,64", (32, 64)),
    "pipeline-batch-sizes": ("16", (16,)),
    "pipeline-image": ("photos/one.png", "photos/one.png"),
    "pool-blocks": ("4096", 4096),
    "pool-bytes": ("1000000", 1000000),
    "max-model-len": ("8192", 8192),
    "max-running": ("64", 64),
    "step-tokens": ("2048", 2048),
    "chunk-sizes": ("256,512", (256, 512)),
    "greenctx-sms": ("64:64,32:96", ((64, 64), (32, 96))),
    "greenctx-compress-ratio": ("0.2,0.5", (0.2, 0.5)),
    "greenctx-main-ratio": ("0.8", (0.8,)),
    "greenctx-main-stream": ("off", False),
    "replay-decisions": ("decisions.json", "decisions.json"),
    "arrivals": ("trace", "trace"),
    "arrival-rate": ("2.5", 2.5),
    "capacity": ("0.5:8", (0.5, 8.0)),
    "trace-time-scale": ("4", 4.0),
    "concurrency": ("8", 8),
    "slo": ("200ms:50ms", "200ms:50ms"),
    "served-quality": ("off", False),
    "sensitivity": ("int4(group=32),int4_channel", ("int4(group=32)", "int4_channel")),
    "sensitivity-base": ("auto", "auto"),
    "sensitivity-budget": ("6.5,40%", ((6.5, "bits"), (40.0, "share"))),
    "sensitivity-tokens": ("256", 256),
    "pipeline-json": ("/tmp/matrix.json", "/tmp/matrix.json"),
    "method": ("recent_only, kvpress:SnapKV", ("recent_only", "kvpress:SnapKV")),
    "compare-all": ("true", True),
    "no-baseline": ("yes", True),
    "no-recent-only": ("1", True),
    "keep-ratios": ("1.0,0.25", (1.0, 0.25)),
    "prune-after": ("0", 0),
    "l2-mode": ("interval=16", "interval=16"),
    "fix-kv-sizes": ("7", (7,)),
    "strategies": ("keep_high,random", ("keep_high", "random")),
    "start-size": ("0", 0),
    "recent-sizes": ("252,508", (252, 508)),
    "skip-layers": ("0,1", (0, 1)),
    "positions": ("both", "both"),
    "protocol": ("prefix-continuation", "prefix-continuation"),
    "corpus": ("pydoc", "pydoc"),
    "num-samples": ("3", 3),
    "max-tokens": ("2000", 2000),
    "prompt-tokens": ("1500", 1500),
    "max-new-tokens": ("500", 500),
    "num-warmup": ("0", 0),
    "rounds": ("9", 9),
    "space": ("schemes", "schemes"),
    "dse": ("on", True),
    "context-window-size": ("1024", 1024),
    "prefill-chunk-size": ("256", 256),
    "max-batch-size": ("16", 16),
    "sliding-window-size": ("off", -1),
    "attention-sink-size": ("4", 4),
    "prompt-share": ("0.25", 0.25),
    "prefix-caching": ("true", True),
    "decode-step": ("eager", "eager"),
    "attention": ("eager", "eager"),
    "impl": ("copy", "copy"),
    "divergence": ("off", False),
    "cache-dtype": ("auto, int8:int4(group=32)", ("auto", "int8:int4(group=32)")),
    "threads": ("4", 4),
    "seed": ("17", 17),
    "report-dir": ("/tmp/runs", "/tmp/runs"),
    "compare": ("reports/run_1", "reports/run_1"),
    "fail": ("default, peak_vram:+2%", "default, peak_vram:+2%"),
    "compressor-path": ("weights.pth", "weights.pth"),
    "cache-dir": ("/tmp/cache", "/tmp/cache"),
    "timeout": ("60", 60.0),
    "resume": ("latest", "latest"),
    "resume-rerun": ("oom,error", ("oom", "error")),
    "shard": ("2/3", Shard(2, 3)),
    "plan": ("true", True),
    "nodes": ("8xH200,2xL40S", "8xH200,2xL40S"),
    "node-hours": ("24", 24.0),
    "plan-card": ("24GiB", "24GiB"),
    "preset": ("original", "original"),
}


def test_the_table_above_is_whole() -> None:
    assert set(OTHER) == set(BY_NAME)


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_every_source_and_their_precedence(option: Option, monkeypatch: pytest.MonkeyPatch) -> None:
    text, value = OTHER[option.name]
    default = value_of(resolve(), option.field)
    assert default != value
    assert option.field not in resolve().given

    from_ini = resolve(ini={option.dest: text})
    assert value_of(from_ini, option.field) == value
    assert from_ini.given == {option.field}
    # a switch has no third value, so that the losing source says what the default says
    losing = option.default or "/somewhere/else"
    monkeypatch.setenv(option.dest.upper(), text)
    assert value_of(resolve(ini={option.dest: losing}), option.field) == value
    monkeypatch.setenv(option.dest.upper(), losing)
    typed = resolve(cli={option.dest: text}, ini={option.dest: losing})
    assert value_of(typed, option.field) == value
    monkeypatch.setenv(option.dest.upper(), "")
    assert value_of(resolve(ini={option.dest: text}), option.field) == value, "an empty variable is not set"


class RecordingParser:
    """Takes what `add_options` declares, as pytest's parser does."""

    def __init__(self) -> None:
        self.options: dict[str, dict[str, Any]] = {}
        self.ini: set[str] = set()

    def getgroup(self, name: str, description: str) -> RecordingParser:
        return self

    def addoption(self, *names: str, **kwargs: Any) -> None:
        for name in names:
            assert name not in self.options, f"{name} is declared twice"
            self.options[name] = kwargs

    def addini(self, name: str, help: str, default: Any = None) -> None:
        self.ini.add(name)


@pytest.fixture
def declared() -> RecordingParser:
    parser = RecordingParser()
    add_options(parser)
    return parser


def test_both_spellings_set_the_same_value(declared: RecordingParser) -> None:
    for option in OPTIONS:
        for name in (option.name, *option.aliases):
            for spelling in (f"--kv-{name}", f"--kv_{name.replace('-', '_')}"):
                assert declared.options[spelling]["dest"] == option.dest
                assert declared.options[spelling]["default"] is None, "else it could not be told from a given value"
    assert declared.ini == {option.dest for option in OPTIONS}


# systems.md 4.2: the options of the program that the suite replaces, with their defaults
ORIGINAL_DEFAULTS = {
    "model_id": "EleutherAI/pythia-2.8b",
    "num_samples": 2,
    "max_tokens": 2000,
    "max_new_tokens": 500,
    "skip_layers": (0, 1),
    "no_baseline": False,
    "no_recent_only": False,
    "num_warmup": 3,
    "keep_ratios": (0.8, 0.5, 0.3),
    "prune_after": 100,
    "fix_kv_sizes": (256, 512),
    "strategies": ("keep_low",),
    "start_size": 4,
    "recent_sizes": (252, 508, 1020),
    "compare_all": False,
}
ORIGINAL_WITHOUT_COUNTERPART = {
    "classifications_path", "compare_new", "heavy_hitter_sizes", "h2o_recent_size", "observation_windows",
    "snapkv_keep_sizes", "base_sizes", "layer_decay", "min_size", "pyramid_profile", "target_sizes", "soft_limit",
    "hard_limit",
}  # fmt: skip


def test_preset_original_has_the_defaults_of_the_original() -> None:
    options = resolve(cli={"kv_preset": "original"}).to_dict()
    options["model_id"] = options["model"]
    assert {name: options[name] for name in ORIGINAL_DEFAULTS} == {
        name: list(value) if isinstance(value, tuple) else value for name, value in ORIGINAL_DEFAULTS.items()
    }
    assert (options["corpus"], options["l2_mode"], options["positions"]) == ("pg19", "every_token", "original")


def test_a_given_value_beats_the_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KV_PRESET", "original")
    assert resolve(cli={"kv_recent_sizes": "28"}).of(CompressionOptions).recent_sizes == (28,)
    assert resolve().of(CompressionOptions).recent_sizes == (252, 508, 1020)


def test_every_option_of_the_original_exists_or_is_refused(declared: RecordingParser) -> None:
    for name in (*ORIGINAL_DEFAULTS, "method", *ORIGINAL_WITHOUT_COUNTERPART):
        assert f"--kv_{name}" in declared.options
        assert f"--kv-{name.replace('_', '-')}" in declared.options
    assert set(CompressionOptions.refused_names) == {name.replace("_", "-") for name in ORIGINAL_WITHOUT_COUNTERPART}


@pytest.mark.parametrize("name", CompressionOptions.refused_names)
@pytest.mark.parametrize("value", ["", "256,512"])
def test_refused_options_name_what_does_the_job(name: str, value: str) -> None:
    with pytest.raises(UserError, match=rf"^--kv-{name}: .*use --kv-method=kvpress:(AdaKV|SnapKV)"):
        resolve(cli={f"kv_rejected_{name}": value})


# names that are looked up later, by who knows them: spaces, models, corpora, weight formats, schedules, rules, the file system
FREE_TEXT = {
    "quantization", "cache-dtype", "reference", "l2-mode", "fail",
    "model", "method", "corpus", "dataset", "dataset-path", "mlc-model", "mlc-python", "model-lib", "space", "report-dir",
    "cache-dir", "compare", "resume", "models", "pipeline-method", "dataset-dir", "trace-conv", "synthetic-token",
    "pipeline-json", "replay-decisions", "sensitivity", "sensitivity-base", "server-model", "task-methods", "vllm-python",
    "vllm-attention-backend", "compressor-path", "pipeline-image", "lm-eval", "tasks-path",
}  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_the_example_in_a_message_is_one_that_works(option: Option) -> None:
    with pytest.raises(UserError) as caught:
        resolve(cli={option.dest: " " if option.name in FREE_TEXT else "nonsense"})
    message = str(caught.value)
    assert message.startswith(f"--kv-{option.name}=")
    example = re.search(r"for example --kv-([\w-]+)=(.*)$", message)
    if example is None:
        assert re.search(r"; (use|choose) \w+", message)
    else:
        assert example[1] == option.name
        resolve(cli={option.dest: example[2]})


@pytest.mark.parametrize(
    ("typed", "example"),
    [("pool_bytes", "8589934592"), ("skip_layers", "0,1"), ("rounds", "5"), ("impl", "ring")],
)
def test_the_example_shows_what_else_than_the_default_is_taken(typed: str, example: str) -> None:
    with pytest.raises(UserError, match=f"; for example --kv-{typed.replace('_', '-')}={re.escape(example)}$"):
        resolve(cli={f"kv_{typed}": "2XB"})


def test_an_empty_value_on_the_command_line_is_a_mistake() -> None:
    with pytest.raises(UserError, match=r"^--kv-cache-dir=: is empty; for example --kv-cache-dir=PATH$"):
        resolve(cli={"kv_cache_dir": ""})
    assert resolve(cli={"kv_skip_layers": ""}).of(CompressionOptions).skip_layers == ()
    assert resolve(cli={"kv_skip_layers": "none"}).of(CompressionOptions).skip_layers == ()


MESSAGES = {
    "list for one": (
        {"kv_reference": "none,q4f16_1"},
        "--kv-reference=none,q4f16_1: one weight format is wanted, not a list",
        "; for example --kv-reference=none",
    ),
    "twice, as typed": ({"kv_keep_ratios": "0.5,0.50"}, "--kv-keep-ratios=0.5,0.50: names the same value twice, 0.50;", ""),
    "neither number nor all": (
        {"kv_eval_tokens": "alll"},
        "--kv-eval-tokens=alll: neither a whole number nor all; for example",
        "",
    ),
    "a label": (
        {"kv_mlc_model": ""},
        "--kv-mlc-model=: is empty, and a label is wanted; ",
        "for example --kv-mlc-model=Llama-3-8B-Instruct-q4f16_1-MLC",
    ),
    "switch beside a list": (
        {"kv_load_in_4bit": "true", "kv_quantization": "none"},
        "--kv-load-in-4bit and --kv-quantization: one of them hides the other; ",
        "give --kv-quantization=none,4bit",
    ),
    "switch that the list has": (
        {"kv_load_in_4bit": "true", "kv_quantization": "4bit,none"},
        "--kv-load-in-4bit and --kv-quantization: ",
        "give --kv-quantization=4bit,none",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("given", "begin", "end"), MESSAGES.values(), ids=MESSAGES)
def test_messages_name_what_is_wrong_and_the_mend(given: dict[str, str], begin: str, end: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve(cli=given)
    assert str(caught.value).startswith(begin)
    assert str(caught.value).endswith(end)


def test_default_options_take_overrides_and_refuse_unknown_names() -> None:
    assert default_options(rounds="3").of(CommonOptions).rounds == 3
    assert default_options().given == set()
    with pytest.raises(UserError, match="unknown options round"):
        default_options(round="3")


def test_to_dict_is_json() -> None:
    import json

    options = default_options(skip_layers="0,1", method="recent_only", shard="02/3")
    again = json.loads(json.dumps(options.to_dict(), allow_nan=False))
    assert again == options.to_dict()
    assert (again["skip_layers"], again["method"], again["threads"]) == ([0, 1], ["recent_only"], None)
    assert again["shard"] == "2/3"


# properties of parsing

SIZES = st.lists(st.integers(1, MOST_TOKENS), min_size=1, max_size=8, unique=True)
RATIOS = st.lists(st.floats(LEAST_RATIO, 1), min_size=1, max_size=8, unique=True)
# what no shell passes on without quotes is no use here
LINE = st.text(st.characters(exclude_categories=("Cs", "Cc", "Zl", "Zp")), min_size=1)


@given(SIZES, st.sampled_from([",", ", ", " ,", ",,"]))
def test_lists_of_sizes_round_trip(sizes: list[int], comma: str) -> None:
    assert resolve(cli={"kv_recent_sizes": comma.join(map(str, sizes))}).of(CompressionOptions).recent_sizes == tuple(
        sizes
    )


@given(RATIOS)
def test_lists_of_ratios_round_trip_exactly(ratios: list[float]) -> None:
    assert resolve(cli={"kv_keep_ratios": ",".join(map(repr, ratios))}).of(CompressionOptions).keep_ratios == tuple(
        ratios
    )


@given(st.one_of(st.floats(max_value=0), st.floats(min_value=1, exclude_min=True), st.just(math.nan)))
def test_ratios_outside_their_range_are_refused(ratio: float) -> None:
    with pytest.raises(UserError) as caught:
        resolve(cli={"kv_keep_ratios": f"0.5,{ratio!r}"})
    assert str(caught.value) == (
        f"--kv-keep-ratios=0.5,{ratio!r}: must lie in (0, 1]; for example --kv-keep-ratios=0.8,0.5,0.3"
    )


@given(SIZES, st.integers(max_value=0))
def test_sizes_below_one_are_refused(sizes: list[int], bad: int) -> None:
    text = ",".join(map(str, [*sizes, bad]))
    with pytest.raises(UserError, match="must be at least 1") as caught:
        resolve(cli={"kv_fix_kv_sizes": text})
    assert str(caught.value).startswith(f"--kv-fix-kv-sizes={visible(text, VALUE_LIMIT)}: ")


@given(SIZES, st.data())
def test_a_value_named_twice_is_refused(sizes: list[int], data: st.DataObject) -> None:
    text = ",".join(map(str, [*sizes, data.draw(st.sampled_from(sizes))]))
    with pytest.raises(UserError, match=rf"names the same value twice, {text.rpartition(',')[2]};"):
        resolve(cli={"kv_recent_sizes": text})


@given(st.sampled_from(["cuda", "xpu", "vulkan", "metal", "rocm", "opencl"]), st.none() | st.integers(0, 10**6))
def test_devices_round_trip(kind: str, index: int | None) -> None:
    text = kind if index is None else f"{kind}:{index}"
    assert resolve(cli={"kv_device": text}).of(CommonOptions).device == text


@given(LINE)
def test_any_device_is_known_or_refused_by_name(text: str) -> None:
    known = re.fullmatch(r"auto|cpu|mps|(cuda|xpu|vulkan|metal|rocm|opencl)(:[0-9]{1,7})?", text)
    if known:
        assert resolve(cli={"kv_device": text}).of(CommonOptions).device == text
        return
    with pytest.raises(UserError) as caught:
        resolve(cli={"kv_device": text})
    assert str(caught.value).startswith(
        f"--kv-device={visible(text, VALUE_LIMIT)}: unknown device; use cpu, cuda[:N], "
    )


@given(st.sampled_from([option for option in OPTIONS if not option.is_flag]), LINE)
def test_any_text_gives_a_value_or_one_line_that_names_option_and_value(option: Option, text: str) -> None:
    try:
        resolve(cli={option.dest: text})
    except UserError as error:
        message = str(error)
        shown = visible(text, VALUE_LIMIT)
        assert message.startswith(f"--kv-{option.name}={shown}: ")
        assert "\n" not in message
        assert len(message) > len(f"--kv-{option.name}={shown}: ") + 10


@given(st.sampled_from(["true", "True", "1", "yes", "on"]), st.sampled_from(["false", "FALSE", "0", "no", "off"]))
def test_switches(yes: str, no: str) -> None:
    assert resolve(ini={"kv_no_baseline": yes}).of(CompressionOptions).no_baseline is True
    assert resolve(ini={"kv_no_baseline": no}).of(CompressionOptions).no_baseline is False


def test_the_parser_is_told_everything_as_text(declared: RecordingParser) -> None:
    # a type= of argparse would answer with its own message and exit code 4 without the mend
    callables: list[Callable[..., Any]] = [one["type"] for one in declared.options.values() if "type" in one]
    assert callables == []
    assert isinstance(SimpleNamespace(**declared.options["--kv-rounds"]).help, str)
