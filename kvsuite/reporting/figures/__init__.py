"""Figures drawn from record rows; matplotlib is imported where a figure is drawn."""
