"""tools/prepare_data.py on bad input and interrupts: one line, a status, nothing half-written."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pydoc_data.topics import topics

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from corpus_config import write_jsonl
from helpers import ROOT
from test_corpus_pipeline import tree
from test_corpus_tools import CONFIG, run

TEXTS = [text for _, text in sorted(topics.items())]
# Runs the tool in a forked process a case, so that its imports are paid for once.
DRIVER = """
import json, os, runpy, sys
import danube_jax.data.corpus.pipeline
for name, arguments in json.load(sys.stdin):
    child = os.fork()
    if not child:
        os.dup2(os.open(name + ".out", os.O_CREAT | os.O_WRONLY), 1)
        os.dup2(os.open(name + ".err", os.O_CREAT | os.O_WRONLY), 2)
        sys.argv = [TOOL, *arguments]
        runpy.run_path(TOOL, run_name="__main__")
    print(name, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
GOOD = json.dumps({"text": "a good line"}).encode() + b"\n"
ROWS = b"".join(
    json.dumps({"text": f"{i} {text}"}).encode() + b"\n" for i, text in enumerate(TEXTS)
)
FILES = {
    "json": ("bad.jsonl", GOOD + b'{"text": "no', r"line 2: is not JSON"),
    "encoding": ("bad.jsonl", GOOD + b'{"text": "caf\xe9"}\n', "line 2: is not UTF-8 at byte 14"),
    "text": ("bad.txt", b"fine\n\xff\n", "bad.txt, line 2: is not UTF-8 at byte 6 of the file"),
    "column": ("bad.jsonl", GOOD + b'{"body": "x"}\n', "line 2: has no column 'text', only 'body'"),
    "empty": ("bad.jsonl", b"", "bad.jsonl: holds no records"),
    "empty_text": ("bad.txt", b"", "bad.txt: holds no records"),
    "huge": (
        "bad.jsonl",
        GOOD + b'{"text": "' + b"x" * 100_000_000 + b'"}\n',
        "line 2: is 100,000,013 bytes long; the limit is 20,000,000",
    ),
    "nul": ("bad.jsonl", GOOD + b'{"text": "a\\u0000b"}\n', "line 2: holds a NUL character"),
    "gzip": ("bad.jsonl.gz", gzip.compress(ROWS)[:40_000], "cannot be read (Compressed file ended"),
    "zstd": (
        "bad.jsonl.zst",
        zstandard.compress(ROWS)[:40_000],
        "(the compressed file breaks off)",
    ),
    "parquet": ("bad.parquet", b"PAR1 and no more", "bad.parquet: cannot be read as parquet"),
}


def call(folder, cases):
    """Case → (status, stdout, stderr)."""
    tool = str(ROOT / "tools" / "prepare_data.py")
    done = subprocess.run(
        [sys.executable, "-c", DRIVER.replace("TOOL", repr(tool))],
        input=json.dumps(list(cases.items())),
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    status = dict(line.split() for line in done.stdout.splitlines())
    read = {
        name: [(folder / f"{name}.{end}").read_text() for end in ("out", "err")] for name in cases
    }
    return {name: (int(status[name]), *read[name]) for name in cases}


@pytest.fixture(scope="module")
def called(tmp_path_factory):
    folder = tmp_path_factory.mktemp("command")
    (folder / "config.py").write_text(CONFIG)
    write_jsonl(folder / "a.jsonl", TEXTS[:20])
    write_jsonl(folder / "b.jsonl", TEXTS[20:40])
    (folder / "all").mkdir()
    cases = {}
    for name, (file, data, _) in FILES.items():
        (folder / name).mkdir()
        (folder / name / file).write_bytes(data)
        (folder / "all" / f"{name}.{file}").symlink_to(folder / name / file)
        cases[name] = [f"--config.sources.b.path={name}"]
    table = pyarrow.table({"body": ["one", "two"]})
    pyarrow.parquet.write_table(table, folder / "rows.parquet")
    cases["parquet_column"] = ["--config.sources.b.path=rows.parquet"]
    cases["id_column"] = ["--config.sources.b.id_column=key"]
    cases["tokenizer"] = [
        "--config.tokenizer.train_vocab_size=0",
        "--config.tokenizer.path=no.model",
    ]
    cases["skip"] = ["--config.sources.b.path=all", "--config.on_bad_record=skip"]
    always = ["--config=config.py", "--config.steps.minhash.enabled=False"]
    cases = {name: [*always, f"--config.output=out_{name}", *rest] for name, rest in cases.items()}
    return folder, call(folder, cases)


MESSAGES = {name: message for name, (_, _, message) in FILES.items()} | {
    "parquet_column": "rows.parquet: has no column 'text', only 'body'",
    "id_column": "b.jsonl, line 1: has no column 'key', only 'text'",
    "tokenizer": "no.model: cannot read the tokenizer (No such file or directory)",
}


@pytest.mark.parametrize("name", MESSAGES)
def test_bad_input_stops_with_one_line(called, name):
    folder, results = called
    status, out, err = results[name]
    assert status == 2, err
    assert out == ""
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert MESSAGES[name] in errors[0]
    if name != "tokenizer":
        assert "config.on_bad_record" in errors[0]
    assert "Traceback" not in err
    assert not (folder / f"out_{name}" / "stores").exists()
    assert not (folder / f"out_{name}" / "statistics.json").exists()


def test_bad_records_are_skipped_counted_and_listed(called):
    folder, results = called
    status, out, err = results["skip"]
    assert status == 0, err
    assert f"{len(FILES)} bad records were skipped" in out
    rows = [json.loads(line) for line in (folder / "out_skip" / "bad_records.jsonl").open()]
    assert len(rows) == len(FILES)
    for name, (file, _, message) in FILES.items():
        (row,) = (row for row in rows if f"all/{name}.{file}" in row["where"])
        assert (
            message.removeprefix(f"{file}: ").split(": ")[-1] in f"{row['where']}: {row['reason']}"
        )
    page = (folder / "out_skip" / "report.html").read_text()
    assert "Bad records" in page


def test_an_interrupt_stops_and_the_same_command_goes_on(tmp_path):
    (tmp_path / "config.py").write_text(CONFIG)
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    write_jsonl(tmp_path / "b.jsonl", [text.upper() for text in TEXTS])
    changes = ["--config=config.py", "--config.executor.workers=2", "--config.task_bytes=40_000"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tools/prepare_data.py"), *changes, "--config.output=stopped"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    marks = tmp_path / "stopped" / "work" / "clean" / "completions"
    while process.poll() is None and not (marks.is_dir() and any(marks.iterdir())):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, err = process.communicate()
    assert process.returncode == 75, err
    assert err.strip().splitlines()[-1].startswith("SIGINT: stopped; ")
    assert "Traceback" not in err
    for output in ("stopped", "whole"):
        done = run(tmp_path, "prepare_data.py", *changes, f"--config.output={output}")
        assert done.returncode == 0, done.stderr
    assert tree(tmp_path / "stopped") == tree(tmp_path / "whole")
