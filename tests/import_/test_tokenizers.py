"""Byte-level BPE and Unigram in the graph, against the library tokenizers that trained them."""

from __future__ import annotations

import json
import struct
import unicodedata
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Regex, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Library

import lrai_core as lrai
from lrai_core import CompileError
from lrai_core.engine.engine import find_engine
from lrai_import.described import load
from lrai_wheel.pins import extras_of
from tests.tiny_models import token_model

LENGTH = 24
CORPUS = [
    "The encoder reads the text, and the text's words are its tokens; they're cut.",
    "Les élèves ont déjà mangé à midi, où qu'ils fussent… « bien sûr » !",
    "Größe und Übermaß: die Straße führt über 12 Brücken, für 3,50 € je 100 km.",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "東京都は日本の首都です。価格は1200円。日本語の文章を読む。",
    "我们读了这本书,然后去了北京。文字的长度不同。",
    "한국어 문장은 단어 사이에 띄어쓰기를 한다.",
    "هذا نص عربي قصير، وفيه كلمات.",
    "यह हिंदी का एक वाक्य है। यह छोटा है।",
    "def f(x):\n\treturn x  # 2 spaces, a tab",
    "😀 emoji 👩‍👩‍👧 and 🇫🇷 flags 👍🏽 are here 😀😀",
]
TEXTS = [
    *CORPUS,
    "",
    " ",
    "\t \n",
    "  two  spaces,   three; and the end \n\n",
    "the\u00a0text\u3000and\u2009words\u2028here",
    "they're THEY'RE it's we'll 'tis I'd've",
    "x1y22z333 4½ ⅷ ٣٤ x²",
    "unseen: ☃ ☃☃ ጸ ꙮ ᚠᚢ \U0001d518\U0001d52b\U0001d526 𐍈",
    "cafe\u0301 déjà naïve Åström",
    "a" * 300,
    "the words of the text " * 200,
    "\u200bzero\u200dwidth\ufeff soft\u00adhyphen \ufffd",
    "\x01control\x7f\x1fs",
    "a\x0bb \x0c c\x85d\x0b\x0c",
    "SPECIAL xSPECIALx \\ \" ' ` ~ <s> <mask> [PAD] {} =",
]
ENDS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>", "SPECIAL")


def trained_pairs(ends: Any = None, *, spaced: bool = False, special: Sequence[str] = ENDS) -> Any:
    """Return byte-level BPE, trained on the corpus."""
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=spaced)
    library.post_processor = ends
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    library.train_from_iterator(
        CORPUS * 3,
        trainers.BpeTrainer(
            vocab_size=500,
            special_tokens=[*special],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    return library


def trained_pieces(normalizer: Any, splits: Any, ends: Any = None) -> Any:
    """Return Unigram, trained on the corpus."""
    library = Library(models.Unigram())
    library.normalizer = normalizer
    library.pre_tokenizer = splits
    library.post_processor = ends
    library.train_from_iterator(
        CORPUS * 3,
        trainers.UnigramTrainer(
            vocab_size=320, special_tokens=[*ENDS], unk_token="<unk>", show_progress=False
        ),
    )
    return library


def charsmap() -> bytes:
    """Return rules, much as nmt_nfkc has them, as SentencePiece keeps them: a double array."""
    rules = dict.fromkeys("\t\n\r\u00a0\u2009\u2028\u3000\u200b\ufeff", " ")
    rules |= dict.fromkeys("\x01\x0b\x1f\x7f\u00ad", "")
    for char in map(chr, [*range(0xA1, 0x180), *range(0x2070, 0x2200), *range(0xFF01, 0xFF5F)]):
        whole, parts = (unicodedata.normalize(form, char) for form in ("NFKC", "NFD"))
        rules |= {char: whole} if whole != char else {}
        rules |= {parts: char} if len(parts) == 2 else {}
    texts, keys = b"", dict[bytes, int]()
    for old, new in rules.items():
        keys[old.encode()] = len(texts)
        texts += new.encode() + b"\0"
    units, bases = {0: 0}, set[int]()

    def put(place: int, own: dict[bytes, int]) -> None:
        labels = sorted({key[0] if key else 0 for key in own})
        free = (b for b in count(1) if b not in bases)
        base = next(b for b in free if not any(b ^ label in units for label in labels))
        bases.add(base)
        units[place] |= (place ^ base) << 10 | (b"" in own) << 8
        units.update({base ^ label: label for label in labels})
        if b"" in own:
            units[base] = 1 << 31 | own[b""]
        for label in filter(None, labels):
            put(base ^ label, {key[1:]: at for key, at in own.items() if key[:1] == bytes([label])})

    put(0, keys)
    array = [units.get(at, 1 << 31) for at in range((max(bases) | 0xFF) + 1)]
    return struct.pack("<I", 4 * len(array)) + struct.pack(f"<{len(array)}I", *array) + texts


ROBERTA = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
BOTH = processors.TemplateProcessing(
    single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
)
LAST = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
METASPACE = pre_tokenizers.Metaspace()
WORDS = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), METASPACE])


