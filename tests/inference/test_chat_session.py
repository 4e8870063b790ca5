"""The chat's logic against a scripted model."""

import dataclasses
import json

import pytest
from tokenizer_models import train_sentencepiece

from danube_jax.data import chat
from danube_jax.data.tokenizer import SentencePieceTokenizer
from danube_jax.errors import UserError
from danube_jax.inference.chat_session import ChatSession, converse
from danube_jax.inference.sampling_flags import CHAT_DEFAULTS


@dataclasses.dataclass
class Chunk:
    text: str
    tokens: tuple[int, ...]
    finish_reason: str | None = None


class Model:
    """Answers with scripted pieces; an exception among them is raised."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.asked = []

    def stream(self, ids, sampling):
        self.asked.append((list(ids), sampling))
        pieces = self.answers.pop(0)
        for i, piece in enumerate(pieces):
            if isinstance(piece, BaseException):
                raise piece
            yield Chunk(piece, (7,), "stop" if i + 1 == len(pieces) else None)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return SentencePieceTokenizer(train_sentencepiece(tmp_path_factory.mktemp("m") / "a.model"))


@pytest.fixture
def make(tokenizer):
    def build(*answers, template="danube", context=512, settings=CHAT_DEFAULTS, **options):
        model = Model(*answers)
        shown, notes = [], []
        session = ChatSession(
            stream=model.stream,
            tokenizer=tokenizer.with_chat_template(chat.TEMPLATES[template]),
            context=context,
            settings=settings,
            stop_tokens=(2,),
            write=shown.append,
            note=notes.append,
            **options,
        )
        return session, model, shown, notes

    return build


def test_answers_are_streamed_and_remembered(make, tokenizer):
    session, model, shown, notes = make(["Hel", "lo"], ["again"], system="Be brief.")
    assert session.handle("Hi")
    assert session.handle("And?")
    assert shown == ["Hel", "lo", "\n", "again", "\n"]
    assert session.conversation.turns == ("Hi", "Hello", "And?", "again")
    told = "<|system|>Be brief.</s><|prompt|>Hi</s><|answer|>"
    assert model.asked[0][0] == tokenizer.encode_markup(told)
    told += "Hello</s><|prompt|>And?</s><|answer|>"
    assert model.asked[1][0] == tokenizer.encode_markup(told)
    assert notes[0].startswith("[2 tokens, ")
    assert "tokens/s" in notes[0]


def test_settings_reach_the_model(make):
    session, model, _, notes = make(["a"], ["b"], settings=CHAT_DEFAULTS | {"seed": 5})
    session.handle("Hi")
    first = model.asked[0][1]
    assert (first.temperature, first.repetition_penalty, first.seed) == (0.7, 1.1, 5)
    assert first.stop_tokens == (2,)
    assert first.stop_strings == ("<|prompt|>",)
    assert session.handle("/set temperature 0.25")
    assert "temperature 0.25" in notes[-1]
    session.handle("Hi")
    assert (model.asked[1][1].temperature, model.asked[1][1].seed) == (0.25, 6)
    for line, fragment in (
        ("/set temperature hot", "expected a number"),
        ("/set temperature -1", "temperature"),
        ("/set top_p 3", "top_p"),
        ("/set heat 1", "no setting 'heat'"),
        ("/set temperature", "a name and a value"),
    ):
        assert session.handle(line)
        assert notes[-1].startswith("error: ")
        assert fragment in notes[-1]
    assert session.settings["temperature"] == 0.25
    session.handle("/set")
    assert "temperature 0.25" in notes[-1]
    assert "seed 5" in notes[-1]


def test_other_templates_have_no_stop_text_of_danube(make, tokenizer):
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    model = Model(["a"])
    session = ChatSession(
        stream=model.stream,
        tokenizer=tokenizer.with_chat_template(template),
        context=64,
        settings=CHAT_DEFAULTS,
        stop_tokens=(2,),
        stop_strings=("END",),
        write=lambda text: None,
        note=lambda text: None,
    )
    session.handle("Hi")
    assert model.asked[0][1].stop_strings == ("END",)


def test_reset_undo_and_retry(make):
    session, model, _, notes = make(["a"], ["b"], ["c"], ["d"], system="S")
    for command in ("/undo", "/retry", "/save x.json"):
        session.conversation = dataclasses.replace(session.conversation, system="")
        session.handle(command)
        assert notes[-1] == "error: nothing was said yet"
    session.handle("/system S")
    session.handle("one")
    session.handle("two")
    session.handle("/retry")
    assert session.conversation.turns == ("one", "a", "two", "c")
    assert model.asked[1][0] == model.asked[2][0]
    assert model.asked[1][1].seed != model.asked[2][1].seed
    session.handle("/undo")
    assert session.conversation.turns == ("one", "a")
    assert "forgot: two" in notes[-1]
    session.handle("/reset")
    assert session.conversation.turns == ()
    assert session.conversation.system == "S"
    session.handle("/system")
    assert session.conversation.messages() == []


def test_save_and_load(make, tmp_path):
    session, *_ = make(["漢"], ["later"])
    session.handle("one")
    path = tmp_path / "a file.json"
    session.handle(f"/save {path}")
    assert json.loads(path.read_text())["messages"][1] == {"role": "assistant", "content": "漢"}
    session.handle("/reset")
    session.handle(f"/load {path}")
    assert session.conversation.turns == ("one", "漢")
    other, _, _, notes = make(template="danube3")
    for line in ("/load", "/save", f"/load {tmp_path / 'none'}"):
        other.handle(line)
        assert notes[-1].startswith("error: ")
    session.conversation = dataclasses.replace(session.conversation, system="S")
    session.handle(f"/save {path}")
    other.handle(f"/load {path}")
    assert "System role not supported" in notes[-1]
    assert other.conversation.turns == ()


def test_a_template_that_refuses_a_system_text(make):
    session, model, _, notes = make(["a"], template="danube2")
    assert session.handle("/system Be brief.")
    assert notes[-1].startswith("error: ")
    assert "System role not supported" in notes[-1]
    session.handle("Hi")
    assert session.conversation.turns == ("Hi", "a")
    with pytest.raises(UserError, match="System role not supported"):
        make(template="danube2", system="Be brief.")
    assert len(model.asked) == 1


def test_impossible_settings_are_refused_at_the_start(make):
    with pytest.raises(UserError, match="temperature"):
        make(settings=CHAT_DEFAULTS | {"temperature": -1.0})


def test_a_full_context_forgets_the_oldest_turns(make):
    session, model, _, notes = make(*(["answer"] for _ in range(12)), context=128)
    for i in range(12):
        session.handle(f"question number {i}")
    assert any(note.startswith("warning: the context of 128 tokens is full") for note in notes)
    assert "question number 0" not in session.conversation.turns
    assert session.conversation.turns[-2:] == ("question number 11", "answer")
    for ids, sampling in model.asked:
        assert len(ids) + sampling.max_tokens <= 128
        assert sampling.max_tokens >= 64 or len(ids) > 64
    before = session.conversation
    session.handle("word " * 200)
    assert "expected fewer than the model's context of 128" in notes[-1]
    assert session.conversation == before


def test_interrupted_answers(make):
    session, _, shown, notes = make(
        ["Hel", KeyboardInterrupt()], [KeyboardInterrupt()], ["x"], [KeyboardInterrupt()]
    )
    session.handle("one")
    assert session.conversation.turns == ("one", "Hel")
    assert notes[-1].endswith("stopped]")
    assert shown[-1] == "\n"
    session.handle("two")
    assert session.conversation.turns == ("one", "Hel")
    session.handle("/retry")
    assert session.conversation.turns == ("one", "x")
    session.handle("/retry")
    assert session.conversation.turns == ("one", "x")


def test_slashes_and_leaving(make):
    session, _, _, notes = make(["a"])
    assert session.handle("//etc")
    assert session.conversation.turns == ("/etc", "a")
    assert session.handle("/what")
    assert "no command /what" in notes[-1]
    assert session.handle("/help")
    assert "/retry" in notes[-1]
    assert session.handle("half \ud800")
    assert "not valid Unicode" in notes[-1]
    assert not session.handle("/exit")
    assert not session.handle("/quit")


def scripted(events):
    left = iter(events)

    def read_line(begun):
        event = next(left)
        if isinstance(event, BaseException):
            raise event
        return event

    return read_line


@pytest.mark.parametrize(
    ("events", "handled"),
    [
        (["a", "", "b", None], ["a", "b"]),
        (["a", "bye", "never"], ["a", "bye"]),
        ([KeyboardInterrupt(), "a", KeyboardInterrupt(), KeyboardInterrupt()], ["a"]),
        (["x\\", KeyboardInterrupt(), "a", None], ["a"]),
    ],
)
def test_the_loop_at_a_terminal(events, handled):
    got = []

    def handle(text):
        got.append(text)
        return text != "bye"

    notes = []
    converse(handle, scripted(events), note=notes.append, interactive=True)
    assert got == handled
    assert any("Ctrl-C again" in note for note in notes) == (KeyboardInterrupt in map(type, events))


def test_ctrl_c_in_a_script_leaves():
    notes = []
    events = scripted(["a", KeyboardInterrupt()])
    converse(lambda text: True, events, note=notes.append, interactive=False)
    assert notes == []
