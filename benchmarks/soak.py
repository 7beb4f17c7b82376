"""A million requests through the shared runtime: does anything grow, and is anybody forgotten?

One client keeps requests on their way through the daemon to the actors of two tiny models: small
rows, now and then an image, some that are cancelled at once, some whose time is too short. Beside
it visitors attach, ask, and leave, the last time by SIGKILL with requests on their way. Meanwhile
this program looks at what daemon, actors and client hold.

    python benchmarks/soak.py --quick
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final, NamedTuple

_ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [
    str(_ROOT),
    *(p for p in sys.path if p and Path(p).resolve() != _ROOT / "benchmarks"),
]

import numpy as np  # noqa: E402 - after the lines above
import numpy.typing as npt  # noqa: E402
import onnx  # noqa: E402
from onnx import helper, numpy_helper  # noqa: E402

import lrai_core as lrai  # noqa: E402
from benchmarks import harness  # noqa: E402
from benchmarks.harness import Check, console  # noqa: E402
from benchmarks.host import Held, Helper, Host, ProcessError, end_on_sigterm, held  # noqa: E402

REQUESTS: Final = 1_000_000
QUICK_REQUESTS: Final = 100_000
MOST_SECONDS: Final = 600.0  # what was not asked until then is not asked
# The least that a leak can leave is one object of 16 bytes, the smallest that Python allocates: 16
# MB of a million requests. So this bound finds one that one request in eight leaves, and something
# of a kilobyte that one in five hundred does.
MOST_MB: Final = 2.0  # per million requests
STEP_MB: Final = 1.05  # Python's allocator takes memory a MiB at a time: less is no trend
MOST_STEP_MB: Final = 2 * STEP_MB  # that the run ends above its beginning; visits take one, or two
MOST_STEP_FILES: Final = 2.0  # a visitor that is there, or has just gone, has some
WARM_UP: Final = 0.2  # of the run: pools and arenas fill up once
PARTS: Final = ("daemon", "actor, rows", "actor, images", "client")

_WINDOW: Final = 256
_IMAGE: Final = (3, 224, 224)
_LARGE, _CANCELLED, _SHORT = 0.01, 0.01, 0.01  # shares of the requests
_SHORT_MS: Final = (0.2, 1.0, 4.0)
_DISTINCT: Final = 64
_LEFT_SECONDS: Final = 90.0  # an unanswered one ends with its deadline after a minute
_LEAST_SEEN: Final = 3
_VISITS, _VISIT_REQUESTS, _VISIT_PAUSE_SECONDS = 4, 50, 4.0
_NOISES: Final = 2.0
_MOST_NOISE_MB: Final = 4.0


class Trend(NamedTuple):
    """How a figure moved over the run, after the warm-up."""

    slope: float  # per million requests
    span: float  # millions of requests that it was seen over
    noise: float  # standard deviation about the line
    step: float = 0.0  # from the first tenth to the last, medians: what grows once has no slope

    @property
    def grown(self) -> float:
        """Over the whole span."""
        return self.slope * self.span


class Sample(NamedTuple):
    """What the processes held when so many requests had ended."""

    ended: int
    seconds: float
    parts: dict[str, Held]


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print, write; return 1 where a check does not hold."""
    arguments = _arguments(argv)
    end_on_sigterm()
    total = arguments.requests or (QUICK_REQUESTS if arguments.quick else REQUESTS)
    settings = {"actor__threads": 1, "scheduler__default_timeout_ms": 60_000.0}
    with tempfile.TemporaryDirectory(prefix="lrai-soak-") as scratch, Host(**settings) as host:
        models = [
            lrai.compile(model, out=model.with_suffix(".lrai"), threads=1).path
            for model in (
                first_element(Path(scratch, "rows.onnx"), np.float32, [256]),
                first_element(Path(scratch, "images.onnx"), np.uint8, _IMAGE),
            )
        ]
        samples, counts, visits = soak(host, models, total)
    return report(arguments, total, samples, counts, visits)


