"""What is measured of candidates, with times that are told instead of taken."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import msgspec
import numpy as np
import pytest

from lrai_core.compiler import search
from lrai_core.compiler.search import Calls, Candidate, points
from lrai_core.engine.engine import find_engine
from lrai_core.protocol import Array, Signature, TensorSpec
from lrai_core.verifier.spec import FAR
from tests.core.small_artifact import SIGNATURE

ROW = [np.ones((1, 3), np.float32)]


class Told:
    """A session that takes as long as it is told, round by round."""

    def __init__(self, seconds: Sequence[float]) -> None:
        self.seconds = list(seconds)

    def run(self, arrays: Sequence[Array], outputs: Sequence[int] | None = None) -> list[Array]:
        return list(arrays)


def candidate(name: str, told: Sequence[float] = ()) -> Candidate:
    return Candidate(
        form=name.partition("_")[0],
        precision="fp32",
        graph=Path(name),
        size_bytes=1,
        session=Told(told),
        engine=find_engine("onnxruntime"),
    )


def profiled(
    monkeypatch: pytest.MonkeyPatch,
    until: float = math.inf,
    most: int = 5,
    /,
    **times: Sequence[float],
) -> dict[str, Candidate]:
    def seconds(session: Told, feed: object, repeats: int) -> float:
        return session.seconds.pop(0)

    monkeypatch.setattr(search, "_repeats", lambda session, feed: 1)
    monkeypatch.setattr(search, "_seconds", seconds)
    monkeypatch.setattr(search, "MOST_ROUNDS", most)
    now = itertools.count(1.0, 1e-6)  # of a pause of this machine it would take another way
    monkeypatch.setattr(search, "time", SimpleNamespace(monotonic=lambda: next(now)))
    made = {name: candidate(name, told) for name, told in times.items()}
    search.profile(list(made.values()), Calls(SIGNATURE, [ROW], [(1, 0)]), lambda: None, until)
    return made


def test_a_form_that_is_lucky_in_half_of_the_rounds_is_not_faster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = profiled(monkeypatch, fp32=[1.0] * 5, int8=[0.5, 1, 0.5, 1, 0.5])
    assert found["int8"].latency[0].median_ms == 500
    assert found["int8"].speedup == pytest.approx(1)


def test_a_machine_that_slows_down_changes_no_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    slower = [1.0, 1, 2, 2, 3]
    found = profiled(monkeypatch, fp32=slower, int8=[one / 2 for one in slower])
    assert found["fp32"].speedup == pytest.approx(1)
    assert found["int8"].speedup == pytest.approx(2)


def test_calls_of_several_rows_that_take_long_are_measured_at_the_second_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each of one row at the first: how long a sequence takes is told by nothing else."""
    spec = msgspec.structs.replace(SIGNATURE.inputs[0], shape=("batch", "length"), length_axis=1)
    signature = msgspec.structs.replace(SIGNATURE, inputs=(spec,))
    made = [candidate(name) for name in ("fp32", "int8")]
    paces, asked = {id(made[0].session): 1e-3, id(made[1].session): 0.5e-3}, Counter[object]()

    def seconds(session: Told, feed: list[Array], repeats: int) -> float:
        asked[id(session), feed[0].shape] += 1
        return paces[id(session)] * feed[0].size

    monkeypatch.setattr(search, "_repeats", lambda session, feed: 1)
    monkeypatch.setattr(search, "_seconds", seconds)
    points = [(1, 8), (4, 8), (64, 8), (1, 512), (4, 512)]
    measured = [(1, 8), (4, 8), (1, 512), (64, 8)]
    for most in (3, 4, 4):
        search.profile(made, Calls(signature, [ROW], points), lambda: None)
        for one in made:
            assert [(point.rows, point.length) for point in one.latency] == measured[:most]
        paces[id(made[1].session)] = 0.25e-3  # which changes no speed-up
    assert [point.median_ms for point in made[0].latency] == pytest.approx([8, 32, 512, 512])
    assert [point.median_ms for point in made[1].latency] == pytest.approx([4, 16, 256, 128])
    assert made[1].speedup == pytest.approx(2)
    assert asked[id(made[1].session), (4, 512)] == 0


def test_the_fastest_fp32_is_what_others_are_compared_with(monkeypatch: pytest.MonkeyPatch) -> None:
    found = profiled(monkeypatch, fp32=[2.0] * 5, fp32_b=[1.0] * 5, int8=[1.0] * 5)
    assert [round(one.speedup, 6) for one in found.values()] == [0.5, 1, 1]


