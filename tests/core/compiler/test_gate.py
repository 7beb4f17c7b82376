"""What passes the gate, what does not, and what it says."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import numpy as np
import pytest

from lrai_core.artifact import GateResult
from lrai_core.compiler.gate import (
    LEVEL,
    Conditions,
    Judged,
    check_labels,
    check_row_count,
    judge,
    run,
    run_alone,
)
from lrai_core.errors import CalibrationError, UsageError
from lrai_core.protocol import Array, OutputMap, Signature, TensorSpec
from lrai_core.verifier.sample import Rows
from lrai_core.verifier.spec import FAR

CLASSES = 6


class Fake:
    """A model whose outputs a function of the batch gives."""

    def __init__(self, function: Callable[[Array], Array]) -> None:
        self._function = function

    def run(self, arrays: Sequence[Array], outputs: Sequence[int] | None = None) -> list[Array]:
        return [self._function(arrays[0])]


def signature(output_map: OutputMap) -> Signature:
    x = TensorSpec(name="x", datatype="FP32", shape=("n", CLASSES), batch_axis=0)
    y = TensorSpec(
        name="y", datatype="FP32", shape=("n", CLASSES), batch_axis=0, output_map=output_map
    )
    return Signature(inputs=(x,), outputs=(y,))


def rows(count: int, *, labelled: bool = False) -> Rows:
    random = np.random.default_rng(0)
    data = random.standard_normal((count, CLASSES)).astype(np.float32)
    labels = data.argmax(axis=1) if labelled else None
    inputs = [[data[i : i + 1]] for i in range(count)]
    return Rows(inputs, labels, [bytes([i % 256]) * 32 for i in range(count)])


def judged(
    function: Callable[[Array], Array],
    sample: Rows,
    output_map: OutputMap = "raw",
    conditions: Conditions | None = None,
) -> Judged:
    reference = run_alone(Fake(lambda x: x), sample, 1, lambda: None)
    model = signature(output_map)
    runs = run(Fake(function), sample, model, 1, lambda: None)
    return judge(runs, reference, sample, model.outputs, conditions or Conditions(), LEVEL)


def ruin(share: float) -> Callable[[Array], Array]:
    """Return a model that answers wrongly on about this share of rows, told by their content."""

    def function(x: Array) -> Array:
        bad = (np.abs(x[:, :1] * 1e4) % 1.0) < share
        return np.where(bad, -x, x).astype(np.float32)

    return function


@pytest.mark.parametrize("output_map", ["raw", "softmax", "l2_normalised"])
def test_a_flawless_form_passes_with_149_rows_and_not_with_148(output_map: OutputMap) -> None:
    assert judged(lambda x: x, rows(149), output_map).result.passed
    found = judged(lambda x: x, rows(148), output_map).result
    assert not found.passed
    assert "about 149 rows of the gate would show it" in found.why


@pytest.mark.parametrize("output_map", ["raw", "softmax", "l2_normalised"])
def test_a_form_that_is_wrong_on_a_tenth_of_rows_fails(output_map: OutputMap) -> None:
    found = judged(ruin(0.1), rows(600), output_map).result
    assert not found.passed
    assert found.agreement is not None
    assert 0.85 < found.agreement < 0.95


def test_each_map_has_its_own_measure() -> None:
    slightly = 1.02  # 2 % off, same class, same direction
    assert not judged(lambda x: x * np.float32(slightly), rows(300), "raw").result.passed
    assert judged(lambda x: x * np.float32(slightly), rows(300), "softmax").result.passed
    assert judged(lambda x: x * np.float32(slightly), rows(300), "l2_normalised").result.passed


def test_nan_never_agrees() -> None:
    for output_map in ("raw", "softmax", "l2_normalised"):
        found = judged(lambda x: x * np.nan, rows(200), output_map).result
        assert found.agreement == 0.0
        assert found.difference["p50"] == FAR


def test_a_form_that_is_right_alone_and_wrong_in_batches_fails() -> None:
    def disturbed(x: Array) -> Array:
        return x if len(x) == 1 else np.roll(x, 1, axis=0)

    found = judged(disturbed, rows(400), "softmax")
    assert found.result.agreement == 1.0
    assert not found.result.passed
    assert "in batches" in found.result.why
    assert found.batch_effect > 1


def test_batch_effect_is_twice_the_largest_seen_and_at_least_1e_4() -> None:
    assert judged(lambda x: x, rows(200)).batch_effect == 1e-4
    nudge = np.float32(0.01)
    found = judged(lambda x: x + nudge * (len(x) > 1), rows(200), "softmax")
    assert found.batch_effect == pytest.approx(0.02, rel=0.06)


def test_nan_that_comes_from_batch_mates_is_an_effect() -> None:
    def spoilt(x: Array) -> Array:
        return x if len(x) == 1 else np.where(np.arange(len(x))[:, None] == 0, np.nan, x)

    assert judged(spoilt, rows(200), "softmax").batch_effect == FAR


def test_labels_bound_the_loss_and_say_how_many_rows_it_would_take() -> None:
    good = judged(lambda x: x, rows(400, labelled=True)).result
    assert good.passed
    assert good.accuracy_loss == 0.0
    few = judged(lambda x: x, rows(300, labelled=True)).result
    assert not few.passed
    assert "368 rows" not in few.why  # 300 flawless rows: the count is an estimate, not a promise
    assert "rows of the gate would show it" in few.why
    bad = judged(ruin(0.05), rows(1000, labelled=True)).result
    assert not bad.passed
    assert bad.accuracy_loss is not None
    assert 0.03 < bad.accuracy_loss < 0.07


def test_top5_forgives_what_top1_does_not() -> None:
    def second(x: Array) -> Array:
        result = x.copy()
        best = x.argmax(axis=1)
        result[np.arange(len(x)), best] = np.sort(x, axis=1)[:, -2] - np.float32(1e-3)
        return result

    sample = rows(500, labelled=True)
    assert not judged(second, sample, conditions=Conditions(metric="top1")).result.passed
    assert judged(second, sample, conditions=Conditions(metric="top5")).result.passed


@pytest.mark.parametrize("labelled", [True, False])
def test_the_score_of_a_label_is_judged_by_the_scores_that_it_is_one_of(labelled: bool) -> None:
    kinds: tuple[tuple[str, int, OutputMap], ...] = (
        ("scores", CLASSES, "softmax"),
        ("score", 1, "derived"),
    )
    specs = [
        TensorSpec(name=name, datatype="FP32", shape=("n", width), batch_axis=0, output_map=kind)
        for name, width, kind in kinds
    ]
    sample, tenth = rows(400, labelled=labelled), np.float32(1.1)

    def told(score: Callable[[Array], Array]) -> Judged:
        reference = [[x, x.max(axis=1, keepdims=True)] for (x,) in sample.inputs]
        run = [[x * tenth, score(x * tenth)] for (x,) in sample.inputs]
        model = Signature(inputs=signature("raw").inputs, outputs=tuple(specs))
        return judge([run], reference, sample, model.outputs, Conditions(), LEVEL)

    assert told(lambda x: x.max(axis=1, keepdims=True)).result.passed
    assert not told(lambda x: x[:, :1] * np.nan).result.passed
    specs[1] = msgspec.structs.replace(specs[1], output_map="raw")
    assert not told(lambda x: x.max(axis=1, keepdims=True)).result.passed, "it is 10 % off"


def test_a_demanded_closeness_is_judged_too() -> None:
    nudge = np.float32(0.003)
    close = Conditions(epsilon=0.01, delta=0.02)
    closer = Conditions(epsilon=0.001, delta=0.02)
    assert judged(lambda x: x + nudge, rows(600), "softmax", close).result.passed
    # A constant shift vanishes in softmax: nudge one class only.
    one = np.eye(1, CLASSES, dtype=np.float32) * np.float32(0.02)
    found = judged(lambda x: x + one, rows(600), "softmax", closer).result
    assert not found.passed
    assert "epsilon 0.001" in found.why


def test_a_demanded_closeness_holds_in_batches_too() -> None:
    def apart(x: Array) -> Array:
        one = np.eye(1, CLASSES, dtype=np.float32) * np.float32(0.01 * (len(x) > 1))
        return np.asarray(x + one)

    assert judged(apart, rows(300), "softmax").result.passed
    demanded = Conditions(epsilon=0.001, delta=0.02)
    assert not judged(apart, rows(300), "softmax", demanded).result.passed


def test_differences_are_recorded_as_quantiles() -> None:
    found = judged(lambda x: x + np.float32(0.5), rows(200)).result
    assert set(found.difference) == {"p50", "p90", "p99", "max"}
    assert found.difference["p50"] == pytest.approx(0.5, abs=1e-6)


def test_too_few_rows_are_refused_with_how_many_are_needed() -> None:
    with pytest.raises(CalibrationError, match="left with 10 and needs 149"):
        check_row_count(rows(10), Conditions(), 2, signature("raw"))
    with pytest.raises(CalibrationError, match="needs 368"):
        check_row_count(rows(200, labelled=True), Conditions(), 50, signature("raw"))
    with pytest.raises(CalibrationError, match="needs 2995"):
        check_row_count(rows(600), Conditions(epsilon=0.1, delta=0.001), 150, signature("raw"))


@pytest.mark.parametrize("moved", [1, -1])
def test_labels_that_name_no_class_are_refused(moved: int) -> None:
    """The model would be wrong on nearly every row, and no form could lose much."""
    sample = rows(400, labelled=True)
    assert sample.labels is not None
    sample = Rows(sample.inputs, sample.labels + moved, sample.hashes)
    words = f"labels are {max(moved, -1)} to .*, classes 0 to 5"
    with pytest.raises(CalibrationError, match=words):
        judged(lambda x: x, sample)


def test_labels_of_which_the_source_hits_none_are_refused() -> None:
    """Off by one, say, within the classes: no form could lose anything."""
    sample = rows(400, labelled=True)
    assert sample.labels is not None
    sample = Rows(sample.inputs, (sample.labels + 1) % CLASSES, sample.hashes)
    with pytest.raises(CalibrationError, match=r"right on 0\.00% of rows; are the labels its"):
        judged(lambda x: x, sample)


def test_top5_of_five_classes_is_refused() -> None:
    sample = rows(400, labelled=True)
    sample = Rows([[row[0][:, :5]] for row in sample.inputs], np.zeros(400, int), sample.hashes)
    with pytest.raises(CalibrationError, match="metric top5 says nothing of 5 classes"):
        judged(lambda x: x, sample, conditions=Conditions(metric="top5"))


def test_a_row_of_nan_hits_no_label() -> None:
    """Not even the first one, which an order of scores would put first."""
    sample = rows(400, labelled=True)
    inputs = [[np.abs(row[0]) * [1, 0, 0, 0, 0, 0]] for row in sample.inputs]
    inputs = [[row[0].astype(np.float32)] for row in inputs]
    sample = Rows(inputs, np.zeros(400, int), sample.hashes)
    assert judged(lambda x: x, sample).result.passed
    found = judged(lambda x: np.full_like(x, np.nan), sample).result
    assert (found.passed, found.accuracy_loss) == (False, 1.0)


def test_an_epsilon_that_is_infinite_is_refused() -> None:
    with pytest.raises(UsageError, match="epsilon is inf, it must be above 0, and finite"):
        Conditions(epsilon=float("inf"))


def test_few_rows_that_all_agree_are_enough_for_what_no_label_speaks_of() -> None:
    sample = rows(100, labelled=True)
    model = signature("softmax")
    model = Signature(inputs=model.inputs, outputs=model.outputs * 2)
    reference = [[row[0], row[0][:, :1]] for row in sample.inputs]
    allowed = Conditions(max_accuracy_loss=0.05)
    assert judge([reference], reference, sample, model.outputs, allowed, LEVEL).result.passed
    own = [
        [scores, other * np.float32(1 + (i == 7))] for i, (scores, other) in enumerate(reference)
    ]
    assert not judge([own], reference, sample, model.outputs, allowed, LEVEL).result.passed


@pytest.mark.parametrize(("second", "passes"), [(1.0, True), (-1.0, False), (np.nan, False)])
def test_outputs_of_which_no_label_speaks_have_to_agree(second: float, passes: bool) -> None:
    sample = rows(600, labelled=True)
    (scores,) = signature("softmax").outputs
    model = Signature(
        inputs=signature("softmax").inputs,
        outputs=(scores, msgspec.structs.replace(scores, name="embedding", output_map="raw")),
    )
    reference = [[row[0], row[0]] for row in sample.inputs]
    own = [[row[0], row[0] * np.float32(second)] for row in sample.inputs]
    found = judge([own], reference, sample, model.outputs, Conditions(), LEVEL).result
    assert found.passed is passes
    assert "top1 loss is 0.00%" in found.why
    assert "other outputs than y: " in found.why


def test_what_raw_refuses_is_told_how_it_agrees_by_other_maps() -> None:
    """Nothing in a graph says that its outputs are scores, or embeddings."""

    def slightly(x: Array) -> Array:
        return x * np.float32(1.02)

    found = judged(slightly, rows(300)).result
    assert not found.passed
    for words in (
        "relative error <= 1 % on 0.00% of rows",
        "same top-1 on 100.00%: --output-map softmax, if these are scores of classes",
        "cosine >= 0.99 on 100.00%: --output-map l2_normalised, if these are embeddings",
    ):
        assert words in found.why
    assert "--output-map" not in judged(lambda x: x * np.nan, rows(300)).result.why
    assert "--output-map" not in judged(ruin(0.5), rows(300), "softmax").result.why
    assert "--output-map" not in judged(slightly, rows(300), "softmax").result.why


def test_of_raw_outputs_a_demanded_closeness_decides_alone() -> None:
    """As of a target around zero, of which one per cent is next to nothing."""
    nudge, close = np.float32(0.05), Conditions(epsilon=0.06, delta=0.02)
    assert not judged(lambda x: x + nudge, rows(600)).result.passed
    found = judged(lambda x: x + nudge, rows(600), conditions=close).result
    assert found.passed
    assert found.measure == "finite"
    closer = Conditions(epsilon=0.04, delta=0.02)
    assert not judged(lambda x: x + nudge, rows(600), conditions=closer).result.passed
    assert not judged(lambda x: x * np.nan, rows(600), conditions=close).result.passed


def logit(x: Array) -> Array:
    return np.asarray(x[:, :1])


def probability(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-x[:, :1])), np.float32)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(("score", "above"), [(logit, 0.0), (probability, 0.5)])
def test_one_score_a_row_says_1_above_a_threshold(
    score: Callable[[Array], Array], above: float, flat: bool
) -> None:
    sample = rows(600)
    labels = np.array([int(row[0][0, 0] > 0) for row in sample.inputs])
    people = {"sex": np.array(["a", "b"])[np.arange(600) % 2]}
    sample = Rows(sample.inputs, labels, sample.hashes, people)
    shape = ("n",) if flat else ("n", 1)
    y = TensorSpec(name="y", datatype="FP32", shape=shape, batch_axis=0)
    model = Signature(inputs=signature("raw").inputs, outputs=(y,))
    conditions = Conditions(max_disparity=0.2)

    def told(form: Callable[[Array], Array]) -> GateResult:
        runs = [
            [[np.ravel(own(row[0])) if flat else own(row[0])] for row in sample.inputs]
            for own in (score, form)
        ]
        check_labels(runs[0][0], sample, conditions)
        return judge(runs[1:], runs[0], sample, model.outputs, conditions, LEVEL).result

    same = told(lambda x: score(x * np.float32(1.1)))
    assert same.passed
    assert same.measure == f"top1 on labels; a score above {above:g} is 1"
    assert f"; a score above {above:g} is 1" in same.why
    assert same.groups["sex"]["a"]["accuracy"] == 1.0
    assert 0.4 < same.groups["sex"]["b"]["selection_rate"] < 0.6
    assert told(lambda x: score(ruin(0.1)(x))).accuracy_loss == pytest.approx(0.1, abs=0.05)
    lower = told(lambda x: score(x) - np.float32(0.4))
    assert not lower.passed
    assert lower.disparities[0].widened_bound is not None


def test_labels_of_more_classes_than_one_score_has_are_refused() -> None:
    few = rows(4)
    sample = Rows(few.inputs, np.array([0, 1, 2, 5]), few.hashes)
    with pytest.raises(CalibrationError, match="labels are 0 to 5, classes 0 to 1"):
        check_labels([np.zeros((1, 1), np.float32)], sample, Conditions())
    with pytest.raises(CalibrationError, match="one score per class, or per row"):
        check_labels([np.zeros((1, 1), np.int64)], sample, Conditions())