def stripped(*before: Any) -> Any:
    strip, single = normalizers.Strip(left=False), normalizers.Replace(Regex(" {2,}"), "▁")
    return normalizers.Sequence([*before, strip, single])


KINDS = {
    "roberta": lambda: trained_pairs(ROBERTA),
    "spaced": lambda: trained_pairs(
        processors.Sequence([processors.ByteLevel(), BOTH]), spaced=True
    ),
    "gpt2": lambda: trained_pairs(processors.ByteLevel(), special=["<|endoftext|>"]),
    "xlm-r": lambda: trained_pieces(
        normalizers.Sequence(
            [normalizers.Precompiled(charsmap()), normalizers.Replace(Regex(" {2,}"), " ")]
        ),
        WORDS,
        BOTH,
    ),
    "t5": lambda: trained_pieces(normalizers.Precompiled(charsmap()), WORDS, LAST),
    "marian": lambda: trained_pieces(
        stripped(normalizers.Precompiled(charsmap())), METASPACE, LAST
    ),
    "plain": lambda: trained_pieces(None, WORDS),
    "stripped": lambda: trained_pieces(stripped(), METASPACE),
}


@pytest.fixture(params=KINDS, scope="module")
def library(request: pytest.FixtureRequest) -> Any:
    return KINDS[request.param]()


def ids_model(path: Path, rows: int) -> None:
    """Write a model of one length that gives what it gets, of a vocabulary of so many."""
    names = ("input_ids", "attention_mask")
    values = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", LENGTH]) for name in names
    ]
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", LENGTH])
        for name in ("ids", "mask")
    ]
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["ids"]),
        helper.make_node("Identity", ["attention_mask"], ["mask"]),
    ]
    table = numpy_helper.from_array(np.arange(rows), "table")
    graph = helper.make_graph(nodes, "ids", values, outputs, [table])
    domains = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=domains, ir_version=8), path)


def describe(folder: Path, library: str, *, most: int | None = 8192, rest: str = "") -> Path:
    (folder / "tokenizer.json").write_text(library)
    (folder / "served.toml").write_text(
        f"""
model = "model.onnx"
[preprocess.text]
tokenizer = "tokenizer.json"
mask = "attention_mask"
{f"max_length = {most}" if most else ""}
{rest}"""
    )
    return folder / "served.toml"


def run(description: Path, texts: Sequence[str]) -> list[Any]:
    file = description.with_name("whole.onnx")
    file.write_bytes(load(description, print).model.SerializeToString())
    return find_engine("onnxruntime").load(file).run([np.array(texts, np.object_)])


@pytest.mark.parametrize("most", [5, LENGTH])
def test_texts_become_the_ids_of_the_library(library: Any, tmp_path: Path, most: int) -> None:
    ids_model(tmp_path / "model.onnx", library.get_vocab_size())
    texts = [text for text in TEXTS if "<mask>" not in text]
    found = run(describe(tmp_path, library.to_str(), most=most), texts)
    blank = library.token_to_id("<pad>") or 0
    library.enable_truncation(most)
    library.enable_padding(pad_id=blank, length=LENGTH)
    right = library.encode_batch(texts)
    library.no_truncation()
    library.no_padding()
    for text, own, ids, mask in zip(texts, right, *found, strict=True):
        assert ids.tolist() == own.ids, text
        assert mask.tolist() == own.attention_mask, text


