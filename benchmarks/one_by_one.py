"""What LRAI is measured against in real time: ONNX Runtime in a plain loop, in its own process.

There is no transport and nothing but numpy and onnxruntime in the process: requests lie in its
memory before the clock starts, and in open loop it looks at the same schedule of arrivals that the
others get. So it is a peer that no server around such a session can beat; for huge pages, as LRAI
does for its own, it does not ask. It is told by one JSON object a line what to do, and answers each
with one.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

Row = dict[str, NDArray[Any]]


def main() -> None:
    """Serve standard input: the first line names CPU, model, weights and the file of requests."""
    first = json.loads(sys.stdin.readline())
    os.sched_setaffinity(0, {first["cpu"]})
    session = _open(first["model"], first["weights"], optimised=first["optimised"])
    rows = _requests(first["requests"])
    for row in rows[:32]:
        session.run(None, row)
    _say({"ready": True})
    for line in sys.stdin:
        asked = json.loads(line)
        if asked["do"] == "closed":
            _say({"seconds": _closed(session, rows, asked["batch"], asked["pad"])})
        elif asked["do"] == "open":
            _say({"latencies": _open_loop(session, rows, asked)})
        elif asked["do"] == "answers":
            np.save(asked["file"], np.concatenate([session.run(None, row)[0] for row in rows]))
            _say({"ready": True})
        elif asked["do"] == "requests":
            rows = _requests(asked["requests"])
            _say({"ready": True})
        else:
            _say(memory_mb(os.getpid()))


def memory_mb(pid: int) -> dict[str, float]:
    """Return the resident memory of a process, as a whole and with what is shared in parts."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()[1:]
    found = {line.split(":")[0]: int(line.split()[1]) / 1e6 * 1024 for line in lines}
    return {"rss_mb": found["Rss"], "pss_mb": found["Pss"]}


def _open(model: str, weights: str, *, optimised: bool) -> ort.InferenceSession:
    """Return a session of one thread, as the engine of LRAI opens what is stored as executed.

    What is not `optimised` is, as by default.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    if optimised:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if weights:
        folder = "session.model_external_initializers_file_folder_path"
        options.add_session_config_entry(folder, weights)
    given = Path(model).read_bytes() if weights else model
    return ort.InferenceSession(given, options, providers=["CPUExecutionProvider"])


def _requests(path: str) -> list[Row]:
    with np.load(path, allow_pickle=False) as file:
        lengths, flat = file["lengths"], file["input_ids"]
    rows = np.split(flat, np.cumsum(lengths)[:-1])
    return [
        {"input_ids": row[None], "attention_mask": np.ones((1, len(row)), "i8")} for row in rows
    ]


def _closed(session: ort.InferenceSession, rows: Sequence[Row], batch: int, pad: int) -> float:
    """Return the seconds that all requests take, so many a call, in order of their arrival."""
    started = time.perf_counter()
    for first in range(0, len(rows), batch):
        session.run(None, _padded(rows[first : first + batch], pad))
    return time.perf_counter() - started


def _padded(rows: Sequence[Row], pad: int) -> Row:
    if len(rows) == 1:
        return rows[0]
    shape = len(rows), max(row["input_ids"].shape[1] for row in rows)
    ids, mask = np.full(shape, pad, "i8"), np.zeros(shape, "i8")
    for index, row in enumerate(rows):
        length = row["input_ids"].shape[1]
        ids[index, :length], mask[index, :length] = row["input_ids"], 1
    return {"input_ids": ids, "attention_mask": mask}


def _open_loop(
    session: ort.InferenceSession, rows: Sequence[Row], asked: dict[str, Any]
) -> list[float]:
    """Return the seconds from arrival to answer of those that were answered, first come first.

    Who finds `limit` requests waiting is refused; who has waited for `timeout` seconds is not run.
    """
    arrivals, limit, timeout = asked["arrivals"], asked["limit"], asked["timeout"]
    queue: deque[int] = deque()
    latencies: list[float] = []
    arrived, start = 0, time.perf_counter()
    while arrived < len(arrivals) or queue:
        now = time.perf_counter() - start
        while arrived < len(arrivals) and arrivals[arrived] <= now:
            if limit is None or len(queue) < limit:
                queue.append(arrived)
            arrived += 1
        if not queue:
            time.sleep(max(0.0, arrivals[arrived] - now) if arrived < len(arrivals) else 0)
            continue
        index = queue.popleft()
        if timeout is None or now - arrivals[index] <= timeout:
            session.run(None, rows[index % len(rows)])
            latencies.append(time.perf_counter() - start - arrivals[index])
    return latencies


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()
