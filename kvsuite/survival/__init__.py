"""What keeps a sweep alive: time limits, what is left of a dead process, resuming."""
