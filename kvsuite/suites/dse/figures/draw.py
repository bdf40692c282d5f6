"""The design-space figures out of results and metrics CSVs, kvsuite's and the original program's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvsuite.errors import UserError
from kvsuite.reporting.figure_style import figure_bytes
from kvsuite.suites.dse.csv_files import METRICS, RESULTS, CsvSheet

from .captions import (
    cache_caption,
    chars_caption,
    memory_caption,
    repeats_caption,
    sheet_notes,
    slope_caption,
    source_caption,
)
from .knobs import draw_knobs
from .panels import draw
from .pareto import draw_pareto
from .points import MEMORY_COLUMNS, QUANTITIES, Sample, samples_of
from .series import FigurePlan, arrange

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# as the original's
_DPI = 200
_CONTEXT, _BATCH = "context_window_size", "max_batch_size"
_WINDOW, _SINK = "sliding_window_size", "attention_sink_size"
_ALONE = ("batch 1", "window off", "sink 0")
#: a results CSV each; the tag goes in front of the name
MEMORY_PLANS = (
    FigurePlan("mem_kvcache_vs_context", "kvcache_mb", _CONTEXT, hue=_WINDOW, style=_SINK, col=_BATCH),
    FigurePlan("mem_total_vs_context", "total_mb", _CONTEXT, hue=_WINDOW, style=_SINK, col=_BATCH),
    FigurePlan("mem_kvcache_vs_sliding", "kvcache_mb", _WINDOW, hue=_SINK, style=_BATCH, col=_CONTEXT),
)
#: of all results CSVs
COMPARISON_PLANS = (
    FigurePlan("kv_cache_quant_compare", "kvcache_mb", _CONTEXT, where=_ALONE),
    FigurePlan("kv_cache_quant_compare_total", "total_mb", _CONTEXT, where=_ALONE),
)


def _four(stem: str, quantity: str) -> tuple[FigurePlan, ...]:
    return (
        FigurePlan(f"{stem}_vs_context", quantity, _CONTEXT, where=_ALONE),
        FigurePlan(f"{stem}_vs_batch", quantity, _BATCH, col=_CONTEXT, where=("window off",)),
        FigurePlan(f"{stem}_vs_sliding", quantity, _WINDOW, style=_SINK, col=_CONTEXT, where=("window on",)),
        FigurePlan(f"{stem}_vs_sink", quantity, _SINK, style=_WINDOW, col=_CONTEXT, where=("window on",)),
    )


#: of all metrics CSVs
SPEED_PLANS = (
    *_four("throughput_prefill", "prefill_tok_s"),
    *_four("throughput_decode", "decode_tok_s"),
    *_four("latency_e2e", "e2e_s"),
    *_four("latency_ttft", "ttft_s"),
)
#: of all results CSVs
CHARS_PLANS = _four("chars_throughput", "chars_s")
PARETO, KNOBS = "dse_pareto", "dse_knobs"


@dataclass
class Rendered:
    """Figures as bytes by file name, and what their reader must know: one line a fact."""

    files: dict[str, bytes] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def render_dse(sheets: Sequence[CsvSheet], kinds: Sequence[str] = ("png",)) -> Rendered:
    """Draw everything that the files allow; what cannot be drawn is a note.

    Parameters
    ----------
    sheets
        From `kvsuite.suites.dse.csv_files.read_sheet`. Files of one tag are drawn together, their equal points as repeats.
    kinds
        ``"png"`` (200 dpi, as the original's), ``"svg"``.

    Raises
    ------
    UserError
        If there is no row at all.
    """
    if not any(sheet.rows for sheet in sheets):
        raise UserError("no row to draw in " + ", ".join(sheet.source for sheet in sheets))
    rendered = Rendered(notes=[*(note for sheet in sheets for note in sheet_notes(sheet)), *_shared_tags(sheets)])
    for name, figure in _figures(sheets, rendered.notes):
        for kind in kinds:
            rendered.files[f"{name}.{kind}"] = figure_bytes(figure, kind, dpi=_DPI)
    return rendered


def _shared_tags(sheets: Sequence[CsvSheet]) -> list[str]:
    keys = [(sheet.table.kind, sheet.tag) for sheet in sheets]
    return [
        f"{tag}: {keys.count((kind, tag))} {kind} files are drawn as one, their equal points as repeats"
        for kind, tag in dict.fromkeys(keys)
        if keys.count((kind, tag)) > 1
    ]


def _figures(sheets: Sequence[CsvSheet], notes: list[str]) -> Iterator[tuple[str, Figure]]:
    results = [sheet for sheet in sheets if sheet.table is RESULTS and sheet.rows]
    metrics = [sheet for sheet in sheets if sheet.table is METRICS and sheet.rows]
    by_results = [sample for sheet in results for sample in samples_of(sheet)]
    by_metrics = [sample for sheet in metrics for sample in samples_of(sheet)]
    for tag in dict.fromkeys(sheet.tag for sheet in results):
        own = [sheet for sheet in results if sheet.tag == tag]
        chosen = [sample for sample in by_results if sample.tag == tag]
        yield from _drawn(MEMORY_PLANS, chosen, own, notes, _memory_words, prefix=f"{tag}_")
    if results:
        yield from _drawn(COMPARISON_PLANS, by_results, results, notes, _memory_words)
    if metrics:
        yield from _drawn(SPEED_PLANS, by_metrics, metrics, notes, _speed_words)
    if results:
        yield from _drawn(CHARS_PLANS, by_results, results, notes, _chars_words)
    words = [source_caption([*results, *metrics]), *(memory_caption(results, name) for name in MEMORY_COLUMNS)]
    captions = [caption for caption in words if caption]
    for name, drawer in ((PARETO, draw_pareto), (KNOBS, draw_knobs)):
        figure = drawer(by_results, by_metrics, captions)
        if isinstance(figure, str):
            notes.append(f"{name}: not drawn, {figure}")
        else:
            yield name, figure


_Words = Callable[[FigurePlan, Sequence[Sample], Sequence[CsvSheet]], list[str | None]]


def _drawn(
    plans: Sequence[FigurePlan],
    samples: Sequence[Sample],
    sheets: Sequence[CsvSheet],
    notes: list[str],
    words: _Words,
    prefix: str = "",
) -> Iterator[tuple[str, Figure]]:
    for plan in plans:
        name, quantity = prefix + plan.name, QUANTITIES[plan.quantity]
        layout = arrange(plan, samples)
        if layout is None:
            known = any(plan.quantity in sample.readings for sample in samples)
            why = f"no row has {', '.join(plan.where)}" if known else f"the files have no {quantity.short}"
            notes.append(f"{name}: not drawn, {why}")
            continue
        if len({(sample.tag, sample.settings, sample.condition) for sample in layout.samples}) == 1:
            notes.append(f"{name}: not drawn, it would show one point alone")
            continue
        used = [sheet for sheet in sheets if sheet.tag in {sample.tag for sample in layout.samples}]
        captions = [caption for caption in (source_caption(used), *words(plan, layout.samples, used)) if caption]
        title = f"{prefix.rstrip('_')}  {quantity.short} against {plan.x} ({quantity.better} is better)".strip()
        yield name, draw(layout, title, captions)


def _memory_words(plan: FigurePlan, samples: Sequence[Sample], sheets: Sequence[CsvSheet]) -> list[str | None]:
    return [memory_caption(sheets, plan.quantity), slope_caption(samples) if plan.quantity == "kvcache_mb" else None]


def _speed_words(plan: FigurePlan, samples: Sequence[Sample], sheets: Sequence[CsvSheet]) -> list[str | None]:
    return [
        cache_caption(samples) if plan.quantity != "decode_tok_s" else None,
        repeats_caption(samples, plan.quantity),
    ]


def _chars_words(plan: FigurePlan, samples: Sequence[Sample], sheets: Sequence[CsvSheet]) -> list[str | None]:
    return [chars_caption(samples), repeats_caption(samples, plan.quantity)]
