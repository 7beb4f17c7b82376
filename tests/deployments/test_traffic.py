from __future__ import annotations

import errno
import math
import os
import stat
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lrai_core as lrai
from lrai_core.config import LimitsConfig, RuntimeConfig
from lrai_core.protocol import Array, ValidRequest, validate
from lrai_core.verifier.sample import read_rows
from lrai_deployments import traffic as module
from lrai_deployments.traffic import Traffic, Watch, forget_aged, watch
from tests.core import small_artifact

SIGNATURE = lrai.Signature(
    inputs=(
        lrai.TensorSpec(
            name="ids",
            datatype="INT64",
            shape=("batch", "length"),
            batch_axis=0,
            length_axis=1,
            pad_value=7,
        ),
        lrai.TensorSpec(name="x", datatype="FP32", shape=("batch", 2), batch_axis=0),
    ),
    outputs=(lrai.TensorSpec(name="y", datatype="FP32", shape=("batch",), batch_axis=0),),
)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def request(first: int, rows: int = 1, length: int = 3, x: float = 0.5) -> ValidRequest:
    """Rows whose ids are `first`, `first` + 1, and so on."""
    ids = np.repeat(np.arange(first, first + rows)[:, None], length, axis=1)
    inputs: dict[str, Array] = {"ids": ids, "x": np.full((rows, 2), x, np.float32)}
    asked = lrai.InferenceRequest(model_name="m", inputs=inputs)
    return validate(asked, SIGNATURE, LimitsConfig())


def of(source: str) -> lrai.Artifact:
    """Return an artifact for such requests, made of a file with this hash."""
    plain = small_artifact.manifest()
    made_of = msgspec.structs.replace(plain.source, sha256=source)
    manifest = msgspec.structs.replace(plain, signature=SIGNATURE, source=made_of)
    return lrai.Artifact(Path(), manifest, source)


def kept(traffic: Traffic) -> list[int]:
    return sorted(int(row[0]) for row in traffic.sample().get("ids", []))


def test_the_sketch_counts_rows_lengths_and_gaps_by_their_size() -> None:
    clock = Clock()
    traffic = Traffic(SIGNATURE, clock=clock)
    for rows, length, gap_us in [(1, 3, 1), (1, 4, 3), (2, 7, 3), (5, 100, 3)]:
        clock.now += gap_us * 1e-6 + 1e-9
        traffic.see(request(10, rows, length))
    sketch = traffic.sketch()
    assert sketch["requests"] == 4
    assert sketch["rows"] == [0, 2, 1, 1]  # 1, 2..3, 4..7
    assert sketch["lengths"] == [0, 0, 1, 2, 0, 0, 0, 1]
    assert sketch["gaps_us"] == [0, 1, 3]
    assert sketch["requests_per_second"] == pytest.approx(4 / 10e-6, rel=0.01)


def test_the_sketch_knows_between_which_values_inputs_lie_and_what_is_not_finite() -> None:
    traffic = Traffic(SIGNATURE)
    traffic.see(request(3, x=np.nan))
    assert "x" not in traffic.sketch()["values"]
    for value in [0.25, -2.0, np.inf] * 64:  # one of 64 is looked at, whichever it is
        traffic.see(request(5, x=value))
    values = traffic.sketch()["values"]
    assert values["ids"] == {"low": 3.0, "high": 5.0, "looked_at": 12, "not_finite": 0}
    assert {values["x"]["low"], values["x"]["high"]} <= {0.25, -2.0}
    assert values["x"]["not_finite"] == 4


def test_nothing_of_the_content_is_kept_unless_asked_for(tmp_path: Path) -> None:
    traffic = Traffic(SIGNATURE)
    traffic.see(request(1))
    assert traffic.sample() == {}
    traffic.save(tmp_path / "m")
    assert [path.name for path in (tmp_path / "m").iterdir()] == ["sketch.json"]


def test_every_row_has_the_same_chance_to_be_kept_whenever_it_came() -> None:
    early = 0
    for seed in range(60):
        traffic = Traffic(SIGNATURE, capture_rows=10, seed=seed)
        for first in range(0, 100, 4):
            traffic.see(request(first, rows=4))
        sample = kept(traffic)
        assert len(sample) == len(set(sample)) == 10
        early += sum(row < 50 for row in sample)
    assert 240 <= early <= 360  # of 600: six standard deviations of a fair choice


