"""`mlflow deployments … -t lrai`, and a registry flow under traffic, with real processes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import mlflow.deployments
import mlflow.onnx
import numpy as np
import onnx
import pandas as pd
import pytest
from click.testing import CliRunner
from mlflow.deployments import cli
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, Schema
from onnx import numpy_helper

import lrai_core as lrai
import lrai_mlflow
from benchmarks.models import classifier
from benchmarks.processes import HOST, Server, free_ports
from lrai_mlflow.commands.deployed import Deployed
from lrai_mlflow.commands.deployments import Client, run_local, target_help
from lrai_mlflow.serving import DATA
from lrai_report.target import find
from lrai_report.tune import main
from lrai_shared.keys import make_keys
from tests.integration.mlflow_server import own_store, post
from tests.integration.test_deployments import kill_for_good
from tests.integration.test_runtime_faults import wait_until
from tests.own_runtime import daemon_pids, own_runtime
from tests.tiny_models import column_model

pytestmark = pytest.mark.server

ROWS = np.random.default_rng(7).normal(size=(4, 64)).astype(np.float32)


@pytest.fixture(scope="module")
def runtime_folder() -> Iterator[Path]:
    with own_runtime() as folder:
        yield folder


@pytest.fixture
def sockets(runtime_folder: Path) -> Iterator[Path]:
    """Yield the folder of a runtime that serves nothing, whatever became of the tests before."""
    yield runtime_folder
    with lrai.Runtime(address="auto") as runtime:
        for one in runtime.deployments():
            if one.frozen:
                runtime.unfreeze(one.name, "the tests", "this one is over")
            with contextlib.suppress(lrai.ModelNotFound):  # frozen, it was all that was left
                runtime.unload(one.name)
        Deployed(runtime).forget()


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[mlflow.MlflowClient]:
    with own_store(tmp_path_factory.mktemp("tracking")) as client:
        yield client


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("onnx")
    return [classifier(folder / f"{seed}.onnx", seed=seed)[0] for seed in (0, 1)]


@pytest.fixture(scope="module")
def saved(sources: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("saved")
    for number, source in enumerate(sources):
        artifact = lrai.compile(source, out=folder / f"{number}.lrai", threads=1)
        lrai_mlflow.save_model(artifact, folder / f"model-{number}")
    return [folder / f"model-{number}" for number in range(len(sources))]


@pytest.mark.usefixtures("sockets")
def test_columns_that_a_signature_has_as_optional_need_not_be_there(tmp_path: Path) -> None:
    source = column_model(tmp_path / "columns.onnx")
    artifact = lrai.compile(source, out=tmp_path / "m.lrai", threads=1)
    columns = [ColSpec("float", "price"), ColSpec("integer", "count")]
    signature = ModelSignature(Schema([*columns, ColSpec("string", "note", required=False)]))
    lrai_mlflow.save_model(artifact, tmp_path / "bill", signature=signature)
    client = mlflow.deployments.get_deploy_client("lrai")
    client.create_deployment("bill", str(tmp_path / "bill"))
    table = pd.DataFrame({"count": [2, 3], "price": np.array([0.5, 1.5], np.float32)})
    right = mlflow.pyfunc.load_model(tmp_path / "bill").predict(table.astype({"count": np.int32}))
    assert right["total"].tolist() == [1.0, 4.5]
    for given in (table, table.assign(note="in a hurry")):
        told = client.predict("bill", given).get_predictions()
        assert told["total"].tolist() == [1.0, 4.5]
    with pytest.raises(MlflowException, match="'price': missing"):
        client.predict("bill", table.drop(columns="price"))


@pytest.mark.usefixtures("sockets")
def test_the_columns_of_a_table_go_by_their_names(sources: list[Path], tmp_path: Path) -> None:
    """In a file of records they are in any order, and MLflow's own server goes by names, too."""
    names = [f"pixel {number}" for number in range(64)]
    table = pd.DataFrame(ROWS, columns=names)
    artifact = lrai.compile(sources[0], out=tmp_path / "m.lrai", threads=1)
    signature = mlflow.models.infer_signature(table, pd.DataFrame({"logits": [0.5]}))
    lrai_mlflow.save_model(artifact, tmp_path / "named", signature=signature)
    client = mlflow.deployments.get_deploy_client("lrai")
    client.create_deployment("named", str(tmp_path / "named"))
    right = client.predict("named", table).get_predictions()
    turned = client.predict("named", table[names[::-1]].assign(more=1.0)).get_predictions()
    pd.testing.assert_frame_equal(turned, right)
    with pytest.raises(MlflowException, match=r"columns \['pixel 3'\] are missing"):
        client.predict("named", table.drop(columns="pixel 3"))
    # Another deployment of the artifact, by places, is none of its business.
    lrai_mlflow.save_model(artifact, tmp_path / "plain")
    client.create_deployment("plain", str(tmp_path / "plain"))
    client.delete_deployment("plain")
    config = {"require.delta": "0.5"}
    with pytest.raises(MlflowException, match="certificate"):
        client.update_deployment("named", str(tmp_path / "plain"), config=config)
    again = client.predict("named", table[names[::-1]]).get_predictions()
    pd.testing.assert_frame_equal(again, right)
    other = lrai.compile(sources[1], out=tmp_path / "other.lrai", threads=1)
    with lrai.Runtime(address="auto") as runtime:  # as `lrai tune --apply` does
        runtime.swap("named", other)
    right = client.predict("named", table).get_predictions()
    turned = client.predict("named", table[names[::-1]]).get_predictions()
    pd.testing.assert_frame_equal(turned, right)
    # And goes on taking it when a version by places comes beside it.
    client.update_deployment("named", str(tmp_path / "plain"), config={"canary": 0.0})
    turned = client.predict("named", table[names[::-1]]).get_predictions()
    pd.testing.assert_frame_equal(turned, right)
    # Also for who has not the settings that the runtime was started with.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LRAI_RUNTIME_STATE_DIR", str(tmp_path / "elsewhere"))
        other_client = mlflow.deployments.get_deploy_client("lrai")
        turned = other_client.predict("named", table[names[::-1]]).get_predictions()
        pd.testing.assert_frame_equal(turned, right)


