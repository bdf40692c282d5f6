"""One case, measured, whatever happens; and what suites share in measuring."""
