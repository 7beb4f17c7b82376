"""Text and pixels in, labels out: what is put around a model, against tokenizers and Pillow."""

from __future__ import annotations

import json
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tokenizers
from onnx import helper
from PIL import Image

import lrai_core as lrai
from lrai_core import CompileError
from lrai_core.engine.engine import find_engine
from lrai_core.errors import EngineError
from lrai_import.described import load
from lrai_report.compare import measure_of
from lrai_report.page import page
from tests.core.compiler import onnx_files
from tests.tiny_models import WORDS, picture_model, text_model, token_model, tokenizer

TEXT = '\n[preprocess.text]\ntokenizer = "tokenizer.json"\nmask = "attention_mask"\n'
PIXELS = '\n[preprocess.photo]\ninput = "image"\n'


def run(description: Path, tmp_path: Path, *inputs: Any) -> list[Any]:
    file = tmp_path / "whole.onnx"
    file.write_bytes(load(description, print).model.SerializeToString())
    return find_engine("onnxruntime").load(file).run(inputs)


def describe(folder: Path, model: str, rest: str) -> Path:
    file = folder / "described.toml"
    file.write_text(f'model = "{model}"\n{rest}')
    return file


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """Return a folder with a model of pictures, `image` [batch, 3, 8, 8], and its labels."""
    picture_model(tmp_path / "model.onnx")
    return tmp_path


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Return a folder with an encoder of tokens, and a tokenizer."""
    text_model(tmp_path / "model.onnx")
    return tmp_path


@pytest.mark.parametrize("lower", [True, False])
def test_texts_become_the_tokens_of_the_library(text: Path, lower: bool) -> None:
    texts = [
        "",
        "价：1！a",  # noqa: RUF001 - punctuation of other scripts, as the next ones
        "है। a",
        "a،b؟c",
        "ア・イ",
        "a—b “the thing”… ¿x? «y»",
        "a\u2028b\ufeffc the\u00adre x\u200dy",
        "a\x01b\x85c",
        "z\u3000x",
        "x" * 200,
        "one\ttwo\nthree",
        "日本 a",
        "a " * 50,
        "x" * 90,
    ]
    texts += ["y" * length for length in range(10, 20)]  # as long as may be, and a little longer
    if lower:
        texts += ["The THING is, a café!", "é", "cafe\u0301 the\ufe0f", "θЯ θθ a"]
    words = [*WORDS, *"价1：！।،؟・—“”…¿«»θя", "##1", "##：", "##।", "##θ", "##я"]  # noqa: RUF001
    own = tokenizer(words)
    own["normalizer"]["lowercase"] = lower  # type: ignore[index]
    (text / "tokenizer.json").write_text(json.dumps(own))
    library = tokenizers.Tokenizer.from_str(json.dumps(own))
    library.enable_truncation(16)
    library.enable_padding()
    found = library.encode_batch(texts)
    model = onnx.load(text / "model.onnx")
    session = find_engine("onnxruntime").load(text / "model.onnx")
    ids, mask = (
        np.array([getattr(one, name) for one in found]) for name in ("ids", "attention_mask")
    )
    assert len(model.graph.input) == 2
    right, _ = session.run([ids, mask])
    for output in run(text / "model.toml", text, np.array(texts, np.object_)):
        np.testing.assert_allclose(output, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("height", "width"), [(61, 40), (9, 33), (8, 8), (100, 1_000)])
def test_pixels_are_resized_as_pillow_does_it(
    picture: Path, how: str, height: int, width: int
) -> None:
    graph = onnx.load(picture / "model.onnx")
    graph.graph.output.extend([onnx.ValueInfoProto(name="image")])
    onnx.save(graph, picture / "model.onnx")
    rest = f'{PIXELS}resize = 10\ncrop = [8, 8]\nscale = 1\ninterpolation = "{how}"\n'
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
    graph.graph.output[1].CopyFrom(
        onnx.helper.make_tensor_value_info("image", 1, ["batch", 3, 8, 8])
    )
    onnx.save(graph, picture / "model.onnx")
    file = describe(picture, "model.onnx", rest)
    whole = load(file, print).model
    path = picture / "whole.onnx"
    path.write_bytes(whole.SerializeToString())
    _, got = find_engine("onnxruntime").load(path).run([pixels[np.newaxis]])
    sides = [side * 10 // min(height, width) for side in (width, height)]
    resample = Image.Resampling[how.upper()]
    small = Image.fromarray(pixels).resize((sides[0], sides[1]), resample)
    left, top = (round((side - 8) / 2) for side in sides)
    right = np.asarray(small.crop((left, top, left + 8, top + 8)), np.float32)
    assert np.abs(got[0].transpose(1, 2, 0) - right).max() <= 1, "a level of 255"


def test_two_pictures_may_be_of_different_sizes(tmp_path: Path) -> None:
    nodes, ends = list[onnx.NodeProto](), list[onnx.ValueInfoProto]()
    for name in "ab":
        ends.append(helper.make_tensor_value_info(name, 1, ["batch", 3, None, None]))
        nodes += [
            helper.make_node("Relu", [name], [f"{name}.plain"]),
            helper.make_node("Exp", [f"{name}.plain"], [f"{name}.large"]),  # in memory of others
            helper.make_node("GlobalAveragePool", [f"{name}.large"], [f"{name}.mean"]),
        ]
    nodes += [helper.make_node("Sub", ["a.mean", "b.mean"], ["difference"])]
    nodes += [helper.make_node("Flatten", ["difference"], ["scores"])]
    scores = helper.make_tensor_value_info("scores", 1, ["batch", 3])
    graph = helper.make_graph(nodes, "pictures", ends, [scores])
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "model.onnx")
    photos = "".join(f'[preprocess.photo_{name}]\ninput = "{name}"\n' for name in "ab")
    sizes = [(40, 50), (5, 6)]
    for one, other in (sizes, sizes[::-1]):
        pixels = [
            np.full((2, *size, 3), 255 * at, np.uint8) for at, size in enumerate((one, other))
        ]
        found = run(describe(tmp_path, "model.onnx", photos), tmp_path, *pixels)
        np.testing.assert_allclose(found[0], 1 - np.e, rtol=1e-4)


def test_the_border_of_a_picture_is_resized_as_pillow_does_it(picture: Path) -> None:
    graph = onnx.load(picture / "model.onnx")
    image = onnx.helper.make_tensor_value_info("image", 1, ["batch", 3, 8, 8])
    graph.graph.output.extend([image])
    onnx.save(graph, picture / "model.onnx")
    file = describe(picture, "model.onnx", f"{PIXELS}resize = [8, 8]\nscale = 1\n")
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    _, got = run(file, picture, pixels[np.newaxis])
    small = Image.fromarray(pixels).resize((8, 8), Image.Resampling.BILINEAR)
    right = np.asarray(small, np.float32)
    assert np.abs(got[0].transpose(1, 2, 0) - right).max() <= 1, "a level of 255"


def test_the_whole_is_compiled_gated_and_served(picture: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (400, 12, 12, 3), np.uint8)
    artifact = lrai.compile(
        picture / "model.toml", out=picture / "m.lrai", evaluation={"photo": pixels}, threads=1
    )
    assert [spec.datatype for spec in artifact.manifest.signature.inputs] == ["UINT8"]
    maps = {spec.name: spec.output_map for spec in artifact.manifest.signature.outputs}
    assert maps == {"scores": "raw", "label": "raw", "score": "derived"}
    assert measure_of(artifact) == "relative error <= 1 %"
    assert "--output-map" not in page(artifact)
    with lrai.Runtime() as runtime:
        runtime.load(artifact.path, name="m")
        request = lrai.InferenceRequest(model_name="m", inputs={"photo": pixels[:5]})
        outputs = runtime.infer(request).outputs
    best = np.argsort(-outputs["scores"])[:, :2]
    labels = np.array(["red", "green", "bleu céleste"], np.object_)
    assert np.array_equal(outputs["label"], labels[best])
    assert np.allclose(outputs["scores"].sum(axis=1), 1)
    # three means of the pixels, before the softmax: those of the first channel come first
    assert np.allclose(np.take_along_axis(outputs["scores"], best, 1), outputs["score"])


def test_channels_and_layouts_are_the_models(picture: Path) -> None:
    pixels = np.zeros((1, 8, 8, 3), np.uint8)
    pixels[..., 0] = 255
    (plain,) = run(describe(picture, "model.onnx", PIXELS), picture, pixels)
    (turned,) = run(describe(picture, "model.onnx", f'{PIXELS}channels = "BGR"\n'), picture, pixels)
    assert plain[0].tolist() == [1, 0, 0]
    assert turned[0].tolist() == [0, 0, 1]


def test_a_vector_is_made_one_of_length_one(text: Path) -> None:
    rest = f'{TEXT}[postprocess]\noutput = "tokens"\npool = "first"\nmap = "l2_normalised"\n'
    _, first = run(describe(text, "model.onnx", rest), text, np.array(["a", "the b"], np.object_))
    assert first.shape == (2, 4)
    assert np.allclose(np.linalg.norm(first, axis=1), 1)
    assert np.allclose(first[0], first[1], atol=1e-6), "the first token is always the same"


@pytest.mark.parametrize(
    ("rest", "says"),
    [
        ("[preprocess.photo]\ninput = 'picture'", "no input 'picture': image"),
        (f"{PIXELS}size = 3", "unknown field `size`"),
        (f"{PIXELS}resize = 0\ncrop = [8, 8]", "resize is 0"),
        (f"{PIXELS}resize = [9, 9, 9]", "resize is [9, 9, 9]"),
        (f"{PIXELS}resize = 9", "a shorter side needs crop"),
        (f"{PIXELS}resize = 9\ncrop = [9, 9]", "gives [9, 9], the model wants [8, 8]"),
        (f"{PIXELS}resize = 7\ncrop = [8, 8]", "crop [8, 8] exceeds [7, 7]"),
        (f"{PIXELS}mean = [1, 2]", "mean has 2 numbers for 3 channels"),
        (f"{PIXELS}std = [0]", "> 0"),
        (f"{PIXELS}layout = 'NHWC'", "8 channels in the layout NHWC"),
        ("[postprocess]\nlabels = 'two.txt'", "2 labels are given, and output 'scores' has shape"),
        ("[postprocess]\nlabels = 'labels.txt'\ntop_k = 4", "top_k is 4, of 3 labels"),
        ("[postprocess]\nlabels = '../labels.txt'", "lies outside the folder"),
        ("[postprocess]\nlabels = 'none.txt'", "'none.txt' is not a file"),
        ("[postprocess]\nlabels = 'latin.txt'", "is not UTF-8"),
        ("[postprocess]\nlabels = 'empty.txt'", "is empty"),
        ("[postprocess]\nlabels = 'loop.txt'", "is not a file"),
        ("[postprocess]\nlabels = 'a\\u0000'", "is not a file"),
        ('[postprocess]\nlabels = "a\\u0000"', "is not a file"),
        ("[postprocess]\ntop_k = 2", "top_k is of labels, and there are none"),
        ("x = " + "[" * 5_000, "is not TOML"),
        ("x = " + "9" * 5_000, "is not TOML"),
        ("[postprocess]\noutput = 'logits'", "'logits' is none of the model's: scores"),
        ("[postprocess]\npool = 'mean'", "no output [batch, length, width] of one text"),
        ("signature = 'less'", "signature is of a SavedModel, and the model is a file"),
        ("preprocess = 3", "described.toml"),
        ("[postprocess", "is not TOML"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(picture: Path, rest: str, says: str) -> None:
    (picture / "two.txt").write_text("a\nb\n")
    (picture / "latin.txt").write_bytes("é".encode("latin-1"))
    (picture / "empty.txt").touch()
    (picture / "loop.txt").symlink_to("loop.txt")
    with pytest.raises(CompileError, match=re.escape(says)) as raised:
        load(describe(picture, "model.onnx", rest), print)
    assert str(picture) not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"[1", "no tokenizer.json"),
        (b"{}", "no tokenizer.json"),
        (b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02", "no tokenizer.json"),  # a .model
        (tokenizer(WORDS, normalizer=None), "WordPiece after None"),
        (tokenizer(WORDS, model={"type": "BPE", "vocab": {}}), "is BPE after BertNormalizer"),
        (tokenizer([*WORDS, *map(str, range(60))]), f"has {len(WORDS) + 60} tokens"),
        (tokenizer(WORDS[1:]), "no [UNK], [SEP], [CLS], [PAD], [MASK]"),
        (tokenizer([*WORDS, "a\nb"]), "a line break"),
        (tokenizer([*WORDS, ""]), "is empty or"),
        (tokenizer(WORDS, pre_tokenizer={"type": "Whitespace"}), "and Whitespace"),
        (tokenizer(WORDS, post_processor=None), "[SEP]: it has A"),
        (
            tokenizer(
                WORDS,
                post_processor={"type": "RobertaProcessing", "cls": ["<s>", 0], "sep": ["</s>", 2]},
            ),
            "between [CLS] and [SEP]: it has <s>, A, </s>",
        ),
        (
            tokenizer(
                WORDS,
                normalizer={"type": "Precompiled"},
                pre_tokenizer={"type": "Metaspace"},
                model={"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.5]]},
                post_processor={"type": "TemplateProcessing", "single": []},
            ),
            "is Unigram after Precompiled and Metaspace; what can be part of a graph is WordPiece",
        ),
        (tokenizer(WORDS, added_tokens=[{"content": "[X]"}]), "adds '[X]', not in its"),
        (
            tokenizer(WORDS, added_tokens=[{"content": WORDS[-1], "special": False}]),
            f"adds {WORDS[-1]!r}, not in its vocabulary or not special",  # found whole, also within
        ),
        (b"[" * 5_000, "no tokenizer.json"),
    ],
)
def test_a_tokenizer_that_does_not_match_is_refused(
    text: Path, content: bytes | dict[str, object], says: str
) -> None:
    encoded = content if isinstance(content, bytes) else json.dumps(content).encode()
    (text / "tokenizer.json").write_bytes(encoded)
    with pytest.raises(CompileError, match=re.escape(says)):
        load(text / "model.toml", print)


def test_the_ends_may_be_put_as_bert_has_them(text: Path) -> None:
    ends = {
        name: [f"[{name.upper()}]", WORDS.index(f"[{name.upper()}]")] for name in ("sep", "cls")
    }
    own = tokenizer(WORDS, post_processor={"type": "BertProcessing"} | ends)
    found = []
    for one in (tokenizer(WORDS), own):
        tokenizers.Tokenizer.from_str(json.dumps(one))  # the library takes both
        (text / "tokenizer.json").write_text(json.dumps(one))
        found.append(run(text / "model.toml", text, np.array(["the thing is a"], np.object_))[0])
    np.testing.assert_array_equal(*found)


def test_an_output_of_tokens_has_to_be_pooled(text: Path) -> None:
    with pytest.raises(CompileError, match="'tokens' has an element for each token"):
        load(describe(text, "model.onnx", TEXT), print)


def test_an_input_of_tokens_is_not_one_of_pixels(text: Path) -> None:
    rest = '[preprocess.photo]\ninput = "input_ids"\n'
    with pytest.raises(CompileError, match="INT64 of rank 2, needed is FLOAT of rank 4"):
        load(describe(text, "model.onnx", rest), print)


def test_an_input_of_tokens_has_to_be_named(text: Path) -> None:
    rest = TEXT.replace('mask = "attention_mask"\n', "")
    rest += '[postprocess]\noutput = "tokens"\npool = "mean"\n'
    with pytest.raises(CompileError, match="'attention_mask' wants an element for each token"):
        load(describe(text, "model.onnx", rest), print)


def test_an_encoder_of_one_length_gets_that_length(text: Path) -> None:
    model = onnx.load(text / "model.onnx")
    for value in (*model.graph.input, *model.graph.output[1:]):
        value.type.tensor_type.shape.dim[1].dim_value = 12
    onnx.save(model, text / "fixed.onnx")
    (got, _) = run(describe(text, "fixed.onnx", TEXT), text, np.array(["a", "b " * 50], np.object_))
    (right, _) = run(text / "model.toml", text, np.array(["a"], np.object_))
    assert np.allclose(got[0], right[0], atol=1e-6)


def test_a_picture_that_is_smaller_than_the_crop_is_refused(picture: Path) -> None:
    model = onnx.load(picture / "model.onnx")
    for index in (2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[index].dim_param = f"side{index}"
    onnx.save(model, picture / "free.onnx")
    file = describe(picture, "free.onnx", f"{PIXELS}crop = [8, 8]\n")
    assert run(file, picture, np.ones((1, 9, 8, 3), np.uint8))[0].shape == (1, 3)
    with pytest.raises(EngineError, match=r"[Rr]eshape"):
        run(file, picture, np.ones((1, 9, 4, 3), np.uint8))


def test_a_sliver_takes_no_gigabytes(picture: Path) -> None:
    file = describe(picture, "model.onnx", f"{PIXELS}resize = 256\ncrop = [8, 8]\n")
    (scores,) = run(file, picture, np.full((1, 1, 100_000, 3), 255, np.uint8))
    assert np.allclose(scores, 1)


def test_a_model_of_an_old_format_is_taken(picture: Path) -> None:
    model = onnx.load(picture / "model.onnx")
    model.ir_version = 3
    onnx.save(model, picture / "old.onnx")
    file = describe(picture, "old.onnx", f"{PIXELS}resize = [8, 8]\n")
    assert run(file, picture, np.ones((1, 9, 9, 3), np.uint8))[0].shape == (1, 3)


def test_an_artifact_that_takes_text_can_be_compiled_again(text: Path) -> None:
    first = lrai.compile(text / "model.toml", out=text / "a.lrai", threads=1)
    again = first.path / first.manifest.source.file
    assert lrai.compile(again, out=text / "b.lrai", threads=1).manifest.signature == (
        first.manifest.signature
    )


def test_a_table_of_far_more_rows_is_another_tokenizers(text: Path) -> None:
    """As of a cased vocabulary beside an uncased model: no gate would see it."""
    graph = onnx.load(text / "model.onnx")
    (table,) = (tensor for tensor in graph.graph.initializer if tensor.name == "table")
    for count, passes in ((1023, True), (1024, False)):
        rows = np.zeros((len(WORDS) + count, 4), np.float32)
        table.CopyFrom(onnx.numpy_helper.from_array(rows, "table"))
        onnx.save(graph, text / "model.onnx")
        words = f"has {len(WORDS)} tokens, the model's table {len(rows)}"
        with nullcontext() if passes else pytest.raises(CompileError, match=words):
            load(text / "model.toml", print)


def test_a_name_that_is_taken_is_refused(tmp_path: Path) -> None:
    text_model(tmp_path / "model.onnx")
    rest = TEXT.replace("preprocess.text", "preprocess.tokens")
    with pytest.raises(CompileError, match="something of that name"):
        load(describe(tmp_path, "model.onnx", rest), print)


def test_the_hash_is_of_all_that_is_named(picture: Path) -> None:
    before = load(picture / "model.toml", print).sha256
    (picture / "labels.txt").write_text("a\nb\nc\n")
    assert load(picture / "model.toml", print).sha256 != before


def test_what_a_file_says_of_itself_is_said_of_the_file(picture: Path) -> None:
    graph, notes = onnx.load(picture / "model.onnx"), list[str]()
    helper.set_model_props(graph, {"lrai.note": "fused: a.onnx b.onnx;\n3 of 9" + "." * 9_000})
    onnx.save(graph, picture / "model.onnx")
    made = load(describe(picture, "model.onnx", PIXELS), notes.append).model
    assert [note[:48] for note in notes] == ["model.onnx: fused: a.onnx b.onnx;3 of 9" + "." * 9]
    assert len(notes[0]) < 2_100
    assert not made.metadata_props


def test_a_label_for_each_class_is_needed_where_their_number_is_free(picture: Path) -> None:
    graph = onnx.load(picture / "model.onnx")
    graph.graph.output[0].type.tensor_type.shape.dim[1].dim_param = "classes"
    onnx.save(graph, picture / "model.onnx")
    (picture / "two.txt").write_text("a\nb\n")
    (picture / "three.txt").write_text("a\nb\nc\n")
    pixels = np.zeros((1, 8, 8, 3), np.uint8)
    for name, passes in (("three.txt", True), ("two.txt", False)):
        file = describe(picture, "model.onnx", f"{PIXELS}[postprocess]\nlabels = '{name}'\n")
        with nullcontext() if passes else pytest.raises(EngineError):
            assert run(file, picture, pixels)[1].shape == (1, 1)


@pytest.mark.parametrize("shape", [(1, 0, 8, 3), (1, 8, 0, 3), (1, 0, 0, 3)])
def test_a_picture_of_nothing_is_refused(picture: Path, shape: tuple[int, ...]) -> None:
    file = describe(picture, "model.onnx", f"{PIXELS}resize = 10\ncrop = [8, 8]\n")
    with pytest.raises(EngineError):
        run(file, picture, np.zeros(shape, np.uint8))


def test_a_file_that_is_too_large_is_not_read(picture: Path) -> None:
    with (picture / "labels.txt").open("wb") as file:
        file.truncate(65 << 20)
    with pytest.raises(CompileError, match="over 64 MB"):
        load(picture / "model.toml", print)


def test_what_is_not_described_stays(tmp_path: Path) -> None:
    token_model(tmp_path / "model.onnx")
    model = load(describe(tmp_path, "model.onnx", ""), print).model
    assert [value.name for value in model.graph.input] == ["input_ids", "attention_mask"]


def look_up(folder: Path, tables: int, rows: int) -> Path:
    """Write a description of a model that looks the brightest channel up in tables.

    They are `tables.bin`, the same one for all.
    """
    weights = []
    for index in range(tables):
        weight = onnx.TensorProto(
            name=f"t{index}", data_type=onnx.TensorProto.FLOAT, dims=[rows, 64],
            data_location=onnx.TensorProto.EXTERNAL,
        )  # fmt: skip
        weight.external_data.add(key="location", value="tables.bin")
        weights.append(weight)
    nodes = [
        helper.make_node("GlobalAveragePool", ["image"], ["means"]),
        helper.make_node("Flatten", ["means"], ["scores"]),
        helper.make_node("ArgMax", ["scores"], ["best"], axis=1, keepdims=0),
        *(helper.make_node("Gather", [f"t{i}", "best"], [f"g{i}"]) for i in range(tables)),
        helper.make_node("Sum", [f"g{i}" for i in range(tables)], ["y"]),
    ]
    inputs = [onnx_files.value("image", ["batch", 3, 8, 8])]
    outputs = [onnx_files.value("scores", ["batch", 3]), onnx_files.value("y", ["batch", 64])]
    made = onnx_files.model(nodes, inputs, outputs, weights)
    onnx_files.save(made, folder / "model.onnx")
    rest = f"{PIXELS}resize = [8, 8]\n[postprocess]\nmap = 'softmax'\n"
    return describe(folder, "model.onnx", rest)


def test_large_weights_stay_what_they_are(tmp_path: Path) -> None:
    """Converter and checker do not see them, whatever comes around them."""
    table = np.random.default_rng(0).standard_normal((1024, 64)).astype(np.float32)
    (tmp_path / "tables.bin").write_bytes(table.tobytes())
    pixels = np.zeros((3, 8, 8, 3), np.uint8)
    pixels[range(3), ..., [2, 0, 1]] = 255
    scores, found = run(look_up(tmp_path, 2, 1024), tmp_path, pixels)
    assert np.allclose(scores.sum(axis=1), 1)
    np.testing.assert_array_equal(found, 2 * table[[2, 0, 1]])


@pytest.mark.timeout(300)  # it is read four times
def test_a_model_of_over_2_gb_is_described_as_another(tmp_path: Path) -> None:
    """Eight tables of 256 MB, which share one sparse file."""
    with (tmp_path / "tables.bin").open("wb") as stream:
        stream.truncate(1 << 28)
    found = load(look_up(tmp_path, 8, 1 << 20), print)
    assert found.opset == 18  # for the sake of resizing
    assert [one.name for one in found.model.graph.input] == ["photo"]
    assert sum(len(one.raw_data) for one in found.model.graph.initializer) > (2 << 30) - 1
