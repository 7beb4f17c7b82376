"""Callers of a server over HTTP, all in one process, whose core they have for themselves.

Bodies are built before the clock starts and answers are parsed after it stopped; between them there
are only sockets. Closed loop: each caller sends its next request when it has the last answer. Open
loop: each request is sent at its time, whatever became of the others, and its latency counts from
that time.
"""

from __future__ import annotations

import gc
import http.client
import os
import re
import select
import socket
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Final, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from benchmarks.host import Helper
from benchmarks.processes import HOST

Array = NDArray[Any]
Row = dict[str, Array]

_LENGTH: Final = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_SPIN_SECONDS: Final = 0.001  # the clock of `poll` ticks in these
_END_SECONDS: Final = 60.0
_LOST: Final = 0  # status of a request whose connection broke


class Wire(NamedTuple):
    """How a row goes to a server and its answer back. Both are functions of a module.

    Attributes:
        request: Returns the whole HTTP request, of a model's name, a row, the wanted output's name
            and a timeout for the server, in us.
        answer: Returns the output, of the header and the content of an answer, and its name.
        version: Returns which version of the model answered, of the header and the content; None
            where answers do not say.
    """

    request: Callable[[str, Row, str, int | None], bytes]
    answer: Callable[[bytes, bytes, str], Array]
    version: Callable[[bytes, bytes], str] | None = None


class Figures(NamedTuple):
    """What became of a number of requests."""

    seconds: float
    latencies: NDArray[np.float64]  # seconds by request, nan where it was not answered with 200
    ended: NDArray[np.float64]  # when it ended, seconds from the start
    statuses: dict[int, int]
    first_error: str
    worst: float  # difference of any element of an answer to what is expected
    cosines: NDArray[np.float64]  # of the answers to what is expected
    versions: tuple[str, ...] = ()  # that gave the answers, in the order in which they were asked

    @property
    def rate(self) -> float:
        """Answers per second."""
        return float(np.isfinite(self.latencies).sum()) / self.seconds

    def percentile_ms(self, share: float) -> float:
        """Return a quantile of the latencies of what was answered."""
        return float(np.nanquantile(self.latencies, share)) * 1e3

    def in_time(self, seconds: float) -> float:
        """Return the share of all requests that were answered in that time."""
        return float((np.nan_to_num(self.latencies, nan=np.inf) <= seconds).mean())


@dataclass(slots=True)
class Answers:
    """What all answers to one variant have shown."""

    count: int = 0
    worst: float = 0.0
    cosines: list[NDArray[np.float64]] = field(default_factory=list)

    def add(self, figures: Figures) -> None:
        """Take in those of one run."""
        self.count += int(np.isfinite(figures.latencies).sum())
        self.worst = max(self.worst, figures.worst)
        self.cosines.append(figures.cosines)


class Load:
    """The process with the callers. Leaving it as a context ends it.

    Attributes:
        port: Whom they ask, from the next run on.
    """

    def __init__(self, port: int, cpu: int, wire: Wire) -> None:
        """Start it on one CPU.

        Args:
            port: Of the server's HTTP.
            cpu: Where it may run.
            wire: What the server takes and gives.
        """
        self.port = port
        self._helper = Helper(_serve, cpu, wire)

    def rows(self, name: str, rows: Sequence[Row], output: str, expected: Array | None) -> None:
        """Give it rows to send, under a name, and what each is to be answered."""
        self._helper.ask("rows", name, list(rows), output, expected)

    def closed(self, model: str, rows: str, indices: Sequence[int], callers: int) -> Figures:
        """Send these rows, so many at a time, and return what became of them.

        Raises:
            ValueError: There are fewer rows than callers, who would not all ask.
        """
        if len(indices) < callers:
            raise ValueError(f"{len(indices)} requests are too few for {callers} callers")
        return self._ask("closed", self.port, model, rows, list(indices), callers)

    def open(
        self, model: str, rows: str, arrivals: Sequence[float], timeout_us: int | None
    ) -> Figures:
        """Send one row after the other at these times, each with a timeout for the server."""
        return self._ask("open", self.port, model, rows, list(arrivals), timeout_us)

    def start_open(
        self, model: str, rows: str, arrivals: Sequence[float], timeout_us: int | None
    ) -> None:
        """Begin to send like `open`; `hear` returns what became of it."""
        self._helper.line.send(("open", self.port, model, rows, list(arrivals), timeout_us))

    def hear(self) -> Figures:
        """Return what became of what was begun."""
        return Figures(*self._helper.hear(600.0))

    def _ask(self, *message: Any) -> Figures:
        self._helper.line.send(message)
        return self.hear()

    def __enter__(self) -> Self:
        """Return it."""
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        self._helper.close()


@dataclass(slots=True)
class _Caller:
    """A connection that is kept, and the request that is on it."""

    sock: socket.socket
    index: int = -1
    came: bytearray = field(default_factory=bytearray)


class _Rows(NamedTuple):
    rows: list[Row]
    output: str
    expected: Array | None


def _serve(line: Connection, cpu: int, wire: Wire) -> None:
    os.sched_setaffinity(0, {cpu})
    kept: dict[str, _Rows] = {}
    while True:
        what, *rest = line.recv()
        if what == "rows":
            kept[rest[0]] = _Rows(*rest[1:])
            line.send("kept")
            continue
        port, model, name, given, option = rest
        if what == "closed":
            run = _Run(port, wire, model, kept[name], given, None)
            line.send(tuple(run.closed(option)))
        else:
            indices = [index % len(kept[name].rows) for index in range(len(given))]
            run = _Run(port, wire, model, kept[name], indices, option)
            line.send(tuple(run.open(given)))


