"""Allgathers and allreduces of compressed vectors: sparse vectors, signs, and byte messages of any length."""
