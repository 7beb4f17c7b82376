"""What a host asks for a model, and where it runs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

import lrai_core as lrai
from lrai_core.artifact import GateResult, LatencyPoint
from lrai_deployments.measured import place
from lrai_import.hosted import asked, is_quick, load, zeros
from tests.core import small_artifact


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LRAI_RUNTIME", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def quick(tmp_path: Path) -> lrai.Artifact:
    return lrai.Artifact(tmp_path, small_artifact.manifest(), "0" * 64)


def test_a_slow_model_has_a_process_of_its_own(quick: lrai.Artifact, tmp_path: Path) -> None:
    latency = [LatencyPoint(rows=1, length=0, median_ms=30.0, spread_ms=0.0)]
    variants = [msgspec.structs.replace(quick.manifest.variants[0], latency=latency)]
    manifest = msgspec.structs.replace(quick.manifest, variants=variants)
    slow = lrai.Artifact(tmp_path, manifest, "0" * 64)
    assert not asked({}).placed(slow, 1).here


def test_a_quick_model_of_one_process_runs_in_it(quick: lrai.Artifact) -> None:
    assert is_quick(quick)
    placed = asked({}).placed(quick, 1)
    assert placed.here
    assert placed.config.runtime.address == "embedded"
    assert placed.how["settings"] == {"actor.isolation": "inline"}


@pytest.mark.parametrize("processes", [0, 2, 4])
def test_several_processes_or_an_unknown_number_share_a_runtime(
    quick: lrai.Artifact, processes: int
) -> None:
    placed = asked({}).placed(quick, processes)
    assert (placed.here, placed.config.runtime.address) == (False, "auto")


@pytest.mark.parametrize(
    ("seconds", "ms"), [(0, 60_000), (10, 10_000), (300, 300_000), (1e9, 1e9), (1e-9, 1)]
)
def test_the_hosts_time_counts_where_nothing_says_another_one(seconds: float, ms: float) -> None:
    """In a runtime that others share, which this process may start, a longer one alone."""
    shared = asked({}).within(seconds)
    for found, its in ((shared.in_process(), ms), (shared, max(ms, 60_000))):
        assert found.config.scheduler.default_timeout_ms == its
        assert found.rest.get("scheduler.default_timeout_ms", 60_000) == its  # is told where not


def test_the_hosts_time_does_not_count_where_something_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = asked({"scheduler.default_timeout_ms": "60000"}).within(10)
    assert given.config.scheduler.default_timeout_ms == 60_000
    monkeypatch.setenv("LRAI_SCHEDULER_DEFAULT_TIMEOUT_MS", "5000")
    assert asked({}).within(10).config.scheduler.default_timeout_ms == 5_000


@pytest.mark.parametrize(
    ("given", "address"),
    [
        ({"runtime.address": "auto"}, "auto"),
        ({"runtime.address": "/d"}, "/d"),
        ({"actor.isolation": "process"}, "auto"),
        ({"actor.devices": "0"}, "auto"),
        ({"runtime.capture_rows": 100}, "auto"),  # where `lrai tune` finds them
    ],
)
def test_what_is_said_counts(quick: lrai.Artifact, given: dict[str, Any], address: str) -> None:
    placed = asked(given).placed(quick, 1)
    assert (placed.here, placed.config.runtime.address) == (False, address)


def test_so_does_a_variable(quick: lrai.Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LRAI_RUNTIME", "auto")
    assert not asked({}).placed(quick, 1).here


def quick_by(
    artifact: lrai.Artifact, shape: tuple[int | str, ...], times: list[float], *, judged: bool
) -> bool:
    """Return whether a model of this input, of whose rows so many ms were measured, is quick."""
    manifest = artifact.manifest
    one = msgspec.structs.replace(manifest.signature.inputs[0], shape=shape)
    signature = msgspec.structs.replace(manifest.signature, inputs=(one,))
    gate = GateResult(passed=True, why="", rows=200, measure="") if judged else None
    points = [LatencyPoint(rows=1, length=0, median_ms=ms, spread_ms=0.0) for ms in times]
    variant = msgspec.structs.replace(manifest.variants[0], latency=points, gate=gate)
    changed = msgspec.structs.replace(manifest, signature=signature, variants=[variant])
    return is_quick(lrai.Artifact(artifact.path, changed, artifact.sha256))


@pytest.mark.parametrize(
    ("shape", "times", "takes_rows"),
    [
        (("batch", 3, "height", "width"), [0.1], True),  # else they were 4 by 4
        (("batch", 3), [1.0, 2.0, 30.0], True),
        (("batch", 3), [1.0, 2.0, 3.0], False),
    ],
)
def test_what_was_measured_without_real_rows_is_quick_by_its_longest_if_that_is_known(
    quick: lrai.Artifact, shape: tuple[int | str, ...], times: list[float], *, takes_rows: bool
) -> None:
    assert quick_by(quick, shape, times, judged=True)
    assert quick_by(quick, shape, times, judged=False) is not takes_rows
    assert not quick_by(quick, shape, [], judged=False)


def test_an_empty_variable_says_nothing(
    quick: lrai.Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a template leaves it where nobody fills it in."""
    monkeypatch.setenv("LRAI_RUNTIME", "")
    placed = asked({}).placed(quick, 4)
    assert (placed.here, placed.config.runtime.address) == (False, "auto")


