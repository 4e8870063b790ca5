"""A checkpoint written array by array: when its writing fails, it ends."""

import errno
import shutil
import threading
import time

import numpy as np
import orbax.checkpoint as ocp
import pytest

from danube_jax.interop.safetensors_file import RowBlock
from danube_jax.interop.step_params import LeafSource, StepParams, save_params

ROWS = 200


@pytest.fixture
def source():
    """A matrix that takes two seconds to read, and whether its reading has begun."""
    begun = threading.Event()

    def row_blocks():
        for row in range(ROWS):
            begun.set()
            yield RowBlock(np.full((1, 4), row, np.float32))
            time.sleep(0.01)

    return LeafSource(("w",), (ROWS, 4), np.dtype(np.float32), False, row_blocks), begun


def test_what_is_written_is_read(source, tmp_path):
    save_params(tmp_path / "0", [source[0]], {"a": 1}, lambda count: None)
    step = StepParams(tmp_path / "0")
    assert step.meta["a"] == 1
    np.testing.assert_array_equal(step.read([("w",)])[("w",)][:, 0], np.arange(ROWS))


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_nothing_is_written_once_another_part_has_failed(source, error, tmp_path, monkeypatch):
    """Or the remains of an import would come back after they were removed."""
    leaf, begun = source

    async def fail(*args, **kwargs):
        assert begun.wait(60)
        raise error

    monkeypatch.setattr(ocp.JsonCheckpointHandler, "_save_fn", fail)
    counts = []
    with pytest.raises(type(error)):
        save_params(tmp_path / "out" / "0", [leaf], {}, counts.append)
    written = len(counts)
    assert written < ROWS
    shutil.rmtree(tmp_path / "out")
    time.sleep(0.2)
    assert len(counts) == written
    assert not (tmp_path / "out").exists()