@pytest.mark.usefixtures("sockets")
def test_a_table_without_rows_has_an_answer_without_any_as_a_loaded_model_has(
    sources: list[Path], tmp_path: Path
) -> None:
    table = pd.DataFrame(ROWS, columns=[f"pixel {number}" for number in range(64)])
    artifact = lrai.compile(sources[0], out=tmp_path / "m.lrai", threads=1)
    signature = mlflow.models.infer_signature(table, pd.DataFrame({"logits": [0.5]}))
    lrai_mlflow.save_model(artifact, tmp_path / "m", signature=signature)
    client = mlflow.deployments.get_deploy_client("lrai")
    client.create_deployment("empty", str(tmp_path / "m"))
    own = mlflow.pyfunc.load_model(str(tmp_path / "m")).predict(table[:0])
    assert len(own) == len(client.predict("empty", table[:0]).get_predictions()) == 0
    assert client.predict("empty", table[:1]).get_predictions().size
    with pytest.raises(MlflowException, match="no deployment 'other'"):
        client.predict("other", table[:0])


@pytest.fixture
def far(tmp_path: Path) -> Iterator[str]:
    """Yield a target as another machine has it: a runtime that listens, which asks for a key."""
    endpoint, machine = f"tcp://{HOST}:{free_ports(1)[0]}", tmp_path / "ann"
    machine.mkdir()
    make_keys(tmp_path / "keys")
    for file in make_keys(tmp_path / "keys", "ann"):
        shutil.copy(file, machine)
    with own_runtime(LRAI_RUNTIME_MODEL_ROOTS=str(tmp_path)):
        run_lrai("runtime", "start", "--listen", endpoint, "--keys", str(tmp_path / "keys"))
        yield f"lrai:{endpoint}?keys={machine}"


def run_lrai(*arguments: str) -> None:
    program = "from lrai_core.cli import main; main()"
    command = [sys.executable, "-P", "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_on_another_machine_a_table_keeps_its_columns_and_its_rows(
    far: str, sources: list[Path], tmp_path: Path
) -> None:
    names = [f"pixel {number}" for number in range(64)]
    table = pd.DataFrame(ROWS, columns=names)
    signature = mlflow.models.infer_signature(table, pd.DataFrame({"logits": [0.5]}))
    converted = {"lrai_origin": {"source_flavor": "sklearn"}}  # which answers row by row
    models = [tmp_path / f"model-{number}" for number in range(len(sources))]
    for source, model in zip(sources, models, strict=True):
        artifact = lrai.compile(source, out=model.with_suffix(".lrai"), threads=1)
        lrai_mlflow.save_model(artifact, model, signature=signature, metadata=converted)
    mlflow.deployments.get_deploy_client(far).create_deployment("far", str(models[0]))
    client = mlflow.deployments.get_deploy_client(far)  # of a process that has deployed nothing
    right = logits(client, "far")

    def answer(given: pd.DataFrame) -> Any:
        found = client.predict("far", given).get_predictions()
        assert len(found) == len(ROWS)
        return np.stack(list(found["logits"]))

    np.testing.assert_allclose(answer(table), right, atol=1e-5)
    np.testing.assert_allclose(answer(table[names[::-1]].assign(more=1.0)), right, atol=1e-5)
    with pytest.raises(MlflowException, match=r"columns \['pixel 3'\] are missing"):
        client.predict("far", table.drop(columns="pixel 3"))
    # Of a canary nobody knows there where it lies.
    client.update_deployment("far", str(models[1]), config={"canary": "0.25"})
    for _ in range(20):
        np.testing.assert_allclose(answer(table), right, atol=1e-5)
    assert len({str(logits(client, "far")) for _ in range(60)}) == 2, "arrays go to both"
    client.update_deployment("far", config={"rollback": "true"})
    models[0].rename(tmp_path / "aside")
    with pytest.raises(MlflowException, match="only the folder of 'far' says") as refused:
        client.predict("far", table)
    assert refused.value.get_http_status_code() == 400
    assert str(tmp_path) not in refused.value.message
    assert logits(client, "far") == right
    client.delete_deployment("far")


