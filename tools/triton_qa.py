"""Run those of Triton's own tests of its Python backend that can be run against LRAI, unchanged.

What they test is mostly what a `model.py` of theirs does, such as cancelling, raising or sending
later; LRAI has no place for such a model. Those whose model is a plain function get it as an ONNX
file and LRAI as its backend, with the suite's own configuration but for that line, and Triton's own
test file against a real server on the ports that it names.

    pip install requests  # which one of theirs imports
    git clone --depth 1 --branch v2.51.0 https://github.com/triton-inference-server/server
    python -P tools/triton_qa.py server
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import onnx
from onnx import TensorProto, helper

from benchmarks.host import end_on_sigterm
from benchmarks.processes import HOST
from benchmarks.triton_server import Prepared, prepare, variables

PORTS: Final = {"http": 8000, "grpc": 8001, "metrics": 8002}  # which the suites name
START_SECONDS, TEST_SECONDS = 60.0, 300.0
OPTIONS: Final = ("--model-control-mode=explicit", "--allow-gpu-metrics=false")

CASES: Final = (  # suite, test, what is made for it
    ("python_test.py", "PythonTest::test_async_infer", "identities"),
    ("python_test.py", "PythonTest::test_bool", "identities"),
    ("python_test.py", "PythonTest::test_unicode", "identities"),
    ("python_test.py", "PythonTest::test_non_contiguous", "transposes"),
    ("ensemble/ensemble_test.py", "EnsembleTest::test_ensemble", "ensemble"),
    ("io/io_test.py", "IOTest::test_requested_output_default", "add_sub"),
    ("model_control/model_control_test.py", "ExplicitModelTest::test_model_reload", "reload"),
    (
        "python_based_backends/python_based_backends_test.py",
        "PythonBasedBackendsTest",
        "python_based_backends",
    ),
)
NOT_RUN: Final = {  # suites, and why
    "async_execute, decoupled, response_sender": "their models send by themselves, decoupled",
    "lifecycle, argument_validation, error cases": "they test what a model.py of theirs raises",
    "bls": "its model tests itself against models of torch, DLPack and CUDA",
    "ensemble_gpu, io on GPUs, cuda shared memory": "no GPU here",
    "restart": "it wants a killed stub to come back by itself, which Triton no longer does",
    "optional, init_args, string_fixed": "an ONNX model has no such inputs, arguments or state",
    "identity_bf16": "LRAI has no BF16",
    "test_growth_error": "it wants a machine with 1 GiB of shared memory",
    "env, examples, custom_metrics, logging, parameters": "environments and models of their own",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run them, print what passed; return 1 where one failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("source", type=Path, help="a checkout of triton-inference-server/server")
    arguments = parser.parse_args(argv)
    qa = arguments.source.resolve() / "qa"
    if not (qa / "L0_backend_python").is_dir():
        parser.error(f"{arguments.source} has no qa/L0_backend_python")
    end_on_sigterm()
    made, failed = prepare(), 0
    for suite, test, what in CASES:
        with tempfile.TemporaryDirectory(prefix="lrai-qa-") as folder:
            repository = Path(folder, "models")
            loaded = _MADE[what](qa / "python_models", repository)
            with server(made, repository, Path(folder), loaded):
                passed, said = run(qa / "L0_backend_python" / suite, test)
        print(f"{'passed' if passed else 'FAILED'}  {suite}  {test}", flush=True)
        failed += not passed
        if not passed:
            print(said[-3000:])
    for suites, reason in NOT_RUN.items():
        print(f"not run  {suites}: {reason}")
    return 1 if failed else 0


def run(suite: Path, test: str) -> tuple[bool, str]:
    """Return whether a test of a suite passes, and what it said."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{suite.name}::{test}"],
        cwd=suite.parent,
        # Without the probe for leaks: its module comes with no wheel.
        env={**os.environ, "TRITONSERVER_IPADDR": HOST, "TEST_WINDOWS": "1"},
        capture_output=True,
        text=True,
        timeout=TEST_SECONDS,
        check=False,
    )
    return done.returncode == 0, done.stdout + done.stderr


