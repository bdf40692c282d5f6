"""The job script for Slurm: bash reads it, and its options of kvsuite exist (those of Ray and Slurm are not checked)."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "docs" / "slurm" / "ray_sweep.sbatch"


def test_bash_reads_it() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


def test_its_options_exist() -> None:
    from kvsuite.options.groups import all_options

    given = {name.partition("=")[0] for name in re.findall(r"--kv-([a-z-]+)", SCRIPT.read_text())}
    assert {"cluster", "device", "resume"} <= given
    assert given <= {option.name for option in all_options()}
