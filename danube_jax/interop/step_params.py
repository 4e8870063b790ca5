"""The parameters in a checkpoint: read group by group and verified, or written one by one.

Orbax's checkpoints of a whole tree need the whole tree in memory. Reading is done with partial
restores. Writing hands Orbax leaves that are streamed when their turn comes; their arrays are Zarr
2 without compression in one chunk, which is a small JSON file and the array's bytes. A matrix may
be stored in Fortran's order, which Zarr knows: then its bytes are those of its transpose, and the
weights of other systems, [out, in], become ours, [in, out], by copying.
"""

import dataclasses
import errno
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import future as ocp_future

from danube_jax import files
from danube_jax.array_checksums import MatrixChecksum, host_checksum
from danube_jax.errors import UserError
from danube_jax.interop.safetensors_file import RowBlock

STATE, META = "state", "meta"
ARRAY_JSON = ".zarray"
LeafPath = tuple[str, ...]
_SYNCERS = 4  # they wait for the disk, which takes several at once
_WORKERS = 2  # one sums while the other reads or writes; each holds a block
# Or a folder could be made after a save has failed and its remains were removed.
_FOLDERS_FIRST = ocp.AsyncOptions(create_directories_asynchronously=False)


class DamagedCheckpoint(Exception):
    """A checkpoint that cannot be read or does not hold what it says; the message says why."""


