"""The runner and the functions of the store, in this process; servers are in tests/integration."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, MutableMapping
from http import HTTPStatus
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bentoml
import httpx
import numpy as np
import onnx
import onnxruntime
import pytest
import yaml  # type: ignore[import-untyped]
from bentoml._internal.configuration.containers import BentoMLContainer
from bentoml._internal.context import server_context
from bentoml.exceptions import BentoMLException, NotFound
from prometheus_client.parser import text_string_to_metric_families

import lrai_bentoml
import lrai_core as lrai
from lrai_bentoml.errors import bento_errors, waiting
from lrai_bentoml.guard import Guard
from lrai_bentoml.hooks import _metrics, seconds_of, workers_of
from lrai_bentoml.metrics import exposition
from lrai_import.hosted import Asked
from tests.tiny_models import column_model, token_model

EMBEDDED = {"runtime.address": "embedded", "actor.threads": 1}
TOKENS = {"input_ids": [[3, 14, 15]], "attention_mask": [[1, 1, 1]]}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> lrai.Artifact:
    folder = tmp_path_factory.mktemp("tokens")
    source = token_model(folder / "tokens.onnx")
    return lrai.compile(source, out=folder / "tokens.lrai", threads=1)


@pytest.fixture(scope="module")
def stored(tokens: lrai.Artifact) -> bentoml.Model:
    return lrai_bentoml.save_model("tokens", tokens, labels={"team": "ann"}, metadata={"n": 1})


@pytest.fixture(scope="module")
def runner(stored: bentoml.Model) -> Iterator[lrai_bentoml.Runner]:
    made = lrai_bentoml.runner(str(stored.tag), settings=EMBEDDED)
    yield made
    made.close()


def expected(artifact: lrai.Artifact) -> list[Any]:
    session = onnxruntime.InferenceSession(artifact.path / "source" / "model.onnx")
    return list(session.run(None, {name: np.array(rows) for name, rows in TOKENS.items()}))


@pytest.fixture
def own_config() -> Iterator[None]:
    before = copy.deepcopy(BentoMLContainer.config.get())
    yield
    BentoMLContainer.config.set(before)


class TestStore:
    def test_a_saved_model_says_what_its_manifest_says(
        self, stored: bentoml.Model, tokens: lrai.Artifact
    ) -> None:
        assert stored.info.module == "lrai_bentoml"
        assert stored.info.labels["team"] == "ann"
        assert stored.info.labels["lrai.variant"] == "fp32"
        assert stored.info.labels["lrai.artifact"] == tokens.version
        told: Any = stored.info.metadata
        assert told["n"] == 1
        assert told["lrai"]["manifest_sha256"] == tokens.sha256
        assert [one["name"] for one in told["lrai"]["inputs"]] == ["input_ids", "attention_mask"]
        assert stored.info.context.framework_versions["lrai"] == lrai.__version__

    def test_gate_and_certificate_of_a_compiled_model_are_labels(self, tmp_path: Path) -> None:
        from benchmarks.models import classifier

        model, rows = classifier(tmp_path / "classifier.onnx", seed=0)
        artifact = lrai.compile(
            model, out=tmp_path / "c.lrai", evaluation=rows, output_map="softmax", threads=1
        )
        saved = lrai_bentoml.save_model("gated", artifact.path)
        chosen = artifact.manifest.chosen
        own = [c.id for c in lrai.certificates(artifact) if c.variant == chosen]
        assert saved.info.labels["lrai.variant"] == chosen
        assert saved.info.labels["lrai.certificate"] == (own[0] if own else "none")
        metadata: Any = saved.info.metadata
        told = metadata["lrai"]
        assert set(told["variants"]) == {variant.id for variant in artifact.variants}
        assert set(told["certificates"]) == {c.id for c in lrai.certificates(artifact)}
        for variant in artifact.variants:
            gate = told["variants"][variant.id].get("gate")
            assert (gate is None) == (variant.gate is None)
            assert gate is None or gate["passed"] == (variant.gate and variant.gate.passed)

    def test_what_is_saved_is_found_and_loaded(
        self, stored: bentoml.Model, tokens: lrai.Artifact
    ) -> None:
        assert lrai_bentoml.get("tokens:latest").tag == stored.tag
        assert lrai_bentoml.load_model(stored).sha256 == tokens.sha256
        assert lrai_bentoml.load_model("tokens:latest").sha256 == tokens.sha256

    def test_a_model_of_another_framework_is_refused(self) -> None:
        with bentoml.models.create("foreign", module="bentoml.sklearn"):
            pass
        with pytest.raises(NotFound, match=r"bentoml\.sklearn, not by lrai_bentoml"):
            lrai_bentoml.get("foreign:latest")
        with pytest.raises(NotFound, match=r"not by bentoml\.onnx"):
            lrai_bentoml.import_model("mine", "foreign:latest")

    @pytest.mark.parametrize("tag", ["../tokens", "tokens:../../x", "/etc", "a b"])
    def test_a_tag_cannot_leave_the_store(self, tag: str) -> None:
        with pytest.raises((BentoMLException, ValueError)):
            lrai_bentoml.get(tag)

    def test_what_is_no_artifact_is_not_saved(self, tmp_path: Path) -> None:
        before = len(bentoml.models.list())
        with pytest.raises(BentoMLException, match="manifest"):
            lrai_bentoml.save_model("nothing", tmp_path)
        assert len(bentoml.models.list()) == before

    def test_a_file_that_changed_since_is_found(self, tokens: lrai.Artifact) -> None:
        saved = lrai_bentoml.save_model("changed", tokens)
        graph = Path(saved.path, "model.lrai", "source", "model.onnx")
        graph.write_bytes(graph.read_bytes()[:-1] + b"x")
        with pytest.raises(BentoMLException, match=r"source/model\.onnx"):
            lrai_bentoml.load_model(saved)
        with pytest.raises(BentoMLException, match=r"source/model\.onnx"):
            lrai_bentoml.runner("changed:latest").check()

    def test_a_link_out_of_the_model_is_not_followed(self, tokens: lrai.Artifact) -> None:
        saved = lrai_bentoml.save_model("linked", tokens)
        folder = Path(saved.path, "model.lrai")
        shutil.rmtree(folder)
        folder.symlink_to(tokens.path)
        with pytest.raises(BentoMLException, match="leads out of the model"):
            lrai_bentoml.load_model("linked:latest")

    def test_two_versions_of_lrai_are_named(
        self, tokens: lrai.Artifact, caplog: pytest.LogCaptureFixture
    ) -> None:
        saved = lrai_bentoml.save_model("older", tokens)
        file = Path(saved.path, "model.yaml")
        told = yaml.safe_load(file.read_text())
        told["context"]["framework_versions"]["lrai"] = "0.0.1"
        file.write_text(yaml.safe_dump(told))
        caplog.set_level("WARNING")
        assert lrai_bentoml.load_model("older:latest").sha256 == tokens.sha256
        assert f"saved by lrai 0.0.1, and is served by lrai {lrai.__version__}" in caplog.text
        manifest = Path(saved.path, "model.lrai", "manifest.json")
        content = json.loads(manifest.read_bytes())
        newer = {"schema_version": 9, "lrai_version": "9.9.9"}
        manifest.write_text(json.dumps(content | newer))
        named = f"written by lrai 9.9.9, this is lrai {lrai.__version__}: install that one"
        with pytest.raises(BentoMLException, match=re.escape(named)):
            lrai_bentoml.load_model("older:latest")

    def test_the_lrai_that_saved_a_model_is_that_of_its_code(
        self, tokens: lrai.Artifact, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where it came with a model, its distribution has a version of its own, 0.1.0+g1234."""
        monkeypatch.setattr("lrai_bentoml.commands.saving.version", "{}+g1".format)
        saved = lrai_bentoml.save_model("wheeled", tokens)
        versions = saved.info.context.framework_versions
        assert versions == {"lrai": lrai.__version__, "onnxruntime": "onnxruntime+g1"}

    def test_an_onnx_file_is_imported(self, tmp_path: Path) -> None:
        source = column_model(tmp_path / "columns.onnx")
        saved = lrai_bentoml.import_model("columns", source, options={"threads": 1})
        artifact = lrai_bentoml.load_model(saved)
        assert [spec.name for spec in artifact.manifest.signature.inputs] == ["price", "count"]
        broken = tmp_path / "broken.onnx"
        broken.write_bytes(b"no model")
        with pytest.raises(BentoMLException, match="broken"):
            lrai_bentoml.import_model("broken", broken)
        with pytest.raises(NotFound):
            lrai_bentoml.import_model("missing", tmp_path / "missing.onnx")

    def test_a_model_of_bentoml_onnx_is_imported_with_its_lineage(self, tmp_path: Path) -> None:
        model = onnx.load(column_model(tmp_path / "columns.onnx"))
        with pytest.warns(Warning, match="deprecated"):
            given = bentoml.onnx.save_model("plain", model)
        saved = lrai_bentoml.import_model("compiled", "plain:latest", options={"threads": 1})
        assert saved.info.metadata["source"] == str(given.tag)
        assert saved.info.labels["lrai.variant"] == "fp32"


