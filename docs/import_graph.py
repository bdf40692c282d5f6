"""Draw who imports whom: rooms as boxes in the order of their imports, arrows between them; fails where there is a circle.

python docs/import_graph.py [--out docs/figures/import_graph.png]

Every import counts, those inside functions and under ``TYPE_CHECKING`` too: what is read together belongs together.
"""

from __future__ import annotations

import argparse
import ast
from collections import Counter
from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "kvsuite"
#: rooms that hold rooms: a suite and an engine is a folder of its own
_HOUSES = ("suites", "engines")


def module_name(path: Path) -> str:
    """``kvsuite.engines.hf`` for ``kvsuite/engines/hf/__init__.py``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules() -> dict[str, Path]:
    """Every module of the package by its name."""
    return {module_name(path): path for path in sorted((ROOT / PACKAGE).rglob("*.py"))}


def imports_of(name: str, path: Path, known: Mapping[str, Path]) -> set[str]:
    """Modules of the package that ``name`` imports anywhere; a package stands for itself, not for what it imports."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            # a name is a module of its own, or something in the module
            found |= {full if (full := f"{origin}.{alias.name}") in known else origin for alias in node.names}
    return {one for one in found if one in known} - {name}


def room_of(module: str) -> str:
    """``engines/hf`` for a module of that folder, ``case`` for a module at the top."""
    parts = module.split(".")[1:]
    if not parts:
        return PACKAGE
    inner = len(parts) > 1 and parts[0] in _HOUSES and (ROOT / PACKAGE / parts[0] / parts[1]).is_dir()
    return "/".join(parts[:2]) if inner else parts[0]


def module_graph() -> dict[str, set[str]]:
    """Imports of every module."""
    known = modules()
    return {name: imports_of(name, path, known) for name, path in known.items()}


def room_graph(graph: Mapping[str, Iterable[str]]) -> dict[str, Counter[str]]:
    """Imports of every room, with the number of modules that import."""
    rooms: dict[str, Counter[str]] = {room_of(name): Counter() for name in graph}
    for name, imported in graph.items():
        rooms[room_of(name)].update({room_of(one) for one in imported} - {room_of(name)})
    return rooms


def circle(graph: Mapping[str, Iterable[str]]) -> list[str]:
    """A circle of imports, ``[]`` if there is none."""
    try:
        TopologicalSorter({name: set(imported) for name, imported in graph.items()}).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def floors(rooms: Mapping[str, Iterable[str]]) -> dict[str, int]:
    """Floor of every room: one above the highest of those it imports."""
    height: dict[str, int] = {}
    for room in TopologicalSorter({name: set(imported) for name, imported in rooms.items()}).static_order():
        height[room] = 1 + max((height[one] for one in rooms.get(room, ())), default=-1)
    return height


def draw(rooms: Mapping[str, Counter[str]], out: Path) -> None:
    """Draw the rooms floor by floor, each arrow as wide as many modules import along it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import FancyArrowPatch

    height = floors(rooms)
    count = max(height.values()) + 1
    by_floor: list[list[str]] = [[room for room, floor in height.items() if floor == at] for at in range(count)]
    place: dict[str, tuple[float, float]] = {}
    for floor, on_it in enumerate(by_floor):
        # near what it imports, so that arrows are short
        on_it.sort(key=lambda room: sum(place[one][0] for one in rooms[room]) / max(len(rooms[room]), 1))
        for index, room in enumerate(on_it):
            place[room] = ((index + 0.5) / len(on_it), floor)
    figure, axes = pyplot.subplots(figsize=(15, 1.25 * count + 1))
    arrows = 0
    for room, imported in rooms.items():
        for one, number in imported.items():
            arrows += 1
            axes.add_patch(
                FancyArrowPatch(
                    place[room], place[one], arrowstyle="-|>", mutation_scale=9, shrinkA=14, shrinkB=14, color="0.55",
                    alpha=0.45, linewidth=0.4 + 0.25 * min(number, 12), connectionstyle="arc3,rad=0.04",
                )
            )  # fmt: skip
    colours = {"engines": "#d9e8f6", "suites": "#e3f1dc"}
    for room, (x, y) in place.items():
        colour = colours.get(room.partition("/")[0], "#f4f1e6")
        box = {"boxstyle": "round,pad=0.4", "facecolor": colour, "edgecolor": "0.3"}
        axes.text(x, y, room, ha="center", va="center", fontsize=10, bbox=box, zorder=3)
    axes.set(xlim=(0, 1), ylim=(-0.6, count - 0.4))
    axes.axis("off")
    axes.set_title(f"{len(rooms)} rooms on {count} floors, {arrows} arrows: a room imports rooms below it")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=90, bbox_inches="tight")
    pyplot.close(figure)


def main() -> int:
    """Draw, and fail where modules or rooms import each other in a circle."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "figures" / "import_graph.png")
    graph = module_graph()
    rooms = room_graph(graph)
    for kind, found in (("modules", circle(graph)), ("rooms", circle(rooms))):
        if found:
            print(f"error: {kind} import each other: {' -> '.join(found)}")
            return 1
    out = parser.parse_args().out
    draw(rooms, out)
    for room, imported in sorted(rooms.items()):
        print(f"{room}: {', '.join(sorted(imported)) or 'nothing'}")
    print(f"{len(rooms)} rooms, {sum(map(len, rooms.values()))} arrows, drawn into {out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
