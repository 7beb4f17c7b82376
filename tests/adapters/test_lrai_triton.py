"""What a model tells Triton, and what its configuration may say: pure, without a server."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

import lrai_core as lrai
from lrai_core import Signature, TensorSpec
from lrai_core.artifact import LatencyPoint
from lrai_import.built import state_folder
from lrai_triton.config import MAX_BATCH_SIZE, complete
from lrai_triton.hostqueue import HostQueue
from lrai_triton.metrics import Metrics
from lrai_triton.served import execution_of, hold, source_of
from lrai_triton.settings import settings_of
from tests.core import small_artifact


def spec(name: str, datatype: str, shape: tuple[int | str, ...], **more: Any) -> TensorSpec:
    return TensorSpec(name=name, datatype=datatype, shape=shape, **({"batch_axis": 0} | more))


ENCODER = Signature(
    inputs=(
        spec("ids", "INT64", ("batch", "tokens"), length_axis=1),
        spec("flag", "BOOL", ("batch",)),
        spec("text", "BYTES", ("batch", 2)),
    ),
    outputs=(spec("vector", "FP32", ("batch", 384)),),
)
WHOLE = Signature(
    inputs=(spec("image", "UINT8", ("height", 3), batch_axis=None),),
    outputs=(spec("label", "INT32", ("n",), batch_axis=None),),
)
ONE = Signature(
    inputs=(spec("image", "UINT8", (1, "height", 3), batch_axis=None),), outputs=WHOLE.outputs
)


def completed(signature: Signature, **given: Any) -> dict[str, Any]:
    # The fields that Triton fills are always there.
    config: dict[str, Any] = {"name": "m", "max_batch_size": 0, "input": [], "output": []} | given
    complete(config, signature)
    return config


def test_an_empty_configuration_is_filled_from_the_model() -> None:
    config = completed(ENCODER)
    assert config["max_batch_size"] == MAX_BATCH_SIZE
    assert config["dynamic_batching"] == {}
    assert config["input"] == [
        {"name": "ids", "data_type": "TYPE_INT64", "dims": [-1], "allow_ragged_batch": True},
        {
            "name": "flag",
            "data_type": "TYPE_BOOL",
            "dims": [1],
            "reshape": {"shape": []},
            "allow_ragged_batch": False,
        },
        {"name": "text", "data_type": "TYPE_STRING", "dims": [2], "allow_ragged_batch": False},
    ]
    assert config["output"] == [{"name": "vector", "data_type": "TYPE_FP32", "dims": [384]}]


def test_a_model_without_rows_is_not_batched() -> None:
    config = completed(WHOLE)
    assert config["max_batch_size"] == 0
    assert "dynamic_batching" not in config
    assert config["input"] == [{"name": "image", "data_type": "TYPE_UINT8", "dims": [-1, 3]}]


def test_a_tensor_without_dimensions_is_one_number() -> None:
    signature = Signature(inputs=WHOLE.inputs, outputs=(spec("mean", "FP32", (), batch_axis=None),))
    mean = {"name": "mean", "data_type": "TYPE_FP32", "dims": [1]}
    assert completed(signature)["output"] == [mean]
    assert completed(signature, output=[dict(mean)])["output"] == [mean]
    with pytest.raises(
        lrai.UsageError, match=r"output 'mean': dims are \[2\], the model has \[1\]"
    ):
        completed(signature, output=[mean | {"dims": [2]}])


def test_a_model_whose_rows_share_no_call_may_have_them_beside_max_batch_size() -> None:
    config = completed(WHOLE, max_batch_size=4)
    assert config["input"][0]["dims"] == [3]
    assert config["output"][0] == {
        "name": "label", "data_type": "TYPE_INT32", "dims": [1], "reshape": {"shape": []}
    }  # fmt: skip
    assert "dynamic_batching" not in config, "a list would be no call"
    batching = completed(WHOLE, max_batch_size=4, dynamic_batching={})["dynamic_batching"]
    assert batching == {}


@pytest.mark.parametrize(("size", "batched"), [(4, True), (0, False)])
def test_of_a_batch_dimension_is_spoken_where_there_is_one(size: int, *, batched: bool) -> None:
    output = {"name": "label", "data_type": "TYPE_INT32", "dims": [7, 7]}
    with pytest.raises(lrai.UsageError) as caught:
        completed(WHOLE, max_batch_size=size, output=[output])
    assert ("beside the batch dimension" in str(caught.value)) is batched


def test_what_is_written_by_hand_stays() -> None:
    batching = {"max_queue_delay_microseconds": 100}
    tensor = {"name": "ids", "data_type": "TYPE_INT64", "dims": [128]}  # narrower: a promise
    unset: dict[str, Any] = {"data_type": "TYPE_INVALID", "dims": []}
    others = [{"name": name} | unset for name in ("flag", "text")]
    config = completed(
        ENCODER, max_batch_size=8, dynamic_batching=batching, input=[tensor, *others]
    )
    assert (config["max_batch_size"], config["dynamic_batching"]) == (8, batching)
    assert config["input"][0]["dims"] == [128]
    assert config["input"][1]["data_type"] == "TYPE_BOOL"


def test_whole_shapes_beside_max_batch_size_0_mean_no_batch_dimension() -> None:
    tensor = {"name": "vector", "data_type": "TYPE_FP32", "dims": [-1, 384]}
    config = completed(ENCODER, output=[tensor])
    assert config["max_batch_size"] == 0
    assert "dynamic_batching" not in config
    assert config["input"][0]["dims"] == [-1, -1]


def test_outputs_alone_without_their_batch_dimension_are_completed_as_by_onnxruntime() -> None:
    tensor = {"name": "vector", "data_type": "TYPE_FP32", "dims": [384], "label_filename": "l.txt"}
    config = completed(ENCODER, output=[tensor])
    assert config["max_batch_size"] == MAX_BATCH_SIZE
    assert config["input"][0]["dims"] == [-1]


def test_a_number_a_row_written_as_triton_has_it_is_no_whole_shape() -> None:
    signature = Signature(inputs=ENCODER.inputs, outputs=(spec("score", "FP32", ("batch",)),))
    tensor = {"name": "score", "data_type": "TYPE_FP32", "dims": [1], "reshape": {"shape": []}}
    assert completed(signature, output=[tensor])["max_batch_size"] == MAX_BATCH_SIZE


@pytest.mark.parametrize(
    ("signature", "given", "message"),
    [
        (
            ONE,
            {"max_batch_size": 4},
            r"max_batch_size is 4, but rows .* 'image' has \[1, .*: 0 has Triton see whole shapes",
        ),
        (ENCODER, {"response_cache": {"enable": True}}, "response_cache: Triton would keep"),
        (ENCODER, {"output": [{"name": "y"}]}, r"output 'y' is none of .*: it has \['vector'\]"),
        (
            ENCODER,
            {"output": [{"name": "vector", "data_type": "TYPE_FP64"}]},
            "output 'vector': data_type is TYPE_FP64, not TYPE_FP32",
        ),
        (
            ENCODER,
            {"max_batch_size": 8, "output": [{"name": "vector", "dims": ["383"]}]},
            r"output 'vector': dims are \[383\], the model has \[384\] beside the batch dimension",
        ),
        (
            ENCODER,
            {"max_batch_size": 8, "output": [{"name": "vector", "dims": [-1, 384]}]},
            r"dims are \[-1, 384\], the model has \[384\]",
        ),
        (
            ENCODER,
            {
                "max_batch_size": 8,
                "output": [{"name": "vector", "dims": [1], "reshape": {"shape": [5]}}],
            },
            r"reshape are \[5\]",
        ),
        (ENCODER, {"input": [{"name": "ids", "dims": [-1, -1]}]}, "input 'flag' of the model"),
        (ENCODER, {"model_transaction_policy": {"decoupled": True}}, "decoupled"),
        (ENCODER, {"sequence_batching": {"oldest": {}}}, "sequence_batching: sequences are not"),
        (ENCODER, {"sequence_batching": {}}, "sequence_batching: sequences are not"),
        (
            ENCODER,
            {"max_batch_size": 8, "input": [{"name": "flag", "allow_ragged_batch": True}]},
            "input 'flag': allow_ragged_batch, but it has no length axis",
        ),
        (
            ENCODER,
            {"input": [{"name": "ids", "dims": [-1], "optional": True}]},
            "input 'ids': optional, but the model takes no request without",
        ),
    ],
)  # fmt: skip
def test_a_contradiction_names_the_field(
    signature: Signature, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(lrai.UsageError, match=message):
        completed(signature, **given)


def parameters(**given: str) -> dict[str, Any]:
    keys = {key.replace("__", "."): value for key, value in given.items()}
    return {"parameters": {key: {"string_value": value} for key, value in keys.items()}}


def test_parameters_are_settings_of_the_model_the_runtime_and_the_certificate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("LRAI_RUNTIME", raising=False)
    settings = settings_of(
        parameters(
            scheduler__latency_slo_ms="50",
            runtime__socket_dir="/run/lrai",
            require__delta="0.01",
            require__tier="STATISTICAL",
            variant="fp32",
            execution="sender",
            FORCE_CPU_ONLY_INPUT_TENSORS="no",  # another's
        )
    )
    assert settings.asked.own == {"scheduler.latency_slo_ms": "50"}
    assert settings.asked.config.runtime.socket_dir == "/run/lrai"
    assert settings.asked.config.runtime.address == "auto"
    assert settings.asked.require == {"delta": 0.01, "tier": "STATISTICAL"}
    assert (settings.asked.variant, settings.execution) == ("fp32", "sender")


def test_a_variable_says_which_runtime_unless_a_parameter_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LRAI_RUNTIME", "embedded")
    assert settings_of({}).asked.config.runtime.address == "embedded"
    assert settings_of(parameters(runtime__address="/d")).asked.config.runtime.address == "/d"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"execution": "threads"}, "execution is 'threads', allowed: auto, lists, sender, inline"),
        ({"require__delta": "small"}, r"require\.delta is 'small', a number is needed"),
        ({"scheduler__slo": "5"}, r"unknown setting 'scheduler\.slo'"),
        ({"runtime__drain_seconds": "long"}, r"runtime\.drain_seconds is 'long'"),
        ({"scheduler__max_batch_rows": "many"}, r"scheduler\.max_batch_rows is 'many'"),
    ],
)
def test_a_parameter_that_is_not_allowed_is_named(given: dict[str, str], message: str) -> None:
    with pytest.raises(lrai.UsageError, match=message):
        settings_of(parameters(**given))


class Families:
    """Stands for Triton's metrics, which have no memory at first."""

    COUNTER = "counter"

    def __init__(self) -> None:
        self.fails, self.told = 2, Counter[str]()

    def __call__(self, name: str, description: str, kind: str) -> SimpleNamespace:
        assert name in ("lrai_answered_total", "lrai_refused_total"), description
        assert kind == self.COUNTER
        return SimpleNamespace(Metric=self._metric)

    def _metric(self, *, labels: dict[str, str]) -> SimpleNamespace:
        def increment(number: int) -> None:
            self.fails -= 1
            if self.fails >= 0:
                raise RuntimeError("no memory")
            self.told[labels["reason"]] += number

        return SimpleNamespace(increment=increment)


