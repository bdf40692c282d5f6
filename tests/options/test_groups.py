"""Groups of options: ours are typed as they are parsed; those of other packages come in, or are told of in one line."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import msgspec
import pytest

from kvsuite.errors import UserError
from kvsuite.options.common import CommonOptions
from kvsuite.options.groups import all_options, option_groups
from kvsuite.options.option import Option, OptionGroup, options_in, whole_number
from kvsuite.options.resolve import default_options
from kvsuite.options.shard import Shard

# what a package brings: the text of its module, and its entry points
GOOD = """
from typing import Annotated
from kvsuite.options.option import Option, OptionGroup, whole_number

class MineOptions(OptionGroup, frozen=True, kw_only=True):
    mine_depth: Annotated[int, Option(whole_number(1), "3", "How deep to look, e.g. --kv-mine-depth=4.")]
"""
TAKEN = GOOD.replace("mine_depth: ", "rounds: ")
UNTYPED = GOOD.replace(
    'Annotated[int, Option(whole_number(1), "3", "How deep to look, e.g. --kv-mine-depth=4.")]', "int"
)


def install(folder: Path, package: str, module: str, entries: str) -> None:
    """Write what pip would: a module and the metadata of its distribution."""
    name = package.replace("-", "_")
    (folder / f"{name}.py").write_text(module)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[kvsuite.options]\n{entries}\n")


def resolved(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a test that prints an option of ours and one of theirs, with the packages in ``folder``."""
    (folder / "test_mine.py").write_text(
        "def test_mine(kv_options):\n"
        "    from kvsuite.options.common import CommonOptions\n"
        "    print('rounds', kv_options.of(CommonOptions).rounds)\n"
        "    print('depth', kv_options.to_dict().get('mine_depth'))\n"
    )
    environment = {"PYTHONPATH": str(folder), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PATH": "/usr/bin:/bin"}
    command = ["-m", "pytest", "-q", "-s", "-p", "kvsuite.plugin", "-p", "no:cacheprovider", "test_mine.py"]
    return subprocess.run(
        [sys.executable, *command, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


def test_values_have_the_types_that_the_structs_say() -> None:
    options = default_options(
        quantization="none,4bit", timeout="60", shard="1/2", skip_layers="0,1", threads="4", sliding_window_size="off",
        context_window_size="1024", reference="none",
    )  # fmt: skip
    for group in option_groups():
        values = {name: getattr(options.of(group), name) for name in group.__struct_fields__}
        if values.get("shard") is not None:
            assert isinstance(values["shard"], Shard)
            values["shard"] = {"index": values["shard"].index, "of": values["shard"].of}
        assert msgspec.convert(values, group, strict=True) == options.of(group)


def test_values_are_read_by_their_group_alone() -> None:
    # by attribute of all options together a type checker could not tell a misspelt one
    with pytest.raises(AttributeError):
        _ = default_options().rounds  # type: ignore[attr-defined]
    with pytest.raises(AttributeError):
        _ = default_options().of(CommonOptions).ronds  # type: ignore[attr-defined]


ROOT = Path(__file__).parents[2] / "kvsuite"
GROUPS = [*(ROOT / "options").glob("*.py"), *ROOT.glob("suites/*/options.py"), *ROOT.glob("engines/*/options.py")]


@pytest.mark.parametrize("path", GROUPS, ids=lambda path: "/".join(path.relative_to(ROOT).parts))
def test_options_know_syntax_alone(path: Path) -> None:
    # inside functions too: whether a method, a weight format or a rule exists is asked by who knows
    imported = {
        node.module.split(".")[1]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.level == 0 and str(node.module).startswith("kvsuite.")
    }
    assert imported <= {"options", "errors", "entry_points", "foreign_text"}


def test_groups_of_one_package_share_no_name() -> None:
    fields = [option.field for option in all_options()]
    assert len(fields) == len(set(fields))


def test_a_group_that_is_not_registered_says_so() -> None:
    class Unknown(OptionGroup, frozen=True, kw_only=True):
        """Registered nowhere."""

    with pytest.raises(UserError, match="Unknown: these options are not registered; name them in an entry point"):
        default_options().of(Unknown)


def test_a_field_without_an_option_is_refused() -> None:
    class Untyped(OptionGroup, frozen=True, kw_only=True):
        depth: int

    with pytest.raises(
        UserError, match=r"^Untyped.depth: has no Option; write depth: Annotated\[type, Option\(\.\.\.\)\]$"
    ):
        options_in(Untyped)


def test_a_struct_is_frozen() -> None:
    with pytest.raises(AttributeError):
        default_options().of(CommonOptions).rounds = 3  # type: ignore[misc]


def test_an_option_is_named_after_its_field() -> None:
    class Mine(OptionGroup, frozen=True, kw_only=True):
        mine_depth: Annotated[int, Option(whole_number(1), "3", "How deep.", aliases=("deep-down",))]

    (option,) = options_in(Mine)
    assert (option.name, option.field, option.dest) == ("mine-depth", "mine_depth", "kv_mine_depth")
    assert option.spellings == ["--kv-mine-depth", "--kv-deep-down", "--kv_mine_depth", "--kv_deep_down"]


def test_options_of_another_package(tmp_path: Path) -> None:
    install(tmp_path, "kv-mine", GOOD, "mine = kv_mine:MineOptions")
    run = resolved(tmp_path, "--kv-mine-depth=4", "--kv-rounds=2")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "rounds 2\ndepth 4\n" in run.stdout
    assert "warning" not in run.stderr
    bad = resolved(tmp_path, "--kv_mine_depth=0")
    assert bad.returncode == pytest.ExitCode.USAGE_ERROR
    assert "--kv-mine-depth=0: must be at least 1; for example --kv-mine-depth=3" in bad.stderr


FAULTS = {
    "misspelt module": (
        GOOD, "mine = kv_mien:MineOptions",
        "kv-mine: entry point kvsuite.options, mine = kv_mien:MineOptions: cannot be imported (ModuleNotFoundError: No module "
        "named 'kv_mien'); correct it, or uninstall kv-mine",
    ),
    "misspelt object": (
        GOOD, "mine = kv_mine:MienOptions",
        "kv-mine: entry point kvsuite.options, mine = kv_mine:MienOptions: cannot be imported (AttributeError: module "
        "'kv_mine' has no attribute 'MienOptions'); correct it, or uninstall kv-mine",
    ),
    "fails": (
        "raise RuntimeError('first line\\nsecond line')", "mine = kv_mine:MineOptions",
        "kv-mine: entry point kvsuite.options, mine = kv_mine:MineOptions: cannot be imported (RuntimeError: first line); "
        "correct it, or uninstall kv-mine",
    ),
    "no group": (
        GOOD, "mine = kv_mine:whole_number",
        "kv-mine: entry point kvsuite.options, mine = kv_mine:whole_number: is no subclass of "
        "kvsuite.options.option.OptionGroup; name one",
    ),
    "field without option": (
        UNTYPED, "mine = kv_mine:MineOptions",
        "kv-mine: entry point kvsuite.options, mine = kv_mine:MineOptions: MineOptions.mine_depth: has no Option; write "
        "mine_depth: Annotated[type, Option(...)]",
    ),
    "option taken": (
        TAKEN, "mine = kv_mine:MineOptions",
        "kv-mine: entry point kvsuite.options, mine = kv_mine:MineOptions: the option --kv-rounds is taken by kvsuite "
        "(kvsuite.options.common:CommonOptions); rename the field",
    ),
    "entry point taken": (
        GOOD, "dse = kv_mine:MineOptions",
        "kv-mine: entry point kvsuite.options, dse = kv_mine:MineOptions: the name dse is taken by kvsuite "
        "(kvsuite.suites.dse.options:DseOptions); rename it",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("module", "entries", "line"), FAULTS.values(), ids=FAULTS)
def test_a_faulty_group_is_one_line_and_the_others_work(tmp_path: Path, module: str, entries: str, line: str) -> None:
    install(tmp_path, "kv-mine", module, entries)
    # of another package, after the faulty one in the alphabet
    install(tmp_path, "kv-other", GOOD.replace("mine_depth", "other_depth"), "other = kv_other:MineOptions")
    run = resolved(tmp_path, "--kv-rounds=2", "--kv-other-depth=7")
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stderr.splitlines() == [f"kvsuite: warning: {line}"]
    assert "rounds 2\ndepth None\n" in run.stdout


def test_of_two_packages_with_one_option_the_first_has_it(tmp_path: Path) -> None:
    install(tmp_path, "kv-mine", GOOD, "mine = kv_mine:MineOptions")
    install(tmp_path, "kv-other", GOOD, "other = kv_other:MineOptions")
    run = resolved(tmp_path, "--kv-mine-depth=5")
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stderr.splitlines() == [
        "kvsuite: warning: kv-other: entry point kvsuite.options, other = kv_other:MineOptions: the option --kv-mine-depth is "
        "taken by kv-mine (kv_mine:MineOptions); rename the field"
    ]
    assert "depth 5\n" in run.stdout
