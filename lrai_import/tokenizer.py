"""A tokenizer's file, as attributes of the operator that onnxruntime-extensions has for it."""

from __future__ import annotations

import json
import struct
from base64 import b64decode
from collections.abc import Container
from itertools import pairwise
from typing import Any, Final, NamedTuple

from lrai_core import CompileError

_SPECIAL: Final = {
    f"{name}_token": f"[{name.upper()}]" for name in ("unk", "sep", "cls", "pad", "mask")
}
# What tells kinds apart in files of old, which do not name them.
_KINDS: Final = {"merges": "BPE", "unk_id": "Unigram", "max_input_chars_per_word": "WordPiece"}
_PLACES: Final = ("normalizer", "pre_tokenizer", "post_processor")
_SHAPES: Final = (
    "WordPiece after BertNormalizer and BertPreTokenizer",
    "BPE after None and ByteLevel",
    "Unigram after Precompiled and WhitespaceSplit, Metaspace",
    "Unigram after Precompiled, Strip, Replace and Metaspace",
)
_OPTIONS: Final[dict[str, tuple[Any, ...]]] = (  # what may be, where it is there at all
    {"clean_text": (True,), "max_input_chars_per_word": (100,), "use_regex": (True,)}
    | {"dropout": (None, 0), "end_of_word_suffix": (None, ""), "byte_fallback": (False,)}
    | {"strip_left": (False,), "strip_right": (True,), "pattern": ({"Regex": " {2,}"},)}
    | {"content": (" ", "▁"), "replacement": ("▁",), "prepend_scheme": ("always",)}
    | {"split": (True,), "continuing_subword_prefix": (None, "")}
)
_PLAIN: Final = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_BYTES: Final = [*map(chr, _PLAIN), *map(chr, range(0x100, 0x200 - len(_PLAIN)))]  # of ByteLevel
_END: Final = "<|endoftext|>"  # a token to GPT2Tokenizer, whatever its vocabulary
_SPACED: Final = ("^([^ ])", r" \1")
_SPACE: Final = r"[\t\n\f\r\x{85}\p{Z}%s]+"  # to the library; with \v where no rules leave it out
_BROKEN: Final = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, struct.error)
_USUAL, MOST_TOKENS = 512, 8192  # that a text is cut to
_NORMAL, _UNKNOWN, _CONTROL = 1, 2, 3  # kinds of pieces to SentencePiece


class Tokenizer(NamedTuple):
    """What makes tokens of texts.

    Attributes:
        operator: Of onnxruntime-extensions.
        attributes: Of the operator.
        tokens: How many there are.
        first: Ids before those of a text.
        last: Ids after them, also where they are cut.
        pad: The id that fills a row.
        most: Tokens that a text is cut to, where nothing else is said.
        rewrite: A pattern, and what is put for it before all else; empty for none.
    """

    operator: str
    attributes: dict[str, Any]
    tokens: int
    first: list[int]
    last: list[int]
    pad: int
    most: int
    rewrite: tuple[str, str] = ("", "")

    @classmethod
    def of(cls, content: bytes, name: str) -> Tokenizer:
        """Return what a `tokenizer.json` holds.

        Raises:
            CompileError: It is none, or has what no operator does.
        """
        try:
            tree = json.loads(content)
            model = tree["model"]
            kind = model.get("type") or next((_KINDS[key] for key in _KINDS if key in model), "")
            before, splits, after = (_parts(tree.get(place)) for place in _PLACES)
            _check(kind, model, before, splits, name)
            added = {str(token["content"]): token for token in tree.get("added_tokens") or ()}
            ids = _ids(kind, model["vocab"], added, name)
            first, last = _around(kind, after, name)
            pad = next((ids[pad] for pad in ("[PAD]", "<pad>") if pad in ids), 0)
            cuts, pads = (tree.get(place) or {} for place in ("truncation", "padding"))
            for own, does in ((cuts, "cuts long texts"), (pads, "fills short texts")):
                if own.get("direction", "Right") != "Right":
                    raise CompileError(f"{name} {does} at their beginning, the graph at the end")
            pad, most = int(pads.get("pad_id", pad)), int(cuts.get("max_length", _USUAL))
            if not {pad, *first, *last} <= {*ids.values()}:
                raise CompileError(f"{name}: a special token is none of its {len(ids)}")
            rest = len(ids), first, last, pad, min(max(most, 3), MOST_TOKENS)
            if kind == "WordPiece":
                return cls("BertTokenizer", _word_pieces(ids, before[0]), *rest)
            if kind == "BPE":
                pairs = _byte_pairs(model, ids, ids.get(_END, ids.get("<unk>", pad)), name)
                spaced = splits[0].get("add_prefix_space", True)
                return cls("GPT2Tokenizer", pairs, *rest, _SPACED if spaced else ("", ""))
            rules = b64decode("".join(part.get("precompiled_charsmap", "") for part in before))
            space = _SPACE % ("" if rules else r"\v")
            rewrite = (space, " ") if len(splits) > 1 else (f"{space}$", "")
            return cls("SentencepieceTokenizer", _pieces(model, added, rules, name), *rest, rewrite)
        except (*_BROKEN, RecursionError):
            raise CompileError(f"{name} is no tokenizer.json of the library tokenizers") from None


