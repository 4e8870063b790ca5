import json

import pytest

from danube_jax.errors import UserError
from danube_jax.inference.conversation import (
    COMMANDS,
    Conversation,
    fit,
    help_text,
    parse_command,
    read_turn,
    unescape,
)


def lengths(messages):
    """One id a character, and three for each message."""
    return [0] * sum(3 + len(message["content"]) for message in messages)


def test_messages_and_undo():
    conversation = Conversation("Be brief.").say("a").say("b").say("c").say("d")
    assert [message["role"] for message in conversation.messages()] == [
        "system",
        *["user", "assistant"] * 2,
    ]
    assert conversation.last_question() == "c"
    assert conversation.undo().turns == ("a", "b")
    assert conversation.undo().say("e").last_question() == "e"
    assert conversation.undo().say("e").undo().turns == ("a", "b")
    assert conversation.undo().undo().undo().turns == ()
    assert Conversation().last_question() is None
    assert Conversation("x").undo() == Conversation("x")


def test_saved_and_loaded(tmp_path):
    conversation = Conversation("Sei kurz.").say("Wo ist 漢?").say(" dort\n").say("gut").say("")
    conversation.save(tmp_path / "a.json")
    assert Conversation.load(tmp_path / "a.json") == conversation
    assert json.loads((tmp_path / "a.json").read_text())["messages"][0]["role"] == "system"
    Conversation().say("a").say("b").save(tmp_path / "b.json")
    assert Conversation.load(tmp_path / "b.json").system == ""
    with pytest.raises(UserError, match="cannot be written"):
        conversation.save(tmp_path)


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (None, "cannot be read"),
        ("{", "no JSON"),
        ("[]", 'expected a JSON object with "messages"'),
        ('{"messages": []}', "there are none"),
        ('{"messages": [{"role": "user"}]}', r"messages\[0\].content"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "in turn"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no answer"),
    ],
)
def test_what_is_no_conversation_is_refused(tmp_path, content, fragment):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=fragment):
        Conversation.load(path)


def test_the_oldest_turns_go_first():
    conversation = Conversation("s").say("a" * 20).say("b" * 20).say("c" * 5).say("d" * 5).say("e")
    # system 4, pairs 46 and 16, question 4
    kept, ids, dropped = fit(conversation, lengths, context=80, max_tokens=10)
    assert (kept, len(ids), dropped) == (conversation, 70, 0)
    kept, ids, dropped = fit(conversation, lengths, context=79, max_tokens=10)
    assert (kept.turns, len(ids), dropped) == (("c" * 5, "d" * 5, "e"), 24, 1)
    assert kept.system == "s"
    kept, ids, dropped = fit(conversation, lengths, context=33, max_tokens=10)
    assert (kept.turns, len(ids), dropped) == (("e",), 8, 2)


def test_room_for_an_answer_is_at_most_half_the_context():
    conversation = Conversation().say("a" * 9).say("b" * 9).say("c" * 9)
    kept, ids, dropped = fit(conversation, lengths, context=80, max_tokens=10_000)
    assert (len(ids), dropped) == (36, 0)
    kept, ids, dropped = fit(conversation, lengths, context=71, max_tokens=10_000)
    assert (len(ids), dropped) == (36, 0)
    kept, ids, dropped = fit(conversation, lengths, context=70, max_tokens=10_000)
    assert (kept.turns, dropped) == (("c" * 9,), 1)


def test_a_question_that_leaves_little_room_is_asked_and_one_too_long_is_not():
    conversation = Conversation().say("a" * 7)
    assert len(fit(conversation, lengths, context=11, max_tokens=5)[1]) == 10
    with pytest.raises(UserError, match="10 tokens; expected fewer than the model's context of 10"):
        fit(conversation, lengths, context=10, max_tokens=5)


def test_commands():
    assert parse_command("hello /reset") is None
    assert parse_command("//etc/hosts") is None
    assert unescape("//etc/hosts") == "/etc/hosts"
    assert unescape("a//b") == "a//b"
    assert parse_command("/reset") == ("reset", "")
    assert parse_command("/system  Be brief. ") == ("system", "Be brief.")
    assert parse_command("/system Be\nbrief.") == ("system", "Be\nbrief.")
    assert parse_command("/quit") == ("exit", "")
    with pytest.raises(UserError, match="no command /etc/hosts; /help lists"):
        parse_command("/etc/hosts")
    assert all(f"/{name} " in help_text() for name in COMMANDS)


@pytest.mark.parametrize(
    ("lines", "turns"),
    [
        (["a", "b"], ["a", "b"]),
        (["a\\", "b\\", "c", "d"], ["a\nb\nc", "d"]),
        (['"""', "a", "", " b", '"""', "c"], ["a\n\n b", "c"]),
        (['"""a', 'b"""', "c"], ["a\nb", "c"]),
        (['"""a"""', "c"], ["a", "c"]),
        (['say """', "c"], ['say """', "c"]),
        (["a\\"], ["a"]),
        (['"""a', "b"], ["a\nb"]),
        ([""], [""]),
        ([], []),
    ],
)
def test_turns_of_several_lines(lines, turns):
    left = iter(lines)
    begun = []

    def read_line(inside):
        begun.append(inside)
        return next(left, None)

    read = []
    while (turn := read_turn(read_line)) is not None:
        read.append(turn)
    assert read == turns
    assert begun[0] is False
