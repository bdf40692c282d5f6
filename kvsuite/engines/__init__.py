"""Engines: one runtime under test per file, and what the `hf` engine is made of."""
