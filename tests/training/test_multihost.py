"""Two processes through jax.distributed train as one process does."""

import socket

import numpy as np
from helpers import command, read_rows, start_command


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_two_processes_give_the_losses_of_one(corpus, tmp_path):
    port = free_port()
    common = (f"--config={corpus.config}", "--config.training.max_steps=12")
    processes = [
        start_command(
            *common,
            f"--workdir={tmp_path / 'two'}",
            f"--coordinator_address=127.0.0.1:{port}",
            "--num_processes=2",
            f"--process_id={index}",
        )
        for index in range(2)
    ]
    outputs = [process.communicate(timeout=300) for process in processes]
    for process, (_, err) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, err
    result = command(*common, f"--workdir={tmp_path / 'one'}")
    assert result.returncode == 0, result.stderr
    two, one = (
        [row["loss"] for row in read_rows(tmp_path / name, "train")] for name in ("two", "one")
    )
    assert len(two) == 12
    # the same numbers summed in another order, in float32, over 12 steps
    np.testing.assert_allclose(two, one, rtol=1e-4)
    two, one = (read_rows(tmp_path / name, "evaluation") for name in ("two", "one"))
    assert two[-1]["tokens/first"] == one[-1]["tokens/first"]
    np.testing.assert_allclose(two[-1]["loss/first"], one[-1]["loss/first"], rtol=1e-4)
