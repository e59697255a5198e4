"""Measuring: one loop, a table of collectives, the tables of OSU and nccl-tests."""

from hpccomm.bench.loop import Options, Row, measure

__all__ = ["Options", "Row", "measure"]
