"""Presses of kvpress as cache methods of the hf engine: by name, with our keep ratio, one new press per session."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from kvsuite.compression.ratio import removed_from_keep
from kvsuite.errors import CaseInvalid, CaseSkipped, UserError

from .compat import load_kvpress
from .session import KvpressSession, cleanup, open_session
from .table import INNER, PER_LAYER, PRESSES, TARGET, Attention, PressInfo

if TYPE_CHECKING:
    from torch import nn

PREFIX = "kvpress:"
# presses whose window stays whatever is scored
_KEEPS_ITS_WINDOW = frozenset({"SnapKV", "PyramidKV"})
# presses that multiply values with the output projection's weight matrix instead of calling the module
_READS_OUTPUT_WEIGHT = frozenset({"CriticalKV", "CriticalAdaKV"})


@dataclass(frozen=True)
class KvpressMethod:
    """A press by name with its ratio and parameters; make it with `create`.

    It holds no press: `session` builds a new one, so that nothing of one case can reach the next.

    Parameters
    ----------
    info
        What the press does, with the parameters and inner presses of this case taken into account.
    keep_ratio
        Fraction of the prompt's cache kept, in (0, 1]; without effect where ``info.takes_ratio`` is false.
    params
        Constructor arguments by name, JSON types only; an inner press is its name, or a mapping with ``name`` and its
        own arguments.
    """

    info: PressInfo
    keep_ratio: float
    params: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @classmethod
    def create(cls, name: str, *, keep_ratio: float, **params: Any) -> KvpressMethod:
        """Look up a press and check its ratio and parameters.

        Parameters
        ----------
        name
            ``kvpress:SnapKV``, ``SnapKV`` or ``SnapKVPress``, in any case.
        keep_ratio
            Fraction of the prompt's cache to keep, in (0, 1].
        **params
            Constructor arguments of the press beyond its ratio.

        Raises
        ------
        UserError
            If the name, the ratio or a parameter is wrong.
        CaseSkipped
            If kvpress is not installed, or the press cannot run here.
        """
        info = find_press(name)
        removed = removed_from_keep(keep_ratio)
        if info.unavailable:
            raise CaseSkipped(f"{PREFIX}{info.name} {info.unavailable}")
        kvpress = load_kvpress()
        built = _Builder(kvpress, layers=1).build(info, removed, params)
        return cls(built.info, keep_ratio, dict(params))

    @property
    def name(self) -> str:
        """``kvpress:<press>``."""
        return f"{PREFIX}{self.info.name}"

    @property
    def requested_removed_ratio(self) -> float | None:
        """Fraction of the prompt's cache the press is asked to remove, ``None`` where it takes no ratio.

        ThinK is asked for a fraction of the key channels, which is half of that fraction of the cache.
        """
        if not self.info.takes_ratio:
            return None
        removed = removed_from_keep(self.keep_ratio)
        return removed / 2 if self.info.name == "ThinK" else removed

    def caveat(self, prompt_tokens: int) -> str | None:
        """Why on a prompt of this length the press is something else than its name says, ``None`` if it is not."""
        if not self.info.takes_ratio or self.keep_ratio == 1:
            return None
        kept = max(1, int(prompt_tokens * (1 - removed_from_keep(self.keep_ratio))))
        for name, params in self._presses():
            made = getattr(load_kvpress(), f"{name}Press", None)
            known = {} if made is None else inspect.signature(made).parameters
            window, sinks = (
                params.get(of, known[of].default) if of in known else 0 for of in ("window_size", "n_sink")
            )
            if name in _KEEPS_ITS_WINDOW and isinstance(window, int) and kept < window:
                whose = "the press'" if name == self.info.name else f"{name}'s"
                return (
                    f"{kept} tokens stay, fewer than {whose} window of {window}, whose tokens all have the same score"
                )
            if isinstance(sinks, int) and 0 < sinks >= kept:
                return f"{kept} tokens stay, no more than the {sinks} sinks of {name}: scores decide nothing"
        return None

    def _presses(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """The press and those inside it, with their own parameters."""
        yield self.info.name, self.params
        for argument, usual in self.info.inner.items():
            wanted = self.params.get(argument, usual)
            for one in wanted if isinstance(wanted, list | tuple) else (wanted,):
                fields = one if isinstance(one, Mapping) else {"name": one}
                yield find_press(str(fields["name"])).name, fields

    @property
    def attention(self) -> Attention:
        """The attention implementation the model has to be loaded with."""
        return self.info.attention

    def supports_layout(self, model: nn.Module) -> None:
        """Check that kvpress knows the model's class.

        Raises
        ------
        CaseSkipped
            If it does not; the message names those it knows.
        CaseInvalid
            If the press reads weights that a weight format has packed.
        """
        supported = load_kvpress().SUPPORTED_MODELS
        if not isinstance(model, supported):
            names = ", ".join(known.__name__ for known in supported)
            raise CaseSkipped(f"kvpress does not know {type(model).__name__}; it knows {names}")
        if self.info.compresses == "exit" and not hasattr(model.model, "layers"):
            raise CaseSkipped(f"{self.name} does not support {type(model).__name__}")
        projections = [part for path, part in model.named_modules() if path.endswith("o_proj")]
        weights: list[Any] = [getattr(part, "weight", None) for part in projections]
        if self.info.name in _READS_OUTPUT_WEIGHT and not all(w is not None and w.is_floating_point() for w in weights):
            raise CaseInvalid(f"{self.name} reads dense o_proj weights; run it with --kv-quantization=none")

    @contextmanager
    def session(self, model: Any, *, tokenizer: Any = None, seed: int = 0) -> Iterator[KvpressSession]:
        """Put a new press on the model; afterwards the model is as it was.

        Run each prompt inside ``session.prefill()`` and decode after it, still inside the session: masks live on the
        model until the session ends.

        Parameters
        ----------
        model
            A causal LM of transformers.
        tokenizer
            The model's tokenizer, for presses that write a prompt of their own (``info.needs_tokenizer``). ``None``: it
            is loaded from ``model.config.name_or_path``.
        seed
            Seed of torch's generator for presses that draw random numbers; the generator's state is restored.

        Raises
        ------
        CaseSkipped
            If the model's class or a missing tokenizer rules the press out.
        CaseInvalid
            If the model was loaded with an attention implementation that the press cannot use.
        """
        self.supports_layout(model)
        loaded = model.config.get_text_config()._attn_implementation
        if self.attention != "any" and (self.attention == "eager") != (loaded == "eager"):
            raise CaseInvalid(f"{self.name} needs attention implementation {self.attention}, the model has {loaded}")
        layers = model.config.get_text_config().num_hidden_layers
        built = _Builder(load_kvpress(), layers).build(self.info, removed_from_keep(self.keep_ratio), self.params)
        with open_session(model, built.press, self.info, built.targets, self.keep_ratio, tokenizer, seed) as session:
            yield session

    @staticmethod
    def cleanup(model: Any) -> None:
        """Remove what a press left on ``model``; a session does so itself when it ends."""
        cleanup(model)


def find_press(name: str) -> PressInfo:
    """Look up a press by name, with or without ``kvpress:`` and ``Press``, in any case.

    Raises
    ------
    UserError
        If there is none; the message lists those that run here and suggests the nearest.
    """
    known = {key.lower(): info for key, info in PRESSES.items()}
    wanted = name.strip().lower().removeprefix(PREFIX).removesuffix("press")
    if wanted in known:
        return known[wanted]
    near = get_close_matches(wanted, known, n=1, cutoff=0.5)
    hint = f"did you mean {PREFIX}{known[near[0]].name}? " if near else ""
    runnable = ", ".join(info.name for info in PRESSES.values() if not info.unavailable)
    raise UserError(f"unknown press {name!r}: {hint}kvpress runs {runnable}")


@dataclass
class _Built:
    press: Any
    info: PressInfo
    targets: list[Any] = field(default_factory=list)


class _Builder:
    """Builds a press with its inner presses; ``targets`` collects those whose size follows from the prompt's length."""

    def __init__(self, kvpress: Any, layers: int) -> None:
        self.kvpress = kvpress
        self.layers = layers

    def build(self, info: PressInfo, removed: float, params: Mapping[str, Any]) -> _Built:
        cls = getattr(self.kvpress, info.class_name)
        self._check_names(info, cls, params)
        arguments: dict[str, Any] = dict(info.arguments) | dict(params)
        inner_removed = 0.0 if info.compresses == "decode" or info.ratio == PER_LAYER else removed
        inner: list[_Built] = []
        for argument, default in info.inner.items():
            wanted = arguments.get(argument, default)
            if isinstance(default, tuple):
                presses = [self._inner(info, argument, one, inner_removed) for one in wanted]
                arguments[argument] = [built.press for built in presses]
                inner += presses
            else:
                inner.append(self._inner(info, argument, wanted, inner_removed))
                arguments[argument] = inner[-1].press
        if info.ratio == PER_LAYER:
            arguments.setdefault(PER_LAYER, _ramp(removed, self.layers))
        elif info.ratio not in (None, INNER, TARGET):
            arguments[str(info.ratio)] = removed
        try:
            press = cls(**arguments)
        except (AssertionError, TypeError) as error:
            raise UserError(f"{PREFIX}{info.name} does not take {dict(params)}: {error}") from error
        targets = [target for built in inner for target in built.targets]
        if info.ratio == TARGET and TARGET not in params:
            targets.append(press)
        return _Built(press, _with_inner(_with_params(info, params), [built.info for built in inner]), targets)

    def _inner(self, outer: PressInfo, argument: str, wanted: Any, removed: float) -> _Built:
        fields = dict(wanted) if isinstance(wanted, Mapping) else {"name": wanted}
        name = fields.pop("name", None)
        if not isinstance(name, str):
            raise UserError(f"{PREFIX}{outer.name}: {argument} is {wanted!r}; give the name of a press")
        info = find_press(name)
        if info.unavailable:
            raise CaseSkipped(f"{PREFIX}{info.name} {info.unavailable}")
        return self.build(info, removed, fields)

    @staticmethod
    def _check_names(info: PressInfo, cls: Any, params: Mapping[str, Any]) -> None:
        known = [name for name in inspect.signature(cls).parameters if not name.startswith("_")]
        if info.ratio not in (PER_LAYER, TARGET):
            known = [name for name in known if name not in ("compression_ratio", info.ratio)]
        for name in params:
            if name not in known:
                takes = ", ".join(known) or "none beside its ratio, which --kv-keep-ratios sets"
                raise UserError(f"{PREFIX}{info.name}: unknown parameter {name!r}; it takes {takes}")


