"""The Engine protocol, and how an engine is found by its name."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import platform
from collections.abc import Iterator, Sequence, Set
from functools import cache
from pathlib import Path
from typing import Final, Protocol, cast

from lrai_core.errors import EnvironmentProblem, shorten
from lrai_core.protocol import Array

SHORT_CALL_MS: Final = 2.0  # who takes less for any call is served with one thread
# Bytes of one, and what madvise(2) calls these; the last since Linux 6.1.
_HUGE, _HUGEPAGE, _COLLAPSE = 2 << 20, 14, 25


class Session(Protocol):
    """A loaded variant. While a model is compiled, several threads run it at the same time."""

    def run(self, arrays: Sequence[Array], outputs: Sequence[int] | None = None) -> list[Array]:
        """Return the outputs at these indices (None: all) for one array per input, in order."""


class Engine(Protocol):
    """Loads variants. `version` is part of an artifact's target: another one may differ."""

    name: str
    version: str

    def load(
        self, model: Path, *, weights: Path | None = None, threads: int = 1, optimise: bool = False
    ) -> Session:
        """Return a session on the graph at `model`.

        Args:
            model: The graph.
            weights: Folder of its external data; None for the model's own folder.
            threads: Threads of one call.
            optimise: Let the engine optimise the graph now; variants are stored as executed.

        Raises:
            ArtifactError: The engine cannot open it.
        """


def find_engine(name: str) -> Engine:
    """Return the engine of that name: built in, or from an installed `lrai.engines` entry point.

    Raises:
        EnvironmentProblem: It is not installed.
    """
    if name == "onnxruntime":
        from lrai_core.engine.onnxruntime import OnnxRuntime

        return OnnxRuntime()
    from importlib.metadata import entry_points  # 3 MB that an actor can do without

    for entry in entry_points(group="lrai.engines", name=name):
        return cast("Engine", entry.load()())
    remedy = f"pip install 'lrai[{shorten(name, 40)}]'"
    raise EnvironmentProblem(f"the engine {shorten(name)!r} is not installed: {remedy}")


@contextlib.contextmanager
def huge_pages(before: Set[int] | None = None) -> Iterator[Set[int]]:
    """Put what is allocated meanwhile on pages of 2 MB, where the system has them for who asks.

    Or since an earlier time, whose yield is given as `before`: pages fill up after they were taken.

    A call reads all weights, and a processor knows the places of few small pages. What looking them
    up costs is little on a quiet machine, and a third of a call where others fill its caches.
    """
    yield (before := _own_memory() if before is None else before)
    libc, pages = ctypes.CDLL(None), ctypes.create_string_buffer(_HUGE // mmap.PAGESIZE)
    for place in [(ctypes.c_void_p(at), ctypes.c_size_t(_HUGE)) for at in _own_memory() - before]:
        # Else what nobody has used would become memory, too.
        if not libc.mincore(*place, pages) and pages.raw.count(1) > 0.75 * len(pages):
            libc.madvise(*place, _HUGEPAGE)  # refused, where there are none
            libc.madvise(*place, _COLLAPSE)


def _own_memory() -> set[int]:
    """Return where whole huge pages would lie in this process's memory that is of no file."""
    starts: set[int] = set()
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/maps").read_bytes().splitlines():
            span, rights, _, _, file = line.split()[:5]
            if rights == b"rw-p" and file == b"0":
                start, end = (int(address, 16) for address in span.split(b"-"))
                starts.update(range(-(-start // _HUGE) * _HUGE, end - _HUGE + 1, _HUGE))
    return starts


def installed_version(name: str) -> str:
    """Return the version of a distribution without importing it, empty if not installed."""
    from importlib.metadata import PackageNotFoundError, version

    for distribution in (name, f"{name}-gpu"):
        with contextlib.suppress(PackageNotFoundError):
            return version(distribution)
    return ""


@cache
def isa_class() -> str:
    """Return what decides speed and rounding of integer kernels: `amx`, `vnni`, `avx2`, …."""
    # Anything else, as that no descriptor is left, passes: it must not be remembered as a class.
    with contextlib.suppress(FileNotFoundError, PermissionError):
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
        lines = (line for line in text.splitlines() if line.startswith(("flags", "Features")))
        flags = set(next(lines, "").split())
        if known := [name for flag, name in _ISA_FLAGS.items() if flag in flags]:
            return known[0]
    return platform.machine().lower()


# Best first. AVX-512 is told apart: onnxruntime lays out convolutions' weights for its width.
_ISA_FLAGS = {"amx_int8": "amx", "avx512_vnni": "vnni", "avx512f": "avx512"}
_ISA_FLAGS |= {"avx_vnni": "avx-vnni", "avx2": "avx2", "asimddp": "neon-dot"}