@contextmanager
def server(made: Prepared, repository: Path, folder: Path, loaded: Sequence[str]) -> Iterator[None]:
    """Run a server on the suites' ports, with LRAI as the backends `lrai` and `add_sub`."""
    backends = folder / "backends"
    shutil.copytree(made.backends, backends, symlinks=True)
    shutil.copytree(backends / "lrai", backends / "add_sub")
    package = next(made.environment.glob("lib/python3.*/site-packages/pytriton/tritonserver"))
    runtime = folder / "runtime"
    runtime.mkdir(mode=0o700)
    command = [
        str(package / "bin" / "tritonserver"),
        f"--model-repository={repository}",
        f"--backend-directory={backends}",
        *OPTIONS,
        *(f"--{name}-address={HOST}" for name in PORTS),
        *(f"--{name}-port={port}" for name, port in PORTS.items()),
        *(f"--load-model={name}" for name in loaded),
    ]
    log = folder / "server.log"
    own = {"LRAI_RUNTIME_SOCKET_DIR": str(runtime)}
    with log.open("wb") as said:
        process = subprocess.Popen(
            command, stdout=said, stderr=said, env=variables(made.environment) | own
        )
    try:
        wait_until_ready(process, log)
        yield
    finally:
        process.terminate()
        process.wait(START_SECONDS)


def wait_until_ready(process: subprocess.Popen[bytes], log: Path) -> None:
    """Return once the server answers.

    Raises:
        RuntimeError: It ends, or does not get ready.
    """
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://{HOST}:{PORTS['http']}/v2/health/ready"):
                return
        except (OSError, urllib.error.URLError):
            time.sleep(0.2)
    raise RuntimeError(f"the server is not ready:\n{log.read_text(errors='replace')[-3000:]}")


def identities(models: Path, repository: Path) -> list[str]:
    """Write those of `python_test.py` that return what they got."""
    batching = (
        "dynamic_batching { preferred_batch_size: [8], max_queue_delay_microseconds: 12000000 }"
    )
    given = (models / "identity_fp32" / "config.pbtxt").read_text()
    byte = given.replace("FP32", "UINT8").replace("identity_fp32", "identity_uint8")
    byte = byte.replace("max_batch_size: 64", "max_batch_size: 8") + batching
    boolean = given.replace("FP32", "BOOL").replace("identity_fp32", "identity_bool")
    text = (models / "string" / "config.pbtxt").read_text()
    rows = ["rows", "columns"]
    write(repository, "identity_uint8", byte, identity(TensorProto.UINT8, rows))
    write(repository, "identity_bool", boolean, identity(TensorProto.BOOL, rows))
    write(repository, "string", text, identity(TensorProto.STRING, ["count"]))
    return ["identity_uint8", "identity_bool", "string"]


def transposes(models: Path, repository: Path) -> list[str]:
    """Write the one that turns a tensor over."""
    nodes = [
        helper.make_node("Reshape", ["INPUT0", "shape"], ["OUTPUT0"]),
        helper.make_node("Transpose", ["INPUT0"], ["OUTPUT1"], perm=[4, 3, 2, 1, 0]),
        helper.make_node("Transpose", ["INPUT0"], ["OUTPUT2"], perm=[1, 0, 4, 2, 3]),
    ]
    shape = helper.make_tensor("shape", TensorProto.INT64, [5], [10, 2, 6, 5, 11])
    outputs = [("OUTPUT0", list("fghij")), ("OUTPUT1", list("klmno")), ("OUTPUT2", list("pqrst"))]
    made = model(nodes, [("INPUT0", list("abcde"))], outputs, TensorProto.FLOAT, [shape])
    config = (models / "non_contiguous" / "config.pbtxt").read_text()
    write(repository, "non_contiguous", config, made)
    return ["non_contiguous"]


def ensemble(models: Path, repository: Path) -> list[str]:
    """Write an ensemble of two that add and subtract."""
    config = (models / "add_sub" / "config.pbtxt").read_text()
    for name in ("add_sub_1", "add_sub_2"):
        write(repository, name, config, add_sub_model(16))
    (repository / "ensemble" / "1").mkdir(parents=True)
    shutil.copy(models / "ensemble" / "config.pbtxt", repository / "ensemble")
    return ["add_sub_1", "add_sub_2", "ensemble"]