def _parts(part: Any) -> list[Any]:
    """Return what a sequence consists of, and what is none as it is."""
    keys = ("normalizers", "pretokenizers", "processors")
    inner = next((part[key] for key in keys if key in part), None) if part else []
    return [part] if inner is None else [own for one in inner for own in _parts(one)]


def _check(kind: str, model: Any, before: list[Any], splits: list[Any], name: str) -> None:
    """Refuse what consists of other parts than an operator does, or sets them otherwise."""
    done, cut = ([str(part.get("type")) for part in parts] for parts in (before, splits))
    got = f"{kind} after {', '.join(done) or None} and {', '.join(cut) or None}"[:180]
    fits, options = got in _SHAPES, _OPTIONS
    if kind == "Unigram":
        rest = done[done[:1] == ["Precompiled"] :]
        fits = cut == ["Metaspace"] and rest == ["Strip", "Replace"]
        options = _OPTIONS | {"add_prefix_space": (True,)}  # files of old have no prepend_scheme
        if cut == ["WhitespaceSplit", "Metaspace"]:
            fits, options = {*rest} <= {"Strip", "Replace"}, options | {"content": (" ",)}
    elif kind == "WordPiece":
        options = _OPTIONS | {"continuing_subword_prefix": ("##",), "unk_token": ("[UNK]",)}
    if not fits:
        raise CompileError(f"{name} is {got}; what can be part of a graph is {'; '.join(_SHAPES)}")
    for part in (model, *before, *splits):
        for key in options.keys() & part.keys():
            if part[key] not in options[key]:
                got = f"{key} of {part.get('type', kind)} is {part[key]!r:.60}"
                needed = " or ".join(map(repr, options[key]))
                raise CompileError(f"{name}: {got}, needed is {needed}")


def _ids(kind: str, vocab: Any, added: dict[str, Any], name: str) -> dict[str, int]:
    """Return the ids of all tokens: those of the vocabulary come first, in their order."""
    vocabulary = {word: at for at, (word, _) in enumerate(vocab)} if kind == "Unigram" else vocab
    vocabulary = dict(sorted(vocabulary.items(), key=lambda item: item[1]))
    ids = vocabulary | {w: t["id"] for w, t in added.items() if "id" in t and w not in vocabulary}
    "".join(ids).encode()
    needed = {"WordPiece": [*_SPECIAL.values()], "BPE": _BYTES}.get(kind, ["▁"])
    if {*ids.values()} != {*range(len(ids))} or not {*needed} <= vocabulary.keys():
        missing = ", ".join(needed)[:120]
        raise CompileError(f"{name}: ids with a gap, or no {missing} in its vocabulary")
    if any(not word or (kind == "WordPiece" and {*"\n\r"} & {*word}) for word in vocabulary):
        raise CompileError(f"{name}: a word of its vocabulary is empty or has a line break")
    for word, token in sorted(added.items()):
        if not token.get("special") or (kind == "WordPiece" and word not in vocabulary):
            raise CompileError(f"{name} adds {word[:60]!r}, not in its vocabulary or not special")
    return ids


