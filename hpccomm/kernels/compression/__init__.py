"""Kernels of compressed gradient exchange: the NumPy reference, compiled loops and their wrappers."""
