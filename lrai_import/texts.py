"""Text as the input of an encoder: made tokens inside the graph."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from itertools import groupby
from typing import Annotated, Final

import msgspec
import numpy as np
import onnx
from msgspec import Meta
from onnx import TensorProto, helper, numpy_helper

from lrai_core import CompileError
from lrai_import.around import Around, extent
from lrai_import.tokenizer import Tokenizer

_EXTENSIONS: Final = "ai.onnx.contrib"  # the domain of onnxruntime-extensions
_MOST_UNUSED: Final = 1024  # rows of a table for no token
_INTEGERS: Final = (TensorProto.INT32, TensorProto.INT64)
_PLAIN: Final = r"[^\t\n\r -~]"  # what a text may not have to be as the operator knows it
_LEFT_OUT: Final = r"[\x00-\x08\x0B\x0C\x0E-\x1F\x7F-\x{9F}\p{Cf}\p{Co}\x{FFFD}]"


class Text(msgspec.Struct, tag=True, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Text for the inputs of an encoder: BYTES [batch], UTF-8.

    Attributes:
        tokenizer: File `tokenizer.json` of the library tokenizers: WordPiece, as BERT has it. Gives
            the same tokens, but for a word with a character that the vocabulary lacks: that is its
            known beginning and [UNK], and for the library [UNK] alone; and but for capitals and
            accents beyond Latin-1 and base Cyrillic, which an uncased tokenizer of the library
            makes plain (Č, Ł, Θ, ё, й, Korean) and the graph leaves as they are; of text in NFD
            accents are left out. Special tokens in the text are text; NUL ends the text.
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


def put_text(around: Around, name: str, spec: Text, tokenizer: Tokenizer) -> None:
    """Let the inputs of an encoder take BYTES [batch], under another name.

    Raises:
        CompileError: The model has no such input, or another number of tokens than the tokenizer.
    """
    given = [(spec.ids, around.take(spec.ids, _INTEGERS, 2))]
    given += [(own, around.take(own, _INTEGERS, 2)) for own in (spec.mask, spec.types) if own]
    tokens = _tokens(around, spec.ids)
    # A table may be longer, for an even number of rows, but not by that much.
    if tokens is not None and not 0 <= tokens - len(tokenizer.vocabulary) < _MOST_UNUSED:
        got = f"{len(tokenizer.vocabulary)} tokens, the model's table {tokens}"
        raise CompileError(f"the tokenizer does not match the model: it has {got}")
    batch = extent(given[0][1].type.tensor_type.shape.dim[0], "batch")
    around.declare(name, TensorProto.STRING, [batch])
    length = given[0][1].type.tensor_type.shape.dim[1]
    fixed = length.dim_value
    around.lengths.add(length.dim_param)
    most = min(spec.max_length, fixed) if fixed else spec.max_length
    cleaned = _cleaned(around, name, tokenizer)
    ids, lengths = _tokenised(around, cleaned, most, fixed or most, tokenizer)
    longest = around.ints(fixed)
    if not fixed:
        longest = around.add("ReduceMax", [lengths], keepdims=0)
        nought, one = around.ints([0]), around.ints([1])
        end = around.add("Unsqueeze", [longest, nought])
        ids = around.add("Slice", [ids, nought, end, one])
    places = around.add("Range", [around.ints(0), longest, around.ints(1)])
    mask = around.add("Less", [places, lengths])
    around.masks.append(mask)
    values = {spec.ids: ids, spec.mask: mask}
    if spec.types:
        values[spec.types] = around.add("Mul", [ids, around.ints([0])])
    for own, declared in given:
        kind = declared.type.tensor_type.elem_type
        around.add("Cast", [values[own]], own, to=kind)


def _cleaned(around: Around, text: str, tokenizer: Tokenizer) -> str:
    """Return texts with what the operator knows of ASCII alone done: cleaned, and split.

    As BertNormalizer and BertPreTokenizer of the library do it, and only where a text has other
    characters: to compile the expressions takes longer than to make tokens of a text.
    """
    done = [(_LEFT_OUT, ""), (r"\p{Z}", " "), (f"({_beyond_ascii('P')})", r" \1 ")]
    if tokenizer.attributes["strip_accents"]:
        done.insert(0, (_beyond_ascii("Mn"), ""))

    def replace(old: str, pattern: str, new: str) -> onnx.NodeProto:
        texts = [around.constant(np.array([one], np.object_)) for one in (pattern, new)]
        inputs, output = [old, *texts], [around.fresh()]
        return helper.make_node("StringRegexReplace", inputs, output, domain=_EXTENSIONS)

    around.before.append(plain := replace(text, _PLAIN, ""))
    same = around.add("StringEqual", [text, plain.output[0]], domain=_EXTENSIONS)
    counted = around.add("Cast", [around.add("Not", [same])], to=TensorProto.INT64)
    counted = around.add("ReduceSum", [counted], keepdims=0)
    other = around.add("Cast", [counted], to=TensorProto.BOOL)
    nodes, last = list[onnx.NodeProto](), text
    for pattern, new in done:
        nodes.append(replace(last, pattern, new))
        last = nodes[-1].output[0]
    as_it_is = around.fresh()
    sides = [
        helper.make_graph(
            own, "texts", [], [helper.make_tensor_value_info(out, TensorProto.STRING, [None])]
        )
        for own, out in (
            (nodes, last),
            ([helper.make_node("Identity", [text], [as_it_is])], as_it_is),
        )
    ]
    return around.add("If", [other], then_branch=sides[0], else_branch=sides[1])


def _beyond_ascii(category: str) -> str:
    """Return a class of RE2 of what Unicode has beyond ASCII in a category.

    Of the basic plane alone, and by its code points: by its name it takes twice as long to compile.
    """
    own = (c for c in range(0x80, 0x10000) if unicodedata.category(chr(c)).startswith(category))
    runs = [[c for _, c in run] for _, run in groupby(enumerate(own), lambda at: at[1] - at[0])]
    return "[" + "".join(f"\\x{{{run[0]:X}}}-\\x{{{run[-1]:X}}}" for run in runs) + "]"


def _tokenised(
    around: Around, text: str, most: int, width: int, tokenizer: Tokenizer
) -> tuple[str, str]:
    """Return tokens, int64 [batch, width], padded, and how many there are, int64 [batch, 1].

    The operator takes one text at a time.
    """
    own = defaultdict[str, str](around.fresh)  # values while one text is made tokens
    integer = TensorProto.INT64
    nought = numpy_helper.from_array(np.array([0], np.int64), own["nought"])
    unit = numpy_helper.from_array(np.array([1], np.int64), own["unit"])
    limit = numpy_helper.from_array(np.array([most], np.int64), own["limit"])
    wide = numpy_helper.from_array(np.array([width], np.int64), own["wide"])
    blank = np.array(tokenizer.vocabulary.index("[PAD]"), np.int64)
    padding = numpy_helper.from_array(blank, own["blank"])
    tokenize = helper.make_node(
        "BertTokenizer",
        [own["one"]],
        [own["ids"], own["types"], own["mask"], own["offsets"]],
        domain=_EXTENSIONS,
        **tokenizer.attributes,
    )
    body = helper.make_graph(
        [
            helper.make_node("Gather", [text, own["turn"]], [own["single"]], axis=0),
            helper.make_node("Unsqueeze", [own["single"], own["nought"]], [own["one"]]),
            tokenize,
            # The operator's own truncation gives wrong tokens (0.15): so all, cut here.
            helper.make_node("Shape", [own["ids"]], [own["all"]]),
            helper.make_node("Sub", [own["all"], own["unit"]], [own["end"]]),
            helper.make_node("Slice", [own["ids"], own["end"], own["all"]], [own["last"]]),
            helper.make_node("Sub", [own["limit"], own["unit"]], [own["most"]]),
            helper.make_node("Min", [own["end"], own["most"]], [own["cut"]]),
            helper.make_node("Slice", [own["ids"], own["nought"], own["cut"]], [own["first"]]),
            helper.make_node("Concat", [own["first"], own["last"]], [own["kept"]], axis=0),
            helper.make_node("Shape", [own["kept"]], [own["length"]]),
            helper.make_node("Sub", [own["wide"], own["length"]], [own["short"]]),
            helper.make_node("Concat", [own["nought"], own["short"]], [own["pads"]], axis=0),
            helper.make_node("Pad", [own["kept"], own["pads"], own["blank"]], [own["padded"]]),
            helper.make_node("Identity", [own["going"]], [own["on"]]),
        ],
        "tokenize",
        [
            helper.make_tensor_value_info(own["turn"], integer, []),
            helper.make_tensor_value_info(own["going"], TensorProto.BOOL, []),
        ],
        [
            helper.make_tensor_value_info(own["on"], TensorProto.BOOL, []),
            helper.make_tensor_value_info(own["padded"], integer, [width]),
            helper.make_tensor_value_info(own["length"], integer, [1]),
        ],
        initializer=[nought, unit, limit, wide, padding],
    )
    rows = around.add("Squeeze", [around.add("Shape", [text]), around.ints([0])])
    always = around.constant(np.array([1], np.bool_).reshape(()))
    ids, lengths = around.fresh(), around.fresh()
    around.before.append(helper.make_node("Loop", [rows, always], [ids, lengths], body=body))
    if all(o.domain != _EXTENSIONS for o in around.model.opset_import):
        around.model.opset_import.append(helper.make_opsetid(_EXTENSIONS, 1))
    return ids, lengths


def _tokens(around: Around, ids: str) -> int | None:
    """Return the rows of the table that the ids are looked up in, None where there is none."""
    tables = {tensor.name: tensor.dims for tensor in around.model.graph.initializer}
    same = {ids}
    for node in around.model.graph.node:
        if node.op_type in ("Cast", "Identity") and node.input[0] in same:
            same.add(node.output[0])
        if node.op_type == "Gather" and node.input[1] in same and node.input[0] in tables:
            return int(tables[node.input[0]][0])
    return None
