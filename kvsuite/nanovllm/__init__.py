"""The paged-KV serving runtime: scheduler, block manager, attention over paged keys and values."""
