"""Closed-loop callers over HTTP: each sends its next request when it has the answer to the last."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np

from benchmarks.processes import HOST

_TIMEOUT_SECONDS: Final = 60.0


class Round(NamedTuple):
    """What one round of requests showed; latencies as the callers saw them."""

    requests_per_second: float
    p50_ms: float
    p95_ms: float


def send(
    port: int, path: str, bodies: Sequence[bytes], concurrency: int
) -> tuple[Round, list[bytes]]:
    """Post every body once as JSON, and return the figures and the answers in order.

    Args:
        port: Of a server on this machine.
        path: Where to post.
        bodies: JSON documents.
        concurrency: How many callers there are, each with a connection that it keeps.

    Raises:
        RuntimeError: A request was not answered with 200.
    """
    waiting = iter(range(len(bodies)))
    replies: dict[int, tuple[float, int, bytes]] = {}  # index -> seconds, status, content

    def caller() -> None:
        connection = http.client.HTTPConnection(HOST, port, timeout=_TIMEOUT_SECONDS)
        connection.connect()
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for index in waiting:  # the next of a range is one step: threads may share it
            begun = time.perf_counter()
            connection.request("POST", path, bodies[index], {"Content-Type": "application/json"})
            reply = connection.getresponse()
            content = reply.read()
            replies[index] = (time.perf_counter() - begun, reply.status, content)
        connection.close()

    threads = [threading.Thread(target=caller) for _ in range(concurrency)]
    begun = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - begun
    if len(replies) < len(bodies):
        raise RuntimeError(f"{len(bodies) - len(replies)} requests had no answer")
    for _, status, content in replies.values():
        if status != http.client.OK:
            raise RuntimeError(f"a request was answered {status}: {content[:500]!r}")
    p50, p95 = np.percentile([reply[0] * 1e3 for reply in replies.values()], (50, 95))
    figures = Round(len(bodies) / seconds, float(p50), float(p95))
    return figures, [replies[index][2] for index in range(len(bodies))]
