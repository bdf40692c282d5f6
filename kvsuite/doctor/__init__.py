"""``python -m kvsuite doctor``: what of kvsuite works on this machine, what would make the rest work, and how noisy it is."""
