"""Figures of the pipeline suite, drawn from rows alone."""