def soak(
    host: Host, artifacts: Sequence[Path], total: int
) -> tuple[list[Sample], Counter[str], Counter[str]]:
    """Return what was seen, how the client's requests ended, and how the visitors' did."""
    samples: list[Sample] = []
    counts, visits = Counter[str](), Counter[str]()
    paths = [str(path) for path in artifacts]
    with (
        Helper(client, host.settings, host.address, paths, total) as asking,
        console.status("a million requests" if total == REQUESTS else f"{total:,} requests") as bar,
    ):
        actors: list[int] = asking.hear()
        pids = dict(zip(PARTS, [*host.daemons(), *actors, asking.pid], strict=True))
        started = time.monotonic()
        visitor: Helper | None = None
        next_visit = 0.0
        try:
            while not counts["done"]:
                if asking.line.poll():
                    counts = asking.hear()
                now = time.monotonic() - started
                ended = counts.total() - counts["sent"] - counts["done"]
                samples.append(Sample(ended, now, {k: held(pid) for k, pid in pids.items()}))
                bar.update(f"{ended:,} of {total:,} requests have ended")
                if visitor is not None and visitor.wait(0):
                    visits += _heard(visitor)
                    visitor, next_visit = None, now + _VISIT_PAUSE_SECONDS
                if visitor is None and now >= next_visit:
                    visitor = Helper(visit, host.settings, host.address)
                if now > MOST_SECONDS + _LEFT_SECONDS + 30:
                    raise RuntimeError("the client does not come to its end")
                time.sleep(0.5)
        finally:
            if visitor is not None:
                visitor.close()
    return samples, counts, visits


def client(
    line: Connection,
    settings: Mapping[str, Any],
    address: str,
    artifacts: Sequence[str],
    total: int,
) -> None:
    """Keep requests on their way until all were asked; send how they ended, twice a second."""
    runtime = lrai.Runtime(lrai.load_config(call=settings), address=address)
    rows, images = [runtime.load(path) for path in artifacts]
    pids = {model.name: model.actor_pids[0] for model in runtime.models()}
    line.send([pids[rows], pids[images]])
    small, large = _small(rows), _large(images)
    short = [_small(rows, timeout_ms=ms) for ms in _SHORT_MS]
    chance, ledger = random.Random(0), Ledger(_WINDOW)
    started = said = time.monotonic()
    for index in range(total):
        ledger.free.acquire()
        now, drawn, value = time.monotonic(), chance.random(), index % _DISTINCT
        if now - said > 0.5:
            line.send(ledger.counts)
            said = now
        if now - started > MOST_SECONDS:
            break
        if drawn < _LARGE:
            request = large[value]
        elif drawn < _LARGE + _SHORT:
            request = short[index % len(short)][value]
        else:
            request = small[value]
        future = ledger.send(runtime, request, value)
        if future and drawn > 1 - _CANCELLED:
            future.cancel()
    unanswered = _WINDOW
    deadline = time.monotonic() + _LEFT_SECONDS
    while unanswered and ledger.free.acquire(timeout=max(0.0, deadline - time.monotonic())):
        unanswered -= 1
    ledger.counts["done"] = 1
    line.send(ledger.counts)
    line.recv()  # stay as it is until nobody looks any more


def visit(line: Connection, settings: Mapping[str, Any], address: str) -> None:
    """Attach, ask and leave a few times; at last ask and be killed."""
    config, before = lrai.load_config(call=settings), 0
    for turn in range(_VISITS):
        with lrai.Runtime(config, address=address) as runtime:
            ledger = Ledger(0)
            for value, request in enumerate(_small("rows")[:_VISIT_REQUESTS]):
                ledger.send(runtime, request, value)
            for _ in range(_VISIT_REQUESTS):
                ledger.free.acquire(timeout=_LEFT_SECONDS)
        left = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - as it is counted everywhere
        before = before or left
        ledger.counts["visits"] = 1
        ledger.counts["descriptors left"] = max(0, left - before) if turn == _VISITS - 1 else 0
        line.send(ledger.counts)
    runtime = lrai.Runtime(config, address=address)
    for request in [*_small("rows"), *_large("images")]:
        runtime._backend.start(request)  # noqa: SLF001 - likewise
    os.kill(os.getpid(), signal.SIGKILL)


