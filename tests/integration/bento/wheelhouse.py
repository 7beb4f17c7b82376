"""Wheels of what is installed here, so that an environment is made without an index."""

from __future__ import annotations

import zipfile
from importlib.metadata import Distribution, distribution
from pathlib import Path

_OF_THIS_INSTALL = {"RECORD", "INSTALLER", "REQUESTED", "direct_url.json", "uv_cache.json"}


def fill(folder: Path, names: list[str]) -> Path:
    """Write a wheel for each distribution into `folder`, and return it."""
    folder.mkdir()
    for name in names:
        _repack(distribution(name), folder)
    return folder


def _repack(installed: Distribution, folder: Path) -> None:
    tags = [
        line.removeprefix("Tag: ")
        for line in (installed.read_text("WHEEL") or "").splitlines()
        if line.startswith("Tag: ")
    ]
    parts = [tag.split("-") for tag in tags]
    tag = "-".join(".".join(dict.fromkeys(column)) for column in zip(*parts, strict=True))
    name = installed.metadata["Name"].replace("-", "_").replace(".", "_")
    record = []
    path = folder / f"{name}-{installed.version}-{tag}.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as wheel:
        for file in sorted(installed.files or []):
            ours = ".dist-info" in file.parts[0] and file.name in _OF_THIS_INSTALL
            if file.parts[0] == ".." or file.suffix == ".pyc" or ours:
                continue  # scripts are made anew from the entry points
            wheel.writestr(file.as_posix(), file.read_binary())
            record.append(f"{file.as_posix()},,")
        info = next(f.parts[0] for f in installed.files or [] if f.parts[0].endswith(".dist-info"))
        wheel.writestr(f"{info}/RECORD", "\n".join([*record, f"{info}/RECORD,,", ""]))
