"""What `lrai tune` is to make faster: a file, an artifact, or what a runtime or Triton serves."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field, replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Final

from lrai_core import Artifact, ConditionNotMet, EnvironmentProblem, UsageError
from lrai_core.errors import shorten
from lrai_report.live import command, copied, runtime_of

_CONFIG: Final = "config.pbtxt"
_NAMED: Final = r"\b(backend|platform|default_model_filename)\s*:\s*[\"']([^\"']*)"


@dataclass(frozen=True, slots=True)
class Target:
    """What is tuned.

    Attributes:
        model: File to compile.
        requests: Rows that were asked, `.npz`; None where there are none.
        served: The artifact that is to be better than; None for a file.
        name: Under which the runtime serves it; empty where none does.
        variant: Of it that serves; empty for what it serves by itself.
        shares: Of the versions of that name.
        captured: The rows are those that the runtime has captured.
        frozen: The name may not be changed.
        relief: The version that takes what the others could not answer in time.
        copied: Which requests are copied to another version, and what ends that; empty for none.
        entry: Its folder in a model repository of Triton; None where it lies in none.
        uri: Of what MLflow keeps, and nobody serves; empty for all else.
    """

    model: Path
    requests: Path | None
    served: Artifact | None = None
    name: str = ""
    variant: str = ""
    shares: dict[str, float] = field(default_factory=dict)
    captured: bool = False
    frozen: bool = False
    relief: str = ""
    copied: str = ""
    entry: Path | None = None
    uri: str = ""

    @property
    def several(self) -> bool:
        """Whether several versions answer for the name, by their shares or as relief."""
        return bool(self.relief) or sum(share > 0 for share in self.shares.values()) > 1

    def commands(self, written: Path, address: str = "") -> tuple[str, ...]:
        """Return what has an artifact served, and what goes back: by Triton, as the next version.

        What lies in no repository of it and is not served yet, by the runtime at `address`. Nothing
        where it serves already, or `lrai triton add` would refuse the entry.
        """
        if self.entry is None:
            return () if self.name else self._loading(written, address)
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.entry.name):
            return ()
        version = str(max(map(int, _versions(self.entry)), default=0) + 1)
        place = ["--model-repository", f"{self.entry.parent}", "--name", self.entry.name]
        add = ["lrai", "triton", "add", f"{written}", *place, "--version", version]
        back = ["rm", "-r", f"{self.entry / version}"]
        if (backend := _backend(self.entry / _CONFIG)) != "lrai":
            others = [_backend(one) for one in (self.entry / "configs").glob("*.pbtxt")]
            left = (self.entry / f"{_CONFIG}.lrai-original").exists()
            if left or (others and "lrai" not in others) or not backend.startswith("onnxruntime"):
                return ()
            add, back = [*add, "--switch"], ["lrai", "triton", "remove", f"{self.entry}"]
        return shlex.join(add), shlex.join(back)

    def _loading(self, written: Path, address: str) -> tuple[str, str]:
        name = self.served.manifest.name if self.served else self.model.stem
        load = command("load", str(written), "--name", name, address=address)
        if self.uri:
            where = "lrai" if address in ("", "auto") else f"lrai:{address}"
            update = ["mlflow", "deployments", "update", "-t", where, "--name", name]
            return load, shlex.join([*update, "-m", self.uri])
        if self.served:
            return load, command("swap", name, str(self.served.path), address=address)
        if self.requests:  # of the model as it was given there is fp32 in it
            fp32 = ("--variant", "fp32")
            return load, command("swap", name, str(written), *fp32, address=address)
        return load, command("unload", name, address=address)


def find(target: str, requests: Path | None, address: str) -> Target:
    """Return what a name, a folder, a URI or a file means; see `tune`.

    Raises:
        UsageError: It means nothing, or several things.
        ConditionNotMet: Of the requests to it none are captured.
    """
    path = Path(target) if Path(target).name not in ("", "..") else Path(target).resolve()
    own = (path / "manifest.json").is_file()
    named = Artifact.open(path) if own else _artifact_of(target)
    if not named and path.is_file():
        return Target(path, requests)
    uri = "" if own else target
    alone = _alone(named, requests, uri) if named else _newest_of(path, requests)
    try:
        runtime = runtime_of(address)
    except EnvironmentProblem as error:
        if alone:
            return alone
        raise UsageError(f"{shorten(target)!r} is no file or artifact, and {error}") from None
    with runtime:
        served = {one.name: one for one in runtime.deployments()}
        loaded = [(one.name, one.version, one.variant) for one in runtime.models()]
    # Hosts add a version to the name: search for search:4f0c, and for the folder models/search.
    alike = [name for name in served if name.partition(":")[0] == path.name]
    if named:
        known_as = {name: {v.partition("-")[0] for v in one.shares} for name, one in served.items()}
        alike = [name for name, versions in known_as.items() if named.version in versions]
    name = target if target in served else alike[0] if len(alike) == 1 else ""
    if alone and not alike:
        return alone
    if not name:
        known = ", ".join(map(repr, alike or served)) or "no model"
        raise UsageError(f"{shorten(target)!r} is no file, artifact or name: there is {known}")
    if not served[name].artifact:
        why = ", and frozen" if served[name].frozen else ": it made room" * served[name].away
        raise ConditionNotMet(f"{name!r} is not loaded{why}")
    artifact, shares = Artifact.open(served[name].artifact), dict(served[name].shares)
    first = {v.partition("-")[0] for v, share in shares.items() if share == max(shares.values())}
    other = (named or artifact).version
    if other != artifact.version or other not in first:  # beside it, or written there since
        serves = f"what serves most of {name!r} is {min(first)}, whose folder holds"
        raise ConditionNotMet(
            f"{shorten(target)!r} is version {other}, but {serves} {artifact.version}"
        )
    captured = Path(served[name].traffic, "captured.npz")
    if requests is None and not (served[name].traffic and captured.is_file()):
        raise ConditionNotMet(
            f"of the requests to {name!r} none are captured: set runtime.capture_rows, "
            "as by LRAI_RUNTIME_CAPTURE_ROWS=2000 where the runtime starts, or give --requests"
        )
    model = artifact.file(artifact.manifest.source.file)
    mine = [v for at, label, v in loaded if at == name and label.startswith(artifact.version)]
    # By itself it may serve by several.
    variant = mine[0] if mine and mine[0] != artifact.manifest.chosen else ""
    rows, own = requests or captured, requests is None
    frozen, relief = served[name].frozen is not None, served[name].relief
    copies = copied(served.values(), address)
    # The artifact may lie in a version of it.
    entry = next((p for p in (path, artifact.path.parent.parent) if (p / _CONFIG).is_file()), None)
    return Target(model, rows, artifact, name, variant, shares, own, frozen, relief, copies, entry)


def _alone(artifact: Artifact, requests: Path | None, uri: str = "") -> Target:
    return Target(artifact.file(artifact.manifest.source.file), requests, artifact, uri=uri)


def _newest_of(path: Path, requests: Path | None) -> Target | None:
    """Return what the newest version in a model's folder of Triton holds, None if nothing known."""
    if not (path / _CONFIG).is_file():
        return None
    newest = path / max(_versions(path), key=int, default="")
    if (newest / "model.lrai").is_dir():
        return replace(_alone(Artifact.open(newest / "model.lrai"), requests), entry=path)
    file = newest / (_named(path / _CONFIG).get("default_model_filename") or "model.onnx")
    file = file / "model.onnx" if file.is_dir() else file  # beside weights in files of their own
    return Target(file, requests, entry=path) if file.is_file() else None


def _named(config: Path) -> dict[str, str]:
    return dict(re.findall(_NAMED, re.sub(r"#.*", "", config.read_text(errors="replace"))))


def _backend(config: Path) -> str:
    """Return what serves by a configuration of Triton: onnxruntime, where it names nothing."""
    named = _named(config)
    return named.get("backend") or named.get("platform") or "onnxruntime"


def _versions(entry: Path) -> list[str]:
    return [one.name for one in entry.iterdir() if one.name.isdecimal()]


def _artifact_of(target: str) -> Artifact | None:
    """Return the artifact that a URI names, by what its scheme has for an entry point."""
    scheme, colon, _ = target.partition(":/")
    for entry in entry_points(group="lrai.artifacts", name=scheme) if colon else ():
        try:
            found: Artifact = entry.load()(target)
        except ImportError as error:
            raise EnvironmentProblem(f"{shorten(target)} needs another package: {error}") from None
        return found
    return None
