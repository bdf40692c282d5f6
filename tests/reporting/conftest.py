"""Record rows as every test of this folder uses them."""

from record_rows import row, rows, run

__all__ = ["row", "rows", "run"]
