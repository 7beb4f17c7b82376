"""From a file to an artifact: what is kept, what is refused, what is left behind when it fails."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

import lrai_core as lrai
from benchmarks import models
from lrai_core.artifact import LatencyPoint
from lrai_core.compiler import search
from lrai_core.compiler.compiler import Step
from lrai_core.engine.onnxruntime import OnnxRuntimeSession
from lrai_core.errors import ArtifactError, CalibrationError, EngineError, UnsupportedOperator
from lrai_core.verifier.sample import load_rows
from tests.core.compiler.onnx_files import linear, model, save, value

Rows = dict[str, Any]
Compile = Callable[..., lrai.Artifact]


@pytest.fixture
def rows() -> Rows:
    return {"x": np.random.default_rng(1).standard_normal((400, 8)).astype(np.float32)}


@pytest.fixture
def make(tmp_path: Path) -> Compile:
    """Compile `linear()` into `tmp_path/m.lrai` with one thread."""

    def compile_linear(**arguments: Any) -> lrai.Artifact:
        path = save(arguments.pop("proto", None) or linear(), tmp_path / "m.onnx")
        return lrai.compile(path, out=tmp_path / "m.lrai", **{"threads": 1, **arguments})

    return compile_linear


def log(artifact: lrai.Artifact) -> list[dict[str, Any]]:
    text = (artifact.path / "quantization.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def judged_and_refused(artifact: lrai.Artifact) -> list[str]:
    """Return the forms that were fast enough for the gate, and did not pass it."""
    lines = [line for line in log(artifact) if line["event"] == "candidate" and not line["kept"]]
    return [line["form"] for line in lines if "98% needed" in line["why"]]


def left_behind(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "m.onnx")


def test_without_data_only_fp32_is_kept_and_a_sentence_says_what_data_buys(make: Compile) -> None:
    artifact = make()
    assert [variant.id for variant in artifact.variants] == ["fp32"]
    assert any("--evaluation" in line.get("why", "") for line in log(artifact))
    assert lrai.certificates(artifact) == []


def test_of_rows_whose_answers_do_not_fit_into_memory_some_are_left_out(
    make: Compile, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six times: those of the source, alone and in batches, are to fill half of it."""
    free, nbytes = "lrai_core.compiler.compiler.available_bytes", 4 * np.dtype(np.float32).itemsize
    monkeypatch.setattr(free, lambda: 6 * nbytes * 300)
    artifact = make(evaluation=rows)
    told = [str(line.get("why")) for line in log(artifact)]
    assert "100 rows left out: memory lacks for their answers" in told
    gated = artifact.manifest.variants[0].gate
    assert gated is not None
    assert gated.rows == 240
    monkeypatch.setattr(free, lambda: 6 * nbytes * 100)
    shutil.rmtree(artifact.path)
    with pytest.raises(CalibrationError, match="is left with 80 and needs 149"):
        make(evaluation=rows)


def test_a_model_that_answers_nan_is_refused_with_that_as_a_reason(
    make: Compile, rows: Rows
) -> None:
    """Nobody has stated axes, and those that were found are right."""
    nodes = [helper.make_node("Sqrt", ["x"], ["y"])]
    proto = model(nodes, [value("x", ["batch", 8])], [value("y", ["batch", 8])], [])
    with pytest.raises(lrai.CompileError, match="or it answers NaN"):
        make(proto=proto, evaluation=rows)


