"""The page of an artifact: what it says, and that nothing in a file becomes markup."""

from __future__ import annotations

import builtins
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import lrai_core as lrai
from benchmarks import models
from lrai_core.artifact import LatencyPoint, write_manifest
from lrai_core.fairness import Disparity
from lrai_report.inspect import _column, inspect
from lrai_report.log import Event
from lrai_report.page import _command, main, page


class Reader(HTMLParser):
    """Checks that every element is closed, and keeps the text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.tags: list[str] = []
        self.places: list[tuple[float, float]] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        found = dict(attrs)
        if tag in ("circle", "text"):
            across, upward = ("cx", "cy") if tag == "circle" else ("x", "y")
            self.places.append((float(found[across]), float(found[upward])))
        if tag not in ("meta", "br"):
            self.open.append(tag)
        assert not any(name in ("src", "href") for name, _ in attrs), "needs another file"

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> lrai.Artifact:
    """Return a classifier with several forms."""
    folder = tmp_path_factory.mktemp("page")
    source, held = models.classifier(folder / "c.onnx", 7, hidden=16)
    rows = {name: values[:900] for name, values in held.items()}
    return lrai.compile(source, out=folder / "c.lrai", evaluation=rows, output_map="softmax")


def changed(
    artifact: lrai.Artifact, folder: Path, change: Callable[[list[dict[str, Any]]], object]
) -> lrai.Artifact:
    """Return a copy with another log."""
    copy = shutil.copytree(artifact.path, folder / "copy.lrai")
    log = copy / "quantization.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    change(lines)
    log.write_text("\n".join(map(json.dumps, lines)))
    (copy / "manifest.json").unlink()
    write_manifest(copy, artifact.manifest)
    return lrai.Artifact.open(copy, verify=False)


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    assert not reader.open
    return reader


def test_a_page_says_what_was_tried_and_measured(artifact: lrai.Artifact) -> None:
    reader = read(page(artifact))
    for words in ("int8-smooth", "int8-row", "fp32", "opset", artifact.version, "--output-map"):
        assert words in reader.text
    assert "twice what moved a gate row among others" in " ".join(reader.text.split())
    assert artifact.manifest.variant("fp32").gate is not None
    lines = (artifact.path / "quantization.jsonl").read_text().splitlines()
    searched = [line for line in lines if '"searched"' in line]
    assert reader.tags.count("circle") == len(searched) > 0
    assert "script" not in reader.tags


def test_its_commands_name_the_artifact_as_it_is_called(
    artifact: lrai.Artifact, tmp_path: Path
) -> None:
    text = read(page(changed(artifact, tmp_path, lambda _: None))).text
    assert "lrai inspect copy.lrai" in text


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"form": "fp32", "kept": True, "batch_effect": 0.1}, "yes"),
        ({"form": "int8-far", "kept": True, "batch_effect": 0.1}, "no, though it passed"),
        ({"form": "int8-far", "batch_effect": 0.1}, "no"),
        ({"form": "int8-far"}, "not judged"),
    ],
)
def test_a_form_is_said_to_be_kept_or_judged_only_where_it_was(
    artifact: lrai.Artifact, tmp_path: Path, line: dict[str, Any], said: str
) -> None:
    def only(lines: list[dict[str, Any]]) -> None:
        lines[:] = [{"event": "candidate", "why": "0.80 x fp32, and so on"} | line]

    text = " ".join(read(page(changed(artifact, tmp_path, only))).text.split())
    assert f"why {line['form']} {said} 0.80 x fp32, and so on" in text


def test_what_stands_in_a_log_is_text(artifact: lrai.Artifact, tmp_path: Path) -> None:
    def spoil(lines: list[dict[str, Any]]) -> None:
        hostile = "<script>alert(1)</script>{{ 7 * 7 }}"
        lines.append({"event": "candidate", "form": hostile, "why": hostile})
        lines.append({"event": "operator", "variant": hostile, "node": hostile})
        lines.append({"event": "searched", "form": hostile, "speedup": 2.0, "gap": 0.5})

    reader = read(page(changed(artifact, tmp_path, spoil)))
    assert "script" not in reader.tags
    assert reader.text.count("<script>alert(1)</script>{{ 7 * 7 }}") == 6


@pytest.mark.parametrize("line", [{"event": 3}, {"event": "searched", "gap": -1}, {}])
def test_a_log_that_is_none_is_refused(
    artifact: lrai.Artifact, tmp_path: Path, line: dict[str, Any]
) -> None:
    with pytest.raises(lrai.ArtifactError, match=r"quantization\.jsonl cannot be read"):
        page(changed(artifact, tmp_path, lambda lines: lines.append(line)))


@pytest.mark.parametrize(
    ("speedup", "gap"), [(0.0, 1.0), (1e9, 0.0), (5e8, 1.0), (1e-9, 1e30), (1.0, 1e-30)]
)
def test_extremes_are_drawn_inside_the_picture(
    artifact: lrai.Artifact, tmp_path: Path, speedup: float, gap: float
) -> None:
    line = {"event": "searched", "form": "odd", "speedup": speedup, "gap": gap}
    reader = read(page(changed(artifact, tmp_path, lambda lines: lines.append(line))))
    assert reader.tags.count("line") < 100
    assert all(0 <= x <= 640 and 0 <= y <= 330 for x, y in reader.places)


def test_an_artifact_without_rows_has_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, _ = models.classifier(tmp_path / "c.onnx", 7, hidden=16)
    artifact = lrai.compile(source, out=tmp_path / "c.lrai")
    text = read(page(artifact)).text
    assert "Nothing was judged" in text
    assert re.search(r"batch effect\s*not measured", text)
    inspect(artifact.path)
    assert re.search(r"batch effect\W+not measured", capsys.readouterr().out)


def test_the_command_writes_a_file_here(
    artifact: lrai.Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main([str(artifact.path)])
    assert not ended.value.code
    assert (tmp_path / "c.html").read_text().startswith("<!doctype html>")
    with pytest.raises(lrai.EnvironmentProblem, match="No such file"):
        main([str(artifact.path), "-o", str(tmp_path / "none" / "c.html")])
    monkeypatch.chdir(artifact.path)  # which would not open any more, with a page in it
    for arguments in (["."], [str(artifact.path), "-o", "variants/c.html"]):
        with pytest.raises(lrai.UsageError, match="would lie in the artifact"):
            main(arguments)


def test_a_missing_library_is_named(
    artifact: lrai.Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name == "jinja2":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(lrai.EnvironmentProblem, match=r"pip install 'lrai\[report\]'"):
        page(artifact)


def test_groups_of_people_are_shown(artifact: lrai.Artifact) -> None:
    manifest = artifact.manifest
    chosen = manifest.variant(manifest.chosen)
    assert chosen.gate is not None
    known = Disparity("sex", "demographic_parity", 0.1, 0.12, 0.03101, ("f", "m"))
    unknown = Disparity("race", "equalised_odds", 0.2, 0.2, None, ())
    gate = msgspec.structs.replace(
        chosen.gate, groups={"sex": {"<f>": {"selection_rate": 0.25}}}, disparities=(known, unknown)
    )
    others = [variant for variant in manifest.variants if variant is not chosen]
    variants = (msgspec.structs.replace(chosen, gate=gate), *others)
    changed_manifest = msgspec.structs.replace(manifest, variants=variants)
    text = read(page(replace(artifact, manifest=changed_manifest))).text
    for words in ("<f>", "selection_rate 0.25", "3.11 % at most", "insufficient data"):
        assert words in text
    assert "20.00 %" not in text  # of what nobody has measured
    columns = _column(variants[0], "")
    assert columns["demographic_parity by sex"].startswith("12.00%, wider by 3.11% at most")
    assert columns["equalised_odds by race"].startswith("insufficient data")
    assert "--group sex" in text


@pytest.mark.parametrize("by", ["labels", "agreement"])
def test_bounds_are_rounded_to_the_side_on_which_they_hold(
    artifact: lrai.Artifact, by: str
) -> None:
    chosen = artifact.manifest.variant(artifact.manifest.chosen)
    assert chosen.gate is not None
    names = ("agreement", "agreement_bound", "accuracy_loss", "accuracy_loss_bound")
    told, column, given = {
        "labels": ("1.01", "accuracy", (None, None, 0.0, 0.01004)),
        "agreement": ("97.99", "agreement", (0.99, 0.97996, None, None)),
    }[by]
    rates: dict[str, Any] = dict(zip(names, given, strict=True))
    gate = msgspec.structs.replace(chosen.gate, **rates)
    variant = msgspec.structs.replace(chosen, gate=gate)
    manifest = msgspec.structs.replace(
        artifact.manifest, variants=(variant,), chosen=variant.id, together=()
    )
    text = read(page(replace(artifact, manifest=manifest))).text
    assert f"{told} %" in text
    assert f"{told}%)" in _column(variant, "")[column]


def test_what_fp32_does_stands_beside_it_and_groups_too_small_to_tell_are_named(
    artifact: lrai.Artifact,
) -> None:
    fp32 = artifact.manifest.variant("fp32")
    assert fp32.gate is not None
    told = Disparity("sex", "demographic_parity", 0.1, 0.12, 0.03101, ("f", "m"))
    gates = [
        msgspec.structs.replace(
            fp32.gate,
            groups={"sex": {group: {"selection_rate": rate} for group in "fm<"}},
            disparities=(told,),
        )
        for rate in (0.25, 0.5)
    ]
    faster = msgspec.structs.replace(fp32, id="int8-row", gate=gates[0])
    variants = (faster, msgspec.structs.replace(fp32, gate=gates[1]))
    manifest = msgspec.structs.replace(
        artifact.manifest, variants=variants, chosen=faster.id, together=()
    )
    text = " ".join(read(page(replace(artifact, manifest=manifest))).text.split())
    assert "how its decisions fare in float32" in text
    assert "selection_rate 0.25 selection_rate 0.5" in text
    assert "3.11 % at most ; too few rows of <" in text


def test_the_command_has_what_was_asked(tmp_path: Path) -> None:
    source, rows = models.classifier(tmp_path / "c.onnx", 7, hidden=16)
    axes = tmp_path / "own.toml"
    axes.write_text("[inputs.features]\nbatch = 0\n[outputs.logits]\nbatch = 0\n")
    artifact = lrai.compile(
        source, out=tmp_path / "c.lrai", calibration={"features": rows["features"][:64]},
        axes=axes, max_accuracy_loss=np.float64(0.02), max_disparity=0.05, keep_evaluation=0,
        keep=4, minutes=30, seed=7,
    )  # fmt: skip
    asked = "--calibration SAMPLE.npz --axes AXES.toml --max-accuracy-loss 0.02 --max-disparity"
    more = "--keep-evaluation 0 --minutes 30.0 --seed 7 --keep 4"
    assert f"{asked} 0.05 {more}" in read(page(artifact)).text
    assert "own.toml" not in (artifact.path / "quantization.jsonl").read_text()


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"engines": ["openvino"], "keep": 3}, "--engine openvino"),
        ({"engines": ["openvino"], "keep": 2}, "--engine openvino --keep 2"),
        ({"engines": ["onnxruntime"], "keep": 3}, "--keep 3"),
        ({"engines": [], "keep": 1}, "--keep 1"),
        ({"engines": [], "keep": 2}, ""),
    ],
)
def test_the_command_has_the_engines_that_were_tried_and_how_many_were_to_be_kept(
    artifact: lrai.Artifact, asked: dict[str, Any], words: str
) -> None:
    told = _command(artifact, [msgspec.convert({"event": "asked", **asked}, Event)])
    own = f" {words}" if words else ""
    threads = artifact.manifest.target.threads
    assert told.partition(" --output-map softmax")[2] == f"{own} --threads {threads}"


def test_where_the_log_does_not_say_it_the_command_has_what_was_kept(
    artifact: lrai.Artifact,
) -> None:
    assert "--keep" not in _command(artifact, [])
    fp32, engines = artifact.manifest.variant("fp32"), ("openvino", "other", "onnxruntime")
    more = [msgspec.structs.replace(fp32, id=name, engine=name) for name in engines]
    manifest = msgspec.structs.replace(artifact.manifest, variants=(*more, fp32))
    told = _command(replace(artifact, manifest=manifest), [])
    assert "--engine openvino --engine other --keep 4" in told


def test_the_command_names_the_calls_that_come_most_and_so_does_what_is_shown_of_it(
    artifact: lrai.Artifact,
) -> None:
    manifest = artifact.manifest
    signature = msgspec.structs.replace(manifest.signature, calls=((1, 16), (8, 0)))
    told = msgspec.structs.replace(manifest, signature=signature)
    assert " --calls 1x16,8 " in _command(replace(artifact, manifest=told), [])
    variant = manifest.variant("fp32")
    points = [
        LatencyPoint(rows=n, length=m, median_ms=1.5, spread_ms=0.0, named=named)
        for n, m, named in ((1, 8, False), (1, 70, False), (32, 64, False), (1, 16, True))
    ]
    shown = _column(msgspec.structs.replace(variant, latency=tuple(points)), "")
    rows = [label for label in shown if "row" in label]
    assert rows == ["1 row x 8", "1 row x 70", "1 row x 16", "32 rows x 64"]


@pytest.mark.parametrize(
    ("note", "words"),
    [
        ("fused: a.onnx b.onnx --feed=b.f=a.y; 3 of 9", "a.onnx b.onnx --feed=b.f=a.y --fuse"),
        ("fused: 'my a.onnx' $(date); 3 of 9", "'my a.onnx' '$(date)' --fuse"),
        ("fused: 'a; b.onnx' c.onnx; 3 of 9", "MODEL"),
        ("c.onnx: fused: a.onnx b.onnx; 3 of 9", "MODEL"),  # of what is described
        ("opset 11 upgraded to 17", "MODEL"),
    ],
)
def test_the_command_names_the_models_that_are_one(
    artifact: lrai.Artifact, note: str, words: str
) -> None:
    told = _command(artifact, [Event("asked"), Event("note", why=note)])
    assert told.startswith(f"lrai compile {words} -o c.lrai ")
