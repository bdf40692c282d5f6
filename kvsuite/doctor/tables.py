"""The diagnosis as a terminal shows it."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvsuite.foreign_text import visible

from .findings import Diagnosis, State
from .noise import Noise

_MARKS: dict[State, tuple[str, str]] = {
    "ok": ("✓", "green"),
    "attention": ("!", "yellow"),
    "missing": ("–", "cyan"),
    "broken": ("✗", "bold red"),
}


def show(diagnosis: Diagnosis, console: Console) -> None:
    """Print every section, the noise, and what it comes to."""
    show_findings(diagnosis, console)
    if diagnosis.noise:
        console.print(Text("Noise", style="bold"))
        for noise in diagnosis.noise.values():
            console.print(Text(visible(_noise(noise))), soft_wrap=True)
        console.print()
    console.print(Text(_summary(diagnosis), style="bold"))


def show_findings(diagnosis: Diagnosis, console: Console) -> None:
    """Print every section."""
    for title, findings in diagnosis.sections.items():
        table = Table(
            title=title, title_justify="left", title_style="bold", box=None, show_header=False, pad_edge=False
        )
        table.add_column(width=1)
        table.add_column(no_wrap=True, min_width=16)
        table.add_column(overflow="fold")
        for finding in findings:
            mark, style = _MARKS[finding.state]
            found = Text(visible(finding.found))
            if finding.mend:
                found.append(f"\n→ {finding.mend}", style="cyan")
            table.add_row(Text(mark, style=style), finding.part, found)
        console.print(table)
        console.print()


def _noise(noise: Noise) -> str:
    lines = [f"  {noise.device}: {noise.work}, {noise.rounds} of them, {1e3 * noise.round_s:.1f} ms in the median"]
    if noise.step_s_by_threads:
        each = ", ".join(f"{threads}: {1e3 * seconds:.1f} ms" for threads, seconds in noise.step_s_by_threads.items())
        lines.append(f"    a product by threads: {each}; fastest with {noise.threads}")
    stolen = "" if noise.stolen is None else f", {noise.stolen:.1%} of the processor stolen by the host"
    lines.append(f"    coefficient of variation {noise.cv:.1%}, drift {noise.drift:+.1%} over the test{stolen}")
    lines.append(f"    {noise.verdict}")
    return "\n".join(lines)


def _summary(diagnosis: Diagnosis) -> str:
    states = [finding.state for section in diagnosis.sections.values() for finding in section]
    missing = [
        finding.part for finding in diagnosis.sections.get("Engines and parts", ()) if finding.state == "missing"
    ]
    if diagnosis.broken:
        return f"kvsuite cannot run: {', '.join(finding.part for finding in diagnosis.broken)} broken"
    without = f"missing: {', '.join(missing)}" if missing else "nothing is missing"
    return f"kvsuite works; {states.count('attention')} to mind; {without}"
