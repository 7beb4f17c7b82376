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
from onnx import TensorProto, helper

from lrai_core import CompileError
from lrai_import.around import Around, extent
from lrai_import.tokenizer import MOST_TOKENS, Tokenizer

_EXTENSIONS: Final = "ai.onnx.contrib"  # the domain of onnxruntime-extensions
_MOST_UNUSED: Final = 1024  # rows of a table for no token
_INTEGERS: Final = (TensorProto.INT32, TensorProto.INT64)
_PLAIN: Final = r"[^\t\n\r -~]"  # what a text may not have to be as the operator knows it
_LEFT_OUT: Final = r"[\x00-\x08\x0B\x0C\x0E-\x1F\x7F-\x{9F}\p{Cf}\p{Co}\x{FFFD}]"


class Text(msgspec.Struct, tag=True, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Text for the inputs of an encoder: BYTES [batch], UTF-8.

    Attributes:
        tokenizer: File `tokenizer.json` of the library tokenizers: WordPiece, as BERT has it, BPE
            of bytes, as GPT-2 and RoBERTa have it, or Unigram (SentencePiece), as XLM-R and T5
            have it. The graph gives the same tokens, with these exceptions.

            All: special tokens in the text are text, and NUL ends the text.

            WordPiece: a word with a character that the vocabulary lacks becomes its known beginning
            and [UNK], where the library gives [UNK] alone. An uncased tokenizer leaves capitals and
            accents beyond Latin-1 and base Cyrillic as they are (Č, Ł, Θ, ё, й, Korean), where the
            library makes them plain. In text in NFD, accents are left out.

            BPE: <|endoftext|> is a token also in the text, or the unknown one if the vocabulary
            lacks it. U+0085 is not white space.

            Unigram: of two ways to cut a text that are worth nearly the same (---- as --- and -, or
            the other way round), it may take the other one. U+2581, which marks the beginning of a
            word, is one more token if a word of a text begins with it, and none at the end of a
            text, unless rules of the file make it a space. Text in NFD, and half-width kana with a
            sound mark, are composed by the rules of the file, of which the library applies the
            first that fits, to short ones alone.
        ids: Input of the model that takes the tokens, integers [batch, length].
        mask: The one that takes 1 for a token and 0 for padding, if there is one.
        types: The one that takes the segments, if there is one: all are 0.
        max_length: Tokens that a text is cut to, with the first and the last; by default what the
            tokenizer's file says, or else 512.
    """

    tokenizer: str
    ids: str = "input_ids"
    mask: str = ""
    types: str = ""
    max_length: Annotated[int, Meta(ge=3, le=MOST_TOKENS)] | None = None


def put_text(around: Around, name: str, spec: Text, tokenizer: Tokenizer) -> None:
    """Let the inputs of an encoder take BYTES [batch], under another name.

    Raises:
        CompileError: The model has no such input, or another number of tokens than the tokenizer.
    """
    given = [(spec.ids, around.take(spec.ids, _INTEGERS, 2))]
    given += [(own, around.take(own, _INTEGERS, 2)) for own in (spec.mask, spec.types) if own]
    tokens = _tokens(around, spec.ids)
    # A table may be longer, for an even number of rows, but not by that much.
    if tokens is not None and not 0 <= tokens - tokenizer.tokens < _MOST_UNUSED:
        got = f"{tokenizer.tokens} tokens, the model's table {tokens}"
        raise CompileError(f"the tokenizer does not match the model: it has {got}")
    batch = extent(given[0][1].type.tensor_type.shape.dim[0], "batch")
    around.declare(name, TensorProto.STRING, [batch])
    length = given[0][1].type.tensor_type.shape.dim[1]
    fixed = length.dim_value
    around.lengths.add(length.dim_param)
    asked = spec.max_length or tokenizer.most
    most = min(asked, fixed) if fixed else asked
    cleaned = name
    if tokenizer.operator == "BertTokenizer":
        cleaned = _cleaned(around, name, tokenizer)
    elif tokenizer.rewrite[0]:
        around.before.append(node := _replace(around, name, *tokenizer.rewrite))
        cleaned = node.output[0]
    ids, lengths = _tokenised(around, cleaned, most, fixed or most, tokenizer)
    longest = around.ints(fixed)
    if not fixed:
        longest = around.add(
            "Max", [around.add("ReduceMax", [lengths], keepdims=0), around.ints(1)]
        )
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
    around.before.append(plain := _replace(around, text, _PLAIN, ""))
    same = around.add("StringEqual", [text, plain.output[0]], domain=_EXTENSIONS)
    counted = around.add("Cast", [around.add("Not", [same])], to=TensorProto.INT64)
    counted = around.add("ReduceSum", [counted], keepdims=0)
    other = around.add("Cast", [counted], to=TensorProto.BOOL)
    nodes, last = list[onnx.NodeProto](), text
    for pattern, new in done:
        nodes.append(_replace(around, last, pattern, new))
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


def _replace(around: Around, text: str, pattern: str, new: str) -> onnx.NodeProto:
    texts = [around.constant(np.array([one], np.object_)) for one in (pattern, new)]
    inputs, output = [text, *texts], [around.fresh()]
    return helper.make_node("StringRegexReplace", inputs, output, domain=_EXTENSIONS)


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
    node, info = helper.make_node, helper.make_tensor_value_info
    own = defaultdict[str, str](around.fresh)  # values while one text is made tokens
    integer, ends = TensorProto.INT64, (tokenizer.first, tokenizer.last)
    before, after = map(around.ints, ends)
    nought, room = around.ints([0]), around.ints([max(most - sum(map(len, ends)), 0)])
    inputs, bert = [own["text"]], tokenizer.operator == "BertTokenizer"  # it puts ends by itself
    if tokenizer.operator == "SentencepieceTokenizer":  # not sampled, without ends, not reversed
        inputs += [nought, around.constant(np.zeros(1, np.float32))]
        inputs += [around.constant(np.zeros(1, np.bool_))] * 3
    outputs = [own[name] for name in ("ids", "types", "mask", "offsets")[: 4 if bert else 2]]
    inside = [around.ints([int(bert)]), around.ints([-1 if bert else np.iinfo(np.int64).max])]
    body = helper.make_graph(
        [
            node("Gather", [text, own["turn"]], [own["single"]], axis=0),
            node("Unsqueeze", [own["single"], nought], [own["text"]]),
            node(tokenizer.operator, inputs, outputs, domain=_EXTENSIONS, **tokenizer.attributes),
            node("Reshape", [own["ids"], around.ints([-1])], [own["row"]]),
            node("Cast", [own["row"]], [own["all"]], to=integer),
            # The operators' own truncation gives wrong tokens (0.15): so all, cut here.
            node("Slice", [own["all"], *inside], [own["plain"]]),
            node("Slice", [own["plain"], nought, room], [own["cut"]]),
            node("Concat", [before, own["cut"], after], [own["kept"]], axis=0),
            node("Shape", [own["kept"]], [own["length"]]),
            node("Sub", [around.ints([width]), own["length"]], [own["short"]]),
            node("Concat", [nought, own["short"]], [own["pads"]], axis=0),
            node("Pad", [own["kept"], own["pads"], around.ints(tokenizer.pad)], [own["padded"]]),
            node("Identity", [own["going"]], [own["on"]]),
        ],
        "tokenize",
        [info(own["turn"], integer, []), info(own["going"], TensorProto.BOOL, [])],
        [
            info(own["on"], TensorProto.BOOL, []),
            info(own["padded"], integer, [width]),
            info(own["length"], integer, [1]),
        ],
    )
    rows = around.add("Squeeze", [around.add("Shape", [text]), nought])
    always = around.constant(np.array([1], np.bool_).reshape(()))
    ids, lengths = around.fresh(), around.fresh()
    around.before.append(node("Loop", [rows, always], [ids, lengths], body=body))
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
