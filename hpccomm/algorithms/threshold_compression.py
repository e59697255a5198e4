"""GTC, gradient threshold compression: one word for each element whose residual reaches τ (Strom, Interspeech 2015).

*r the residual (not sent yet), τ the threshold.*  Every rank, every step::

    r ← r + g;   send the index and sign of each element with |r| ≥ τ;   r ← r ∓ τ there

and all ranks step on the sum, or mean, of ±τ.  An element is sent at most once a step, whatever its residual.  The
publication adds the messages of all ranks: use ``reduce="sum"`` with its learning rates, the mean over p ranks with p
times those.  τ is in the units of one rank's gradient::

    method = chain(gtc(comm, tau="auto"), scale(-0.1))

On the wire: 4 bytes for each element sent, or with ``code="rice"`` 1.5 + log2(1/density) bits; see
:func:`~hpccomm.threshold`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from hpccomm.algorithms.compression.selection import threshold
from hpccomm.algorithms.error_feedback import feedback
from hpccomm.algorithms.transforms import Transform

if TYPE_CHECKING:
    from mpi4py import MPI


def gtc(
    comm: MPI.Intracomm,
    tau: float | Literal["auto"] = "auto",
    *,
    density: float | None = None,
    reduce: Literal["mean", "sum"] = "mean",
    code: Literal["words", "rice"] = "words",
    exchange: str = "auto",
) -> Transform:
    """Exchange the elements that reach ``tau``; ``density`` instead sets the fraction of the elements sent in a step.

    ``exchange`` as in :func:`~hpccomm.feedback`.  ``tau="auto"`` keeps between 0.01 % and 1 % of the elements on the
    wire.  Gradients of shape (n,), float32.
    """
    return feedback(threshold(tau, density=density, code=code), comm, reduce=reduce, exchange=exchange)
