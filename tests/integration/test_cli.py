"""The command line as a person meets it: one sentence, the right exit code, nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from xgboost import XGBRegressor

import lrai_core as lrai
from lrai_core import cli
from tests.core import small_artifact
from tests.core.compiler.onnx_files import linear, save

pytestmark = pytest.mark.server
LRAI = Path(sys.executable).with_name("lrai")


def run(*arguments: str | Path, code: int | set[int], before: tuple[str, ...] = ()) -> str:
    done = subprocess.run(
        [*before, str(LRAI), *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode in ({code} if isinstance(code, int) else code), done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save(linear(), tmp_path / "m.onnx")


@pytest.fixture
def classifier_artifact(
    classifier_rows: tuple[Path, dict[str, Any]], tmp_path: Path
) -> tuple[Path, Path]:
    model, rows = classifier_rows
    np.savez(tmp_path / "rows.npz", **rows)
    out = tmp_path / "c.lrai"
    arguments = ("--evaluation", tmp_path / "rows.npz", "--output-map", "softmax", "--threads", "1")
    run("compile", model, "-o", out, *arguments, code={0, 3})  # 3: nothing is faster on this CPU
    return out, tmp_path / "rows.npz"


def test_compile_inspect_verify_and_check_work_together(
    classifier_artifact: tuple[Path, Path],
) -> None:
    artifact, _ = classifier_artifact
    shown = run("inspect", artifact, code=0)
    for words in ("features FP32", "batch axis 0", "fp32", "x fp32", "certificate", "chosen"):
        assert words in shown
    first = next((artifact / "certificates").iterdir())
    assert "holds" in run("certificate", "check", first, "--artifact", artifact, code=0)
    said = run("verify", artifact, "--epsilon", "0.2", "--radius", "0.01", code=0)
    assert "with 95% confidence" in said
    for certificate in (artifact / "certificates").iterdir():
        run("certificate", "check", certificate, "--artifact", artifact, code=0)


def test_a_slim_artifact_is_measured_nowhere_and_a_whole_one_is_again(
    classifier_rows: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    model, rows = classifier_rows
    np.savez(tmp_path / "rows.npz", **rows)
    options = ("--evaluation", tmp_path / "rows.npz", "--output-map", "softmax", "--threads", "1")
    kept = ("--keep-evaluation", "200")
    said = run("compile", model, "-o", tmp_path / "c.lrai", *options, *kept, code={0, 3})
    assert "certified on 200 of the" in said
    state = ("env", f"LRAI_RUNTIME_STATE_DIR={tmp_path}")
    said = run("requalify", tmp_path / "c.lrai", "--threads", "1", code={0, 3}, before=state)
    assert "this is" in said
    assert list((tmp_path / "requalified").glob("*.json"))
    said = run("compile", model, "-o", tmp_path / "s.lrai", "--slim", *options, *kept, code={0, 3})
    assert "alone" in said
    assert "certified on 200 of the" in said
    assert not (tmp_path / "s.lrai" / "source").exists()
    said = run("requalify", tmp_path / "s.lrai", code=2)
    assert "the artifact is slim" in said
    (file, *_) = (tmp_path / "s.lrai" / "certificates").iterdir()
    checked = ("certificate", "check", file, "--artifact", tmp_path / "s.lrai")
    assert "holds" in run(*checked, "--source", model, code=0)
    run(*checked, code=2)


@pytest.mark.parametrize(
    "command", [("compile", "-o", "a.lrai"), ("requalify",), ("mlflow", "convert")]
)
def test_more_threads_than_any_machine_has_are_refused_at_once(command: tuple[str, ...]) -> None:
    said = run(*command, "nothing", "--threads", "4097", code=2)
    assert "Invalid value for '--threads'" in said
    assert "4096" in said


@pytest.mark.parametrize("command", ["inspect", "report", "tune"])
def test_a_name_that_no_file_can_have_is_said_to_be_too_long(command: str) -> None:
    said = run(command, "a" * 256, code=5)
    assert "File name too long: " in said
    assert "a name has 255 bytes at most" in said


@pytest.mark.parametrize("arguments", ["config", "config --help", "--help", "--version"])
def test_where_there_is_no_room_for_what_it_says_is_one_sentence(arguments: str) -> None:
    full = ("sh", "-c", '"$@" > /dev/full', "sh")
    said = run(*arguments.split(), code=5, before=full)
    assert said == "lrai: [Errno 28] No space left on device\n"


def test_nothing_is_said_where_nobody_reads_the_version() -> None:
    reads, writes = os.pipe()
    os.close(reads)
    try:
        done = subprocess.run(
            [LRAI, "--version"], stdout=writes, stderr=subprocess.PIPE, check=False
        )
    finally:
        os.close(writes)
    assert (done.returncode, done.stderr) == (1, b"")


def test_a_forged_certificate_is_refused_with_exit_3(
    classifier_artifact: tuple[Path, Path],
) -> None:
    artifact, _ = classifier_artifact
    file = next((artifact / "certificates").iterdir())
    text = file.read_text()
    bound = next(line for line in text.splitlines() if '"upper_bound"' in line)
    file.write_text(text.replace(bound, '  "upper_bound": 1e-09,'))
    said = run("certificate", "check", file, "--artifact", artifact, code=3)
    assert "upper_bound is 1e-09" in said


def test_the_original_model_is_checked_against_when_it_is_named(
    classifier_artifact: tuple[Path, Path], classifier_rows: tuple[Path, dict[str, Any]]
) -> None:
    artifact, _ = classifier_artifact
    file = next((artifact / "certificates").iterdir())
    arguments = ("certificate", "check", file, "--artifact", artifact)
    assert "own copy" in run(*arguments, code=0)
    assert "own copy" not in run(*arguments, "--source", classifier_rows[0], code=0)


def test_what_files_say_is_shown_and_neither_obeyed_nor_read_as_markup(tmp_path: Path) -> None:
    artifact = small_artifact.build(tmp_path / "a.lrai", evaluation=small_artifact.rows(80))
    odd = "b[/bold]:smile:\x1b[31m"
    variants = msgspec.to_builtins(small_artifact.manifest().variants)
    variants[0]["why"] = variants[0]["engine"] = odd
    small_artifact.rewrite(artifact, {"name": odd, "created": odd, "variants": variants})
    said = run("inspect", artifact, code=0)
    assert said.count("b[/bold]:smile:?[31m") >= 3
    run("verify", artifact, "--epsilon", "0.1", "--variant", "fp32", code=0)
    file = next((artifact / "certificates").iterdir())
    forged = msgspec.json.decode(file.read_bytes()) | {"variant": odd, "created": odd}
    (artifact / "certificates" / "forged.json").write_bytes(msgspec.json.encode(forged))
    said += run("inspect", artifact, code=0)
    arguments = ("--artifact", artifact)
    said += run("certificate", "check", artifact / "certificates/forged.json", *arguments, code=3)
    assert "of variant b[/bold]:smile:?[31m differs" in " ".join(said.split())
    assert "\x1b" not in said


@pytest.mark.parametrize("more", [(), ("--engine", "openvino")])
def test_a_model_in_which_nothing_can_be_quantised_ends_with_exit_0(
    tmp_path: Path, more: tuple[str, ...]
) -> None:
    x = np.random.default_rng(0).normal(size=(300, 8)).astype("f4")
    model = XGBRegressor(n_estimators=5, max_depth=3, n_jobs=1).fit(x, x[:, 0])
    model.save_model(tmp_path / "m.json")
    np.savez(tmp_path / "rows.npz", features=x)
    out = tmp_path / "m.lrai"
    arguments = ("--evaluation", tmp_path / "rows.npz", "--threads", "1")
    said = run("compile", tmp_path / "m.json", "-o", out, *arguments, *more, code=0)
    assert "nothing in it can be quantised: fp32 serves, batched" in " ".join(said.split())
    assert lrai.Artifact.open(out).manifest.variant("fp32").gate is not None


def test_a_model_that_no_form_makes_faster_ends_with_exit_3(model: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "rows.npz", x=np.random.default_rng(0).normal(size=(300, 8)).astype("f4"))
    out = tmp_path / "m.lrai"
    arguments = ("--evaluation", tmp_path / "rows.npz", "--epsilon", "1e-12", "--delta", "0.05")
    said = run("compile", model, "-o", out, *arguments, code=3)
    assert "no form but fp32" in said
    assert lrai.Artifact.open(out).manifest.chosen == "fp32"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.onnx", None, "No such file"),
        ("text.onnx", b"hello, this is no model", "not an ONNX model"),
        ("empty.onnx", b"", "not an ONNX model"),
        ("cut.onnx", linear(64, 64).SerializeToString()[:5000], "not a"),
    ],
)
def test_an_unusable_model_ends_with_exit_4(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert message in run("compile", tmp_path / name, "-o", tmp_path / "m.lrai", code=4)
    assert not (tmp_path / "m.lrai").exists()


def test_minutes_and_seed_are_told_to_who_does_it_again(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.lrai"
    run("compile", model, "-o", out, "--minutes", "9", "--seed", "3", code=0)
    first = json.loads((out / "quantization.jsonl").read_text().splitlines()[0])
    assert (first["event"], first["minutes"], first["seed"]) == ("asked", 9, 3)


def test_an_output_that_exists_ends_with_exit_2(model: Path, tmp_path: Path) -> None:
    (tmp_path / "m.lrai").mkdir()
    assert "exists" in run("compile", model, "-o", tmp_path / "m.lrai", code=2)


def test_a_missing_argument_ends_with_exit_2(model: Path) -> None:
    assert "output" in run("compile", model, code=2)


def test_a_changed_artifact_ends_with_exit_4(classifier_artifact: tuple[Path, Path]) -> None:
    artifact, _ = classifier_artifact
    weights = artifact / "source" / "weights.bin"
    content = bytearray(weights.read_bytes())
    content[100] ^= 1
    weights.write_bytes(content)
    assert "sha256 differs" in run("inspect", artifact, code=4)


def in_small_filesystem(tmp_path: Path, options: str) -> tuple[str, ...]:
    """Return a command prefix under which `tmp_path/disk` is a file system of its own."""
    (tmp_path / "disk").mkdir()
    script = f'mount -t tmpfs -o {options} none "{tmp_path}/disk" && exec "$@"'
    return ("unshare", "--map-root-user", "--mount", "sh", "-c", script, "sh")


def test_a_full_disk_ends_with_exit_5_and_one_sentence(tmp_path: Path) -> None:
    model = save(linear(512, 512), tmp_path / "m.onnx")  # a megabyte
    full = in_small_filesystem(tmp_path, "size=256k")
    said = run("compile", model, "-o", tmp_path / "disk" / "m.lrai", code=5, before=full)
    assert "the disk is full" in said
    assert len(said.strip().splitlines()) == 1


def test_a_read_only_disk_ends_with_exit_5(model: Path, tmp_path: Path) -> None:
    read_only = in_small_filesystem(tmp_path, "ro")
    said = run("compile", model, "-o", tmp_path / "disk" / "m.lrai", code=5, before=read_only)
    assert "cannot be written: Read-only file system" in said


@pytest.mark.parametrize(
    ("options", "why"),
    [("ro", "cannot be written: Read-only file system"), ("nr_inodes=4", "the disk is full")],
    ids=["read-only", "full"],
)
def test_where_the_cache_has_no_room_that_is_said_of_it(
    model: Path, tmp_path: Path, options: str, why: str
) -> None:
    cache, before = tmp_path / "disk" / "cache", in_small_filesystem(tmp_path, options)
    command = ("compile", model, "-o", tmp_path / "m.lrai", "--cache", cache)
    said = run(*command, code=5, before=before)
    assert f"{cache}: {why}" in said.replace("\n", "")
    assert not list(tmp_path.glob("*m.lrai*"))


def test_a_folder_that_does_not_exist_ends_with_exit_5(model: Path, tmp_path: Path) -> None:
    said = run("compile", model, "-o", tmp_path / "absent" / "m.lrai", code=5)
    assert "cannot be written" in said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_compilation_leaves_nothing_behind(
    minilm: Path, tmp_path: Path, number: int
) -> None:
    out = tmp_path / "m.lrai"
    child = subprocess.Popen(
        [LRAI, "compile", minilm, "-o", out], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not any(tmp_path.iterdir()):  # it has begun to write
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(child.pid, number)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 130
    assert said.decode().strip() == "lrai: interrupted"
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_before_a_command_has_begun_ends_with_130_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(**_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "entry_points", interrupted)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 130
    assert capsys.readouterr().err == "lrai: interrupted\n"


def test_config_says_where_every_value_comes_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lrai.toml").write_text("[scheduler]\nmax_batch_rows = 7\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LRAI_ACTOR_THREADS", "3")
    long = "/".join(["", *["folder"] * 20])
    monkeypatch.setenv("LRAI_RUNTIME_MODEL_ROOTS", long)
    shown = run("config", code=0)
    assert f"runtime.model_roots = {long}  (" in shown
    for setting, value, origin in (
        ("scheduler.max_batch_rows", "7", "lrai.toml"),
        ("actor.threads", "3", "LRAI_ACTOR_THREADS"),
        ("limits.nan_policy", "pass", "default"),
    ):
        line = next(line for line in shown.splitlines() if setting in line)
        assert value in line
        assert origin in line


def test_an_unknown_setting_ends_with_exit_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lrai.toml").write_text("[scheduler]\nmax_batch_size = 7\n")
    monkeypatch.chdir(tmp_path)
    assert "unknown setting 'scheduler.max_batch_size'" in run("config", code=2)


def test_help_says_of_every_command_what_it_is_for() -> None:
    shown = " ".join(run("--help", code=0).replace("│", " ").split())
    for said in (
        "compile Make the fastest form of a model that agrees with it",
        "config Every setting, its value",
        "certificate Check a certificate again",
        "mlflow Models of other flavors of MLflow, compiled and logged",
        "freeze Keep a deployment as it is",
        "triton Install the backend",
    ):
        assert said in shown
    assert run("--version", code=0) == f"lrai {lrai.__version__}\n"
    assert run("help", code={0, 2}) == run(code={0, 2})  # which of these it is typer changes
    assert run("help", "verify", code=0) == run("verify", "--help", code=0)
    assert "No such command 'verif'" in run("verif", code=2)
