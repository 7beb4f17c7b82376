"""The importer of what XGBoost and LightGBM save: files without code, read in a child process."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import onnx

from lrai_core import CompileError, EnvironmentProblem, Imported
from lrai_import import trees
from lrai_import.onnx import Job, load_converted


def load(path: Path, notify: Callable[[str], None]) -> Imported:
    """Return the booster in a file of LightGBM, `.txt`, or of XGBoost: JSON or UBJSON.

    Its input is a table, `features`, as wide as the file says.

    Raises:
        CompileError: It cannot be read or converted, or answers otherwise once it is.
        EnvironmentProblem: A library that it takes is not installed.
    """
    try:
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise CompileError(f"{path.name}: {error.strerror}") from None
    kind = "lightgbm" if path.suffix.lower() == ".txt" else "xgboost"
    found, _ = load_converted(convert, path.absolute(), kind, notify)
    return replace(found, sha256=sha256)


def convert(job: Job) -> int:
    """Write a booster of the library `job.kind` as ONNX; return the bytes of the file.

    Raises:
        CompileError: It cannot be read or converted.
        EnvironmentProblem: The library, or its converter, is not installed.
    """
    content = Path(job.source).read_bytes()
    try:
        library = import_module(job.kind)
        text = job.kind == "lightgbm"  # their errors name no file then
        given = {"model_str": content.decode()} if text else {"model_file": bytearray(content)}
        booster = library.Booster(**given)
    except ImportError:
        raise EnvironmentProblem(f"{job.kind} is needed: pip install {job.kind}") from None
    except ValueError as error:  # those of XGBoost end with where in its code they happened
        why = f"no model of {job.kind}: {str(error).strip().splitlines()[0][:300]}"
        raise CompileError(f"{Path(job.source).name} cannot be converted: {why}") from None
    onnx.save(getattr(trees, f"convert_{job.kind}")(booster, ()), job.out)
    return Path(job.out).stat().st_size
