"""What a model is asked: a sketch of the requests to a name, and a sample of them, on request.

Both are kept where there is a `runtime.state_dir` (a daemon has one), else nowhere. The sketch
has no content in it: how many rows, how long, how often, between which values. The sample holds
real rows, so it is off until somebody asks for it, is bounded, drawn at random, ages, and is
written for its owner's eyes only. `lrai compile --evaluation` reads what it writes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import shutil
import tempfile
import threading
import time
import zipfile
import zlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Final, NamedTuple
from urllib.parse import quote, unquote

import msgspec
import numpy as np

from lrai_core import Artifact, Signature, TensorSpec, UsageError
from lrai_core.artifact import sync
from lrai_core.config import RuntimeConfig
from lrai_core.protocol import Array, ValidRequest

CAPTURED: Final = "captured.npz"
SKETCH: Final = "sketch.json"
_TTL: Final = "capture_ttl_hours"
_LOOKS: Final = 64  # one request of so many is looked at for its values, from the first one on
_MOST_BYTES: Final = 64 << 20  # of one sample; of large rows so many, but no more than that
_FEW_ROWS, _MOST_BYTES_OF_FEW = 256, 256 << 20
_HOUR: Final = 3600.0
_SKETCH_SECONDS: Final = 30 * 24 * _HOUR  # of a name that nobody serves; it may be served again
_UNREADABLE: Final = (  # what a damaged file raises
    OSError, EOFError, KeyError, TypeError, ValueError, OverflowError, RecursionError,
    msgspec.DecodeError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
_SAVE_SECONDS: Final = 60.0


class _Range(msgspec.Struct):
    """Between which values the elements of an input lie."""

    low: float = np.inf
    high: float = -np.inf
    looked_at: int = 0
    not_finite: int = 0

    def widen(self, array: Array) -> None:
        finite = array[np.isfinite(array)] if array.dtype.kind == "f" else array
        self.looked_at += array.size
        self.not_finite += array.size - finite.size
        if finite.size:
            self.low = min(self.low, float(finite.min()))
            self.high = max(self.high, float(finite.max()))


class _Sketch(msgspec.Struct):
    """See `Traffic`, and its `sketch`."""

    requests: int
    requests_per_second: float
    rows: list[int]
    lengths: list[int]
    gaps_us: list[int]
    values: dict[str, _Range]
    sources: frozenset[str] = frozenset()


_sketches: Final = msgspec.json.Decoder(_Sketch)  # here: several threads at once must not learn it


class _Row(NamedTuple):
    seen: float
    arrays: tuple[Array, ...]  # copies, in the order of the signature


class Traffic:
    """Sketch and sample of one model; thread-safe.

    Attributes:
        sources: What the versions were compiled from that are asked, by their hashes.
    """

    def __init__(
        self,
        signature: Signature,
        source: str = "",
        *,
        capture_rows: int = 0,
        ttl_hours: float = 24.0,
        seed: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Keep nothing yet.

        Args:
            signature: Of the model.
            source: What it was compiled from, by its hash.
            capture_rows: At most so many rows are kept for the sample; 0 for none.
            ttl_hours: Age at which a kept row is forgotten.
            seed: Of the choice of rows.
            clock: In seconds.
        """
        self._signature, self.sources = signature, frozenset({source})
        self._capture_rows, self._ttl_seconds = capture_rows, ttl_hours * _HOUR
        self._random, self._clock = random.Random(seed), clock
        self._lock = threading.Lock()
        self._requests = self._candidates = self._kept_bytes = 0
        self._before = 0  # requests that the runtime before has seen
        self._most_bytes: float = _MOST_BYTES
        self._began = self._last = clock()
        # By number of binary digits: 1, 2..3, 4..7, and so on; of gaps in microseconds.
        self._rows, self._lengths, self._gaps = Counter[int](), Counter[int](), Counter[int]()
        self._ranges = [_Range() for _ in signature.inputs]
        self._sample: list[_Row] = []
        self._first_aged = 0.0  # no row is too old before
        self._full = False  # of bytes it was: from then on each row has the same chance
        self._later = list[float]()  # when places of aged rows may be taken
        self._adopts = False  # what was kept before, once there is a row to compare with
        self._rows_file: object = []  # that is this one's to remove; others may write theirs

    @property
    def captures(self) -> tuple[int, float]:
        """Return how many rows are kept at most, and for how many seconds."""
        return self._capture_rows, self._ttl_seconds

    def see(self, request: ValidRequest) -> float:
        """Take note of a request, and return when; a few microseconds, unless it is looked into."""
        with self._lock:
            now = self._clock()
            self._rows[request.rows.bit_length()] += 1
            self._lengths[request.length.bit_length()] += 1
            self._gaps[int((now - self._last) * 1e6).bit_length()] += 1
            if self._requests % _LOOKS == 0:
                for seen, array in zip(self._ranges, request.arrays, strict=True):
                    if array.dtype.kind in "fiub":
                        seen.widen(array)
            self._requests += 1
            self._last = now
            if self._capture_rows:
                for row in range(request.rows):
                    self._consider(request, row, now)
        return now

    def sketch(self) -> dict[str, Any]:
        """Return what is known of the requests; figures only.

        Histograms are lists of counts, where the count at index i is of 2^(i-1) up to 2^i - 1, and
        the first one of 0.
        """
        with self._lock:
            rate = self._requests / max(self._last - self._began, 1e-9)
            rows, lengths, gaps = map(_histogram, (self._rows, self._lengths, self._gaps))
            pairs = zip(self._signature.inputs, self._ranges, strict=True)
            values = {spec.name: seen for spec, seen in pairs if seen.looked_at > seen.not_finite}
            known = _Sketch(self._requests, rate, rows, lengths, gaps, values, self.sources)
            sketch: dict[str, Any] = msgspec.to_builtins(known)
        return sketch

    def go_on(self, folder: Path) -> None:
        """Go on with what lies in `folder`, if it is of this model. Nothing was seen yet.

        Of which one nothing else tells: two models may well take the same inputs.
        """
        with contextlib.suppress(*_UNREADABLE):
            self._rows_file = _captured(folder)
            known = _sketches.decode((folder / SKETCH).read_bytes())
            self._adopts = bool(self.sources & known.sources)
            if self._adopts:
                self._requests = self._before = known.requests
                self._began -= known.requests / max(known.requests_per_second, 1e-9)
                seen = (known.rows, known.lengths, known.gaps_us)
                self._rows, self._lengths, self._gaps = (Counter(dict(enumerate(n))) for n in seen)
                self._ranges = [known.values.get(s.name, _Range()) for s in self._signature.inputs]

    def sample(self) -> dict[str, Array]:
        """Return the kept rows, one array per input, rows along its first axis, padded; or none.

        Without the longest, where all padded to them would be too large.
        """
        with self._lock:
            self._forget(self._clock())
            rows = list(self._sample)
        forms = Counter(self._form(row) for row in rows)
        usual = max(forms, key=forms.__getitem__, default=None)  # they go into one array
        rows = [row for row in rows if self._form(row) == usual]
        widths = sorted(_width(row.arrays) for row in rows)
        while widths and len(widths) * widths[-1] > self._most_bytes:
            widths.pop()  # all are padded to the longest
        rows = [row for row in rows if widths and _width(row.arrays) <= widths[-1]]
        if not rows:
            return {}
        return {
            spec.name: _stacked([row.arrays[index] for row in rows], spec)
            for index, spec in enumerate(self._signature.inputs)
        }

    def _form(self, row: _Row) -> tuple[tuple[int, ...], ...]:
        """Return the shapes of a row, but for its length."""
        pairs = zip(row.arrays, self._signature.inputs, strict=True)
        return tuple(
            tuple(n for axis, n in enumerate(array.shape) if axis != spec.length_axis)
            for array, spec in pairs
        )

    def save(self, folder: Path) -> None:
        """Write `sketch.json` and, where rows are kept, `captured.npz` into `folder`, mode 0600."""
        with self._lock:
            if self._requests == self._before:
                return  # what lies there is of others
        # What lies above one has no mode of ours, and clients refuse a daemon's folder that others
        # may enter: it may have been deleted under it.
        for one in (folder.parent.parent, folder.parent, folder):
            one.mkdir(mode=0o700, parents=True, exist_ok=True)
        hours = self._ttl_seconds / _HOUR
        if not self._sample:  # what lies there may be of who promised to forget it sooner
            hours = min(hours, _ttl_hours(folder, hours))
        with replaced(folder / SKETCH) as stream:
            said = self.sketch() | {_TTL: hours}
            stream.write(msgspec.json.format(msgspec.json.encode(said)))
        captured = folder / CAPTURED
        if self._adopts and self._sample:
            self._adopts = False
            self._adopt(captured)
        if sample := self.sample():
            with replaced(captured) as stream:
                _write(stream, sample)
            oldest = time.time() - self._oldest_seconds()  # noqa: TID251 - for who finds it later
            os.utime(captured, (oldest, oldest))
            self._rows_file = _captured(folder)
        elif not self._adopts and self._rows_file == _captured(folder):
            # What was kept has aged, or is of another model.
            captured.unlink(missing_ok=True)

    def _adopt(self, captured: Path) -> None:
        """Go on with the rows of a file, if they are of such a model; each as old as the oldest."""
        before, age = list[Array](), 0.0
        with contextlib.suppress(*_UNREADABLE), captured.open("rb") as file, np.load(file) as found:
            age = max(0.0, time.time() - os.fstat(file.fileno()).st_mtime)  # noqa: TID251 - a file's
            before = [found[spec.name] for spec in self._signature.inputs]
        before = [array.astype(object) if array.dtype.kind == "U" else array for array in before]
        with self._lock:
            if not (before and before[0].ndim and self._sample and self._are_rows(before)):
                return
            order, seen = list(range(len(before[0]))), self._clock() - age
            self._random.shuffle(order)
            for row in order[: max(0, self._capture_rows - len(self._sample))]:
                arrays = tuple(array[row : row + 1].copy() for array in before)
                if self._kept_bytes + _size(arrays) > self._most_bytes:
                    break
                self._kept_bytes += _size(arrays)
                self._sample.append(_Row(seen, arrays))
            self._candidates += len(order)
            self._first_aged = 0.0

    def _are_rows(self, before: Sequence[Array]) -> bool:
        """Return whether arrays can be of rows for this model. The lock is held."""
        inputs, sampled = self._signature.inputs, self._sample[0].arrays
        for array, spec, ours in zip(before, inputs, sampled, strict=True):
            shape = (*before[0].shape[:1], *spec.shape[spec.batch_axis is not None :])
            dims = zip(array.shape, shape, strict=False)
            known = all(isinstance(one, str) or n == one for n, one in dims)
            if array.dtype != ours.dtype or array.ndim != len(shape) or not known:
                return False
        return True

    def _oldest_seconds(self) -> float:
        with self._lock:
            now = self._clock()
            return max((now - row.seen for row in self._sample), default=0.0)

    def _consider(self, request: ValidRequest, row: int, now: float) -> None:
        """Keep the row with the chance that every row so far has (Vitter 1985, algorithm R)."""
        self._forget(now)
        self._candidates += 1
        place = len(self._sample)
        taken = place + len(self._later) - bisect_right(self._later, now)
        self._full |= self._kept_bytes * taken >= self._most_bytes * max(1, place)
        if self._full or taken >= self._capture_rows:
            place = self._random.randrange(self._candidates)
            if place >= len(self._sample):
                return
        arrays = tuple(
            array[None].copy() if spec.batch_axis is None else array[row : row + 1].copy()
            for spec, array in zip(self._signature.inputs, request.arrays, strict=True)
        )
        if any(a.dtype.kind == "f" and not np.isfinite(a).all() for a in arrays):
            return  # what nobody could be judged by
        more = _size(arrays)
        usual = (self._kept_bytes + more) / (len(self._sample) + 1)
        self._most_bytes = max(_MOST_BYTES, min(_FEW_ROWS * usual, _MOST_BYTES_OF_FEW))
        more -= sum(_size(one.arrays) for one in self._sample[place : place + 1])
        most = 2 * self._most_bytes
        if self._kept_bytes + more > most and more > most / 16:  # for one, many would have to go
            return
        self._kept_bytes += more
        self._sample[place : place + 1] = [_Row(now, arrays)]
        while self._kept_bytes > most:  # whichever: else what comes would have to be as small
            gone = self._sample.pop(self._random.randrange(len(self._sample)))
            self._kept_bytes -= _size(gone.arrays)

    def _forget(self, now: float) -> None:
        """Let go of what is too old; those that stay stand for as many as there are."""
        if now < self._first_aged:
            return
        kept = [row for row in self._sample if now - row.seen < self._ttl_seconds]
        if len(kept) < len(self._sample):
            share = len(kept) / len(self._sample)
            # Of many that age at once the places are free as the rows came: else those that come
            # next, one after the other, would be as many as all that they stand for.
            gone = sorted(row.seen for row in self._sample if now - row.seen >= self._ttl_seconds)
            later = [*self._later, *(now + seen - gone[0] for seen in gone[1:])] if kept else ()
            self._later = sorted(at for at in later if at > now)
            self._full, self._sample = False, kept
            self._candidates = max(len(kept), round(share * self._candidates))
            self._kept_bytes = sum(_size(row.arrays) for row in kept)
        self._first_aged = min((row.seen for row in kept), default=now) + self._ttl_seconds


