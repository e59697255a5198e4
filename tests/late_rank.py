"""Code for programs of which a rank is late: until the others have noticed it, however long a busy machine takes."""

LATE_RANK = '''
def sleep_until_asked(more=2.0, limit=60.0):
    """Sleep until a watchdog has asked where this rank stands, and then as long as it may need to write that."""
    from hpccomm.observe.flight_recorder import ANSWERED, recorder
    words, until = recorder().ring.words, time.monotonic() + limit
    before = words[ANSWERED]
    while words[ANSWERED] == before and time.monotonic() < until:
        time.sleep(0.02)
    time.sleep(more)
def sleep_until_others_wait(comm, limit=60.0):
    """Sleep until all other ranks of this node are in a call."""
    from hpccomm.observe.flight_recorder import open_ring
    until = time.monotonic() + limit
    for rank, pid in comm.context.consistency.processes.items():
        waits = rank == comm.rank
        while not waits and time.monotonic() < until:
            time.sleep(0.02)
            with open_ring(pid) as ring:
                waits = bool(ring.running())
'''
