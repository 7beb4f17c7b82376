from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lrai_core.protocol import Array, OutputMap, TensorSpec
from lrai_core.verifier.spec import FAR, MEASURES, agreement, difference, mapped, round_up


def floats(values: object) -> Array:
    return np.array(values, dtype=np.float32)


MAPS: list[OutputMap] = ["raw", "softmax", "l2_normalised"]
NAN, INF = math.nan, math.inf


def gap(f: object, g: object, output_map: OutputMap = "raw") -> float:
    return difference([np.asarray(f)], [np.asarray(g)], [output(output_map)])


def agrees(f: object, g: object, output_map: OutputMap) -> bool:
    return agreement([np.asarray(f)], [np.asarray(g)], [output(output_map)])


def output(output_map: OutputMap) -> TensorSpec:
    return TensorSpec(name="y", datatype="FP32", shape=("n", "m"), output_map=output_map)


ROWS = st.lists(st.floats(-50, 50, width=32), min_size=2, max_size=6)


@given(ROWS)
def test_softmax_is_what_its_definition_says(row: list[float]) -> None:
    powers = [math.exp(value) for value in row]
    expected = np.array(powers) / sum(powers)
    np.testing.assert_allclose(mapped(floats([row]), "softmax")[0], expected, rtol=1e-9)


def test_softmax_of_large_scores_does_not_overflow() -> None:
    scores = floats([[3e38, 3e38], [-3e38, 3e38]])
    np.testing.assert_array_equal(mapped(scores, "softmax"), [[0.5, 0.5], [0, 1]])


@given(ROWS)
def test_a_normalised_row_has_length_one_and_its_direction(row: list[float]) -> None:
    unit = mapped(floats([row]), "l2_normalised")[0]
    norm = math.sqrt(sum(value * value for value in row))
    np.testing.assert_allclose(unit * norm, row, rtol=1e-6, atol=1e-30)
    assert np.isfinite(unit).all()


def test_the_map_works_along_the_last_axis_in_float64() -> None:
    values = np.arange(12, dtype=np.float16).reshape(1, 3, 4)
    for output_map in MAPS:
        found = mapped(values, output_map)
        assert found.dtype == np.float64
        alone = [mapped(values[:, i], output_map) for i in range(3)]
        np.testing.assert_array_equal(found, np.stack(alone, axis=1))


def test_the_difference_is_the_largest_over_all_outputs() -> None:
    f, g = [np.zeros((1, 2)), np.zeros((1, 3))], [np.full((1, 2), 0.25), np.full((1, 3), -0.5)]
    assert difference(f, g, [output("raw")] * 2) == 0.5


@given(ROWS, st.sampled_from(MAPS))
def test_a_row_is_no_distance_from_itself(row: list[float], output_map: OutputMap) -> None:
    assert gap(floats([row]), floats([row]), output_map) == 0


@pytest.mark.parametrize("output_map", MAPS)
@pytest.mark.parametrize(
    ("f", "g"),
    [
        ([[NAN, 1.0]], [[2.0, 1.0]]),
        ([[2.0, 1.0]], [[NAN, 1.0]]),
        ([[1.0, 2.0]], [[1.0, 2.0, 3.0]]),
        ([[1.0]], [1.0]),
        ([[INF, 0.0]], [[0.0, INF]]),
    ],
)
def test_what_cannot_be_compared_is_infinitely_far(
    f: object, g: object, output_map: OutputMap
) -> None:
    assert gap(f, g, output_map) == FAR


@pytest.mark.parametrize("output_map", MAPS)
@pytest.mark.parametrize("row", [[NAN, 1.0], [INF, 1.0], [-INF, INF], [NAN, NAN]])
def test_the_same_odd_numbers_on_both_sides_are_the_same(
    row: list[float], output_map: OutputMap
) -> None:
    assert gap([row], [row], output_map) == 0


def test_an_undefined_map_hides_no_difference() -> None:
    assert gap([[NAN, 1.0]], [[NAN, 2.0]], "softmax") == FAR
    assert gap([[INF, 1.0]], [[INF, 2.0]], "softmax") == FAR
    assert gap([[1.0, NAN]], [[1.0, 5.0]], "softmax") == FAR


