"""Fitting what compresses: `python -m kvsuite fit-compressor`."""
