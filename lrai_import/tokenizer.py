"""A tokenizer's file, as attributes of the operator that onnxruntime-extensions has for it."""

from __future__ import annotations

import json
from typing import Any, Final, NamedTuple

from lrai_core import CompileError

_SPECIAL: Final = {
    f"{name}_token": f"[{name.upper()}]" for name in ("unk", "sep", "cls", "pad", "mask")
}
_PIECES: Final = "##"


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
            model, normalizer = tree["model"], tree["normalizer"] or {}
            kind = f"{model.get('type')} after {normalizer.get('type')}"
            vocabulary = [
                word for word, _ in sorted(model["vocab"].items(), key=lambda item: item[1])
            ]
            ids = sorted(model["vocab"].values())
            lower = normalizer.get("lowercase")
            strip = normalizer.get("strip_accents")
        except (ValueError, LookupError, TypeError, AttributeError):
            raise CompileError(f"{name} is no tokenizer.json of the library tokenizers") from None
        if kind != "WordPiece after BertNormalizer":
            known = "WordPiece after BertNormalizer"
            raise CompileError(f"{name} is {kind[:120]}; what can be part of a graph is {known}")
        if model.get("continuing_subword_prefix", _PIECES) != _PIECES:
            raise CompileError(f"{name} marks pieces of words by something else than {_PIECES}")
        if ids != list(range(len(ids))) or not {*_SPECIAL.values()} <= {*vocabulary}:
            missing = ", ".join(_SPECIAL.values())
            raise CompileError(f"{name}: ids with a gap, or no {missing} in its vocabulary")
        if any("\n" in word for word in vocabulary):
            raise CompileError(f"{name}: a word of its vocabulary has a line break")
        attributes: dict[str, Any] = {
            "vocab_file": "\n".join(vocabulary),
            "do_lower_case": int(bool(lower)),
            "strip_accents": int(bool(lower if strip is None else strip)),
            "tokenize_chinese_chars": int(bool(normalizer.get("handle_chinese_chars", True))),
            **_SPECIAL,
        }
        return cls(vocabulary, attributes)