def add_sub(models: Path, repository: Path) -> list[str]:
    """Write one that adds and subtracts."""
    config = (models / "add_sub" / "config.pbtxt").read_text()
    write(repository, "add_sub", config, add_sub_model(16))
    return ["add_sub"]


def reload(models: Path, repository: Path) -> list[str]:
    """Write one that returns what it got, and an ensemble around it, to be loaded by the test."""
    config = (models / "identity_fp32" / "config.pbtxt").read_text()
    write(repository, "identity_fp32", config, identity(TensorProto.FLOAT, ["rows", "columns"]))
    (repository / "simple_identity_fp32" / "1").mkdir(parents=True)
    given = models / "simple_identity_fp32" / "config.pbtxt"
    shutil.copy(given, repository / "simple_identity_fp32")
    return []


def python_based_backends(models: Path, repository: Path) -> list[str]:
    """Write those of a backend of its own, some in two versions, to be loaded by the test."""
    for name, op_type in (("add", "Add"), ("sub", "Sub")):
        nodes = [helper.make_node(op_type, ["INPUT0", "INPUT1"], ["OUTPUT"])]
        inputs = [("INPUT0", [4]), ("INPUT1", [4])]
        made = model(nodes, inputs, [("OUTPUT", [4])], TensorProto.FLOAT)
        for version in (1, 2) if name == "add" else (1,):
            write(repository, name, 'backend: "add_sub"', made, version)
    config = (models / "add_sub" / "config.pbtxt").read_text()
    for version in (1, 2):
        write(repository, "add_sub", config, add_sub_model(16), version)
    write(repository, "add_sub_pytorch", 'backend: "python"', add_sub_model(4))
    return []


def add_sub_model(width: int) -> onnx.ModelProto:
    """Return one that adds and subtracts vectors."""
    nodes = [
        helper.make_node("Add", ["INPUT0", "INPUT1"], ["OUTPUT0"]),
        helper.make_node("Sub", ["INPUT0", "INPUT1"], ["OUTPUT1"]),
    ]
    inputs = [("INPUT0", [width]), ("INPUT1", [width])]
    return model(nodes, inputs, [("OUTPUT0", [width]), ("OUTPUT1", [width])], TensorProto.FLOAT)


def identity(datatype: int, shape: list[Any]) -> onnx.ModelProto:
    """Return one that gives what it got."""
    nodes = [helper.make_node("Identity", ["INPUT0"], ["OUTPUT0"])]
    return model(nodes, [("INPUT0", shape)], [("OUTPUT0", shape)], datatype)


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[tuple[str, list[Any]]],
    outputs: Sequence[tuple[str, list[Any]]],
    datatype: int,
    initializers: Sequence[onnx.TensorProto] = (),
) -> onnx.ModelProto:
    """Return an ONNX model whose tensors are all of one datatype."""
    taken, given = (
        [helper.make_tensor_value_info(name, datatype, shape) for name, shape in tensors]
        for tensors in (inputs, outputs)
    )
    graph = helper.make_graph(list(nodes), "qa", taken, given, initializer=list(initializers))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def write(
    repository: Path, name: str, config: str, made: onnx.ModelProto, version: int = 1
) -> None:
    """Write an entry with its own configuration, but for the backend."""
    folder = repository / name / str(version)
    folder.mkdir(parents=True)
    onnx.save(made, folder / "model.onnx")
    text = config.replace('backend: "python"', 'backend: "lrai"')
    (repository / name / "config.pbtxt").write_text(text + "\n")


_MADE: Final[dict[str, Callable[[Path, Path], list[str]]]] = {
    "identities": identities,
    "transposes": transposes,
    "ensemble": ensemble,
    "add_sub": add_sub,
    "reload": reload,
    "python_based_backends": python_based_backends,
}


if __name__ == "__main__":
    sys.exit(main())
