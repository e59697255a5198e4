"""Allgathers and allreduces of what compressors make: sparse vectors and signs."""
