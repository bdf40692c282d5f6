"""The retrieval suite: whether a cache still holds what a context said."""