def test_a_difference_beyond_what_a_double_holds_is_infinite() -> None:
    assert gap([[1.7e308]], [[-1.7e308]]) == FAR


def test_an_empty_output_is_no_distance_from_another() -> None:
    assert gap(np.zeros((1, 0)), np.zeros((1, 0))) == 0


def test_integers_and_booleans_are_compared_as_numbers() -> None:
    assert gap(np.array([[3]], np.int8), np.array([[-2]], np.int8)) == 5
    assert gap(np.array([[True]]), np.array([[False]])) == 1


def test_a_label_that_is_near_is_another() -> None:
    five, four = np.array([[500]]), np.array([[504]])
    assert agreement([five], [five], [output("raw")])
    assert not agreement([five], [four], [output("raw")])


def test_text_is_the_same_or_infinitely_far() -> None:
    a, b = np.array([["a"]], object), np.array([["b"]], object)
    assert (gap(a, a), gap(a, b)) == (0, FAR)
    assert agreement([a], [a], [output("raw")])
    assert not agreement([a], [b], [output("raw")])


@pytest.mark.parametrize(
    ("output_map", "f", "g", "same"),
    [
        ("raw", [[100.0, 0.0]], [[100.99, 0.0]], True),
        ("raw", [[100.0, 0.0]], [[101.01, 0.0]], False),
        ("raw", [[0.0, 0.0]], [[0.0, 0.0]], True),
        ("raw", [[0.0, 0.0]], [[1e-30, 0.0]], False),
        ("raw", [[NAN, 1.0]], [[NAN, 1.0]], False),
        ("raw", [[INF, 1.0]], [[INF, 1.0]], True),
        ("raw", [[1.0, 1.0]], [[INF, 1.0]], False),
        ("raw", [[0.0, -INF]], [[-0.7, -0.7]], False),  # of an infinity all would be one percent
        ("raw", [[INF, 1.0]], [[-INF, 1.0]], False),
        ("raw", [[-INF, 100.0]], [[-INF, 100.9]], True),  # masked on both sides
        ("raw", [[-INF, 100.0]], [[-INF, 101.1]], False),
        ("softmax", [[1.0, 2.0]], [[-5.0, 0.1]], True),
        ("softmax", [[1.0, 2.0]], [[2.0, 1.0]], False),
        ("softmax", [[1.0, 2.0]], [[1.0, NAN]], False),
        ("softmax", [[1.0, 2.0, -INF]], [[1.0, 2.0, -INF]], True),
        ("softmax", [[1.0, 2.0, -INF]], [[1.1, 2.0, -INF]], True),
        ("softmax", [[1.0, 2.0, 0.0]], [[1.0, 2.0, -INF]], False),
        ("softmax", [[NAN, 2.0]], [[NAN, 2.0]], False),
        ("l2_normalised", [[0.0, 0.0]], [[0.0, 0.0]], True),
        ("l2_normalised", [[0.0, 0.0], [1.0, 0.0]], [[0.0, 0.0], [7.0, 0.9]], True),
        ("l2_normalised", [[0.0, 0.0]], [[1.0, 0.0]], False),
        ("l2_normalised", [[1.0, 0.0]], [[7.0, 0.9]], True),
        ("l2_normalised", [[1.0, 0.0]], [[7.0, 1.1]], False),
        ("l2_normalised", [[1.0, 0.0]], [[NAN, 0.0]], False),
        ("l2_normalised", [[1.0, 0.0]], [[-1.0, 0.0]], False),
    ],
)
def test_agreement_means_what_its_measure_says(
    output_map: OutputMap, f: object, g: object, same: bool
) -> None:
    assert agrees(f, g, output_map) is same


@pytest.mark.parametrize("classes", [3, 1000])
def test_probabilities_are_compared_as_they_are(classes: int) -> None:
    """A second softmax of a graph's own would leave next to nothing of a thousand classes."""
    scores = np.random.default_rng(0).standard_normal((1, classes)) * 5
    sure, other = mapped(floats(scores), "softmax"), mapped(floats(-scores), "softmax")
    assert gap(floats(sure), floats(other), "softmax") == pytest.approx(np.abs(sure - other).max())
    quantised = np.round(other * 16) / 16  # which adds up to something else
    assert gap(floats(sure), floats(quantised), "softmax") >= 0.9 * np.abs(sure - other).max()
    assert gap(floats(scores), floats(-scores), "softmax") == pytest.approx(
        np.abs(sure - other).max(), rel=1e-5
    )