class StepParams:
    """The arrays under `params` of one checkpoint step, whoever wrote it.

    Attributes:
      path: the step's folder.
      meta: its JSON.
      leaves: shape and dtype of every array, by its path within `params`.
    """

    def __init__(self, path: Path):
        """Reads what is there, but no arrays.

        Raises:
          DamagedCheckpoint: it cannot be read.
        """
        self.path = Path(path).absolute()
        try:
            with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
                self.meta: dict[str, Any] = checkpointer.restore(self.path / META)
            files.check_seal(self.meta, str(self.path / META))
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                tree = checkpointer.metadata(self.path / STATE).item_metadata.tree
            self._prefix = "['params']" if set(tree) == {"params"} else ".params"
            self.leaves = {
                tuple(key.key for key in path): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
                for path, leaf in jax.tree_util.tree_leaves_with_path(tree["params"])
            }
            self._checksums: Mapping[str, int] = self.meta["checksums"]
        except Exception as error:  # any reader's error means the same: it cannot be used
            raise DamagedCheckpoint(_one_line(error)) from error

    def read(self, paths: Iterable[LeafPath]) -> dict[LeafPath, np.ndarray]:
        """Some of the arrays, in the stored dtype and either order, checked by checksum.

        Raises:
          DamagedCheckpoint: one cannot be read, or is not what was written.
        """
        paths, arrays = list(paths), {}
        for path in paths:
            array = self._read_raw(path)
            if array is not None:
                arrays[path] = array
        arrays |= self._restore([path for path in paths if path not in arrays])
        for path, array in arrays.items():
            name = self._prefix + "".join(f"[{key!r}]" for key in path)
            if host_checksum(array) != self._checksums.get(name):
                raise DamagedCheckpoint(f"checksum of {name} differs")
        return arrays

    def _read_raw(self, path: LeafPath) -> np.ndarray | None:
        """An array that `save_params` wrote, or None where Orbax stores it in another way."""
        folder = self.path / STATE / ".".join(("params", *path))
        leaf = self.leaves[path]
        try:
            layout = json.loads((folder / ARRAY_JSON).read_text())
            if layout["compressor"] is not None or layout["chunks"] != list(leaf.shape):
                return None
            transposed = layout["order"] == "F"
            array = np.empty(leaf.shape[::-1] if transposed else leaf.shape, leaf.dtype)
            with open(folder / _chunk_name(leaf.shape), "rb", buffering=0) as file:
                view = memoryview(array.reshape(-1).view(np.uint8))
                while len(view):
                    count = file.readinto(view)
                    if not count:
                        raise DamagedCheckpoint(f"{folder.name} is truncated")
                    view = view[count:]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DamagedCheckpoint(_one_line(error)) from error
        return array.T if transposed else array

    def _restore(self, paths: Sequence[LeafPath]) -> dict[LeafPath, np.ndarray]:
        if not paths:
            return {}
        item: dict[str, Any] = {}
        for path in paths:
            _set(item, ("params", *path), 0)
        restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                args = ocp.args.PyTreeRestore(item, restore_args, partial_restore=True)
                tree = checkpointer.restore(self.path / STATE, args=args)
        except Exception as error:
            raise DamagedCheckpoint(_one_line(error)) from error
        arrays = {}
        for path in paths:
            array = tree["params"]
            for key in path:
                array = array[key]
            arrays[path] = array
        return arrays


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _set(tree: dict[str, Any], path: Sequence[str], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


@dataclasses.dataclass(frozen=True)
class LeafSource:
    """An array that is streamed when it is written.

    Attributes:
      path: keys from the root of the parameter tree.
      shape, dtype: of the array.
      transposed: whether the blocks are rows of the array's transpose.
      row_blocks: makes blocks of rows (a vector is one row), each used before the next is made.
    """

    path: LeafPath
    shape: tuple[int, ...]
    dtype: np.dtype
    transposed: bool
    row_blocks: Callable[[], Iterator[RowBlock]]

    def matrix_shape(self) -> tuple[int, int]:
        """Shape of all blocks together."""
        shape = self.shape if len(self.shape) == 2 else (1, self.shape[0])
        return shape[::-1] if self.transposed else shape


def save_params(
    step_folder: Path,
    sources: Sequence[LeafSource],
    meta: Mapping[str, Any],
    advance: Callable[[int], None],
) -> None:
    """Writes a checkpoint step whose `state` is ``{"params": ...}``.

    Args:
      step_folder: the folder to make, named by the step.
      sources: the arrays; a block of two of them is in memory at a time.
      meta: goes into `meta` beside the checksums.
      advance: called with the bytes of every array that is written.

    Where it fails or is interrupted, nothing goes on writing arrays after it.

    Raises:
      UserError: an array cannot be read.
      OSError: the disk does not take it.
    """
    step_folder = Path(step_folder).absolute()
    tree: dict[str, Any] = {}
    for source in sources:
        _set(tree, ("params", *source.path), source)
    handler = _LeafHandler(advance)
    registry = ocp.type_handlers.create_type_handler_registry((LeafSource, handler))
    pytree = ocp.PyTreeCheckpointHandler(
        type_handler_registry=registry, use_ocdbt=False, use_compression=False
    )
    items = ocp.CompositeCheckpointHandler(
        composite_options=ocp.CompositeOptions(async_options=_FOLDERS_FIRST),
        **{STATE: pytree, META: ocp.JsonCheckpointHandler()},
    )
    try:
        with ocp.Checkpointer(items) as checkpointer:
            args = {STATE: ocp.args.PyTreeSave(tree), META: ocp.args.JsonSave({})}
            checkpointer.save(step_folder, args=ocp.args.Composite(**args))
        checksums = {
            "['params']" + "".join(f"[{key!r}]" for key in path): value
            for path, value in sorted(handler.checksums.items())
        }
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
            content = files.seal({**meta, "checksums": checksums})
            checkpointer.save(step_folder / META, args=ocp.args.JsonSave(content), force=True)
    except Exception as error:
        cause = handler.error or error
        if isinstance(cause, UserError | OSError):
            raise cause from None
        raise
    finally:
        handler.stop()


class _Stopped(Exception):
    """The save has ended: nobody waits for the arrays."""


class _LeafHandler(ocp.type_handlers.NumpyHandler):
    """Writes a `LeafSource` as the NumPy array that it makes."""

    def __init__(self, advance: Callable[[int], None]):
        super().__init__()
        self._advance, self._lock = advance, threading.Lock()
        self._stopped, self._writing = threading.Event(), threading.Lock()
        self.checksums: dict[LeafPath, int] = {}
        self.error: BaseException | None = None

    def stop(self) -> None:
        """Ends what writes in the background: Orbax waits for it only where all goes well."""
        self._stopped.set()
        with self._writing:
            pass

    async def serialize(self, values, infos, args=None):
        async def write_all() -> None:
            for info in infos:
                await info.await_path_creation()
            with (
                self._writing,
                ThreadPoolExecutor(_WORKERS) as workers,
                ThreadPoolExecutor(_SYNCERS) as syncer,
            ):
                jobs = [
                    workers.submit(self._write, value, Path(info.path), syncer)
                    for value, info in zip(values, infos, strict=True)
                ]
                try:
                    for job in jobs:
                        job.result().result()
                except BaseException as error:
                    self.error = error
                    for job in jobs:
                        job.cancel()
                    raise

        return [ocp_future.CommitFutureAwaitingContractedSignals(write_all(), name="params")]

    def _write(self, source: LeafSource, folder: Path, syncer: ThreadPoolExecutor) -> Future:
        """Streams one array; returns what waits for the disk."""
        self._check_stop()
        folder.mkdir(parents=True, exist_ok=True)
        array_json = {
            "zarr_format": 2,
            "shape": list(source.shape),
            "chunks": list(source.shape),
            "dtype": "bfloat16" if source.dtype.name == "bfloat16" else source.dtype.str,
            "compressor": None,
            "fill_value": None,
            "filters": None,
            "order": "F" if source.transposed else "C",
            "dimension_separator": ".",
        }
        (folder / ARRAY_JSON).write_text(json.dumps(array_json))
        checksum = MatrixChecksum(*source.matrix_shape(), transposed=source.transposed)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        descriptor = os.open(folder / _chunk_name(source.shape), flags, 0o666)
        try:
            for block in source.row_blocks():
                self._check_stop()
                checksum.update(block.rows)
                _append(block, descriptor)
                with self._lock:
                    self._advance(block.rows.nbytes)
            assert checksum.rows == source.matrix_shape()[0], source.path
        except BaseException:
            os.close(descriptor)
            raise
        with self._lock:
            self.checksums[source.path] = checksum.value()
        # Waiting for the disk takes no processor, so it goes on beside the next arrays.
        return syncer.submit(_sync_and_close, descriptor)

    def _check_stop(self) -> None:
        if self._stopped.is_set():
            raise _Stopped


# What a kernel or a file system says that cannot copy from one file to the other.
_NO_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.ETXTBSY)


def _append(block: RowBlock, descriptor: int) -> None:
    """Writes a block at the end of a file; the kernel copies it where it can."""
    left = block.rows.nbytes
    if block.descriptor is not None and hasattr(os, "copy_file_range"):
        try:
            while left:
                offset = block.offset + block.rows.nbytes - left
                count = os.copy_file_range(block.descriptor, descriptor, left, offset)
                if not count:
                    break
                left -= count
        except OSError as error:
            if error.errno not in _NO_COPY:
                raise
    view = memoryview(block.rows.reshape(-1).view(np.uint8))[block.rows.nbytes - left :]
    while len(view):
        view = view[os.write(descriptor, view) :]


def _chunk_name(shape: tuple[int, ...]) -> str:
    return ".".join("0" * len(shape))


def _sync_and_close(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