def test_forms_are_measured_and_judged_in_the_calls_that_come_most(
    make: Compile, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, run = set[int](), OnnxRuntimeSession.run

    def counted(session: OnnxRuntimeSession, arrays: Any, outputs: Any = None) -> Any:
        seen.add(len(arrays[0]))
        return run(session, arrays, outputs)

    monkeypatch.setattr(OnnxRuntimeSession, "run", counted)
    artifact = make(evaluation=rows, calls=[(7, 0), (1, 0), (61, 0)])
    assert {7, 61} <= seen
    assert artifact.manifest.signature.calls == ((7, 0), (1, 0), (61, 0))
    measured = artifact.manifest.variant("fp32").latency
    assert {one.rows for one in measured if one.named} == {1, 7, 61}
    assert {one.rows for one in measured if not one.named} == {2, 4, 8, 16, 32}


@pytest.mark.parametrize(
    ("calls", "said"),
    [([(330, 0)], "calls: 330x0: too few rows that judge are as short"), ([(8, 3)], "rows alone")],
)
def test_a_call_that_cannot_be_judged_is_refused(
    make: Compile, rows: Rows, calls: list[tuple[int, int]], said: str
) -> None:
    with pytest.raises((CalibrationError, lrai.UsageError), match=said):
        make(evaluation=rows, calls=calls)


def test_when_the_minutes_are_up_the_best_so_far_is_kept(make: Compile, rows: Rows) -> None:
    """fp32 is always made, and judged."""
    artifact = make(evaluation=rows, minutes=1e-9)
    assert [variant.id for variant in artifact.manifest.variants] == ["fp32"]
    assert artifact.manifest.variants[0].gate is not None
    assert any("the minutes are up" in str(line.get("why")) for line in log(artifact))


@pytest.mark.parametrize(
    "made", [["fp32", "late and broken", "int8-row"], ["late and broken", "fp32", "int8-row"]]
)
def test_when_the_minutes_are_up_no_more_is_made_after_what_cannot_be_loaded(
    made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless nothing could, as there is fp32 in any case."""
    clock = [0.0]
    monkeypatch.setattr(search, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def load(graph: Path, **_: Any) -> None:
        if graph.name == "late and broken":
            clock[0] = 2.0
            raise ArtifactError("no")

    def forms(*_: Any) -> Iterator[search.Built]:
        yield from (search.Built(form, "", Path(form), 0) for form in made)

    builder: Any = SimpleNamespace(engine=SimpleNamespace(load=load), build=forms)
    material: Any = SimpleNamespace(until=1.0, threads=1)
    refused = list[str]()
    found = search.build(builder, material, lambda _: None, lambda form, _: refused.append(form))
    assert [candidate.form for candidate in found] == ["fp32"]
    assert refused[-1] == f"what follows {made[1]}"


def test_what_is_kept_gives_the_source_models_answers(make: Compile, rows: Rows) -> None:
    artifact = make(evaluation=rows, keep=9)
    expected = onnxruntime.InferenceSession(linear().SerializeToString()).run(None, rows)[0]
    with lrai.Runtime.open(artifact) as runtime:
        answer = runtime.infer(lrai.InferenceRequest(model_name="m", inputs=rows))
    close = np.linalg.norm(answer.outputs["y"] - expected, axis=1)
    assert (close <= 0.01 * np.linalg.norm(expected, axis=1)).mean() >= 0.98


def test_every_decision_is_in_the_log(make: Compile, rows: Rows) -> None:
    artifact = make(evaluation=rows, keep=9)
    forms = {line["form"].split()[0] for line in log(artifact) if line["event"] == "candidate"}
    mixed = {f"int8-smooth-{share}" for share in (30, 60)}
    mixed |= {f"int8-row-{share}" for share in (50, 65, 80)}
    others = {"int8-smooth", "int8-row", "int8-block32", "int8-block128", "int8-static"}
    others |= {"int8-smooth-static", "int8-smooth-static-inner"}
    others |= {f"int8-static-{which}" for which in (25, 50, 80, 95, "inner", "tensor")}
    assert forms == {"fp32"} | mixed | others
    assert all(line["why"] for line in log(artifact) if line["event"] == "candidate")
    decision = [line for line in log(artifact) if line["event"] == "decision"]
    assert decision[0]["chosen"] == artifact.manifest.chosen


def test_where_memory_is_wanted_forms_with_four_bits_are_tried(tmp_path: Path) -> None:
    rows = {"x": np.random.default_rng(1).standard_normal((400, 512)).astype(np.float32)}
    path = save(linear(512, 512), tmp_path / "m.onnx")
    artifact = lrai.compile(
        path, out=tmp_path / "m.lrai", threads=1, evaluation=rows, keep=9, objective="memory"
    )
    tried = {line["form"].split()[0] for line in log(artifact) if line["event"] == "candidate"}
    assert {"int4", "int4-mixed-50", "int8-block32"} <= tried
    sizes = {variant.id: variant.size_bytes for variant in artifact.manifest.variants}
    assert sizes[artifact.manifest.chosen] <= 1.04 * min(sizes.values())
    assert artifact.manifest.together == ()


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every form of int8 is twice as fast as fp32, and more so the further it is built from it."""

    def profile(candidates: Sequence[search.Candidate], *_: object) -> None:
        for place, one in enumerate(candidates):
            one.speedup = 1.0 if one.form == "fp32" else 2.0 + place
            ms = 1 / one.speedup
            one.latency = [LatencyPoint(rows=1, length=0, median_ms=ms, spread_ms=0.0)]

    monkeypatch.setattr(search, "profile", profile)


@pytest.mark.usefixtures("fast")
def test_a_form_that_is_worse_than_the_gate_is_not_kept(make: Compile, rows: Rows) -> None:
    """An outlier in one column ruins int8: the other weights of a block or column vanish."""
    proto = linear()
    weight = numpy_helper.to_array(proto.graph.initializer[0]).copy()
    weight[0] *= 1e4
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "w"))
    rows["x"][:, 0] = 0  # the outlier decides the scale and says nothing
    artifact = make(proto=proto, evaluation=rows)
    assert [variant.id for variant in artifact.variants] == ["fp32"]
    assert judged_and_refused(artifact)


