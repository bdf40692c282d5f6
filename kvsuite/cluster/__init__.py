"""Sweeps over several hosts: who gets which case, the process on each host that measures, and Ray, in one file alone."""