@given(st.integers(1, 8), st.lists(st.tuples(st.integers(1, 5), st.integers(1, 9)), max_size=12))
def test_what_is_kept_is_bounded_and_was_asked(
    capture_rows: int, asked: list[tuple[int, int]]
) -> None:
    traffic, first = Traffic(SIGNATURE, capture_rows=capture_rows, seed=1), 10
    lengths: dict[int, int] = {}
    for rows, length in asked:
        traffic.see(request(first, rows, length))
        lengths |= dict.fromkeys(range(first, first + rows), length)
        first += rows
    sample = traffic.sample()
    assert len(kept(traffic)) == min(capture_rows, first - 10)
    for row in sample.get("ids", []):
        length = lengths[int(row[0])]
        assert (row[:length] == row[0]).all()
        assert (row[length:] == 7).all()


def test_rows_are_copies_and_age(tmp_path: Path) -> None:
    clock = Clock()
    traffic = Traffic(SIGNATURE, capture_rows=3, ttl_hours=1, clock=clock)
    ids = np.full((1, 2), 11)
    inputs = {"ids": ids, "x": np.zeros((1, 2), np.float32)}
    asked = lrai.InferenceRequest(model_name="m", inputs=inputs)
    traffic.see(validate(asked, SIGNATURE, LimitsConfig()))
    ids[:] = 99
    assert kept(traffic) == [11]
    clock.now += 1800
    traffic.see(request(20, rows=2))
    traffic.save(tmp_path)
    assert kept(traffic) == [11, 20, 21]
    clock.now += 1801
    assert kept(traffic) == [20, 21]
    traffic.see(request(30))
    assert kept(traffic) == [20, 21, 30]
    clock.now += 3600
    traffic.save(tmp_path)
    assert not (tmp_path / "captured.npz").exists()


def test_large_rows_are_bounded_by_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lrai_deployments.traffic._MOST_BYTES", 1000)
    monkeypatch.setattr("lrai_deployments.traffic._MOST_BYTES_OF_FEW", 1000)
    traffic = Traffic(SIGNATURE, capture_rows=100)
    for first in range(50):
        traffic.see(request(first, length=30))
    assert 3 <= len(kept(traffic)) <= 5


def test_one_long_row_does_not_make_the_others_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lrai_deployments.traffic._MOST_BYTES", 100_000)
    monkeypatch.setattr("lrai_deployments.traffic._MOST_BYTES_OF_FEW", 100_000)
    traffic = Traffic(SIGNATURE, capture_rows=100)
    for first in range(50):
        traffic.see(request(first, length=3))
    traffic.see(request(50, length=2_000))
    assert kept(traffic) == list(range(50))
    assert sum(array.nbytes for array in traffic.sample().values()) <= 100_000


def test_a_full_sample_does_not_grow_by_what_takes_a_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lrai_deployments.traffic._MOST_BYTES", 10_000)
    monkeypatch.setattr("lrai_deployments.traffic._MOST_BYTES_OF_FEW", 10_000)
    traffic = Traffic(SIGNATURE, capture_rows=20, seed=0)
    for first in range(20):
        traffic.see(request(first, length=3))
    for first in range(2000):
        traffic.see(request(first, length=300))
    assert traffic._kept_bytes <= 20_000