def test_a_form_that_does_not_run_in_batches_is_refused_and_the_others_go_on(
    make: Compile, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, refused = OnnxRuntimeSession.run, list[object]()

    def picky(self: Any, inputs: list[Any], outputs: Any = None) -> Any:
        if self in refused and len(inputs[0]) > 1:
            raise EngineError("two rows are too many", invalid=True)
        return run(self, inputs, outputs)

    build = search.build

    def marked(*arguments: Any) -> list[search.Candidate]:
        found = build(*arguments)
        refused.extend(one.session for one in found if one.form == "int8-row")
        return found

    monkeypatch.setattr(OnnxRuntimeSession, "run", picky)
    monkeypatch.setattr(search, "build", marked)
    artifact = make(evaluation=rows)
    assert refused
    why = {line["form"]: line["why"] for line in log(artifact) if line["event"] == "candidate"}
    assert "two rows are too many" in why["int8-row"]
    assert "x fp32" in why["int8-block128"]


@pytest.mark.parametrize(("pace", "kept"), [(0.9, False), (1.03, False), (1.05, True)])
def test_a_form_that_is_no_faster_is_not_kept(
    make: Compile, rows: Rows, monkeypatch: pytest.MonkeyPatch, pace: float, kept: bool
) -> None:
    def profile(candidates: Sequence[search.Candidate], *_: object) -> None:
        for one in candidates:
            one.speedup = 1.0 if one.form == "fp32" else pace
            ms = 1 / one.speedup
            one.latency = [LatencyPoint(rows=1, length=0, median_ms=ms, spread_ms=0.0)]

    monkeypatch.setattr(search, "profile", profile)
    artifact = make(evaluation=rows, keep=9, output_map="l2_normalised")
    assert (len(artifact.variants) > 1) is kept


def test_rows_are_kept_as_many_as_are_wanted_and_certified_on_those(
    make: Compile, rows: Rows
) -> None:
    artifact = make(evaluation=rows, keep_evaluation=160)
    assert [certificate.samples for certificate in lrai.certificates(artifact)][:1] == [160]


def test_forms_are_made_of_rows_from_all_of_the_calibration(
    make: Compile, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which may be sorted by class, and only the first ones may be used."""
    seen, find = list[int](), search.find_builder

    class Seeing:
        def __init__(self, name: str) -> None:
            self._inner = find(name)
            self.engine, self.steps = self._inner.engine, self._inner.steps

        def build(self, material: search.Material, reject: search.Reject) -> Any:
            assert material.sample is not None
            seen.extend(int(row[0][0, 0]) for row in material.sample.rows)
            return self._inner.build(material, reject)

    monkeypatch.setattr(search, "find_builder", Seeing)
    ordered = np.repeat(np.arange(1000, 1500, dtype=np.float32)[:, None], 8, axis=1)
    make(evaluation=rows, calibration={"x": ordered})
    assert sorted(seen) == list(range(1000, 1500))
    assert min(seen[:100]) < 1100
    assert max(seen[:100]) > 1400


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"label": np.arange(400) % 5}, "labels are 0 to 4, classes 0 to 3"),
        ({"label": np.arange(400) % 4, "metric": "top5"}, "top5 says nothing of 4 classes"),
    ],
)
def test_labels_that_do_not_fit_are_refused_before_any_form_is_made(
    make: Compile, rows: Rows, asked: dict[str, Any], message: str
) -> None:
    steps = list[str]()
    with pytest.raises(CalibrationError, match=message):
        make(
            evaluation=rows | {"label": asked.pop("label")},
            max_accuracy_loss=0.05,
            progress=lambda step: steps.append(step.name),
            **asked,
        )
    assert "axes" in steps
    assert "build" not in steps


@pytest.mark.usefixtures("fast")
def test_where_nothing_passes_the_log_says_what_each_operator_of_the_closest_costs(
    make: Compile, rows: Rows
) -> None:
    artifact = make(evaluation=rows, epsilon=1e-9, delta=0.1)
    assert artifact.manifest.chosen == "fp32"
    lines = [line for line in log(artifact) if line["event"] == "operator"]
    searched = {line["form"]: line["gap"] for line in log(artifact) if line["event"] == "searched"}
    closest = min((gap, form) for form, gap in searched.items() if form != "fp32")[1]
    assert {line["variant"] for line in lines} == {closest.split()[0]}
    assert [line["node"] for line in lines] == ["product"]
    assert [line["harm"] for line in lines] == [1.0]


def test_no_rows_are_kept_where_none_may_be_and_then_nothing_is_certified(
    make: Compile, rows: Rows
) -> None:
    artifact = make(evaluation=rows, keep_evaluation=0)
    assert not lrai.certificates(artifact)
    with pytest.raises(lrai.UsageError, match=r"^keep_evaluation is -1, at least 0 is needed$"):
        make(evaluation=rows, keep_evaluation=-1)


def test_an_older_opset_is_upgraded_with_a_message(make: Compile) -> None:
    artifact = make(proto=linear(opset=11))
    assert artifact.manifest.source.opset == 17
    assert any(line.get("why") == "opset 11 upgraded to 17" for line in log(artifact))


def test_an_opset_that_cannot_be_upgraded_is_refused_naming_the_operator(make: Compile) -> None:
    proto = model(
        [helper.make_node("Cast", ["x"], ["y"], to="INT64")],
        [value("x", ["n"])],
        [value("y", ["n"], onnx.TensorProto.INT64)],
        opset=5,
    )
    with pytest.raises(UnsupportedOperator, match=r"opset 5.*Cast"):
        make(proto=proto)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.zeros((0, 8), np.float32)}, "no rows"),
        ({"x": np.zeros((1, 8), np.float32)}, "1 distinct rows"),
        ({"x": np.full((200, 8), np.nan, np.float32)}, "row 0: tensor 'x': holds NaN or infinity"),
        ({"z": np.zeros((200, 8), np.float32)}, "got arrays 'z', needed 'x'"),
        ({"x": np.zeros((200, 7), np.float32)}, r"dimension 1 is 7, \[batch, 8\] is needed"),
        ({"x": np.zeros((200, 8), np.int64)}, "datatype INT64, the model takes FP32"),
        ({"x": np.zeros((200, 8, 1), np.float32)}, r"\[batch, 8\] is needed"),
    ],
)
def test_unusable_evaluation_data_is_refused_in_a_sentence(
    make: Compile, tmp_path: Path, change: Rows, message: str
) -> None:
    with pytest.raises(CalibrationError, match=message):
        make(evaluation=change)
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros((0, 8), np.float32), "no rows"),
        (np.full((200, 8), np.nan, np.float32), "row 0: tensor 'x': holds NaN or infinity"),
        (np.zeros((200, 8), np.int64), "row 0: .*datatype INT64, the model takes FP32"),
        (np.zeros((200, 7), np.float32), r"row 0: .*dimension 1 is 7, \[batch, 8\] is needed"),
    ],
)
def test_unusable_calibration_data_is_refused_in_a_sentence(
    make: Compile, rows: Rows, tmp_path: Path, x: Any, message: str
) -> None:
    with pytest.raises(CalibrationError, match=f"^calibration: {message}"):
        make(evaluation=rows, calibration={"x": x})
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize("count", [1, 200])
def test_of_calibration_that_is_all_the_same_what_can_be_made_is_judged(
    make: Compile, rows: Rows, count: int
) -> None:
    """One row, once or many times, tells no range: the gate says what that is worth."""
    artifact = make(evaluation=rows, calibration={"x": np.full((count, 8), 0.5, np.float32)})
    why = {line["form"]: line["why"] for line in log(artifact) if line["event"] == "candidate"}
    assert "of 1 rows 1 are finite, 2 are needed" in why["int8-smooth"]
    assert "fp32" in {variant.id for variant in artifact.variants}
    assert all(variant.gate and variant.gate.passed for variant in artifact.variants)


def test_labels_must_match_the_rows(make: Compile, rows: Rows) -> None:
    with pytest.raises(CalibrationError, match="different numbers of rows"):
        make(evaluation=rows | {"label": np.zeros(3, np.int64)})


def test_rows_in_calibration_and_evaluation_are_refused(make: Compile, rows: Rows) -> None:
    with pytest.raises(CalibrationError, match="share 1 rows"):
        make(evaluation=rows, calibration={"x": rows["x"][5:6]})


def test_repeated_rows_count_once(make: Compile, rows: Rows) -> None:
    rows["x"][300:] = rows["x"][:100]
    artifact = make(evaluation=rows)
    assert any("100 repeated rows" in line.get("why", "") for line in log(artifact))
    gate = artifact.manifest.variant("fp32").gate
    assert gate is not None
    assert gate.rows == 240


def test_an_output_that_exists_is_not_touched(make: Compile, tmp_path: Path) -> None:
    (tmp_path / "m.lrai").mkdir()
    (tmp_path / "m.lrai" / "mine").write_text("keep")
    with pytest.raises(lrai.UsageError, match="exists"):
        make()
    assert (tmp_path / "m.lrai" / "mine").read_text() == "keep"


@pytest.mark.parametrize("at", ["load", "axes", "build", "profile", "gate", "write"])
def test_ctrl_c_in_any_pass_leaves_nothing_behind(
    make: Compile, rows: Rows, tmp_path: Path, at: str
) -> None:
    def interrupt(step: Step) -> None:
        if step.name == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(evaluation=rows, progress=interrupt)
    assert left_behind(tmp_path) == []


@pytest.mark.usefixtures("fast")
def test_progress_says_what_is_judged_and_what_is_best_so_far(make: Compile, rows: Rows) -> None:
    steps = list[Step]()
    artifact = make(evaluation=rows, progress=steps.append)
    judged = [step.detail for step in steps if step.name == "gate" and "best" in step.detail]
    assert judged[0].endswith("; best so far fp32")
    chosen = artifact.manifest.chosen
    assert judged[-1].startswith(f"{chosen};") or judged[-1].endswith(f"; best so far {chosen}")


@pytest.mark.usefixtures("fast")
def test_epsilon_is_demanded_and_certified(make: Compile, rows: Rows) -> None:
    artifact = make(evaluation=rows, epsilon=1e-9, delta=0.05, output_map="softmax")
    assert artifact.manifest.chosen == "fp32"
    lines = [line for line in log(artifact) if line["event"] == "candidate"]
    refused = [line["why"] for line in lines if line["form"] != "fp32"]
    assert any("beyond epsilon 1e-09" in why for why in refused), refused
    (certificate,) = lrai.certificates(artifact)
    assert (certificate.variant, certificate.epsilon) == ("fp32", 1e-9)


GROUPED = 3000


@pytest.mark.timeout(180)
def test_a_form_that_widens_what_lies_between_groups_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same margin of accuracy, groups refuse the form that is taken without them."""

    def profile(candidates: Sequence[search.Candidate], *_: object) -> None:
        for one in candidates:  # measured, another form might be the one that is worth judging
            one.speedup = 2.0 if one.form == "int8-row" else 1.0
            ms = 1 / one.speedup
            one.latency = [LatencyPoint(rows=1, length=0, median_ms=ms, spread_ms=0.0)]

    monkeypatch.setattr(search, "profile", profile)
    source, rows = models.unequal(tmp_path / "m.onnx", 2_000)
    loose: Any = {"max_accuracy_loss": 0.2, "output_map": "softmax", "threads": 1}
    grouped: Any = {"groups": ["group"], "max_disparity": 0.06}
    ungrouped = {name: rows[name] for name in ("features", "label")}
    free = lrai.compile(source, out=tmp_path / "free.lrai", evaluation=ungrouped, **loose)
    fair = lrai.compile(source, out=tmp_path / "fair.lrai", evaluation=rows, **grouped, **loose)
    why = {line["form"]: line["why"] for line in log(fair) if line["event"] == "candidate"}
    assert "equalised_odds by group goes from" in why["int8-row"]
    assert free.manifest.chosen == "int8-row"
    assert [variant.id for variant in fair.variants] == ["fp32"]
    for variant in fair.variants:
        assert variant.gate is not None
        assert set(variant.gate.groups["group"]) == {"large", "small"}
        bounds = [one.widened_bound for one in variant.gate.disparities]
        assert len(bounds) == 2
        assert all(bound is not None and bound <= 0.06 for bound in bounds)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group": None}, "got arrays 'x', 'label', needed 'x', 'group' and optionally 'label'"),
        ({"label": None}, "groups are judged with labels, 0 and 1"),
        ({"label": np.arange(GROUPED) % 3}, "groups are judged with labels, 0 and 1"),
        ({"group": np.arange(GROUPED)}, "'group' has 3000 groups, 2 to 64 are allowed"),
        ({"group": np.zeros(GROUPED, int)}, "'group' has 1 groups"),
        ({"group": np.zeros((GROUPED, 1), int)}, "must be one text or integer per row, got int64"),
        ({"group": np.zeros(GROUPED)}, "must be one text or integer per row, got float64"),
        ({"group": (np.arange(GROUPED) < 10).astype(str)}, "two groups need 875 rows each"),
    ],
)
def test_groups_that_cannot_be_judged_are_refused_in_a_sentence(
    make: Compile, changes: Rows, message: str
) -> None:
    x = np.random.default_rng(1).standard_normal((GROUPED, 8)).astype(np.float32)
    rows = {"x": x, "label": np.arange(GROUPED) % 2, "group": np.arange(GROUPED) % 2} | changes
    given = {name: column for name, column in rows.items() if column is not None}
    with pytest.raises(CalibrationError, match=message):
        make(evaluation=given, groups=["group"], proto=linear(classes=2))


