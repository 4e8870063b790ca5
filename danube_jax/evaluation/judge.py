"""A judge behind an OpenAI-compatible endpoint: OpenAI itself, vLLM, llama.cpp, ...

Requests that a server cannot serve now (rate limit, overload, no answer in time) are repeated with
growing pauses; what it refuses for good is an error at once.
"""

import dataclasses
import email.utils
import http.client
import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from danube_jax.errors import UserError
from danube_jax.untrusted import parse_json

# FastChat's patterns of a verdict: [[7]] as asked for, or [7].
_VERDICTS = (re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]"))
LOWEST, HIGHEST = 1.0, 10.0
TRANSIENT = (408, 409, 425, 429, 500, 502, 503, 504, 529)
MAX_PAUSE = 60.0


class JudgeError(Exception):
    """One question could not be judged; the message says why."""


@dataclasses.dataclass(frozen=True)
class JudgeConfig:
    """Where the judge is, and how patient we are.

    Attributes:
      url: base address, such as http://localhost:8000/v1.
      model: the name that the server knows it by.
      key: sent as a bearer token; '' sends none.
      timeout: seconds to wait for one answer.
      attempts: requests for one verdict, of any kind.
      pause: seconds before the second attempt; doubled each time, at most `MAX_PAUSE`.
      max_tokens: of an answer.
      workers: requests at once.
    """

    url: str
    model: str
    key: str = ""
    timeout: float = 120.0
    attempts: int = 5
    pause: float = 1.0
    max_tokens: int = 2_048
    workers: int = 4

    def __post_init__(self):
        if not re.match(r"https?://[^/\s]+", self.url):
            raise UserError(
                f"--judge_url: {self.url!r} is no address; expected one such as "
                "http://localhost:8000/v1"
            )
        if not self.model:
            raise UserError("--judge_model: is empty; expected the model's name on the server")

    @property
    def endpoint(self) -> str:
        """Address of chat completions."""
        return self.url.rstrip("/") + "/chat/completions"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A score from 1 to 10, and the judge's words."""

    score: float
    text: str


def parse_verdict(text: str) -> float | None:
    """The score in a judge's reply, or None where there is none from 1 to 10."""
    for pattern in _VERDICTS:
        found = pattern.search(text)
        if found:
            score = float(found[1])
            return score if LOWEST <= score <= HIGHEST else None
    return None


class Judge:
    """Asks for verdicts; safe to use from several threads."""

    def __init__(self, config: JudgeConfig, sleep: Callable[[float], None] = time.sleep):
        self.config = config
        self._sleep = sleep

    def check(self) -> None:
        """Asks for a word, so that a wrong address is known before hours of work.

        Raises:
          UserError: the judge cannot be reached, refuses, or answers what is no chat completion.
        """
        try:
            self._complete([{"role": "user", "content": "Reply with the word ready."}], 0.0)
        except JudgeError as error:
            raise UserError(f"the judge at {self.config.url} {error}") from None

    def grade(self, messages: Sequence[Mapping[str, str]]) -> Verdict:
        """The verdict on one answer; replies without a score are asked for again.

        The first reply is greedy; later ones are drawn with some temperature, since a greedy reply
        would come back the same.

        Raises:
          JudgeError: no score after all attempts.
        """
        left, reply = self.config.attempts, ""
        while left > 0:
            first = left == self.config.attempts
            reply, used = self._complete(messages, 0.0 if first else 0.5, left)
            left -= used
            score = parse_verdict(reply)
            if score is not None:
                return Verdict(score, reply)
        shown = " ".join(reply.split())[:80]
        raise JudgeError(f"gave no score from 1 to 10; its last reply is {shown!r}")

    def _complete(
        self, messages: Sequence[Mapping[str, str]], temperature: float, attempts: int | None = None
    ) -> tuple[str, int]:
        """The judge's reply, and how many attempts it took."""
        attempts = attempts or self.config.attempts
        body = json.dumps(
            {
                "model": self.config.model,
                "messages": list(messages),
                "temperature": temperature,
                "max_tokens": self.config.max_tokens,
            }
        ).encode()
        pause, reason = self.config.pause, ""
        for attempt in range(1, attempts + 1):
            try:
                return self._post(body), attempt
            except _Again as again:
                reason = str(again)
                wait = pause if again.wait is None else again.wait
            if attempt < attempts:
                self._sleep(min(wait, MAX_PAUSE))
                pause *= 2
        raise JudgeError(f"{reason} ({attempts} attempts)")

    def _post(self, body: bytes) -> str:
        headers = {"Content-Type": "application/json"}
        if self.config.key:
            headers["Authorization"] = f"Bearer {self.config.key}"
        request = urllib.request.Request(self.config.endpoint, body, headers)
        try:
            with urllib.request.urlopen(request, timeout=self.config.timeout) as response:
                return _content(response.read())
        except urllib.error.HTTPError as error:
            said = _said(error)
            if error.code in TRANSIENT:
                raise _Again(
                    f"answers {error.code} {error.reason}{said}",
                    _retry_after(error.headers.get("Retry-After")),
                ) from None
            raise JudgeError(
                f"refuses the request: {error.code} {error.reason}{said}; expected a server with "
                "/chat/completions, the right key, and a model of this name"
            ) from None
        except TimeoutError:
            raise _Again(f"gives no answer in {self.config.timeout:g} s") from None
        except urllib.error.URLError as error:
            reason = error.reason
            if isinstance(reason, TimeoutError):
                raise _Again(f"gives no answer in {self.config.timeout:g} s") from None
            text = getattr(reason, "strerror", None) or reason
            raise _Again(f"cannot be reached: {text}") from None
        except (http.client.HTTPException, ConnectionError, OSError) as error:
            raise _Again(f"breaks off: {type(error).__name__}") from None


class _Again(Exception):
    """Worth another attempt, after `wait` seconds if the server says so."""

    def __init__(self, reason: str, wait: float | None = None):
        super().__init__(reason)
        self.wait = wait


def _content(data: bytes) -> str:
    try:
        content: Any = parse_json(data)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        shown = " ".join(data[:80].decode(errors="replace").split())
        raise _Again(f"answers what is no chat completion: {shown!r}") from None
    if content is None:
        return ""
    if not isinstance(content, str):
        raise _Again("answers a message that is no text")
    return content


def _said(error: urllib.error.HTTPError) -> str:
    """What an error's body says, shortened."""
    try:
        value = parse_json(error.read(2_000))
        message = value.get("error", value)
        message = message.get("message", "") if isinstance(message, Mapping) else message
        return f" ({' '.join(str(message).split())[:120]})" if message else ""
    except (ValueError, OSError, AttributeError, http.client.HTTPException):
        return ""


def _retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header, which holds a number or a date."""
    if not value:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None