def test_a_sample_that_is_bounded_by_its_bytes_favours_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where a small row takes the place of a large one there is room again, for no one in turn."""
    monkeypatch.setattr("lrai_deployments.traffic._MOST_BYTES", 10_000)
    monkeypatch.setattr("lrai_deployments.traffic._MOST_BYTES_OF_FEW", 10_000)
    late = total = 0
    for seed in range(40):
        traffic = Traffic(SIGNATURE, capture_rows=1000, seed=seed)
        for first in range(400):
            traffic.see(request(first, length=(100, 1)[first % 2]))
        late += sum(row >= 200 for row in kept(traffic))
        total += len(kept(traffic))
    assert 0.4 <= late / total <= 0.6


def test_rows_that_are_larger_than_those_before_are_kept_as_often(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lrai_deployments.traffic._MOST_BYTES", 100_000)
    monkeypatch.setattr("lrai_deployments.traffic._MOST_BYTES_OF_FEW", 100_000)
    traffic = Traffic(SIGNATURE, capture_rows=1000, seed=0)
    for first in range(10_000):
        traffic.see(request(first, length=1 if first < 2_000 else 200))
    assert traffic._kept_bytes <= 200_000
    assert 0.7 <= np.mean([row.arrays[0][0, 0] >= 2_000 for row in traffic._sample]) <= 0.9


def test_the_folder_of_all_names_is_the_owners_alone_whatever_the_mask_is(tmp_path: Path) -> None:
    """Else others could put rows in the place of those that a model is judged by."""
    traffic = Traffic(SIGNATURE)
    traffic.see(request(1, length=2))
    before = os.umask(0)
    try:
        traffic.save(tmp_path / "traffic" / "m")
    finally:
        os.umask(before)
    for made in (tmp_path / "traffic", tmp_path / "traffic" / "m"):
        assert stat.S_IMODE(made.stat().st_mode) == 0o700


def test_a_folder_that_was_deleted_is_made_again_for_its_owner_alone(tmp_path: Path) -> None:
    """Clients refuse a daemon's folder that others may enter."""
    traffic = Traffic(SIGNATURE)
    traffic.see(request(10))
    traffic.save(tmp_path / "lrai-1000" / "traffic" / "m")
    assert stat.S_IMODE((tmp_path / "lrai-1000").stat().st_mode) == 0o700


def test_what_is_written_is_the_owners_alone_and_judges_a_model(tmp_path: Path) -> None:
    traffic = Traffic(SIGNATURE, capture_rows=100)
    for first, length in [(10, 2), (20, 5), (30, 3)]:
        traffic.see(request(first, rows=2, length=length))
    for _ in range(2):  # the second time over the first
        traffic.save(tmp_path)
    files = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert files == {"sketch.json": 0o600, "captured.npz": 0o600}
    rows, repeated = read_rows(tmp_path / "captured.npz", SIGNATURE, "evaluation")
    assert (len(rows), repeated) == (6, 0)
    assert sorted(row[0].shape[1] for row in rows.inputs) == [2, 2, 3, 3, 5, 5]
    sketch = msgspec.json.decode((tmp_path / "sketch.json").read_bytes(), type=dict[str, Any])
    assert sketch["rows"] == [0, 0, 3]


def test_strings_are_kept_as_text(tmp_path: Path) -> None:
    spec = lrai.TensorSpec(name="s", datatype="BYTES", shape=("batch",), batch_axis=0)
    signature = lrai.Signature(inputs=(spec,), outputs=SIGNATURE.outputs)
    traffic = Traffic(signature, capture_rows=4)
    inputs = {"s": np.array(["süß", "b"], np.object_)}
    asked = lrai.InferenceRequest(model_name="m", inputs=inputs)
    traffic.see(validate(asked, signature, LimitsConfig()))
    traffic.save(tmp_path)
    with np.load(tmp_path / "captured.npz", allow_pickle=False) as saved:
        assert sorted(saved["s"].tolist()) == ["b", "süß"]


def test_what_is_seen_is_written_down_now_and_then(tmp_path: Path) -> None:
    clock, later = Clock(), list[Callable[[], None]]()
    watch = Watch(Traffic(SIGNATURE, clock=clock), tmp_path / "m", later.append)
    for seconds, saves in [(0.0, 1), (59.0, 1), (2.0, 2)]:
        clock.now += seconds
        watch.see(request(1))
        assert len(later) == saves
    later[-1]()
    sketch = msgspec.json.decode((tmp_path / "m" / "sketch.json").read_bytes())
    assert sketch["requests"] == 3


@pytest.mark.parametrize("name", ["..", ".", "a/../b", "m"])
def test_what_a_name_has_lies_where_rows_are_forgotten(tmp_path: Path, name: str) -> None:
    artifact = lrai.Artifact.open(small_artifact.build(tmp_path / "m.lrai"))
    config = RuntimeConfig(state_dir=str(tmp_path / "state"))
    watch = module.watch(name, artifact, config, lambda _: None)
    assert watch is not None
    assert watch.folder.resolve().parent == (tmp_path / "state" / "traffic").resolve()
    assert unquote(watch.folder.name) == name