def test_the_label_may_be_the_group_and_what_is_not_judged_is_said(make: Compile) -> None:
    x = np.random.default_rng(1).standard_normal((GROUPED, 8)).astype(np.float32)
    label = (x[:, 0] > 0).astype(np.int64)
    artifact = make(
        evaluation={"x": x, "label": label},
        groups=["label"],
        proto=linear(classes=2),
        max_accuracy_loss=0.9,
    )
    gate = artifact.manifest.variant("fp32").gate
    assert gate is not None
    assert "insufficient data for equalised_odds by label" in gate.why


def test_groups_need_two_classes(make: Compile) -> None:
    x = np.random.default_rng(1).standard_normal((GROUPED, 8)).astype(np.float32)
    rows = {"x": x, "label": np.arange(GROUPED) % 2, "group": np.arange(GROUPED) % 2}
    with pytest.raises(CalibrationError, match="judged between 2 classes, not 4"):
        make(evaluation=rows, groups=["group"])


def test_groups_are_judged_by_one_score_a_row_too(make: Compile) -> None:
    """As a credit model has it, of Keras or PyTorch."""
    proto = linear(classes=1)
    x = np.random.default_rng(1).standard_normal((GROUPED, 8)).astype(np.float32)
    label = (x @ numpy_helper.to_array(proto.graph.initializer[0])[:, 0] > 0).astype(np.int64)
    rows = {"x": x, "label": label, "group": np.arange(GROUPED) % 2}
    artifact = make(evaluation=rows, groups=["group"], proto=proto)
    gate = artifact.manifest.variant("fp32").gate
    assert gate is not None
    assert "a score above 0 is 1" in gate.why
    assert {group["accuracy"] for group in gate.groups["group"].values()} == {1.0}


