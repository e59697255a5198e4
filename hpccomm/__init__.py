"""Faster, safer collectives and gradient synchronisation for training on MPI clusters."""

__version__ = "0.1.0"