def test_a_mark_of_a_words_beginning_in_a_text_is_a_token_more_or_less(
    library: Any, tmp_path: Path
) -> None:
    """Where a word begins with it, or the text ends, and nowhere else: all other tokens stay."""
    ids_model(tmp_path / "model.onnx", library.get_vocab_size())
    mark = library.token_to_id("▁")
    same = ["a▁the", "the▁▁text of"]
    texts = [*same, "▁the", "a ▁the", "▁▁the", "the ▁ text", "▁", "the▁", "the ▁"]
    found = run(describe(tmp_path, library.to_str()), texts)
    for text, ids, mask in zip(texts, *found, strict=True):
        own, right = ids[mask == 1].tolist(), library.encode(text).ids
        if text in same or mark is None:
            assert own == right, text
        assert [i for i in own if i != mark] == [i for i in right if i != mark], text


def test_special_tokens_in_a_text_are_text(library: Any, tmp_path: Path) -> None:
    ids_model(tmp_path / "model.onnx", library.get_vocab_size())
    text = TEXTS[-1]
    (ids, _) = run(describe(tmp_path, library.to_str()), [text])
    tree = json.loads(library.to_str())
    tree["added_tokens"], tree["post_processor"] = [], None
    special = {token.content for token in library.get_added_tokens_decoder().values()}
    if tree["model"]["type"] == "Unigram":
        tree["model"]["vocab"] = [
            [f"\n{piece}" if piece in special else piece, score]
            for piece, score in tree["model"]["vocab"]
        ]
    right = Library.from_str(json.dumps(tree)).encode(text).ids[: LENGTH - 2]
    assert f" {' '.join(map(str, right))}" in f" {' '.join(map(str, ids[0]))} "


def embedding(folder: Path, rows: int) -> Path:
    """Write `token_model` with so many rows in its table."""
    model = onnx.load(token_model(folder / "model.onnx"))
    (table,) = (tensor for tensor in model.graph.initializer if tensor.name == "table")
    values = np.random.default_rng(0).normal(size=(rows, 4)).astype(np.float32)
    table.CopyFrom(numpy_helper.from_array(values, "table"))
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


POOLED = '[postprocess]\noutput = "tokens"\npool = "mean"\n'


def test_texts_are_served_by_what_is_compiled_of_them(library: Any, tmp_path: Path) -> None:
    model = embedding(tmp_path, library.get_vocab_size())
    description = describe(tmp_path, library.to_str(), most=LENGTH, rest=POOLED)
    texts = [text for text in TEXTS if "<mask>" not in text]
    artifact = lrai.compile(description, out=tmp_path / "m.lrai", threads=1)
    assert extras_of(artifact)["text"] == "onnxruntime-extensions"
    with lrai.Runtime() as runtime:
        runtime.load(artifact.path, name="m")
        request = lrai.InferenceRequest(
            model_name="m", inputs={"text": np.array(texts, np.object_)}
        )
        outputs = runtime.infer(request).outputs
    library.enable_truncation(LENGTH)
    library.enable_padding()
    found = library.encode_batch(texts)
    library.no_truncation()
    library.no_padding()
    ids, mask = (
        np.array([getattr(one, name) for one in found]) for name in ("ids", "attention_mask")
    )
    right, _ = find_engine("onnxruntime").load(model).run([ids, mask])
    there = mask.any(axis=1)
    for output in (outputs["mean"], outputs["tokens"]):
        np.testing.assert_allclose(output[there], right[there], rtol=1e-2, atol=1e-2)
    assert not outputs["tokens"][~there].any()


def test_a_text_alone_is_as_with_others(library: Any, tmp_path: Path) -> None:
    embedding(tmp_path, library.get_vocab_size())
    description = describe(tmp_path, library.to_str(), rest=POOLED)
    together = run(description, TEXTS)[1]
    session = find_engine("onnxruntime").load(description.with_name("whole.onnx"))
    for index, text in enumerate(TEXTS):
        alone = session.run([np.array([text], np.object_)])[1]
        np.testing.assert_allclose(alone[0], together[index], rtol=1e-4, atol=1e-6)


def test_a_smaller_table_is_refused(library: Any, tmp_path: Path) -> None:
    tokens = library.get_vocab_size()
    for rows in (tokens - 1, tokens + 1024):
        ids_model(tmp_path / "model.onnx", rows)
        with pytest.raises(CompileError, match=f"has {tokens} tokens, the model's table {rows}"):
            load(describe(tmp_path, library.to_str()), print)