def test_a_row_of_several_steps_is_not_judged_as_rows_of_one(make: Compile, tmp_path: Path) -> None:
    """As of an LSTM of PyTorch, in which steps come first and depend on those before."""
    nodes = [
        helper.make_node("CumSum", ["x", "first"], ["sums"]),
        helper.make_node("MatMul", ["sums", "w"], ["y"]),
    ]
    weights = [numpy_helper.from_array(np.array(0), "first"), linear().graph.initializer[0]]
    x, y = value("x", ["seq", "batch", 8]), value("y", ["seq", "batch", 4])
    proto = model(nodes, [x], [y], weights)
    steps = np.random.default_rng(1).standard_normal((400, 5, 8)).astype(np.float32)
    with pytest.raises(CalibrationError, match=r"\[seq, batch, 8\] is not known to be the batch"):
        make(evaluation={"x": steps}, proto=proto)
    (tmp_path / "axes.toml").write_text("[inputs.x]\n")
    artifact = make(evaluation={"x": steps[:, :, None]}, axes=tmp_path / "axes.toml", proto=proto)
    assert not artifact.manifest.signature.coalescible
    kept = load_rows(artifact.file("evaluation.msgpack.gz"), artifact.manifest.signature)
    assert kept.inputs[0][0].shape == (5, 1, 8)


