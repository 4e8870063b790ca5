"""A local OpenAI-compatible judge whose replies are scripted."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def completion(text: str) -> tuple[int, bytes]:
    """A proper reply."""
    return 200, json.dumps({"choices": [{"message": {"content": text}}]}).encode()


def rate_limited() -> tuple[int, bytes]:
    """What OpenAI answers to too many requests."""
    return 429, json.dumps({"error": {"message": "slow down"}}).encode()


class ScriptedJudge:
    """Answers with `script(request number, body)`, which gives (status, bytes) or None.

    None closes the connection without an answer; a script may sleep.

    Attributes:
      url: base address.
      bodies, headers: of all requests so far.
    """

    def __init__(self, script: Callable[[int, dict], tuple[int, bytes] | None]):
        self.bodies: list[dict] = []
        self.headers: list[dict] = []
        judge, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(judge.bodies)
                    judge.bodies.append(body)
                    judge.headers.append(dict(self.headers))
                reply = script(number, body) if self.path == "/v1/chat/completions" else (404, b"")
                with contextlib.suppress(ConnectionError):
                    if reply is not None:
                        self.send_response(reply[0])
                        self.send_header("Retry-After", "0.01")
                        self.end_headers()
                        self.wfile.write(reply[1])

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    @contextlib.contextmanager
    def running(self) -> Iterator["ScriptedJudge"]:
        """Serves until the block ends."""
        thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()


def slowly(seconds: float, reply: tuple[int, bytes]) -> tuple[int, bytes]:
    """`reply`, late."""
    time.sleep(seconds)
    return reply
