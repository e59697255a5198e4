"""What the kernels of all families share: sums, checks and random numbers."""
