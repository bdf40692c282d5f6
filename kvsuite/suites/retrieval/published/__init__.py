"""The field's own tasks: those of lm-evaluation-harness, and local files of RULER and LongBench."""
