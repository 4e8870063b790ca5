"""Chat formats: Danube's templates, and rendering any Jinja template as transformers does."""

import types
from collections.abc import Mapping, Sequence
from pathlib import Path

from danube_jax.data import template_process
from danube_jax.errors import UserError

ROLES = ("system", "user", "assistant")

_USER = "{% if message['role'] == 'user' %}{{ '<|prompt|>' + message['content'] + eos_token }}"
_SYSTEM = "{% elif message['role'] == 'system' %}"
_ASSISTANT = (
    "{% elif message['role'] == 'assistant' %}"
    "{{ '<|answer|>'  + message['content'] + eos_token }}{% endif %}"
)
_REFUSE_SYSTEM = "{{ raise_exception('System role not supported') }}"
_ANSWER = "{% if loop.last and add_generation_prompt %}{{ '<|answer|>' }}{% endif %}"
_ALTERNATE = (
    "{% if ((message['role'] == 'user') != (loop.index0 % 2 == 0)) or "
    "((message['role'] == 'assistant') != (loop.index0 % 2 == 1)) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}"
)

# The templates of the published checkpoints, to the character.
TEMPLATES: Mapping[str, str] = types.MappingProxyType(
    {
        "danube": (
            "{% for message in messages %}"
            + _USER
            + _SYSTEM
            + "{{ '<|system|>' + message['content'] + eos_token }}"
            + _ASSISTANT
            + _ANSWER
            + "{% endfor %}"
        ),
        "danube2": (
            "{% for message in messages %}"
            + _USER
            + _SYSTEM
            + _REFUSE_SYSTEM
            + _ASSISTANT
            + _ANSWER
            + "{% endfor %}"
        ),
        "danube3": (
            "{% for message in messages %}{% if message['role'] == 'system' %}"
            + _REFUSE_SYSTEM
            + "{% endif %}"
            + _ALTERNATE
            + "{% if message['role'] == 'user' %}"
            "{{ '<|prompt|>' + message['content'].strip() + eos_token }}"
            "{% elif message['role'] == 'assistant' %}"
            "{{ '<|answer|>' + message['content'].strip() + eos_token }}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|answer|>' }}{% endif %}"
        ),
    }
)
DEFAULT_TEMPLATE = "danube"


def load_template(name: str) -> str:
    """The Jinja source of a named template, or of a file.

    Raises:
      UserError: neither a name in `TEMPLATES` nor a readable file.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, ValueError):
        raise UserError(
            f"chat template {name!r}: expected one of {', '.join(TEMPLATES)}, or a readable file "
            "that holds a Jinja template"
        ) from None


def check_messages(messages: Sequence[Mapping[str, str]]) -> None:
    """Refuses what is no conversation.

    Raises:
      UserError: no messages, or one without a known role and a text; says which.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise UserError(f"messages: expected a list of messages, got {type(messages).__name__}")
    if not messages:
        raise UserError("messages: there are none; expected at least one")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise UserError(
                f"messages[{i}]: expected an object with role and content, got {message!r}"
            )
        if message.get("role") not in ROLES:
            raise UserError(
                f"messages[{i}].role: {message.get('role')!r} is not possible; expected one of "
                f"{', '.join(ROLES)}"
            )
        if not isinstance(message.get("content"), str):
            raise UserError(
                f"messages[{i}].content: expected a text, got {message.get('content')!r}"
            )


def render(
    template: str,
    messages: Sequence[Mapping[str, str]],
    special_tokens: Mapping[str, str],
    *,
    add_generation_prompt: bool = True,
) -> str:
    """Renders a conversation in transformers' own sandbox, as `apply_chat_template` does.

    A template that is none of `TEMPLATES` is rendered in a process with limits on time and memory.

    Args:
      template: Jinja source.
      messages: each with `role` (one of `ROLES`) and `content`.
      special_tokens: what the template sees as `bos_token`, `eos_token` and so on.
      add_generation_prompt: whether the text ends with the beginning of an answer.

    Raises:
      UserError: bad messages, or the template refuses them (with the template's own words).
    """
    return _render(template, messages, special_tokens, add_generation_prompt=add_generation_prompt)[
        0
    ]


def render_with_spans(
    template: str, messages: Sequence[Mapping[str, str]], special_tokens: Mapping[str, str]
) -> tuple[str, list[tuple[int, int]]]:
    """The text, and (start, end) of what the template puts between `{% generation %}` tags.

    Raises:
      UserError: as `render`.
    """
    return _render(template, messages, special_tokens, return_assistant_tokens_mask=True)


def _render(
    template: str,
    messages: Sequence[Mapping[str, str]],
    special_tokens: Mapping[str, str],
    **options: bool,
) -> tuple[str, list[tuple[int, int]]]:
    check_messages(messages)
    ours = template in TEMPLATES.values()
    render_it = template_process.render_here if ours else template_process.render_apart
    return render_it(template, messages, special_tokens, options)
