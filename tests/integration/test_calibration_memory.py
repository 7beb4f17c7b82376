"""Calibration rows in a file that is mapped: the compiler's own memory does not grow with them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnx.helper import make_node

from tests.core.compiler.onnx_files import model, value

pytestmark = pytest.mark.server
SHAPE = (1, 64, 64)
PROGRAM = """
import ctypes, os, re, sys
from pathlib import Path
import lrai_core as lrai

os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # on several it is chance what meets
source, evaluation, calibration, out = sys.argv[1:]
lrai.compile(source, out=out, evaluation=evaluation, calibration=calibration, threads=1)

# The most that there was of small and of large pieces, as malloc itself has counted.
libc, said = ctypes.CDLL(None), Path(out + ".said")
libc.fopen.restype = ctypes.c_void_p
stream = ctypes.c_void_p(libc.fopen(bytes(said), b"w"))
libc.malloc_info(0, stream)
libc.fclose(stream)
small = re.findall(r'<system type="max" size="(\\d+)"/>', said.read_text())[-1]
with said.open("w") as errors:
    os.dup2(errors.fileno(), 2)
    libc.malloc_stats()
large = re.findall(r"max mmap bytes += +(\\d+)", said.read_text())[-1]
print(int(small) + int(large))
"""
# Of several areas for threads it is chance which one grows, of a threshold that moves what is
# where; and what Python has for itself counts, too.
COUNTED = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(128 << 10),
    "PYTHONMALLOC": "malloc",
}


@pytest.mark.parametrize(
    ("kind", "suffix", "names"),
    [("float32", "npy", "x"), ("float64", "npy", "x"), ("float64", "npz", "xm")],
)
def test_ten_thousand_mapped_rows_take_as_much_as_three_hundred(
    tmp_path: Path, kind: str, suffix: str, names: str
) -> None:
    """Also those that have to be converted, and those in an archive that is stored as it is."""
    random = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(random.normal(size=shape).astype(np.float32), name)
        for name, shape in (("w", (16, 1, 3, 3)), ("g", (16, 10)))
    ]
    nodes = [
        make_node("Sum", list(names), ["s"]),
        make_node("Conv", ["s", "w"], ["c"]),
        make_node("GlobalAveragePool", ["c"], ["p"]),
        make_node("Flatten", ["p"], ["f"]),
        make_node("MatMul", ["f", "g"], ["y"]),
    ]
    inputs = [value(name, ["n", *SHAPE]) for name in names]
    proto = model(nodes, inputs, [value("y", ["n", 10])], weights)
    onnx.save(proto, tmp_path / "m.onnx")
    rows: dict[str, Any] = {
        name: random.normal(size=(400, *SHAPE)).astype(np.float32) for name in names
    }
    np.savez(tmp_path / "evaluation.npz", **rows)
    files = {count: tmp_path / f"{count}.{suffix}" for count in (300, 10_000)}
    for count, file in files.items():
        mapped = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", kind, (count, *SHAPE))
        for first in range(0, count, 100):
            mapped[first : first + 100] = random.normal(size=(100, *SHAPE))
        mapped.flush()
        if suffix == "npy":
            (tmp_path / "x.npy").rename(file)
        else:
            same: dict[str, Any] = dict.fromkeys(names, mapped)
            np.savez(file, **same)

    def peak(count: int) -> int:
        """Return the most bytes that the compiler has."""
        arguments = [tmp_path / "m.onnx", tmp_path / "evaluation.npz", files[count]]
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, *map(str, arguments), str(tmp_path / f"{count}.lrai")],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | COUNTED,
        )
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    most, least = peak(10_000), peak(300)
    # The rows alone are 164 MB and more; what is noted of each takes some 7 MB.
    assert 1 << 20 < most <= 1.05 * least
