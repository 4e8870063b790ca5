"""Rendering chat templates: here, or in a process with limits where others wrote the template.

Jinja's sandbox keeps a template from reaching the interpreter, but not from asking for a text of a
terabyte or a number of a billion digits. A template that came with a model is therefore rendered
in a process that may use so much memory and processor time and no more, and that is started anew
after it was ended for that. One process serves all renderings; it ends with this one.
"""

import atexit
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from danube_jax.errors import UserError

CPU_SECONDS = 5.0  # of one rendering; real templates take well under a millisecond
MEMORY_BYTES = 2**29  # beyond what the process takes by itself
OUTPUT_FACTOR, OUTPUT_SPARE = 16, 2**20  # characters of the text, by those of the messages

Rendered = tuple[str, list[tuple[int, int]]]


def render_here(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    special_tokens: Mapping[str, str],
    options: Mapping[str, bool],
) -> Rendered:
    """Renders with transformers' own sandbox, in this process.

    Returns:
      (text, spans between `{% generation %}` tags, where `options` asks for them).

    Raises:
      UserError: the template is none, or refuses the conversation (with the template's words).
    """
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        rendered, spans = render_jinja_template(
            conversations=[[dict(message) for message in messages]],
            chat_template=template,
            **options,
            **special_tokens,
        )
    except jinja2.exceptions.TemplateSyntaxError as error:
        raise UserError(
            f"the chat template is not valid Jinja: {error.message} (line {error.lineno})"
        ) from None
    except jinja2.exceptions.TemplateError as error:
        raise UserError(f"the chat template refuses this conversation: {error!s:.500}") from None
    except MemoryError:
        raise UserError(
            f"the chat template needs more than {MEMORY_BYTES / 2**20:,.0f} MiB of memory"
        ) from None
    except Exception as error:  # a template can make Python raise anything
        raise UserError(f"the chat template failed on this conversation: {error!r:.300}") from None
    return rendered[0], [(int(start), int(end)) for start, end in spans[0]] if spans else []


class _Renderer:
    """A process that renders; not to be shared between forks."""

    def __init__(self):
        self.owner = os.getpid()
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            env=os.environ | {"PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            process_group=0,  # Ctrl-C is not meant for it
        )

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The reply.

        Raises:
          UserError: the process ended over it.
        """
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            reply = self._process.stdout.readline()
        except BrokenPipeError:
            reply = b""
        if reply.endswith(b"\n"):
            return json.loads(reply)
        status = self._process.wait()
        if status == -signal.SIGPROF:
            raise UserError(f"the chat template takes longer than {CPU_SECONDS:g} s")
        raise UserError(f"the chat template ended the process that rendered it (status {status})")

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


_renderer: _Renderer | None = None
_lock = threading.Lock()


def render_apart(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    special_tokens: Mapping[str, str],
    options: Mapping[str, bool],
) -> Rendered:
    """As `render_here`, in the process with limits.

    Raises:
      UserError: as `render_here`; or it takes too much time or memory, or makes too long a text.
    """
    global _renderer
    request = {
        "template": template,
        "messages": [dict(message) for message in messages],
        "special_tokens": dict(special_tokens),
        "options": dict(options),
        "seconds": CPU_SECONDS,
    }
    with _lock:
        if _renderer is None or _renderer.owner != os.getpid():
            _renderer = _Renderer()
        try:
            reply = _renderer.ask(request)
        except BaseException:  # interrupted, too: its answer would be taken for the next one's
            _close()
            raise
    if "refused" in reply:
        raise UserError(reply["refused"])
    return reply["text"], [(start, end) for start, end in reply["spans"]]


@atexit.register
def _close() -> None:
    global _renderer
    renderer, _renderer = _renderer, None
    if renderer is not None and renderer.owner == os.getpid():
        renderer.close()


def _forget() -> None:
    """In a fork: the process and the lock belong to the parent."""
    global _renderer, _lock
    _renderer, _lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget)


def _serve() -> None:
    from transformers.utils import chat_template_utils  # noqa: F401  (before the limits count)

    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    _limit_memory()
    for line in sys.stdin.buffer:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, request.pop("seconds"))
        try:
            text, spans = render_here(**request)
            size = sum(len(json.dumps(message)) for message in request["messages"])
            if len(text) > OUTPUT_FACTOR * size + OUTPUT_SPARE:
                raise UserError(f"the chat template makes a text of {len(text):,} characters")
            reply = json.dumps({"text": text, "spans": spans})
        except UserError as error:
            reply = json.dumps({"refused": str(error)})
        except MemoryError:
            reply = json.dumps({"refused": "the chat template makes too long a text"})
        signal.setitimer(signal.ITIMER_PROF, 0)
        text = ""
        sys.stdout.write(reply + "\n")
        sys.stdout.flush()


def _limit_memory() -> None:
    statistics = Path("/proc/self/statm")
    if statistics.is_file():
        pages = int(statistics.read_text().split()[0])
        most = pages * resource.getpagesize() + MEMORY_BYTES
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        if hard == resource.RLIM_INFINITY or most < hard:
            resource.setrlimit(resource.RLIMIT_AS, (most, hard))


if __name__ == "__main__":
    _serve()
