"""Buckets: the gradients of a model are exchanged in parts while the backward pass still computes the others.

*A bucket is one exchange of some tensors, of one dtype and at most 25 MB together.*  The backward pass gives the
gradients of the last layers first, so buckets are filled from the last tensor to the first.  A bucket whose gradients
are all there begins; a progress thread (:mod:`hpccomm.progress`) exchanges the buckets one after the other, always in
this order, whatever the order in which they were begun: ranks need not agree about that.  Before each exchange the
ranks tell each other in 8 bytes whether they have begun it, and whether its gradients are finite.  A bucket that is not
finite on any rank ends the step: no further bucket is exchanged, and the states of those that were go back.

The method runs on every bucket as on a vector of its own, and its state belongs to the bucket.  For checkpoints it is
divided into the states of the tensors (:mod:`hpccomm.algorithms.tensor_states`), from which buckets of any size begin.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np

from hpccomm.algorithms.agreement import REMEDY, check_same_tensors, rows_of
from hpccomm.algorithms.reports import ExchangeReport
from hpccomm.algorithms.states import (
    RankChange,
    copy_leaf,
    count_skipped,
    leaves_with_changes,
    map_declared,
    map_parts,
    move_like,
    move_to_host,
    skip_step,
)
from hpccomm.algorithms.tensor_states import join_states, split_state
from hpccomm.algorithms.transforms import Transform, flush, require
from hpccomm.algorithms.trees import TreeLayout, tree_leaves
from hpccomm.arrays import library_of, view_array
from hpccomm.buckets import BUCKET_BYTES, Bucket, group_by_size, memory_of
from hpccomm.calls.fingerprint import Fingerprint
from hpccomm.errors import ArgumentError, MismatchError
from hpccomm.functional import communicator
from hpccomm.kernels.dispatch import kernels
from hpccomm.progress import Call, submit

ABSENT, NOT_FINITE, FINITE = range(3)
"""What the ranks tell each other of a bucket: not begun, or whether its gradient is finite."""
Make = Callable[..., Transform]
"""Makes a method for a communicator, ``hpccomm.gtc``, or for a communicator and a bucket, ``hpccomm.powersgd``."""


def make_method(make: Make, comm: Any, bucket: Bucket) -> Transform:
    """The method of a communicator, and of a bucket if it asks for one."""
    made = make(comm, bucket) if needs_bucket(make) else make(comm)
    if not isinstance(made, Transform):
        raise ArgumentError(
            f"{make!r} made {made!r}: pass hpccomm.gtc, or lambda comm: hpccomm.gtc(comm, density=0.01)"
        )
    return made


def needs_bucket(make: Make) -> bool:
    """Whether a function has a second argument that must be given."""
    try:
        rest = list(inspect.signature(make).parameters.values())[1:2]
    except (TypeError, ValueError):  # a built-in function without a signature
        return False
    positional = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
    return any(each.default is each.empty and each.kind in positional for each in rest)


class BucketInFlight:
    """One bucket: where its tensors lie, its gradient and state, and the gradients that have not come in this step."""

    def __init__(self, number: int, names: list[str], weights: dict[str, Any], tied: Mapping[str, str]) -> None:
        self.number, self.weights = number, {name: weights[name] for name in names}
        self.layout = TreeLayout(self.weights)
        library = library_of(view_array(next(iter(self.weights.values())))[0])
        self.gradient = library.zeros(self.layout.bucket.size, self.layout.bucket.dtype)
        self.places = self.layout.bucket.views(self.gradient)
        self.all_names = frozenset(name for name in tied if tied[name] in self.weights)
        """With the other names of tied weights."""
        self.missing = set(self.all_names)
        self.begun = False
        self.method: Any = None
        self.methods: list[Transform] = []
        """Methods for the tensors alone, which have their states in checkpoints."""
        self.state: Any = None
        self.kept: Any = None
        """The state before this step, as long as it may be skipped."""
        self.step: Any = None

    def __str__(self) -> str:
        first, *rest = self.weights
        return f"bucket {self.number} ({first}{f' to {[*rest][-1]}' if rest else ''})"

    def flatten_weights(self) -> Any:
        """The weights as they are now, as one vector."""
        return self.layout.flatten(self.weights, "weights")

    def clear(self, goes_back: bool) -> None:
        """Wait for the gradients of the next step, in the state of before this one if it goes back."""
        if goes_back:
            self.go_back()
        self.missing, self.begun, self.kept = set(self.all_names), False, None

    def is_finite(self) -> bool:
        """Whether its gradient has neither NaN nor infinity."""
        single = self.gradient.dtype == np.float32
        return bool(kernels(self.gradient).all_finite(self.gradient) if single else np.isfinite(self.gradient).all())

    def update(self) -> bool:
        """Take the method's step, with a copy of the state to return to; whether its method has skipped it."""
        self.kept = map_declared(keep_values, self.state)
        skipped = count_skipped(self.state)
        step, self.state = self.method.update(self.gradient, self.state, self.flatten_weights())
        self.step = self.layout.restore(step)
        return count_skipped(self.state) > skipped

    def go_back(self) -> None:
        """Return to the state before the step, if the method has taken it."""
        if self.kept is not None:
            self.state = keep_costs(self.kept, self.state)