class Watch:
    """The traffic of a name, written down now and then."""

    def __init__(
        self, traffic: Traffic, folder: Path, later: Callable[[Callable[[], None]], None]
    ) -> None:
        """Keep `traffic` in `folder`; `later` runs what may wait for the disk."""
        self.traffic, self.folder, self._later = traffic, folder, later
        self._next_save, self._saving = 0.0, threading.Lock()

    def see(self, request: ValidRequest) -> None:
        """Take note of a request."""
        now = self.traffic.see(request)
        if now >= self._next_save:
            self._next_save = now + _SAVE_SECONDS
            self._later(self.save)

    def save(self) -> None:
        """Write down what is known; a disk that is full costs no more than that."""
        try:
            with self._saving:  # else what was taken first could be written last
                self.traffic.save(self.folder)
        # ValueError: rows whose shapes do not go into one array.
        except (OSError, MemoryError, ValueError) as error:
            logging.getLogger(__name__).warning("traffic is not kept: %s", error)


def watch(
    name: str,
    artifact: Artifact,
    config: RuntimeConfig,
    later: Callable[[Callable[[], None]], None],
    beside: Iterable[Watch | None] = (),
) -> Watch | None:
    """Return what is to see the requests to a name, None where there is no place to keep it.

    Those that serve the name share a folder, and so what is seen, of all their sources: `beside`
    are theirs. Whichever of them is there after a restart goes on with it.

    Raises:
        UsageError: Requests are to be captured, and there is no place to keep them.
    """
    if not config.state_dir:
        if config.capture_rows:
            raise UsageError("runtime.capture_rows needs runtime.state_dir, to keep them in")
        return None
    rows, hours, manifest = config.capture_rows, config.capture_ttl_hours, artifact.manifest
    model = (manifest.signature, manifest.source.sha256)
    traffic = Traffic(*model, capture_rows=rows, ttl_hours=hours)
    for one in filter(None, beside):  # whichever of them saves last tells of all
        traffic.sources = one.traffic.sources = traffic.sources | one.traffic.sources
        if one.traffic.captures == traffic.captures:
            return one
    inside = quote(name, safe="") if name.strip(".") else name.replace(".", "%2E")
    folder = Path(config.state_dir, "traffic", inside)
    traffic.go_on(folder)
    return Watch(traffic, folder, later)


