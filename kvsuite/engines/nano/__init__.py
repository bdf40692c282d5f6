"""Engine `nano`: the paged-KV runtime of kvsuite."""
