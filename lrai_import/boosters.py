"""The importer of what XGBoost, LightGBM and skops save, read in a child process: without code."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, Final
from zipfile import BadZipFile

import onnx

from lrai_core import CompileError, EnvironmentProblem, Imported
from lrai_import import sklearn, trees
from lrai_import.onnx import Job, load_converted

_SKOPS: Final = (0, 13)  # what older ones open may run code
_NEEDED: Final = "skops 0.13 or later is needed: pip install 'lrai[trees]'"
_KINDS: Final = {".txt": "lightgbm", ".skops": "skops"}
# Which skops does not trust because they may point out of their arrays. That is read, in a child
# that may die of it, and what comes of it is none of the model's answers.
_NODES: Final = (
    "sklearn.tree._tree.Tree",
    "sklearn.ensemble._hist_gradient_boosting.predictor.TreePredictor",
)


def skops_is_safe(version: str) -> bool:
    """Return whether a file that this version of skops opens runs no code; empty for none."""
    return not version or tuple(map(int, version.split(".")[:2])) >= _SKOPS


def load(path: Path, notify: Callable[[str], None]) -> Imported:
    """Return the model in a file of LightGBM, `.txt`, of skops, or of XGBoost: JSON or UBJSON.

    Its input is a table, `features`, as wide as the file says; or columns, where an estimator of
    scikit-learn asks for them by name.

    Raises:
        CompileError: It cannot be read or converted, or answers otherwise once it is.
        EnvironmentProblem: A library that it takes is not installed.
    """
    try:
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise CompileError(f"{path.name}: {error.strerror}") from None
    kind = _KINDS.get(path.suffix.lower(), "xgboost")
    found, _ = load_converted(convert, path.absolute(), kind, notify)
    return replace(found, sha256=sha256)


def convert(job: Job) -> int:
    """Write a model of the library `job.kind` as ONNX; return the bytes of the file.

    Raises:
        CompileError: It cannot be read or converted.
        EnvironmentProblem: The library, or its converter, is not installed.
    """
    content = Path(job.source).read_bytes()
    try:
        library = import_module(job.kind)
        if job.kind == "skops" and not skops_is_safe(library.__version__):
            raise ImportError
    except ImportError:
        needed = _NEEDED if job.kind == "skops" else f"{job.kind} is needed: pip install {job.kind}"
        raise EnvironmentProblem(needed) from None
    try:
        if job.kind == "skops":
            model, how = _estimator(content), sklearn.convert
        else:  # their errors name no file then
            text, how = job.kind == "lightgbm", getattr(trees, f"convert_{job.kind}")
            given = {"model_str": content.decode()} if text else {"model_file": bytearray(content)}
            model = library.Booster(**given)
            if not text and model.attr("scikit_learn") and (best := model.attr("best_iteration")):
                model = model[: int(best) + 1]  # where the estimator stops, and no booster does
    except (ValueError, LookupError, BadZipFile) as error:
        # Those of XGBoost end with where in its code they happened.
        why = f"no model of {job.kind}: {str(error).strip() or 'empty'}".splitlines()[0][:300]
        raise CompileError(f"{Path(job.source).name} cannot be converted: {why}") from None
    onnx.save(how(model, ()), job.out)
    return Path(job.out).stat().st_size


def _estimator(content: bytes) -> Any:
    """Return what a file of skops holds.

    Raises:
        CompileError: It holds types that may run code.
    """
    from skops.io import get_untrusted_types, loads

    if unknown := [name for name in get_untrusted_types(data=content) if name not in _NODES]:
        why = f"it holds {', '.join(unknown[:3])[:300]}, which skops does not trust; where you do, "
        how = 'lrai_core.compile(skops.io.load(FILE, trusted=[…]), out="NAME.lrai", …) compiles it'
        raise CompileError(why + how)
    return loads(content, trusted=[*_NODES])