def test_the_end_of_text_is_a_token_to_byte_pairs(tmp_path: Path) -> None:
    """Whatever the vocabulary: then it is one that there is."""
    for kind, right in (("gpt2", 0), ("roberta", 3)):
        library = KINDS[kind]()
        ids_model(tmp_path / "model.onnx", library.get_vocab_size())
        (ids, _) = run(describe(tmp_path, library.to_str()), ["<|endoftext|>"])
        assert ids[0, int(kind == "roberta")] == right


def test_files_of_old_do_not_say_what_they_are(tmp_path: Path) -> None:
    for kind in ("roberta", "t5"):
        library = KINDS[kind]()
        tree = json.loads(library.to_str())
        del tree["model"]["type"]
        if kind == "roberta":
            tree["model"]["merges"] = [" ".join(pair) for pair in tree["model"]["merges"]]
        ids_model(tmp_path / "model.onnx", len(tree["model"]["vocab"]))
        (ids, mask) = run(describe(tmp_path, json.dumps(tree)), CORPUS[:1])
        library.enable_truncation(LENGTH)
        assert ids[0][mask[0] == 1].tolist() == library.encode(CORPUS[0]).ids


def test_a_merge_that_looks_like_a_comment_is_none(tmp_path: Path) -> None:
    tree = json.loads(KINDS["gpt2"]().to_str())
    tree["model"]["merges"].insert(0, ["#", "#"])
    tree["model"]["vocab"]["##"] = len(tree["model"]["vocab"])
    ids_model(tmp_path / "model.onnx", len(tree["model"]["vocab"]))
    (ids, mask) = run(describe(tmp_path, json.dumps(tree)), ["a## ###"])
    assert ids[0][mask[0] == 1].tolist() == Library.from_str(json.dumps(tree)).encode("a## ###").ids


def test_a_text_without_any_token_has_a_first(tmp_path: Path) -> None:
    library = KINDS["gpt2"]()
    embedding(tmp_path, library.get_vocab_size())
    rest = POOLED.replace("mean", "first")
    (_, first) = run(describe(tmp_path, library.to_str(), rest=rest), [""])
    assert not first.any()


def test_a_padding_token_of_the_file_fills_rows(tmp_path: Path) -> None:
    library = KINDS["gpt2"]()
    library.enable_padding(pad_id=7)
    ids_model(tmp_path / "model.onnx", library.get_vocab_size())
    (ids, mask) = run(describe(tmp_path, library.to_str()), [""])
    assert set(ids[0].tolist()) == {7}
    assert not mask.any()


def test_a_tokenizer_that_cuts_or_fills_at_the_beginning_is_refused(tmp_path: Path) -> None:
    library = KINDS["gpt2"]()
    ids_model(tmp_path / "model.onnx", library.get_vocab_size())
    library.enable_truncation(8, direction="left")
    with pytest.raises(CompileError, match="cuts long texts at their beginning"):
        load(describe(tmp_path, library.to_str()), print)
    library.no_truncation()
    library.enable_padding(direction="left")
    with pytest.raises(CompileError, match="fills short texts at their beginning"):
        load(describe(tmp_path, library.to_str()), print)


@pytest.mark.parametrize(("own", "most"), [(7, 7), (None, 512), (100_000, 8192)])
def test_texts_are_cut_where_the_file_says_if_nobody_else_does(
    tmp_path: Path, own: int | None, most: int
) -> None:
    library = KINDS["roberta"]()
    embedding(tmp_path, library.get_vocab_size())
    if own:
        library.enable_truncation(own)
    default, same, other = (
        load(describe(tmp_path, library.to_str(), most=asked, rest=POOLED), print).model
        for asked in (None, most, most - 1)
    )
    assert default == same
    assert default != other


def changed(tree: dict[str, Any], path: str, value: Any) -> str:
    *parents, last = (int(key) if key.isdigit() else key for key in path.split("."))
    own: Any = tree
    for parent in parents:
        own = own[parent]
    own[last] = value
    return json.dumps(tree)


NFC = {"type": "NFC"}
DIGITS = {"type": "Digits", "individual_digits": True}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
WORD = {"id": 500, "content": "whole", "special": False}


