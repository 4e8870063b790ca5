"""`python -m danube_jax.generate` and `python -m danube_jax.chat` as users call them."""

import contextlib
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time

import jax
import pytest
from helpers import ROOT, command
from test_command_line import assert_one_line
from tiny_folder import copy_without, write_tiny_folder

from danube_jax.data import chat
from danube_jax.data.tokenizer import open_tokenizer
from danube_jax.inference.loading import open_text_model
from danube_jax.inference.sampling import SamplingConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_folder(tmp_path_factory.mktemp("models") / "tiny")


def environment():
    return os.environ | {"PYTHONPATH": str(ROOT), "TERM": "dumb"}


def generate(*arguments):
    return command(*arguments, module="danube_jax.generate")


def talk(text, *arguments):
    """The chat, with what a user types on standard input."""
    return command(*arguments, module="danube_jax.chat", stdin=text)


def batch(tmp_path, *rows):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


# Flags beside --model, and what the one line must say.
REFUSED = {
    "neither prompt nor file": ([], "neither is given"),
    "prompt and file": (["--prompt=a", "--batch_file=b"], "both are given"),
    "no such batch file": (["--batch_file=none.jsonl"], "none.jsonl: cannot be read"),
    "system without chat": (["--prompt=a", "--system=b"], "--system: needs --chat"),
    "output is a folder": (["--prompt=a", "--output=/tmp"], "'/tmp' is a folder"),
    "stream and json": (["--prompt=a", "--stream", "--json"], "--stream: needs"),
    "unknown flag": (["--prompt=a", "--temprature=1"], "temprature"),
    "no number": (["--prompt=a", "--top_k=many"], "top_k"),
    "unknown template": (["--prompt=a", "--chat_template=danube9"], "expected one of danube, "),
    "top_p": (["--prompt=a", "--top_p=1.5"], "top_p"),
    "unknown dtype": (["--prompt=a", "--cache_dtype=int8"], "cache_dtype"),
    "temperature": (["--prompt=a", "--temperature=-1"], "temperature"),
    "logprobs": (["--prompt=a", "--logprobs=-1"], "logprobs"),
    "longer than the context": (["--prompt=" + "a b " * 200], "the model's context of 96"),
    "max_tokens beyond the context": (["--prompt=a", "--max_tokens=96"], "at most"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_generate_refuses(name, folder):
    arguments, fragment = REFUSED[name]
    assert_one_line(generate(f"--model={folder}", *arguments), fragment)


def test_a_cache_of_another_dtype_than_the_weights(folder):
    generator = open_text_model(str(folder)).generator("float32", "bfloat16")
    list(generator.stream([1, 300, 301], SamplingConfig(max_tokens=2)))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(generator._kept.cache)} == {"bfloat16"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(generator.params)} == {"float32"}


def test_models_that_cannot_generate_text(folder, tmp_path):
    assert_one_line(generate("--prompt=a"), "--model is needed")
    assert_one_line(generate("--prompt=a", f"--model={tmp_path / 'none'}"), "no such folder")
    bare = copy_without(folder, tmp_path / "bare", "tokenizer.model")
    assert_one_line(generate("--prompt=a", f"--model={bare}"), "no tokenizer in this folder")
    assert_one_line(talk("hi\n", f"--model={bare}"), "no tokenizer in this folder")


def test_a_bad_line_is_named_and_nothing_is_written(folder, tmp_path):
    output = tmp_path / "out.jsonl"
    base = (f"--model={folder}", f"--output={output}")
    path = batch(tmp_path, {"prompt": "fine"}, '{"prompt": ')
    assert_one_line(generate(*base, f"--batch_file={path}"), f"{path}, line 2: ")
    path = batch(tmp_path, {"prompt": "fine"}, {"prompt": "a b " * 200})
    assert_one_line(generate(*base, f"--batch_file={path}"), "line 2: the prompt has")
    assert [p.name for p in tmp_path.iterdir()] == ["prompts.jsonl"]


def test_prompt_json_and_stream_agree(folder):
    base = (f"--model={folder}", "--prompt=The while", "--max_tokens=12", "--ignore_eos")
    plain = generate(*base)
    assert plain.returncode == 0, plain.stderr
    assert "12 tokens in" in plain.stderr
    row = json.loads(generate(*base, "--json", "--logprobs=2").stdout)
    tokenizer = open_tokenizer(folder)
    assert row["text"] + "\n" == plain.stdout
    assert row["prompt_tokens"] == len(tokenizer.encode_prompt("The while"))
    assert len(row["tokens"]) == 12
    assert row["finish_reason"] == "length"
    # Greedy: the chosen token is the likeliest.
    assert [top[0][0] for top in row["top_logprobs"]] == row["tokens"]
    assert [top[0][1] for top in row["top_logprobs"]] == row["token_logprobs"]
    assert all(len(top) == 2 for top in row["top_logprobs"])
    assert generate(*base, "--stream").stdout == plain.stdout


def test_batch_file_to_json_lines(folder, tmp_path):
    question = [{"role": "user", "content": "Why?"}]
    path = batch(
        tmp_path, {"prompt": "The while"}, "", {"id": "b", "messages": question}, {"prompt": "if"}
    )
    output = tmp_path / "deep" / "out.jsonl"
    base = (f"--model={folder}", f"--batch_file={path}", "--max_tokens=8", "--ignore_eos")
    done = generate(*base, f"--output={output}", "--batch_size=2", "--num_samples=2")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(row["id"], row["sample"]) for row in rows] == [
        (name, sample) for name in (1, "b", 4) for sample in (0, 1)
    ]
    assert rows[2]["messages"] == question
    assert rows[0]["prompt"] == "The while"
    tokenizer = open_tokenizer(folder).with_chat_template(chat.TEMPLATES["danube"])
    assert rows[2]["prompt_tokens"] == len(tokenizer.encode_chat(question))
    assert rows[0]["text"] == rows[1]["text"]  # greedy
    assert os.listdir(output.parent) == ["out.jsonl"]
    single = json.loads(generate(f"--model={folder}", "--prompt=if", "--json", *base[2:]).stdout)
    assert single["tokens"] == rows[4]["tokens"]


