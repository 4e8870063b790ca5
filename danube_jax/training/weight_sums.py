"""Which weights' gradients are summed where they are made, and how those are differentiated.

What is differentiated holds sums in place of these weights (`models/gradient_sum.py`; in FP8,
`models/fp8.py`); `join` puts each beside its weight, for the decoder to compute with.
"""

from typing import Any

import jax
from flax import traverse_util

from danube_jax.models.fp8 import Fp8Sums
from danube_jax.models.gradient_sum import GradientSum, SummedWeight
from danube_jax.models.projections import FUSED

PyTree = Any
Path = tuple[str, ...]

KERNEL = "kernel"
_EMBEDDING = ("embed_tokens", "embedding")
_HEAD = ("lm_head", "kernel")


def linear_layers(params: PyTree) -> list[Path]:
    """Paths of the linear modules of the blocks, in order."""
    flat = traverse_util.flatten_dict(params)
    return sorted(path[:-1] for path in flat if path[-1] == KERNEL and path[-3:-1] in FUSED)


def split(weights: PyTree) -> tuple[PyTree, dict[Path, jax.Array]]:
    """Takes out the weights whose gradients can be summed where they are made.

    These are the kernels of the linear modules, and the embedding where it is not the head too: a
    sum may be used once only.

    Args:
      weights: what a micro-batch computes with; trees of other kinds come back as they are.

    Returns:
      What is differentiated: `weights` with sums of zero in place of those; and those by path.
    """
    flat = traverse_util.flatten_dict(weights)
    paths = [(*path, KERNEL) for path in linear_layers(weights)]
    if _EMBEDDING in flat and _HEAD in flat:
        paths.append(_EMBEDDING)
    taken = {path: flat[path] for path in paths}
    flat |= {path: GradientSum.zeros(weight.shape) for path, weight in taken.items()}
    return traverse_util.unflatten_dict(flat), taken


def join(tree: PyTree, weights: dict[Path, jax.Array]) -> PyTree:
    """Undoes `split`: a `SummedWeight` for each of `weights`, whose sum is that of `tree`."""
    flat = traverse_util.flatten_dict(tree)
    flat |= {path: SummedWeight(weight, flat[path]) for path, weight in weights.items()}
    return traverse_util.unflatten_dict(flat)


def is_sum(node: Any) -> bool:
    """Whether the gradient of a node is its next value."""
    return isinstance(node, GradientSum | Fp8Sums)


def totals(grads: PyTree) -> PyTree:
    """Gradients with plain arrays in place of `GradientSum`s."""

    def plain(node: Any) -> Any:
        return node.total if isinstance(node, GradientSum) else node

    return jax.tree.map(plain, grads, is_leaf=is_sum)
