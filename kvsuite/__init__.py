"""kvsuite: what a KV-cache configuration costs, and what it does to quality, in one record per case."""

__version__ = "0.1.0"
