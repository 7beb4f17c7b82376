from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import mmap
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint, PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from lrai_core.engine import onnxruntime
from lrai_core.engine.engine import find_engine, huge_pages, installed_version, isa_class
from lrai_core.errors import EngineError, EnvironmentProblem
from tests.core.compiler.onnx_files import model, save, value

Enough = Callable[[int], bool]


@pytest.fixture(autouse=True)
def _no_memory() -> Iterator[None]:
    isa_class.cache_clear()
    yield
    isa_class.cache_clear()


def test_onnxruntime_is_built_in_and_its_version_is_the_installed_one() -> None:
    found = find_engine("onnxruntime")
    assert found.name == "onnxruntime"
    assert found.version == installed_version("onnxruntime") != ""


def test_threads_of_a_session_are_soon_asleep_after_a_call(tmp_path: Path) -> None:
    """They would wait awake for the next one for 45 ms, at the expense of whoever has work."""
    weight = numpy_helper.from_array(np.ones((512, 512), np.float32), "w")
    product = helper.make_node("MatMul", ["x", "w"], ["y"])
    shapes = (value("x", ["n", 512]), value("y", ["n", 512]))
    path = save(model([product], [shapes[0]], [shapes[1]], [weight]), tmp_path / "m.onnx")
    before = _threads()
    session = find_engine("onnxruntime").load(path, threads=2)
    threads = _threads() - before  # without those of earlier tests
    assert threads
    used = list[float]()
    for _ in range(5):
        session.run([np.ones((64, 512), np.float32)])
        began = sum(map(_cpu_seconds, threads))
        time.sleep(0.06)
        used.append(sum(map(_cpu_seconds, threads)) - began)
    assert min(used) < 0.01


def _threads() -> set[int]:
    return {int(task.name) for task in Path("/proc/self/task").iterdir()}


def _cpu_seconds(thread: int) -> float:
    return time.clock_gettime(~thread << 3 | 6)  # as Linux names the clock of one of a process


