"""Other devices, other processes, and processes that die."""

import contextlib
import json
import signal
import socket
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import HANG_SECONDS, TRAIN
from helpers import read_rows
from jax.sharding import Mesh
from small_runs import STEPS, arguments
from staged import read_stage
from test_signals import steps_of

from danube_jax.config import CheckpointConfig, ModelConfig, OptimizerConfig
from danube_jax.errors import EXIT_INTERRUPTED, EXIT_RUN_FAILED
from danube_jax.models.decoder import init_params
from danube_jax.training.checkpoint import Checkpointer
from danube_jax.training.mesh import DATA_AXIS
from danube_jax.training.optimizer import make_optimizer
from danube_jax.training.step import init_state, state_shardings, state_specs

HEARTBEAT = 30  # seconds; less is too little for processes that share one busy core
# After that long at most the other process must have ended: the heartbeat, and what it takes to
# notice and to write a line on a busy machine.
STATED_SECONDS = HEARTBEAT + 30


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start_two(server, corpus, workdir, logs, *more):
    """Two processes of one run, with a stage log each."""
    port, out = free_port(), []
    for i, log in enumerate(logs):
        log.unlink(missing_ok=True)
        flags = (
            f"--coordinator_address=127.0.0.1:{port}",
            "--num_processes=2",
            f"--process_id={i}",
            f"--heartbeat_seconds={HEARTBEAT}",
        )
        command = arguments(corpus.config, workdir, *more, *flags)
        out.append(server.start(TRAIN, *command, log=log))
    return out


def until_steps(processes, logs):
    """Returns when both processes train."""
    deadline = time.monotonic() + HANG_SECONDS
    while any(read_stage(log) == "start-up" or not trained(log) for log in logs):
        assert all(process.poll(0.01) is None for process in processes), processes[0].shown()
        assert time.monotonic() < deadline


def trained(log):
    """Whether a process has done a step."""
    return log.exists() and "steps|" in log.read_text()


def read_windows(*logs):
    """Step → the windows of all processes, sorted; an attempt at a step has the same ones."""
    out = {}
    for log in logs:
        path = log.with_suffix(".windows")
        for line in path.read_text().splitlines() if path.exists() else ():
            with contextlib.suppress(ValueError):  # torn by a kill
                step, hashes = json.loads(line)
                out.setdefault(step, set()).update(hashes)
    return {step: sorted(hashes) for step, hashes in out.items()}


def assert_close(workdir, undisturbed, logs):
    """The same data at every step, and losses equal within rounding."""
    losses = [row["loss"] for row in read_rows(workdir, "train")]
    expected = [row["loss"] for row in undisturbed.train]
    # float32 sums in another order, over a few steps of a model whose losses are near 5
    np.testing.assert_allclose(losses, expected[: len(losses)], rtol=2e-4)
    found = read_windows(*logs)
    for step in range(1, len(losses) + 1):
        assert set(found[step]) == set(undisturbed.steps[step]), step


def test_devices_come_and_go(corpus, server, undisturbed, full, tmp_path):
    """Eight, four, two, one, and back, with ZeRO-1 and without."""
    expected, _ = undisturbed
    workdir, log = tmp_path / "run", tmp_path / "log"
    stages = [(8, True), (4, False), (2, True), (1, True), (2, False), (8, False)]
    if not full:
        stages = [(4, True), (1, False), (4, True)]  # fewer devices and changes compile faster
    last = 0
    for i, (devices, zero1) in enumerate(stages):
        last = STEPS if i == len(stages) - 1 else last + STEPS // len(stages)
        more = (f"--config.training.max_steps={last}", f"--config.training.zero1={zero1}")
        command = arguments(corpus.config, workdir, *more)
        ended = server.run(TRAIN, *command, log=log, devices=devices)
        assert ended.status == 0, ended.err
        if i:
            assert f"{stages[i - 1][0]} devices and this run has {devices}" in ended.err
        assert read_rows(workdir, "train")[-1]["step"] == last
    assert_close(workdir, expected, [log])


@pytest.mark.parametrize("zero1", [True, False])
def test_state_is_exact_on_any_number_of_devices(zero1, tmp_path):
    """Written by eight devices, read by four, two and one, and written and read back again."""
    model = ModelConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    optimizer = make_optimizer(OptimizerConfig())
    state = init_state(jax.jit(init_params, static_argnums=0)(model, jax.random.key(0)), optimizer)
    rng = np.random.default_rng(1)
    state = jax.tree.map(
        lambda x: rng.normal(size=x.shape).astype(x.dtype) if x.dtype == jnp.float32 else x + 7,
        state,
    )
    expected = jax.tree.map(np.asarray, state)
    for step, (devices, sharded) in enumerate([(8, zero1), (4, not zero1), (1, True), (2, zero1)]):
        mesh = Mesh(np.array(jax.devices()[:devices]), (DATA_AXIS,))
        shardings = state_shardings(mesh, state_specs(state, devices, sharded))
        abstract = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            state,
            shardings,
        )
        checkpointer = Checkpointer(tmp_path / "c", CheckpointConfig())
        if step:
            restored, _ = checkpointer.restore_latest(abstract)
        else:
            restored = jax.device_put(state, shardings)
        for found, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(expected), strict=True):
            assert np.asarray(found).tobytes() == wanted.tobytes()
        assert len(restored.params["embed_tokens"]["embedding"].sharding.device_set) == devices
        checkpointer.save(step + 1, restored, {})
        checkpointer.close()


@pytest.mark.parametrize("victim", [0, 1])
def test_one_of_two_processes_dies(corpus, server, undisturbed, full, victim, tmp_path, figures):
    """The other one ends within the stated time and says why; the job starts again, and goes on.

    One process begins, two go on and then one alone: a checkpoint is anybody's.
    """
    expected, _ = undisturbed
    workdir, logs = tmp_path / "run", [tmp_path / "log0", tmp_path / "log1"]
    command = arguments(corpus.config, workdir)
    ended = server.run(TRAIN, *command, "--config.training.max_steps=3", log=logs[0])
    assert ended.status == 0, ended.err
    processes = start_two(server, corpus, workdir, logs)
    until_steps(processes, logs)
    other = processes[1 - victim]
    assert "resuming at step 3 of" in processes[0].shown()
    processes[victim].signal(signal.SIGKILL)
    sent = time.monotonic()
    ended = other.poll(STATED_SECONDS)
    waited = time.monotonic() - sent
    assert ended is not None, f"a hang: {other.shown()}"
    figures("one of two dies", victim=victim, seconds=round(waited, 1), status=ended.status)
    assert ended.status in (EXIT_RUN_FAILED, -signal.SIGABRT), ended.err
    assert len(ended.errors) == 1, ended.err
    assert "the last complete checkpoint is whole" in ended.errors[0]
    processes[victim].wait()
    if full:  # two again, asked to stop by a signal to one of them
        processes = start_two(server, corpus, workdir, logs)
        until_steps(processes, logs)
        processes[victim].signal(signal.SIGTERM)
        for process in processes:
            ended = process.wait()
            assert ended.status in (EXIT_INTERRUPTED, 0), ended.err
        if ended.status:
            shown = "".join(process.shown() for process in processes)
            assert f"saved at step {steps_of(workdir)[-1]};" in shown
    # One alone, to the end.
    ended = server.run(TRAIN, *command, log=logs[0])
    assert ended.status == 0, ended.err
    assert len(read_rows(workdir, "train")) == STEPS
    assert_close(workdir, expected, logs)