def test_wrong_arguments_are_refused_with_what_is_allowed(make: Compile, rows: Rows) -> None:
    for arguments, message in (
        ({"metric": "f1"}, "known: top1, top5"),
        ({"output_map": "log"}, "known: raw, softmax, l2_normalised"),
        ({"objective": "size"}, "objective 'size' is unknown; known: latency, memory"),
        ({"keep": 0, "seed": 0}, "^keep is 0, at least 1 is needed$"),
        ({"seed": -1}, "^seed is -1, at least 0 is needed$"),
        ({"threads": -1}, "^threads is -1, at least 0 is needed$"),
        ({"epsilon": 0.1}, "epsilon needs evaluation rows"),
        ({"evaluation": rows, "epsilon": -1.0}, "must be above 0"),
        ({"max_accuracy_loss": 2.0}, "between 0 and 1"),
        ({"delta": 0.0}, "between 0 and 1"),
        ({"groups": ["sex"]}, "groups needs evaluation rows"),
        ({"evaluation": rows, "max_disparity": 1.0}, "between 0 and 1"),
    ):
        with pytest.raises(lrai.UsageError, match=message):
            make(**arguments)


def test_a_model_that_needs_more_memory_than_there_is_is_refused(make: Compile, rows: Rows) -> None:
    """Its constant has a petabyte, more than addresses there are."""
    shape = numpy_helper.from_array(np.array([1 << 24, 1 << 24]), "shape")
    nodes = [
        helper.make_node("ConstantOfShape", ["shape"], ["zeros"]),
        helper.make_node("ReduceSum", ["zeros"], ["total"], keepdims=0),
        helper.make_node("Add", ["x", "total"], ["y"]),
    ]
    proto = model(nodes, [value("x", ["n", 8])], [value("y", ["n", 8])], [shape])
    with pytest.raises(lrai.LraiError, match="onnxruntime cannot") as refused:
        make(proto=proto, evaluation=rows)
    assert refused.value.exit_code == 4


