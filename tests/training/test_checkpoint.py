"""Checksums, what is kept, and what a damaged or missing checkpoint leads to."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from danube_jax.array_checksums import checksums, host_checksum
from danube_jax.config import CheckpointConfig
from danube_jax.errors import UserError
from danube_jax.training.checkpoint import Checkpointer

STATE = {"w": jnp.arange(48, dtype=jnp.float32).reshape(8, 6), "n": jnp.int32(3)}
ABSTRACT = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), STATE
)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32, jnp.float8_e4m3fn])
def test_every_single_bit_flip_changes_the_checksum(dtype):
    array = np.asarray(jnp.linspace(-3, 3, 40).astype(dtype)).reshape(5, 8)
    words = array.view(f"u{array.dtype.itemsize}")
    before = int(checksums(jnp.asarray(array)))
    rng = np.random.default_rng(0)
    for _ in range(200):
        index = tuple(rng.integers(0, size) for size in words.shape)
        flipped = words.copy()
        flipped[index] ^= words.dtype.type(1 << rng.integers(0, 8 * array.dtype.itemsize))
        assert int(checksums(jnp.asarray(flipped.view(array.dtype)))) != before


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16])
@pytest.mark.parametrize("shape", [(3,), (1, 5), (411, 5_170), (3, 700_000)])
def test_checksum_on_the_host_is_the_same(dtype, shape):
    array = np.random.default_rng(0).normal(size=shape).astype(dtype)
    assert host_checksum(array) == int(checksums(jnp.asarray(array)))
    if len(shape) == 2:
        assert host_checksum(array.T) == int(checksums(jnp.asarray(array.T)))


def test_swapped_values_change_the_checksum():
    array = np.arange(10, dtype=np.float32)
    swapped = array.copy()
    swapped[[2, 7]] = swapped[[7, 2]]
    assert int(checksums(jnp.asarray(array))) != int(checksums(jnp.asarray(swapped)))


def test_checksum_does_not_depend_on_the_sharding():
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    sharded = jax.device_put(STATE["w"], NamedSharding(mesh, P("data")))
    assert int(checksums(sharded)) == int(checksums(STATE["w"]))


def test_round_trip_and_what_is_kept(tmp_path):
    config = CheckpointConfig(keep_last=2, keep_every_steps=4)
    checkpointer = Checkpointer(tmp_path / "c", config)
    for step in range(1, 8):
        state = jax.tree.map(lambda x, step=step: x + step, STATE)
        checkpointer.save(step, state, {"step": step})
    checkpointer.wait()
    assert checkpointer.steps() == [4, 6, 7]
    state, meta = checkpointer.restore_latest(ABSTRACT)
    assert meta["step"] == 7
    np.testing.assert_array_equal(state["w"], STATE["w"] + 7)
    checkpointer.close()


def test_half_written_checkpoint_is_not_there(tmp_path):
    checkpointer = Checkpointer(tmp_path / "c", CheckpointConfig())
    checkpointer.save(1, STATE, {})
    checkpointer.close()
    partial = tmp_path / "c" / "2.orbax-checkpoint-tmp-123"
    (partial / "state").mkdir(parents=True)
    checkpointer = Checkpointer(tmp_path / "c", CheckpointConfig())
    assert checkpointer.steps() == [1]
    checkpointer.close()


def test_no_checkpoint_is_none_and_all_damaged_is_an_error(tmp_path):
    checkpointer = Checkpointer(tmp_path / "c", CheckpointConfig())
    assert checkpointer.restore_latest(ABSTRACT) is None
    checkpointer.save(1, STATE, {})
    checkpointer.wait()
    for file in (tmp_path / "c" / "1" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(UserError, match=r"none of the checkpoints \[1\] can be read"):
        checkpointer.restore_latest(ABSTRACT)
    assert (tmp_path / "c" / "1").is_dir()
    checkpointer.close()


def test_wrong_shape_is_not_restored(tmp_path):
    checkpointer = Checkpointer(tmp_path / "c", dataclasses.replace(CheckpointConfig()))
    checkpointer.save(1, STATE, {})
    checkpointer.wait()
    other = ABSTRACT | {"w": jax.ShapeDtypeStruct((8, 7), jnp.float32)}
    with pytest.raises(UserError, match="can be read"):
        checkpointer.restore_latest(other)
    checkpointer.close()
