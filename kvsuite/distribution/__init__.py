"""How cases are spread: over the GPUs of a host, over shards, and what a sweep will take."""