def test_a_model_that_runs_on_real_rows_only_still_compiles(make: Compile) -> None:
    """An embedding of one token refuses the ones that the compiler tries."""
    table = numpy_helper.from_array(np.zeros((1, 4), np.float32), "table")
    proto = model(
        [helper.make_node("Gather", ["table", "ids"], ["y"])],
        [value("ids", ["n"], onnx.TensorProto.INT64)],
        [value("y", ["n", 4])],
        [table],
    )
    artifact = make(proto=proto)
    assert any("does not run on ones" in line.get("why", "") for line in log(artifact))
    with lrai.Runtime.open(artifact) as runtime:
        good = lrai.InferenceRequest(model_name="m", inputs={"ids": np.array([0])})
        assert runtime.infer(good).outputs["y"].shape == (1, 4)
        bad = lrai.InferenceRequest(model_name="m", inputs={"ids": np.array([7])})
        with pytest.raises(lrai.RequestError, match="engine refused"):
            runtime.infer(bad)


def test_weights_are_stored_once_however_many_variants_use_them(tmp_path: Path) -> None:
    path = save(linear(256, 512), tmp_path / "m.onnx")
    artifact = lrai.compile(path, out=tmp_path / "m.lrai", threads=1)
    size = sum(f.stat().st_size for f in artifact.path.rglob("*") if f.is_file())
    assert path.stat().st_size < size < 1.2 * path.stat().st_size


