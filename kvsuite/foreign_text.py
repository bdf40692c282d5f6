"""Text that others wrote, such as names, reasons and values of options, made harmless for what shows it. Imports nothing.

A row, a file name or a command line may hold escape sequences that steer a terminal, line ends that forge lines, marks that
turn the reading direction, and formulas that a spreadsheet runs. Data keep such text as it is; whoever shows it writes it with
`visible`, or with `csv_cell` where a spreadsheet will read it.
"""

from __future__ import annotations

from typing import Any

#: characters of an option's value that a message repeats: enough to know it again
VALUE_LIMIT = 120
#: characters of a message: what it is about stands at its beginning, the mend at its end
MESSAGE_LIMIT = 4000
# what spreadsheets take for the beginning of a formula, the wide forms of East Asian keyboards among them
_FORMULA = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")


def visible(text: object, limit: int | None = None) -> str:
    r"""Foreign text as one line for a terminal: what is not printable is written out.

    Control characters (C0 and C1, hence every escape sequence), line ends, marks of the writing direction, characters without
    width and lone surrogates become ``\x1b``, ``\n``, ``\u202e``. What comes out goes in unchanged.

    Parameters
    ----------
    text
        Anything; ``str`` of it is shown.
    limit
        Characters at most, at least 40; of more the middle is left out, and their number said. ``None`` for no limit.
    """
    whole = shown = str(text)
    if not shown.isprintable():
        shown = "".join(one if one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in shown)
    if limit is None or len(shown) <= limit:
        return shown
    left_out = f"...({len(whole)} characters)..."
    kept = max(limit - len(left_out), 2)
    return shown[: kept - kept // 2] + left_out + shown[len(shown) - kept // 2 :]


def visible_lines(text: object) -> str:
    """Text of several lines, each `visible`: a table whose cells are foreign, the message of an error of somebody else."""
    return "\n".join(map(visible, str(text).split("\n")))


def csv_cell(value: Any) -> Any:
    """A value for a cell of a CSV: text that a spreadsheet would run gets an apostrophe before it; numbers stay as they are.

    Text is made `visible` as well, so that a row is a line. Idempotent, so a cell that is read and written again is the same.
    """
    if not isinstance(value, str):
        return value
    text = visible(value)
    if not text.lstrip().startswith(_FORMULA) or _is_number(text):
        return text
    return "'" + text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
