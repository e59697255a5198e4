"""Trees: tensors of any library, alone or in dicts, lists and tuples, seen as the one vector that a method works on.

*A leaf is an array of any library that* :func:`hpccomm.arrays.view_array` *reads; a path names it:*
``layer.w``.  NumPy's and CuPy's arrays are no trees, methods take them as they are.  For everything else
the functions of this module flatten weights and gradients to one vector, leaf after leaf in the order of the weights
that a method saw first, or of its bucket where it has one, and give the step back in the form and library of the
weights.  Ranks compare names, order, shapes and dtypes when a method first sees a tree: a vector has no names, so
another order on another rank would add other tensors.  A single contiguous tensor of one dimension is not copied.
A tensor of PyTorch or JAX on a CUDA device is seen by CuPy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hpccomm.algorithms.agreement import find_difference, rows_of
from hpccomm.algorithms.exact_steps import exact_step, exact_tensor
from hpccomm.arrays import (
    borrow,
    check_array,
    convert_like,
    is_bfloat16,
    is_on_device,
    library_of,
    to_torch,
    view_array,
)
from hpccomm.buckets import Bucket
from hpccomm.errors import ArgumentError, MismatchError

Vector = npt.NDArray[Any]
Tree = Any


def is_tree(x: Any) -> bool:
    """Whether ``x`` is to be flattened: anything but an array with NumPy's functions, as NumPy's and CuPy's are."""
    return not isinstance(x, np.ndarray) and not hasattr(x, "__array_function__")


def tree_leaves(tree: Tree, path: str = "") -> Iterator[tuple[str, Any]]:
    """The path and value of every leaf, in order; a tree that is one leaf has the path ``""``."""
    for name, each in list_children(tree):
        if is_branch(each):
            yield from tree_leaves(each, f"{path}{name}.")
        else:
            yield f"{path}{name}", each


def is_branch(x: Any) -> bool:
    """Whether ``x`` holds other trees."""
    return isinstance(x, Mapping | list | tuple)


def list_children(tree: Tree) -> list[tuple[str, Any]]:
    """The names and values directly inside a tree; a leaf is its own only child."""
    if isinstance(tree, Mapping):
        return [(str(name), each) for name, each in tree.items()]
    if is_branch(tree):
        return list(zip(map(str, getattr(tree, "_fields", range(len(tree)))), tree, strict=True))
    return [("", tree)]


def rebuild_tree(like: Tree, take: Callable[[str, Any], Any], path: str = "") -> Tree:
    """A tree of the form of ``like`` whose leaves are ``take(path, leaf)``."""
    if not is_branch(like):
        return take(path.rstrip("."), like)
    parts = [rebuild_tree(each, take, f"{path}{name}.") for name, each in list_children(like)]
    if isinstance(like, Mapping):
        return dict(zip(like, parts, strict=True))
    return type(like)(*parts) if hasattr(like, "_fields") else type(like)(parts)


ALIKE = "pass weights and gradients as trees of the same form"


