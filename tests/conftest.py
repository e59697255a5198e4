"""MPI tests run in lock-step, at several world sizes."""

pytest_plugins = ["hpccomm.testing.lockstep"]
