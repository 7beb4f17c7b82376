"""A model with what comes before and after it, as TOML tells: `lrai compile served.toml -o NAME`.

    model = "classifier.onnx"

    [preprocess.photo]            # what callers send instead of the model's own input
    input = "image"               # …which is this one
    resize = 256                  # the shorter side; or [height, width]
    crop = [224, 224]             # of the centre
    mean = [0.485, 0.456, 0.406]  # of 0 to 1, by channel
    std = [0.229, 0.224, 0.225]

    [preprocess.text]
    tokenizer = "tokenizer.json"
    ids = "input_ids"
    mask = "attention_mask"       # and types = "token_type_ids", where the model has them
    max_length = 128

    [postprocess]
    output = "logits"             # by default the first
    pool = "mean"                 # of an encoder's tokens, or first
    map = "softmax"               # or l2_normalised
    labels = "labels.txt"         # one in a line
    top_k = 1

Files lie in the folder of the TOML file, or below it. All of it becomes part of the graph, so the
gate judges it, and every host serves it.
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from lrai_core import CompileError, Imported
from lrai_import import onnx as onnx_files
from lrai_import.around import MOST, Around
from lrai_import.tokenizer import Tokenizer

_MOST_BYTES: Final = 64 << 20  # of one file beside the model
_Size = Annotated[int, Meta(ge=1, le=MOST)]
_Extents = tuple[_Size, _Size]


class Pixels(msgspec.Struct, tag=True, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Pixels for an input: uint8 [batch, height, width, channels], as image libraries give them.

    Attributes:
        input: Of the model: float32, four dimensions.
        resize: The shorter side, or height and width. As Pillow does it, within one of 255 levels;
            no side gets longer than 16,384.
        crop: Height and width of the centre that is kept; a smaller picture is refused.
        interpolation: Of `resize`.
        scale: What a level is multiplied with.
        mean: Taken away after that; one number, or one for each channel.
        std: Divided by after that, likewise.
        layout: Of the model's input.
        channels: Order that the model wants; given is red, green, blue.
    """

    input: str
    resize: int | list[int] | None = None  # sizes are checked later: msgspec 0.22 crashes on unions
    crop: _Extents | None = None
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    scale: float = 1 / 255
    mean: tuple[float, ...] = (0.0,)
    std: tuple[Annotated[float, Meta(gt=0)], ...] = (1.0,)
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    channels: Literal["RGB", "BGR"] = "RGB"


class Text(msgspec.Struct, tag=True, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Text for the inputs of an encoder: BYTES [batch], UTF-8.

    Attributes:
        tokenizer: File `tokenizer.json` of the library tokenizers: WordPiece, as BERT has it. Gives
            the same tokens, but for a word with a character that the vocabulary lacks: that is its
            known beginning and [UNK], and for the library [UNK] alone. Special tokens that stand
            in the text are text; control characters become [UNK]; NUL ends the text.
        ids: Input of the model that takes the tokens, integers [batch, length].
        mask: The one that takes 1 for a token and 0 for padding, if there is one.
        types: The one that takes the segments, if there is one: all are 0.
        max_length: Tokens that a text is cut to, with the first and the last.
    """

    tokenizer: str
    ids: str = "input_ids"
    mask: str = ""
    types: str = ""
    max_length: Annotated[int, Meta(ge=3, le=8192)] = 512


class Post(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is made of an output, float [batch, classes] or [batch, width].

    Attributes:
        output: The first by default.
        pool: Of an output [batch, length, width] for text: the mean of its tokens, or the first.
        map: Along the last axis; the output keeps its name. The gate then compares it as it is:
            `--output-map raw`.
        labels: File with a label in each line. Adds the outputs `label` and `score`.
        top_k: How many, the best first: [batch, top_k]. To the gate another label is as far as can
            be, whatever its rank: with more than one, few forms are close enough.
    """

    output: str = ""
    pool: Literal["mean", "first"] | None = None
    map: Literal["softmax", "l2_normalised"] | None = None
    labels: str = ""
    top_k: _Size = 1


class Described(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The file."""

    model: str
    preprocess: dict[Annotated[str, Meta(min_length=1, max_length=120)], Pixels | Text] = {}
    postprocess: Post | None = None


def load(path: Path, notify: Callable[[str], None]) -> Imported:
    """Return the model that a TOML file describes, with all of it in its graph.

    The hash is of the description, the model, and every file that it names.

    Raises:
        CompileError: The description, or what it names, cannot be used.
        UnsupportedOperator: See `lrai_import.onnx.load`.
    """
    files = _Files(path)
    described = _read(path, files)
    inner = onnx_files.load(files.find(described.model, "model"), notify)
    around = Around(inner.model)
    for name, spec in described.preprocess.items():
        if isinstance(spec, Text):
            content = files.read(spec.tokenizer, f"preprocess.{name}.tokenizer")
            around.text(name, spec, Tokenizer.of(content, spec.tokenizer))
        else:
            around.pixels(name, spec)
    if (post := described.postprocess) is not None:
        if post.top_k > 1 and not post.labels:
            raise CompileError("postprocess.top_k is of labels, and there are none")
        labels = files.lines(post.labels, "postprocess.labels") if post.labels else []
        around.post(post, labels)
    model = around.built()
    files.digest.update(inner.sha256.encode())
    return Imported(model=model, sha256=files.digest.hexdigest(), opset=around.opset)


def _read(path: Path, files: _Files) -> Described:
    try:
        tree: dict[str, Any] = tomllib.loads(files.read(path.name, "description").decode())
        for spec in (tree.get("preprocess") or {}).values():  # told apart by what only one has
            if isinstance(spec, dict):
                spec["type"] = "Text" if "tokenizer" in spec else "Pixels"
        return msgspec.convert(tree, Described)
    except (ValueError, AttributeError, RecursionError) as error:
        raise CompileError(f"{path.name} is not TOML as expected: {str(error)[:200]}") from None
    except msgspec.ValidationError as error:
        raise CompileError(f"{path.name}: {str(error)[:300]}") from None


class _Files:
    """Files in a folder; what is read is hashed."""

    def __init__(self, path: Path) -> None:
        self.digest = hashlib.sha256()
        self._folder = path.parent

    def find(self, name: str, what: str) -> Path:
        file = self._folder / name
        try:
            file = file.resolve()
            inside, there = file.is_relative_to(self._folder.resolve()), file.is_file()
        except (OSError, RuntimeError, ValueError):  # a loop of links, a name that is none
            inside, there = True, False
        if not inside:
            raise CompileError(f"{what} {name[:120]!r} lies outside the folder of the description")
        if not there:
            raise CompileError(f"{what} {name[:120]!r} is not a file")
        return file

    def read(self, name: str, what: str) -> bytes:
        file = self.find(name, what)
        if file.stat().st_size > _MOST_BYTES:
            raise CompileError(f"{what} {name[:120]!r} is over {_MOST_BYTES >> 20} MB")
        try:
            content = file.read_bytes()
        except OSError as error:
            raise CompileError(f"{what} {name[:120]!r}: {error.strerror}") from None
        self.digest.update(hashlib.sha256(content).digest())
        return content

    def lines(self, name: str, what: str) -> list[str]:
        try:
            lines = self.read(name, what).decode("utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise CompileError(f"{what} {name[:120]!r} is not UTF-8") from None
        if not lines:
            raise CompileError(f"{what} {name[:120]!r} is empty")
        return [line.strip() for line in lines]
