"""Models made ready for MLC-LLM: weights converted once a format, a library compiled once for every set of overrides."""

from __future__ import annotations

import json
import os
import platform
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvsuite.engines.engine_process import run_step
from kvsuite.errors import CaseInvalid, UserError
from kvsuite.models.resolve import ModelSpec

from .install import MlcInstall
from .source import MANIFEST, MLC_CONFIG, built_once, content_key, short_key, source_folder

LIBRARY = "model.dylib" if sys.platform == "darwin" else "model.so"
#: lists the shards and their sizes; older versions of MLC called it ndarray-cache.json
WEIGHT_INDEXES = ("tensor-cache.json", "ndarray-cache.json")
#: what mlc_llm says of the library, without the list of its parameters
_METADATA = "library.json"
# of a folder that was made here and is given as a model
_OURS = (MANIFEST, _METADATA)
# without a chat template: prompts are token ids
_TEMPLATE = "LM"
# weights are the same on every device, and TVM's CPU code is in all wheels
_CONVERT_DEVICE = "cpu"


@dataclass(frozen=True)
class Overrides:
    """What a library is compiled for.

    Parameters
    ----------
    context_window_size, prefill_chunk_size, max_batch_size
        Of the design point.
    sliding_window_size, attention_sink_size
        Of the design point; ``None`` where MLC's configuration of the model's family has no such fields.
    """

    context_window_size: int
    prefill_chunk_size: int
    max_batch_size: int
    sliding_window_size: int | None = None
    attention_sink_size: int | None = None

    def given(self) -> dict[str, int]:
        """By name, without what the model has no field for."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Compiled:
    """A model that ``mlc_llm serve`` can take.

    Parameters
    ----------
    model
        Folder with weights and ``mlc-chat-config.json``, or an ``HF://`` address.
    library
        Its library; ``None``: mlc_llm compiles one itself when it starts.
    function_bytes
        Temporary buffer of the library's largest function, ``None`` where it is not told.
    """

    model: str
    library: Path | None
    function_bytes: int | None = None


class MlcModels:
    """One model in one weight format, with the libraries of its design points.

    Parameters
    ----------
    spec
        The model.
    quantization
        Weight format by its MLC name.
    install
        The mlc_llm that converts, compiles and will run it: results of another version are others.
    device
        What libraries are compiled for.
    root
        Folder of the cache.
    deadline_s
        Seconds that a step may take.
    seed
        Of a dummy's weights.
    cache_dir
        Where converted Hugging Face models lie.
    opt
        What the compiler switches on, in MLC's own words; ``None`` for its default.
    """

    def __init__(
        self,
        spec: ModelSpec,
        quantization: str,
        install: MlcInstall,
        *,
        device: str,
        root: Path,
        deadline_s: float,
        seed: int,
        cache_dir: Path | None,
        opt: str | None = None,
    ) -> None:
        self._opt = opt
        self._spec, self._quantization, self._install = spec, quantization, install
        self._device, self._root, self._deadline_s = device, root, deadline_s
        self._is_mlc = spec.kind == "mlc"
        self._content = content_key(spec, seed)
        self._source = Path(spec.source) if self._is_mlc else source_folder(spec, root, seed, cache_dir)
        #: folder of the weights in the format
        self.weights = self._source if self._is_mlc else self._converted()

    @property
    def weights_bytes(self) -> int | None:
        """Bytes of all shards, ``None`` if no index lists them."""
        for name in WEIGHT_INDEXES:
            if (self.weights / name).is_file():
                return sum(int(shard["nbytes"]) for shard in _load(self.weights / name)["records"])
        return None

    def compiled(self, overrides: Overrides) -> Compiled:
        """The model with a library for ``overrides``.

        Raises
        ------
        EngineFailed, MemoryError
            If a step fails, with the end of what it printed.
        CaseInvalid
            If MLC does not take an override for this model.
        """
        facts = {
            "model": self._spec.label,
            "content": self._content,
            "quantization": self._quantization,
            "overrides": overrides.given(),
            "device": self._device,
            # the compiler tunes for the machine that it runs on
            "machine": [platform.node(), platform.machine()],
            **({} if self._opt is None else {"opt": self._opt}),
            **self._install.identity,
        }
        folder = self._root / f"library-{self._spec.label}-{self._quantization}-{short_key(facts)}"
        built_once(folder, facts, lambda place: self._compile(overrides, place))
        usage = _load(folder / _METADATA).get("memory_usage") or {}
        return Compiled(str(folder), folder / LIBRARY, max(map(int, usage.values()), default=None))

    def _converted(self) -> Path:
        facts = {
            "model": self._spec.label,
            "content": self._content,
            "quantization": self._quantization,
            **self._install.identity,
        }
        folder = self._root / f"weights-{self._spec.label}-{self._quantization}-{short_key(facts)}"
        command = [
            "convert_weight", str(self._source), "--quantization", self._quantization, "--device", _CONVERT_DEVICE,
            "--output",
        ]  # fmt: skip

        def convert(place: Path) -> None:
            self._run([*command, str(place)])

        return built_once(folder, facts, convert)

    def _compile(self, overrides: Overrides, folder: Path) -> None:
        self._configure(overrides, folder)
        self._check(overrides, _load(folder / MLC_CONFIG))
        for path in sorted(self.weights.iterdir()):
            target = folder / path.name
            if not target.exists() and path.suffix != Path(LIBRARY).suffix and path.name not in _OURS:
                target.symlink_to(_beside(path, folder))
        chosen = [] if self._opt is None else ["--opt", self._opt]
        self._run(
            ["compile", str(folder / MLC_CONFIG), "--device", self._device, *chosen, "--output", str(folder / LIBRARY)]
        )
        printed = self._run([str(folder / LIBRARY)], module="mlc_llm.cli.model_metadata")
        # it ends well even where it could not read the library, and then prints no JSON
        begin = re.search(r"^\{$", printed, re.MULTILINE)
        found = {} if begin is None else json.JSONDecoder().raw_decode(printed, begin.start())[0]
        found.pop("params", None)
        (folder / _METADATA).write_text(json.dumps(found, indent=2), encoding="utf-8")

    def _configure(self, overrides: Overrides, folder: Path) -> None:
        """Write ``mlc-chat-config.json``: the runtime takes window and sinks from there, and sizes buffers by its chunk."""
        if not self._is_mlc:
            command = [
                "gen_config",
                str(self._source),
                "--quantization",
                self._quantization,
                "--conv-template",
                _TEMPLATE,
            ]
            for name, value in overrides.given().items():
                # "=" because a window of -1 would be taken for an option
                command.append(f"--{name.replace('_', '-')}={value}")
            self._run([*command, "--output", str(folder)])
            return
        config = _load(self._source / MLC_CONFIG)
        for name, value in overrides.given().items():
            if name in config:
                config[name] = value
            if name in config["model_config"]:
                config["model_config"][name] = value
        (folder / MLC_CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")

    def _check(self, overrides: Overrides, config: dict[str, Any]) -> None:
        inner = config.get("model_config", {})
        self._check_rotation(inner)
        for name, value in overrides.given().items():
            found = inner.get(name, config.get(name))
            if found != value:
                raise CaseInvalid(
                    f"{name}={value}: MLC's configuration of {self._spec.label} has {found} there, whatever is asked; leave "
                    "the axis at that"
                )

    def _check_rotation(self, inner: dict[str, Any]) -> None:
        if self._is_mlc or "position_embedding_base" not in inner:
            return
        theirs = _load(self._source / "config.json")
        theta = (theirs.get("rope_parameters") or {}).get("rope_theta", theirs.get("rope_theta"))
        if theta is not None and theta != inner["position_embedding_base"]:
            raise CaseInvalid(
                f"MLC's configuration of {self._spec.label} rotates with a base of {inner['position_embedding_base']}, the "
                f"model with {theta}: it would be another model"
            )

    def _run(self, command: Sequence[str], module: str = "mlc_llm") -> str:
        what = f"mlc_llm {command[0]}" if module == "mlc_llm" else module
        with tempfile.TemporaryDirectory(prefix="kvsuite-mlc-") as place:
            return run_step(
                what,
                [self._install.python, "-m", module, *command],
                log=Path(place) / "log",
                deadline_s=self._deadline_s,
            )


def _beside(path: Path, folder: Path) -> str:
    """Where a link in ``folder`` finds ``path``: relative inside the cache, which may be moved as a whole."""
    real = path.resolve()
    inside = real.parent.parent == folder.parent.resolve()
    return os.path.relpath(real, folder.resolve()) if inside else str(real)


def _load(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); delete its folder, and it is made again") from error
    assert isinstance(found, dict)
    return found
