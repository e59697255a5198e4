"""What one call is: its buffers, its operation, its fingerprint, and whether all ranks make the same one."""