class BucketedExchange:
    """Gradients exchanged by a method in buckets, while the backward pass goes on (the constructor is collective).

    ``weights``: arrays by name, in the order of the layers, that the program changes in place; NumPy's, CuPy's,
    PyTorch's or another library's, also dicts of dicts (``layer.w``).  Buckets of tensors on a device stay there and
    are exchanged in the program's thread, as soon as they have begun.  ``make(comm)``, or ``make(comm, bucket)`` for
    methods that treat tensors one by one, makes the method of a bucket: ``hpccomm.mean``, ``hpccomm.gtc``,
    ``lambda comm, bucket: hpccomm.dgc(comm, bucket)``.  A method that treats its vector as a whole (``clip``, GTC's
    threshold) sees one bucket at a time.

    If a gradient of any rank is not finite, all ranks skip the whole step: every step is zero, residuals and momenta
    are those of before, a loss scale halves, and ``skipped`` counts it; so they do if the method of a bucket skips the
    step on some rank.  Each bucket keeps a copy of its state for this until the step ends.

    >>> from mpi4py import MPI
    >>> from hpccomm import chain, mean, scale
    >>> weights = {"first": np.zeros(2), "last": np.zeros(1)}
    >>> sgd = lambda comm: chain(mean(comm), scale(-0.5))
    >>> exchange = BucketedExchange(MPI.COMM_SELF, weights, sgd)
    >>> exchange.add({"last": np.array([4.0])})  # the backward pass goes on
    >>> exchange.add({"first": np.array([1.0, 2.0])})
    >>> {name: step.tolist() for name, step in exchange.finish().items()}
    {'first': [-0.5, -1.0], 'last': [-2.0]}

    A weight under several names (tied) is exchanged once: the gradients of all its names are added, and its step comes
    under the first name.  A call of ``comm`` inside the step waits for the buckets that have begun, and must come
    after the same ones on all ranks: use ``comm.Dup()`` for other calls of the backward pass.  ``on_step(bucket)`` is
    called in the progress thread after each exchange.
    """

    def __init__(
        self,
        comm: Any,
        weights: Any,
        make: Make,
        bucket_bytes: int = BUCKET_BYTES,
        on_step: Callable[[BucketInFlight], None] = lambda bucket: None,
    ) -> None:
        self.comm, self._make, self._on_step = communicator(comm), make, on_step
        self.who = f"rank {self.comm.rank}: BucketedExchange"
        require(bucket_bytes > 0, f"{self.who}: bucket_bytes is {bucket_bytes}: pass a positive number")
        arrays = dict(tree_leaves(weights))
        require(bool(arrays), f"{self.who}: there are no weights: pass {{name: array}}")
        self._tied = find_tied(arrays, self.who)
        """The first name of each weight, by all its names."""
        self._names_of: dict[str, set[str]] = {}
        """All names of each weight, by the first one."""
        for name, first in self._tied.items():
            self._names_of.setdefault(first, set()).add(name)
        own = {name: view_array(arrays[name])[0] for name, first in self._tied.items() if name == first}
        self._here = not all(isinstance(each, np.ndarray) for each in own.values())
        """Whether exchanges run in the program's thread, whose device and stream are those of its arrays."""
        sizes = [(name, (type(each), each.dtype), each.nbytes) for name, each in own.items()]
        groups = group_by_size(sizes[::-1], bucket_bytes)
        self.buckets = [BucketInFlight(k, names, arrays, self._tied) for k, names in enumerate(groups)]
        self.bucket_of = {name: each for each in self.buckets for name in each.all_names}
        """The bucket of each tensor."""
        self.gradients = {name: self.bucket_of[name].places[first] for name, first in self._tied.items()}
        """Each tensor's gradient, for programs that write it in place and then :meth:`begin` the bucket."""
        self._calls: list[Call] = []
        self.skipped = 0
        """Steps that all ranks skipped because a gradient was not finite."""
        self.skips = False
        """Whether this step is skipped."""
        self.skips_here = False
        """Whether a method has skipped this step on this rank, which the other ranks hear at the next bucket."""
        self._failure = ""
        """What made this step fail on all ranks."""
        self._broken: BaseException | None = None
        self._run("make buckets", self._make_methods)

    def _run(self, text: str, function: Callable[[Any], Any]) -> Any:
        """Run a function on the communicator of the exchanges, and wait for it."""
        return submit(self.comm, function, Fingerprint(text), here=self._here).wait()

    def _make_methods(self, channel: Any) -> None:
        """Compare the buckets of all ranks, and make the method and the state of each."""
        rows = [f"bucket {each.number}: {row}" for each in self.buckets for row in rows_of(each.layout.bucket)]
        check_same_tensors(channel, "BucketedExchange", rows, f"{REMEDY}, and the same bucket_bytes")
        for bucket in self.buckets:
            bucket.method = make_method(self._make, channel, bucket.layout.bucket)
            bucket.state = bucket.method.init(bucket.flatten_weights())

    def add(self, gradients: Any) -> None:
        """Copy the gradients of some tensors, by name; buckets whose gradients are all there begin."""
        found = dict(tree_leaves(gradients))
        arrays = {name: self._check_gradient(name, each) for name, each in found.items()}
        for name, array in arrays.items():
            bucket, place = self.bucket_of[name], self.gradients[name]
            if self._first_of(name, bucket):
                place[...] = array
            else:
                place += array
            bucket.missing.discard(name)
        for bucket in {self.bucket_of[name].number: self.bucket_of[name] for name in arrays}.values():
            if not bucket.missing:
                self._mark(bucket)

    def _first_of(self, name: str, bucket: BucketInFlight) -> bool:
        """Whether no other name of this weight has come."""
        return self._names_of[self._tied[name]] <= bucket.missing

    def _check_gradient(self, name: str, gradient: Any) -> Any:
        self._check_usable("add")
        require(name in self.bucket_of, f"{self.who}: add: no weight is called {name!r}")
        bucket, place = self.bucket_of[name], self.gradients[name]
        require(
            name in bucket.missing and not bucket.begun,
            f"{self.who}: add: the gradient of {name} has come in this step: call finish before the next one",
        )
        array, _ = view_array(gradient, f"{self.who}: add: {name}")
        require(
            isinstance(array, np.ndarray) == isinstance(place, np.ndarray),
            f"{self.who}: add: one of the gradient of {name} and the weight lies on a device: move them together",
        )
        require(
            array.shape == place.shape and array.dtype == place.dtype,
            f"{self.who}: add: the gradient of {name} is {array.dtype} of shape {array.shape}, the weight "
            f"{place.dtype} of shape {place.shape}: make them alike",
        )
        return array

    def begin(self, bucket: int) -> None:
        """Begin a bucket, by its number, whose gradients were all written into :attr:`gradients`."""
        self._check_usable("begin")
        last = len(self.buckets) - 1
        require(
            isinstance(bucket, int | np.integer) and 0 <= bucket <= last,
            f"{self.who}: begin: there is no bucket {bucket!r}: pass 0 to {last}",
        )
        each = self.buckets[bucket]
        require(not each.begun, f"{self.who}: begin: {each} has begun in this step: call finish before the next one")
        require(
            each.missing == each.all_names,
            f"{self.who}: begin: of {each} some gradients were added, but not {', '.join(sorted(each.missing))}: add "
            "all, after which it begins, or write all into gradients",
        )
        self._mark(each)

    def _mark(self, bucket: BucketInFlight) -> None:
        """Begin a bucket, and exchange all that are next."""
        bucket.begun = True
        while len(self._calls) < len(self.buckets) and self.buckets[len(self._calls)].begun:
            self._issue(self.buckets[len(self._calls)])

    def _issue(self, bucket: BucketInFlight) -> None:
        text = Fingerprint(f"bucket {bucket.number} of {len(self.buckets)}")
        exchange, nbytes = partial(self._exchange, bucket), bucket.gradient.nbytes
        self._calls.append(submit(self.comm, exchange, text, here=self._here, nbytes=nbytes))

    def _exchange(self, bucket: BucketInFlight, channel: Any) -> None:
        """Exchange one bucket, in the progress thread."""
        try:
            self._failure = self._failure or self._compare(bucket, channel)
            if not self._failure and not self.skips:
                self.skips_here = bucket.update()
                if bucket is self.buckets[-1]:
                    self._agree(channel)
        except BaseException as error:
            self._broken = error
            raise
        finally:
            self._on_step(bucket)

    def _compare(self, bucket: BucketInFlight, channel: Any) -> str:
        """What is wrong if a rank has not begun the bucket; where one is not finite the step is skipped."""
        fine = not self.skips_here and bucket.begun and bucket.is_finite()
        mine = FINITE if fine else NOT_FINITE if bucket.begun else ABSENT
        everyone = np.empty(channel.size, np.int64)
        channel.Allgather(np.array([mine], np.int64), everyone)
        absent = np.flatnonzero(everyone == ABSENT).tolist()
        if not absent:
            self.skips = self.skips or bool((everyone == NOT_FINITE).any())
            return ""
        return (
            f"finish was called without {bucket} on {'ranks' if absent[1:] else 'rank'} {', '.join(map(str, absent))}: "
            "give every gradient on every rank, zeros where there is none; the states are those of before this step"
        )

    def finish(self) -> dict[str, Any]:
        """Wait for all buckets; the step of each tensor by name, in its weight's form, valid until the next step.

        All are zero where the step is skipped.  Raises on all ranks, and names the ranks, where a bucket has not begun.
        """
        self._check_usable("finish")
        mine = [str(each) for each in self.buckets if not each.begun]
        for bucket in self.buckets[len(self._calls) :]:
            self._issue(bucket)
        calls, self._calls = self._calls, []
        failure = self._wait(calls)
        if self.skips and not failure:
            self._skip_step()
        for bucket in self.buckets:
            bucket.clear(goes_back=bool(failure))
        self.skips = self.skips_here = False
        if failure:
            raise (ArgumentError if mine else MismatchError)(f"{self.who}: {failure}")
        return {name: self.bucket_of[name].step[name] for name, first in self._tied.items() if name == first}

    def _agree(self, channel: Any) -> None:
        """Let all ranks hear that a method has skipped the last bucket on some rank."""
        everyone = np.empty(channel.size, bool)
        channel.Allgather(np.array([self.skips_here]), everyone)
        self.skips = self.skips or bool(everyone.any())

    def _skip_step(self) -> None:
        """Return to the states before this step, and count it as skipped."""
        for bucket in self.buckets:
            bucket.go_back()
            bucket.state = skip_step(bucket.state)
            bucket.step = bucket.layout.restore(np.zeros_like(bucket.gradient))
        self.skipped += 1

    @property
    def failure(self) -> BaseException | None:
        """Why the exchanges of this step have failed."""
        return self._broken or (MismatchError(f"{self.who}: {self._failure}") if self._failure else None)

    def _wait(self, calls: Iterable[Call]) -> str:
        """Wait for the calls of a step; what made it fail on all ranks."""
        for call in calls:
            call.sleep()
            self._broken = self._broken or call.error
        failure, self._failure = self._failure, ""
        if self._broken is not None:
            raise self._broken
        return failure

    def _check_usable(self, verb: str, between: bool = False) -> None:
        require(
            self._broken is None,
            f"{self.who}: {verb}: an exchange has failed ({self._broken}): make a new one, and restore its state",
        )
        under_way = self._calls or any(each.begun or each.missing != each.all_names for each in self.buckets)
        require(not between or not under_way, f"{self.who}: {verb}: a step is under way: call finish first")

    # The state

    @property
    def state(self) -> tuple[Any, ...]:
        """The state of every bucket, for :func:`hpccomm.report`."""
        return tuple(each.state for each in self.buckets)

    def collect_state(self) -> tuple[Any, ...]:
        """The state of every tensor, in the order of the weights, for checkpoints and :func:`hpccomm.for_ranks`.

        Collective, between steps.  It lies in the host's memory and does not depend on ``bucket_bytes``.
        """
        self._check_usable("collect_state", between=True)
        return self._run("collect states", self._split_states)  # type: ignore[no-any-return]

    def _split_states(self, channel: Any) -> tuple[Any, ...]:
        found: dict[str, Any] = {}
        for bucket in self.buckets:
            parts = split_state(move_to_host(bucket.state), self._states_of_tensors(bucket, channel), channel)
            found |= zip(bucket.weights, parts, strict=True)
        return tuple(found[name] for name, first in self._tied.items() if name == first)

    def restore_state(self, states: tuple[Any, ...]) -> None:
        """Continue from what :meth:`collect_state` returned, with buckets of any size (collective, between steps).

        With buckets of the same size the run continues with the same bits.
        """
        self._check_usable("restore_state", between=True)
        names = [name for name, first in self._tied.items() if name == first]
        require(
            isinstance(states, tuple) and len(states) == len(names),
            f"{self.who}: restore_state: pass the states of {len(names)} tensors, as collect_state returns them",
        )
        self._run("restore states", partial(self._join_states, dict(zip(names, states, strict=True))))

    def _join_states(self, states: dict[str, Any], channel: Any) -> None:
        wrong = [
            name
            for bucket in self.buckets
            for name, like in zip(bucket.weights, self._states_of_tensors(bucket, channel), strict=True)
            if form_of(states[name]) != form_of(like)
        ]
        for rank, names in enumerate(channel.allgather(wrong)):
            require(
                not names,
                f"{self.who}: restore_state: on rank {rank} the state of {', '.join(names[:3])} is of another method, "
                "model or number of ranks: pass what collect_state returned, for other ranks through for_ranks",
            )
        for bucket in self.buckets:
            like = bucket.method.init(bucket.flatten_weights())
            joined = join_states([states[name] for name in bucket.weights], move_to_host(like), channel)
            bucket.state = move_like(joined, like)

    def _states_of_tensors(self, bucket: BucketInFlight, channel: Any) -> list[Any]:
        """A new state of each tensor alone, in the host's memory."""
        layouts = [TreeLayout({name: weight}) for name, weight in bucket.weights.items()]
        if not bucket.methods:
            by_tensor = needs_bucket(self._make)
            bucket.methods = [
                make_method(self._make, channel, each.bucket) if by_tensor else bucket.method for each in layouts
            ]
        pairs = zip(bucket.methods, layouts, strict=True)
        return [move_to_host(method.init(each.flatten(each.like, "weights"))) for method, each in pairs]

    def flush(self) -> dict[str, Any]:
        """The step of all gradients that were not sent, as :func:`hpccomm.flush` (collective, between steps)."""
        self._check_usable("flush", between=True)
        self._run("flush", self._flush)
        return {name: self.bucket_of[name].step[name] for name, first in self._tied.items() if name == first}

    def _flush(self, channel: Any) -> None:
        for bucket in self.buckets:
            step, bucket.state = flush(bucket.method, bucket.state, bucket.flatten_weights())
            bucket.step = bucket.layout.restore(step)


