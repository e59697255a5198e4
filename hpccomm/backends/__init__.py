"""Who runs a call: shared memory, schedules in two levels, CUDA IPC, NCCL."""