def test_of_two_that_write_at_once_the_later_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch(Traffic(SIGNATURE, capture_rows=9), tmp_path / "m", lambda _: None)
    taken, goes_on, write = threading.Event(), threading.Event(), module._write

    def slow(stream: Any, sample: dict[str, Array]) -> None:
        taken.set()
        assert goes_on.wait(30)
        write(stream, sample)

    monkeypatch.setattr(module, "_write", slow)
    watch.see(request(1))
    earlier, later = (threading.Thread(target=watch.save) for _ in range(2))
    earlier.start()
    assert taken.wait(30)
    monkeypatch.setattr(module, "_write", write)
    watch.see(request(1))
    later.start()
    later.join(0.2)  # without waiting for the other one it would be through by now
    goes_on.set()
    for thread in (earlier, later):
        thread.join()
    with np.load(tmp_path / "m" / "captured.npz", allow_pickle=False) as found:
        assert len(found["x"]) == 2


def test_the_next_runtime_goes_on_with_what_was_kept(tmp_path: Path) -> None:
    before = Traffic(SIGNATURE, capture_rows=10, seed=1)
    for first in range(8):
        before.see(request(first))
    before.save(tmp_path)
    file = tmp_path / "captured.npz"
    noon = file.stat().st_mtime - 1800
    os.utime(file, (noon, noon))
    clock = Clock()
    after = Traffic(SIGNATURE, capture_rows=6, ttl_hours=1, clock=clock)
    after.go_on(tmp_path)
    after.see(request(100, x=math.nan))
    after.save(tmp_path)  # there is no row yet to compare with
    assert len(np.load(file)["ids"]) == 8
    after.see(request(101))
    after.save(tmp_path)
    assert 101 in kept(after)
    assert len(set(kept(after))) == 6
    assert abs(file.stat().st_mtime - noon) < 60
    clock.now += 1860  # those of before are an hour old
    after.save(tmp_path)
    assert kept(after) == [101]
    assert len(np.load(file)["ids"]) == 1


def test_rows_are_forgotten_in_time_though_the_clock_was_set_back(tmp_path: Path) -> None:
    before = Traffic(SIGNATURE, capture_rows=10, seed=1)
    before.see(request(1))
    before.save(tmp_path)
    file = tmp_path / "captured.npz"
    later = file.stat().st_mtime + 7200
    os.utime(file, (later, later))
    clock = Clock()
    after = Traffic(SIGNATURE, capture_rows=10, ttl_hours=1, clock=clock)
    after.go_on(tmp_path)
    after.see(request(2))
    after.save(tmp_path)
    assert sorted(kept(after)) == [1, 2]
    clock.now += 3660
    after.see(request(3))
    assert kept(after) == [3]


def test_a_restart_goes_on_with_the_sketch(tmp_path: Path) -> None:
    def sketched(*requests: ValidRequest, hours: float = 24.0) -> dict[str, Any]:
        """Return what is kept after a runtime has begun, and seen these."""
        config = RuntimeConfig(state_dir=str(tmp_path), capture_ttl_hours=hours)
        made = watch("m", of("a"), config, lambda save: save())
        assert made is not None
        for one in requests:
            made.see(one)
        made.save()
        content = (tmp_path / "traffic" / "m" / "sketch.json").read_bytes()
        return msgspec.json.decode(content, type=dict[str, Any])

    sketched(*[request(10, rows=2, x=0.25)] * 64)
    found = sketched(request(5, length=9, x=4.0))
    assert found["requests"] == 65
    assert found["rows"] == [0, 1, 64]
    assert found["lengths"] == [0, 0, 64, 0, 1]
    assert sum(found["gaps_us"]) == 65
    assert found["values"]["x"] == {"low": 0.25, "high": 4.0, "looked_at": 6, "not_finite": 0}
    assert sketched(hours=1.0) == found, "who has seen nothing leaves it as it is"


