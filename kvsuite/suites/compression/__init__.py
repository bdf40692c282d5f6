"""The compression suite: what cache policies do to quality, memory and speed of one request."""