@pytest.mark.parametrize(
    ("kind", "path", "value", "says"),
    [
        ("roberta", "normalizer", NFC, "is BPE after NFC and ByteLevel; what can be part"),
        ("roberta", "pre_tokenizer", DIGITS, "is BPE after None and Digits; what"),
        (
            "roberta",
            "pre_tokenizer",
            {"type": "Sequence", "pretokenizers": [DIGITS, BYTES]},
            "is BPE after None and Digits, ByteLevel; what",
        ),
        (
            "roberta",
            "pre_tokenizer",
            BYTES | {"use_regex": False},
            "use_regex of ByteLevel is False",
        ),
        ("roberta", "model.dropout", 0.1, "dropout of BPE is 0.1, needed is None or 0"),
        ("roberta", "model.byte_fallback", True, "byte_fallback of BPE is True"),
        ("roberta", "model.end_of_word_suffix", "</w>", "end_of_word_suffix of BPE is '</w>'"),
        (
            "roberta",
            "model.merges",
            [["the", "se"]],
            "merges 'the' and 'se' before there are such tokens",
        ),
        ("roberta", "model.vocab", {"a": 0}, 'no !, ", #'),
        ("roberta", "added_tokens.0", WORD, "adds 'whole', not in its vocabulary or not special"),
        (
            "roberta",
            "post_processor",
            {"type": "Other"},
            "once between tokens: it has the post-processor",
        ),
        ("roberta", "post_processor.sep", ["</s>", 9_999], "a special token is none of its 500"),
        ("t5", "normalizer", NFC, "is Unigram after NFC and WhitespaceSplit, Metaspace; what"),
        ("t5", "pre_tokenizer", {"type": "Metaspace", "replacement": "▁"}, "and Metaspace; what"),
        ("t5", "pre_tokenizer", {"type": "WhitespaceSplit"}, "and WhitespaceSplit; what can be"),
        (
            "marian",
            "pre_tokenizer.prepend_scheme",
            "first",
            "prepend_scheme of Metaspace is 'first'",
        ),
        (
            "marian",
            "pre_tokenizer.replacement",
            "_",
            "replacement of Metaspace is '_', needed is '▁'",
        ),
        *(
            (kind, f"{place}.add_prefix_space", False, "add_prefix_space of Metaspace is False")
            for kind, place in (
                ("marian", "pre_tokenizer"),
                ("t5", "pre_tokenizer.pretokenizers.1"),
            )
        ),
        ("t5", "model.byte_fallback", True, "byte_fallback of Unigram is True"),
        ("t5", "model.unk_id", None, "has no unknown token"),
        ("t5", "model.vocab", [["<unk>", 0.0], ["a", -1.0]], "no ▁ in its vocabulary"),
        ("plain", "model.vocab", [["▁", 0.0], ["▁", 0.0]], "ids with a gap"),
        ("plain", "model.vocab.5", ["a", -1e300], "is no tokenizer.json"),
        ("plain", "model.vocab.1", ["<pad>", -99.0], "or a special one worth less than others"),
        ("roberta", "added_tokens.0.content", "\ud800", "is no tokenizer.json"),
    ],
)
def test_what_no_operator_does_is_refused(
    tmp_path: Path, kind: str, path: str, value: Any, says: str
) -> None:
    tree = json.loads(KINDS[kind]().to_str())
    ids_model(tmp_path / "model.onnx", 500)
    with pytest.raises(CompileError) as raised:
        load(describe(tmp_path, changed(tree, path, value)), print)
    assert says in str(raised.value)


def test_a_token_that_merges_do_not_make_is_refused(tmp_path: Path) -> None:
    """The operator would look it up before it merges."""
    tree = json.loads(KINDS["roberta"]().to_str())
    vocabulary = tree["model"]["vocab"]
    tree["model"]["merges"] += [["q", "z"], ["z", "k"], ["q", "zk"]]
    vocabulary |= {word: len(vocabulary) + at for at, word in enumerate(("qz", "zk", "qzk"))}
    ids_model(tmp_path / "model.onnx", len(vocabulary))
    with pytest.raises(CompileError, match="has the token 'qzk', which no text becomes"):
        load(describe(tmp_path, json.dumps(tree)), print)
    tree["model"]["ignore_merges"] = True
    (ids, mask) = run(describe(tmp_path, json.dumps(tree)), ["qzk"])
    right = Library.from_str(json.dumps(tree)).encode("qzk").ids
    assert ids[0][mask[0] == 1].tolist() == right
