"""Small but real training jobs: datasets, networks in NumPy, training loops and the table of methods."""
