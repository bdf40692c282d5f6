"""Figures of the design space."""