class Ledger:
    """How the requests of a client ended; each takes a free place, and gives it back once."""

    def __init__(self, places: int) -> None:
        self.counts = Counter[str]()
        self.free = threading.Semaphore(places)
        self._lock = (
            threading.Lock()
        )  # requests end in the thread that cancels, and in the client's

    def send(
        self, runtime: lrai.Runtime, request: lrai.InferenceRequest, value: int
    ) -> Future[Any] | None:
        """Send a request that is answered with `value`; return its future unless it is refused."""
        self._count("sent")
        try:
            future = runtime._backend.start(request)  # noqa: SLF001 - what `infer` waits for
        except lrai.LraiError as error:
            self._end(type(error).__name__)
            return None
        future.add_done_callback(partial(self._ended, value))
        return future

    def _ended(self, value: int, future: Future[Any]) -> None:
        if future.cancelled():
            self._end("cancelled")
        elif error := future.exception():
            self._end(type(error).__name__)
        else:
            (array,) = future.result().outputs.values()
            self._end("answered" if (array == value).all() else "wrong")

    def _end(self, outcome: str) -> None:
        self._count(outcome)
        self.free.release()

    def _count(self, what: str) -> None:
        with self._lock:
            self.counts[what] += 1


def trend(ended: Sequence[int], values: Sequence[float]) -> Trend:
    """Return the line through what was seen after the warm-up, by the median of all slopes.

    Source: Sen 1968 (doi:10.1080/01621459.1968.10480934); what a visitor adds for a moment does not
    move it.
    """
    x, y = np.asarray(ended, np.float64) / 1e6, np.asarray(values, np.float64)
    late = x >= WARM_UP * x[-1]
    x, y = x[late], y[late]
    first, second = np.triu_indices(len(x), 1)
    apart = x[second] > x[first]
    if not apart.any():
        return Trend(0.0, 0.0, 0.0)
    slopes = (y[second] - y[first])[apart] / (x[second] - x[first])[apart]
    slope = float(np.median(slopes))
    left = y - slope * x
    tenth = max(len(y) // 10, _LEAST_SEEN)
    step = float(np.median(y[-tenth:]) - np.median(y[:tenth]))
    return Trend(slope, float(x[-1] - x[0]), float(np.std(left)), step)


def flat(name: str, moved: Trend, most: float) -> Check:
    """Return the check that memory grew by less than `most` MB per million requests.

    A short run cannot tell that from one step of the allocator, or from the noise, which is not
    believed to be more than a few MB: what grows in bursts is noise, too.
    """
    bound = max(most * moved.span, STEP_MB, min(_NOISES * moved.noise, _MOST_NOISE_MB))
    goal = f"<= {bound:.2g}, of {moved.span:.2g} million requests"
    return Check(name, moved.grown, goal, moved.grown <= bound)


def level(name: str, moved: Trend, most: float) -> Check:
    """Return the check that the end lies by no more than `most` above the beginning.

    Of one step, which stays, half of all pairs see nothing, so that their median has no slope.
    """
    return Check(name, moved.step, f"<= {most:g}", moved.step <= most)


def report(
    arguments: argparse.Namespace,
    total: int,
    samples: Sequence[Sample],
    counts: Counter[str],
    visits: Counter[str],
) -> int:
    """Print the table, check, and write."""
    ended = [sample.ended for sample in samples]
    seconds = samples[-1].seconds
    outcomes = {k: n for k, n in counts.items() if k not in ("sent", "done")}
    rows, checks, content = [], list[Check](), list[dict[str, Any]]()
    for part in PARTS:
        seen = [sample.parts[part] for sample in samples]
        memory = trend(ended, [one.own_bytes / 1e6 for one in seen])
        shared = trend(ended, [one.shared_bytes / 1e6 for one in seen])
        files = trend(ended, [float(one.descriptors) for one in seen])
        memory_files = trend(ended, [float(one.memory_files) for one in seen])
        rows.append(
            [
                part,
                *(f"{one.pss_bytes / 1e6:.1f}" for one in (seen[0], seen[-1])),
                *(f"{memory.slope:+.2f}", f"{memory.noise:.2f}", f"{shared.slope:+.2f}"),
                f"{seen[0].descriptors} → {seen[-1].descriptors}",
            ]
        )
        checks += [
            flat(f"{part}: memory, MB grown", memory, MOST_MB),
            flat(f"{part}: of it shared, MB grown", shared, MOST_MB),
            level(f"{part}: memory, MB from first to last tenth", memory, MOST_STEP_MB),
            level(f"{part}: of it shared, MB likewise", shared, MOST_STEP_MB),
            level(f"{part}: descriptors, likewise", files, MOST_STEP_FILES),
            level(f"{part}: memory files, likewise", memory_files, MOST_STEP_FILES),
            Check(f"{part}: descriptors, slope", files.slope, "0", abs(files.slope) < 1e-9),
            Check(
                f"{part}: memory files, slope",
                memory_files.slope,
                "0",
                abs(memory_files.slope) < 1e-9,
            ),
        ]
        content.append(
            {
                "part": part,
                "memory": memory._asdict(),
                "shared": shared._asdict(),
                "descriptors": files._asdict(),
                "seen": [[s.ended, *s.parts[part]] for s in samples],
            }
        )
    harness.show(
        f"{counts['sent']:,} requests in {seconds:.0f} s, {counts['sent'] / seconds:,.0f}/s",
        ["process", "MB before", "after", "MB/million", "noise", "shared/million", "files"],
        rows,
        ", ".join(f"{n:,} {k}" for k, n in sorted(outcomes.items()))
        + f"; {visits['visits']} visits of {visits['sent']:,} requests",
    )
    lost = counts["sent"] - sum(outcomes.values())
    lost_visitors = visits["sent"] - visits["answered"]
    wrong = counts["wrong"] + visits["wrong"]
    good = {"answered", "cancelled", "DeadlineExceeded"}
    odd = sum(n for k, n in outcomes.items() if k not in good)
    checks += [
        Check("requests asked", counts["sent"], f"{total}", counts["sent"] == total),
        Check("requests unanswered", lost, "0", lost == 0),
        Check("wrong answers", wrong, "0", wrong == 0),
        Check("other errors than deadlines that pass", odd, "0", odd == 0),
        Check("visitors' requests unanswered", lost_visitors, "0", lost_visitors == 0),
        Check("visits", visits["visits"], "> 0", visits["visits"] > 0),
        Check(
            "visitors that failed", visits["visitors failed"], "0", not visits["visitors failed"]
        ),
        Check(
            "descriptors that visits left",
            visits["descriptors left"],
            "0",
            not visits["descriptors left"],
        ),
        Check("seconds", seconds, f"<= {MOST_SECONDS:g}", seconds <= MOST_SECONDS),
    ]
    return harness.conclude(
        "soak",
        arguments.out,
        harness.environment(1, ["numpy", "onnxruntime", "pyzmq", "msgspec"]),
        content,
        checks,
        outcomes=dict(counts),
        visits=dict(visits),
        quick=arguments.quick,
    )


def first_element(path: Path, dtype: npt.DTypeLike, shape: Sequence[int]) -> Path:
    """Write a graph that returns the first element of every row, and return its path."""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    axes = list(range(1, len(shape) + 1))
    constants = {"starts": [0] * len(axes), "ends": [1] * len(axes), "axes": axes}
    graph = helper.make_graph(
        [helper.make_node("Slice", ["x", *constants], ["y"])],
        path.stem,
        [helper.make_tensor_value_info("x", kind, ["n", *shape])],
        [helper.make_tensor_value_info("y", kind, ["n", *([1] * len(shape))])],
        [numpy_helper.from_array(np.array(v), name) for name, v in constants.items()],
    )
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), path)
    return path


def _small(model: str, timeout_ms: float | None = None) -> list[lrai.InferenceRequest]:
    return [_request(model, np.full((1, 256), v, np.float32), timeout_ms) for v in range(_DISTINCT)]


def _large(model: str) -> list[lrai.InferenceRequest]:
    return [_request(model, np.full((1, *_IMAGE), v, np.uint8), None) for v in range(_DISTINCT)]


def _request(model: str, row: npt.NDArray[Any], timeout_ms: float | None) -> lrai.InferenceRequest:
    return lrai.InferenceRequest(model_name=model, inputs={"x": row}, timeout_ms=timeout_ms)


def _heard(visitor: Helper) -> Counter[str]:
    found = Counter[str]()
    try:
        while True:
            found += visitor.hear(0)
    except ProcessError as error:
        found["visitors failed"] += error.failed
        return found
    finally:
        visitor.close()


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_REQUESTS:,} requests")
    parser.add_argument("--requests", type=int, help=f"how many; by default {REQUESTS:,}")
    parser.add_argument("--data", type=Path, help="not needed here")
    parser.add_argument("--out", type=Path, default=_ROOT / "benchmarks" / "results")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
