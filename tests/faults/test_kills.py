"""A command that is killed at any moment goes on when it is given again, and nothing is lost."""

import os
import shutil
import time
from pathlib import Path

import numpy as np
from commands import TRAIN
from killing import Command, Tally, journey
from small_runs import Outcome, arguments

KILLS_A_JOURNEY = 14
TRAINING_STAGES = (
    "compile",
    "steps",
    "asynchronous save",
    "commit",
    "evaluation",
    "samples",
    "restoring",
    "set-up",
    "report",
)


def test_training(corpus, server, undisturbed, full, tmp_path, figures):
    expected, seconds = undisturbed
    kills = 80 if full else 5
    rng, tally, begin = np.random.default_rng(8), Tally(), time.monotonic()
    cold = tmp_path / "cold"

    def start(folder: Path, log: Path, rng: np.random.Generator, hold: str):
        environment = {}
        if rng.random() < 0.15:  # so that it has to compile
            shutil.rmtree(cold, ignore_errors=True)
            environment = {"JAX_COMPILATION_CACHE_DIR": str(cold)}
        return server.start(
            TRAIN,
            *arguments(corpus.config, folder),
            log=log,
            hold=hold,
            delay=float(rng.choice([0.0, 0.02, 0.1])),
            fresh=rng.random() < 0.1,
            environment=environment,
        )

    command = Command(start, TRAINING_STAGES, seconds)
    while tally.kills < kills:
        workdir, log = tmp_path / f"run{tally.journeys}", tmp_path / f"log{tally.journeys}"
        left = min(KILLS_A_JOURNEY, kills - tally.kills)
        journey(command, workdir, log, rng, left, tally)
        Outcome.read(workdir, log=log).assert_same(expected)
        shutil.rmtree(workdir)
    figures(
        "kills of training",
        kills=tally.kills,
        journeys=tally.journeys,
        stages=dict(tally.stages),
        seconds=round(time.monotonic() - begin),
        processors=os.cpu_count(),
    )