def test_what_is_slower_is_left_out_after_some_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slower than fp32, or than the same form with other passes; what it took stays known."""
    monkeypatch.setattr(search, "_LONG_ROUND", -1.0)
    times = {"fp32": 1.0, "fp32_b": 1.14, "int8": 0.5, "int8_b": 0.52, "int8_c": 0.51, "slow": 1.11}
    much = {"fp32_d": 1.16, "int8_d": 0.59, "slower": 1.31}
    found = profiled(monkeypatch, **{name: [took] * 5 for name, took in (times | much).items()})
    left = {name: len(cast("Told", one.session).seconds) for name, one in found.items()}
    some = {"fp32": 0, "fp32_b": 2, "int8": 0, "int8_b": 2, "int8_c": 0, "slow": 2}
    assert left == some | dict.fromkeys(much, 4)
    assert found["slow"].speedup == pytest.approx(1 / 1.11)
    assert found["slower"].speedup == pytest.approx(1 / 1.31)
    assert found["int8_b"].latency[0].median_ms == pytest.approx(520)
    assert found["int8_d"].latency[0].median_ms == pytest.approx(590)


def test_one_short_round_leaves_nothing_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pause of the machine may have been in it."""
    found = profiled(monkeypatch, fp32=[1.0] * 5, int8=[1.5, 0.5, 0.5, 0.5, 0.5])
    assert found["int8"].speedup == pytest.approx(2)


def test_when_the_time_is_up_three_rounds_have_been_made(monkeypatch: pytest.MonkeyPatch) -> None:
    found = profiled(monkeypatch, 0.0, fp32=[1.0] * 5, int8=[0.5] * 5)
    assert {len(cast("Told", one.session).seconds) for one in found.values()} == {2}
    assert found["int8"].speedup == pytest.approx(2)


def test_short_calls_are_measured_in_more_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    found = profiled(monkeypatch, math.inf, 36, fp32=[1.0] * 36, int8=[0.5] * 5 + [0.4] * 31)
    assert {len(cast("Told", one.session).seconds) for one in found.values()} == {0}
    assert found["int8"].latency[0].median_ms == pytest.approx(400)


def test_long_calls_are_measured_in_three_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "_ROUNDS_SECONDS", 0.0)
    found = profiled(monkeypatch, math.inf, 36, fp32=[1.0] * 36, int8=[0.5] * 36)
    assert {len(cast("Told", one.session).seconds) for one in found.values()} == {33}


def test_each_timing_follows_a_smallest_call_of_the_same_candidate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those before it have left nothing of its weights in the caches."""
    made, calls = [candidate(name) for name in ("fp32", "int8")], list[tuple[object, int, str]]()

    def seconds(session: Told, feed: list[Array], repeats: int) -> float:
        calls.append((session, len(feed[0]), "timed"))
        return 1e-3

    monkeypatch.setattr(search, "_repeats", lambda session, feed: 1)
    monkeypatch.setattr(search, "_seconds", seconds)
    monkeypatch.setattr(Told, "run", lambda self, feed: calls.append((self, len(feed[0]), "run")))
    monkeypatch.setattr(search, "MOST_ROUNDS", search.ROUNDS)
    search.profile(made, Calls(SIGNATURE, [ROW], [(1, 0), (8, 0)]), lambda: None)
    timed = [i for i, (*_, how) in enumerate(calls) if how == "timed"][1:]  # the first: is it long?
    assert [calls[i][1] for i in timed] == [1, 1, 8, 8] * search.ROUNDS
    assert [calls[i - 1] for i in timed] == [(calls[i][0], 1, "run") for i in timed]


def test_of_rows_that_differ_utterly_the_number_counts() -> None:
    few, many = candidate("few"), candidate("many")
    few.gaps, many.gaps = [FAR] + [0.0] * 8, [FAR] * 4 + [0.0] * 5
    assert 0 < few.distance < many.distance < math.inf


def test_lengths_far_below_those_that_are_served_are_not_measured() -> None:
    shape = ("batch", "samples")
    spec = TensorSpec(name="x", datatype="FP32", shape=shape, batch_axis=0, length_axis=1)
    signature = Signature(inputs=(spec,), outputs=(spec,))
    assert points(signature, [[np.ones((1, 16_000), np.float32)]]) == [(1, 16_000)]
    alone = Signature(inputs=(msgspec.structs.replace(spec, batch_axis=None),), outputs=(spec,))
    assert points(alone, [[np.ones((1, 40), np.float32)]]) == [(1, 40)]


def test_lengths_are_measured_whichever_input_has_them() -> None:
    image = TensorSpec(name="image", datatype="FP32", shape=("n", 3), batch_axis=0)
    ids = TensorSpec(name="ids", datatype="INT64", shape=("n", "l"), batch_axis=0, length_axis=1)
    lengths = {length for _, length in points(Signature(inputs=(image, ids), outputs=()), [])}
    assert 0 not in lengths
    assert max(lengths) == 128


@pytest.mark.parametrize(("row_us", "short"), [(1, True), (100, False)])
def test_a_model_is_short_where_its_largest_call_is(
    row_us: int, short: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By rows and length: 32 rows of .1 ms are worth several threads, though one is not."""
    now = 0.0

    class Slow:
        def run(self, arrays: Sequence[Array], outputs: Sequence[int] | None = None) -> list[Array]:
            nonlocal now
            now += arrays[0].shape[0] * row_us * 1e-6
            return [arrays[0]]

    monkeypatch.setattr(search, "time", SimpleNamespace(perf_counter=lambda: now))
    spec = TensorSpec(name="x", datatype="FP32", shape=("n", 2), batch_axis=0)
    signature = Signature(inputs=(spec,), outputs=(spec,))
    rows = [[np.ones((1, 2), np.float32)]] * 3
    assert search.is_short(Slow(), Calls(signature, rows, points(signature, rows))) is short
