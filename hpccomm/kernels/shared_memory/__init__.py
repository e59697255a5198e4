"""Collectives over shared memory: record layouts, memory operations, the collectives, and their compiled form."""
