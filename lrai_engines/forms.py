"""The forms that onnxruntime runs: fp32, int8, and each under every set of optimizer passes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Final

import onnx
from google.protobuf.message import EncodeError
from onnx.external_data_helper import load_external_data_for_model

from lrai_core.compiler.search import Built, Material, Quantized, Reject, Sample
from lrai_core.engine.engine import Engine
from lrai_core.errors import ArtifactError, CompileError, EngineError
from lrai_engines import fusion
from lrai_engines.blocks import matmul_nbits
from lrai_engines.mixed import mixed_int4, mixed_int8
from lrai_engines.quantize import dynamic_int8, dynamic_int8_per_row
from lrai_engines.sensitivity import harms
from lrai_engines.static import StaticForms, goes_undefined, undefined_stays

_SHARES: Final = (30, 50, 75)  # per cent of the harm that is kept closer
# The same, and of this what is left in float32; all of it, where blocks are slow.
_EXACT: Final = ((95, 60), (98, 70), (90, 90), (93, 93))
_KEPT: Final = (50, 80, 95)  # the same, in float32
_WIDER: Final = (0, 30, 50, 75, 90)  # the same, in int8 where the others have 4 bits

_SMALL: Final = ("UINT8", "INT8", "BOOL", "BYTES")
SAME: Final = ("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten")  # the values are

Made = tuple[onnx.ModelProto, list[Quantized]]
Build = Callable[[onnx.ModelProto], Made]
Scheme = Callable[..., Made]


def forms(sample: Sample, threads: int, objective: str = "latency") -> dict[str, Build]:
    """Return every form beside fp32 and what builds it; what the sample tells is found once."""
    known, static, failed = dict[str, float](), StaticForms(sample, threads), list[str]()

    def mixed(model: onnx.ModelProto, *, scheme: Scheme = mixed_int8, **shares: float) -> Made:
        if failed:  # it would again
            raise CompileError(failed[0])
        if not known:
            try:
                known.update(harms(model, sample, threads))
            except (ArtifactError, EngineError, EncodeError, ValueError) as error:
                failed.append(f"what each matrix does cannot be told: {error}")
                raise CompileError(failed[0]) from None
        return scheme(model, known, **shares)

    return {
        "int8-dynamic": dynamic_int8,
        "int8-row": dynamic_int8_per_row,
        **{f"int8-mixed-{share}": partial(mixed, share=share / 100) for share in _SHARES},
        **{
            f"int8-mixed-{share}-{exact}": partial(mixed, share=share / 100, exact=exact / 100)
            for share, exact in _EXACT
        },
        "int8-static": partial(static.build, share=0),
        **{f"int8-static-{kept}": partial(static.build, share=kept / 100) for kept in _KEPT},
        "int8-block32": partial(matmul_nbits, block_size=32),
        "int8-block128": partial(matmul_nbits, block_size=128),
        **{
            "int4" + f"-mixed-{share}" * bool(share): partial(
                mixed, scheme=mixed_int4, share=share / 100
            )
            for share in (_WIDER if objective == "memory" else ())
        },
    }


class OnnxRuntimeForms:
    """Builds them; see `Builder`."""

    steps = 21 * len(fusion.DISABLEABLE)

    def __init__(self, engine: Engine) -> None:
        """Build for an engine."""
        self.engine = engine

    def build(self, material: Material, reject: Reject) -> Iterator[Built]:
        """Yield fp32, and with a sample the other forms, each under every pass set that differs."""
        yield from _under_each_pass_set("fp32", material.model, [], material, reject)
        if (sample := material.sample) is None:
            return
        try:
            basic = standard(material)
        except CompileError as error:
            reject("int8", str(error))
            return
        builds = forms(sample, material.threads, material.objective)
        try:
            undefined = goes_undefined(basic, sample)
        except CompileError as error:
            reject("int8", str(error))
            return
        if _may_spoil(basic, sample):
            del builds["int8-dynamic"]
            reject("int8-dynamic", "the largest number of a call sets the scale of all rows in it")
        for form, transform in builds.items():
            try:
                graph, operators = transform(basic)
            except (CompileError, OSError) as error:  # a temporary folder may be full
                reject(form, str(error))
                continue
            if undefined and not form.startswith("int8-static"):  # which looks for itself
                graph = undefined_stays(graph, sample.outputs, sample.inputs, undefined)
            yield from _under_each_pass_set(form, graph, operators, material, reject)


def _may_spoil(model: onnx.ModelProto, sample: Sample) -> bool:
    """Return whether a caller may send numbers so large that others in the call are rounded off.

    That is where rows share calls and an input has more than 8 bits, unless it only says which row
    of a table is meant.
    """
    if any(spec.batch_axis != 0 for spec in (*sample.inputs, *sample.outputs)):
        return False
    large = {spec.name for spec in sample.inputs if spec.datatype not in _SMALL}
    for node in model.graph.node:
        used = large.intersection(node.input)
        if node.op_type in SAME and used:
            large.update(node.output)
        elif used and (node.op_type != "Gather" or node.input[0] in used):
            return True
    return False


def standard(material: Material) -> onnx.ModelProto:
    """Return the model in standard operators, simplified, its weights inline.

    Raises:
        CompileError: onnxruntime rejects it.
    """
    weights = material.shared.folder
    basic = fusion.optimise(
        material.model, level="basic", threads=material.threads, weights=weights
    )
    load_external_data_for_model(basic, str(weights))
    return basic


def _under_each_pass_set(
    form: str,
    graph: onnx.ModelProto,
    operators: list[Quantized],
    material: Material,
    reject: Reject,
) -> Iterator[Built]:
    seen: list[Counter[str]] = []
    bits = min((line.bits for line in operators), default=32)
    precision = f"int{bits}" if bits < 32 else "fp32"
    weights, threads = material.shared.folder, material.threads
    for name, passes_off in fusion.DISABLEABLE:
        file = material.folder / f"{form}.{name}" / "model.onnx"
        file.parent.mkdir()
        try:
            optimised = fusion.optimise(
                graph, level="all", disabled=passes_off, threads=threads, weights=weights
            )
        except CompileError as error:
            reject(f"{form} ({name})", str(error))
            continue
        kinds = Counter(node.op_type for node in optimised.graph.node)
        if kinds in seen:  # the passes had nothing to do; names and order differ by chance
            continue
        seen.append(kinds)
        size = material.shared.write_candidate(optimised, file)
        yield Built(form, precision, file, size, operators, passes_off, shared=True)
