"""Hot loops: a NumPy reference that defines every bit, and the same functions compiled by Numba and for CUDA."""