def form_of(state: Any) -> list[Any]:
    """The paths of a state's leaves, and the shapes of those that hold values from step to step, or the ranks."""
    return [
        (path, None if change is RankChange.SCRATCH else leaf if change is RankChange.GROUP else np.shape(leaf))
        for path, leaf, change in leaves_with_changes(state)
    ]


def keep_values(path: str, leaf: Any, change: RankChange | None) -> Any:
    """A copy of a leaf that an update may overwrite; buffers hold nothing to keep."""
    return leaf if change is RankChange.SCRATCH else copy_leaf(leaf)


def keep_costs(state: Any, spent: Any) -> Any:
    """A state with the costs of a later one."""
    return spent if isinstance(state, ExchangeReport) else map_parts(keep_costs, state, spent)


def find_tied(arrays: Mapping[str, Any], who: str) -> dict[str, str]:
    """The first name of each array, by all its names: tied weights have several."""
    first: dict[Any, str] = {}
    return {name: first.setdefault(memory_of(view_of(name, each, who)) or name, name) for name, each in arrays.items()}


def view_of(name: str, array: Any, who: str) -> Any:
    """A weight as NumPy's array; raises where steps could not be added in place."""
    view, _ = view_array(array, f"{who}: {name}")
    kind, library = type(array).__name__, type(array).__module__.partition(".")[0]
    fits = getattr(view.flags, "writeable", True) and hasattr(array, "__setitem__") and library not in ("jax", "jaxlib")
    require(fits, f"{who}: {name}: a {kind} that cannot be written: pass arrays, to add steps in place")
    return view