def _around(kind: str, processors: list[Any], name: str) -> tuple[list[int], list[int]]:
    """Return the ids that are put before a text, A, and after it."""
    ends = list[tuple[str, list[int]]]()
    for own in processors:
        if own["type"] in ("BertProcessing", "RobertaProcessing"):
            (cls, *first), (sep, *last) = own["cls"], own["sep"]
            ends += [(cls, first), ("A", []), (sep, last)]
        elif own["type"] == "TemplateProcessing":
            known = {"A": {"ids": []}} | own["special_tokens"]
            found = [end["id"] for part in own["single"] for end in part.values()]
            ends += [(end, known[end]["ids"]) for end in found]
        elif own["type"] != "ByteLevel":
            ends += [(f"the post-processor {own['type']}", [])]
    names = [end for end, _ in ends] or ["A"]
    if names.count("A") != 1 or (kind == "WordPiece" and names != ["[CLS]", "A", "[SEP]"]):
        needed = "between [CLS] and [SEP]" if kind == "WordPiece" else "once between tokens"
        raise CompileError(f"{name} does not put a text {needed}: it has {', '.join(names)[:120]}")
    at = names.index("A")
    return [i for _, ids in ends[:at] for i in ids], [i for _, ids in ends[at:] for i in ids]


def _word_pieces(ids: dict[str, int], normalizer: dict[str, Any]) -> dict[str, Any]:
    lower, strip = normalizer.get("lowercase"), normalizer.get("strip_accents")
    return {
        "vocab_file": "\n".join(ids),
        "do_lower_case": int(bool(lower)),
        "strip_accents": int(bool(lower if strip is None else strip)),
        "tokenize_chinese_chars": int(bool(normalizer.get("handle_chinese_chars", True))),
        **_SPECIAL,
    }


def _byte_pairs(model: Any, ids: dict[str, int], end: int, name: str) -> dict[str, Any]:
    """Return attributes by which a word is one token only if merges make it one.

    The operator looks a word up before it merges, and merges a pair wherever it is at once.
    """
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    ranks, made = dict[tuple[str, str], int](), {*_BYTES}
    for rank, (left, right) in enumerate(pairs):
        if not {left, right} <= made or left + right not in ids:
            got = f"{left[:40]!r} and {right[:40]!r}"
            raise CompileError(f"{name} merges {got} before there are such tokens")
        ranks[left, right] = rank
        made.add(left + right)
    if model.get("ignore_merges"):
        made = {*model["vocab"]}
    elif odd := [word for word in made if not _is_one(word, ranks)]:
        raise CompileError(f"{name} has the token {min(odd)[:60]!r}, which no text becomes")
    # No text has raw DEL. The operator (0.15) writes beyond its table where ids have a gap; lines
    # that begin with # are comments to it, before the first pair.
    known = {word if word in made else f"\x7f{word}": at for word, at in ids.items()}
    merges = "\n".join(["\x7f \x7f", *map(" ".join, pairs)])
    return {"vocab": json.dumps(known | {_END: end}), "merges": merges}


def _is_one(word: str, ranks: dict[tuple[str, str], int]) -> bool:
    parts, never = [*word[:512]], len(ranks)  # more would take time by their square
    while len(parts) > 1:
        rank, at = min((ranks.get(pair, never), at) for at, pair in enumerate(pairwise(parts)))
        if rank == never:
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts == [word]


def _pieces(model: Any, special: Container[str], rules: bytes, name: str) -> dict[str, Any]:
    """Return a model of SentencePiece with the same ids; no text becomes a special token."""
    found, worst = list[bytes](), dict[int, float]()
    for at, (piece, score) in enumerate(model["vocab"]):
        apart = piece in special or "▁" in piece[1:]  # no word has a space but before it
        kind = _UNKNOWN if at == model["unk_id"] else _CONTROL if apart else _NORMAL
        worst[kind] = min(score, worst.get(kind, score))
        packed = struct.pack("<BfBB", 0x15, score, 0x18, kind)
        found.append(_field(1, _field(1, piece.encode()) + packed))
    if _UNKNOWN not in worst or worst[_NORMAL] > min(worst.values()):
        raise CompileError(f"{name} has no unknown token, or a special one worth less than others")
    return {"model": b"".join([*found, _field(3, _field(2, rules))])}


def _field(number: int, content: bytes) -> bytes:
    """Return a field of a message of Protocol Buffers."""
    size, rest = b"", len(content)
    while rest > 0x7F:
        size, rest = size + bytes([rest & 0x7F | 0x80]), rest >> 7
    return bytes([number << 3 | 2]) + size + bytes([rest]) + content