@pytest.mark.timeout(120)
def test_over_2_gb_in_external_data_compiles(tmp_path: Path) -> None:
    """Nine embedding tables of 256 MB that share one sparse file: 2.25 GB of weights."""
    rows_each, tables = 1 << 20, 9
    with (tmp_path / "tables.bin").open("wb") as stream:
        stream.truncate(rows_each * 64 * 4)
    weights = []
    for index in range(tables):
        tensor = onnx.TensorProto(
            name=f"t{index}", data_type=onnx.TensorProto.FLOAT, dims=[rows_each, 64],
            data_location=onnx.TensorProto.EXTERNAL,
        )  # fmt: skip
        for key, text in (("location", "tables.bin"), ("offset", "0"), ("length", "268435456")):
            entry = tensor.external_data.add()
            entry.key, entry.value = key, text
        weights.append(tensor)
    nodes = [helper.make_node("Gather", [f"t{i}", "ids"], [f"g{i}"]) for i in range(tables)]
    nodes.append(helper.make_node("Sum", [f"g{i}" for i in range(tables)], ["y"]))
    proto = model(
        nodes,
        [value("ids", ["batch"], onnx.TensorProto.INT64)],
        [value("y", ["batch", 64])],
        weights,
    )
    artifact = lrai.compile(
        save(proto, tmp_path / "big.onnx"), out=tmp_path / "big.lrai", threads=1
    )
    assert artifact.manifest.variant("fp32").size_bytes > 2 << 30
    with lrai.Runtime.open(artifact) as runtime:
        request = lrai.InferenceRequest(model_name="big", inputs={"ids": np.arange(3)})
        assert runtime.infer(request).outputs["y"].shape == (3, 64)