class TreeLayout:
    """Where the leaves of a tree of weights lie in its vector.

    ``orders`` holds the order of the leaves by the set of their names, and gets that of these weights if it has none.
    """

    def __init__(
        self, weights: Tree, bucket: Bucket | None = None, orders: dict[frozenset[str], list[str]] | None = None
    ) -> None:
        found = list(tree_leaves(weights))
        arrays = dict(found)
        if len(arrays) < len(found):
            twice = sorted({name for name, _ in found if [other for other, _ in found].count(name) > 1})
            raise ArgumentError(f"two of the weights are called {', '.join(twice)}: rename the keys of the tree")
        by_tensor = bucket is not None and list(arrays) != [""]  # else the bucket's vector, in another library
        names = list(arrays) if orders is None else orders.setdefault(frozenset(arrays), list(arrays))
        names = [entry.name for entry in bucket.table] if bucket is not None and by_tensor else names
        check_names("weights", arrays, names)
        self.like = weights
        self.bucket = Bucket({name: arrays[name] for name in names})

    def flatten(self, tree: Tree, what: str) -> Vector:
        """The leaves of a tree of the same form as one vector, without a copy where it is a single vector."""
        leaves = dict(tree_leaves(tree))
        check_names(what, leaves, [entry.name for entry in self.bucket.table])
        if len(leaves) == 1:
            array, _ = view_array(next(iter(leaves.values())), f"the {what}")
            if array.shape == (self.bucket.size,) and array.dtype == self.bucket.dtype and array.flags.c_contiguous:
                return array
        return self.bucket.flatten(leaves)

    def restore(self, vector: Vector) -> Tree:
        """A vector in the form and library of the weights; an exact step has exact steps as leaves."""
        target = getattr(vector, "target", None)
        convert = convert_leaf if target is None else step_leaf
        whole = vector if target is None else target
        views = self.bucket.views(library_of(whole).ascontiguousarray(whole, self.bucket.dtype))
        return rebuild_tree(self.like, lambda name, leaf: convert(views[name], leaf))


def convert_leaf(array: npt.NDArray[Any], like: Any) -> Any:
    """An array as one of ``like``'s library; libraries whose arrays cannot be written get memory of their own."""
    if is_on_device(array):
        return view_array(like)[1](array)
    array, back = np.asarray(array), borrow(like)[1]
    return back(array if back is to_torch or isinstance(like, np.ndarray) else array.copy())


def step_leaf(target: npt.NDArray[Any], weights: Any) -> Any:
    """The step from a leaf to its target, exact where the arrays of the library can be written."""
    if isinstance(weights, np.ndarray):
        return exact_step(weights, target)
    array, back = borrow(weights)
    return exact_tensor(weights, target) if back is to_torch else convert_leaf(exact_step(array, target), weights)


def check_names(what: str, given: Mapping[str, Any], wanted: list[str]) -> None:
    """Raise where a tree has other leaves than it should."""
    if given.keys() == set(wanted):
        return
    if "" in given or "" in wanted:
        problem = f"{describe_form(list(given))} instead of {describe_form(wanted)}"
    else:
        missing, unknown = (
            [each for each in wanted if each not in given],
            [each for each in given if each not in wanted],
        )
        parts = (("missing", missing), ("unknown", unknown))
        problem = ", ".join(f"{word} {list_names(names)}" for word, names in parts if names)
    raise ArgumentError(f"the {what}: {problem}: {ALIKE}, with the names of the bucket if the method has one")


def describe_form(names: list[str]) -> str:
    """The form of a tree of leaves with these names."""
    return "one array" if names == [""] else f"a tree of {list_names(names) or 'no arrays'}"


def list_names(names: list[str]) -> str:
    """The first names."""
    more = f" and {len(names) - 8:,} more" if len(names) > 8 else ""
    return ", ".join(map(repr, names[:8])) + more


class Layouts:
    """The layouts of the trees that a method sees: one order of the leaves, the same on all ranks.

    The order is that of the ``bucket``, else the one in which the names came first.  The ranks of ``comms``, over which
    the method exchanges, compare each layout once, also for the layouts ``inside``, those of the method's parts.
    """

    def __init__(self, bucket: Bucket | None, comms: tuple[Any, ...], inside: Sequence[Layouts] = ()) -> None:
        self.bucket, self.comms, self.inside = bucket, comms, inside
        self.orders: dict[frozenset[str], list[str]] = {}
        self.compared: set[Any] = set()

    def find(self, weights: Tree) -> TreeLayout:
        """The layout of a tree of weights."""
        return TreeLayout(weights, self.bucket, self.orders)

    def agree(self, weights: Tree) -> TreeLayout:
        """The layout of a tree of weights (collective where it is new); raises as :meth:`compare` does."""
        layout = self.find(weights)
        if not is_branch(weights):
            self.compare(self.bucket)
        self.compare(layout.bucket)
        return layout

    def compare(self, bucket: Bucket | None) -> None:
        """Raise on all ranks of each communicator in which the tensors of a vector differ.

        Collective where the tensors are new.  Nothing is raised before all communicators have compared them: no rank
        is left waiting in a comparison.
        """
        if bucket is None or not self.comms or (known := (bucket.table, bucket.dtype)) in self.compared:
            return
        for problem in [find_difference(comm, "weights", rows_of(bucket)) for comm in self.comms]:
            if problem:
                raise MismatchError(problem)
        self.note(known)

    def note(self, known: Any) -> None:
        """These tensors need not be compared again."""
        self.compared.add(known)
        for each in self.inside:
            each.note(known)


