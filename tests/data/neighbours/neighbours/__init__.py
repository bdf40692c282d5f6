"""What somebody else adds to kvsuite: no file of kvsuite was touched for it."""
