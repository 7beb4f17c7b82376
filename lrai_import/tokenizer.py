"""A tokenizer's file, as attributes of the operator that onnxruntime-extensions has for it."""

from __future__ import annotations

import json
from typing import Any, Final, NamedTuple

from lrai_core import CompileError

_SPECIAL: Final = {
    f"{name}_token": f"[{name.upper()}]" for name in ("unk", "sep", "cls", "pad", "mask")
}
_PIECES: Final = "##"
_LONGEST: Final = 100  # characters of a word that is looked up


class Tokenizer(NamedTuple):
    """WordPiece with BERT's normaliser.

    Attributes:
        vocabulary: In the order of ids.
        attributes: Of the operator BertTokenizer.
    """

    vocabulary: list[str]
    attributes: dict[str, Any]

    @classmethod
    def of(cls, content: bytes, name: str) -> Tokenizer:
        """Return what a `tokenizer.json` holds.

        Raises:
            CompileError: It is none, or not WordPiece as BERT has it.
        """
        try:
            tree = json.loads(content)
            model, normalizer = tree["model"], tree.get("normalizer") or {}
            kind = f"{model.get('type')} after {normalizer.get('type')}"
            splits = (tree.get("pre_tokenizer") or {}).get("type")
            if kind != "WordPiece after BertNormalizer" or splits != "BertPreTokenizer":
                known = "WordPiece after BertNormalizer and BertPreTokenizer"
                got = f"{kind[:120]} and {str(splits)[:60]}"
                raise CompileError(f"{name} is {got}; what can be part of a graph is {known}")
            vocabulary = [
                word for word, _ in sorted(model["vocab"].items(), key=lambda item: item[1])
            ]
            ids = sorted(model["vocab"].values())
            lower = normalizer.get("lowercase")
            strip = normalizer.get("strip_accents")
            ends = _ends(tree.get("post_processor") or {})
            added = {str(token["content"]) for token in tree.get("added_tokens") or ()}
            "".join(vocabulary).encode()
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise CompileError(f"{name} is no tokenizer.json of the library tokenizers") from None
        if model.get("continuing_subword_prefix", _PIECES) != _PIECES:
            raise CompileError(f"{name} marks pieces of words by something else than {_PIECES}")
        if ids != list(range(len(ids))) or not {*_SPECIAL.values()} <= {*vocabulary}:
            missing = ", ".join(_SPECIAL.values())
            raise CompileError(f"{name}: ids with a gap, or no {missing} in its vocabulary")
        if any({"\n", "\r"} & {*word} or not word for word in vocabulary):
            raise CompileError(f"{name}: a word of its vocabulary is empty or has a line break")
        if ends != ["[CLS]", "A", "[SEP]"]:
            got = ", ".join(ends)[:120]
            raise CompileError(f"{name} does not put a text between [CLS] and [SEP]: it has {got}")
        if unknown := added - set(vocabulary):
            raise CompileError(f"{name} adds {min(unknown)[:60]!r}, not in its vocabulary")
        if model.get("unk_token", "[UNK]") != "[UNK]" or not normalizer.get("clean_text", True):
            raise CompileError(f"{name} has another unknown token, or does not clean texts")
        if model.get("max_input_chars_per_word", _LONGEST) != _LONGEST:
            raise CompileError(f"{name}: words have more or fewer than {_LONGEST} characters")
        attributes: dict[str, Any] = {
            "vocab_file": "\n".join(vocabulary),
            "do_lower_case": int(bool(lower)),
            "strip_accents": int(bool(lower if strip is None else strip)),
            "tokenize_chinese_chars": int(bool(normalizer.get("handle_chinese_chars", True))),
            **_SPECIAL,
        }
        return cls(vocabulary, attributes)


def _ends(processor: dict[str, Any]) -> list[str]:
    """Return what is put around a text, A; what does it where that is not told of each part."""
    if (kind := processor.get("type")) == "BertProcessing":
        return [str(processor["cls"][0]), "A", str(processor["sep"][0])]
    if kind != "TemplateProcessing":
        return [f"the post-processor {kind}"]
    return [str(found["id"]) for part in processor["single"] for found in part.values()]
