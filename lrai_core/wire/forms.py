"""Validation with a memory: what requests of one form have in common is checked once.

A form is all that decides whether a request fits a model but the values in its tensors: names,
datatypes, shapes, sizes and wanted outputs. A service sees few of them and many requests of each.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from msgspec.structs import replace

from lrai_core import protocol
from lrai_core.config import LimitsConfig
from lrai_core.protocol import InferenceRequest, Signature, Tensor, ValidRequest

_MOST_FORMS: Final = 4096


def validate_by_form(
    request: InferenceRequest, signature: Signature, limits: LimitsConfig
) -> ValidRequest:
    """Return what `protocol.validate` returns, or raise what it raises, sooner."""
    form, passed = _form(request), signature.passed
    known = passed.get(form)
    if known is None or known.nbytes > limits.request_bytes or known.rows > limits.request_rows:
        valid = protocol.validate(request, signature, limits)
        if form and len(passed) < _MOST_FORMS:
            passed[form] = replace(valid, arrays=())
        return valid
    arrays = []
    for spec in signature.inputs:
        given, dtype = request.inputs[spec.name], protocol.DATATYPES[spec.datatype]
        if isinstance(given, Tensor):
            given = np.frombuffer(given.data, dtype).reshape(given.shape)
        arrays.append(np.asarray(given, dtype, order="C"))
        protocol.check_values(arrays[-1], spec, limits)
    group = known.group if signature.coalescible else (object(),)
    return ValidRequest(tuple(arrays), known.rows, known.length, known.outputs, group, known.nbytes)


def _form(request: InferenceRequest) -> tuple[Any, ...]:
    """Return the form of a request; empty where its values decide too."""
    form: list[Any] = [tuple(request.outputs)]
    for name, given in request.inputs.items():
        if isinstance(given, Tensor) and given.datatype != "BYTES":
            form.append((name, given.datatype, tuple(given.shape), memoryview(given.data).nbytes))
        elif isinstance(given, np.ndarray) and given.dtype.kind not in "OSU":
            form.append((name, given.dtype, given.shape))
        else:
            return ()
    return tuple(form)
