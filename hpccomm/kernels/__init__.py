"""The hot loops: reductions and shared-memory collectives, in Python as reference and compiled by Numba."""