def test_scores_that_add_up_to_about_1_are_none() -> None:
    scores, others = [[0.404, 0.6]], [[1.7, -0.5]]
    sure, other = mapped(floats(scores), "softmax"), mapped(floats(others), "softmax")
    assert gap(scores, others, "softmax") == pytest.approx(np.abs(sure - other).max(), rel=1e-5)
    halves = floats(mapped(floats([[1.0, 2.0, 4.0]]), "softmax")).astype(np.float16)
    moved = halves[:, ::-1]
    raw = np.abs(halves.astype(float) - moved.astype(float)).max()
    assert gap(halves, moved, "softmax") == pytest.approx(raw)


def test_what_is_derived_agrees_as_what_it_derives_from_and_counts_in_full_for_closeness() -> None:
    assert agrees([[0.5]], [[0.4]], "derived")
    assert gap([[0.5]], [[0.4]], "derived") == pytest.approx(0.1)
    assert not agrees([[0.5]], [[NAN]], "derived")
    assert agrees([[0.5, -INF]], [[0.4, -INF]], "derived"), "of masked classes"
    assert not agrees([[0.5]], [[0.5, 0.5]], "derived")


def test_every_token_has_to_agree_and_not_their_mean() -> None:
    f, g = np.array([[[2.0, 1], [1, 2]]]), np.array([[[2.0, 1], [2, 1]]])
    assert not agrees(f, g, "softmax")
    assert not agrees(f, g, "l2_normalised")


def test_outputs_of_another_shape_do_not_agree() -> None:
    assert not agrees([[1.0, 2.0]], [[1.0, 2.0, 3.0]], "softmax")


def test_every_map_has_a_measure() -> None:
    assert sorted(MEASURES) == sorted(MAPS)


@given(st.floats(min_value=0, exclude_min=True, allow_infinity=False), st.integers(1, 6))
@example(5e-324, 2)
@example(1.7e308, 2)
@example(0.29, 2)
def test_rounding_up_never_rounds_down_and_adds_less_than_a_last_digit(
    value: float, digits: int
) -> None:
    rounded = round_up(value, digits)
    assert rounded >= value
    if 1e-290 < value < 1e300:
        assert rounded <= value * (1 + 10.0 ** (1 - digits)) * (1 + 1e-12)
        assert float(f"{rounded:.{digits - 1}e}") == pytest.approx(rounded, rel=1e-12)


@pytest.mark.parametrize(
    ("value", "expected"), [(0.0123, 0.013), (1e-4, 1e-4), (0.0991, 0.1), (11.1, 12)]
)
def test_rounding_up_to_two_digits(value: float, expected: float) -> None:
    assert round_up(value) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("value", [0.035, 0.069, 0.07, 0.085])
def test_what_has_no_more_digits_stays_as_it_is(value: float) -> None:
    assert round_up(value, 3) == value


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, FAR])
def test_what_has_no_digits_is_not_rounded(value: float) -> None:
    assert round_up(value) == value


@pytest.mark.parametrize("output_map", ["softmax", "l2_normalised"])
def test_a_single_element_is_compared_as_it_is(output_map: OutputMap) -> None:
    """Its softmax is one, and its direction a sign, whatever it is."""
    assert gap([[3.0]], [[-4.0]], output_map) == 7.0
    assert not agrees([[3.0]], [[-4.0]], output_map)
    assert gap([[3.0, 0.0]], [[3.0, 0.0]], output_map) == 0.0
    scalar, other = np.array(3.0), np.array(-4.0)  # a loss, say, which has no dimension at all
    assert difference([scalar], [other], [output(output_map)]) == 7.0
    assert not agreement([scalar], [other], [output(output_map)])
    assert agreement([scalar], [scalar], [output(output_map)])


