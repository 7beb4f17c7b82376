"""The forms that onnxruntime runs: fp32, int8, and each under every set of optimizer passes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

import onnx
from onnx.external_data_helper import load_external_data_for_model

from lrai_core.compiler.search import Built, Material, Quantized, Reject, Sample
from lrai_core.engine.engine import Engine
from lrai_core.errors import CompileError
from lrai_engines import fusion
from lrai_engines.blocks import matmul_nbits
from lrai_engines.kept import LATE, Kept, is_late
from lrai_engines.mixed import mixed_int4
from lrai_engines.quantize import Made, NothingToQuantize
from lrai_engines.smooth import ROW, STATIC, SmoothForms
from lrai_engines.static import StaticForms, attends
from lrai_engines.undefined import goes_undefined, undefined_stays

# Per cent of the harm that is kept closer:
_LESS: Final = (30, 60)  # with a scale per row or in float32, where the others have static scales
_EXACT: Final = (50, 65, 80)  # in float32, where the others have a scale per row
_KEPT: Final = (25, 50, 80, 95)  # in float32, where the others have static scales
_WIDER: Final = (0, 30, 50, 75, 90)  # in int8, where the others have 4 bits

Build = Callable[[onnx.ModelProto], Made]


def int8(material: Material, sample: Sample) -> tuple[SmoothForms, StaticForms]:
    """Return what makes int8 of the sample: what it finds is found once, for all engines."""
    new = SmoothForms(sample, material.threads), StaticForms(sample, material.threads)
    made: tuple[SmoothForms, StaticForms] = material.found.setdefault("int8", new)
    return made


def forms(material: Material, sample: Sample) -> dict[str, Build]:
    """Return every form beside fp32 and what builds it."""
    smooth, static = int8(material, sample)

    def narrow(model: onnx.ModelProto, share: float) -> Made:
        return mixed_int4(model, smooth.harms(model), share=share)

    def blocks(model: onnx.ModelProto, size: int) -> Made:
        return matmul_nbits(model, block_size=size, harms=smooth.known(model))

    return {
        "int8-smooth": partial(smooth.build, scheme=STATIC),
        **{
            f"int8-smooth-{share}": partial(smooth.build, scheme=STATIC, share=share / 100)
            for share in _LESS
        },
        "int8-row": partial(smooth.build, scheme=ROW),
        **{
            f"int8-row-{share}": partial(smooth.build, scheme=ROW, share=share / 100)
            for share in _EXACT
        },
        "int8-static": partial(static.build, share=0),
        "int8-static-inner": partial(static.build, share=0, inner=True),
        **{
            f"int8-static-{kept}": partial(static.build, share=kept / 100, inner=True)
            for kept in _KEPT
        },
        "int8-static-tensor": partial(static.build, share=0, columns=False),
        "int8-smooth-static": partial(joint, smooth, static, STATIC),
        "int8-smooth-static-inner": partial(joint, smooth, static, STATIC, inner=True),
        "int8-block32": partial(blocks, size=32),
        "int8-block128": partial(blocks, size=128),
        **{
            "int4" + f"-mixed-{share}" * bool(share): partial(narrow, share=share / 100)
            for share in (_WIDER if material.objective == "memory" else ())
        },
    }


def joint(
    smooth: SmoothForms,
    static: StaticForms,
    scheme: str,
    model: onnx.ModelProto,
    share: float = 0,
    *,
    inner: bool = False,
) -> Made:
    """Return a network of convolutions and attention in int8: matrices smoothed, the others static.

    Answers to what is no number are left to the caller. `share`, `inner`: see `StaticForms.build`.

    Raises:
        NothingToQuantize: It has not both.
        CompileError: See `StaticForms.build` and `SmoothForms.build`.
    """
    if not attends(model):
        raise NothingToQuantize("no MatMul or Gemm has a scheme of its own without attention")
    parted = smooth.parted(model)
    made, convolved = static.build(parted, share=share, guarded=False, inner=inner)
    made, report = smooth.build(model, scheme=scheme, convolved=made)
    harm, other = (sum(one.values()) for one in (static.harms, smooth.known(model, scheme)))
    part = harm / (harm + other or 1.0)  # of what both do
    told = [replace(line, harm=line.harm * part) for line in convolved if line.weight_elements]
    return made, told + [replace(line, harm=line.harm * (1 - part)) for line in report]


class OnnxRuntimeForms:
    """Builds them; see `Builder`."""

    steps = 22 * len(fusion.DISABLEABLE)

    def __init__(self, engine: Engine) -> None:
        """Build for an engine."""
        self.engine = engine

    def build(self, material: Material, reject: Reject) -> Iterator[Built]:
        """Yield fp32, and with a sample the other forms, each under every pass set that differs."""
        kept, plain = Kept(material, self.engine), (material.model, list[Quantized]())
        yield from kept.forms(
            "fp32", partial(_under_each_pass_set, "fp32", plain, material), reject
        )
        if (sample := material.sample) is None:
            return
        try:
            basic = standard(material)
        except CompileError as error:
            reject("int8", str(error))
            return
        builds = forms(material, sample)
        try:
            undefined = goes_undefined(basic, sample)
        except CompileError as error:
            reject("int8", str(error))
            return

        def make(form: str, home: Path, reject: Reject) -> Iterator[Built]:
            try:
                graph, operators = builds[form](basic)
            except NothingToQuantize:
                raise
            except (CompileError, MemoryError, OSError) as error:  # a temporary folder may be full
                reject(form, str(error) or "memory lacks")
                return
            if undefined and not form.startswith("int8-static"):  # which looks for itself
                graph = undefined_stays(graph, sample.outputs, sample.inputs, undefined)
            yield from _under_each_pass_set(form, (graph, operators), material, home, reject)

        for form in builds:
            yield from kept.forms(form, partial(make, form), reject)


def standard(material: Material) -> onnx.ModelProto:
    """Return the model in standard operators, simplified, its weights inline; the same to all.

    Raises:
        CompileError: onnxruntime rejects it.
    """
    if "standard" not in material.found:
        weights = material.shared.folder
        basic = fusion.optimise(
            material.model, level="basic", threads=material.threads, weights=weights
        )
        load_external_data_for_model(basic, str(weights))
        material.found["standard"] = basic
    found: onnx.ModelProto = material.found["standard"]
    return found


def _under_each_pass_set(
    form: str, made: Made, material: Material, home: Path, reject: Reject
) -> Iterator[Built]:
    (graph, operators), seen = made, list[Counter[str]]()
    bits = min((line.bits for line in operators), default=32)
    precision = f"int{bits}" if bits < 32 else "fp32"
    weights, threads = material.shared.folder, material.threads
    for name, passes_off in fusion.DISABLEABLE:
        if seen and is_late(form, material.until):  # the first tells what the form is worth
            reject(f"{form} ({name})", LATE)
            break
        file = home / name / "model.onnx"
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
        size = material.shared.write(optimised, file, add=False)
        yield Built(form, precision, file, size, operators, passes_off, shared=True)