def test_how_often_is_counted_while_a_runtime_runs(tmp_path: Path) -> None:
    for requests in (10, 20):
        clock = Clock()
        traffic = Traffic(SIGNATURE, clock=clock)
        traffic.go_on(tmp_path)
        for _ in range(10):
            clock.now += 0.5
            traffic.see(request(1))
        assert traffic.sketch()["requests"] == requests
        assert traffic.sketch()["requests_per_second"] == pytest.approx(2)
        traffic.save(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{}", b"\xff", b"[" * 100_000, b'{"requests": 7}',
        (b'{"requests": 7, "requests_per_second": 1, "rows": [], "lengths": [], "gaps_us": [],'
         b' "values": {"other": {"low": 0, "high": 1, "looked_at": 1, "not_finite": 0}}}'),
        (b'{"requests": 7, "requests_per_second": 1, "rows": [], "lengths": [], "gaps_us": [],'
         b' "values": {}, "sources": ["other"]}'),  # of texts alone
    ],
)  # fmt: skip
def test_a_sketch_of_another_model_and_a_damaged_one_are_replaced(
    tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "sketch.json").write_bytes(content)
    traffic = Traffic(SIGNATURE)
    traffic.go_on(tmp_path)
    traffic.see(request(7))
    traffic.save(tmp_path)
    assert msgspec.json.decode((tmp_path / "sketch.json").read_bytes())["requests"] == 1


def test_rows_of_another_model_and_damaged_ones_are_replaced(tmp_path: Path) -> None:
    file = tmp_path / "captured.npz"
    ids = np.zeros((4, 3), np.int64)
    first = Traffic(SIGNATURE)
    first.see(request(7))
    first.save(tmp_path)
    for content in (
        b"",
        b"PK\3\4 damaged",
        {"other": ids},
        {"ids": ids, "x": np.zeros((4, 1), np.float32)},
        {"ids": ids.astype(np.int32), "x": np.zeros((4, 2), np.float32)},
        {"ids": ids, "x": np.zeros((3, 2), np.float32)},
        {"ids": np.int64(1), "x": np.zeros((3, 2), np.float32)},
    ):
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            np.savez(file, **content)
        traffic = Traffic(SIGNATURE, capture_rows=10)
        traffic.go_on(tmp_path)
        traffic.see(request(7))
        traffic.save(tmp_path)
        assert kept(traffic) == [7]
        assert np.load(file)["ids"][:, 0].tolist() == [7]


def test_a_model_goes_on_with_its_own_and_not_with_that_of_another_of_its_name(
    tmp_path: Path,
) -> None:
    config = RuntimeConfig(state_dir=str(tmp_path), capture_rows=10)

    def asked(row: int, *sources: str) -> list[int]:
        """Ask versions of these sources, under one name in a new runtime; return the rows kept."""
        versions = list[Watch]()
        for source in sources:
            made = watch("m", of(source), config, lambda _: None, versions)
            assert made is not None
            versions.append(made)
        assert len(set(versions)) == 1
        versions[0].see(request(row))
        versions[0].save()
        sketch = msgspec.json.decode((versions[0].folder / "sketch.json").read_bytes())
        assert sketch["requests"] == len(kept(versions[0].traffic))
        return kept(versions[0].traffic)

    assert asked(1, "a") == [1]
    assert asked(2, "a", "tuned") == [1, 2]  # which is of another file
    assert asked(3, "tuned") == [1, 2, 3], "it has taken the place of the one before"
    assert asked(4, "another") == [4], "its inputs are the same, what it is asked need not be"


def test_versions_that_capture_otherwise_leave_each_others_rows(tmp_path: Path) -> None:
    def serving(source: str, rows: int, *beside: Watch) -> Watch:
        config = RuntimeConfig(state_dir=str(tmp_path), capture_rows=rows)
        made = watch("m", of(source), config, lambda _: None, beside)
        assert made is not None
        return made

    def asked(one: Watch, first: int) -> list[int]:
        """Return the rows that lie there once it was asked for this one, and has saved."""
        one.see(request(first))
        one.save()
        return sorted(np.load(captured)["ids"][:, 0].tolist()) if captured.exists() else []

    captured = tmp_path / "traffic" / "m" / "captured.npz"
    plain = serving("a", 0)
    few = serving("few", 5, plain)
    assert asked(plain, 1) == []
    keeps = serving("tuned", 10, plain, few)
    assert asked(keeps, 2) == [2]
    assert asked(plain, 3) == [2], "it keeps none, and has none to remove"
    few.see(request(4, x=math.nan))  # which nobody could be judged by
    few.save()
    assert asked(plain, 5) == [2], "nor has who would keep some"
    assert asked(serving("tuned", 10), 6) == [2, 6], "the next runtime goes on, whoever saved last"
    assert asked(serving("another", 0), 7) == [], "what is of another model is removed"


