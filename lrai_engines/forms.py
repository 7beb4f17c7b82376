"""The forms that onnxruntime runs beside fp32."""

from __future__ import annotations

from functools import partial
from typing import Final

import onnx
from google.protobuf.message import EncodeError

from lrai_core.compiler.search import Build, Quantized, Sample
from lrai_core.errors import ArtifactError, CompileError, EngineError
from lrai_engines.quantize import dynamic_int8, dynamic_int8_per_row, matmul_nbits, mixed_int8
from lrai_engines.sensitivity import harms
from lrai_engines.static import static_int8

_SHARES: Final = (30, 50, 75)  # per cent of the harm that is kept closer


def forms(sample: Sample) -> dict[str, Build]:
    """Return every form and what builds it; what the sample tells is found once, when needed."""
    known: dict[str, float] = {}

    def mixed(model: onnx.ModelProto, *, share: float) -> tuple[onnx.ModelProto, list[Quantized]]:
        if not known:
            try:
                known.update(harms(model, sample))
            except (ArtifactError, EngineError, EncodeError, ValueError) as error:
                raise CompileError(f"what each matrix does cannot be told: {error}") from None
        return mixed_int8(model, known, share=share)

    return {
        "int8-dynamic": dynamic_int8,
        "int8-row": dynamic_int8_per_row,
        **{f"int8-mixed-{share}": partial(mixed, share=share / 100) for share in _SHARES},
        "int8-static": partial(static_int8, sample=sample),
        "int8-static-ends": partial(static_int8, sample=sample, keep_ends=True),
        "int8-block32": partial(matmul_nbits, block_size=32),
        "int8-block128": partial(matmul_nbits, block_size=128),
    }
