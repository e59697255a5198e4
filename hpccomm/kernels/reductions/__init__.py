"""Reductions of k vectors: the NumPy reference and compiled loops."""