def test_who_has_seen_nothing_leaves_what_others_kept(tmp_path: Path) -> None:
    seen = Traffic(SIGNATURE, capture_rows=5)
    seen.see(request(1))
    seen.save(tmp_path)
    left = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    Traffic(SIGNATURE, capture_rows=5).save(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == left


def test_rows_that_nobody_could_be_judged_by_are_not_kept() -> None:
    traffic = Traffic(SIGNATURE, capture_rows=5)
    traffic.see(request(1, x=math.nan))
    assert traffic.sample() == {}
    traffic.see(request(1))
    assert len(next(iter(traffic.sample().values()))) == 1


def test_what_an_ended_runtime_captured_is_removed_when_it_is_too_old(tmp_path: Path) -> None:
    config = RuntimeConfig(state_dir=str(tmp_path), capture_ttl_hours=24.0)  # the model's is one
    folder, clock = tmp_path / "traffic" / "m", Clock()
    traffic = Traffic(SIGNATURE, capture_rows=5, ttl_hours=1.0, clock=clock)
    traffic.see(request(1))
    clock.now += 1800
    traffic.save(folder)
    (folder / ".captured.npz.abc").touch()  # whoever wrote it was killed
    forget_aged(config)  # somebody may be at it
    assert (folder / ".captured.npz.abc").exists()
    forget_aged(config, halves=True)
    assert {file.name for file in folder.iterdir()} == {"sketch.json", "captured.npz"}
    found = (folder / "captured.npz").stat()
    os.utime(folder / "captured.npz", (found.st_mtime - 1801, found.st_mtime - 1801))
    forget_aged(config)
    assert {file.name for file in folder.iterdir()} == {"sketch.json"}


def test_rows_are_forgotten_as_they_were_captured_though_nobody_captures_now(
    tmp_path: Path,
) -> None:
    captured = tmp_path / "traffic" / "m" / "captured.npz"
    config = RuntimeConfig(state_dir=str(tmp_path))
    for rows, hours in [(5, 1.0), (0, 24.0), (0, 24.0)]:
        given = replace(config, capture_rows=rows, capture_ttl_hours=hours)
        made = watch("m", of("a"), given, lambda _: None)
        assert made is not None
        made.see(request(1))
        made.save()
    forget_aged(config)
    assert captured.exists()
    aged = captured.stat().st_mtime - 3601
    os.utime(captured, (aged, aged))
    forget_aged(config)
    assert not captured.exists()


def test_sketches_are_not_read_in_vain_and_not_kept_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each version of a host's model may have a name, and a sketch, of its own."""
    config, month = RuntimeConfig(state_dir=str(tmp_path)), 31 * 86400
    for name in ("old", "a%2Fb", "new"):
        (folder := tmp_path / "traffic" / name).mkdir(parents=True)
        sketch = folder / "sketch.json"
        sketch.touch()
        aged = sketch.stat().st_mtime - month * (name != "new")
        os.utime(sketch, (aged, aged))

    def read(path: Path) -> bytes:
        raise AssertionError(path)

    monkeypatch.setattr(Path, "read_bytes", read)
    forget_aged(config, {"a/b"})
    assert {folder.name for folder in (tmp_path / "traffic").iterdir()} == {"a%2Fb", "new"}


def test_threads_that_load_at_once_do_not_meet_where_a_type_is_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Traffic(SIGNATURE)
    seen.see(request(1))
    seen.save(tmp_path)
    after = Traffic(SIGNATURE)
    with monkeypatch.context() as patch:
        patch.setattr(msgspec.json, "decode", None)  # which learns a type when it is first asked
        after.go_on(tmp_path)
    assert after.sketch()["requests"] == 1


@pytest.mark.parametrize(
    "content",
    [
        b'{"capture_ttl_hours": "x"}', b'{"capture_ttl_hours": null}', b"\xff", b"[" * 100_000,
        b'{"a": "\xff"}', b'{"capture_ttl_hours": 1' + b"0" * 400 + b"}",
        b'{"capture_ttl_hours": "nan"}',
    ],
)  # fmt: skip
def test_a_damaged_sketch_keeps_nobody_from_starting(tmp_path: Path, content: bytes) -> None:
    config, folder = RuntimeConfig(state_dir=str(tmp_path)), tmp_path / "traffic" / "m"
    folder.mkdir(parents=True)
    (folder / "sketch.json").write_bytes(content)
    (folder / "captured.npz").touch()
    forget_aged(config)
    assert (folder / "captured.npz").exists()
    os.utime(folder / "captured.npz", (0, 0))
    forget_aged(config)
    assert not (folder / "captured.npz").exists()


def test_a_state_folder_that_cannot_be_listed_keeps_nobody_from_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Path, "glob", broken)
    forget_aged(RuntimeConfig(state_dir=str(tmp_path)), halves=True)


