"""The table of architectures in docs/models.md, from the zoo: ``python tests/models/zoo_table.py`` writes it anew."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- the zoo: python tests/models/zoo_table.py -->\n", "<!-- end of the zoo -->\n"
_WORDS = {
    "full_attention": "full", "sliding_attention": "sliding", "chunked_attention": "chunked", "linear_attention": "linear",
    "conv": "convolution", "hybrid": "attention with state", "global": "full", "local": "sliding",
}  # fmt: skip


def _word(what: str) -> str:
    kind, _, more = what.partition(", ")
    return _WORDS.get(kind, kind) + (f" with {more}" if more else "")


def lines() -> list[str]:
    """The table's lines."""
    from zoo import ELSEWHERE, ENCODER, SEQ2SEQ, ZOO, Architecture

    from kvsuite.models.layers import UnknownLayers, layers_of

    def layers_and_positions(architecture: Architecture) -> tuple[str, str]:
        if architecture.hf in (ENCODER, SEQ2SEQ):
            return "–", "–"
        try:
            model = layers_of(architecture.configured().to_dict())
        except UnknownLayers as reason:
            return str(reason).partition(": ")[2], "–"
        counts = Counter(_word(layer.what) for layer in model.layers)
        layers = ", ".join(counts if len(counts) == 1 else (f"{n} {word}" for word, n in counts.items()))
        still = [layer for layer in model.layers if layer.attention and not layer.rotary]
        positions: str = model.positions
        if positions == "rotary" and still:
            positions += f", none in {len(still)} of {len(model.layers)} layers"
        if model.switch_length:
            positions += ", frequencies follow the length"
        return layers, positions

    def outcome(architecture: Architecture, engine: str) -> str:
        refusal = getattr(architecture, engine)
        if refusal == ELSEWHERE:
            refusal = "its attention does not go through transformers' attention interface"
        return "as `generate`" if refusal is None else f"refused: {refusal}"

    rows = [
        (each.name, *layers_and_positions(each), outcome(each, "hf"), outcome(each, "nano"))
        for each in sorted(ZOO, key=lambda each: each.name.lower())
    ]
    head = ("architecture", "layers", "positions", "`hf`", "`nano`")
    return ["| " + " | ".join(cells) + " |\n" for cells in (head, ("---",) * len(head), *rows)]


def parts() -> tuple[str, str, str]:
    """The page before the table, the table, the page behind it."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    table, _, after = rest.partition(END)
    return before, table, after


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    first, _, last = parts()
    PAGE.write_text(first + BEGIN + "".join(lines()) + END + last, encoding="utf-8")
