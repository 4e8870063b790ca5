import json
import math
import types

import pytest
from tokenizer_models import byte_level_folder

from danube_jax.data import chat
from danube_jax.data.tokenizer import open_tokenizer
from danube_jax.errors import UserError
from danube_jax.inference.requests import (
    Prompt,
    Request,
    as_question,
    batches,
    check_text,
    read_requests,
    to_prompt,
    to_row,
)
from danube_jax.inference.sampling_flags import (
    CHAT_DEFAULTS,
    GENERATE_DEFAULTS,
    parse_setting,
    resolve_settings,
)

NAMES = {"eos_token": "<|im_end|>"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = byte_level_folder(tmp_path_factory.mktemp("hf") / "t", NAMES)
    return open_tokenizer(folder).with_chat_template(chat.TEMPLATES["danube2"])


def write(path, *lines):
    path.write_text("\n".join(lines) + "\n")
    return path


def test_json_lines(tmp_path):
    messages = [{"role": "user", "content": "Why?"}]
    path = write(
        tmp_path / "a.jsonl",
        '{"prompt": "one"}',
        "",
        '{"id": "b", "prompt": ""}\r',
        json.dumps({"messages": messages}),
    )
    first, second, third = read_requests(path)
    assert (first.id, first.prompt, first.where) == (1, "one", f"{path}, line 1")
    assert (second.id, second.prompt) == ("b", "")
    assert (third.id, third.prompt, third.messages) == (4, None, tuple(messages))


def test_plain_lines_and_questions(tmp_path):
    path = write(tmp_path / "a.txt", '{"prompt": 1}', "  two  ", "   ")
    assert [request.prompt for request in read_requests(path)] == ['{"prompt": 1}', "  two  "]
    asked = read_requests(path, chat=True, system="Be brief.")[1]
    assert asked.messages == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "  two  "},
    )
    assert as_question(Request(0, "w", prompt="x")).messages == ({"role": "user", "content": "x"},)


