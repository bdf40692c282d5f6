"""The commands of ``python -m kvsuite``, one file each.

A command module has ``add_parser(subparsers)``; the parser it adds sets ``run``, which takes the parsed arguments and
returns the exit code.
"""
