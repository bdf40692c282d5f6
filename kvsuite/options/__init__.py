"""The `--kv-*` options: what an option is, the table, and resolving them. Syntax alone."""