def test_a_place_that_cannot_be_written_harms_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    watch = Watch(Traffic(SIGNATURE), tmp_path / "file" / "m", lambda save: save())
    watch.see(request(1))
    assert "traffic is not kept" in caplog.text


def free_rows(folder: Path, name: str, widths: Sequence[int]) -> Array:
    """Return what is kept of rows of these widths, which is no length axis."""
    free = lrai.TensorSpec(name=name, datatype="FP32", shape=("batch", "width"), batch_axis=0)
    signature = lrai.Signature(inputs=(free,), outputs=())
    watch = Watch(Traffic(signature, capture_rows=10), folder, lambda _: None)
    for width in widths:
        inputs = {name: np.zeros((1, width), np.float32)}
        asked = lrai.InferenceRequest(model_name="m", inputs=inputs)
        watch.see(validate(asked, signature, LimitsConfig()))
    watch.save()
    with np.load(folder / "captured.npz", allow_pickle=False) as saved:
        found: Array = saved[name]
    return found


def test_rows_that_do_not_go_into_the_array_of_the_others_are_left_out(tmp_path: Path) -> None:
    assert free_rows(tmp_path, "x", [3, 2, 3]).shape == (2, 3)


@pytest.mark.parametrize("name", ["file", "allow_pickle", "self", "a/b"])
def test_inputs_may_have_any_name(tmp_path: Path, name: str) -> None:
    assert free_rows(tmp_path, name, [3]).shape == (1, 3)


def test_large_rows_are_enough_to_judge_by() -> None:
    wide = lrai.TensorSpec(name="x", datatype="FP32", shape=("batch", 200_000), batch_axis=0)
    signature = lrai.Signature(inputs=(wide,), outputs=())
    traffic = Traffic(signature, capture_rows=2000)
    asked = lrai.InferenceRequest(model_name="m", inputs={"x": np.zeros((1, 200_000), np.float32)})
    valid = validate(asked, signature, LimitsConfig())
    for _ in range(300):
        traffic.see(valid)
    assert 250 <= len(traffic._sample) <= 300


def test_the_sample_stays_one_of_all_that_came_when_rows_age() -> None:
    clock = Clock()
    traffic = Traffic(SIGNATURE, capture_rows=100, ttl_hours=1, seed=0, clock=clock)
    for first in range(12_000):  # for two hours
        clock.now += 0.6
        traffic.see(request(first))
    ages = sorted(clock.now - row.seen for row in traffic._sample)
    assert ages[-1] <= 3600
    assert ages[len(ages) // 2] > 600  # a fair median is 1800


def test_rows_that_come_after_many_have_aged_at_once_are_no_large_part_of_the_sample() -> None:
    """As after a pause: those that are left stand for many more than have come since."""
    clock = Clock()
    traffic = Traffic(SIGNATURE, capture_rows=100, ttl_hours=1, seed=0, clock=clock)
    for first in range(6_000):  # for twenty minutes
        clock.now += 0.2
        traffic.see(request(first))
    clock.now += 50 * 60  # half of them have aged
    for first in range(6_000, 6_200):
        clock.now += 0.1
        traffic.see(request(first))
    came_since = sum(row >= 6_000 for row in kept(traffic))
    assert came_since < 20  # 200 of 3,200 would be 6 of 100
    clock.now += 10 * 60  # the last of them have not
    for first in range(6_200, 6_400):
        clock.now += 0.1
        traffic.see(request(first))
    assert len(traffic._sample) > 50, "their places are taken as time goes by"
