"""The interpreter of records: MPI's functions and the shared-memory kernels, called by address."""
