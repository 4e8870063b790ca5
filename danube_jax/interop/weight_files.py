"""The weight files of a Hugging Face folder: safetensors or PyTorch's .bin, sharded or not."""

import dataclasses
import gc
import re
import threading
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from danube_jax.array_checksums import row_blocks
from danube_jax.config import ModelConfig
from danube_jax.console import warn
from danube_jax.errors import UserError
from danube_jax.interop import safetensors_file
from danube_jax.interop.hf_config import read_json
from danube_jax.interop.hf_weights import EMBEDDING, HEAD, Leaf, layout
from danube_jax.interop.safetensors_file import RowBlock
from danube_jax.untrusted import READ_ERRORS

SAFETENSORS = "model.safetensors"
SAFETENSORS_INDEX = "model.safetensors.index.json"
TORCH = "pytorch_model.bin"
TORCH_INDEX = "pytorch_model.bin.index.json"

# Buffers that old versions of transformers saved; they follow from the config.
_IGNORED = re.compile(r"(model\.layers\.\d+\.self_attn\.)?rotary_emb\.(inv_freq|(cos|sin)_cached)$")
_MAX_NAMED = 3
_BLOCK = 2**22


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a weight file says of a tensor: its dtype by safetensors' name, and its shape."""

    dtype: str
    shape: tuple[int, ...]


