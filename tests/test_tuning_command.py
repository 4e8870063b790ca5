"""Bad input to tuning through the command line: one clear line, status 2, nothing half-written."""

import json

import pytest
from helpers import command, read_unsealed
from test_command_line import assert_one_line
from tiny_folder import write_tiny_folder
from tuning_config import conversation_rows, load_config, tune, write_config, write_rows

from danube_jax.config import parse_config, phase, source
from danube_jax.errors import UserError

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
    "too long": ("sft", GOOD, ["--config.rounds[0].context_length=999"], "a context_length of 999"),
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
    config.lora.rank, config.rounds[0].batch_size = 2, 8
    config.evaluation.at_start, config.samples.prompts = False, ()
    adapters = tune(config, tmp_path / "adapters", max_steps=1)
    meta = adapters / "checkpoints" / "1" / "meta" / "metadata"
    meta.write_text(json.dumps(read_unsealed(meta) | {"lora": _other_rank(meta)}))
    result = command(
        f"--config={path}",
        f"--workdir={tmp_path / 'run'}",
        f"--config.init_from.path={adapters}",
    )
    assert_one_line(result, "the adapters do not fit the base")
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("objective", "change", "message"),
    [
        ("dpo", {"init_from.path": "", "init_from.model_from_source": False}, "DPO's reference"),
        ("sft", {"rounds": ()}, "config.rounds"),
        ("sft", {"phases": (phase(name="x"),)}, "config.phases"),
        ("sft", {"objective": "ppo"}, "one of pretrain, sft, dpo"),
        ("sft", {"chat.tokenization": "apart"}, "one of joint, separate"),
        ("dpo", {"dpo.loss": "ipo", "dpo.label_smoothing": 0.1}, "0 for ipo"),
        ("dpo", {"dpo.beta": 0.0}, "config.dpo.beta"),
        ("sft", {"data.sources": {"rows": source(builtin="preferences")}}, "one of chat"),
        ("sft", {"data.sources": {"other": source(path="x")}}, r"config.rounds\[0\].sources"),
        ("sft", {"init_from.take": "weights_and_optimizer"}, "config.init_from.take"),
        ("dpo", {"precision.linear": "fp8"}, "bfloat16 or float32 for DPO and for adapters"),
        ("sft", {"precision.linear": "fp8", "lora.rank": 2}, "bfloat16 or float32"),
    ],
)
def test_impossible_configs(objective, change, message, tmp_path):
    path = write_config(tmp_path / "c.py", objective=objective, base=tmp_path, data=tmp_path)
    config = load_config(path)
    with config.unlocked():
        config.update_from_flattened_dict({k: v for k, v in change.items() if k != "data.sources"})
        config.data.sources = change.get("data.sources", config.data.sources)
    with pytest.raises(UserError, match=message):
        parse_config(config)


def test_pretraining_has_no_rounds_and_no_adapters(corpus):
    config = load_config(corpus.config)
    config.lora.rank = 2
    with pytest.raises(UserError, match="LoRA is for sft and dpo"):
        parse_config(config)


def _other_rank(meta):
    return json.loads(meta.read_text())["lora"] | {"rank": 3}
