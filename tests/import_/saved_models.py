"""Writes SavedModels, what TensorFlow answers, and what their converter says of each signature.

For a process of its own: what TensorFlow brings into one stays there, and takes seconds to come.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import tensorflow as tf

from lrai_core import LraiError, declared
from lrai_import.onnx import Job
from lrai_import.saved_model import convert


def main(folder: Path) -> None:
    """Write SavedModels, answers of some as NAME.npz, and `said.json`."""
    tf.keras.utils.set_random_seed(0)
    columns(folder / "columns")
    picture(folder / "picture")
    (folder / "damaged").mkdir()
    (folder / "damaged" / "saved_model.pb").write_bytes(b"no SavedModel")
    tf.saved_model.save(tf.Module(), str(folder / "unsigned"))
    names = ("", "lengths", "lesser", "ranks", "scores", "pairs", "apart")
    jobs = [("columns", name) for name in names]
    jobs += [("damaged", ""), ("unsigned", "")]
    said = {f"{name}:{signature}": say(folder, name, signature) for name, signature in jobs}
    (folder / "said.json").write_text(json.dumps(said))


def say(folder: Path, name: str, signature: str) -> str:
    """Return whether a signature is compared when it is converted, and the rows of its inputs."""
    try:
        compared = convert(Job(str(folder / name), signature, str(folder / "converted.onnx")))
        inputs = declared(onnx.load(folder / "converted.onnx")).inputs
        return " ".join([str(compared), *sorted(str(one.shape[0]) for one in inputs)])
    except LraiError as error:
        return f"{type(error).__name__}: {error}"


def columns(folder: Path) -> None:
    """Write a module: texts and numbers in, several signatures."""
    random = np.random.default_rng(0)
    module = tf.Module()
    module.weights = tf.Variable(random.standard_normal((4, 3)).astype(np.float32))
    words = tf.lookup.KeyValueTensorInitializer(["red", "green"], tf.constant([1, 2], tf.int64))
    module.table = tf.lookup.StaticHashTable(words, default_value=0)
    texts = tf.TensorSpec([None], tf.string, "kind")
    numbers, others = (tf.TensorSpec([None, 4], tf.float32, name) for name in ("x", "a"))

    def scores(kind: tf.Tensor, x: tf.Tensor) -> dict[str, tf.Tensor]:
        found = x @ module.weights + tf.gather([[0.0], [2.0], [4.0]], module.table.lookup(kind))
        return {"scores": found, "best": tf.argmax(found, axis=1)}

    def less(x: tf.Tensor, a: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"less": x - 2 * a}

    def pairs(x: tf.Tensor, a: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"pairs": tf.matmul(x, a, transpose_b=True)}

    def apart(x: tf.Tensor, a: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"two": x * 2, "three": a * 3}

    def lengths(kind: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"lengths": tf.strings.length(kind)}

    signatures = {
        "serving_default": tf.function(less, [numbers, others]),
        "scores": tf.function(scores, [texts, numbers]),
        "pairs": tf.function(pairs, [numbers, others]),
        "apart": tf.function(apart, [numbers, others]),
        "lengths": tf.function(lengths, [texts]),
        "ranks": tf.function(less, [tf.TensorSpec(None, tf.float32, "x"), others]),
    }
    tf.saved_model.save(module, str(folder), signatures)
    kind = np.array(["red", "green", "blue", ""])
    x = random.standard_normal((4, 4)).astype(np.float32)
    answer = {name: one.numpy() for name, one in scores(tf.constant(kind), tf.constant(x)).items()}
    np.savez(folder.with_suffix(".npz"), kind=kind, x=x, **answer)


def picture(folder: Path) -> None:
    """Write a network of Keras with a convolution."""
    layers = tf.keras.layers
    model = tf.keras.Sequential(
        [
            tf.keras.Input((16, 16, 3), name="image"),
            layers.Conv2D(8, 3, padding="same", activation="relu"),
            layers.BatchNormalization(),
            layers.MaxPooling2D(),
            layers.GlobalAveragePooling2D(),
            layers.Dense(5, activation="softmax"),
        ]
    )
    model.export(str(folder), verbose=False)
    image = np.random.default_rng(1).standard_normal((3, 16, 16, 3)).astype(np.float32)
    np.savez(folder.with_suffix(".npz"), image=image, scores=model(image).numpy())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