def test_so_does_a_file(quick: lrai.Artifact) -> None:
    Path("lrai.toml").write_text('[runtime]\naddress = "/elsewhere"\n')
    placed = asked({}).placed(quick, 1)
    assert (placed.here, placed.config.runtime.address) == (False, "/elsewhere")


@pytest.mark.parametrize("key", ["runtime.state_dir", "runtime.address"])
def test_in_its_own_process_too_it_is_what_requalify_found(
    quick: lrai.Artifact, tmp_path: Path, key: str
) -> None:
    wanted = asked({key: str(tmp_path / "state")})
    here = wanted.in_process().config
    assert here.runtime.state_dir == ""
    assert place(quick, here) == place(quick, wanted.config)


def test_settings_are_sorted_by_whose_they_are() -> None:
    demands = {"require.epsilon": "0.1", "require.tier": "STATISTICAL", "require.sampler": "box"}
    others = {"actor.threads": "2", "limits.request_rows": "7"}
    found = asked({"variant": "int8", **demands, **others})
    assert (found.variant, found.own) == ("int8", {"actor.threads": "2"})
    assert found.require == {"epsilon": 0.1, "tier": "STATISTICAL", "sampler": "box"}
    assert found.config.limits.request_rows == 7


@pytest.mark.parametrize(
    "given", [{"actor.thread": "2"}, {"actor.threads": "two"}, {"require.epsilon": "small"}]
)
def test_what_is_not_allowed_is_named(given: dict[str, str]) -> None:
    with pytest.raises(lrai.UsageError, match=next(iter(given))):
        asked(given)


def test_other_settings_are_another_model() -> None:
    """A runtime that has a model does not look at the settings of who asks for it again."""
    assert asked({}).mark == asked({"scheduler.max_queue_rows": 7}).mark == ""  # of the runtime
    marks = [asked({"actor.threads": n}).mark for n in (1, 2)]
    marks += [asked({"variant": "fp32"}).mark, asked({"scheduler.latency_slo_ms": 9.0}).mark]
    assert len({"", *marks}) == 5
    assert asked({"actor.threads": 1}).mark == marks[0]


class _Runtime:
    """One that serves this variant, whatever is asked for."""

    def __init__(self, variant: str) -> None:
        self.variant, self.loaded = variant, dict[str, Any]()

    def load(self, artifact: lrai.Artifact, *, name: str, **how: Any) -> str:
        del artifact
        self.loaded[name] = how
        return name

    def models(self) -> list[SimpleNamespace]:
        same = {"variant": self.variant, "version": "0" * 12}
        return [SimpleNamespace(name=name, **same) for name in self.loaded]


def test_another_variant_that_serves_in_place_is_warned_of(
    quick: lrai.Artifact, caplog: pytest.LogCaptureFixture
) -> None:
    how: dict[str, Any] = {"variant": "", "require": None, "settings": {}}
    assert load(cast("lrai.Runtime", runtime := _Runtime("int8")), quick, "m", **how) == "int8"
    assert runtime.loaded == {"m": how}
    assert caplog.records == []
    there = cast("lrai.Runtime", _Runtime("fp32"))
    assert load(there, quick, "m", **how) == "fp32"
    assert caplog.records == [], "it is another one's wish, or what was measured here"
    target = msgspec.structs.replace(quick.manifest.target, isa="mill")
    foreign = msgspec.structs.replace(quick.manifest, target=target)
    assert load(there, lrai.Artifact(quick.path, foreign, quick.sha256), "m", **how) == "fp32"
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "model m: fp32 serves in place of int8, made for" in record.getMessage()


def test_no_row_is_made_up_that_is_larger_than_any() -> None:
    """An artifact says what it likes of its shapes, and a host asks its model with such a row."""
    spec = lrai.TensorSpec(name="x", datatype="FP64", shape=("batch", 4_000_000_000))
    with pytest.raises(lrai.UsageError, match="4000000000 elements is too large"):
        zeros([spec])
    (row,) = zeros([msgspec.structs.replace(spec, shape=("batch", 4))]).values()
    assert row.shape == (1, 4)
