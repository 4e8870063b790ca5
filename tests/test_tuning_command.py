"""Bad input to tuning through the command line: one clear line, status 2, nothing half-written."""

import json

import pytest
from helpers import command
from test_command_line import assert_one_line
from tiny_folder import write_tiny_folder
from tuning_config import conversation_rows, load_config, tune, write_config, write_rows

GOOD = json.dumps(conversation_rows()[0]).encode() + b"\n"
USER, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}


def lines(*rows):
    """Rows as the bytes of a JSONL file."""
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


# The objective, the file, more arguments, and what the one line must say.
CASES = {
    "empty data": ("sft", b"", [], "rows.jsonl: there are no rows"),
    "wrong columns": ("sft", lines({"foo": 1}), [], "line 1: the columns foo are of no known"),
    "unknown role": (
        "sft",
        lines({"messages": [{"role": "bot", "content": "x"}]}),
        [],
        "line 1: messages[0].role: 'bot'; expected one of system, user, assistant",
    ),
    "answer first": (
        "sft",
        lines({"messages": [USER, ANSWER]}, {"messages": [ANSWER, USER]}),
        [],
        "rows.jsonl, line 2: messages[0]: an answer before its question",
    ),
    "not UTF-8": ("sft", GOOD + b'{"prompt": "\xff"}\n', [], "line 2: not UTF-8"),
    "one-sided preference": (
        "dpo",
        lines({"prompt": "Q", "chosen": "A"}),
        [],
        "line 1: one-sided preference: there is no rejected answer",
    ),
    "no reference": ("dpo", GOOD, ["--config.init_from.path="], "config.init_from"),
    "too long": ("sft", GOOD, ["--config.rounds[0].context_length=999"], "a context_length of 999"),
    "unknown source": ("sft", GOOD, ["--config.rounds[0].sources=('x',)"], "rounds[0].sources"),
    "projection": ("sft", GOOD, ["--config.lora.rank=1", "--config.lora.targets=('x',)"], "'x'"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_tiny_folder(tmp_path_factory.mktemp("tuning_command") / "base")


@pytest.mark.parametrize("name", CASES)
def test_tuning_refuses(name, base, tmp_path):
    objective, content, arguments, fragment = CASES[name]
    (tmp_path / "rows.jsonl").write_bytes(content)
    config = write_config(
        tmp_path / "c.py", objective=objective, base=base, data=tmp_path / "rows.jsonl"
    )
    workdir = tmp_path / "run"
    result = command(f"--config={config}", f"--workdir={workdir}", *arguments)
    assert_one_line(result, fragment)
    assert not workdir.exists()


def test_adapters_that_do_not_fit_their_base(base, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", conversation_rows())
    path = write_config(tmp_path / "c.py", objective="sft", base=base, data=rows)
    config = load_config(path)
    config.lora.rank = 2
    config.evaluation.at_start, config.samples.prompts = False, ()
    adapters = tune(config, tmp_path / "adapters", max_steps=1)
    meta = adapters / "checkpoints" / "1" / "meta" / "metadata"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"lora": _other_rank(meta)}))
    result = command(
        f"--config={path}", f"--workdir={tmp_path / 'run'}", f"--config.init_from.path={adapters}"
    )
    assert_one_line(result, "the adapters do not fit the base")
    assert not (tmp_path / "run" / "checkpoints").exists()


def _other_rank(meta):
    return json.loads(meta.read_text())["lora"] | {"rank": 3}