def test_samples_differ_and_depend_on_the_seed(folder):
    base = (f"--model={folder}", "--prompt=if", "--max_tokens=12", "--temperature=1.5", "--json")
    tokens = [
        tuple(json.loads(line)["tokens"])
        for more in ([], ["--seed=1"])
        for line in generate(*base, "--num_samples=3", *more).stdout.splitlines()
    ]
    assert len(tokens) == len(set(tokens)) == 6


def test_chat_through_a_pipe(folder, tmp_path):
    saved = tmp_path / "chat.json"
    typed = ["Hi", "/set temperature 0", "two\\", "lines", f"/save {saved}", "/what", "/exit", "no"]
    done = talk("\n".join(typed), f"--model={folder}", "--max_tokens=6", "--seed=3")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("tokens/s") == 2
    assert "error: there is no command /what" in done.stderr
    messages = json.loads(saved.read_text())["messages"]
    assert [message["content"] for message in messages[::2]] == ["Hi", "two\nlines"]
    answers = [message["content"] for message in messages[1::2]]
    assert done.stdout == "".join(f"{answer.lstrip()}\n" for answer in answers)


def test_chat_refuses_in_one_line(folder):
    base = (f"--model={folder}",)
    refused = talk("", *base, "--chat_template=danube2", "--system=Be brief.")
    assert_one_line(refused, "System role not supported")
    assert_one_line(talk("", *base, "--temperature=-1"), "temperature")
    assert_one_line(talk("", *base, "--chat_template=nothing"), "expected one of danube")
    done = talk("/system Be brief.\nHi\n", *base, "--chat_template=danube2", "--max_tokens=4")
    assert done.returncode == 0
    assert "error: the chat template refuses this conversation: System role" in done.stderr
    assert "[4 tokens" in done.stderr


def test_chat_at_a_terminal(folder):
    """A prompt is shown, also after an answer; Ctrl-C twice at the prompt leaves."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "danube_jax.chat", f"--model={folder}", "--max_tokens=90"],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        cwd=ROOT,
        env=environment(),
        start_new_session=True,
    )
    os.close(follower)
    shown = b""

    def wait_for(text, interrupt=False):
        """Reads up to `text`; what follows it is kept for the next call.

        An interrupt between a prompt and the wait for input goes unnoticed until the next one.
        """
        nonlocal shown
        deadline = time.monotonic() + 90
        while text not in shown:
            assert time.monotonic() < deadline, shown
            if interrupt:
                process.send_signal(signal.SIGINT)
            if select.select([leader], [], [], 3)[0]:
                shown += os.read(leader, 4096)
                interrupt = False
        shown = shown.partition(text)[2]

    try:
        wait_for(b">>> ")
        os.write(leader, b"Hi\n")
        wait_for(b"tokens/s")
        wait_for(b">>> ")
        wait_for(b"Ctrl-C again", interrupt=True)
        wait_for(b">>> ")
        for _ in range(20):
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=3)
                break
        assert process.returncode == 0
    finally:
        process.kill()
        os.close(leader)


@pytest.mark.parametrize("module", ["danube_jax.generate", "danube_jax.chat"])
def test_help_shows_an_example_and_the_flags(module):
    done = command("--help", module=module)
    assert done.returncode == 0
    assert f"python -m {module} --model=" in done.stdout
    for flag in ("--model", "--temperature", "--chat_template", "--dtype", "--cache_dtype"):
        assert flag in done.stdout
