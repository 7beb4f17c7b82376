"""Text and pixels as a model's inputs, against tokenizers and Pillow in front of it, on real data.

MiniLM takes sentences and messages, EfficientNet-Lite0 photographs of several sizes. Both ways run
the same float32 model in onnxruntime, on one thread; what each answers is compared row by row.

    python benchmarks/processing.py --data ../shared/data --quick
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

_ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [
    str(_ROOT),
    *(p for p in sys.path if p and Path(p).resolve() != _ROOT / "benchmarks"),
]
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import numpy as np  # noqa: E402 - after the lines above
import tokenizers  # noqa: E402
from PIL import Image  # noqa: E402

from benchmarks import harness, images, models  # noqa: E402
from benchmarks.harness import Check, interval  # noqa: E402
from lrai_core.engine.engine import Session, find_engine  # noqa: E402
from lrai_import.described import load  # noqa: E402

MOST_TOKENS: Final = 128
TEXT_GAP: Final = 1e-4  # of an element of a vector of length one
PHOTO_GAP: Final = 0.02  # of a probability; Pillow and the engine may round a pixel differently
_SIZES: Final = ((256, 256), (480, 360), (333, 500), (224, 1_000))
_TEXT: Final = f"""
model = "minilm.onnx"
[preprocess.text]
tokenizer = "tokenizer.json"
mask = "attention_mask"
max_length = {MOST_TOKENS}
"""
_PHOTO: Final = """
model = "efficientnet.onnx"
[preprocess.photo]
input = "image"
resize = 256
crop = [224, 224]
scale = 1
mean = [127]
std = [128]
[postprocess]
map = "softmax"
labels = "labels.txt"
"""
Answer = Callable[[Any], Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Ask both ways, print, write; return 1 where a check does not hold."""
    arguments = _arguments(argv)
    rounds = 7 if arguments.quick else 31
    rows, checks, lines = [], list[Check](), []
    with tempfile.TemporaryDirectory(prefix="lrai-processing-") as scratch:
        cases = (
            _texts(Path(scratch), arguments.data, 800 if arguments.quick else None),
            _photographs(Path(scratch), arguments.data, 60 if arguments.quick else None),
        )
        for name, inputs, (inside, outside), most in cases:
            gaps, same = [], 0
            for one in inputs:
                got, right = inside([one]), outside([one])
                gaps.append(float(np.abs(got - right).max()))
                same += int(got.argmax() == right.argmax())
            worst = max(gaps)
            if name == "photographs":
                share = same / len(inputs)
                checks.append(Check(f"{name}: same label", share, ">= 0.995", share >= 0.995))
            for count in (1, 8):
                batch = inputs[:: len(_SIZES)][:count]  # of one size
                worst = max(worst, float(np.abs(inside(batch) - outside(batch)).max()))
                ratios = _ratios(inside, outside, batch, rounds)
                lines.append([name, f"{len(inputs)}", f"{worst:.1e}", f"{count}", str(ratios)])
                rows.append({"case": name, "rows": count, "gap": worst, "ratio": list(ratios)})
            checks.append(Check(f"{name}: largest difference", worst, f"<= {most}", worst <= most))
    harness.show(
        "in the graph, against in front of it; float32, one thread",
        ["", "rows compared", "largest difference", "at a time", "time to the library's"],
        lines,
        f"medians of {rounds} rounds in turns, 95 % bootstrap intervals; below 1 is faster",
    )
    packages = ["lrai", "onnxruntime", "onnxruntime-extensions", "tokenizers", "pillow", "numpy"]
    environment = harness.environment(1, packages)
    return harness.conclude(
        "processing", arguments.out, environment, rows, checks, quick=arguments.quick
    )


Case = tuple[str, list[Any], tuple[Answer, Answer], float]