def _ramp(removed: float, layers: int) -> list[float]:
    """Ratios that rise linearly from the first layer to the last, with mean ``removed`` and inside [0, 1)."""
    if layers == 1:
        return [removed]
    spread = min(removed, 1 - removed) / 2
    return [removed + spread * (2 * layer / (layers - 1) - 1) for layer in range(layers)]


def _with_params(info: PressInfo, params: Mapping[str, Any]) -> PressInfo:
    """Facts that a parameter changes."""
    if info.name == "KVCompose" and params.get("structured") is False:
        return replace(info, frees_memory=False, attention="sdpa", uneven_layers=False)
    if info.name == "DMS" and params.get("decoding"):
        return replace(info, compresses="prefill+decode")
    return info


def _with_inner(info: PressInfo, inner: list[PressInfo]) -> PressInfo:
    """Facts that a wrapper takes over from its inner presses."""
    needs = {one.attention for one in (info, *inner)} - {"any"}
    if len(needs) > 1:
        names = ", ".join(one.name for one in inner)
        raise UserError(f"{PREFIX}{info.name} refuses eager attention, which {names} needs; choose another inner press")
    several = info.name in ("Composed", "PrefillDecoding")
    return replace(
        info,
        frees_memory=any(one.frees_memory for one in inner) if several else info.frees_memory,
        attention=needs.pop() if needs else "any",
        uneven_layers=any(one.uneven_layers for one in (info, *inner)),
        positions="cache" if any(one.positions == "cache" for one in (info, *inner)) else "original",
        random=any(one.random for one in (info, *inner)),
        batch_one=any(one.batch_one for one in (info, *inner)),
    )
