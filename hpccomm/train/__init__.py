"""Real training jobs, small enough to run anywhere: data, networks in NumPy, and one synchronous loop."""
