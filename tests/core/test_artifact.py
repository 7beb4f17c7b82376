from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lrai_core as lrai
from lrai_core import artifact as store
from lrai_core.artifact import Artifact, check_files, disk_errors, write_lines, writing
from lrai_core.errors import VERSION, ArtifactError, EnvironmentProblem, LraiError, UsageError
from tests.core import small_artifact

FILES = [
    "source/model.onnx",
    "source/weights.bin",
    "variants/fp32/model.onnx",
    "variants/int8/model.onnx",
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return small_artifact.build(tmp_path / "small.lrai")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_artifact.build(tmp_path_factory.mktemp("shared") / "small.lrai")


def refusal(path: Path) -> str:
    with pytest.raises(ArtifactError) as caught:
        Artifact.open(path)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 600
    return message


def leftovers(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


# Reading


def test_a_written_artifact_opens_and_names_its_variants(path: Path) -> None:
    artifact = Artifact.open(path)
    assert [variant.id for variant in artifact.variants] == ["int8", "fp32"]
    assert artifact.manifest.chosen == "int8"
    assert artifact.sha256 == store.sha256_file(path / "manifest.json")
    assert artifact.version == artifact.sha256[:12]
    assert artifact.file("source/model.onnx") == path / "source/model.onnx"


def test_the_manifest_hashes_every_file_but_itself_and_the_certificates(path: Path) -> None:
    assert sorted(Artifact.open(path).manifest.files) == FILES
    (path / "certificates").mkdir()
    (path / "certificates" / "c.json").write_text("{}")
    assert sorted(Artifact.open(path).manifest.files) == FILES


def test_files_of_a_variant_are_its_graph_and_all_that_lies_where_its_weights_do(
    path: Path,
) -> None:
    """Whatever their names are: a graph may find weights in any of them."""
    artifact = Artifact.open(path)
    found = artifact.files_of(artifact.manifest.variant("int8"))
    assert sorted(found) == ["source/model.onnx", "source/weights.bin", "variants/int8/model.onnx"]


def test_an_unknown_variant_or_file_is_refused_with_those_there_are(path: Path) -> None:
    artifact = Artifact.open(path)
    with pytest.raises(UsageError, match="no variant 'int4'; the artifact has int8, fp32"):
        artifact.manifest.variant("int4")
    with pytest.raises(ArtifactError, match=r"does not name '\.\./secret'"):
        artifact.file("../secret")


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_refused_even_without_hashing(path: Path, name: str) -> None:
    content = (path / name).read_bytes()
    (path / name).write_bytes(content[:-1])
    with pytest.raises(ArtifactError, match=f"{name} has {len(content) - 1} bytes"):
        Artifact.open(path, verify=False)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(st.sampled_from(FILES), st.data())
def test_one_flipped_bit_anywhere_is_refused(shared: Path, name: str, data: st.DataObject) -> None:
    file = shared / name
    content = file.read_bytes()
    at = data.draw(st.integers(0, 8 * len(content) - 1))
    changed = bytearray(content)
    changed[at // 8] ^= 1 << at % 8
    try:
        file.write_bytes(changed)
        with pytest.raises(ArtifactError, match=f"{name} has changed"):
            Artifact.open(shared)
    finally:
        file.write_bytes(content)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(data=st.data())
def test_a_damaged_manifest_opens_as_another_version_or_is_refused(
    shared: Path, data: st.DataObject
) -> None:
    file = shared / "manifest.json"
    content = file.read_bytes()
    version = Artifact.open(shared).version
    at = data.draw(st.integers(0, len(content) - 1))
    kind = data.draw(st.sampled_from(["flip", "cut", "insert"]))
    new = bytes([data.draw(st.integers(0, 255))])
    changed = {
        "flip": content[:at] + new + content[at + 1 :],
        "cut": content[:at],
        "insert": content[:at] + new + content[at:],
    }[kind]
    try:
        file.write_bytes(changed)
        try:
            found = Artifact.open(shared)
        except ArtifactError:
            return
        assert (found.version == version) == (changed == content)
    finally:
        file.write_bytes(content)


def test_a_wrong_hash_in_the_manifest_is_refused(path: Path) -> None:
    files = msgspec.to_builtins(Artifact.open(path).manifest.files)
    files["source/weights.bin"]["sha256"] = "0" * 64
    small_artifact.rewrite(path, {"files": files})
    assert refusal(path) == (
        "source/weights.bin has changed since the artifact was written: sha256 differs"
    )


def test_a_newer_schema_is_refused_with_the_way_out_even_if_its_fields_are_unknown(
    path: Path,
) -> None:
    small_artifact.rewrite(path, {"schema_version": 3, "invented_later": [1]})
    assert "has schema 3, this version of lrai reads up to 2; install a newer" in refusal(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[]",
        b"\xff\xfe",
        b'{"schema_version": "1"}',
        b'{"schema_version": 1}',
        b'{"schema_version": 1, "x": ' + b"[" * 100_000,
        b'{"schema_version": 1, "' + b"x" * 1_000_000 + b'": 1}',
    ],
)
def test_a_manifest_that_is_none_is_refused_in_a_sentence(path: Path, content: bytes) -> None:
    (path / "manifest.json").write_bytes(content)
    assert "manifest.json cannot be read" in refusal(path)


def test_an_unknown_field_in_the_manifest_is_refused(path: Path) -> None:
    small_artifact.rewrite(path, {"surprise": "x" * 1_000_000})
    assert "unknown field `surprise`" in refusal(path)


def test_a_manifest_that_another_lrai_has_written_says_which_one(path: Path) -> None:
    small_artifact.rewrite(path, {"lrai_version": "9.9.9", "surprise": 1})
    way_out = ": install that one, or compile again"
    assert f"written by lrai 9.9.9, this is lrai {VERSION}{way_out}" in refusal(path)
    small_artifact.rewrite(path, {"lrai_version": VERSION})  # of which there are builds
    assert f"written by lrai {VERSION}, maybe by another build of it{way_out}" in refusal(path)
    small_artifact.rewrite(path, {"lrai_version": "9\n" * 1_000_000})
    assert "written by lrai 9?9?" in refusal(path)


FIELDS = {  # of a manifest, by schema
    1: {
        "Disparity": "attribute measure source variant widened_bound groups",
        "FileEntry": "sha256 size_bytes",
        "GateResult": "passed why rows measure agreement agreement_bound accuracy_loss "
        "accuracy_loss_bound difference groups disparities",
        "LatencyPoint": "rows length median_ms spread_ms",
        "Manifest": "schema_version lrai_version created name source signature variants chosen "
        "together candidates demanded objective target files",
        "Signature": "inputs outputs",
        "Source": "file sha256 opset operators",
        "Target": "isa engine engine_version threads",
        "TensorSpec": "name datatype shape batch_axis length_axis pad_value output_map",
        "Variant": "id engine engine_version precision model weights size_bytes passes_off latency "
        "speedup gate batch_effect why",
    }
}
FIELDS[2] = FIELDS[1] | {
    "LatencyPoint": "rows length median_ms spread_ms named",
    "Signature": "inputs outputs calls",
}


def test_another_field_of_the_manifest_is_another_schema() -> None:
    """Who reads it refuses a field that he does not know, and has to be told that it is newer."""
    kinds = msgspec.json.schema(store.Manifest)["$defs"]
    fields = {name: " ".join(kind["properties"]) for name, kind in kinds.items()}
    assert fields == FIELDS[store.SCHEMA_VERSION]


def test_what_was_written_before_calls_could_be_named_is_read(path: Path) -> None:
    small_artifact.rewrite(path, {"schema_version": 1})
    manifest = path / store.MANIFEST
    tree = msgspec.json.decode(manifest.read_bytes())
    del tree["signature"]["calls"]
    for variant in tree["variants"]:
        for point in variant["latency"]:
            del point["named"]
    manifest.write_bytes(msgspec.json.encode(tree))
    assert Artifact.open(path).manifest.signature.calls == ()


@pytest.mark.parametrize(
    "name",
    [
        "../secret",
        "/etc/passwd",
        "source/../../secret",
        "a\\..\\secret",
        "..",
        "",
        "nul\0in",
        "line\nbreak",
        "x" * 1_000_000,
        "x/" * 100_000 + "y",
    ],
)
def test_a_name_that_leaves_the_artifact_or_is_none_is_refused(path: Path, name: str) -> None:
    (path.parent / "secret").write_bytes(b"secret")
    files = msgspec.to_builtins(Artifact.open(path).manifest.files)
    files[name] = msgspec.to_builtins(small_artifact.entry(b"secret"))
    small_artifact.rewrite(path, {"files": files})
    refusal(path)
    with pytest.raises(ArtifactError):
        Artifact.open(path, verify=False)


def test_an_absolute_name_is_refused_even_where_size_and_hash_fit(path: Path) -> None:
    secret = path.parent / "secret"
    secret.write_bytes(b"secret")
    files = msgspec.to_builtins(Artifact.open(path).manifest.files)
    files[str(secret)] = msgspec.to_builtins(small_artifact.entry(b"secret"))
    small_artifact.rewrite(path, {"files": files})
    assert "leaves the artifact" in refusal(path)


def test_a_link_is_refused_even_where_size_and_hash_fit(path: Path) -> None:
    secret = path.parent / "secret"
    secret.write_bytes(b"secret")
    files = msgspec.to_builtins(Artifact.open(path).manifest.files)
    (path / "link").symlink_to(secret)
    length_of_its_target = (path / "link").lstat().st_size
    files["link"] = {"sha256": store.sha256_file(secret), "size_bytes": length_of_its_target}
    small_artifact.rewrite(path, {"files": files})
    assert "link is a link or a special file" in refusal(path)


@pytest.mark.parametrize("weights", ["..", "../..", "/etc", "source/../..", "elsewhere"])
def test_weights_outside_the_artifact_are_refused(path: Path, weights: str) -> None:
    variants = msgspec.to_builtins(Artifact.open(path).manifest.variants)
    variants[0]["weights"] = weights
    small_artifact.rewrite(path, {"variants": variants})
    assert "hashes nothing in the weights folder" in refusal(path)


@pytest.mark.parametrize("name", ["../evil", "a/b", "", "x" * 1_000, "-rf", "a b", "fp32\n"])
def test_a_variant_id_that_could_not_be_a_file_name_is_refused(path: Path, name: str) -> None:
    variants = msgspec.to_builtins(Artifact.open(path).manifest.variants)
    variants[0]["id"] = name
    small_artifact.rewrite(path, {"variants": variants, "chosen": name})
    assert "manifest.json cannot be read" in refusal(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen": "int4"}, "no variant 'int4'"),
        ({"variants": []}, "no variant 'fp32'"),
        ({"files": {}}, "does not hash 'source/model.onnx'"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(
    path: Path, change: dict[str, Any], message: str
) -> None:
    small_artifact.rewrite(path, change)
    assert message in refusal(path)


def test_of_two_variants_of_one_id_none_is_served(path: Path) -> None:
    """Else the proof of the one could be that of the other."""
    first, *others = msgspec.to_builtins(small_artifact.manifest().variants)
    known = first | {"engine_version": "0"}, first | {"model": others[-1]["model"]}
    small_artifact.rewrite(path, {"variants": [*known, *others], "chosen": first["id"]})
    artifact, told = Artifact.open(path), f"no variant '{first['id']}'; the artifact has "
    with pytest.raises(UsageError, match=told):
        artifact.manifest.serving()
    with pytest.raises(UsageError, match=told):
        lrai.Runtime.open(artifact)


def test_a_profile_of_nothing_is_refused(path: Path) -> None:
    for rows, median_ms in ((0, 1.0), (1, 0.0), (-1, 1.0)):
        variants = msgspec.to_builtins(small_artifact.manifest().variants)
        variants[0]["latency"][0].update(rows=rows, median_ms=median_ms)
        small_artifact.rewrite(path, {"variants": variants})
        assert "manifest.json cannot be read" in refusal(path)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["link", "dangling", "pipe", "folder", "missing"])
def test_anything_but_a_plain_file_is_refused(path: Path, name: str, kind: str) -> None:
    file = path / name
    outside = path.parent / "outside"
    if kind == "dangling":
        file.unlink()
    else:
        file.rename(outside)
    if kind in ("link", "dangling"):
        file.symlink_to(outside)
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    assert name in refusal(path)


def test_a_folder_that_is_a_link_is_refused_anywhere(path: Path) -> None:
    (path / "source").rename(path.parent / "elsewhere")
    (path / "source").symlink_to(path.parent / "elsewhere")
    assert "behind a link" in refusal(path)
    alias = path.parent / "alias.lrai"
    alias.symlink_to(path)
    assert "is a link" in refusal(alias)


@pytest.mark.parametrize(
    "name",
    [
        "stranger",
        "source/stranger.bin",
        "variants/int4/model.onnx",
        "certificates/stranger.onnx",
        "certificates/deep/c.json",
        "line\nbreak",
    ],
)
@pytest.mark.parametrize("kind", ["file", "link", "folder link", "pipe"])
def test_what_the_manifest_does_not_name_is_refused(path: Path, name: str, kind: str) -> None:
    stranger = path / name
    stranger.parent.mkdir(parents=True, exist_ok=True)
    add(stranger, kind)
    assert f"{name} is no file that the manifest names".replace("\n", "?") in refusal(path)
    with pytest.raises(ArtifactError):
        Artifact.open(path, verify=False)


def add(file: Path, kind: str) -> None:
    if kind == "file":
        file.write_bytes(b"content")
    elif kind == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to("/etc" if kind == "folder link" else "/etc/hostname")


def test_beside_certificates_lie_certificates_and_what_becomes_one(path: Path) -> None:
    folder = path / "certificates"
    folder.mkdir()
    for name in ("c.json", "c.partial"):
        (folder / name).write_text("{}")
        Artifact.open(path)
    for kind in ("link", "folder link", "pipe"):
        add(folder / "d.json", kind)
        assert r"certificates/d.json is no file" in refusal(path)
        (folder / "d.json").unlink()
    shutil.rmtree(folder)
    folder.symlink_to("/etc")
    assert "certificates is no file" in refusal(path)


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_a_manifest_that_is_no_plain_file_is_refused(path: Path, kind: str) -> None:
    file = path / "manifest.json"
    file.rename(path.parent / "manifest.json")
    if kind == "link":
        file.symlink_to(path.parent / "manifest.json")
    elif kind == "pipe":
        os.mkfifo(file)
    else:
        file.mkdir()
    assert "manifest.json is not a plain file" in refusal(path)


def test_an_oversized_manifest_is_refused_before_it_is_read(path: Path) -> None:
    os.truncate(path / "manifest.json", 1 << 40)  # a hole, it takes no room on the disk
    assert "is over" in refusal(path)


def test_what_is_no_artifact_is_refused_by_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    assert "there is no manifest.json" in refusal(tmp_path / "missing")
    assert "there is no manifest.json" in refusal(tmp_path / "empty")
    assert "it is a file" in refusal(tmp_path / "file")


def test_check_files_finds_the_change_that_open_without_hashing_lets_pass(path: Path) -> None:
    content = bytearray((path / "source/weights.bin").read_bytes())
    content[7] ^= 1
    (path / "source/weights.bin").write_bytes(content)
    artifact = Artifact.open(path, verify=False)
    with pytest.raises(ArtifactError, match=r"source/weights\.bin has changed"):
        check_files(path, artifact.files_of(artifact.manifest.variant("int8")))


# Writing


def test_writing_makes_the_folder_whole_and_leaves_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "a.lrai"
    with writing(out) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text("content")
        assert not out.exists()
        assert folder.parent == tmp_path  # a rename works within one file system only
    assert (out / "inner" / "file").read_text() == "content"
    assert out.stat().st_mode & 0o777 == 0o755
    assert leftovers(tmp_path) == ["a.lrai"]


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_an_output_that_exists_is_refused_and_left_alone(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "a.lrai"
    if kind == "folder":
        out.mkdir()
    elif kind == "file":
        out.write_text("mine")
    else:
        out.symlink_to("nowhere")
    with pytest.raises(UsageError, match="exists; choose another name"), writing(out):
        pytest.fail("the block must not run")
    assert leftovers(tmp_path) == ["a.lrai"]


def test_an_output_that_appears_meanwhile_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "a.lrai"
    with pytest.raises(UsageError, match="appeared while"), writing(out):
        out.write_text("theirs")
    assert out.read_text() == "theirs"
    assert leftovers(tmp_path) == ["a.lrai"]


def test_ctrl_c_inside_writing_leaves_nothing(tmp_path: Path) -> None:
    def compile_until_ctrl_c() -> None:
        with writing(tmp_path / "a.lrai") as folder:
            (folder / "half").write_bytes(b"\0" * 1000)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        compile_until_ctrl_c()
    assert leftovers(tmp_path) == []


def test_an_error_inside_writing_leaves_nothing_and_stays_what_it_was(tmp_path: Path) -> None:
    def fail_half_way() -> None:
        with writing(tmp_path / "a.lrai") as folder:
            (folder / "half").write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_half_way()
    assert leftovers(tmp_path) == []


def test_every_file_is_on_the_disk_before_the_name_appears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "a.lrai"
    synced: list[tuple[str, bool]] = []

    def fsync(descriptor: int) -> None:
        target = Path(f"/proc/self/fd/{descriptor}").readlink()
        synced.append((target.name, out.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    with writing(out) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text("content")
        name = folder.name
    assert set(synced[:-1]) == {("file", False), ("inner", False), (name, False)}
    assert synced[-1] == (tmp_path.name, True)


def test_a_full_device_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    def fill() -> None:
        with writing(tmp_path / "a.lrai") as folder:
            (folder / "weights").symlink_to("/dev/full")
            (folder / "weights").write_bytes(b"\0" * 100)

    with pytest.raises(EnvironmentProblem, match=r"a\.lrai: the disk is full"):
        fill()
    assert leftovers(tmp_path) == []


def test_a_file_size_limit_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with (
            pytest.raises(EnvironmentProblem, match="cannot be written: File too large"),
            writing(tmp_path / "a.lrai") as folder,
        ):
            (folder / "weights").write_bytes(b"\0" * 10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert leftovers(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 64 KiB; only root may make one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    command = [
        mount or "mount",
        "-t",
        "tmpfs",
        "-o",
        "size=64k,nr_inodes=8",
        "lrai-test",
        str(disk),
    ]
    if mount is None or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("mounting a file system is not permitted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)  # noqa: S607 - beside mount


def test_a_full_disk_is_one_sentence_and_leaves_the_disk_as_it_was(small_disk: Path) -> None:
    before = shutil.disk_usage(small_disk).used
    with (
        pytest.raises(EnvironmentProblem, match="the disk is full"),
        writing(small_disk / "a.lrai") as folder,
    ):
        (folder / "weights").write_bytes(b"\0" * (1 << 20))
    assert leftovers(small_disk) == []
    assert shutil.disk_usage(small_disk).used == before


def test_a_disk_too_full_for_the_folder_itself_is_one_sentence(small_disk: Path) -> None:
    for number in range(7):  # of 8 inodes; the root has one
        (small_disk / str(number)).mkdir()
    with pytest.raises(EnvironmentProblem, match="the disk is full"), writing(small_disk / "a"):
        pytest.fail("the block must not run")


def test_a_read_only_disk_is_one_sentence(small_disk: Path) -> None:
    remount = ["mount", "-o", "remount,ro", str(small_disk)]
    subprocess.run(remount, check=True)
    with (
        pytest.raises(EnvironmentProblem, match="cannot be written: Read-only file system"),
        writing(small_disk / "a.lrai"),
    ):
        pytest.fail("the block must not run")


@pytest.mark.parametrize("parent", ["/sys", "/proc", "/nowhere", "/dev/null"])
def test_a_place_that_takes_no_folder_is_one_sentence(parent: str) -> None:
    with (
        pytest.raises(EnvironmentProblem, match="cannot be written"),
        writing(Path(parent) / "a.lrai"),
    ):
        pytest.fail("the block must not run")


def test_a_name_too_long_for_the_disk_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(LraiError), writing(tmp_path / ("x" * 300)):
        pytest.fail("the block must not run")
    assert leftovers(tmp_path) == []


def test_errors_that_are_not_the_disks_pass_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(ConnectionResetError), disk_errors(tmp_path):
        raise ConnectionResetError(errno.ECONNRESET, "reset")


def test_lines_are_json_one_a_line(tmp_path: Path) -> None:
    write_lines(tmp_path / "log.jsonl", [{"a": 1}, {"b": "line\nbreak"}])
    lines = (tmp_path / "log.jsonl").read_bytes().splitlines()
    assert [msgspec.json.decode(line) for line in lines] == [{"a": 1}, {"b": "line\nbreak"}]


def test_threads_that_open_artifacts_at_once_do_not_meet_where_types_are_learned(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without, a daemon that was asked to load by eight clients at once died in some of the races.
    decode, held = msgspec.json.decode, list[bool]()

    def spy(*arguments: Any, **options: Any) -> Any:
        held.append(store._reading.locked())
        return decode(*arguments, **options)

    monkeypatch.setattr(msgspec.json, "decode", spy)
    Artifact.open(shared, verify=False)
    assert held == [True, True]
