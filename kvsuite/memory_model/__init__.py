"""Predicted memory, from formulas: what a setting will take, before anything is loaded. Imports no torch."""
