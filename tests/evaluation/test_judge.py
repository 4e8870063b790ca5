"""The client of the judge against a local server that misbehaves in every way."""

import socket

import pytest
from scripted_judge import ScriptedJudge, completion, rate_limited, slowly

from danube_jax.errors import UserError
from danube_jax.evaluation.judge import Judge, JudgeConfig, JudgeError, parse_verdict

MESSAGES = [{"role": "user", "content": "grade this"}]


def judge(url, **options):
    settings = {"pause": 0.01, "timeout": 5.0, "attempts": 4} | options
    return Judge(JudgeConfig(url, "judge", **settings))


def grade(*replies, **options):
    """(verdict or error, requests made) with replies in turn, the last one again and again."""

    def script(number, body):
        reply = replies[min(number, len(replies) - 1)]
        return reply() if callable(reply) else reply

    with ScriptedJudge(script).running() as server:
        try:
            return judge(server.url, **options).grade(MESSAGES), server
        except JudgeError as error:
            return error, server


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Well done. Rating: [[7]]", 7.0),
        ("Rating: [[6.5]]", 6.5),
        ("[8]", 8.0),
        ("[[10]] as in [[2]]", 10.0),
        ("Rating: [[11]]", None),
        ("Rating: [[0]]", None),
        ("Rating: 7", None),
        ("[[rating]]", None),
        ("", None),
    ],
)
def test_scores_are_read_or_refused(text, score):
    assert parse_verdict(text) == score


def test_a_good_reply():
    verdict, server = grade(completion("fine [[9]]"), key="secret")
    assert (verdict.score, verdict.text) == (9.0, "fine [[9]]")
    assert server.headers[0]["Authorization"] == "Bearer secret"
    body = server.bodies[0]
    assert body["model"] == "judge"
    assert body["messages"] == MESSAGES
    assert body["temperature"] == 0


BAD = {
    "rate limited": (rate_limited(), "answers 429"),
    "overloaded": ((503, b"later"), "answers 503"),
    "empty body": ((200, b""), "no chat completion"),
    "no JSON": ((200, b"<html>hello</html>"), "no chat completion: '<html>hello"),
    "no choices": ((200, b'{"choices": []}'), "no chat completion"),
    "hangs up": (None, "breaks off"),
    "too slow": (lambda: slowly(1.5, completion("[[3]]")), "no answer in 0.5 s"),
    "empty reply": (completion(""), "gave no score"),
    "no score": (completion("I cannot say"), "gave no score from 1 to 10; its last reply is 'I"),
    "impossible score": (completion("[[70]]"), "gave no score"),
}


def patience(name):
    """Seconds for a reply; many, on a busy machine, where none is meant to be late."""
    return 0.5 if name == "too slow" else 30.0


@pytest.mark.parametrize("name", BAD)
def test_bad_replies_are_asked_again(name):
    reply, _ = BAD[name]
    verdict, server = grade(reply, reply, completion("[[4]]"), timeout=patience(name))
    assert verdict.score == 4.0
    assert len(server.bodies) == 3


@pytest.mark.parametrize("name", BAD)
def test_bad_replies_without_end_are_an_error(name):
    reply, reason = BAD[name]
    error, server = grade(reply, timeout=patience(name))
    assert isinstance(error, JudgeError)
    assert reason in str(error)
    assert len(server.bodies) == 4


def test_replies_without_score_are_drawn_anew():
    _, server = grade(completion("hm"), completion("[[4]]"))
    assert [body["temperature"] for body in server.bodies] == [0.0, 0.5]


def test_refusals_are_not_repeated():
    error, server = grade((401, b'{"error": {"message": "wrong key"}}'))
    assert "401 Unauthorized (wrong key)" in str(error)
    assert len(server.bodies) == 1


def test_pauses_grow_and_the_server_may_ask_for_longer():
    pauses = []
    with ScriptedJudge(lambda number, body: None).running() as server:
        config = JudgeConfig(server.url, "judge", attempts=4, pause=0.5)
        with pytest.raises(JudgeError):
            Judge(config, sleep=pauses.append).grade(MESSAGES)
    assert pauses == [0.5, 1.0, 2.0]
    pauses.clear()
    with ScriptedJudge(lambda number, body: rate_limited()).running() as server:
        config = JudgeConfig(server.url, "judge", attempts=3, pause=0.5)
        with pytest.raises(JudgeError):
            Judge(config, sleep=pauses.append).grade(MESSAGES)
    assert pauses == [0.01, 0.01]  # its Retry-After


def test_check_names_what_is_wrong():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(UserError, match="cannot be reached: Connection refused"):
        judge(url).check()
    with (
        ScriptedJudge(lambda number, body: (200, b"hello")).running() as server,
        pytest.raises(UserError, match="what is no chat completion: 'hello'"),
    ):
        judge(server.url).check()
    with (
        ScriptedJudge(lambda number, body: completion("x")).running() as server,
        pytest.raises(UserError, match="refuses the request: 404"),
    ):
        judge(server.url + "/wrong").check()
    with pytest.raises(UserError, match="--judge_url: 'localhost' is no address"):
        judge("localhost")
