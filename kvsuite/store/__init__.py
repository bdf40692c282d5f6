"""Writing a run, reading it back, and what a record may look like."""
