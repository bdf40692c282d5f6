"""A stand-in for mlc_llm: its commands, the lines that it prints, and the ways in which it fails, as observed on a real one.

It computes nothing. What it proves is that the engine gives the right command lines, reads the observed lines and answers,
keeps its deadlines, and leaves no process behind. It cannot prove that the real one takes these command lines, that its
libraries run, that tokens are right, that numbers are plausible, nor how any device behaves. The real one was asked for that
by hand: docs/mlc.md.

``MLC_DOUBLE`` names a fault, ``MLC_DOUBLE_LOG`` a file that gets every command line.
"""

__version__ = "0.20.0.dev0"
