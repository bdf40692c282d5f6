"""Presses of kvpress as cache methods of the `hf` engine."""
