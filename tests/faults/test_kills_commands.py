"""Preparation, conversion and evaluation killed at any moment: whole or absent, and they go on."""

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from commands import EVALUATE, FROM_HF, HANG_SECONDS, LIBRARIES, PREPARE, TO_HF, forks
from killing import Command, Tally, journey
from small_runs import tree_bytes
from small_work import write_evaluation, write_preparation
from staged import read_stage
from tiny_folder import write_tiny_folder

from danube_jax.errors import EXIT_INTERRUPTED

pytest.importorskip("datatrove")
pytest.importorskip("lm_eval")
pytest.importorskip("torch")

MORE_LIBRARIES = (
    "danube_jax.data.corpus.pipeline",
    "danube_jax.evaluation.harness",
    "danube_jax.evaluation.run",
    "lm_eval",
    "torch",
    "transformers.models.llama.modeling_llama",
    "transformers.models.mistral.modeling_mistral",
)
# What of an output holds the time of day or how long something took.
TIMED_OF_PREPARATION = ("statistics.json", "report.html", ".lock")
TIMED_OF_IMPORT = ("_CHECKPOINT_METADATA", "commit_success.txt")
KILLS_A_JOURNEY = 4


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """As in training's tests, with the libraries of the other commands."""
    with forks(tmp_path_factory.mktemp("commands"), (*LIBRARIES, *MORE_LIBRARIES)) as started:
        yield started


def repeat(server, program, arguments, stages, kills, tmp_path, figures, name, check, same):
    """Kills a command in one journey after another; outputs are compared with an undisturbed one.

    Args:
      arguments: of the command, given its output.
      check: of (output, expected output) after a kill.
      same: of (output, expected output) at the end.
    """
    begin, expected = time.monotonic(), tmp_path / "expected" / "out"
    ended = server.run(program, *arguments(expected))
    assert ended.status == 0, ended.err
    seconds = time.monotonic() - begin

    def start(folder: Path, log: Path, rng: np.random.Generator, hold: str):
        delay = float(rng.choice([0.0, 0.05]))
        return server.start(program, *arguments(folder), log=log, delay=delay, hold=hold)

    def check_folder(folder: Path, stage: str) -> None:
        check(folder, expected)

    command = Command(start, stages, seconds, check_folder)
    rng, tally = np.random.default_rng(11), Tally()
    while tally.kills < kills:
        output = tmp_path / f"journey{tally.journeys}" / "out"
        left = min(KILLS_A_JOURNEY, kills - tally.kills)
        log = tmp_path / f"log{tally.journeys}"
        journey(command, output, log, rng, left, tally)
        same(output, expected)
        assert [path.name for path in output.parent.iterdir()] == ["out"], "leftovers"
    figures(
        f"kills of {name}",
        kills=tally.kills,
        journeys=tally.journeys,
        stages=dict(tally.stages),
        seconds=round(time.monotonic() - begin),
        processors=os.cpu_count(),
    )


def interrupt(server, program, arguments, stage, tmp_path, numbers):
    """A signal in a stage ends the command with status 75 and one line, and leaves nothing."""
    tmp_path.mkdir()
    for number in numbers:
        output, log = tmp_path / f"interrupted{number}" / "out", tmp_path / f"log{number}"
        running = server.start(program, *arguments(output), log=log, hold=stage)
        deadline = time.monotonic() + HANG_SECONDS
        while read_stage(log) != stage:
            assert running.poll(0.01) is None, "ended before"
            assert time.monotonic() < deadline
        running.signal(number, group=number == signal.SIGINT)  # as a terminal's Control-C
        time.sleep(0.1)
        log.with_name(f"{log.name}.go").touch()
        ended = running.wait()
        assert ended.status == EXIT_INTERRUPTED, ended.err
        assert "Traceback" not in ended.err, ended.err
        assert f"{number.name}: stopped" in ended.err
        left = [path.name for path in output.parent.iterdir()] if output.parent.exists() else []
        assert [name for name in left if name != "out"] == [], "half-written"
        yield output
        ended = server.run(program, *arguments(output))
        assert ended.status == 0, ended.err


def whole_or_absent(leave_out=()):
    """A check that an output is the expected one, if it is there."""

    def check(output: Path, expected: Path) -> None:
        if output.exists():
            assert tree_bytes(output, leave_out) == tree_bytes(expected, leave_out)

    return check