class StateKind:
    """The type of a method's states, known once ``init`` was called; the update refuses those of other methods."""

    def __init__(self) -> None:
        self.type: type | None = None

    def note(self, state: Any) -> Any:
        """The state, whose type is that of all to come."""
        self.type = type(state)
        return state

    def check(self, state: Any) -> None:
        """Raise for the state of another method."""
        kind = type(state)
        if self.type is None or kind is self.type or not (issubclass(kind, tuple) or issubclass(self.type, tuple)):
            return
        raise ArgumentError(
            f"update: the state is a {kind.__name__}, this method's is a {self.type.__name__}: pass the state that "
            "init, or the last update, of this method returned"
        )


def check_weights(weights: Vector, bucket: Bucket | None) -> Vector:
    """The weights; raises for those that are no floating-point numbers, or have another byte order or shape."""
    array = check_array(weights, "the weights") if isinstance(weights, np.ndarray) else weights
    if array.dtype.kind not in "fc" and not is_bfloat16(array.dtype):
        raise ArgumentError(f"the weights are {array.dtype}: pass floating-point numbers, x.astype('f4')")
    if array.ndim == 0:
        raise ArgumentError("the weights are one number without a dimension: pass a vector, w.reshape(1)")
    if bucket is not None and array.shape != (bucket.size,):
        found = f"the weights have shape {array.shape}, the bucket's part ({bucket.size},)"
        raise ArgumentError(f"{found}: pass a vector of the bucket's size")
    return weights


def read_gradient(gradient: Any, weights: Vector) -> Vector:
    """A gradient of any library beside weights that are one array; raises unless it is like them."""
    if type(gradient) is not np.ndarray:
        if is_branch(gradient):
            raise ArgumentError(f"the gradient is a {type(gradient).__name__}, the weights one array: {ALIKE}")
        gradient, _ = view_array(gradient, "the gradient")
        if isinstance(gradient, np.ndarray) != isinstance(weights, np.ndarray):
            raise ArgumentError("one of gradient and weights lies on a device, the other on the host: move them there")
    check_alike(gradient, weights)
    return gradient  # type: ignore[no-any-return]


def check_alike(gradient: Vector, weights: Vector) -> None:
    """Raise unless shapes and dtypes are equal: broadcasting or a cast would hide a mistake."""
    if gradient.shape != weights.shape or gradient.dtype != weights.dtype:
        raise ArgumentError(
            f"the gradient is {gradient.dtype} of shape {gradient.shape}, the weights {weights.dtype} "
            f"of shape {weights.shape}: make them alike, e.g. with hpccomm.Bucket and astype"
        )


def init_for_trees(init: Callable[[Vector], Any], layouts: Layouts, kind: StateKind) -> Callable[[Tree], Any]:
    """``init(weights)`` for weights of any form (collective where the method exchanges named tensors)."""
    init = getattr(init, "for_vectors", init)

    def init_any(weights: Tree) -> Any:
        if not is_tree(weights):
            vector = check_weights(weights, layouts.bucket)
            layouts.compare(layouts.bucket)
            return kind.note(init(vector))
        if is_on_device(weights):
            layouts.compare(layouts.bucket)
            return kind.note(init(as_cupy(weights)))
        return kind.note(init(check_weights(layouts.agree(weights).flatten(weights, "weights"), layouts.bucket)))

    init_any.for_vectors = init  # type: ignore[attr-defined]
    return init_any


