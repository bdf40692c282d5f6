"""Workloads: what is run and what is scored."""