def test_what_could_not_be_told_is_told_later() -> None:
    made = Metrics(SimpleNamespace(MetricFamily=(families := Families())), "m", "1")
    for _ in range(3):
        made.count(lrai.NotReady("no"))
    for told in ({}, {}, {"NotReady": 3}, {"NotReady": 3}):
        made.write()
        assert families.told == told
    made.count(lrai.NotReady("no"))
    made.write()
    assert families.told == {"NotReady": 4}


def test_a_version_directory_holds_one_model(tmp_path: Path) -> None:
    folder = tmp_path / "3"
    folder.mkdir()
    with pytest.raises(lrai.ArtifactError, match=r"version directory 3 holds neither model\.onnx"):
        source_of(folder, "")
    (folder / "model.onnx").touch()
    assert source_of(folder, "").name == "model.onnx"
    (folder / "model.lrai").mkdir()
    with pytest.raises(lrai.ArtifactError, match=r"holds both model\.onnx and model\.lrai"):
        source_of(folder, "")


def test_the_file_that_a_configuration_names_is_the_model(tmp_path: Path) -> None:
    for name in ("model.onnx", "net.onnx", "several/model.onnx"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert source_of(tmp_path, "net.onnx") == tmp_path / "net.onnx"
    assert source_of(tmp_path, "several") == tmp_path / "several" / "model.onnx"
    with pytest.raises(lrai.ArtifactError, match=r"holds neither no\.onnx nor model\.lrai"):
        source_of(tmp_path, "no.onnx")


@pytest.mark.parametrize(
    ("locked", "words"),
    [
        ("1", "EnvironmentProblem: version directory 1: no permission to read it"),
        ("1/model.onnx", "ArtifactError: model.onnx: Permission denied"),
        ("1/model.lrai", "/1/model.lrai: no permission to read it"),
    ],
)
def test_what_may_not_be_read_is_said_to_be_so(tmp_path: Path, locked: str, words: str) -> None:
    (path := tmp_path / locked).parent.mkdir(exist_ok=True)
    if path.suffix == ".onnx":
        path.touch()
    else:
        path.mkdir()
    path.chmod(0)
    program = (
        "import sys\n"
        "from lrai_import.built import artifact_of\n"
        "from lrai_triton.served import *\n"
        "from lrai_triton.settings import settings_of\n"
        "artifact_of(source_of(Path(sys.argv[1]), ''), settings_of({}).asked.config)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "1")]
    # Root reads everything, but not where it is somebody else.
    other = ["unshare", "--user", "--map-user=12345", *command]
    done = subprocess.run(other, capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1].endswith(words), done.stderr


def test_what_is_kept_lies_where_nobody_else_comes(tmp_path: Path) -> None:
    config = lrai.load_config(call={"runtime.state_dir": str(tmp_path / "state")})
    folder = state_folder(config)
    assert folder.stat().st_mode & 0o777 == 0o700
    (folder / "kept").touch()
    assert list(state_folder(config).iterdir()) == [folder / "kept"]
    folder.chmod(0o2770)  # as a pod's fsGroup leaves it: others could have put something there
    assert list(state_folder(config).iterdir()) == []
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(lrai.EnvironmentProblem, match="this user's alone"):
        state_folder(config)


def test_who_loads_from_another_place_does_not_find_what_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = list[str]()
    monkeypatch.setattr("lrai_triton.served.Held", lambda _artifact, _own, name: held.append(name))
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path / "41", tmp_path / "42", Path("42")):
        artifact = lrai.Artifact(folder, small_artifact.manifest(), "0" * 64)
        hold("m:1", artifact, settings_of({"parameters": {}}), "lists")
    assert held[1:] == [held[1], held[1]]
    assert held[0] != held[1]
    for place in ("41", "42"):  # a release's, to which a link leads that is moved
        (tmp_path / "current").unlink(missing_ok=True)
        (tmp_path / "current").symlink_to(tmp_path / place)
        artifact = lrai.Artifact(tmp_path / "current", small_artifact.manifest(), "0" * 64)
        hold("m:1", artifact, settings_of({"parameters": {}}), "lists")
    assert held[3:] == held[:2]


@pytest.mark.parametrize(
    ("parameter", "variable", "refused"),
    [
        *(("100", "", True), ("1e2", "", True), (None, "100", True)),
        *(("0", "100", False), (None, "", False)),
    ],
)
def test_who_has_requests_captured_is_told_that_inline_none_are(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    parameter: str | None,
    variable: str,
    *,
    refused: bool,
) -> None:
    monkeypatch.setattr("lrai_triton.served.Held", lambda _artifact, own, _name: own.here)
    monkeypatch.setenv("LRAI_RUNTIME_CAPTURE_ROWS", variable)
    artifact = lrai.Artifact(tmp_path, small_artifact.manifest(), "0" * 64)
    said = {"runtime__capture_rows": parameter} if parameter else {}

    def held(**more: str) -> object:
        settings = settings_of(parameters(**said, **more))
        return hold("m:1", artifact, settings, execution_of(artifact, settings))

    if refused:
        why = "execution is inline: nothing is captured; leave it auto"
        with pytest.raises(lrai.UsageError, match=why):
            held(execution="inline")
        assert held() is False, "auto has it where requests are captured"
    else:
        assert held(execution="inline") is True


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_what_waited_while_a_list_was_answered_has_less_time_left() -> None:
    clock = Clock()
    queue = HostQueue(settings_of({"max_batch_size": 64}), clock)
    assert queue.take([20_000, 0]) == [19.0, None]  # nobody waited: the way alone
    clock.now += 0.010
    queue.answered()
    clock.now += 0.001
    left = queue.take([20_000] * 11)  # came over the last 11 ms, in order
    assert left == pytest.approx([8.0 + i for i in range(11)])
    queue.answered()
    clock.now += 0.1
    assert queue.take([20_000]) == pytest.approx([19.0]), "the stub had nothing to do"


def test_how_long_lists_before_ran_is_known_and_forgotten() -> None:
    clock, ran = Clock(), []
    queue = HostQueue(settings_of({"max_batch_size": 64}), clock)
    for seconds in (0.4, 0.01, 0.02, 0.3, 0.01):
        queue.take([0, 0])
        ran.append(queue.ran)
        clock.now += seconds
        queue.answered()
        clock.now += 5.0
    assert ran == pytest.approx([0.0, 0.4, 0.2, 0.1, 0.3])


def test_a_full_list_leaves_others_waiting() -> None:
    clock = Clock()
    queue = HostQueue(settings_of({"max_batch_size": 2}), clock)
    queue.take([20_000])
    for waited in (4, 8, 12):
        clock.now += 0.004
        queue.answered()
        first, _ = queue.take([20_000, 20_000])
        assert first == pytest.approx(19.0 - waited)


def test_a_list_is_full_by_its_rows() -> None:
    clock = Clock()
    queue = HostQueue(settings_of({"max_batch_size": 64}), clock)
    queue.take([20_000] * 4, [16] * 4)
    for waited in (4, 8, 12):
        clock.now += 0.004
        queue.answered()
        assert queue.take([20_000] * 4, [16] * 4)[0] == pytest.approx(19.0 - waited)


def test_one_large_request_is_soon_forgotten() -> None:
    clock = Clock()
    queue = HostQueue(settings_of({"max_batch_size": 64}), clock)
    queue.take([20_000], [64])
    left = []
    for _ in range(4):
        clock.now += 0.004
        queue.answered()
        left.append(queue.take([20_000] * 2, [1, 1])[0])
    assert left[-2:] == pytest.approx([15.0, 15.0])


def test_parameters_of_tritons_own_backend_are_left_to_it() -> None:
    names = "memory.enable_memory_arena_shrinkage", "session.use_device_allocator"
    given = {"parameters": {name: {"string_value": "1"} for name in names}}
    assert not settings_of(given).asked.own


def test_instances_are_counted_on_each_gpu() -> None:
    assert settings_of({"instance_group": [{"count": 2, "gpus": [0, 1]}]}).instances == 4


def test_no_call_has_more_rows_than_max_batch_size(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    key = "scheduler.max_batch_rows"

    def rows(size: int, **said: str) -> Any:
        return settings_of({"max_batch_size": size} | parameters(**said)).asked.own.get(key)

    assert rows(4) == 4
    assert rows(64) is rows(0) is None, "as everywhere"
    assert rows(4, scheduler__max_batch_rows="2") == "2"
    assert rows(4, scheduler__max_batch_rows="2e0") == "2e0", "as settings may be written"
    assert not caplog.messages
    assert rows(4, scheduler__max_batch_rows="8") == "8"
    assert "max_batch_rows is 8: calls may exceed max_batch_size, which is 4" in caplog.text
    monkeypatch.setenv("LRAI_SCHEDULER_MAX_BATCH_ROWS", "2")
    assert rows(4) is None, "it is less everywhere"


def test_threads_of_tritons_own_backend_are_ours_unless_ours_are_said() -> None:
    def threads(**said: str) -> Any:
        return settings_of(parameters(**said)).asked.own.get("actor.threads")

    assert threads(intra_op_thread_count="3") == "3"
    assert threads(intra_op_thread_count="0") == "0"
    assert threads(intra_op_thread_count="3", actor__threads="2") == "2"


def test_a_promise_of_the_model_is_the_time_of_who_names_none() -> None:
    slo = {"scheduler.latency_slo_ms": {"string_value": "25"}}
    settings = settings_of({"parameters": slo, "max_batch_size": 64})
    assert HostQueue(settings, Clock()).take([0, 10_000]) == [24.0, 9.0]


@pytest.mark.parametrize(
    ("size", "groups"), [(64, [{"count": 2}]), (64, [{}, {"count": 1}]), (1, []), (0, [])]
)
def test_nothing_is_guessed_of_a_queue_that_others_empty_or_nobody(
    size: int, groups: list[dict[str, Any]]
) -> None:
    clock = Clock()
    queue = HostQueue(settings_of({"instance_group": groups, "max_batch_size": size}), clock)
    for _ in range(3):
        assert queue.take([20_000]) == [19.0]
        clock.now += 0.05
        queue.answered()


def test_how_a_list_is_answered_depends_on_model_instances_and_promise(tmp_path: Path) -> None:
    artifact = lrai.Artifact(tmp_path, small_artifact.manifest(), "0" * 64)
    slow = msgspec.structs.replace(
        artifact.manifest.variants[0],
        latency=[LatencyPoint(rows=1, length=0, median_ms=30.0, spread_ms=0.0)],
    )
    manifest = msgspec.structs.replace(artifact.manifest, variants=[slow])
    promised = {"scheduler.latency_slo_ms": {"string_value": "25"}}

    def execution(
        artifact: lrai.Artifact,
        count: int = 1,
        parameters: dict[str, Any] | None = None,
        size: int = 64,
    ) -> str:
        config = {"instance_group": [{"count": count}], "parameters": parameters or {}}
        return execution_of(artifact, settings_of(config | {"max_batch_size": size}))

    assert execution(artifact) == execution(artifact, 1, promised) == "inline"
    assert execution(artifact, 2) == "lists"
    assert execution(artifact, 2, promised) == "sender"
    large = lrai.Artifact(tmp_path, manifest, "0" * 64)
    assert (execution(large), execution(large, 1, promised)) == ("lists", "sender")
    assert execution(large, 1, {"execution": {"string_value": "inline"}}) == "inline"
    # Where Triton hands over one by one, the runtime shares calls of those that may share them.
    assert (execution(artifact, size=0), execution(large, size=0)) == ("inline", "sender")
    whole = msgspec.structs.replace(manifest, signature=WHOLE)
    assert execution(lrai.Artifact(tmp_path, whole, "0" * 64), size=0) == "lists"
