"""An endpoint of many models: loaded, listed, asked and unloaded, in every worker the same."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

import pytest

import lrai_core as lrai
from lrai_deployments.running import memory_bytes
from tests.integration.sagemaker.conftest import JSON, TOKENS, Container, Reply, serving, wait_until
from tests.pause import pause

pytestmark = pytest.mark.server

COLUMNS = {"price": [1.5, 2], "count": [2, 3]}


@pytest.fixture(scope="module")
def root(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder as the platform fills it: a folder per model, with what its tar held."""
    root = tmp_path_factory.mktemp("root")
    for name in ("tokens", "columns"):
        shutil.copytree(models / f"{name}.lrai", root / name / "model" / "model.lrai")
    return root


@pytest.fixture(scope="module")
def container(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    yield from serving(["", "--multi-model", "--workers", "3"], root, tmp_path_factory)


@pytest.fixture
def many(container: Container) -> Iterator[Container]:
    """Yield a container of three workers; what a test has loaded is unloaded after it."""
    yield container
    for name in names(container):
        assert container.send("DELETE", f"/models/{quote(name, safe='')}").status == 200


def load(container: Container, name: str, url: str | Path) -> Reply:
    return container.send("POST", "/models", {"model_name": name, "url": str(url)})


def names(container: Container) -> list[str]:
    return [model["modelName"] for model in container.get("/models").json["models"]]


def test_models_live_as_the_contract_says(many: Container, root: Path) -> None:
    assert many.get("/models").json == {"models": []}
    url = str(root / "tokens" / "model")
    assert load(many, "a", url).status == 200
    for _ in range(10):  # whichever worker answers
        again = load(many, "a", url)
        assert (again.status, again.json) == (409, {"error": "model 'a' is loaded already"})
        assert many.get("/models/a").json == {"modelName": "a", "modelUrl": url}
        assert many.post({"inputs": TOKENS}, "/models/a/invoke").status == 200
    assert load(many, "b", root / "columns" / "model").status == 200
    assert names(many) == ["a", "b"]
    reply = many.post(COLUMNS, "/models/b/invoke")
    assert reply.json == {"outputs": {"total": [3, 6]}}
    assert many.send("DELETE", "/models/a").status == 200
    for method, path in (("DELETE", "/models/a"), ("GET", "/models/a"), ("GET", "/models/c")):
        assert many.send(method, path).status == 404
    for _ in range(10):
        gone = many.post({"inputs": TOKENS}, "/models/a/invoke")
        assert (gone.status, gone.json) == (404, {"error": "model 'a' is not loaded"})
    assert names(many) == ["b"]
    assert load(many, "a", root / "columns" / "model").status == 200  # the name is free
    assert many.post(COLUMNS, "/models/a/invoke").status == 200


def test_boto3_names_the_model_that_it_wants(many: Container, root: Path) -> None:
    assert load(many, "b", root / "columns" / "model").status == 200
    reply = many.boto().invoke_endpoint(
        EndpointName="any", TargetModel="b", Body=json.dumps(COLUMNS), ContentType=JSON
    )
    assert json.loads(reply["Body"].read()) == {"outputs": {"total": [3, 6]}}


@pytest.mark.parametrize("name", ["a b", "../x", "ä", "n" * 512, "a/b", "x:y", "%2e%2e"])
def test_names_are_opaque(many: Container, root: Path, name: str) -> None:
    assert load(many, name, root / "columns" / "model").status == 200
    assert names(many) == [name]
    path = f"/models/{quote(name, safe='')}"
    assert many.post(COLUMNS, f"{path}/invoke").json == {"outputs": {"total": [3, 6]}}
    assert many.send("DELETE", path).status == 200


def test_what_cannot_be_loaded_is_refused_and_the_rest_serves(
    many: Container, root: Path, models: Path, tmp_path: Path
) -> None:
    assert load(many, "b", root / "columns" / "model").status == 200
    (root / "link").unlink(missing_ok=True)
    (root / "link").symlink_to(models)
    (root / "empty").mkdir(exist_ok=True)
    broken = root / "broken" / "model" / "model.lrai"
    shutil.rmtree(root / "broken", ignore_errors=True)
    shutil.copytree(models / "tokens.lrai", broken)
    (file,) = (broken / "variants" / "fp32").glob("*.onnx")
    file.write_bytes(bytes(file.stat().st_size))
    outside = "url leads out of the folder that models lie in"
    cannot = "the model cannot be loaded; the log says why"
    for url, said in (
        ("../../etc", outside),
        ("/etc", outside),
        (str(models / "tokens.lrai"), outside),
        (str(root / "link" / "tokens.lrai"), outside),
        (f"{root}/tokens/../../..", outside),
        (str(root / "empty"), cannot),
        (str(broken.parent), cannot),
    ):
        reply = load(many, "a", url)
        assert (reply.status, reply.json) == (400, {"error": said}), url
    for nothing in ("nothing", "n" * 300, "n/" * 3000):
        nowhere = load(many, "a", root / nothing)
        assert (nowhere.status, nowhere.json) == (404, {"error": "nothing lies at url"})
    assert load(many, "a", "tokens\0").status == 400
    assert load(many, "a\n", root / "tokens" / "model").status == 400
    for body in (b"{", b"{}", b'{"model_name": 1, "url": ""}', b'{"model_name": "", "url": ""}'):
        assert many.send("POST", "/models", body).status == 400
    assert many.send("POST", "/models", b" " * 100_000).status == 413
    assert names(many) == ["b"]
    assert many.get("/ping").status == 200
    assert "has changed" in many.log
    assert "Traceback" not in many.log


def test_names_outlive_the_runtime(many: Container, root: Path) -> None:
    assert load(many, "a", root / "tokens" / "model").status == 200
    assert load(many, "b", root / "columns" / "model").status == 200
    os.kill(many.daemon(), signal.SIGKILL)
    begun = time.monotonic()
    assert many.post({"inputs": TOKENS}, "/models/a/invoke").status == 200
    assert many.post(COLUMNS, "/models/b/invoke").status == 200
    assert time.monotonic() - begun < 60
    assert names(many) == ["a", "b"]
    assert many.get("/ping").status == 200


def test_one_of_many_loads_of_a_name_wins(many: Container, root: Path) -> None:
    replies = list[int]()
    threads = [
        threading.Thread(
            target=lambda: replies.append(load(many, "a", root / "tokens" / "model").status)
        )
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(replies) == [200, 409, 409, 409, 409, 409]


# How much actors share depends on who else runs, so the runtime counts 100 MiB for each.
COUNTED = """
import sys
if "lrai_shared.daemon" in sys.orig_argv:
    from lrai_deployments import running
    running.memory_bytes = lambda pids: len(pids) * 100 << 20
"""


def test_memory_is_kept_and_what_is_at_work_is_not_unloaded_for_it(
    root: Path, tmp_path: Path, sockets: Path
) -> None:
    given, url = [str(root), "--multi-model"], root / "tokens" / "model"
    (tmp_path / "sitecustomize.py").write_text(COUNTED)
    path = [str(tmp_path), os.environ.get("PYTHONPATH", "")]
    variables = {
        "LRAI_RUNTIME_MEMORY_MIB": "250",  # for two of them
        "LRAI_ACTOR_HANG_SECONDS": "60",
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
    }
    with Container([*given, "--workers", "2"], tmp_path, sockets, **variables) as container:
        container.wait_until_ready()
        assert load(container, "a", url).status == 200
        assert load(container, "b", url).status == 200
        assert all(memory_bytes([pid]) > 1 << 20 for pid in actors(container).values())
        assert container.post({"inputs": TOKENS}, "/models/a/invoke").status == 200
        assert load(container, "c", url).status == 200
        assert names(container) == ["a", "c"]  # b was not used for longest
        for _ in range(4):
            assert container.post({"inputs": TOKENS}, "/models/b/invoke").status == 404
            assert container.get("/models/b").status == 404
        stopped, replies = actors(container), list[Reply]()
        for pid in stopped.values():
            pause(pid)
        threads = [
            threading.Thread(
                target=lambda at=f"/models/{name}/invoke": replies.append(
                    container.post({"inputs": TOKENS}, at)
                )
            )
            for name in "ac"
        ]
        for thread in threads:
            thread.start()
        with container.runtime() as runtime:
            wait_until(lambda: runtime.stats()["outstanding_rows"] == 2)
        full = load(container, "d", url)
        assert full.status == 507, full.body
        assert "of 250 MiB" in full.json["error"]
        for pid in stopped.values():
            os.kill(pid, signal.SIGCONT)
        for thread in threads:
            thread.join()
        assert [reply.status for reply in replies] == [200, 200]
        assert load(container, "d", url).status == 200
        assert container.get("/ping").status == 200


def actors(container: Container) -> dict[str, int]:
    """Return the actor of each model, by the platform's name."""
    with container.runtime() as runtime:
        found = {model.name.split(":")[0]: model.actor_pids for model in runtime.models()}
    return {name: pids[0] for name, pids in found.items() if pids}


def test_a_model_that_was_given_up_is_not_loaded_and_may_be_again(
    root: Path, tmp_path: Path, sockets: Path
) -> None:
    """The platform loads what it is told is not; one tenant's model must not end all."""
    tokens, columns = root / "tokens" / "model", root / "columns" / "model"
    variables = {"LRAI_ACTOR_RESTART_LIMIT": "1"}
    with Container([str(root), "--multi-model"], tmp_path, sockets, **variables) as container:
        container.wait_until_ready()

        def give_up() -> None:
            with container.runtime() as runtime:
                while runtime.models()[0].state != "dead":
                    for pid in runtime.models()[0].actor_pids:
                        with suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGKILL)
                    time.sleep(0.02)

        for url in (tokens, columns):  # the same again, and another one in its place
            assert load(container, "a", tokens).status == 200
            assert container.post({"inputs": TOKENS}, "/models/a/invoke").status == 200
            give_up()
            gone = container.post({"inputs": TOKENS}, "/models/a/invoke")
            assert (gone.status, gone.json) == (404, {"error": "model 'a' is not loaded"})
            assert container.get("/models/a").status == 404
            assert names(container) == []
            assert container.get("/ping").status == 200
            assert load(container, "a", url).status == 200
            assert names(container) == ["a"]
            with container.runtime() as runtime:
                assert [model.state for model in runtime.models()] != ["dead"]
                assert len(runtime.models()) == 1
            body = COLUMNS if url == columns else {"inputs": TOKENS}
            assert container.post(body, "/models/a/invoke").status == 200
            assert container.send("DELETE", "/models/a").status == 200


def test_what_was_accepted_is_answered_before_its_model_is_unloaded(
    root: Path, tmp_path: Path, sockets: Path
) -> None:
    variables = {"LRAI_ACTOR_HANG_SECONDS": "60"}
    with Container([str(root), "--multi-model"], tmp_path, sockets, **variables) as container:
        container.wait_until_ready()
        assert load(container, "a", root / "tokens" / "model").status == 200
        actor, replies = actors(container)["a"], dict[str, Reply]()
        pause(actor)

        def ask() -> None:
            replies["ask"] = container.post({"inputs": TOKENS}, "/models/a/invoke")

        def unload() -> None:
            replies["unload"] = container.send("DELETE", "/models/a")

        threads = [threading.Thread(target=ask), threading.Thread(target=unload)]
        with container.runtime() as runtime:
            threads[0].start()
            wait_until(lambda: runtime.stats()["outstanding_rows"] == 1)
            threads[1].start()
            wait_until(lambda: runtime.models() == [])
        assert container.post({"inputs": TOKENS}, "/models/a/invoke").status == 404
        assert replies == {}
        os.kill(actor, signal.SIGCONT)
        for thread in threads:
            thread.join()
        assert {what: reply.status for what, reply in replies.items()} == {
            "ask": 200,
            "unload": 200,
        }
        assert names(container) == []


def test_endpoints_beside_one_another_do_not_meet(
    root: Path, tmp_path: Path, sockets: Path
) -> None:
    (tmp_path / "other").mkdir()
    with (
        Container([str(root), "--multi-model"], tmp_path, sockets) as one,
        Container([str(root), "--multi-model"], tmp_path / "other", sockets) as other,
    ):
        one.wait_until_ready()
        other.wait_until_ready()
        assert load(one, "a", root / "tokens" / "model").status == 200
        assert names(other) == []
        assert load(other, "a", root / "columns" / "model").status == 200
        assert one.send("DELETE", "/models/a").status == 200
        assert other.post(COLUMNS, "/models/a/invoke").status == 200


def test_what_a_container_that_was_killed_had_loaded_the_next_one_lets_go_of(
    root: Path, tmp_path: Path, sockets: Path
) -> None:
    config = lrai.load_config(call={"runtime.socket_dir": str(sockets)})

    def folders() -> list[Path]:
        return list(sockets.glob("lrai-sagemaker-*"))

    def container(name: str) -> Container:
        (tmp_path / name).mkdir()
        return Container([str(root), "--multi-model", "--workers", "2"], tmp_path / name, sockets)

    with (
        lrai.Runtime(config, address="auto") as runtime,  # somebody else's, too
        container("lives") as lives,
        container("killed") as killed,
    ):
        lives.wait_until_ready()
        killed.wait_until_ready()
        for name in ("a", "b"):
            assert load(killed, name, root / "tokens" / "model").status == 200
        assert load(lives, "a", root / "columns" / "model").status == 200
        (kept,) = [one.name for one in runtime.models() if "tokens" not in str(one.signature)]
        assert len(runtime.models()) == len(runtime.deployments()) == 3
        assert killed.stop(signal.SIGKILL) == -signal.SIGKILL
        with container("next") as following:
            following.wait_until_ready()
            wait_until(lambda: len(folders()) == 2)  # its workers go on for a moment
            assert [one.name for one in runtime.deployments()] == [kept]
            assert lives.post(COLUMNS, "/models/a/invoke").status == 200
            assert load(following, "a", root / "tokens" / "model").status == 200
            assert len(runtime.models()) == 2
            assert following.stop() == 0
            wait_until(lambda: [one.name for one in runtime.deployments()] == [kept])