def _texts(folder: Path, data: Path | None, most: int | None) -> Case:
    models.minilm_onnx(folder / "minilm.onnx")
    file = Path(models._package_folder(), "tokenizer.json")  # noqa: SLF001 - of this folder
    shutil.copy(file, folder)
    library = tokenizers.Tokenizer.from_file(str(file))
    library.enable_padding()
    library.enable_truncation(MOST_TOKENS)
    inside, plain = _sessions(folder, "minilm", _TEXT)
    if data is None:
        texts = models.sentences(1_000, 3)
    else:
        messages = (data / "text" / "sms_spam.tsv").read_text("utf-8").splitlines()
        texts = models.sst2(data, "test")[0] + [line.partition("\t")[2] for line in messages]
    texts = texts[:: max(1, len(texts) // most)] if most else texts

    def outside(batch: Sequence[str]) -> Any:
        found = library.encode_batch(list(batch))
        ids = np.array([one.ids for one in found])
        return plain.run([ids, np.array([one.attention_mask for one in found])])[0]

    return (
        "texts",
        texts,
        (lambda batch: inside.run([np.array(batch, np.object_)])[0], outside),
        TEXT_GAP,
    )


def _photographs(folder: Path, data: Path | None, most: int | None) -> Case:
    if data is None:
        images.efficientnet_lite0_onnx(folder / "efficientnet.onnx")
        random = np.random.default_rng(0)
        drawn = random.integers(0, 256, (60, 99, 88, 3), np.uint8)
        pictures = [Image.fromarray(one) for one in drawn]
    else:
        sample = np.zeros((2, 3, 224, 224), np.float32)
        images.export(images.efficientnet_lite0(), sample, folder / "efficientnet.onnx")
        files = sorted((data / "imagenet_samples").glob("*.jpg"))[:most]
        pictures = [Image.open(file).convert("RGB") for file in files]
    pixels = [  # photographs of several sizes, as people have them
        np.asarray(picture.resize(_SIZES[index % len(_SIZES)], Image.Resampling.LANCZOS))
        for index, picture in enumerate(pictures)
    ]
    (folder / "labels.txt").write_text("\n".join(map(str, range(1_000))))
    inside, plain = _sessions(folder, "efficientnet", _PHOTO)

    def outside(batch: Sequence[Any]) -> Any:
        made = []
        for one in batch:
            height, width = (side * 256 // min(one.shape[:2]) for side in one.shape[:2])
            small = Image.fromarray(one).resize((width, height), Image.Resampling.BILINEAR)
            left, top = round((width - 224) / 2), round((height - 224) / 2)
            cut = np.asarray(small.crop((left, top, left + 224, top + 224)), np.float32)
            made.append(((cut - 127) / 128).transpose(2, 0, 1))
        logits = plain.run([np.stack(made)])[0]
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        return powers / powers.sum(axis=1, keepdims=True)

    return (
        "photographs",
        pixels,
        (lambda batch: inside.run([np.stack(batch)])[0], outside),
        PHOTO_GAP,
    )


def _sessions(folder: Path, name: str, description: str) -> tuple[Session, Session]:
    """Return the model with what is described around it, and the model."""
    (folder / f"{name}.toml").write_text(description)
    whole = folder / f"{name}-whole.onnx"
    whole.write_bytes(load(folder / f"{name}.toml", print).model.SerializeToString())
    engine = find_engine("onnxruntime")
    return (
        engine.load(whole, threads=1, optimise=True),
        engine.load(folder / f"{name}.onnx", threads=1, optimise=True),
    )


def _ratios(inside: Answer, outside: Answer, batch: Sequence[Any], rounds: int) -> harness.Interval:
    ratios = []
    for turn in range(rounds):
        seconds = [0.0, 0.0]
        for at in (0, 1)[:: -1 if turn % 2 else 1]:  # each goes first in turn
            began = time.perf_counter()
            (inside, outside)[at](batch)
            seconds[at] = time.perf_counter() - began
        ratios.append(seconds[0] / seconds[1])
    return interval(ratios)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--data", type=Path, help="folder with text and imagenet_samples")
    parser.add_argument("--quick", action="store_true", help="fewer rows and rounds")
    parser.add_argument("--out", type=Path, default=_ROOT / "benchmarks" / "results")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
