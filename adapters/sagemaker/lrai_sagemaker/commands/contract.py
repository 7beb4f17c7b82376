"""The platform's side of the contract: what it asks a container, and what it expects of it."""

from __future__ import annotations

import http.client
import json
import subprocess
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final, NamedTuple

PING_SECONDS: Final = 2.0
_MOST_TRANSFORM_MB: Final = 100
_NONE: Final = (b"", "")
_BUSY: Final = (HTTPStatus.OK, HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)
_AT_A_TIME: Final = 4
_LISTENS: Final = "0A"  # the state, in /proc/net/tcp
_BAD: Final[Mapping[str, Body]] = {
    "cut-off JSON": (b'{"inputs": [', "application/json"),
    "deeply nested JSON": (b"[" * 100_000, "application/json"),
    "an unknown content type": (b"\0\1", "application/x-check-of-lrai"),
    "an empty body": (b"", "application/json"),
    "6 MB of blanks": (b" " * (6 << 20), "application/json"),
}


Body = tuple[bytes, str]  # and its media type


class Finding(NamedTuple):
    """Something that a deployment would trip over."""

    where: str
    found: str
    wanted: str


class Answer(NamedTuple):
    """What came back; status 0 if nothing did, with the reason as its text."""

    status: int
    text: str
    content_type: str = ""

    def __str__(self) -> str:
        """Return it in a few words."""
        return f"{self.status} {self.text}" if self.status else self.text


