"""Every MPI test runs in lock-step on several world sizes; see ``hpccomm.testing.lockstep``."""

pytest_plugins = ["hpccomm.testing.lockstep", "pytester"]
