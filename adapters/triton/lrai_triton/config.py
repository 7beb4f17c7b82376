"""What Triton has to know of a model, from its signature; and what a config.pbtxt says against it.

Errors name the field of the model configuration that they are about.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from lrai_core import Signature, TensorSpec, UsageError

MAX_BATCH_SIZE: Final = 64  # where the configuration names none


def complete(given: dict[str, Any], signature: Signature, *, fill: bool = True) -> None:
    """Fill in what is not written by hand: inputs, outputs, `max_batch_size`, `dynamic_batching`.

    Without inputs of its own and with rows that may share a call, a model gets the batch dimension
    that Triton keeps apart. Who writes `max_batch_size: 0` beside whole shapes gets those. Where
    rows may share no call, it has Triton hand requests over one by one, whatever shapes they have.

    Args:
        given: Model configuration as Triton hands it over. Changed in place.
        signature: Of the model.
        fill: Whether Triton takes over inputs and outputs where none are written.

    Raises:
        UsageError: Something written by hand contradicts the model.
    """
    size, written = given.get("max_batch_size", 0), _whole_shapes(given, signature)
    batched = size > 0 or (signature.coalescible and not written)
    for spec in (*signature.inputs, *signature.outputs) if size > 0 else ():
        if spec.batch_axis is None and isinstance(next(iter(spec.shape), 0), int):
            why = f"rows of this model cannot share a call, {spec.name!r} has {[*spec.shape]}"
            raise UsageError(f"max_batch_size is {size}, but {why}: 0 has Triton see whole shapes")
    given["max_batch_size"] = size or MAX_BATCH_SIZE * batched
    if batched and signature.coalescible:
        given.setdefault("dynamic_batching", {})
    for kind, specs in (("input", signature.inputs), ("output", signature.outputs)):
        given[kind] += [{"name": spec.name} for spec in specs] * (fill and not given[kind])
        _complete_tensors(kind, given[kind], specs, batched=batched)
    if given.get("model_transaction_policy", {}).get("decoupled"):
        raise UsageError("model_transaction_policy: decoupled is not served, one answer is given")
    if given.get("response_cache", {}).get("enable"):
        raise UsageError("response_cache: Triton would keep a refusal as an empty answer; not here")
    if "sequence_batching" in given:
        raise UsageError("sequence_batching: sequences are not served, each request is for itself")
    if (groups := given.get("instance_group")) and all(group.get("passive") for group in groups):
        raise UsageError("instance_group: all are passive, and a request would crash Triton itself")
    if missing := {s.name for s in signature.inputs} - {t["name"] for t in given["input"]}:
        raise UsageError(f"input {min(missing)!r} of the model is not in the configuration")
    if len(given["input"]) > len(signature.inputs):  # Triton would want it twice in a request
        raise UsageError("input: one of them stands twice in the configuration")


def _whole_shapes(given: Mapping[str, Any], signature: Signature) -> bool:
    """Return whether shapes are written as the model has them, without a `max_batch_size`.

    As onnxruntime's backend has it: always where inputs and outputs are; else by their dimensions.
    """
    ranks = {spec.name: len(spec.shape) for spec in (*signature.inputs, *signature.outputs)}
    both = bool(given["input"] and given["output"])
    shapes = [(tensor["name"], _dims(tensor)) for tensor in (*given["input"], *given["output"])]
    return any(both or len(dims) == ranks.get(name, len(dims)) for name, dims in shapes)


def _complete_tensors(
    kind: str, given: list[dict[str, Any]], specs: Sequence[TensorSpec], *, batched: bool
) -> None:
    known = {spec.name: spec for spec in specs}
    for tensor in given:
        if (spec := known.get(name := tensor["name"])) is None:
            raise UsageError(f"{kind} {name!r} is none of the model's: it has {[*known]}")
        if tensor.get("optional"):
            raise UsageError(f"{kind} {name!r}: optional, but the model takes no request without")
        datatype = "TYPE_STRING" if spec.datatype == "BYTES" else f"TYPE_{spec.datatype}"
        if tensor.get("data_type", "") in ("", "TYPE_INVALID"):
            tensor["data_type"] = datatype
        elif tensor["data_type"] != datatype:
            raise UsageError(f"{kind} {name!r}: data_type is {tensor['data_type']}, not {datatype}")
        if kind == "input" and batched:
            # Requests of different lengths come in one list: it is padded where it is planned.
            if tensor.get("allow_ragged_batch") and spec.length_axis is None:
                raise UsageError(f"{kind} {name!r}: allow_ragged_batch, but it has no length axis")
            tensor["allow_ragged_batch"] = spec.length_axis is not None
        # Triton has no tensor without dimensions: it is one number, as of onnxruntime's backend.
        shape = [extent if isinstance(extent, int) else -1 for extent in spec.shape] or [1]
        _complete_shape(kind, tensor, shape[batched:], batched=batched)


def _complete_shape(kind: str, tensor: dict[str, Any], shape: list[int], *, batched: bool) -> None:
    reshape, dims = tensor.get("reshape"), _dims(tensor)
    if not dims and reshape is None:
        tensor["dims"] = shape
        if not shape:  # nor without them beside the batch dimension
            tensor["dims"], tensor["reshape"] = [1], {"shape": []}
        return
    # Narrower than the model is a promise of the caller; wider or of another rank is an error.
    if len(dims) != len(shape) or any(m not in (-1, n) for n, m in zip(dims, shape, strict=True)):
        what = f"{kind} {tensor['name']!r}: {'reshape' if reshape else 'dims'} are {dims}"
        beside = " beside the batch dimension, which max_batch_size stands for" * batched
        raise UsageError(f"{what}, the model has {shape}{beside}")


def _dims(tensor: Mapping[str, Any]) -> list[int]:
    """Return the extents that the model is to see; nothing where none are written."""
    return [int(n) for n in (tensor.get("reshape") or {"shape": tensor.get("dims", [])})["shape"]]