def forget_aged(config: RuntimeConfig, names: Container[str] = (), *, halves: bool = False) -> None:
    """Remove captured rows that nobody adds to any more, once the oldest is too old; old sketches.

    How old that is the model's own settings said, and the sketch beside it does. `names`: whose
    sketches stay. `halves`: rows too whose writer was killed at it; there is no other.
    """
    folders = list[Path]()
    with contextlib.suppress(OSError):  # a disk that fails costs no more than that
        folders += Path(config.state_dir, "traffic").glob("*") if config.state_dir else ()
    for folder in folders:
        with contextlib.suppress(OSError):
            for half in folder.glob(".captured.npz.*") if halves else ():
                half.unlink()
            captured, now = folder / CAPTURED, time.time()  # noqa: TID251 - a file's
            if not captured.exists():  # there may be many: what is not needed is not read
                aged = (folder / SKETCH).stat().st_mtime + _SKETCH_SECONDS < now
                if aged and unquote(folder.name) not in names:
                    shutil.rmtree(folder)
                continue
            hours = _ttl_hours(folder, config.capture_ttl_hours)
            if captured.stat().st_mtime + hours * _HOUR < now:
                captured.unlink()


def _ttl_hours(folder: Path, otherwise: float) -> float:
    """Return at which age the captured rows there are forgotten, as the sketch says."""
    with contextlib.suppress(*_UNREADABLE):
        return msgspec.convert(msgspec.json.decode((folder / SKETCH).read_bytes())[_TTL], float)
    return otherwise


