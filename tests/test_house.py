"""Who imports whom: docs/design.md's table against the code, and no circle anywhere."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def house() -> ModuleType:
    spec = importlib.util.spec_from_file_location("import_graph", ROOT / "docs" / "import_graph.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def table() -> dict[str, set[str]]:
    """Rooms of the design in their order, with what each may import."""
    rows = re.findall(r"^\| `([\w/]+)` \| ([^|]*) \| [^|]+ \|$", (ROOT / "docs" / "design.md").read_text(), re.M)
    return {room: set(re.findall(r"`([\w/]+)`", imports)) for room, imports in rows}


def test_every_room_and_every_module_at_the_top_has_its_row(house: ModuleType) -> None:
    assert set(table()) == set(house.room_graph(house.module_graph()))


def test_rooms_import_what_the_design_says_and_nothing_else(house: ModuleType) -> None:
    found = {room: set(imported) for room, imported in house.room_graph(house.module_graph()).items()}
    assert found == table()


def test_a_room_imports_rooms_above_it_alone() -> None:
    seen: set[str] = set()
    for room, imported in table().items():
        assert imported <= seen, f"{room} imports {sorted(imported - seen)}, which come later in the table"
        seen.add(room)


def test_no_circle_of_modules_or_rooms(house: ModuleType) -> None:
    graph = house.module_graph()
    assert house.circle(graph) == []
    assert house.circle(house.room_graph(graph)) == []


def test_no_suite_imports_a_suite_and_no_engine_an_engine() -> None:
    for room, imported in table().items():
        kind, _, name = room.partition("/")
        if name:
            assert not {one for one in imported if one.startswith(f"{kind}/")}, room


#: who may know a suite or an engine by its name, and why
MAY_KNOW = {
    # a folder of the package, and kinds of model files, are called like one
    "measure/source_hash.py": {"compression"},
    # the engine that the others are compared with
    "parity/engine_result.py": {"hf"},
    # a number format that one engine alone has
    "cache_formats/cast_format.py": {"vllm"},
    "models/resolve.py": {"mlc"}, "models/load.py": {"mlc"}, "memory_model/config.py": {"mlc"},
}  # fmt: skip


def names_said(source: Path) -> set[str]:
    """Names that stand in code, as a word of their own; those in docstrings are examples."""
    tree = ast.parse(source.read_text(encoding="utf-8"))
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and isinstance(node.body[0], ast.Expr)
    }
    constants = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in docstrings)
    return {node.value for node in constants if isinstance(node.value, str)}


def test_suites_and_engines_are_known_by_name_in_their_own_folders_alone() -> None:
    package = ROOT / "kvsuite"
    names = {path.name for kind in ("suites", "engines") for path in (package / kind).iterdir() if path.is_dir()}
    # a metric, a field of the controller's decisions and an option have these names; imports of the suites are in the table
    named_otherwise = {"perplexity", "pipeline", "sensitivity"}
    names -= {*named_otherwise, "__pycache__"}
    assert names == {"compression", "dse", "retrieval", "hf", "llamacpp", "nano", "mlc", "server", "vllm"}
    found = {}
    for path in package.rglob("*.py"):
        place = path.relative_to(package)
        if place.parts[0] == "benchmarks" or (place.parts[0] in ("suites", "engines") and place.parts[1] in names):
            continue
        is_theirs = place.parts[0] == "suites" and place.parts[1] in named_otherwise
        if not is_theirs and (said := names_said(path) & names):
            found[place.as_posix()] = said
    assert found == MAY_KNOW


def test_the_folder_of_a_suite_or_an_engine_is_imported_by_nobody() -> None:
    own = {room for room in table() if room.partition("/")[2]}
    assert {room: imported & own for room, imported in table().items() if imported & own} == {}


def definitions(
    kind: type[ast.ClassDef] | type[ast.FunctionDef],
) -> Iterator[tuple[ast.ClassDef | ast.FunctionDef, str]]:
    """Classes or functions of the package, however deep, each with the place where it is defined."""
    for path in sorted((ROOT / "kvsuite").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, kind):
                yield node, f"{path.relative_to(ROOT).as_posix()}:{node.lineno}"


def of_one_name(found: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Names that are given more than once, with their places."""
    places: dict[str, list[str]] = {}
    for name, place in found:
        places.setdefault(name, []).append(place)
    return {name: where for name, where in places.items() if len(where) > 1}


def test_no_two_classes_have_one_name() -> None:
    assert of_one_name((node.name, place) for node, place in definitions(ast.ClassDef)) == {}


def test_no_two_kernels_have_one_name() -> None:
    # a profile knows them by nothing else
    kernels = [
        (node.name, place)
        for node, place in definitions(ast.FunctionDef)
        if any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)
    ]
    assert len(kernels) > 10
    assert of_one_name(kernels) == {}


def test_a_circle_is_found_and_imports_inside_functions_count(house: ModuleType, tmp_path: Path) -> None:
    assert house.circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})
    source = tmp_path / "one.py"
    source.write_text("def late():\n    from kvsuite.models.resolve import resolve_model\n    return resolve_model\n")
    assert house.imports_of("kvsuite.one", source, house.modules()) == {"kvsuite.models.resolve"}


def test_nothing_imports_the_plugin(house: ModuleType) -> None:
    for room, imported in house.room_graph(house.module_graph()).items():
        assert "plugin" not in imported, room


def test_the_command_draws_it(tmp_path: Path) -> None:
    out = tmp_path / "graph.png"
    command = [sys.executable, str(ROOT / "docs" / "import_graph.py"), "--out", str(out)]
    told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    assert "suites/dse:" in told
    assert out.read_bytes().startswith(b"\x89PNG")
