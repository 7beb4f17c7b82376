"""The wheel of the lrai that is installed here, rebuilt from its files, to travel inside a model.

A model must be served by the code that it was saved with, also where no index has it. Its version
carries a hash of the content, as a local label, 0.1.0+g1234: MLflow knows an environment by the
text of its requirements, and would serve old code under an unchanged one; and no index may hold
such a version, so that nobody else's package is taken for it.
"""

from __future__ import annotations

import base64
import hashlib
import zipfile
from importlib.metadata import Distribution, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Final

PACKAGES: Final = (
    "lrai_bentoml",
    "lrai_codecs",
    "lrai_core",
    "lrai_deployments",
    "lrai_engines",
    "lrai_import",
    "lrai_mlflow",
    "lrai_report",
    "lrai_sagemaker",
    "lrai_shared",
    "lrai_triton",
    "lrai_wheel",
)

_DISTRIBUTION: Final = "lrai"
_SUFFIXES: Final = (".py", ".typed")
_ENTRY_POINTS: Final = "entry_points.txt"
_TAG: Final = "py3-none-any"
_EPOCH: Final = (1980, 1, 1, 0, 0, 0)  # the first that a zip file can say
_HASH_DIGITS: Final = 12


def build_wheel(folder: Path) -> Path:
    """Write the wheel into `folder` and return its path; the same code gives the same bytes.

    It holds every package of lrai, as the entry points name all of them.
    """
    installed = distribution(_DISTRIBUTION)
    code, told = _code(), _metadata(installed)
    content = hashlib.sha256()
    for name, data in sorted({**code, **told}.items()):
        content.update(f"{name}\0{len(data)}\0".encode() + data)
    version = f"{installed.version.partition('+')[0]}+g{content.hexdigest()[:_HASH_DIGITS]}"
    told["METADATA"] += f"Version: {version}\n".encode()
    made_by = f"Wheel-Version: 1.0\nGenerator: lrai {installed.version.partition('+')[0]}"
    told["WHEEL"] = f"{made_by}\nRoot-Is-Purelib: true\nTag: {_TAG}\n".encode()
    info = f"{_DISTRIBUTION}-{version}.dist-info"
    files = code | {f"{info}/{name}": data for name, data in told.items()}
    record = [f"{name},sha256={_digest(data)},{len(data)}" for name, data in files.items()]
    files[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,", ""]).encode()

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{_DISTRIBUTION}-{version}-{_TAG}.whl"
    half = path.with_suffix(".part")
    try:
        with zipfile.ZipFile(half, "w") as archive:
            for name, data in files.items():
                entry = zipfile.ZipInfo(name, _EPOCH)
                entry.external_attr = 0o100644 << 16
                archive.writestr(entry, data, zipfile.ZIP_DEFLATED)
        return half.replace(path)
    finally:
        half.unlink(missing_ok=True)


def _code() -> dict[str, bytes]:
    files = {}
    for package in PACKAGES:
        spec = find_spec(package)
        for location in (spec and spec.submodule_search_locations) or ():
            root = Path(location)
            for path in sorted(p for p in root.rglob("*") if p.suffix in _SUFFIXES):
                files[f"{package}/{path.relative_to(root).as_posix()}"] = path.read_bytes()
    return files


def _metadata(installed: Distribution) -> dict[str, bytes]:
    """Return the metadata files; of METADATA the fields, but for the version, and no page."""
    fields = (installed.read_text("METADATA") or "").partition("\n\n")[0].strip().splitlines()
    kept = [line for line in fields if not line.startswith("Version:")]
    files = {"METADATA": "\n".join([*kept, ""]).encode()}
    for path in sorted(installed.files or []):
        if path.parts[0].endswith(".dist-info"):
            name = path.relative_to(path.parts[0]).as_posix()
            if name.startswith("licenses/"):
                files[name] = path.read_binary()
    # Without them lrai finds no part of its own; some packagers leave no list of files.
    files[_ENTRY_POINTS] = (installed.read_text(_ENTRY_POINTS) or "").encode()
    return files


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