def test_integers_that_a_double_takes_for_the_same_are_told_apart() -> None:
    large = np.array([[2**53]])
    assert difference([large], [large + 1], [output("raw")]) == FAR
    assert difference([large], [large], [output("raw")]) == 0.0
    small, both = np.array([[0]]), np.array([[0, 2**62]])
    assert difference([small], [small + 1], [output("raw")]) == 1.0
    assert difference([both], [both + 1], [output("raw")]) == FAR  # beside one that is seen


def test_a_length_that_no_double_holds_hides_no_direction() -> None:
    assert gap([[math.inf, 1.0]], [[math.inf, -500.0]], "l2_normalised") == FAR
    assert gap([[1e200, 0.0]], [[0.0, 1e200]], "l2_normalised") == FAR
    assert gap([[1e200, 1.0]], [[1e200, 1.0]], "l2_normalised") == 0.0


def test_of_several_channels_each_has_to_agree() -> None:
    """As of a detector: boxes in pixels and scores up to 1 are rows of one output."""
    random = np.random.default_rng(0)
    found = random.uniform(0, 640, (1, 84, 840)).astype(np.float32)
    found[:, 4:] = 0.0
    found[0, 4, :100] = 0.9
    blind = found.copy()
    blind[:, 4:] = 0.0
    shifted = found * np.float32(1.005)
    specs = [TensorSpec(name="y", datatype="FP32", shape=("batch", 84, 840), batch_axis=0)]
    assert not agreement([found], [blind], specs)
    assert agreement([found], [shifted], specs)
    turned = [np.ascontiguousarray(one.transpose(0, 2, 1)) for one in (found, blind, shifted)]
    absent = found.copy()
    absent[0, 5] = 1e-5 * random.uniform(0.5, 1, 840)  # scores of what is not to be seen
    near = absent.copy()
    near[0, 5] *= 1.2
    assert agreement([absent], [near], specs)
    assert not agreement(turned[:1], turned[1:2], specs)
    assert agreement(turned[:1], turned[2:], specs)


def test_a_small_box_is_as_near_as_the_usual_one() -> None:
    """Along the longer axis are places: one of a few pixels is not held to 1 % of itself."""
    found = np.random.default_rng(0).uniform(1, 640, (1, 84, 840)).astype(np.float32)
    found[0, :, 7] = 3.0
    specs = [TensorSpec(name="y", datatype="FP32", shape=("batch", 84, 840), batch_axis=0)]
    near = found.copy()
    near[0, :, 7] += 0.5
    assert agreement([found], [near], specs)
    near[0, :, 7] += 200.0
    assert not agreement([found], [near], specs)


@pytest.mark.parametrize(
    ("shape", "channels"),
    [((1, 50, 85), 2), ((1, 3, 8, 8, 85), 4), ((1, 84, 840), 1), ((1, 85, 20, 20), 1)],
)
def test_boxes_hide_no_scores_wherever_the_channels_are(
    shape: tuple[int, ...], channels: int
) -> None:
    """There may be fewer detections, or anchors, than channels."""
    random = np.random.default_rng(0)
    found = random.uniform(0, 640, shape).astype(np.float32)
    scores = np.moveaxis(found, channels, 0)[4:]
    scores[:] = random.uniform(0.05, 0.2, scores.shape)
    blind = found.copy()
    np.moveaxis(blind, channels, 0)[4:] = 0.0
    assert not agrees(found, blind, "raw")
    assert agrees(found, found * np.float32(1.005), "raw")


@pytest.mark.parametrize("mask", [-1e4, -1e9, float(np.finfo(np.float32).min)])
@pytest.mark.parametrize("channels", [3, 8])
def test_a_mask_hides_nothing_of_what_is_not_masked(mask: float, channels: int) -> None:
    scores = np.random.default_rng(0).uniform(0, 5, (1, 4, channels)).astype(np.float32)
    scores[..., 0] = mask
    assert agrees(scores, scores * np.float32(1.0), "raw")
    near, far = scores.copy(), scores.copy()
    near[..., 1:] *= 1.005
    far[..., 1:] = scores[..., :0:-1]
    assert agrees(scores, near, "raw")
    assert not agrees(scores, far, "raw")


def test_of_no_classes_none_is_the_most_probable() -> None:
    nothing = np.empty((1, 0), np.float32)
    assert mapped(nothing, "softmax").shape == (1, 0)
    assert gap([nothing], [nothing], "softmax") == 0.0