@dataclass
class Container:
    """A container under test, and what was found so far.

    Attributes:
        payload: A body that the model takes, and its type; empty to send no valid request.
        model_url: Path of a model to load, in a multi-model container.
        process: That is the container, where it was started here.
    """

    host: str
    port: int
    payload: Body = _NONE
    model_url: str = ""
    process: subprocess.Popen[bytes] | None = None
    found: list[Finding] = field(default_factory=list)

    def check(self, start_seconds: float, grace_seconds: float) -> list[Finding]:
        """Return what was found, in the order in which the platform would."""
        if self._starts(start_seconds):
            path = self._loads_models() if self.model_url else "/invocations"
            if self.payload[0]:
                self._answers(path)
            self._refuses(path)
            self._advises()
            if self.model_url:
                self._unloads_models()
        if self.process is not None and self.process.poll() is None:
            self._ends(self.process, grace_seconds)
        return self.found

    def ask(
        self,
        method: str,
        path: str,
        body: Body = _NONE,
        seconds: float = 60,
        own: http.client.HTTPConnection | None = None,
    ) -> Answer:
        """Return the answer to one request on a connection of its own: `own`, if that is given."""
        with closing(own or self._line(seconds)) as line:
            try:
                line.request(method, path, body[0], {"Content-Type": body[1]} if body[1] else {})
                reply = line.getresponse()
                text = reply.read().decode(errors="replace")
            except (OSError, http.client.HTTPException) as error:
                return Answer(0, str(error) or type(error).__name__)
        return Answer(reply.status, text, reply.headers.get("Content-Type", ""))

    def _line(self, seconds: float = 60) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.host, self.port, timeout=seconds)

    def _note(self, where: str, found: str, wanted: str) -> None:
        self.found.append(Finding(where, " ".join(found.split())[:200], wanted))

    def _starts(self, seconds: float) -> bool:
        """Ping until it is ready, as the platform does before it sends anything."""
        deadline, answer, heard = time.monotonic() + seconds, Answer(0, ""), False
        while time.monotonic() < deadline and answer.status != HTTPStatus.OK:
            if self.process is not None and self.process.poll() is not None:
                self._note(
                    "start", f"exit status {self.process.returncode}", "it runs until SIGTERM"
                )
                return False
            answer = self.ask("GET", "/ping", seconds=PING_SECONDS)
            heard = heard or answer.status != 0 or "timed out" in answer.text
            time.sleep(0.05)
        if answer.status == HTTPStatus.OK:
            self._check_address()
        elif heard:
            self._note("GET /ping", str(answer), f"200 in {seconds:g} s, within {PING_SECONDS:g}")
        else:
            self._note("SAGEMAKER_BIND_TO_PORT", f"{self.port}: {answer}", "it listens there")
        return answer.status == HTTPStatus.OK

    def _check_address(self) -> None:
        """The platform comes from outside of the container."""
        tables = Path("/proc/net").glob("tcp*") if self.process else []
        lines = [line.split() for table in tables for line in table.read_text().splitlines()[1:]]
        places = [line[1].split(":") for line in lines if line[3] == _LISTENS]
        mine = [address for address, port in places if int(port, 16) == self.port]
        if mine and not any(set(address) == {"0"} for address in mine):
            self._note("socket", "only this machine is answered", "it listens on 0.0.0.0")

    def _answers(self, path: str) -> None:
        """A container that says it is ready answers, and can still be pinged while it does."""
        answer = self.ask("POST", path, self.payload)
        if answer.status != HTTPStatus.OK:
            self._note(f"POST {path}", f"{answer} after /ping said 200", "200, or a /ping of 503")
        elif not answer.content_type:
            self._note(f"POST {path}", "an answer without Content-Type", "its media type")
        with ThreadPoolExecutor(_AT_A_TIME) as callers:
            asked = self._several(callers, path, _AT_A_TIME)
            ping = self.ask("GET", "/ping", seconds=PING_SECONDS)
            if answer.status == HTTPStatus.OK and ping.status != HTTPStatus.OK:
                said = f"{ping} while {_AT_A_TIME} requests were answered"
                self._note("GET /ping", said, f"200 within {PING_SECONDS:g} s")
            together = {str(found) for one in asked if (found := one.result()).status not in _BUSY}
        if answer.status == HTTPStatus.OK and together:
            where, wanted = f"POST {path}, {_AT_A_TIME} at a time", "200, as alone, or 429 or 503"
            self._note(where, min(together), wanted)

    def _refuses(self, path: str) -> None:
        """What is wrong with a request is the caller's fault, and said without a stack."""
        for what, body in _BAD.items():
            answer = self.ask("POST", path, body)
            where = f"POST {path}, {what}"
            if not 400 <= answer.status < 500:
                self._note(where, str(answer), "4xx: a 200 is an answer, a 5xx an own fault")
            if "Traceback (most recent call last)" in answer.text:
                self._note(where, "a stack trace in the answer", "the cause, in a sentence")
        ping = self.ask("GET", "/ping", seconds=PING_SECONDS)
        if ping.status != HTTPStatus.OK:
            self._note("GET /ping", f"{ping} after bad requests", "200")

    def _advises(self) -> None:
        """What batch transform asks first; a container need not have it."""
        answer, fits = self.ask("GET", "/execution-parameters"), False
        if answer.status == HTTPStatus.NOT_FOUND:
            return
        with suppress(ValueError, KeyError, TypeError):
            advice = json.loads(answer.text)
            size = int(advice["MaxConcurrentTransforms"]) * int(advice["MaxPayloadInMB"])
            fits = 0 <= size <= _MOST_TRANSFORM_MB and "_RECORD" in advice["BatchStrategy"]
        if not fits:
            wanted = "MaxConcurrentTransforms x MaxPayloadInMB up to 100, and BatchStrategy"
            self._note("GET /execution-parameters", str(answer), wanted)

    def _loads_models(self) -> str:
        """Load a model, twice; return where it is asked."""
        given = {"model_name": "check-1", "url": self.model_url}
        self._expect("POST", "/models", 200, given)
        self._expect("POST", "/models", 409, given)
        self._expect("GET", "/models/check-1", 200)
        self._expect("GET", "/models/check-2", 404)
        self._expect("POST", "/models/check-2/invoke", 404, {})
        listed = self.ask("GET", "/models")
        if "check-1" not in listed.text or "modelUrl" not in listed.text:
            self._note("GET /models", str(listed), "modelName and modelUrl of what is loaded")
        return "/models/check-1/invoke"

    def _unloads_models(self) -> None:
        self._expect("DELETE", "/models/check-1", 200)
        self._expect("DELETE", "/models/check-1", 404)
        self._expect("POST", "/models/check-1/invoke", 404, {})

    def _expect(self, method: str, path: str, status: int, body: Any = None) -> None:
        sent = _NONE if body is None else (json.dumps(body).encode(), "application/json")
        answer = self.ask(method, path, sent)
        if answer.status != status:
            self._note(f"{method} {path}", str(answer), str(status))

    def _ends(self, process: subprocess.Popen[bytes], grace_seconds: float) -> None:
        """SIGTERM, and SIGKILL where that is not enough; what was accepted is answered."""
        # Where something was found, or the model is unloaded, it is not known what is accepted.
        count = _AT_A_TIME if self.payload[0] and not self.found and not self.model_url else 0
        with ThreadPoolExecutor(_AT_A_TIME) as callers:
            asked = self._several(callers, "/invocations", count)
            if asked:  # who answers this has accepted what came before, however busy it is
                self.ask("GET", "/ping", seconds=PING_SECONDS)
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(grace_seconds)
        if process.poll() is None:
            self._note("SIGTERM", f"killed after {grace_seconds:g} s", "it ends by itself")
        elif process.returncode:
            self._note("SIGTERM", f"exit status {process.returncode}", "0")
        lost = [one.result() for one in asked if one.result().status == 0]
        if lost:
            self._note("SIGTERM", f"{len(lost)} requests lost: {lost[0]}", "they are answered")

    def _several(self, pool: ThreadPoolExecutor, path: str, count: int) -> list[Future[Answer]]:
        lines = [self._line() for _ in range(count)]
        for line in lines:  # here: a thread may come to it late
            with suppress(OSError):  # it tries again, and says why
                line.connect()
        asked = [pool.submit(self.ask, "POST", path, self.payload, own=line) for line in lines]
        time.sleep(0.5)  # they are on their way, and taken
        return asked
