"""An artifact of a few hundred bytes, written as `compile` writes one but without compiling."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from lrai_core import artifact as store
from lrai_core.artifact import FileEntry, LatencyPoint, Manifest, Source, Target, Variant
from lrai_core.engine.engine import installed_version, isa_class
from lrai_core.protocol import OutputMap, Signature, TensorSpec
from lrai_core.verifier.sample import Rows, read_rows, save_rows

SIGNATURE = Signature(
    inputs=(TensorSpec(name="x", datatype="FP32", shape=("batch", 3), batch_axis=0),),
    outputs=(TensorSpec(name="y", datatype="FP32", shape=("batch", 3), batch_axis=0),),
)


def graph(factor: float, more_outputs: Sequence[str] = (), wide: int = 0) -> bytes:
    """Return an ONNX model that multiplies float32 [batch, 3] by `factor`.

    With `wide` each element so many times at once, and gives the largest product: that takes room.
    """
    names = ("x", "y", *more_outputs)
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3]) for name in names
    ]
    constants = [numpy_helper.from_array(np.full((wide,) * bool(wide), factor, np.float32), "k")]
    nodes = [helper.make_node("Mul", ["x", "k"], [name]) for name in names[1:]]
    if wide:
        constants.append(numpy_helper.from_array(np.array([-1]), "last"))
        nodes = [
            helper.make_node("Unsqueeze", ["x", "last"], ["apart"]),
            helper.make_node("Mul", ["apart", "k"], ["products"]),
            *(
                helper.make_node("ReduceMax", ["products"], [name], axes=[-1], keepdims=0)
                for name in names[1:]
            ),
        ]
    made = helper.make_graph(nodes, "g", values[:1], values[1:], constants)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def rows(count: int, seed: int = 0) -> Rows:
    """Return that many distinct rows with elements between 1 and 2."""
    x = np.random.default_rng(seed).uniform(1, 2, (count, 3)).astype(np.float32)
    return read_rows({"x": x}, SIGNATURE, "evaluation")[0]


def manifest(*, output_map: OutputMap = "raw", candidates: int = 1) -> Manifest:
    """Return the manifest of `build`, without files."""
    (output,) = SIGNATURE.outputs
    signature = msgspec.structs.replace(
        SIGNATURE, outputs=(msgspec.structs.replace(output, output_map=output_map),)
    )

    def variant(name: str) -> Variant:
        return Variant(
            id=name,
            engine="onnxruntime",
            precision=name,
            model=f"variants/{name}/model.onnx",
            weights="source",
            size_bytes=1,
            latency=(LatencyPoint(rows=1, length=0, median_ms=1.0, spread_ms=0.0),),
        )

    return Manifest(
        schema_version=store.SCHEMA_VERSION,
        lrai_version="0",
        created="2026-01-01T00:00:00Z",
        name="small",
        source=Source(file="source/model.onnx", sha256="0" * 64, opset=17, operators=1),
        signature=signature,
        variants=(variant("int8"), variant("fp32")),
        chosen="int8",
        candidates=candidates,
        target=Target(
            isa=isa_class(),
            engine="onnxruntime",
            engine_version=installed_version("onnxruntime"),
            threads=1,
        ),
        files={},
    )


def build(
    out: Path,
    *,
    factor: float = 2.0,
    evaluation: Rows | None = None,
    output_map: OutputMap = "raw",
    candidates: int = 1,
    more_outputs: Sequence[str] = (),
    wide: int = 0,
) -> Path:
    """Write an artifact whose source doubles its input and whose `int8` multiplies by `factor`."""
    with store.writing(out) as folder:
        for name, times in (("source", 2.0), ("variants/fp32", 2.0), ("variants/int8", factor)):
            (folder / name).mkdir(parents=True)
            (folder / name / "model.onnx").write_bytes(graph(times, more_outputs, wide))
        (folder / "source" / "weights.bin").write_bytes(bytes(range(256)))
        if evaluation is not None:
            save_rows(folder / store.EVALUATION, evaluation)
        made = manifest(output_map=output_map, candidates=candidates)
        (output,) = made.signature.outputs
        outputs = (output, *(msgspec.structs.replace(output, name=name) for name in more_outputs))
        signature = msgspec.structs.replace(made.signature, outputs=outputs)
        store.write_manifest(folder, msgspec.structs.replace(made, signature=signature))
    return out


def rewrite(path: Path, change: dict[str, object]) -> None:
    """Change top-level fields of a written manifest behind the artifact's back."""
    file = path / store.MANIFEST
    content = msgspec.json.decode(file.read_bytes())
    file.write_bytes(msgspec.json.encode({**content, **change}))


def entry(content: bytes) -> FileEntry:
    """Return size and hash of `content`."""
    import hashlib

    return FileEntry(sha256=hashlib.sha256(content).hexdigest(), size_bytes=len(content))