def _huge_bytes() -> int:
    gc.collect()  # else what others left behind goes meanwhile
    found = re.search(r"AnonHugePages:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text())
    assert found is not None
    return int(found[1]) << 10


def _bytes_at(memory: mmap.mmap, kind: str) -> int:
    """Return what there is of a kind where this memory lies, but for 2 MB at each of its ends.

    There the kernel may have joined it with what lies beside it.
    """
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    first, last, found, inside = start + (2 << 20), start + len(memory) - (2 << 20), 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if place := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            begin, end = (int(address, 16) for address in place.groups())
            inside = begin < last and end > first
        elif inside and line.startswith(f"{kind}:"):
            found += int(line.split()[1]) << 10
    return found


def _memory(size: int) -> mmap.mmap:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.write(b"\1" * size)
    return memory


def _huge_left() -> bool:
    """Return whether the system has huge pages left for 64 MB."""
    with _memory(64 << 20) as memory, contextlib.suppress(OSError):
        memory.madvise(25)  # MADV_COLLAPSE
        return True
    return False


@pytest.fixture
def huge_enough() -> Enough:
    """Return what tells whether enough of 64 MB is on huge pages.

    None has to be where the system has none left, before or after.
    """
    left = _huge_left()
    return lambda found: found >= 32 << 20 or not (left and _huge_left())


def test_weights_are_on_huge_pages(tmp_path: Path, huge_enough: Enough) -> None:
    weight = numpy_helper.from_array(np.ones((4096, 4096), np.float32), "w")
    product = helper.make_node("MatMul", ["x", "w"], ["y"])
    shapes = (value("x", ["n", 4096]), value("y", ["n", 4096]))
    path = save(model([product], [shapes[0]], [shapes[1]], [weight]), tmp_path / "m.onnx")
    before = _huge_bytes()
    session = find_engine("onnxruntime").load(path)
    assert huge_enough(_huge_bytes() - before)
    assert session.run([np.ones((1, 4096), np.float32)])[0][0, 0] == 4096


def test_what_larger_calls_take_is_on_huge_pages_too(
    tmp_path: Path, huge_enough: Enough, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = [helper.make_node("Exp", ["x"], ["a"]), helper.make_node("CumSum", ["a", "0"], ["b"])]
    steps.append(helper.make_node("ReduceSum", ["b"], ["y"], keepdims=0))
    axis = numpy_helper.from_array(np.array(0), "0")
    path = save(model(steps, [value("x", ["n"])], [value("y", [])], [axis]), tmp_path / "m.onnx")
    session, looks = find_engine("onnxruntime").load(path), list[int]()
    session.run([np.zeros(1, np.float32)])
    before = _huge_bytes()
    session.run([large := np.zeros(16 << 20, np.float32)])
    assert huge_enough(_huge_bytes() - before)
    monkeypatch.setattr(onnxruntime, "huge_pages", lambda before: looks.append(1))
    session.run([large])  # no larger: it takes what is there
    assert session.run([large[:2]])[0] == 3
    assert not looks


def test_memory_from_before_is_left_as_it_is(huge_enough: Enough) -> None:
    with _memory(64 << 20) as before:
        begun, begun_before = _huge_bytes(), _bytes_at(before, "AnonHugePages")
        with huge_pages():
            meanwhile = _memory(64 << 20)
        assert huge_enough(_huge_bytes() - begun)
        assert _bytes_at(before, "AnonHugePages") - begun_before <= 2 << 20
        assert len(before) == len(meanwhile)
        meanwhile.close()


def test_memory_that_filled_up_later_is_on_huge_pages_too(huge_enough: Enough) -> None:
    with huge_pages() as loaded:
        memory = mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with memory:
        begun = _huge_bytes()
        memory.write(b"\1" * len(memory))
        with huge_pages(loaded):
            pass
        assert huge_enough(_huge_bytes() - begun)


@contextlib.contextmanager
def _small_pages() -> Iterator[None]:
    """Have what is touched be small pages, also where the system has huge ones for everybody."""
    prctl = ctypes.CDLL(None).prctl
    prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE
    try:
        yield
    finally:
        prctl(41, 0, 0, 0, 0)


def test_what_nobody_has_used_is_made_no_memory() -> None:
    with huge_pages():
        memory = mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        begun = _bytes_at(memory, "Rss")  # of what lies beside it
        with _small_pages():
            memory[:: 2 << 20] = b"\1" * 32  # one of each huge one
    assert _bytes_at(memory, "Rss") - begun < 16 << 20
    memory.close()


class PluginEngine:
    name = "plugin"
    version = "7"


def test_another_engine_is_found_by_its_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    def entry_points(*, group: str, name: str) -> list[EntryPoint]:
        assert group == "lrai.engines"
        here = EntryPoint("plugin", f"{__name__}:PluginEngine", group)
        return [here] if name == "plugin" else []

    monkeypatch.setattr("importlib.metadata.entry_points", entry_points)
    monkeypatch.setattr(EntryPoint, "load", lambda entry: PluginEngine)
    assert find_engine("plugin").version == "7"
    with pytest.raises(EnvironmentProblem, match="the engine 'tvm' is not installed: pip install"):
        find_engine("tvm")


def test_the_name_of_a_missing_engine_is_shortened_in_the_message() -> None:
    with pytest.raises(EnvironmentProblem) as caught:
        find_engine("\0" + "x" * (1 << 20))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


def test_an_engine_that_is_not_there_has_no_version() -> None:
    assert installed_version("no-such-engine") == ""


def test_the_gpu_build_of_an_engine_counts_as_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name.endswith("-gpu"):
            return "1.2"
        raise PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", version)
    assert installed_version("onnxruntime") == "1.2"


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("model name: x\nflags : fpu avx2 avx512_vnni amx_int8\n", "amx"),
        ("flags\t\t: fpu avx2 avx512_vnni\n", "vnni"),
        ("flags : fpu avx2 avx512f avx512_vnni avx_vnni\n", "vnni"),
        ("flags : fpu avx2 avx512f\n", "avx512"),
        ("flags : fpu avx2 avx_vnni\n", "avx-vnni"),
        ("flags : fpu avx2\n", "avx2"),
        ("Features : fp asimd asimddp\n", "neon-dot"),
        ("flags : fpu sse2\n", "the machine"),
        ("", "the machine"),
    ],
)
def test_the_isa_class_is_the_best_that_the_processor_lists(
    cpuinfo: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_text(path: Path, **_: Any) -> str:
        assert str(path) == "/proc/cpuinfo"
        return cpuinfo

    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr(platform, "machine", lambda: "The Machine")
    assert isa_class() == expected


def test_without_a_list_of_flags_the_machine_is_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    def read_text(path: Path, **_: Any) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr(platform, "machine", lambda: "ppc64le")
    assert isa_class() == "ppc64le"


def test_a_moment_without_descriptors_is_not_remembered_as_another_processor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def read_text(path: Path, **_: Any) -> str:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    known = isa_class()
    isa_class.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", read_text)
        with pytest.raises(OSError, match="Too many open files"):
            isa_class()
    assert isa_class() == known


def test_inputs_that_the_graph_cannot_take_are_to_blame_for_it(tmp_path: Path) -> None:
    """A text longer than the table of positions, say, which is no lack of memory."""
    table = numpy_helper.from_array(np.ones((1, 3), np.float32), "table")
    graph = model(
        [helper.make_node("Add", ["x", "table"], ["y"])],
        [value("x", ["n", "l"])],
        [value("y", ["n", "l"])],
        [table],
    )
    session = find_engine("onnxruntime").load(save(graph, tmp_path / "m.onnx"), threads=1)
    with pytest.raises(EngineError) as refused:
        session.run([np.ones((2, 4), np.float32)])
    assert refused.value.invalid


def test_a_name_in_the_graph_is_no_lack_of_memory(tmp_path: Path) -> None:
    table = numpy_helper.from_array(np.ones((4, 3), np.float32), "table")
    graph = model(
        [helper.make_node("Gather", ["table", "x"], ["y"], name="/asset_allocation/Gather")],
        [value("x", ["n"], TensorProto.INT64)],
        [value("y", ["n", 3])],
        [table],
    )
    session = find_engine("onnxruntime").load(save(graph, tmp_path / "m.onnx"), threads=1)
    with pytest.raises(EngineError, match="out of data bounds") as refused:
        session.run([np.array([99])])
    assert refused.value.invalid


def test_a_tensor_that_no_memory_holds_is_a_lack_of_it(tmp_path: Path) -> None:
    graph = model(
        [helper.make_node("ConstantOfShape", ["x"], ["y"])],
        [value("x", ["n"], TensorProto.INT64)],
        [value("y", ["a", "b"])],
    )
    session = find_engine("onnxruntime").load(save(graph, tmp_path / "m.onnx"), threads=1)
    with pytest.raises(EngineError) as refused:
        session.run([np.array([1 << 30, 1 << 20])])
    assert not refused.value.invalid


_BOUND = """
import os, sys

class Seen:
    cpus = None
    def find_spec(self, name, path=None, target=None):
        if name == "onnxruntime":
            Seen.cpus = os.sched_getaffinity(0)

cpu = int(sys.argv[1])
os.sched_setaffinity(0, {cpu})
sys.meta_path.insert(0, Seen())
import lrai_core.engine.onnxruntime
assert os.sched_getaffinity(0) == {cpu}, os.sched_getaffinity(0)
print(len(Seen.cpus))
"""


def test_onnxruntime_sees_all_cpus_when_it_is_imported_by_who_is_bound_to_one() -> None:
    cpus = sorted(os.sched_getaffinity(0))
    command = [sys.executable, "-c", _BOUND, str(cpus[-1])]
    seen = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert int(seen) >= len(cpus)
