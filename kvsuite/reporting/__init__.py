"""Everything that turns records into files: the store, the report, the original's files, tables and figures.

The rooms here read plain record rows (``Record.to_dict()``); none of them imports torch, pytest or an engine.
"""