def _captured(folder: Path) -> list[tuple[int, int]]:
    """Return what tells the file of rows there from any other, nothing where there is none."""
    return [(of.st_ino, of.st_mtime_ns) for of in map(Path.stat, folder.glob(CAPTURED))]


def _size(arrays: tuple[Array, ...]) -> int:
    texts = [array for array in arrays if array.dtype == object]
    return sum(array.nbytes for array in arrays) + sum(len(t) for a in texts for t in a.flat)


def _width(arrays: tuple[Array, ...]) -> int:
    """Return the bytes that a row takes as `_stacked` has it; of text, four a character."""
    longest = [4 * max(map(len, a.flat), default=0) * a.size for a in arrays if a.dtype == object]
    return sum(longest) + sum(array.nbytes for array in arrays if array.dtype != object)


def _histogram(counts: Counter[int]) -> list[int]:
    return [counts[digits] for digits in range(max(counts, default=-1) + 1)]


def _stacked(rows: list[Array], spec: TensorSpec) -> Array:
    """Return rows of different lengths as one array, padded at their ends."""
    if (axis := spec.length_axis) is not None:
        longest = max(row.shape[axis] for row in rows)
        for index, row in enumerate(rows):
            widths = [(0, longest - row.shape[axis] if at == axis else 0) for at in range(row.ndim)]
            rows[index] = np.pad(row, widths, constant_values=spec.pad_value)
    stacked = np.concatenate(rows)
    return stacked.astype(np.str_) if stacked.dtype == object else stacked


def _write(stream: IO[bytes], arrays: Mapping[str, Array]) -> None:
    """Write what `np.savez_compressed` would, whatever the names are."""
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, array, allow_pickle=False)


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[IO[bytes]]:
    """Open what will take the place of `path`, whole or not at all; only its owner may read it."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        Path(name).replace(path)
        sync(path.parent)  # else what was told to be done may be as before after a power cut
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