class TestRunner:
    def test_it_answers_as_bentoml_onnx_does(
        self, runner: lrai_bentoml.Runner, tokens: lrai.Artifact
    ) -> None:
        answer = runner.run(*TOKENS.values())
        assert isinstance(answer, tuple)
        for got, wanted in zip(answer, expected(tokens), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-5)
        by_name = runner.run(**dict(reversed(TOKENS.items())))
        assert isinstance(by_name, tuple)
        for got, wanted in zip(by_name, answer, strict=True):
            np.testing.assert_allclose(got, wanted)

    def test_it_is_awaited(self, runner: lrai_bentoml.Runner, tokens: lrai.Artifact) -> None:
        mean, _ = asyncio.run(runner.async_run([[3, 14, 15]], attention_mask=[[1, 1, 1]]))
        np.testing.assert_allclose(mean, expected(tokens)[0], rtol=1e-5)

    def test_a_model_with_one_output_gives_an_array(self, tmp_path: Path) -> None:
        lrai_bentoml.import_model(
            "one", column_model(tmp_path / "columns.onnx"), options={"threads": 1}
        )
        one = lrai_bentoml.runner("one:latest", settings=EMBEDDED)
        try:
            total = one.run([1.5, 2.0], [2, 3])
        finally:
            one.close()
        assert isinstance(total, np.ndarray)
        assert total.tolist() == [3.0, 6.0]

    def test_an_answer_names_the_model_as_bentoml_does(
        self, runner: lrai_bentoml.Runner, stored: bentoml.Model
    ) -> None:
        inputs = {name: np.array(rows) for name, rows in TOKENS.items()}
        request = lrai.InferenceRequest(model_name="", inputs=inputs, outputs=("mean",))
        for answer in (runner.infer(request), asyncio.run(runner.infer_async(request))):
            assert list(answer.outputs) == ["mean"]
            assert (answer.model_name, answer.model_version) == ("tokens", stored.tag.version)
            assert answer.parameters["variant"] == "fp32"

    @pytest.mark.parametrize(
        ("args", "named", "message"),
        [
            ([[[1]]], {}, "'attention_mask': missing"),
            ([[[1]], [[1]], [[1]]], {}, "got 3 values"),
            ([[[1]], [[1]]], {"input_ids": [[1]]}, "got 2 values, and \\['input_ids'\\] by name"),
            ([[[1]], [[1]]], {"more": [1]}, "no such input"),
            ([[[1.5]], [[1]]], {}, "the model takes INT64"),
            ([[[1], [1, 2]], [[1]]], {}, "different shapes"),
            ([[[1000]], [[1]]], {}, "the engine refused"),
        ],
    )
    def test_what_the_model_does_not_take_is_a_400(
        self, runner: lrai_bentoml.Runner, args: list[Any], named: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(BentoMLException, match=message) as sync:
            runner.run(*args, **named)
        with pytest.raises(BentoMLException, match=message) as awaited:
            asyncio.run(runner.async_run(*args, **named))
        assert {sync.value.error_code, awaited.value.error_code} == {HTTPStatus.BAD_REQUEST}

    @pytest.mark.parametrize(
        ("require", "settings"), [({"epsilon": 0.1}, {}), (None, {"require.epsilon": "0.1"})]
    )
    def test_a_certificate_that_is_demanded_and_missing_is_no_service(
        self, stored: bentoml.Model, require: Any, settings: dict[str, Any]
    ) -> None:
        settings = EMBEDDED | settings
        strict = lrai_bentoml.runner(str(stored.tag), require=require, settings=settings)
        with pytest.raises(BentoMLException, match="certificate"):
            strict.load()
        assert strict.state() == "dead"

    def test_a_setting_that_is_none_is_named(self, stored: bentoml.Model) -> None:
        with pytest.raises(BentoMLException, match=r"actor\.thread"):
            lrai_bentoml.runner(str(stored.tag), settings={"actor.thread": 1}).load()

    def test_what_is_no_number_is_refused_where_the_policy_says_so(self, tmp_path: Path) -> None:
        lrai_bentoml.import_model(
            "numbers", column_model(tmp_path / "columns.onnx"), options={"threads": 1}
        )
        settings = {**EMBEDDED, "limits.nan_policy": "reject"}
        one = lrai_bentoml.runner("numbers:latest", settings=settings)
        try:
            with pytest.raises(BentoMLException, match="price") as refused:
                one.run([float("nan")], [1])
        finally:
            one.close()
        assert refused.value.error_code == HTTPStatus.BAD_REQUEST

    def test_settings_are_those_of_the_folder_in_which_it_was_made(
        self, stored: bentoml.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A service's, while it is imported; the server goes back to where it was started."""
        (tmp_path / "lrai.toml").write_text('[limits]\nnan_policy = "reject"\n')
        monkeypatch.chdir(tmp_path)
        one = lrai_bentoml.runner(str(stored.tag), settings=EMBEDDED)
        monkeypatch.chdir(tmp_path.parent)
        assert one._asked().config.limits.nan_policy == "reject"

    def test_what_was_unloaded_is_not_ready_until_it_is_loaded_again(
        self, stored: bentoml.Model
    ) -> None:
        one = lrai_bentoml.runner(str(stored.tag), settings=EMBEDDED)
        one.load().held.runtime.unload(one.load().held.name)
        assert one.state() == "stalled"
        deadline = time.monotonic() + 30
        while one.state() == "stalled":
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert one.state() in {"ok", "idle"}
        one.close()

    def test_a_missing_model_is_named_and_nothing_is_loaded_before(self) -> None:
        missing = lrai_bentoml.runner("missing:latest")
        with pytest.raises(NotFound, match="missing"):
            missing.check()
        assert missing.state() == "dead"


class TestService:
    def test_a_runner_is_one_of_the_models_of_its_service(self, stored: bentoml.Model) -> None:
        runner = lrai_bentoml.runner("tokens:latest")

        class Plain:
            model = runner

        service: Any = bentoml.service(Plain)
        assert service.models == [runner]
        (info,) = [model.to_info() for model in service.models]
        assert (info.tag, info.alias) == (stored.tag, "tokens:latest")
        assert service.inner().model is runner

    @pytest.mark.parametrize(
        ("settings", "timeout_ms"), [({}, 300_000), ({"scheduler.default_timeout_ms": 5}, 5)]
    )
    def test_its_time_is_that_of_who_states_none(
        self, stored: bentoml.Model, own_config: None, settings: dict[str, Any], timeout_ms: float
    ) -> None:
        class Patient:
            model = lrai_bentoml.runner(str(stored.tag), settings=settings)

        assert Patient.model._asked().config.scheduler.default_timeout_ms in (60_000, timeout_ms)
        service: Any = bentoml.service(traffic={"timeout": 300})(Patient)
        service.inject_config()
        assert Patient.model._asked().config.scheduler.default_timeout_ms == timeout_ms

    @pytest.mark.parametrize(("said", "most"), [({}, 4), ({"scheduler.max_batch_rows": 2}, 2)])
    def test_no_call_has_more_rows_than_its_apis_take(
        self, stored: bentoml.Model, said: dict[str, Any], most: int
    ) -> None:
        class Batched:
            model = lrai_bentoml.runner(str(stored.tag), settings=EMBEDDED | said)

            @bentoml.api(batchable=True, max_batch_size=4)  # type: ignore[untyped-decorator]
            async def first(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> Any:
                return await self.model.async_run(input_ids, attention_mask)

            @bentoml.api(batchable=True)  # type: ignore[untyped-decorator]
            async def second(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> Any:
                return await self.model.async_run(input_ids, attention_mask)

        async def at_once() -> None:
            rows = [np.array(rows) for rows in TOKENS.values()]
            await asyncio.gather(*[Batched.first.func(Batched, *rows) for _ in range(12)])

        before = Batched.model.stats().get("batch_completed", 0)
        asyncio.run(at_once())
        assert Batched.model.stats()["batch_completed"] - before >= 12 / most
        assert Batched.model._asked().own["scheduler.max_batch_rows"] == most
        Batched.model.close()

    @pytest.mark.parametrize("name", ["Heir", "fraud"])
    def test_its_name_may_be_another_one_than_that_of_the_class_that_has_the_model(
        self, stored: bentoml.Model, own_config: None, name: str
    ) -> None:
        class Above:
            model = lrai_bentoml.runner(str(stored.tag))

        class Heir(Above):
            pass

        service: Any = bentoml.service(name=name, workers=1, traffic={"timeout": 300})(Heir)
        service.inject_config()
        assert workers_of({"Above"}) == 1
        assert seconds_of({"Above"}) == 300
        assert Above.model._asked().config.scheduler.default_timeout_ms == 300_000
        assert (workers_of(set()), seconds_of(set())) == (0, 0), "of a model of no service"

    def test_a_model_in_the_place_of_an_inherited_one_is_asked_alone(
        self, stored: bentoml.Model, own_config: None
    ) -> None:
        class Above:
            model = lrai_bentoml.runner("absent:1")

        class Heir(Above):
            model = lrai_bentoml.runner(str(stored.tag))

        heir: Any = Heir
        assert [*heir.lrai_runners.values()] == [Heir.model]

    def test_of_several_it_is_the_one_that_starts(
        self, stored: bentoml.Model, own_config: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        other: Any = bentoml.service(name="other", traffic={"timeout": 500})(type("Other", (), {}))

        class Main:
            model = lrai_bentoml.runner(str(stored.tag), settings=EMBEDDED)
            needed = bentoml.depends(other)

        service: Any = bentoml.service(name="fraud", workers=1, traffic={"timeout": 300})(Main)
        service.inject_config()
        assert workers_of({"Main"}) == 0, "either may be meant"
        assert workers_of({"Main", "fraud"}) == 1
        with monkeypatch.context() as worker:
            worker.setattr(server_context, "service_type", "service")
            assert workers_of({"Main", "fraud"}) == 0, "another's worker would decide otherwise"
        service().lrai_load_model()
        try:
            held = Main.model.load().held
            assert held.settings.config.scheduler.default_timeout_ms == 300_000
        finally:
            Main.model.close()

    @pytest.mark.parametrize("where", ["entry_service", "service"])
    def test_where_it_runs_is_the_same_to_who_starts_workers_and_to_them(
        self, stored: bentoml.Model, own_config: None, monkeypatch: pytest.MonkeyPatch, where: str
    ) -> None:
        """A service that another one depends on is told of itself alone in its workers."""
        told = list[int]()

        def placed(own: Asked, _: lrai.Artifact, processes: int) -> Asked:
            told.append(processes)
            return own

        monkeypatch.setattr(Asked, "placed", placed)

        class Scores:
            model = lrai_bentoml.runner(str(stored.tag), settings=EMBEDDED)

        class Beside:
            pass

        named = bentoml.service(name="fraud", workers=1)
        if where == "service":
            service: Any = named(Scores)
            Beside.needed = bentoml.depends(service)  # type: ignore[attr-defined]
            first: Any = bentoml.service(name="front")(Beside)
        else:
            Scores.needed = bentoml.depends(bentoml.service(name="back")(Beside))  # type: ignore[attr-defined]
            first = service = named(Scores)
        first.inject_config()
        Scores.model._asked()
        monkeypatch.setattr(server_context, "service_type", where)
        service.inject_config()
        service().lrai_load_model()
        Scores.model.close()
        assert told == [0, 0]

    def test_its_class_keeps_the_hooks_that_it_has(self) -> None:
        class Own:
            model = lrai_bentoml.runner("tokens:latest")

            async def __is_ready__(self) -> str:
                return "own"

        assert asyncio.run(Own().__is_ready__()) == "own"
        assert hasattr(Own, "__is_alive__")
        assert hasattr(Own, "__metrics__")

    def test_it_is_as_ready_as_all_its_models(self, runner: lrai_bentoml.Runner) -> None:
        class Both:
            good = runner
            bad = lrai_bentoml.runner("missing:latest")

        class Good:
            good = runner

        async def health(service: Any) -> tuple[bool, bool]:
            return await service.__is_ready__(), await service.__is_alive__()

        assert asyncio.run(health(Good())) == (True, True)
        assert asyncio.run(health(Both())) == (False, False)

    @pytest.mark.parametrize(
        ("stalled", "alive"), [((), True), (("apart",), True), (("inside",), False)]
    )
    def test_it_lives_unless_a_model_in_this_process_hangs(
        self,
        stored: bentoml.Model,
        monkeypatch: pytest.MonkeyPatch,
        stalled: tuple[str, ...],
        alive: bool,
    ) -> None:
        """A process of its own is ended and started again, also where others are in this one."""

        class Both:
            apart = lrai_bentoml.runner(str(stored.tag), settings=EMBEDDED)
            inside = lrai_bentoml.runner(
                str(stored.tag), settings={**EMBEDDED, "actor.isolation": "inline"}
            )

        monkeypatch.setattr(
            lrai_bentoml.Runner,
            "state",
            lambda one: "stalled" if any(one is getattr(Both, name) for name in stalled) else "ok",
        )
        service: Any = Both()
        try:
            assert asyncio.run(service.__is_alive__()) == alive
        finally:
            Both.apart.close()
            Both.inside.close()

    def test_metrics_stand_below_those_of_bentoml(self, runner: lrai_bentoml.Runner) -> None:
        class Good:
            good = runner

        runner.run(**TOKENS)
        service: Any = Good()
        text = asyncio.run(service.__metrics__("own 1\n"))
        assert text.startswith("own 1\n")
        families = {one.name: one for one in text_string_to_metric_families(text)}
        assert families["lrai_runtime_up"].samples[0].value == 1
        assert families["lrai_request_answered"].samples[0].value >= 1
        assert families["lrai_outstanding_rows"].type == "gauge"

    def test_a_runtime_that_does_not_answer_is_said_to_be_down(self) -> None:
        assert "lrai_runtime_up 0.0" in exposition(None)

        def silent() -> dict[str, int]:
            raise lrai.NotReady("the runtime did not answer")

        # Counters without those of the silent one would have gone down.
        one = SimpleNamespace(shared=False, stats=lambda: {"request_answered": 2})
        other = SimpleNamespace(shared=False, stats=silent)
        partly = SimpleNamespace(lrai_runners={"one": one, "other": other})
        text = asyncio.run(_metrics(partly, ""))
        assert "lrai_runtime_up 0.0" in text
        assert "request_answered" not in text
        assert "arena" not in exposition({"arena_blocks": 1, "request_answered": 2})

    @pytest.mark.parametrize(
        ("key", "values", "answered"),
        [
            ("runtime.address", ("/a", "/b"), 2),
            ("runtime.address", ("/a", "/a"), 1),
            ("runtime.address", ("embedded", "embedded"), 2),
            ("runtime.socket_dir", ("/a", "/b"), 2),
            ("runtime.socket_dir", ("/a", "/a"), 1),
        ],
    )
    def test_each_runtime_is_counted_once(
        self,
        stored: bentoml.Model,
        monkeypatch: pytest.MonkeyPatch,
        key: str,
        values: tuple[str, str],
        answered: int,
    ) -> None:
        monkeypatch.delenv("LRAI_RUNTIME", raising=False)
        monkeypatch.setattr(lrai_bentoml.Runner, "stats", lambda _: {"request_answered": 1})
        tag = str(stored.tag)
        made = [lrai_bentoml.runner(tag, settings={key: value}) for value in values]
        runners = dict(zip("ab", made, strict=True))
        text = asyncio.run(_metrics(SimpleNamespace(lrai_runners=runners), ""))
        assert f"lrai_request_answered_total {answered}.0" in text

    def test_what_alerts_go_by_is_there_before_it_happens(self) -> None:
        page = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
        alerts = page.partition("worth an alert")[2].partition("\n\nBentoML's")[0]
        of_bentoml = [row.split(" | ")[-1] for row in alerts.splitlines() if row.startswith("|")]
        names = re.findall(r"lrai_\w+_total", " ".join(of_bentoml))
        assert len(names) == 7
        for name in names:
            assert f"{name} 0.0" in exposition({"outstanding_rows": 0})


def client(app: Any) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app=app)
    return httpx.AsyncClient(transport=transport, base_url="http://lrai")


class TestShortPath:
    def ask(
        self, runner: lrai_bentoml.Runner, method: str, path: str, **more: Any
    ) -> httpx.Response:
        async def asked() -> httpx.Response:
            async with client(lrai_bentoml.asgi_app(runner)) as session:
                return await session.request(method, path, **more)

        return asyncio.run(asked())

    def test_the_protocol_is_answered(
        self, runner: lrai_bentoml.Runner, tokens: lrai.Artifact, stored: bentoml.Model
    ) -> None:
        inputs = [
            {"name": name, "datatype": "INT64", "shape": [1, 3], "data": rows[0]}
            for name, rows in TOKENS.items()
        ]
        for path in ("tokens", f"tokens/versions/{stored.tag.version}"):
            reply = self.ask(
                runner, "POST", f"/v2/models/{path}/infer", json={"id": "7", "inputs": inputs}
            )
            assert reply.status_code == 200, reply.text
            answer = reply.json()
            assert (answer["model_name"], answer["id"]) == ("tokens", "7")
            assert answer["model_version"] == stored.tag.version
            outputs = {one["name"]: one for one in answer["outputs"]}
            np.testing.assert_allclose(
                outputs["mean"]["data"], expected(tokens)[0].ravel(), rtol=1e-5
            )

    def test_models_and_health_are_told(
        self, runner: lrai_bentoml.Runner, stored: bentoml.Model
    ) -> None:
        about = self.ask(runner, "GET", "/v2/models/tokens").json()
        assert about["versions"] == [stored.tag.version]
        assert about["inputs"][0] == {"name": "input_ids", "datatype": "INT64", "shape": [-1, -1]}
        assert self.ask(runner, "GET", "/v2").json()["extensions"] == ["binary_tensor_data"]
        for path in ("health/live", "health/ready", "models/tokens/ready"):
            assert self.ask(runner, "GET", f"/v2/{path}").status_code == 200

    @pytest.mark.parametrize("path", ["nope", "tokens/versions/9", "..%2ftokens"])
    def test_another_model_is_not_found(self, runner: lrai_bentoml.Runner, path: str) -> None:
        reply = self.ask(runner, "POST", f"/v2/models/{path}/infer", json={})
        assert reply.status_code == 404

    def test_a_model_that_cannot_be_loaded_is_503_and_tells_no_path(self) -> None:
        missing = lrai_bentoml.runner("missing:latest")
        reply = self.ask(missing, "POST", "/v2/models/missing/infer", json=TOKENS)
        assert reply.status_code == 503
        assert reply.json() == {"error": "the model is not loaded"}
        assert reply.headers["retry-after"] == "1"
        assert self.ask(missing, "GET", "/v2/health/ready").status_code == 503

    def test_refusals_say_why(self, runner: lrai_bentoml.Runner) -> None:
        reply = self.ask(runner, "POST", "/v2/models/tokens/infer", json={"input_ids": [[1]]})
        assert reply.status_code == 400
        assert "'attention_mask': missing" in reply.json()["error"]


class TestGuard:
    async def play(
        self, app: Any, messages: list[dict[str, Any]], limit: int | None = None
    ) -> list[dict[str, Any]]:
        """Return what is sent to a caller who sends `messages`, and leaves if the last says so."""
        waiting_messages, sent = list(messages), list[dict[str, Any]]()

        async def receive() -> MutableMapping[str, Any]:
            if not waiting_messages:
                await asyncio.Event().wait()
            return waiting_messages.pop(0)

        async def send(message: MutableMapping[str, Any]) -> None:
            sent.append(dict(message))

        guard = Guard(app, limit or 0)
        await guard({"type": "http"}, receive, send)
        return sent

    @staticmethod
    async def echo(scope: Any, receive: Any, send: Any) -> None:
        size, more = 0, True
        while more:
            message = await receive()
            size += len(message.get("body", b""))
            more = message.get("more_body", False)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": str(size).encode()})

    def test_a_body_passes(self) -> None:
        parts: list[dict[str, Any]] = [
            {"type": "http.request", "body": b"abc", "more_body": True},
            {"type": "http.request", "body": b"de"},
        ]
        sent = asyncio.run(self.play(self.echo, parts, 5))
        assert [sent[0]["status"], sent[1]["body"]] == [200, b"5"]

    def test_a_body_over_the_limit_is_refused_before_it_is_read(self) -> None:
        parts = [{"type": "http.request", "body": b"abc", "more_body": True}] * 10
        with pytest.raises(BentoMLException, match="more than the 5 bytes") as refused:
            asyncio.run(self.play(self.echo, parts, 5))
        assert refused.value.error_code == HTTPStatus.REQUEST_ENTITY_TOO_LARGE

    def test_who_leaves_takes_the_request_along(self) -> None:
        ended = list[str]()

        async def slow(scope: Any, receive: Any, send: Any) -> None:
            await receive()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                ended.append("cancelled")
                raise

        parts: list[dict[str, Any]] = [{"type": "http.request"}, {"type": "http.disconnect"}]
        sent = asyncio.run(self.play(slow, parts))
        assert ended == ["cancelled"]
        assert sent[0] == {"type": "http.response.start", "status": 499, "headers": []}

    def test_an_error_that_nobody_answers_is_a_500_at_once_and_goes_to_the_log(self) -> None:
        sent = list[dict[str, Any]]()

        async def broken(scope: Any, receive: Any, send: Any) -> None:
            raise KeyError("a bug")

        async def send(message: MutableMapping[str, Any]) -> None:
            sent.append(dict(message))

        with pytest.raises(KeyError):
            asyncio.run(Guard(broken)({"type": "http"}, asyncio.Event().wait, send))  # type: ignore[arg-type]
        assert [message.get("status") for message in sent] == [500, None]

    def test_what_begins_after_the_answer_is_not_cancelled(self) -> None:
        ended = list[str]()

        async def background(scope: Any, receive: Any, send: Any) -> None:
            await self.echo(scope, receive, send)
            await asyncio.sleep(0.05)
            ended.append("whole")

        parts: list[dict[str, Any]] = [{"type": "http.request"}]

        async def leaving_later() -> None:
            complete = asyncio.Event()

            async def receive() -> MutableMapping[str, Any]:
                if parts:
                    return parts.pop()
                await complete.wait()  # as uvicorn's does
                return {"type": "http.disconnect"}

            async def send(message: MutableMapping[str, Any]) -> None:
                await asyncio.sleep(0)
                if message["type"] == "http.response.body":
                    complete.set()

            await Guard(background)({"type": "http"}, receive, send)

        asyncio.run(leaving_later())
        assert ended == ["whole"]

    def test_who_listens_on_after_the_answer_hears_that_it_was_heard(self) -> None:
        heard = list[str]()

        async def listening(scope: Any, receive: Any, send: Any) -> None:
            await self.echo(scope, receive, send)
            heard.append((await receive())["type"])

        parts: list[dict[str, Any]] = [{"type": "http.request"}]
        asyncio.run(self.play(listening, [*parts, {"type": "http.disconnect"}]))
        assert heard == ["http.disconnect"]

    def test_a_server_that_gives_up_is_heard(self) -> None:
        async def given_up() -> None:
            async def slow(scope: Any, receive: Any, send: Any) -> None:
                await receive()
                await asyncio.Event().wait()

            task = asyncio.ensure_future(self.play(slow, [{"type": "http.request"}]))
            await asyncio.sleep(0.01)
            task.cancel()
            await task

        with pytest.raises(asyncio.CancelledError):
            asyncio.run(given_up())

    def test_an_error_says_when_to_try_again(self) -> None:
        async def full(scope: Any, receive: Any, send: Any) -> None:
            await receive()
            with contextlib.suppress(BentoMLException), bento_errors():
                raise lrai.QueueFull("full", limit=1, retry_after_seconds=1.2)
            own = [(b"retry-after", b"1")]  # as the short path says, too
            await send({"type": "http.response.start", "status": 429, "headers": own})
            await send({"type": "http.response.body"})

        sent = asyncio.run(self.play(full, [{"type": "http.request"}]))
        assert sent[0]["headers"] == [(b"retry-after", b"2")]
        assert waiting.get(None) is None


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (lrai.RequestError("bad"), 400),
        (lrai.QueueFull("full", limit=1, retry_after_seconds=1.2), 429),
        (lrai.ModelNotFound("none"), 404),
        (lrai.DeadlineExceeded("late"), 504),
        (lrai.NotReady("not yet"), 503),
        (lrai.ArtifactError("changed"), 500),
        (lrai.MemoryBudgetExceeded("no room"), 507),
    ],
)
def test_an_error_keeps_its_status(error: lrai.LraiError, status: int) -> None:
    with pytest.raises(BentoMLException, match=str(error)) as raised, bento_errors():
        raise error
    assert raised.value.error_code == status
    assert raised.value.__cause__ is error


def test_an_error_of_a_service_is_not_raised_in_place_of_lrais(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """BentoML notes the class of a status that has none yet."""
    monkeypatch.setattr(BentoMLException, "error_mapping", {**BentoMLException.error_mapping})

    class SoldOut(BentoMLException):
        error_code = HTTPStatus.TOO_MANY_REQUESTS

        def __init__(self, article: str, left: int) -> None:
            super().__init__(f"{left} of {article}")

    assert BentoMLException.error_mapping[HTTPStatus.TOO_MANY_REQUESTS] is SoldOut
    with pytest.raises(BentoMLException, match="full") as raised, bento_errors():
        raise lrai.QueueFull("full", limit=1, retry_after_seconds=1.2)
    assert not isinstance(raised.value, SoldOut)
    assert raised.value.error_code == HTTPStatus.TOO_MANY_REQUESTS


def test_without_bentoml_there_is_a_sentence(tmp_path: Path) -> None:
    program = "import sys; sys.modules['bentoml'] = None; import lrai_bentoml"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert "pip install 'lrai[bentoml]'" in done.stderr
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['bentoml'] = None\n")
    lrai_command = Path(sys.executable).with_name("lrai")
    environment: Mapping[str, str] = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [lrai_command, "bentoml", "init", "x"],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 5
    assert "pip install 'lrai[bentoml]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_serving_imports_no_command_line(tmp_path: Path) -> None:
    heavy = ["typer", "onnxruntime", "lrai_bentoml.commands", "mlflow"]
    program = f"import lrai_bentoml, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
