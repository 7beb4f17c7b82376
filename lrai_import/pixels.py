"""Pixels as the input of a model of pictures: resized and cropped as Pillow does it, scaled."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgspec
import numpy as np
from msgspec import Meta
from onnx import TensorProto

from lrai_core import CompileError
from lrai_import.around import Around, extent

MOST: Final = 16_384  # pixels of a side
_RESIZES: Final = 18  # the operator set whose Resize looks at all pixels that it shrinks
_MODES: Final[dict[str, dict[str, Any]]] = {
    "bilinear": {"mode": "linear", "exclude_outside": 1},
    "bicubic": {"mode": "cubic", "cubic_coeff_a": -0.5, "exclude_outside": 1},  # Pillow's own
}
_Side = Annotated[int, Meta(ge=1, le=MOST)]


class Pixels(msgspec.Struct, tag=True, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Pixels for an input: uint8 [batch, height, width, channels], as image libraries give them.

    Attributes:
        input: Of the model: float32, four dimensions.
        resize: The shorter side, or height and width. As Pillow does it, within one of 255 levels
            (bicubic: at hard edges of pictures that shrink to a third or less, up to 20); no side
            gets longer than 16,384.
        crop: Height and width of the centre that is kept; a smaller picture is refused.
        interpolation: Of `resize`.
        scale: What a level is multiplied with.
        mean: Taken away after that; a list of one number, or of one for each channel.
        std: Divided by after that, likewise.
        layout: Of the model's input.
        channels: Order that the model wants; given is red, green, blue. Three, where their number
            is free.
    """

    input: str
    resize: int | list[int] | None = None  # sizes are checked later: msgspec 0.22 crashes on unions
    crop: tuple[_Side, _Side] | None = None
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    scale: float = 1 / 255
    mean: tuple[float, ...] = (0.0,)
    std: tuple[Annotated[float, Meta(gt=0)], ...] = (1.0,)
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    channels: Literal["RGB", "BGR"] = "RGB"


def put_pixels(around: Around, name: str, spec: Pixels) -> None:
    """Let an input take uint8 [batch, height, width, channels], under another name.

    Raises:
        CompileError: The model has no such input, or it is no picture of that kind.
    """
    given = around.take(spec.input, (TensorProto.FLOAT,), 4)
    dims = given.type.tensor_type.shape.dim
    axes = (0, 2, 3, 1) if spec.layout == "NCHW" else (0, 1, 2, 3)
    batch, height, width, channels = (dims[axis] for axis in axes)
    if (colours := channels.dim_value or 3) not in (1, 3):
        where = f"in the layout {spec.layout}"
        raise CompileError(f"input {spec.input!r} has {colours} channels {where}, not 1 or 3")
    for what, values in (("mean", spec.mean), ("std", spec.std), ("scale", (spec.scale,))):
        if not np.isfinite(values).all():
            raise CompileError(f"preprocess.{name}.{what} is {values}, not finite")
        if len(values) not in (1, colours):
            got = f"{len(values)} numbers for {colours} channels"
            raise CompileError(f"preprocess.{name}.{what} has {got}")
    _check_extents(name, spec, (height.dim_value, width.dim_value))
    sides = [f"{name}.height", f"{name}.width"]  # of this one: two need not be of one size
    extents: list[int | str] = [*sides]
    if spec.resize is None and spec.crop is None:
        extents = [extent(*side) for side in zip((height, width), sides, strict=True)]
    around.declare(name, TensorProto.UINT8, [extent(batch, "batch"), *extents, colours])
    value = name
    if spec.channels == "BGR":
        value = around.add("Gather", [value, around.ints([2, 1, 0][-colours:])], axis=3)
    value = around.add("Transpose", [value], perm=[0, 3, 1, 2])
    if spec.resize is not None:
        value = _resized(around, value, spec)
    if spec.crop is not None:
        value = _cropped(around, value, spec.crop)
    value = around.add("Cast", [value], to=TensorProto.FLOAT)
    mean, std = (
        np.broadcast_to(np.array(numbers, np.float64), colours).reshape(1, colours, 1, 1)
        for numbers in (spec.mean, spec.std)
    )
    value = around.add("Mul", [value, around.constant((spec.scale / std).astype(np.float32))])
    value = around.add("Sub", [value, around.constant((mean / std).astype(np.float32))])
    if spec.layout == "NCHW":
        around.add("Identity", [value], spec.input)
    else:
        around.add("Transpose", [value], spec.input, perm=[0, 2, 3, 1])


def _check_extents(name: str, spec: Pixels, model: tuple[int, int]) -> None:
    """Refuse what does not lead to the extents that the model wants; 0 is any."""
    least = [spec.resize] * 2 if isinstance(spec.resize, int) else spec.resize
    if least is not None and (len(least) != 2 or not 1 <= min(least) <= max(least) <= MOST):
        got = f"resize is {str(spec.resize)[:60]}, needed are one or two extents up to {MOST}"
        raise CompileError(f"preprocess.{name}.{got}")
    if spec.crop and least and any(c > r for c, r in zip(spec.crop, least, strict=True)):
        raise CompileError(f"preprocess.{name}: crop {list(spec.crop)} exceeds {list(least)}")
    made = spec.crop or (None if isinstance(spec.resize, int) else spec.resize)  # the last word
    if made and any(w not in (0, m) for w, m in zip(model, made, strict=True)):
        got = f"gives {list(made)}, the model wants {list(model)}"
        raise CompileError(f"preprocess.{name} {got}")
    if spec.resize is not None and made is None and any(model):
        raise CompileError(f"preprocess.{name}: resize to a shorter side needs crop here")


def _resized(around: Around, value: str, spec: Pixels) -> str:
    around.upgrade(_RESIZES, "resize")
    shape = around.add("Shape", [value])
    kept = around.add("Slice", [shape, around.ints([0]), around.ints([2])])
    if isinstance(spec.resize, int):
        sides = around.add("Slice", [shape, around.ints([2]), around.ints([4])])
        shorter = around.add("ReduceMin", [sides], keepdims=1)
        shorter = around.add("Max", [shorter, around.ints([1])])  # nothing is refused further on
        wanted = around.add("Mul", [sides, around.ints([spec.resize])])
        sides = around.add("Div", [wanted, shorter])
        sides = around.add("Min", [sides, around.ints([MOST])])  # of a sliver, no gigabytes
    else:
        sides = around.ints(list(spec.resize or ()))
    sizes = around.add("Concat", [kept, sides], axis=0)
    how = _MODES[spec.interpolation]
    return around.add("Resize", [value, "", "", sizes], antialias=1, **how)


def _cropped(around: Around, value: str, extents: tuple[int, int]) -> str:
    """Return the centre; a half is rounded to even, as torchvision does."""
    crop = around.ints(list(extents))
    shape = around.add("Shape", [value])
    sides = around.add("Slice", [shape, around.ints([2]), around.ints([4])])
    left = around.add("Cast", [around.add("Sub", [sides, crop])], to=TensorProto.FLOAT)
    half = around.add("Mul", [left, around.constant(np.array([0.5], np.float32))])
    start = around.add("Cast", [around.add("Round", [half])], to=TensorProto.INT64)
    start = around.add("Max", [start, around.ints([0])])
    end = around.add("Add", [start, crop])
    value = around.add("Slice", [value, start, end, around.ints([2, 3])])
    # What is smaller than the crop is refused here, by the engine.
    return around.add("Reshape", [value, around.ints([0, 0, *extents])])
