"""What serving must not do: import what it does not need, use what was made for another machine."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime
import pytest
import zmq

import lrai_core as lrai
from benchmarks.models import requests
from lrai_core.artifact import LatencyPoint, Manifest
from lrai_core.runtime.embedded import Embedded
from tests.core import small_artifact
from tests.integration.conftest import sentence
from tests.integration.test_runtime_faults import wait_until

pytestmark = pytest.mark.server

SERVE = """
import json, sys
import numpy as np
import lrai_core as lrai
with lrai.Runtime.open(sys.argv[1]) as runtime:
    x = np.zeros((1, 64), np.float32)
    runtime.infer(lrai.InferenceRequest(model_name="classifier", inputs={"features": x}))
    print(json.dumps(sorted({name.split(".")[0] for name in sys.modules})))
"""
ACT = """
import json, sys
from pathlib import Path
import lrai_core.actor.actor
from lrai_core.engine.engine import find_engine
folder = Path(sys.argv[1])
find_engine("onnxruntime").load(folder / "variants/fp32/model.onnx", weights=folder / "source")
print(json.dumps(sorted({name.split(".")[0] for name in sys.modules})))
"""


def modules(program: str, artifact: lrai.Artifact) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-P", "-c", program, artifact.path],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return set(json.loads(done.stdout))


@pytest.mark.parametrize("address", ["embedded", "auto"])
def test_where_threads_are_greenlets_nothing_is_opened(address: str) -> None:
    """It would wait for good: each of its loops waits in C, and with it all greenlets."""
    program = """
        from gevent import monkey
        monkey.patch_all()
        import sys
        import lrai_core as lrai
        try:
            lrai.Runtime(address=sys.argv[1])
        except lrai.EnvironmentProblem as problem:
            print(problem)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), address],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert done.stdout == "gevent or eventlet has patched threads: real ones are needed\n"


def test_where_a_profiler_counts_locks_threads_are_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    class Profiled:
        """As ddtrace's: it stands in the place of the function, and is none."""

        def __init__(self, made: Any) -> None:
            self.made = made

        def __call__(self) -> Any:
            return self.made()

    monkeypatch.setattr(threading, "Lock", Profiled(threading.Lock))
    with lrai.Runtime(address="embedded") as runtime:
        assert runtime.ready() == "idle"


def test_a_served_inference_imports_nothing_heavy(classifier_fp32: lrai.Artifact) -> None:
    client, actor = modules(SERVE, classifier_fp32), modules(ACT, classifier_fp32)
    assert "lrai_core" in client
    assert "onnxruntime" in actor
    heavy = {"torch", "tvm", "z3", "scipy", "mlflow", "typer", "rich", "pandas", "onnx"}
    heavy |= {"lrai_shared", "lrai_import", "lrai_report"}
    assert not client & (heavy | {"onnxruntime"})
    assert not actor & heavy


def test_an_actor_is_ready_half_a_second_after_a_fresh_python_would_be(
    minilm_fp32: lrai.Artifact, minilm: Path
) -> None:
    program = (
        "import sys, onnxruntime as ort; o = ort.SessionOptions(); o.intra_op_num_threads = 1;"
        "ort.InferenceSession(sys.argv[1], o)"
    )

    def fresh() -> float:
        started = time.monotonic()
        subprocess.run([sys.executable, "-c", program, minilm], check=True)
        return time.monotonic() - started

    def actor() -> float:
        started = time.monotonic()
        with lrai.Runtime.open(minilm_fp32, config=lrai.load_config(call={"actor.threads": 1})):
            return time.monotonic() - started

    pairs = list[tuple[float, float]]()
    for _ in range(8):  # other work only adds to either
        pairs.append((fresh(), actor()))
        least = min(a for a, _ in pairs)
        if min(b for _, b in pairs) <= least + max(0.5, 0.5 * least):
            return
    raise AssertionError(pairs)


def changed(artifact: lrai.Artifact, tmp_path: Path, **target: str) -> lrai.Artifact:
    """Return a copy of the artifact that claims another target."""
    copy = tmp_path / "copy.lrai"
    shutil.copytree(artifact.path, copy)
    manifest = msgspec.json.decode((copy / "manifest.json").read_bytes(), type=Manifest)
    other = msgspec.structs.replace(manifest.target, **target)
    manifest = msgspec.structs.replace(manifest, target=other)
    (copy / "manifest.json").write_bytes(msgspec.json.encode(manifest))
    return lrai.Artifact.open(copy)