class WeightFiles:
    """The tensors of a folder, checked against a config, read one leaf at a time.

    Attributes:
      tensors: dtype and shape by name, of the tensors that the model needs.
      paths: the weight files.
    """

    def __init__(self, folder: Path, config: ModelConfig):
        """Lists the tensors and checks their names, dtypes and shapes; reads no weights.

        Raises:
          UserError: no weights, a missing, damaged or truncated file, or tensors that are not those
            of the config; names them.
        """
        self.folder, self.config = Path(folder), config
        self._files = _find(self.folder)
        self.paths = tuple(dict.fromkeys(self._files.paths()))
        found = self._files.list()
        self.tied_head = config.tie_word_embeddings and HEAD in found
        self.tensors = _check(found, config, self.folder)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that the model needs."""
        sizes = {name: dtype.itemsize for name, dtype in safetensors_file.DTYPES.items()}
        return sum(int(np.prod(t.shape)) * sizes[t.dtype] for t in self.tensors.values())

    def dtype(self, leaf: Leaf) -> np.dtype:
        """The dtype of one array of our tree."""
        return safetensors_file.DTYPES[self.tensors[leaf.tensors[0].name].dtype]

    def read_stack(self, leaf: Leaf) -> np.ndarray:
        """The leaf's tensors, stacked by rows: [out, in].

        Raises:
          UserError: a file cannot be read.
        """
        stack = np.empty(leaf.stack_shape, self.dtype(leaf))
        row = 0
        for tensor in leaf.tensors:
            self._files.read(tensor.name, stack[row : row + tensor.shape[0]])
            row += tensor.shape[0]
        return stack

    def row_blocks(self, leaf: Leaf) -> Iterator[RowBlock]:
        """The rows of `read_stack` (a vector is one row) in blocks; each is gone with the next."""
        for tensor in leaf.tensors:
            yield from self._files.row_blocks(tensor.name)

    def read(self, leaf: Leaf) -> np.ndarray:
        """One array of our tree, in its stored dtype."""
        return leaf.from_stack(self.read_stack(leaf))

    def warn_of_untied_head(self) -> None:
        """Warns where a tied model carries a head of its own that differs from its embedding."""
        if not self.tied_head:
            return
        arrays = []
        for name in (EMBEDDING, HEAD):
            entry = self._files.list()[name]
            array = np.empty(entry.shape, safetensors_file.DTYPES[entry.dtype])
            self._files.read(name, array)
            arrays.append(array.view(np.uint8))
        if not np.array_equal(*arrays):
            warn(
                f"{self.folder}: {HEAD} differs from the embedding although tie_word_embeddings is "
                "true; it is left out, as transformers does"
            )


class _Safetensors:
    def __init__(self, headers: Mapping[Path, Mapping[str, safetensors_file.Entry]]):
        self._where = {
            name: (path, entry)
            for path, header in headers.items()
            for name, entry in header.items()
        }
        self._paths = tuple(headers)

    def paths(self) -> Iterator[Path]:
        return iter(self._paths)

    def list(self) -> dict[str, Shape]:
        return {n: Shape(entry.dtype, entry.shape) for n, (_, entry) in self._where.items()}

    def read(self, name: str, out: np.ndarray) -> None:
        safetensors_file.read_into(*self._where[name], out)

    def row_blocks(self, name: str) -> Iterator[RowBlock]:
        return safetensors_file.read_row_blocks(*self._where[name])


class _TorchBin:
    """PyTorch's pickled files: one is held at a time, and read with `weights_only`."""

    def __init__(self, shards: Mapping[str, Path], paths: tuple[Path, ...]):
        self._torch = _import_torch(paths[0])
        self._lock = threading.Lock()
        self._paths = paths
        self._shards = dict(shards)
        self._shapes: dict[str, Shape] = {}
        self._open: Path | None = None
        self._state: dict[str, Any] = {}
        for path in paths:
            for name, tensor in self._read(path, mmap=True).items():
                if self._shards.setdefault(name, path) != path:
                    raise UserError(f"{path}: {name} is in {self._shards[name].name} too")
                self._shapes[name] = Shape(self._dtype(tensor), tuple(tensor.shape))
            for name, where in self._shards.items():
                if where == path and name not in self._shapes:
                    raise UserError(f"{path}: lacks {name}, which {TORCH_INDEX} says it holds")

    def _dtype(self, tensor: Any) -> str:
        names = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
        name = str(tensor.dtype).removeprefix("torch.")
        return names.get(name, name)

    def _load(self, path: Path) -> dict[str, Any]:
        if self._open == path:
            return self._state
        self._state, self._open = {}, None
        gc.collect()
        _check_zip(path)  # PyTorch writes checksums and does not look at them
        self._state, self._open = self._read(path, mmap=False), path
        return self._state

    def _read(self, path: Path, mmap: bool) -> dict[str, Any]:
        try:
            mmap = mmap and zipfile.is_zipfile(path)  # files of PyTorch before 1.6 are none
            state = self._torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
            return {str(name): tensor.detach() for name, tensor in state.items()}
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
        except Exception as error:  # torch raises many kinds for a damaged file
            reason = " ".join(str(error).split())[:160]
            raise UserError(f"{path}: damaged or no PyTorch weights ({reason})") from None

    def paths(self) -> Iterator[Path]:
        return iter(self._paths)

    def list(self) -> dict[str, Shape]:
        return self._shapes

    def read(self, name: str, out: np.ndarray) -> None:
        tensor = self._load(self._shards[name])[name].contiguous()
        words = tensor.view(self._torch.uint8 if tensor.ndim else tensor.dtype)
        out.view(np.uint8)[...] = words.numpy()

    def row_blocks(self, name: str) -> Iterator[RowBlock]:
        shape = self._shapes[name]
        array = np.empty(shape.shape, safetensors_file.DTYPES[shape.dtype])
        with self._lock:  # two threads ask, and one shard is held
            self.read(name, array)
        matrix = array if array.ndim == 2 else array.reshape(1, -1)
        return (RowBlock(rows) for rows in row_blocks(matrix))


def _check_zip(path: Path) -> None:
    """Compares the contents of PyTorch's zip file with its checksums, where it has them.

    Raises:
      UserError: they differ, or the file is no whole zip file.
    """
    if not zipfile.is_zipfile(path):
        return  # the format before PyTorch 1.6
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.CRC:  # PyTorch can be told to write 0
                    with archive.open(entry) as file:
                        while file.read(_BLOCK):
                            pass
    except (*READ_ERRORS, zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise UserError(f"{path}: damaged ({error}); fetch it again") from None


def _import_torch(path: Path) -> Any:
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{path}: PyTorch's .bin weights need torch, which is not installed: "
            "pip install 'danube-jax[hf]', or take a folder with safetensors"
        ) from None
    return torch


