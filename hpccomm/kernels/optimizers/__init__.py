"""Optimizer steps on flat vectors: the NumPy reference and compiled loops."""