def test_copies_last_as_long_as_the_deployments_do(
    saved: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LRAI_RUNTIME_STATE_DIR", str(tmp_path / "state"))
    with own_runtime() as folder:
        client = mlflow.deployments.get_deploy_client("lrai")
        client.create_deployment("search", str(saved[0]))
        kept = [path for path in tmp_path.rglob("*.lrai") if path.is_dir()]
        assert [path.parent.parent for path in kept] == [tmp_path / "state" / "deployed"]
        assert not list(folder.rglob("*.lrai"))
        left = {"0123.partial", ".0123.lrai.1a2b3c4d"}  # by kills in the middle of a copy
        for part in left:
            (kept[0].parent / part).mkdir()

        def full(_: object, target: Path, **__: object) -> None:
            (target / "part").touch()
            raise shutil.Error([("from", str(target), "[Errno 28] No space left on device")])

        with monkeypatch.context() as patch:
            patch.setattr("lrai_mlflow.commands.deployed.shutil.copytree", full)
            with pytest.raises(MlflowException, match=r"cannot be copied: .* No space left"):
                client.create_deployment("other", str(saved[1]))
        assert {path.name for path in kept[0].parent.glob(".*")} <= left
        assert not list(tmp_path.rglob("part"))
        client.delete_deployment("search")
        assert not list(tmp_path.rglob("*.partial"))
        assert not list(tmp_path.rglob("*.lrai*"))
        assert not list(tmp_path.rglob("*.said"))


def test_what_is_kept_of_a_deployment_is_on_the_disk_before_it_has_its_name(
    saved: list[Path], sockets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, fsync = dict[str, Path](), os.fsync

    def seen(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        synced[path.name] = path
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", seen)
    mlflow.deployments.get_deploy_client("lrai").create_deployment("search", str(saved[0]))
    (said,), (kept,) = sockets.rglob("*.said"), sockets.rglob("deployed/*/*.lrai")
    assert synced[f"{said.stem}.new"].parent == said.parent
    assert synced["manifest.json"].parent.match(f"{kept.parent}/.{kept.name}.*")


@pytest.mark.usefixtures("sockets")
def test_versions_with_other_columns_each_get_theirs(sources: list[Path], tmp_path: Path) -> None:
    names = [f"pixel {number}" for number in range(64)]
    table = pd.DataFrame(ROWS, columns=names)
    turned = onnx.load(sources[0])  # takes the columns the other way round, and says the same
    nodes = turned.graph.node
    (first,) = [i for i, node in enumerate(nodes) if "features" in node.input]
    order = numpy_helper.from_array(np.arange(63, -1, -1), "order")
    turned.graph.initializer.append(order)
    nodes[first].input[list(nodes[first].input).index("features")] = "given"
    gather = onnx.helper.make_node("Gather", ["features", "order"], ["given"], axis=1)
    nodes.insert(0, gather)
    onnx.save(turned, tmp_path / "turned.onnx")
    for label, source, columns in (
        ("one", sources[0], names),
        ("two", tmp_path / "turned.onnx", names[::-1]),
    ):
        artifact = lrai.compile(source, out=tmp_path / f"{label}.lrai", threads=1)
        signature = mlflow.models.infer_signature(table[columns], pd.DataFrame({"logits": [0.5]}))
        lrai_mlflow.save_model(artifact, tmp_path / label, signature=signature)
    client = mlflow.deployments.get_deploy_client("lrai")
    client.create_deployment("both", str(tmp_path / "one"))
    right = client.predict("both", table).get_predictions()
    client.update_deployment("both", str(tmp_path / "two"), config={"canary": 0.5})
    for _ in range(30):
        found = client.predict("both", table).get_predictions()
        np.testing.assert_allclose(found["logits"], right["logits"], atol=1e-4)


@pytest.mark.usefixtures("registry", "sockets")
def test_tune_finds_what_serves_by_the_uri_of_its_model(
    sources: list[Path], tmp_path: Path
) -> None:
    artifact = lrai.compile(sources[0], out=tmp_path / "m.lrai", threads=1)
    with mlflow.start_run():
        lrai_mlflow.log_model(artifact, name="m", registered_model_name="tuned")
    requests = tmp_path / "rows.npz"
    np.savez(requests, features=ROWS)
    with lrai.Runtime() as runtime:
        runtime.load(artifact.path, name="tuned:4f0c")
        served = find("models:/tuned/1", requests, "auto")
        with pytest.raises(lrai.ConditionNotMet, match="none are captured"):
            find("models:/tuned/1", None, "auto")
        runtime.unload("tuned:4f0c")
        alone = find("models:/tuned/1", requests, "auto")
        with pytest.raises(lrai.UsageError, match="is not served, so nothing is captured"):
            main(["models:/tuned/1"])
        tuned = lrai.compile(sources[0], out=tmp_path / "t.lrai", threads=1)
        on, back = map(shlex.split, alone.commands(tuned.path))
        subprocess.run([Path(sys.executable).with_name(on[0]), *on[1:]], check=True, timeout=60)
        answers = [one.version for one in runtime.models() if one.name == "m"]
        done = CliRunner().invoke(cli.commands, back[2:])
        assert done.exit_code == 0, done.output
        answers += [one.version for one in runtime.models() if one.name == "m"]
        runtime.unload("m")
    assert answers == [tuned.version, artifact.version]
    assert (served.name, alone.name) == ("tuned:4f0c", "")
    for one in (served, alone):
        assert one.served is not None
        assert one.served.manifest.signature == artifact.manifest.signature
    assert alone.model.read_bytes() == artifact.file(artifact.manifest.source.file).read_bytes()
    with pytest.raises(lrai.UsageError, match="not found"):
        find("models:/none/1", requests, "auto")

    with mlflow.start_run():
        mlflow.onnx.log_model(onnx.load(sources[0]), name="o", registered_model_name="of_onnx")
    with pytest.raises(lrai.UsageError, match=r"flavors onnx, .*lrai is needed: `lrai mlflow conv"):
        find("models:/of_onnx/1", requests, "auto")


@pytest.fixture
def client(sockets: Path) -> Client:
    found = mlflow.deployments.get_deploy_client("lrai")
    assert isinstance(found, Client)
    return found


def logits(client: Client, name: str = "search") -> Any:
    return client.predict(name, {"features": ROWS})["predictions"]["logits"]


def shares(client: Client, name: str = "search") -> dict[str, float]:
    versions = client.get_deployment(name)["versions"]
    return {version: said["share"] for version, said in versions.items()}


def version_of(model: Path) -> str:
    return lrai_mlflow.load_model(str(model)).version


def test_a_deployment_is_made_updated_rolled_back_and_deleted(
    client: Client, saved: list[Path], sockets: Path
) -> None:
    first, second = map(version_of, saved)
    made = client.create_deployment("search", str(saved[0]), config={"actor.threads": "1"})
    assert (made["name"], made["flavor"]) == ("search", "lrai")
    assert shares(client) == {first: 1.0}
    before = logits(client)
    client.update_deployment("search", str(saved[1]))
    assert shares(client) == {second: 1.0}
    assert client.get_deployment("search")["previous"] == first
    assert logits(client) != before
    client.update_deployment("search", config={"rollback": "true"})
    assert shares(client) == {first: 1.0}
    assert logits(client) == before
    client.delete_deployment("search")
    client.delete_deployment("search")  # what is gone already is no error
    assert client.list_deployments() == []
    assert not list(sockets.rglob("*.lrai"))  # nor is a copy left


def test_what_made_room_is_no_deployment_until_it_is_created_again(
    client: Client, saved: list[Path], sockets: Path
) -> None:
    first, second = map(version_of, saved)
    client.create_deployment("search", str(saved[0]))
    before = logits(client)
    client.update_deployment("search", str(saved[1]))
    (state,) = sockets.rglob("deployments.json")
    (daemon,) = daemon_pids(sockets)
    os.kill(daemon, signal.SIGKILL)
    kept = json.loads(state.read_bytes())
    kept["deployments"]["search"]["away"] = True  # as where others needed its room
    state.write_text(json.dumps(kept))
    assert client.list_deployments() == []
    with pytest.raises(MlflowException, match="no deployment 'search'; there are: none"):
        client.update_deployment("search", str(saved[0]))
    client.create_deployment("search", str(saved[0]))
    assert shares(client) == {first: 1.0}
    assert logits(client) == before
    assert client.get_deployment("search")["previous"] == second


def test_a_prediction_does_not_have_the_runtime_write_to_its_disk(
    client: Client, saved: list[Path]
) -> None:
    """As it does, of all its models, for who asks for deployments and does not say otherwise."""
    client.create_deployment("search", str(saved[0]))
    before, deployments, saves = logits(client), lrai.Runtime.deployments, list[bool]()

    def asked(runtime: lrai.Runtime, *, save: bool) -> Any:
        saves.append(save)
        return deployments(runtime, save=save)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lrai.Runtime, "deployments", lambda _: pytest.fail("it was asked for them"))
        assert logits(client) == before
    with pytest.raises(MlflowException, match="no deployment 'search:1'"):
        logits(client, "search:1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lrai.Runtime, "deployments", asked)
        client.predict("search", pd.DataFrame(ROWS))
        client.update_deployment("search", str(saved[1]), config={"canary": 0.5})
        logits(client)
    assert saves
    assert not any(saves)


def test_what_is_deleted_while_deployments_are_listed_is_not_among_them(
    client: Client, saved: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("search", "gone"):
        client.create_deployment(name, str(saved[0]))
    models = lrai.Runtime.models

    def meanwhile(runtime: lrai.Runtime) -> Any:
        client.delete_deployment("gone")
        return models(runtime)

    with monkeypatch.context() as patch:
        patch.setattr(lrai.Runtime, "models", meanwhile)
        assert [one["name"] for one in client.list_deployments()] == ["search"]


def test_what_was_saved_with_a_model_counts_for_its_deployment(
    client: Client, saved: list[Path], tmp_path: Path
) -> None:
    strict = {"require": {"delta": 0.5}, "actor": {"threads": 1}}
    lrai_mlflow.save_model(saved[0] / DATA, tmp_path / "strict", model_config=strict)
    with pytest.raises(MlflowException, match="certificate"):
        client.create_deployment("search", str(tmp_path / "strict"))
    client.create_deployment("search", str(saved[1]))
    with pytest.raises(MlflowException, match="certificate"):
        client.update_deployment("search", str(tmp_path / "strict"), config={"canary": "0.5"})
    assert shares(client) == {version_of(saved[1]): 1.0}
    client.update_deployment("search", str(saved[0]))
    for _ in range(2):  # the same artifact, of which more is demanded now
        with pytest.raises(MlflowException, match="certificate"):
            client.update_deployment("search", str(tmp_path / "strict"))
    loose = {"actor": {"threads": 1}}
    lrai_mlflow.save_model(saved[0] / DATA, tmp_path / "loose", model_config=loose)
    for _ in range(2):  # it serves so from the first time on
        client.update_deployment("search", str(tmp_path / "loose"))
        assert shares(client) == {f"{version_of(saved[0])}-2": 1.0}


def test_settings_that_a_runtime_does_not_have_as_they_were_saved_are_named(
    client: Client, saved: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    strict = {"limits": {"nan_policy": "reject", "request_rows": 4096}, "actor": {"threads": 1}}
    lrai_mlflow.save_model(saved[0] / DATA, tmp_path / "strict", model_config=strict)
    client.create_deployment("search", str(tmp_path / "strict"))
    told = "limits.nan_policy: the shared runtime keeps what it was started with"
    assert [text for text in caplog.messages if told in text]
    caplog.clear()
    client.update_deployment("search", str(saved[1]))
    assert "keeps what it was started with" not in caplog.text


def test_who_may_not_change_a_frozen_deployment_is_told_how_to(
    client: Client, saved: list[Path]
) -> None:
    client.create_deployment("search", str(saved[0]))
    with lrai.Runtime(address="auto") as runtime:
        runtime.freeze("search", "canary guard", "it failed")
    changes: list[Callable[[], object]] = [
        lambda: client.update_deployment("search", str(saved[1])),
        lambda: client.delete_deployment("search"),
    ]
    for change in changes:
        told = "frozen by canary guard .* it failed; `lrai unfreeze` lets it be changed"
        with pytest.raises(MlflowException, match=told) as refused:
            change()
        assert refused.value.get_http_status_code() == 400
    assert "`lrai unfreeze NAME --by WHO --reason WHY`" in target_help()
    run_lrai("unfreeze", "search", "--by", "ann", "--reason", "looked at")
    client.update_deployment("search", str(saved[1]))
    assert shares(client) == {version_of(saved[1]): 1.0}


@pytest.mark.parametrize("key", ["limits.request_rows", "scheduler.max_queue_rows"])
def test_what_is_no_setting_of_one_model_is_refused(
    client: Client, saved: list[Path], key: str
) -> None:
    with pytest.raises(MlflowException, match=f"{key} is the runtime's, not one model's"):
        client.create_deployment("search", str(saved[0]), config={key: 100_000})
    assert client.list_deployments() == []


def test_a_deployment_answers_more_rows_than_a_request_may_have(
    client: Client, saved: list[Path]
) -> None:
    client.create_deployment("search", str(saved[0]))
    rows = np.tile(ROWS, (1250, 1))
    many = client.predict("search", {"features": rows})["predictions"]["logits"]
    assert len(many) == 5000
    np.testing.assert_allclose(many[4996:], logits(client), atol=1e-5)


def test_a_deployment_answers_them_within_the_limits_of_a_runtime_that_others_started(
    saved: list[Path],
) -> None:
    rows = np.tile(ROWS, (125, 1))
    with own_runtime(LRAI_LIMITS_REQUEST_ROWS="256"):
        client = mlflow.deployments.get_deploy_client("lrai")
        client.create_deployment("search", str(saved[0]))
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("LRAI_LIMITS_REQUEST_ROWS")
            other = mlflow.deployments.get_deploy_client("lrai")
            many = other.predict("search", {"features": rows})["predictions"]["logits"]
        np.testing.assert_allclose(many, np.tile(logits(client), (125, 1)), atol=1e-5)


@pytest.fixture
def frail() -> Iterator[Client]:
    """Yield a client of a runtime that gives a version up after a few deaths."""
    with own_runtime(LRAI_ACTOR_RESTART_LIMIT="1"):
        found = mlflow.deployments.get_deploy_client("lrai")
        assert isinstance(found, Client)
        yield found


def test_where_a_new_version_is_given_up_what_served_before_answers_again(
    frail: Client, saved: list[Path]
) -> None:
    first, second = map(version_of, saved)
    frail.create_deployment("search", str(saved[0]))
    before = logits(frail)
    frail.update_deployment("search", str(saved[1]))
    kill_for_good(frail._runtime, second)
    with pytest.raises(MlflowException) as refused:
        logits(frail)
    assert refused.value.get_http_status_code() == 503
    wait_until(lambda: frail.get_deployment("search")["frozen"] is not None)
    assert "crash guard" in frail.get_deployment("search")["frozen"]
    assert shares(frail) == {first: 1.0}
    assert logits(frail) == before


def test_where_one_of_two_versions_is_given_up_the_other_answers(
    frail: Client, saved: list[Path]
) -> None:
    first, second = map(version_of, saved)
    frail.create_deployment("search", str(saved[0]))
    frail.update_deployment("search", str(saved[1]), config={"canary": "0.25"})
    kill_for_good(frail._runtime, first)
    for _ in range(20):
        assert logits(frail)
    assert shares(frail) == {first: 0.75, second: 0.25}


def test_what_serves_again_meanwhile_is_not_given_the_columns_of_what_was_given_up(
    client: Client, sources: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"pixel {number}" for number in range(64)]
    table = pd.DataFrame(ROWS, columns=names)
    for source, columns in zip(sources, (names, names[::-1]), strict=True):
        artifact = lrai.compile(source, out=tmp_path / f"{columns[0]}.lrai", threads=1)
        signature = mlflow.models.infer_signature(table[columns], pd.DataFrame({"logits": [0.5]}))
        lrai_mlflow.save_model(artifact, tmp_path / columns[0], signature=signature)
    client.create_deployment("search", str(tmp_path / names[0]))
    right = client.predict("search", table).get_predictions()
    client.update_deployment("search", str(tmp_path / names[-1]))
    models = lrai.Runtime.models
    known = [dataclasses.replace(one, state="dead") for one in models(client._runtime)]
    client.update_deployment("search", config={"rollback": "true"})
    late = iter([known])
    monkeypatch.setattr(lrai.Runtime, "models", lambda runtime: next(late, None) or models(runtime))
    found = client.predict("search", table).get_predictions()
    pd.testing.assert_frame_equal(found, right)


def test_other_options_for_what_serves_take_effect_and_loads_leave_nothing_behind(
    client: Client, saved: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    version = version_of(saved[0])
    client.create_deployment("search", str(saved[0]))
    client.update_deployment("search", str(saved[0]))
    assert shares(client) == {version: 1.0}
    client.update_deployment("search", str(saved[0]), config={"actor.threads": "1"})
    assert shares(client) == {f"{version}-2": 1.0}
    with pytest.raises(MlflowException, match="certificate"):
        client.update_deployment("search", str(saved[0]), config={"require.delta": "0.5"})
    assert shares(client) == {f"{version}-2": 1.0}
    assert not any(tmp_path.iterdir())


def test_a_canary_gets_its_share_and_is_promoted(client: Client, saved: list[Path]) -> None:
    first, second = map(version_of, saved)
    client.create_deployment("search", str(saved[0]))
    client.update_deployment("search", str(saved[1]), config={"canary": "0.25"})
    assert shares(client) == {first: 0.75, second: 0.25}
    for share in ("0.4", "0.5", "0.8", "0.75"):
        client.update_deployment("search", config={"canary": share})
        assert shares(client) == {first: 1 - float(share), second: float(share)}
    client.update_deployment("search", config={"rollback": "true"})
    assert shares(client) == {first: 1.0}
    client.update_deployment("search", str(saved[1]), config={"canary": "0.25"})
    client.update_deployment("search", str(saved[1]))
    assert shares(client) == {second: 1.0}


@pytest.mark.parametrize(
    ("operation", "status", "why"),
    [
        (lambda c, m: c.create_deployment("a:b", m), 400, "is no name of a deployment"),
        (lambda c, m: c.create_deployment("", m), 400, "is no name of a deployment"),
        (lambda c, m: c.create_deployment("search", m), 400, "deployment 'search' is there"),
        (lambda c, m: c.create_deployment("b", m, config={"speed": 9}), 400, "unknown setting"),
        (lambda c, m: c.create_deployment("b", m, config={"variant": "x"}), 400, "no variant 'x'"),
        (
            lambda c, m: c.create_deployment("b", m, config={"require.delta": "0.01"}),
            400,
            "certificate",
        ),
        (lambda c, m: c.create_deployment("b", "http://127.0.0.1/m"), 400, "is not read here"),
        (lambda c, m: c.create_deployment("b", "ftp://127.0.0.1/m"), 400, "is not read here"),
        (lambda c, m: c.create_deployment("b", m + "/../nothing"), 404, "nothing"),
        (lambda c, m: c.update_deployment("nobody", m), 404, "no deployment 'nobody'"),
        (
            lambda c, m: c.update_deployment("search", config={"canary": 0.1}),
            400,
            "canary=SHARE takes two",
        ),
        (lambda c, m: c.update_deployment("search", m, config={"canary": "x"}), 400, "no number"),
        (lambda c, m: c.update_deployment("search", m, config={"canary": "nan"}), 400, "no number"),
        (
            lambda c, m: c.update_deployment("search", config={"require.delta": "0.01"}),
            400,
            "require.delta: goes with a model",
        ),
        (lambda c, m: c.update_deployment("search"), 400, "nothing to change: give a model"),
        (lambda c, m: c.update_deployment("search", config={"rollback": "no"}), 400, "rollback is"),
        (lambda c, m: c.update_deployment("search", config={"rollback": "true"}), 400, "go back"),
        (lambda c, m: c.get_deployment("nobody"), 404, "no deployment 'nobody'"),
        (lambda c, m: c.predict("nobody", {"features": ROWS}), 404, "no deployment 'nobody'"),
        (lambda c, m: c.predict("search", {"feature": ROWS}), 400, "no such input"),
        (lambda c, m: c.predict("search", "text"), 400, "needed: values by input name"),
    ],
)
def test_what_cannot_be_done_is_refused_and_changes_nothing(
    client: Client, saved: list[Path], operation: Any, status: int, why: str
) -> None:
    client.create_deployment("search", str(saved[0]))
    before = shares(client)
    with pytest.raises(MlflowException, match=why) as refused:
        operation(client, str(saved[0]))
    assert refused.value.get_http_status_code() == status
    assert shares(client) == before
    assert [one["name"] for one in client.list_deployments()] == ["search"]


def test_a_model_of_another_flavor_is_to_be_converted_first(client: Client, tmp_path: Path) -> None:
    plain = onnx.load(column_model(tmp_path / "columns.onnx"))
    mlflow.onnx.save_model(plain, str(tmp_path / "plain"), pip_requirements=["onnxruntime"])
    with pytest.raises(MlflowException, match="lrai mlflow convert URI"):
        client.create_deployment("plain", str(tmp_path / "plain"))


def test_the_runtime_stays_when_it_dies_and_when_its_clients_are_gone(
    client: Client, saved: list[Path], sockets: Path
) -> None:
    client.create_deployment("search", str(saved[0]))
    before = logits(client)
    (daemon,) = daemon_pids(sockets)
    assert stays(daemon)
    os.kill(daemon, 9)
    assert logits(client) == before
    assert shares(client) == {version_of(saved[0]): 1.0}
    assert all(map(stays, daemon_pids(sockets)))


def stays(daemon: int) -> bool:
    """Return whether a daemon does so without clients."""
    return b"\0stay\0" in Path(f"/proc/{daemon}/cmdline").read_bytes()


def test_the_commands_of_mlflow_do_it_too(saved: list[Path], sockets: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> str:
        done = CliRunner().invoke(cli.commands, [*arguments, "-t", "lrai"])
        assert done.exit_code == 0, done.output
        return done.stdout

    def run_apart(*arguments: str) -> str:  # in a process of its own, of which nothing is left
        command = [sys.executable, "-m", "mlflow", "deployments", *arguments, "-t", "lrai"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "canary=SHARE" in run("help")
    made = run_apart("create", "--name", "cli", "-m", str(saved[0]))
    assert "lrai deployment cli is created" in made
    rows = tmp_path / "rows.json"
    rows.write_text(pd.DataFrame(ROWS).to_json())
    answer = json.loads(run_apart("predict", "--name", "cli", "-I", str(rows)))
    assert len(answer["predictions"]) == len(ROWS) * 10  # as `mlflow.onnx` answers a DataFrame
    update = run("update", "--name", "cli", "-m", str(saved[1]), "-C", "canary=0.5")
    assert "cli is updated (with flavor lrai)" in update
    assert "'cli'" in run("list")
    assert version_of(saved[1]) in run("get", "--name", "cli")
    assert "cli is deleted" in run("delete", "--name", "cli")
    assert "[]" in run("list")


def test_a_model_can_be_tried_locally(saved: list[Path], tmp_path: Path, sockets: Path) -> None:
    command = [sys.executable, "-m", "mlflow", "deployments", "run-local", "-t", "lrai"]
    command += ["--name", "x", "-m", str(saved[0]), "-C", f"host={HOST}", "-C", "port={port}"]
    with Server(command, tmp_path / "log") as server:
        server.wait_until_ready("/ping")
        assert post(server.port, {"inputs": {"features": ROWS.tolist()}}).status == 200


def test_an_option_that_trying_locally_does_not_know_is_named() -> None:
    why = "no option 'prot'; there are host, port, workers"
    with pytest.raises(MlflowException, match=why) as refused:
        run_local("x", "models:/nobodys/1", config={"host": HOST, "prot": "5001"})
    assert refused.value.get_http_status_code() == 400


def test_a_registry_flow_loses_no_request(
    registry: mlflow.MlflowClient, client: Client, sources: list[Path]
) -> None:
    """Log, convert, champion, serve, new version, alias moved, rollback: Must show 5."""
    example = {"features": ROWS}
    for number, source in enumerate(sources, 1):
        with mlflow.start_run():
            logged = mlflow.onnx.log_model(
                onnx.load(source),
                name="plain",
                registered_model_name="plain",
                pip_requirements=["onnxruntime"],
            )
        made = lrai_mlflow.convert(
            f"models:/plain/{logged.registered_model_version}",
            registered_model_name="search",
            threads=1,
        )
        assert str(made.registered_model_version) == str(number)
        tags = registry.get_model_version("search", str(number)).tags
        assert tags["lrai.source_uri"] == f"models:/plain/{number}"
        assert tags["lrai.source_model_id"] == logged.model_id
        assert tags["lrai.source_flavor"] == "onnx"
    champion = "models:/search@champion"
    registry.set_registered_model_alias("search", "champion", "1")
    client.create_deployment("search", champion)
    expected = {}
    for number in (1, 2):
        model = mlflow.pyfunc.load_model(f"models:/search/{number}")
        expected[number] = model.predict(example)["logits"]
    over, failed = threading.Event(), list[str]()
    answered = list[tuple[float, int]]()  # when it was asked, and which version has answered

    def call() -> None:
        mine = mlflow.deployments.get_deploy_client("lrai")
        while not over.is_set():
            begun = time.monotonic()
            try:
                found = np.array(mine.predict("search", example)["predictions"]["logits"])
            except MlflowException as error:
                failed.append(str(error))
                continue
            close = [n for n, e in expected.items() if np.allclose(found, e, rtol=1e-3, atol=1e-3)]
            answered.append((begun, close[0] if close else 0))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        wait_until(lambda: len(answered) > 40, seconds=60)
        for alias in ("2", "1"):  # the new version; and back
            registry.set_registered_model_alias("search", "champion", alias)
            client.update_deployment("search", champion)
            at, updated = len(answered), time.monotonic()
            wait_until(lambda at=at: len(answered) > at + 40, seconds=60)  # type: ignore[misc]
            late = {number for begun, number in answered if begun > updated}
            assert late == {int(alias)}, "who begins now is answered by it"
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert failed == []
    assert {number for _, number in answered} == {1, 2}
    assert len(answered) > 100