def _find(folder: Path) -> _Safetensors | _TorchBin:
    if (folder / SAFETENSORS_INDEX).is_file():
        shards = _read_index(folder / SAFETENSORS_INDEX)
        headers = {path: safetensors_file.read_header(path) for path in _ordered(shards)}
        _check_index(shards, headers)
        return _Safetensors(headers)
    single = folder / SAFETENSORS
    if single.is_file():
        return _Safetensors({single: safetensors_file.read_header(single)})
    if (folder / TORCH_INDEX).is_file():
        shards = _read_index(folder / TORCH_INDEX)
        return _TorchBin(shards, _ordered(shards))
    if (folder / TORCH).is_file():
        return _TorchBin({}, (folder / TORCH,))
    raise UserError(
        f"{folder}: no weights; expected {SAFETENSORS}, {SAFETENSORS_INDEX}, {TORCH} or "
        f"{TORCH_INDEX}"
    )


def _ordered(shards: Mapping[str, Path]) -> tuple[Path, ...]:
    return tuple(sorted(set(shards.values())))


def _read_index(path: Path) -> dict[str, Path]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path}: no weight_map; expected the file of every tensor")
    shards = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise UserError(f"{path}: {name} is in {file!r}; expected a file name in this folder")
        shards[name] = path.parent / file
    missing = sorted({shard.name for shard in shards.values() if not shard.is_file()})
    if missing:
        raise UserError(
            f"{path.parent}: {', '.join(missing[:_MAX_NAMED])} missing "
            f"({len(missing)} of {len(set(shards.values()))} weight files that {path.name} names); "
            "fetch them"
        )
    return shards


def _check_index(
    shards: Mapping[str, Path], headers: Mapping[Path, Mapping[str, safetensors_file.Entry]]
) -> None:
    seen: dict[str, Path] = {}
    for path, header in headers.items():
        for name in header:
            if name in seen:
                raise UserError(f"{path}: {name} is in {seen[name].name} too; expected it once")
            seen[name] = path
    for name, path in shards.items():
        if seen.get(name) != path:
            raise UserError(f"{path}: lacks {name}, which {SAFETENSORS_INDEX} says it holds")


def _check(found: Mapping[str, Shape], config: ModelConfig, folder: Path) -> dict[str, Shape]:
    """The tensors that the model needs, of those that there are."""
    found = {name: shape for name, shape in found.items() if not _IGNORED.search(name)}
    expected = {tensor.name: tensor for leaf in layout(config) for tensor in leaf.tensors}
    biases = sorted(name for name in found if name.endswith(".bias"))
    if biases:
        raise UserError(
            f"{folder}: {_some(biases)}: the weights have biases, which the decoder lacks"
        )
    unexpected = sorted(
        found.keys() - expected.keys() - ({HEAD} if config.tie_word_embeddings else set())
    )
    missing = [name for name in expected if name not in found]
    if missing:
        hint = f"; there is {unexpected[0]} instead" if unexpected else ""
        raise UserError(f"{folder}: {_some(missing)} missing from the weights{hint}")
    if unexpected:
        raise UserError(
            f"{folder}: {_some(unexpected)} in the weights: no part of a "
            f"{config.model_type} model of {config.num_hidden_layers} layers"
        )
    for name, tensor in expected.items():
        if found[name].shape != tensor.shape:
            raise UserError(
                f"{folder}: {name} has shape {list(found[name].shape)}; the config asks for "
                f"{list(tensor.shape)}"
            )
        if found[name].dtype not in safetensors_file.DTYPES:
            raise UserError(
                f"{folder}: {name} is {found[name].dtype}; expected BF16, F16 or F32 "
                "(quantised weights are not supported)"
            )
    for leaf in layout(config):
        dtypes = sorted({found[tensor.name].dtype for tensor in leaf.tensors})
        if len(dtypes) > 1:
            raise UserError(
                f"{folder}: {leaf.tensors[0].name} and its neighbours are {' and '.join(dtypes)}; "
                "expected one dtype, since they are one matrix here"
            )
    return {name: found[name] for name in expected}


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(names[:_MAX_NAMED]) + more
