"""Horovod's spelling on hpccomm: change ``import horovod.torch as hvd`` to ``import hpccomm.horovod.torch as hvd``."""
