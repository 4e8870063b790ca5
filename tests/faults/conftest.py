"""The two sizes of the tests of faults, and what they share.

A test that takes `full` comes in a short form, which every run of the tests includes, and in a full
one, which is marked `faults` and run by ``pytest -m faults``. Tests of one size belong to both.
"""

import importlib.util
import json
import os
import re
import time
from pathlib import Path

import pytest
from commands import TRAIN, forks
from fork_commands import fork_server
from small_runs import Outcome, arguments
from tiny_folder import write_tiny_folder

FULL_TIMEOUT = 3 * 3600
COMMANDS = (
    *("danube_jax.training.run", "danube_jax.training.tuning", "danube_jax.interop.peft"),
    *("danube_jax.data.corpus.pipeline", "danube_jax.data.corpus.html", "pyarrow.parquet"),
)
EVALUATION = (
    *("danube_jax.evaluation.harness", "danube_jax.evaluation.mt_bench_run"),
    *("lm_eval.evaluator", "lm_eval.tasks", "datasets"),
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Makes tests of one size part of the full form where that is asked for."""
    expression = config.option.markexpr or ""
    chosen = "faults" in expression and not re.search(r"not\s+faults", expression)
    for item in items:
        if Path(__file__).parent not in item.path.parents:
            continue
        size = item.callspec.params.get("full") if hasattr(item, "callspec") else None
        if size == "full":
            item.add_marker(pytest.mark.timeout(FULL_TIMEOUT))
        elif chosen and size is None:
            item.add_marker(pytest.mark.faults)


@pytest.fixture(scope="module", params=["short", pytest.param("full", marks=pytest.mark.faults)])
def full(request) -> bool:
    """Whether the test is to run in full."""
    return request.param == "full"


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """Forks of a process that has the training command's imports behind it."""
    with forks(tmp_path_factory.mktemp("commands")) as started:
        yield started


@pytest.fixture(scope="session")
def commands(tmp_path_factory):
    """All commands in forks, for what comes from outside; they share what was compiled."""
    options = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    evaluation = EVALUATION if importlib.util.find_spec("lm_eval") else ()
    with fork_server(*COMMANDS, *evaluation, **options) as started:
        yield started


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A Hugging Face folder without chat template; copy it before you change it."""
    return write_tiny_folder(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def undisturbed(corpus, server, tmp_path_factory) -> tuple[Outcome, float]:
    """A run that was never killed, and about how many seconds one takes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    log, workdir = folder / "log", folder / "run"
    command, begin = arguments(corpus.config, workdir), time.monotonic()
    ended = server.run(TRAIN, *command, log=log)
    assert ended.status == 0, ended.err
    return Outcome.read(workdir, log=log), time.monotonic() - begin


@pytest.fixture(scope="session")
def figures():
    """Notes the figures of a test as a line of JSON in the file that $FAULTS_FIGURES names."""

    def note(name: str, **values) -> None:
        line = json.dumps({"test": name, "date": time.strftime("%Y-%m-%d"), **values})
        print(line)
        if "FAULTS_FIGURES" in os.environ:
            with open(os.environ["FAULTS_FIGURES"], "a") as file:
                file.write(line + "\n")

    return note
