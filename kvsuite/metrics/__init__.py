"""Metrics: what a number is called, which way is better, how it comes about."""