def update_for_trees(
    update: Callable[[Vector, Any, Vector], tuple[Vector, Any]], layouts: Layouts, kind: StateKind
) -> Callable[[Tree, Any, Tree], tuple[Tree, Any]]:
    """``update(gradient, state, weights)`` for gradients and weights of any form; the step has that of the weights."""
    update = getattr(update, "for_vectors", update)

    def update_any(gradient: Tree, state: Any, weights: Tree) -> tuple[Tree, Any]:
        kind.check(state)
        if not is_tree(weights):
            return update(read_gradient(gradient, weights), state, weights)
        if is_on_device(weights):
            step, state = update(as_cupy(gradient), state, as_cupy(weights))
            return convert_like(step.reshape(weights.shape), weights), state
        layout = layouts.agree(weights)
        step, state = update(layout.flatten(gradient, "gradient"), state, layout.flatten(weights, "weights"))
        return layout.restore(step), state

    update_any.for_vectors = update  # type: ignore[attr-defined]
    return update_any


def finish_for_trees(
    finish: Callable[[Any, Vector], tuple[Vector, Any]], layouts: Layouts
) -> Callable[[Any, Tree], tuple[Tree, Any]]:
    """``finish(state, weights)`` for weights of any form."""

    def finish_any(state: Any, weights: Tree) -> tuple[Tree, Any]:
        if not is_tree(weights):
            return finish(state, weights)
        layout = layouts.agree(weights)
        step, state = finish(state, layout.flatten(weights, "weights"))
        return layout.restore(step), state

    return finish_any


def export_for_trees(export: Callable[[Any], Vector], layouts: Layouts) -> Callable[..., Tree]:
    """``export(state, weights)``: the vector in the form of the weights; ``export(state)`` is the vector."""

    def export_any(state: Any, weights: Tree = None) -> Tree:
        vector = export(state)
        if weights is None:
            return vector
        return layouts.find(weights).restore(vector) if is_tree(weights) else vector.astype(weights.dtype)

    return export_any


def apply_for_trees(apply: Callable[[Vector, Any, Vector], Any], layouts: Layouts) -> Callable[[Tree, Any, Tree], Any]:
    """``apply(gradient, state, weights)`` for weights of any form, which are written."""

    def apply_any(gradient: Tree, state: Any, weights: Tree) -> Any:
        if not is_tree(weights):
            return apply(gradient, state, weights)
        if is_on_device(weights):
            return apply(as_cupy(gradient), state, as_cupy(weights))
        layout = layouts.agree(weights)
        leaves = {name: writable_view(name, leaf) for name, leaf in tree_leaves(weights)}
        vector = layout.bucket.flatten(leaves)
        state = apply(layout.flatten(gradient, "gradient"), state, vector)
        for name, part in layout.bucket.views(vector).items():
            leaves[name][...] = part
        return state

    return apply_any


def writable_view(name: str, leaf: Any) -> npt.NDArray[Any]:
    """A leaf's memory; raises where it cannot be written."""
    array, _ = borrow(leaf, f"the weights {name}".rstrip())
    if not array.flags.writeable:
        raise ArgumentError(
            f"the weights {name} are a read-only {type(leaf).__name__}: call update, and add the step that it returns"
        )
    return array


def as_cupy(tensor: Any) -> Any:
    """A contiguous tensor on a CUDA device as CuPy's vector; no element is copied.

    Kernels run on CuPy's current stream.  DLPack makes that stream wait for the other library's when a tensor is passed
    in, and the other one wait for CuPy's when the step is returned.
    """
    return view_array(tensor)[0].reshape(-1)