@pytest.mark.parametrize("target", [{"isa": "other"}, {"engine_version": "1.0.0"}])
def test_a_variant_of_another_machine_is_refused_and_the_source_serves(
    minilm_fp32: lrai.Artifact,
    minilm_session: onnxruntime.InferenceSession,
    tmp_path: Path,
    target: dict[str, str],
) -> None:
    artifact = changed(minilm_fp32, tmp_path, **target)
    seen: list[lrai.Event] = []
    with lrai.Runtime.open(artifact, name="m", observers=[seen.append]) as runtime:
        payload = sentence(np.random.default_rng(0), 1, 9)
        answer = runtime.infer(lrai.InferenceRequest(model_name="m", inputs=payload))
        assert answer.parameters["variant"] == "fp32"
    (refused,) = [event for event in seen if event.kind == "variant_refused"]
    assert refused.model == "m"
    assert next(iter(target.values())) in refused.attributes["made_for"]
    expected = minilm_session.run(None, payload)[0]
    np.testing.assert_allclose(answer.outputs["sentence_embedding"], expected, atol=1e-4)


def test_a_certificate_of_another_machine_does_not_hold(
    classifier_rows: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    model, rows = classifier_rows
    artifact = lrai.compile(
        model, out=tmp_path / "c.lrai", evaluation=rows, output_map="softmax", threads=1
    )
    certificate = lrai.certificates(artifact)[0]
    foreign = msgspec.structs.replace(certificate, environment="other")
    verdict = lrai.check(foreign, artifact)
    assert not verdict.holds
    assert any("environment is other" in objection for objection in verdict.objections)


def test_a_required_certificate_is_demanded(
    classifier_rows: tuple[Path, dict[str, Any]], tmp_path: Path, classifier_fp32: lrai.Artifact
) -> None:
    model, rows = classifier_rows
    artifact = lrai.compile(
        model, out=tmp_path / "c.lrai", evaluation=rows, output_map="softmax", threads=1
    )
    with lrai.Runtime.open(artifact, require={"tier": "STATISTICAL", "delta": 0.05}) as runtime:
        request = lrai.InferenceRequest(model_name="c", inputs={"features": rows["features"][:1]})
        known = {one.id for one in lrai.certificates(artifact)}
        assert runtime.infer(request).parameters["certificate"] in known
    with pytest.raises(lrai.ConditionNotMet, match="delta=1e-05"):
        lrai.Runtime.open(artifact, require={"delta": 1e-5})
    with pytest.raises(lrai.ConditionNotMet, match="it has none"):
        lrai.Runtime.open(classifier_fp32, require={"tier": "STATISTICAL"})
    with pytest.raises(lrai.UsageError, match="sigma is 1; known: tier"):
        lrai.Runtime.open(artifact, require={"sigma": 1})


def test_an_artifact_that_changed_on_disk_is_refused_by_its_actor(
    classifier_fp32: lrai.Artifact, tmp_path: Path
) -> None:
    copy = tmp_path / "copy.lrai"
    shutil.copytree(classifier_fp32.path, copy)
    graph = copy / "variants" / "fp32" / "model.onnx"
    content = bytearray(graph.read_bytes())
    content[len(content) // 2] ^= 1
    graph.write_bytes(content)
    with pytest.raises(lrai.ArtifactError, match=r"model\.onnx has changed"):
        lrai.Runtime.open(copy)


def test_frames_of_strangers_are_dropped_and_counted(classifier_fp32: lrai.Artifact) -> None:
    import pickle  # noqa: TID251 - what an attacker would send

    with lrai.Runtime.open(classifier_fp32) as runtime:
        (address,) = embedded(runtime).folder.iterdir()
        assert embedded(runtime).folder.stat().st_mode & 0o777 == 0o700
        with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
            stranger.connect(f"ipc://{address}")
            for frames in ([b"\x00" * 40], [pickle.dumps(print)], [b"", b"\xff" * 10], [b"x"] * 9):
                stranger.send_multipart(frames)
            wait_until(lambda: runtime.stats()["dropped_frames"] == 4)
        assert runtime.infer(classifier_request()).outputs["logits"].shape == (1, 10)


BARE = """
mount -t tmpfs none /mnt
mkdir -m 1777 /mnt/tmp
mount -t tmpfs -o ro,size=4k none /dev/shm
mount -o remount,bind,ro /
export TMPDIR=/mnt/tmp HOME=/nonexistent
exec unshare --user --map-user=12345 "$@"
"""


def test_it_serves_on_a_read_only_root_without_network_shared_memory_or_a_known_user(
    classifier_fp32: lrai.Artifact,
) -> None:
    bare = ["unshare", "--map-root-user", "--mount", "--net", "sh", "-ec", BARE, "sh"]
    program = f"""
import os
assert os.getuid() == 12345
try:
    open("/x", "w")
except OSError as error:
    assert error.errno == 30  # read-only file system
{SERVE}"""
    done = subprocess.run(
        [*bare, sys.executable, "-P", "-c", program, classifier_fp32.path],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "lrai_core" in json.loads(done.stdout)
    assert "telemetry" not in done.stderr  # onnxruntime was told not to report, and does not try


NOWHERE = """
for folder in /tmp /var/tmp; do
    mount --bind "$folder" "$folder"
    mount -o remount,bind,ro "$folder"
done
mount -t tmpfs none /mnt
mount -o remount,bind,ro /
cd /
export TMPDIR=/nonexistent
exec "$@"
"""
LRAI = "from lrai_core.cli import main; main()"
EMBEDDED = """
import sys
import lrai_core as lrai
try:
    lrai.Runtime(address="embedded")
except lrai.LraiError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


@pytest.mark.parametrize(
    "program",
    [(EMBEDDED,), (LRAI, "runtime", "start"), (LRAI, "runtime", "start", "--address", "/mnt/own")],
    ids=["embedded", "shared", "elsewhere"],
)
def test_without_a_temporary_folder_the_setting_to_use_is_named(program: tuple[str, ...]) -> None:
    nowhere = ["unshare", "--map-root-user", "--mount", "sh", "-ec", NOWHERE, "sh"]
    done = subprocess.run(
        [*nowhere, sys.executable, "-P", "-c", *program],
        env={name: value for name, value in os.environ.items() if not name.startswith("LRAI_")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == lrai.EnvironmentProblem.exit_code, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert "No usable temporary directory" in done.stderr
    assert "set runtime.socket_dir" in done.stderr


def test_a_python_without_lrai_is_explained(classifier_fp32: lrai.Artifact) -> None:
    for python, error, message in (
        ("/nonexistent/python", lrai.EnvironmentProblem, "cannot be started"),
        ("/bin/false", lrai.ArtifactError, "exit status 1"),
    ):
        config = lrai.load_config(call={"actor.python": python})
        with pytest.raises(error, match=message):
            lrai.Runtime.open(classifier_fp32, config=config)


def test_a_socket_folder_that_cannot_be_used_is_explained(
    classifier_fp32: lrai.Artifact, tmp_path: Path
) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    for folder, message in ((deep, "shorter"), (tmp_path / "absent", "runtime.socket_dir")):
        config = lrai.load_config(call={"runtime.socket_dir": str(folder)})
        with pytest.raises(lrai.EnvironmentProblem, match=message):
            lrai.Runtime.open(classifier_fp32, config=config)
    assert list(deep.iterdir()) == []


def test_two_names_serve_beside_one_another_and_one_is_unloaded(
    classifier_fp32: lrai.Artifact,
) -> None:
    with lrai.Runtime.open(classifier_fp32, name="a") as runtime:
        runtime.load(classifier_fp32, name="b")
        assert sorted(model.name for model in runtime.models()) == ["a", "b"]
        with pytest.raises(lrai.UsageError, match="loaded already"):
            runtime.load(classifier_fp32, name="a")
        runtime.unload("a")
        payload = {"features": np.zeros((1, 64), np.float32)}
        with pytest.raises(lrai.ModelNotFound, match="loaded: 'b'"):
            runtime.infer(lrai.InferenceRequest(model_name="a", inputs=payload))
        request = lrai.InferenceRequest(model_name="b", inputs=payload, model_version="other")
        with pytest.raises(lrai.ModelNotFound, match="has version"):
            runtime.infer(request)
        with pytest.raises(lrai.InvalidTensor, match="no such input"):
            runtime.infer(lrai.InferenceRequest(model_name="b", inputs={"x": payload["features"]}))


def test_a_death_that_no_line_shows_is_noticed_by_its_silence(
    classifier_fp32: lrai.Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, held = socket.socketpair, []

    def leaking() -> tuple[socket.socket, socket.socket]:
        ours, theirs = pair()
        held.append(theirs.dup())  # as a fork of this process would at the wrong moment
        return ours, theirs

    monkeypatch.setattr(socket, "socketpair", leaking)
    config = lrai.load_config(call={"actor.hang_seconds": 1.5})
    with lrai.Runtime.open(classifier_fp32, config=config) as runtime:
        (model,) = runtime.models()
        os.kill(model.actor_pids[0], signal.SIGKILL)
        assert runtime.infer(classifier_request()).outputs["logits"].shape == (1, 10)
        assert runtime.stats()["actor_hung"] >= 1  # the next one may be slow to start
    for end in held:
        end.close()


def test_one_name_is_loaded_once_however_many_try(classifier_fp32: lrai.Artifact) -> None:
    with lrai.Runtime() as runtime, ThreadPoolExecutor(4) as threads:
        tries = [threads.submit(runtime.load, classifier_fp32, name="a") for _ in range(4)]
        errors = [attempt.exception() for attempt in tries]
        assert [type(error) for error in errors if error] == [lrai.UsageError] * 3
        assert runtime.stats()["actor_started"] == 1
        assert runtime.infer(classifier_request("a")).outputs["logits"].shape == (1, 10)


@pytest.mark.parametrize("timeout_ms", ["100", 10**400], ids=["text", "too large"])
def test_a_time_that_is_none_is_refused_before_anything_is_counted(
    tmp_path: Path, timeout_ms: Any
) -> None:
    with lrai.Runtime.open(small_artifact.build(tmp_path / "small.lrai")) as runtime:
        one = lrai.InferenceRequest(model_name="", inputs={"x": np.ones((1, 3), np.float32)})
        with pytest.raises(lrai.RequestError, match=r"timeout_ms is .*, a number up to 1e300"):
            runtime.infer(msgspec.structs.replace(one, timeout_ms=timeout_ms))
        assert runtime.infer(one).outputs["y"].shape == (1, 3)
        assert runtime.stats()["outstanding_rows"] == 0


def test_a_closed_runtime_refuses_at_once(classifier_fp32: lrai.Artifact) -> None:
    runtime = lrai.Runtime.open(classifier_fp32)
    runtime.close()
    started = time.monotonic()
    for action in (
        lambda: runtime.load(classifier_fp32, name="b"),
        lambda: runtime.unload("classifier"),
        lambda: runtime.infer(classifier_request()),
    ):
        with pytest.raises(lrai.NotReady):
            action()
    assert time.monotonic() - started < 15  # none waits, which would be for 60
    assert runtime.ready() == "dead"


def test_a_runtime_that_drains_is_not_ready_though_it_is_empty() -> None:
    with lrai.Runtime() as runtime:
        assert runtime.ready() == "idle"
        assert runtime.drain()
        assert runtime.ready() == "dead"


def test_a_fork_of_the_process_neither_uses_nor_harms_the_runtime(
    classifier_fp32: lrai.Artifact,
) -> None:
    program = """
import os, sys, time, warnings
import numpy as np
import lrai_core as lrai
warnings.simplefilter("ignore")
runtime = lrai.Runtime.open(sys.argv[1])
request = lrai.InferenceRequest(
    model_name="classifier", inputs={"features": np.zeros((1, 64), np.float32)}
)
open_one = runtime._backend.start(request)
before = os.times().user
child = os.fork()
if not child:
    try:
        runtime.load(sys.argv[1], name="second")
        sys.exit(1)
    except lrai.NotReady:
        open_one.cancel()
    try:
        runtime.infer(request)
    except lrai.NotReady:
        runtime.close()
        sys.exit(7)
    sys.exit(1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
folder = runtime._backend.folder
assert folder.is_dir()
open_one.result(10)
time.sleep(0.5)
used = os.times().user - before
assert used < 0.3, f"its scheduler is at work for nothing: {used} s of .5"
assert runtime.infer(request).outputs["logits"].shape == (1, 10)
print(folder)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, classifier_fp32.path],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not Path(done.stdout.strip()).exists()  # it was never closed, and left nothing behind


def test_short_calls_get_one_thread_and_long_ones_their_share(
    classifier_fp32: lrai.Artifact, minilm_fp32: lrai.Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lrai_core.runtime.embedded.available_cpus", lambda: 8)
    with lrai.Runtime.open(classifier_fp32) as runtime:
        threads = embedded(runtime)._threads
        assert threads(classifier_fp32, classifier_fp32.manifest.variant("fp32"), "m", 1) == 1
        assert threads(minilm_fp32, minilm_fp32.manifest.variant("fp32"), "m", 1) == 4
        assert threads(minilm_fp32, minilm_fp32.manifest.variant("fp32"), "m", 2) == 2


@pytest.mark.parametrize(("ms", "measured_with", "wanted"), [(1.5, 1, 1), (1.5, 8, 8), (0.2, 8, 1)])
def test_what_is_short_with_several_threads_need_not_be_so_with_one(
    ms: float, measured_with: int, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lrai_core.runtime.embedded.available_cpus", lambda: 8)
    made = small_artifact.manifest()
    target = msgspec.structs.replace(made.target, threads=measured_with)
    artifact = lrai.Artifact(Path(), msgspec.structs.replace(made, target=target), "0" * 64)
    point = LatencyPoint(rows=1, length=0, median_ms=ms, spread_ms=0.0)
    variant = msgspec.structs.replace(made.variant("fp32"), latency=(point,))
    with lrai.Runtime() as runtime:
        assert embedded(runtime)._threads(artifact, variant, "m", 1) == wanted


def test_a_deterministic_model_answers_as_if_each_request_were_alone(
    minilm_fp32: lrai.Artifact, minilm_session: onnxruntime.InferenceSession
) -> None:
    assert minilm_fp32.manifest.variant("fp32").batch_effect > 0
    payloads = requests(24, seed=3)
    settings = {"scheduler.deterministic": True}
    with lrai.Runtime() as runtime:
        name = runtime.load(minilm_fp32, settings=settings)
        wanted = [lrai.InferenceRequest(model_name=name, inputs=p) for p in payloads]
        answers = [runtime.result(i) for i in [runtime.submit(one) for one in wanted]]
        assert runtime.stats()["batch_completed"] == len(payloads)
    for payload, answer in zip(payloads, answers, strict=True):
        expected = minilm_session.run(None, payload)[0]
        np.testing.assert_array_equal(answer.outputs["sentence_embedding"], expected)


def test_a_promise_that_no_call_can_keep_is_told(minilm_fp32: lrai.Artifact) -> None:
    with lrai.Runtime() as runtime:
        runtime.load(minilm_fp32, name="a", settings={"scheduler.latency_slo_ms": 500})
        assert "limit_unreachable" not in runtime.stats()
        runtime.load(minilm_fp32, name="b", settings={"scheduler.latency_slo_ms": 0.01})
        assert runtime.stats()["limit_unreachable"] == 1


def test_calls_larger_than_the_queue_are_told(
    classifier_fp32: lrai.Artifact, caplog: pytest.LogCaptureFixture
) -> None:
    settings = lrai.load_config(call={"scheduler.max_queue_rows": 100})
    with lrai.Runtime(settings) as runtime:
        runtime.load(classifier_fp32, name="a", settings={"scheduler.max_batch_rows": 100})
        assert "limit_unreachable" not in runtime.stats()
        runtime.load(classifier_fp32, name="b", settings={"scheduler.max_batch_rows": 200})
        assert runtime.stats()["limit_unreachable"] == 1
    said = "b: limit unreachable (setting max_batch_rows, reason 200 rows, of which 100 may wait"
    assert said in caplog.text


def embedded(runtime: lrai.Runtime) -> Embedded:
    assert isinstance(runtime._backend, Embedded)
    return runtime._backend


def classifier_request(model: str = "classifier") -> lrai.InferenceRequest:
    features = np.zeros((1, 64), np.float32)
    return lrai.InferenceRequest(model_name=model, inputs={"features": features})


def test_nobody_waits_for_the_collector_to_have_its_tensors_back(
    classifier_fp32: lrai.Artifact,
) -> None:
    with lrai.Runtime.open(classifier_fp32) as runtime:
        gc.collect()
        gc.disable()
        try:
            asked = classifier_request()
            (sent,) = asked.inputs.values()
            given = weakref.ref(sent)
            future = embedded(runtime).start(asked)
            answer = weakref.ref(future.result(60).outputs["logits"])
            del asked, sent, future
            wait_until(lambda: given() is None and answer() is None)
        finally:
            gc.enable()