class _Run:
    """The requests of one run and what came back for them."""

    def __init__(
        self,
        port: int,
        wire: Wire,
        model: str,
        kept: _Rows,
        indices: Sequence[int],
        timeout_us: int | None,
    ) -> None:
        self._port, self._wire, self._kept, self._indices = port, wire, kept, indices
        built = {
            index: wire.request(model, kept.rows[index], kept.output, timeout_us)
            for index in set(indices)
        }
        self._requests = [built[index] for index in indices]
        self._begun = np.zeros(len(indices))
        self._ended = np.full(len(indices), np.nan)
        self._replies: dict[int, tuple[int, bytes, bytes]] = {}  # status, header, content
        self._poll = select.epoll()
        self._callers: dict[int, _Caller] = {}
        self._idle: list[_Caller] = []

    def closed(self, callers: int) -> Figures:
        waiting = iter(range(len(self._indices)))
        self._idle = [self._connect() for _ in range(callers)]
        gc.disable()
        start = time.perf_counter()
        while len(self._replies) < len(self._indices):
            while self._idle and (index := next(waiting, None)) is not None:
                self._send(index, time.perf_counter())
            self._receive(_END_SECONDS)
        return self._figures(start)

    def open(self, arrivals: Sequence[float]) -> Figures:
        self._idle = [self._connect() for _ in range(64)]
        gc.disable()
        start, sent = time.perf_counter() + 0.05, 0
        while len(self._replies) < len(arrivals):
            now = time.perf_counter()
            while sent < len(arrivals) and start + arrivals[sent] <= now:
                self._send(sent, start + arrivals[sent])
                sent += 1
            if sent == len(arrivals):
                self._receive(_END_SECONDS)
            else:
                left = start + arrivals[sent] - time.perf_counter()
                self._receive(max(0.0, left - _SPIN_SECONDS))
        return self._figures(start)

    def _connect(self) -> _Caller:
        sock = socket.create_connection((HOST, self._port), timeout=_END_SECONDS)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        caller = self._callers[sock.fileno()] = _Caller(sock)
        self._poll.register(sock, select.EPOLLIN)
        return caller

    def _send(self, index: int, begun: float) -> None:
        caller = self._idle.pop() if self._idle else self._connect()
        caller.index, self._begun[index] = index, begun
        caller.sock.sendall(self._requests[index])

    def _receive(self, seconds: float) -> None:
        """Take what has come; nothing at all in the longest time ends the run."""
        ready = self._poll.poll(seconds)
        if not ready and seconds == _END_SECONDS:
            raise RuntimeError(f"{len(self._indices) - len(self._replies)} requests had no answer")
        for descriptor, _ in ready:
            caller = self._callers[descriptor]
            try:
                came = caller.sock.recv(1 << 18)
            except OSError:
                came = b""
            if not came:
                self._lose(caller)
                continue
            # What follows in another segment is not to wait for an acknowledgement of this one, as
            # it does for 40 ms behind servers that leave Nagle's algorithm on.
            caller.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
            caller.came += came
            self._finish(caller)

    def _finish(self, caller: _Caller) -> None:
        end = caller.came.find(b"\r\n\r\n")
        if end < 0:
            return
        head = bytes(caller.came[:end])
        found = _LENGTH.search(head)
        if found is None:
            raise RuntimeError(f"an answer without a length: {head[:300]!r}")
        size = end + 4 + int(found[1])
        if len(caller.came) < size:
            return
        self._ended[caller.index] = time.perf_counter()
        self._replies[caller.index] = int(head[9:12]), head, bytes(caller.came[end + 4 : size])
        del caller.came[:size]
        self._idle.append(caller)

    def _lose(self, caller: _Caller) -> None:
        """Note that the server closed a connection: the request on it is lost."""
        self._poll.unregister(caller.sock)
        del self._callers[caller.sock.fileno()]
        caller.sock.close()
        if caller in self._idle:
            self._idle.remove(caller)
        else:
            self._ended[caller.index] = time.perf_counter()
            self._replies[caller.index] = _LOST, b"", b"the connection was closed"

    def _figures(self, start: float) -> Figures:
        seconds = float(np.nanmax(self._ended)) - start
        gc.enable()
        for caller in self._callers.values():
            caller.sock.close()
        self._poll.close()
        latencies, worst, error = self._ended - self._begun, 0.0, ""
        cosines, versions = list[float](), list[str]()
        for index, (status, head, content) in sorted(self._replies.items()):
            if status != http.client.OK:
                latencies[index] = np.nan
                error = error or content[:300].decode("utf-8", "replace")
                continue
            if self._wire.version is not None:
                versions.append(self._wire.version(head, content))
            got = self._wire.answer(head, content, self._kept.output)
            if self._kept.expected is not None:
                expected = self._kept.expected[self._indices[index]]
                gap = float(np.abs(got[0] - expected).max())
                worst = max(worst, gap if np.isfinite(gap) else np.inf)
                norms = float(np.linalg.norm(got[0]) * np.linalg.norm(expected))
                cosines.append(float((got[0] * expected).sum()) / max(norms, 1e-12))
        statuses = Counter(status for status, _, _ in self._replies.values())
        ended = self._ended - start
        return Figures(
            seconds,
            latencies,
            ended,
            dict(statuses),
            error,
            worst,
            np.array(cosines, np.float64),
            tuple(versions),
        )
