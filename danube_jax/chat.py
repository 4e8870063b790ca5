"""Chat with a trained model in the terminal.

Example:
  python -m danube_jax.chat --model=runs/demo
  python -m danube_jax.chat --model=DIR --system="Answer in one sentence." --temperature=0.3
  echo "Why is drinking water so healthy?" | python -m danube_jax.chat --model=DIR

The format is the model's own chat template, or Danube's where it has none. /help lists the commands
of the chat.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

from danube_jax import command_line
from danube_jax.console import info
from danube_jax.errors import printable
from danube_jax.inference import sampling_flags

_MODEL = flags.DEFINE_string("model", None, "A workdir, a checkpoint step, or a HF folder.")
_SYSTEM = flags.DEFINE_string("system", "", "System text of the conversation.")
_CHAT_TEMPLATE = flags.DEFINE_string(
    "chat_template", None, "danube, danube2, danube3 or a Jinja file; default: the model's."
)
_STOP = flags.DEFINE_multi_string("stop", [], "Text that ends an answer; may be given repeatedly.")
sampling_flags.define_flags(sampling_flags.CHAT_DEFAULTS)


def main(argv: Sequence[str]) -> int:
    """Parses flags, opens the model, chats until the user leaves; returns the exit status."""
    command_line.parse_flags(argv, __doc__, required=("model",))
    from danube_jax.inference.chat_session import ChatSession, converse
    from danube_jax.inference.loading import open_text_model, quiet_broken_pipe
    from danube_jax.interruption import raise_keyboard_interrupt

    model = open_text_model(_MODEL.value, _CHAT_TEMPLATE.value)
    settings = sampling_flags.resolve_settings(
        sampling_flags.given_settings(), model.source.generation, sampling_flags.CHAT_DEFAULTS
    )
    generator: list[Any] = []  # loaded once the session's arguments are known to be good

    shown = printable if sys.stdout.isatty() else str  # a pipe gets what the model wrote

    def write(text: str) -> None:
        print(shown(text), end="", flush=True)

    session = ChatSession(
        stream=lambda ids, sampling: generator[0].stream(ids, sampling),
        tokenizer=model.tokenizer,
        context=model.context,
        settings=settings,
        stop_tokens=model.source.eos_ids(),
        stop_strings=_STOP.value,
        system=_SYSTEM.value,
        write=write,
        note=info,
    )
    generator.append(model.generator(sampling_flags.dtype(), sampling_flags.cache_dtype()))
    interactive = sys.stdin.isatty()
    if interactive:
        signal.signal(signal.SIGINT, raise_keyboard_interrupt)  # also where it was ignored
        info(f"{_MODEL.value}: context of {model.context:,} tokens; /help lists the commands")
    with quiet_broken_pipe():
        converse(session.handle, _line_reader(interactive), note=info, interactive=interactive)
    return 0


def _line_reader(interactive: bool) -> Callable[[bool], str | None]:
    """Lines from a terminal with a prompt and editing, or from a pipe."""
    sys.stdin.reconfigure(errors="replace")
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (makes input() a line editor)

        def read(begun: bool) -> str | None:
            try:
                return input("... " if begun else ">>> ")
            except EOFError:
                print(file=sys.stderr)
                return None

        return read

    def read_pipe(begun: bool) -> str | None:
        line = sys.stdin.readline()
        return line.removesuffix("\n").removesuffix("\r") if line else None

    return read_pipe


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    command_line.run(main)
