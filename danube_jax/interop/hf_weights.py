"""Names and layout of weights: Hugging Face's Llama and Mistral, and ours. The only such place.

Hugging Face keeps a matrix for each projection, [out, in]. Ours are [in, out], and Q, K, V are one
matrix and gate, up are one, side by side along `out`. Rows of Hugging Face's matrices stacked in
that order are therefore our matrix transposed, so that either direction is one copy.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from danube_jax.config import ModelConfig
from danube_jax.interop.transpose import transpose
from danube_jax.models.projections import FUSED, projection_shapes

Params = dict[str, Any]
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a Hugging Face folder."""

    name: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape))


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of our parameter tree, and the tensors that it is made of.

    Attributes:
      path: keys from the root of the tree.
      tensors: in the order in which their rows are stacked.
      transposed: whether our array is the transpose of that stack.
    """

    path: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    transposed: bool

    @property
    def stack_shape(self) -> tuple[int, ...]:
        """Shape of the stacked tensors."""
        first = self.tensors[0].shape
        return (sum(tensor.shape[0] for tensor in self.tensors), *first[1:])

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of our array."""
        return self.stack_shape[::-1] if self.transposed else self.stack_shape

    @property
    def name(self) -> str:
        """The path as one word, for messages."""
        return ".".join(self.path)

    def from_stack(self, stack: np.ndarray) -> np.ndarray:
        """Our array, from the stacked tensors [out, in]."""
        return transpose(stack) if self.transposed else stack

    def to_tensors(self, array: np.ndarray) -> Iterator[tuple[Tensor, np.ndarray]]:
        """The tensors, each contiguous, of our array."""
        stack = transpose(array) if self.transposed else np.ascontiguousarray(array)
        row = 0
        for tensor in self.tensors:
            yield tensor, stack[row : row + tensor.shape[0]]
            row += tensor.shape[0]


def layout(config: ModelConfig) -> tuple[Leaf, ...]:
    """Every array of the model, in the order in which an exported folder holds them."""
    hidden = config.hidden_size

    def matrix(path: tuple[str, ...], *tensors: Tensor) -> Leaf:
        return Leaf(path, tensors, transposed=True)

    def scale(path: tuple[str, ...], name: str) -> Leaf:
        return Leaf((*path, "scale"), (Tensor(f"{name}.weight", (hidden,)),), transposed=False)

    embedding = Tensor(EMBEDDING, (config.vocab_size, hidden))
    leaves = [Leaf(("embed_tokens", "embedding"), (embedding,), transposed=False)]
    shapes = projection_shapes(config)
    for i in range(config.num_hidden_layers):
        prefix, layer = f"model.layers.{i}", f"layers_{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            leaves.append(scale((layer, norm), f"{prefix}.{norm}"))
        for module, names in FUSED.items():
            tensors = [
                Tensor(f"{prefix}.{module[0]}.{name}.weight", shapes[name][::-1]) for name in names
            ]
            leaves.append(matrix((layer, *module, "kernel"), *tensors))
    leaves.append(scale(("norm",), "model.norm"))
    if not config.tie_word_embeddings:
        head = Tensor(HEAD, (config.vocab_size, hidden))
        leaves.append(matrix(("lm_head", "kernel"), head))
    return tuple(leaves)


def group_key(leaf: Leaf) -> str:
    """Leaves with the same key are read and written together: one layer, or one other module."""
    return leaf.path[0]


def set_leaf(params: Params, path: tuple[str, ...], value: Any) -> None:
    """Puts one array into a nested dict, which grows as needed."""
    for key in path[:-1]:
        params = params.setdefault(key, {})
    params[path[-1]] = value


def get_leaf(params: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    """One array of a nested dict.

    Raises:
      KeyError: it has no such path.
    """
    node: Any = params
    for key in path:
        node = node[key]
    return node


def params_from_hf(
    tensors: Mapping[str, Any] | Callable[[str], Any], config: ModelConfig
) -> Params:
    """Our parameter tree (NumPy) from tensors [out, in] in memory, in their own dtype.

    Args:
      tensors: arrays by Hugging Face's name, or a function from the name to the array.
      config: the model.
    """
    get = tensors if callable(tensors) else tensors.__getitem__
    params: Params = {}
    for leaf in layout(config):
        parts = [np.asarray(get(tensor.name)) for tensor in leaf.tensors]
        stack = parts[0] if len(parts) == 1 else np.concatenate(parts)
        set_leaf(params, leaf.path, leaf.from_stack(stack))
    return params


def params_to_hf(params: Params, config: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Hugging Face's tensors [out, in] of a parameter tree, one by one, in its own dtype."""
    for leaf in layout(config):
        for tensor, array in leaf.to_tensors(np.asarray(get_leaf(params, leaf.path))):
            yield tensor.name, array
