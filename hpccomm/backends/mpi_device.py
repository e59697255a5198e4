"""A CUDA-aware MPI: MPI's own collectives on device pointers, if a probe has shown that it accepts them."""

from __future__ import annotations

from typing import Any

from hpccomm.backends.device import DeviceBackend, streams_of
from hpccomm.backends.native import Native, why_not_native
from hpccomm.calls.call import Call
from hpccomm.calls.plans import Plan
from hpccomm.errors import TransportError
from hpccomm.transports import cuda_probe
from hpccomm.transports.cuda import wait
from hpccomm.transports.mpi import mpi_name


class CudaAwareMpi(DeviceBackend):
    """Native MPI, once the probe has succeeded on every node."""

    def __init__(self, planner: Any) -> None:
        super().__init__(planner)
        node, found, device = self.context.node, None, self.device
        if node.rank == 0:
            try:
                found = cuda_probe.verdict(device.number, device.driver)
            except (OSError, RuntimeError) as error:  # no home, no driver: the other ranks wait for the result
                found = cuda_probe.Verdict(str(error), "not probed")
        for each in self.context.private_comm.allgather(node.bcast(found)):
            if each.trouble:
                raise TransportError(f"{mpi_name()} does not accept device pointers ({each.when}: {each.trouble})")
            if each.alone:
                self.remark = f"probed with one process only: {each.alone}"

    def takes(self, call: Call, algorithm: str) -> bool:
        """Whether MPI knows the elements and computes their reduction as we do."""
        if algorithm not in ("", "native") or call.data.half or call.uneven:
            return False
        return call.op is None or (call.op.is_predefined and not why_not_native(call))

    def bind(self, call: Call) -> Plan:
        """Bind MPI's method."""
        native, device, streams = Native(self.planner).bind(call), self.device, streams_of(call)

        def run() -> None:
            wait(device, streams)
            native.run()
            wait(device, streams)

        return Plan(run)