def equal(leave_out=()):
    """A check that an output is there, and the expected one."""

    def check(output: Path, expected: Path) -> None:
        found, wanted = tree_bytes(output, leave_out), tree_bytes(expected, leave_out)
        assert found.keys() == wanted.keys()
        assert [name for name in wanted if found[name] != wanted[name]] == []

    return check


def test_signals(server, full, tmp_path):
    """SIGTERM to the process, SIGINT to its group."""
    model, ours = write_tiny_folder(tmp_path / "model"), tmp_path / "ours"
    assert server.run(FROM_HF, f"--model={model}", f"--output={ours}").status == 0
    cases = {
        "import: writing": (FROM_HF, [f"--model={model}"], "--output="),
        "export: configs and card": (TO_HF, [f"--model={ours}", "--noverify"], "--output="),
        "preparation: tokenise": (
            PREPARE,
            [f"--config={write_preparation(tmp_path / 'texts')}"],
            "--config.output=",
        ),
        "evaluation": (EVALUATE, write_evaluation(tmp_path / "work"), "--output="),
    }
    for i, (stage, (program, first, flag)) in enumerate(cases.items()):
        if not full and program not in (FROM_HF, PREPARE):
            continue
        calls = interrupt(
            server,
            program,
            lambda output, first=first, flag=flag: [*first, f"{flag}{output}"],
            stage,
            tmp_path / str(i),
            (signal.SIGTERM, signal.SIGINT) if full else (signal.SIGINT,),
        )
        for output in calls:
            if program in (FROM_HF, TO_HF):
                assert not output.exists()


def test_import(server, full, tmp_path, figures):
    model = write_tiny_folder(tmp_path / "model")
    repeat(
        server,
        FROM_HF,
        lambda output: [f"--model={model}", f"--output={output}", "--overwrite"],
        ("import: opening", "import: writing", "import: commit"),
        12 if full else 1,
        tmp_path,
        figures,
        "import",
        whole_or_absent(TIMED_OF_IMPORT),
        equal(TIMED_OF_IMPORT),
    )


def test_export(server, full, tmp_path, figures):
    model = tmp_path / "ours"
    source = write_tiny_folder(tmp_path / "model")
    assert server.run(FROM_HF, f"--model={source}", f"--output={model}").status == 0
    repeat(
        server,
        TO_HF,
        lambda output: [f"--model={model}", f"--output={output}", "--overwrite"],
        ("export: opening", "export: writing", "export: checking", "export: commit"),
        12 if full else 1,
        tmp_path,
        figures,
        "export",
        whole_or_absent(),
        equal(),
    )


def test_preparation(server, full, tmp_path, figures):
    config = write_preparation(tmp_path / "texts")

    def check(output: Path, expected: Path) -> None:
        """Every store that says that it is finished is whole."""
        for manifest in output.glob("stores/*/*/store.json"):
            folder = manifest.parent
            assert tree_bytes(folder) == tree_bytes(expected / folder.relative_to(output))

    stages = ("clean", "select", "minhash_buckets", "cluster", "tokenise", "stores", "finish")
    repeat(
        server,
        PREPARE,
        lambda output: [f"--config={config}", f"--config.output={output}"],
        tuple(f"preparation: {stage}" for stage in stages),
        20 if full else 1,
        tmp_path,
        figures,
        "preparation",
        check,
        equal(TIMED_OF_PREPARATION),
    )


def results(folder: Path) -> dict:
    """Scores, and every document's answers."""
    saved = json.loads((folder / "results_piqa.json").read_text())
    samples = (folder / "samples_piqa_piqa.jsonl").read_text()
    return {"scores": saved["results"], "n": saved["n-samples"], "samples": samples}


def test_evaluation(server, full, tmp_path, figures):
    arguments = write_evaluation(tmp_path / "work")

    def same(output: Path, expected: Path) -> None:
        assert results(output) == results(expected)

    repeat(
        server,
        EVALUATE,
        lambda output: [*arguments, f"--output={output}"],
        ("loading", "evaluation", "results"),
        10 if full else 1,
        tmp_path,
        figures,
        "evaluation",
        lambda output, expected: None,
        same,
    )
