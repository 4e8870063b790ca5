"""Kills a command at drawn moments, again and again, until it has done its work."""

import collections
import dataclasses
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from commands import Ended, Running
from staged import read_stage

POLL_SECONDS = 0.002
LONGEST_LIFE = 300.0


@dataclasses.dataclass
class Tally:
    """How many kills hit which stage."""

    stages: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    journeys: int = 0

    @property
    def kills(self) -> int:
        """All of them."""
        return self.stages.total()


@dataclasses.dataclass
class Command:
    """A command to kill.

    Attributes:
      start: starts it in a folder with a stage log, and a stage to be held in.
      stages: those that some kills wait for; the others come at any time of its life.
      seconds: about how long it lives when left alone; the last life that ended by itself says.
      check: what must hold for the folder after each kill, the log's stage given.
    """

    start: Callable[[Path, Path, np.random.Generator, str], Running]
    stages: Sequence[str]
    seconds: float
    check: Callable[[Path, str], None] = lambda folder, stage: None


def one_kill(
    command: Command, folder: Path, log: Path, rng: np.random.Generator, aim: str | None
) -> tuple[Ended, str | None]:
    """Runs the command once and kills it, if it lives that long.

    Returns:
      How it ended, and the stage in which it was killed; None where it ended by itself.
    """
    log.unlink(missing_ok=True)
    log.with_name(f"{log.name}.go").unlink(missing_ok=True)
    running = command.start(folder, log, rng, aim or "")
    born = time.monotonic()
    until = born + rng.uniform(0, 1.1) * command.seconds
    jitter = rng.choice([0.0, rng.exponential(0.03)])
    while time.monotonic() - born < LONGEST_LIFE:
        if aim is None and time.monotonic() >= until:
            break
        if aim is not None and read_stage(log) == aim:
            break
        ended = running.poll(POLL_SECONDS)
        if ended is not None:
            if aim is None:
                command.seconds = time.monotonic() - born
            return ended, None
    if aim is not None and jitter:  # into the stage, not at its first line
        log.with_name(f"{log.name}.go").touch()
        time.sleep(jitter)
    group = bool(rng.integers(2))  # as a container dies, or as the kernel kills what eats memory
    ended = running.kill(group=group)
    if ended.status != -signal.SIGKILL:
        return ended, None
    stage = read_stage(log)
    command.check(folder, stage)
    return ended, stage


def journey(
    command: Command,
    folder: Path,
    log: Path,
    rng: np.random.Generator,
    kills: int,
    tally: Tally,
) -> None:
    """Kills the command up to `kills` times in one folder, and at last lets it end.

    The same command is given every time. It must not fail when it is not killed.
    """
    tally.journeys += 1
    for _ in range(kills):
        aim = str(rng.choice(command.stages)) if command.stages and rng.random() < 0.6 else None
        ended, stage = one_kill(command, folder, log, rng, aim)
        if stage is None:
            assert ended.status == 0, ended.err
            break
        tally.stages[stage] += 1
    ended = command.start(folder, log, rng, "").wait()
    assert ended.status == 0, ended.err