@pytest.mark.parametrize(
    ("line", "fragment"),
    [
        ("{", r"line 2: .*expected a JSON object"),
        ("[1]", r"line 2: expected a JSON object with"),
        ('{"text": "a"}', "line 2: expected a JSON object with"),
        ('{"prompt": "a", "messages": []}', "line 2: expected a JSON object with"),
        ('{"prompt": 3}', "line 2: prompt is 3"),
        ('{"prompt": "a", "id": 1.5}', "line 2: id 1.5"),
        ('{"prompt": "a", "id": 1}', r"line 2: id 1 stands in .*line 1 too"),
        ('{"prompt": "\\ud800"}', "line 2: is not valid Unicode"),
        ('{"messages": "a"}', "line 2: messages: expected a list"),
        ('{"messages": [{"role": "me", "content": "a"}]}', r"line 2: messages\[0\].role: 'me'"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "line 2: is not valid Unicode"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, fragment):
    path = write(tmp_path / "a.jsonl", '{"prompt": "fine"}', line)
    with pytest.raises(UserError, match=fragment):
        read_requests(path)


def test_unreadable_files(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read_requests(tmp_path / "none.jsonl")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        read_requests(tmp_path / "latin.txt")
    with pytest.raises(UserError, match="holds no prompts"):
        read_requests(write(tmp_path / "empty.txt", " "))
    assert check_text("漢", "x") == "漢"


def encoded(request, tokenizer, context=64, max_tokens=16, exact=True):
    return to_prompt(request, tokenizer, context=context, max_tokens=max_tokens, exact=exact)


def test_prompts_fit_into_the_context(tokenizer):
    request = Request(0, "--prompt", prompt="abc")
    ids = tuple(tokenizer.encode_prompt("abc"))
    room = 64 - len(ids)
    assert encoded(request, tokenizer).tokens == ids
    assert encoded(request, tokenizer, max_tokens=room).max_tokens == room
    assert encoded(request, tokenizer, max_tokens=9_999, exact=False).max_tokens == room
    with pytest.raises(UserError, match=f"max_tokens={room + 1} exceeds .* at most {room} fit"):
        encoded(request, tokenizer, max_tokens=room + 1)
    with pytest.raises(UserError, match=r"--prompt: the prompt has \d+ tokens; expected fewer"):
        encoded(request, tokenizer, context=len(ids), exact=False)
    with pytest.raises(UserError, match="the prompt is empty, and the tokenizer puts no BOS"):
        encoded(Request(0, "--prompt", prompt=""), tokenizer)


def test_conversations_are_encoded_in_the_chat_format(tokenizer):
    question = as_question(Request(0, "f, line 3", prompt="abc"))
    assert list(encoded(question, tokenizer).tokens) == tokenizer.encode_chat(question.messages)
    with pytest.raises(UserError, match=r"f, line 3: .*System role not supported"):
        encoded(as_question(Request(0, "f, line 3", prompt="abc"), "Be brief."), tokenizer)


def test_batches_hold_equal_lengths_in_order():
    request = Request(0, "w", prompt="")
    prompts = [Prompt(request, (1,), n) for n in (8, 8, 3, 8, 8, 3)]
    assert batches(prompts, 3) == [[0, 1, 3], [4], [2, 5]]
    assert batches(prompts, 1) == [[0], [1], [3], [4], [2], [5]]
    assert batches([], 3) == []


def test_rows():
    completion = types.SimpleNamespace(
        tokens=(5, 6),
        text="a",
        finish_reason="stop",
        token_logprobs=(-0.5, -math.inf),
        top_logprobs=(((5, -0.5), (7, -1.0)), ((7, -0.1), (6, -math.inf))),
    )
    prompt = Prompt(Request("x", "w", prompt="p"), (1, 2, 3), 8)
    row = to_row(prompt, 1, completion, logprobs=True)
    assert row == {
        "id": "x",
        "sample": 1,
        "prompt": "p",
        "text": "a",
        "tokens": [5, 6],
        "finish_reason": "stop",
        "prompt_tokens": 3,
        "token_logprobs": [-0.5, None],
        "top_logprobs": [[[5, -0.5], [7, -1.0]], [[7, -0.1], [6, None]]],
    }
    json.dumps(row, allow_nan=False)
    messages = ({"role": "user", "content": "p"},)
    row = to_row(Prompt(Request(1, "w", messages=messages), (1,), 8), 0, completion, logprobs=False)
    assert row["messages"] == list(messages)
    assert not {"prompt", "token_logprobs", "top_logprobs"} & set(row)


def test_settings_of_flags_before_the_model_before_defaults():
    danube = {"bos_token_id": 1, "eos_token_id": 2, "repetition_penalty": 1.1}
    assert resolve_settings({}, {}, GENERATE_DEFAULTS) == GENERATE_DEFAULTS
    assert resolve_settings({}, danube, GENERATE_DEFAULTS) == {
        "max_tokens": 256,
        "temperature": 0.0,
        "repetition_penalty": 1.1,
    }
    given = {"repetition_penalty": 1.0, "temperature": 0.2, "seed": 3}
    assert resolve_settings(given, danube, CHAT_DEFAULTS) == CHAT_DEFAULTS | given
    # Sampling settings count where the file asks for sampling, as in transformers.
    llama = {"temperature": 0.6, "top_p": 0.9, "max_new_tokens": 99}
    assert resolve_settings({}, llama, GENERATE_DEFAULTS) == {"max_tokens": 99, "temperature": 0.0}
    assert resolve_settings({}, llama | {"do_sample": True}, GENERATE_DEFAULTS) == {
        "max_tokens": 99,
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": 50,
    }
    assert resolve_settings({}, {"do_sample": False}, CHAT_DEFAULTS)["temperature"] == 0
    sampled = {"do_sample": True, "temperature": None, "top_p": None}
    settings = resolve_settings({}, sampled, CHAT_DEFAULTS)
    assert (settings["top_p"], settings["temperature"]) == (CHAT_DEFAULTS["top_p"], 1.0)
    with pytest.raises(UserError, match=r"generation_config\.json: repetition_penalty is 'high'"):
        resolve_settings({}, {"repetition_penalty": "high"}, CHAT_DEFAULTS)


def test_settings_typed_by_a_user():
    assert parse_setting("temperature", "0.2") == 0.2
    assert parse_setting("top_k", "40") == 40
    with pytest.raises(UserError, match="no setting 'heat'; expected one of max_tokens, temp"):
        parse_setting("heat", "1")
    with pytest.raises(UserError, match=r"top_k: '1.5' is not possible; expected a whole number"):
        parse_setting("top_k", "1.5")
