import pytest

from danube_jax.config import TokenizerConfig
from danube_jax.data import chat
from danube_jax.data.tokenizer import load_tokenizer
from danube_jax.errors import UserError

CONVERSATION = [
    {"role": "user", "content": "Hello, how are you?"},
    {"role": "assistant", "content": "I'm doing great. How can I help you today?"},
    {"role": "user", "content": "I'd like to show off how chat templating works!"},
]
RENDERED = (
    "<|prompt|>Hello, how are you?</s>"
    "<|answer|>I'm doing great. How can I help you today?</s>"
    "<|prompt|>I'd like to show off how chat templating works!</s>"
)
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.fixture(scope="module")
def mistral():
    pytest.importorskip("mistral_common", reason="mistral-common is not installed")
    return load_tokenizer(TokenizerConfig(builtin="mistral"))


@pytest.mark.parametrize("name", chat.TEMPLATES)
def test_templates_render_the_published_reference(name):
    template = chat.load_template(name)
    plain = chat.render(template, CONVERSATION, SPECIAL, add_generation_prompt=False)
    assert plain == RENDERED
    assert chat.render(template, CONVERSATION, SPECIAL) == RENDERED + "<|answer|>"


def test_system_text_where_the_template_takes_it():
    template = chat.TEMPLATES["danube"]
    rendered = chat.render(template, [SYSTEM, CONVERSATION[0]], SPECIAL)
    assert rendered == "<|system|>Be brief.</s><|prompt|>Hello, how are you?</s><|answer|>"


@pytest.mark.parametrize("name", ["danube2", "danube3"])
def test_system_text_where_the_template_refuses_it(name):
    with pytest.raises(UserError, match="System role not supported"):
        chat.render(chat.TEMPLATES[name], [SYSTEM, CONVERSATION[0]], SPECIAL)


def test_danube3_strips_and_alternates():
    template = chat.TEMPLATES["danube3"]
    spaced = [{"role": "user", "content": "  Hi \n"}]
    assert chat.render(template, spaced, SPECIAL) == "<|prompt|>Hi</s><|answer|>"
    assert "  Hi \n" in chat.render(chat.TEMPLATES["danube2"], spaced, SPECIAL)
    with pytest.raises(UserError, match="roles must alternate user/assistant"):
        chat.render(template, [*spaced, *spaced], SPECIAL)


@pytest.mark.parametrize("name", ["danube", "danube2"])
def test_ids_of_the_published_example(mistral, name):
    """No BOS, and a prefix space after `</s>`, as the Danube2 checkpoint was trained."""
    tokenizer = mistral.with_chat_template(chat.TEMPLATES[name])
    ids = tokenizer.encode_chat([{"role": "user", "content": "Why is drinking water so healthy?"}])
    expected = [523, 28766, 14350, 447, 28766, 28767, 7638, 349, 11605, 2130, 579, 7783, 28804]
    assert ids == [*expected, 2, 523, 28766, 24115, 28766, 28767]
    system = tokenizer.encode_markup("<|system|>")
    assert system == [523, 28766, 6574, 28766, 28767]
    assert mistral.chat_template is None


def test_without_a_template(mistral):
    with pytest.raises(UserError, match="has no chat template; expected one of danube, danube2"):
        mistral.render_chat(CONVERSATION)


@pytest.mark.parametrize(
    ("messages", "fragment"),
    [
        ([], "there are none"),
        ("hello", "expected a list of messages, got str"),
        (CONVERSATION[0], "expected a list of messages, got dict"),
        ([CONVERSATION[0], "hello"], r"messages\[1\]: expected an object"),
        ([{"role": "tool", "content": "x"}], r"messages\[0\].role: 'tool'"),
        ([{"content": "x"}], r"messages\[0\].role: None"),
        ([CONVERSATION[0], {"role": "assistant"}], r"messages\[1\].content: expected a text"),
        ([{"role": "user", "content": 3}], r"messages\[0\].content: expected a text, got 3"),
    ],
)
def test_what_is_no_conversation_is_refused(messages, fragment):
    with pytest.raises(UserError, match=fragment):
        chat.render(chat.TEMPLATES["danube"], messages, SPECIAL)


@pytest.mark.parametrize(
    ("template", "fragment"),
    [
        ("{% for %}", r"not valid Jinja: .*line 1"),
        ("{{ raise_exception('No cats here') }}", "refuses this conversation: No cats here"),
        ("{{ messages[0].content + 3 }}", "failed on this conversation: TypeError"),
        ("{{ messages.append(1) }}", "refuses this conversation"),
        ("{{ ''.__class__.__mro__ }}", "refuses this conversation"),
    ],
)
def test_template_errors_are_one_line(template, fragment):
    with pytest.raises(UserError, match=fragment):
        chat.render(template, CONVERSATION, SPECIAL)


def test_rendering_settings_are_those_of_transformers():
    template = (
        "{%- for message in messages %}\n"
        "    {% if loop.last %}{% break %}{% endif %}\n"
        "{{ message | tojson }}\n"
        "{% endfor %}\n"
        "{% generation %}{{ strftime_now('%Y') | length }}{{ bos_token }}{% endgeneration %}"
    )
    out = chat.render(template, CONVERSATION[:2], SPECIAL)
    assert out == '{"role": "user", "content": "Hello, how are you?"}\n4<s>'


def test_templates_by_name_and_file(tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text("{{ messages | length }}")
    assert chat.load_template(str(file)) == "{{ messages | length }}"
    for name in ("danube4", "", str(tmp_path)):
        with pytest.raises(UserError, match="expected one of danube, danube2, danube3, or a"):
            chat.load_template(name)
