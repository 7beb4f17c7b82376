"""A model with what comes before and after it, as TOML tells: `lrai compile served.toml -o NAME`.

    model = "classifier.onnx"     # or the folder of a SavedModel of TensorFlow, of which another
    # signature = "classify"      # than serving_default may be named

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
    max_length = 128              # by default what the tokenizer's file says, or else 512

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
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from lrai_core import CompileError, Imported
from lrai_import import onnx as onnx_files
from lrai_import import saved_model
from lrai_import.around import Around, Post
from lrai_import.pixels import Pixels, put_pixels
from lrai_import.texts import Text, put_text
from lrai_import.tokenizer import Tokenizer

_MOST_BYTES: Final = 64 << 20  # of one file beside the model


class Described(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The file."""

    model: str
    signature: str = ""
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
    source = files.find(described.model, "model")
    if source.is_dir():
        inner = saved_model.load(source, notify, described.signature)
    elif described.signature:
        raise CompileError("signature is of a SavedModel, and the model is a file")
    else:
        inner = onnx_files.load(source, lambda why: notify(f"{source.name}: {why}"))
    around = Around(inner.model)
    for name, spec in described.preprocess.items():
        if isinstance(spec, Text):
            content = files.read(spec.tokenizer, f"preprocess.{name}.tokenizer")
            tokenizer = Tokenizer.of(content, spec.tokenizer)
            put_text(around, name, spec, tokenizer)
            told = tokenizer.attributes
            if told.get("do_lower_case") or told.get("strip_accents"):
                notify(
                    "capitals and accents become plain small letters in Latin-1, and Cyrillic but "
                    "for й and ё; in other scripts the tokens are the library's for texts that "
                    "come in lower case and decomposed (NFD)"
                )
        else:
            put_pixels(around, name, spec)
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
    except msgspec.ValidationError as error:
        raise CompileError(f"{path.name}: {str(error)[:300]}") from None
    except (ValueError, AttributeError, RecursionError) as error:
        raise CompileError(f"{path.name} is not TOML as expected: {str(error)[:200]}") from None


class _Files:
    """Files in a folder; what is read is hashed."""

    def __init__(self, path: Path) -> None:
        self.digest = hashlib.sha256()
        self._folder = path.parent

    def find(self, name: str, what: str) -> Path:
        file = self._folder / name
        try:
            file = file.resolve()
            inside = file.is_relative_to(self._folder.resolve())
            there = file.is_file() or (what == "model" and file.is_dir())
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
