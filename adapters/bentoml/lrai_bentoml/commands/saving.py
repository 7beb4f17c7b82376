"""Artifacts into BentoML's model store; serving does without."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import bentoml
import msgspec
from bentoml.exceptions import NotFound
from bentoml.models import ModelContext

import lrai_core as lrai
from lrai_bentoml.errors import bento_errors
from lrai_bentoml.models import DATA, MODULE, path_inside

_ONNX_MODULE: Final = "bentoml.onnx"
_ONNX_DATA: Final = "saved_model.onnx"


def save_model(
    name: bentoml.Tag | str,
    model: lrai.Artifact | str | Path,
    *,
    labels: Mapping[str, str] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> bentoml.Model:
    """Copy an artifact into the model store, and return what the store says of it.

    Labels name the variant that serves, its gate and its certificate; metadata, under `lrai`, has
    what the manifest and the certificates say. There are no custom objects, which are pickles.

    Args:
        name: Of the model; BentoML makes a version where it has none.
        model: An artifact or the path of one. It is checked before it is copied.
        labels: More labels.
        metadata: More metadata.

    Raises:
        BentoMLException: The artifact is missing, changed or newer than this version, or the store
            has that version already.
    """
    with bento_errors():
        artifact = lrai.Artifact.open(model.path if isinstance(model, lrai.Artifact) else model)
        proofs = lrai.certificates(artifact)
    versions = {"lrai": lrai.__version__, "onnxruntime": version("onnxruntime")}
    with bentoml.models.create(
        name,
        module=MODULE,
        labels={**_labels(artifact, proofs), **(labels or {})},
        metadata={**(metadata or {}), "lrai": _description(artifact, proofs)},
        context=ModelContext(framework_name="lrai", framework_versions=versions),
    ) as made:
        shutil.copytree(artifact.path, made.path_of(DATA))
    return bentoml.models.get(made.tag)  # `made` lies in a temporary folder


def import_model(
    name: bentoml.Tag | str,
    source: bentoml.Tag | bentoml.Model | str | Path,
    *,
    options: Mapping[str, Any] | None = None,
    labels: Mapping[str, str] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> bentoml.Model:
    """Compile a model, save the artifact, and return what the store says of it.

    Args:
        name: Of the model to save.
        source: A file that `lrai_core.compile` takes, such as ONNX; or a model that `bentoml.onnx`
            has saved, whose tag then stands in the metadata as `source`.
        options: Of `lrai_core.compile`: `evaluation`, `output_map`, `threads`, … Without evaluation
            rows there is fp32 alone.
        labels: More labels.
        metadata: More metadata.

    Raises:
        NotFound: There is neither such a file nor such a model.
        BentoMLException: The model cannot be compiled.
        TypeError: The source is something else, such as a ModelProto.
    """
    if not isinstance(source, bentoml.Tag | bentoml.Model | str | Path):
        raise TypeError(f"{type(source).__name__} is neither a file nor a saved model")
    lineage = dict(metadata or {})
    if isinstance(source, Path) or (isinstance(source, str) and _is_path(source)):
        file = Path(source)
        if not file.is_file():
            raise NotFound(f"no file {file}")
    else:
        stored = source if isinstance(source, bentoml.Model) else bentoml.models.get(source)
        if stored.info.module != _ONNX_MODULE:
            raise NotFound(f"{stored.tag} was saved by {stored.info.module}, not by {_ONNX_MODULE}")
        file, lineage["source"] = path_inside(stored, _ONNX_DATA), str(stored.tag)
    with tempfile.TemporaryDirectory() as folder, bento_errors():
        out = Path(folder) / f"{bentoml.Tag.from_taglike(name).name}.lrai"
        artifact = lrai.compile(file, out=out, **(options or {}))
        return save_model(name, artifact, labels=labels, metadata=lineage)


def _is_path(text: str) -> bool:
    """Return whether it is a file, or can be no tag of BentoML."""
    return "/" in text or Path(text).is_file()


def _labels(artifact: lrai.Artifact, proofs: Sequence[lrai.Certificate]) -> dict[str, str]:
    chosen = artifact.manifest.variant(artifact.manifest.chosen)
    own = [proof.id for proof in proofs if proof.variant == chosen.id]
    return {
        "lrai.artifact": artifact.version,
        "lrai.variant": chosen.id,
        "lrai.gate": "passed" if chosen.gate and chosen.gate.passed else "none",
        "lrai.certificate": own[0] if own else "none",
    }


def _description(artifact: lrai.Artifact, proofs: Sequence[lrai.Certificate]) -> dict[str, Any]:
    """Return what manifest and certificates say, in the types that BentoML stores."""
    manifest = artifact.manifest
    told = {
        "lrai_version": lrai.__version__,
        "artifact": artifact.version,
        "manifest_sha256": artifact.sha256,
        "variant": manifest.chosen,
        "source": manifest.source,
        "target": manifest.target,
        "inputs": manifest.signature.inputs,
        "outputs": manifest.signature.outputs,
        "variants": {
            variant.id: {
                "engine": variant.engine,
                "precision": variant.precision,
                "size_bytes": variant.size_bytes,
                "speedup": variant.speedup,
                "batch_effect": variant.batch_effect,
                "why": variant.why,
                "gate": variant.gate,
            }
            for variant in manifest.variants
        },
        "certificates": {
            proof.id: {"variant": proof.variant, "tier": proof.tier, "statement": proof.statement()}
            for proof in proofs
        },
    }
    described: dict[str, Any] = _storable(msgspec.to_builtins(told))
    return described


def _storable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _storable(one) for key, one in value.items() if one is not None}
    return [_storable(one) for one in value] if isinstance(value, list | tuple) else value
