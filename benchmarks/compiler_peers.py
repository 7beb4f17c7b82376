"""What the compiler is measured against: forms of a model that others make, and who runs them.

They are opened as people open them, which is without asking for huge pages, as LRAI does for its
sessions.
"""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import onnx
import onnxruntime as ort
from onnxruntime.quantization import CalibrationDataReader

from benchmarks import compiler_memory
from benchmarks.compiler_judge import Run
from benchmarks.compiler_models import Array, Feed, Model
from benchmarks.compiler_olive import Olive
from benchmarks.compiler_torch import Module
from benchmarks.harness import console
from lrai_core.engine.engine import isa_class
from lrai_core.engine.onnxruntime import REFUSALS, reason
from lrai_engines.quantize import SATURATING

Open = Callable[[int], Run]  # with so many threads
Shapes = tuple[tuple[int, ...], ...]  # of the inputs of a call

REFERENCE: Final = "onnxruntime fp32"
TUNED: Final = ("SkipLayerNormFusion", "BiasGeluFusion")  # passes that cost int8 speed


@dataclass(frozen=True, slots=True)
class Peer:
    """A form of somebody else's, before it is opened.

    Attributes:
        sizes: Rows of the calls that it is judged in.
    """

    name: str
    opens: Open
    size_mb: float
    build_seconds: float = 0.0
    memory_mb: float = float("nan")
    sizes: Sequence[int] = (1,)


def peers_of(model: Model, folder: Path, *, extras: bool, olive: Olive | None) -> list[Peer]:
    """Return every peer that can be made, the reference first.

    Each once: of several copies of one graph the luckiest would be the fastest.
    """
    ids = compiler_memory.vocabulary(model.source)
    memory_mb = compiler_memory.loaded_mb(model.source, ids, optimise=True)
    opens = partial(_ort, model.source, ())
    made = [Peer(REFERENCE, opens, file_mb(model.source), memory_mb=memory_mb)]
    settings = [((), ""), (TUNED, ", tuned")][: 1 + _is_tunable(model.source)]
    for passes, words in settings[1:]:
        tuned = partial(_ort, model.source, passes)
        made.append(Peer(f"{REFERENCE}{words}", tuned, file_mb(model.source)))
    for kind, build in (("dynamic int8", _dynamic), ("static int8", _static), ("blocks", _blocks)):
        file, began = folder / f"{kind.replace(' ', '-')}.onnx", time.perf_counter()
        with console.status(f"{model.name}: onnxruntime's quantiser, {kind}"):
            build(model, file)
        seconds = time.perf_counter() - began
        if _operators(file) == _operators(model.source):
            continue  # it has found nothing to do
        for passes, words in settings:
            opens = partial(_ort, file, passes)
            made.append(Peer(f"onnxruntime {kind}{words}", opens, file_mb(file), seconds))
    if olive:
        made += _olive(model, folder, olive)
    if model.module is not None and importlib.util.find_spec("torch"):
        opens = partial(_torch, model.module, list(model.unseen[0]))
        made.append(Peer("torch eager", opens, file_mb(model.source)))
    return [*made, *_openvino(model)] if extras else made


def file_mb(file: Path) -> float:
    """Return the size of a file in megabytes."""
    return file.stat().st_size / 1e6


def _olive(model: Model, folder: Path, olive: Olive) -> Iterator[Peer]:
    with console.status(f"{model.name}: olive"):
        found = olive.made(model.source, folder)
    for made in found:
        if not (error := made.error):
            try:
                _ort(made.file, (), 1)(model.unseen[0])
            except REFUSALS as refusal:  # its onnxruntime may be another one
                error = reason(refusal)
        if error:
            console.print(f"{model.name}: no olive {made.form}: {error}", markup=False)
        elif executed(made.file) != executed(model.source):
            size_mb = sum(map(file_mb, made.file.parent.glob(f"{made.file.name}*")))
            yield Peer(f"olive {made.form}", partial(_ort, made.file, ()), size_mb, made.seconds)
        else:
            console.print(f"{model.name}: olive {made.form} runs as {REFERENCE} does", markup=False)


def _operators(file: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(file, load_external_data=False).graph.node)


def executed(file: Path) -> Counter[str]:
    """Return the operators that onnxruntime makes of a file, of which each is a call."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    with tempfile.TemporaryDirectory(prefix="lrai-executed-") as folder:
        options.optimized_model_filepath = str(Path(folder, "model.onnx"))
        ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        return _operators(Path(options.optimized_model_filepath))


def _is_tunable(source: Path) -> bool:
    """Return whether there is a layer norm or a GELU, all that `TUNED` says anything of."""
    kinds = _operators(source)
    norms = kinds["LayerNormalization"] or (kinds["ReduceMean"] and kinds["Sqrt"])
    return bool(norms or kinds["Gelu"] or kinds["Erf"])


def _ort(file: Path, disabled: Sequence[str], threads: int) -> Run:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    session = ort.InferenceSession(
        str(file), options, providers=["CPUExecutionProvider"], disabled_optimizers=list(disabled)
    )
    names, run = [value.name for value in session.get_outputs()], session._sess.run  # noqa: SLF001
    # As LRAI's engine does: what Python puts around it takes as long as a small model.
    return lambda feed: list(run(names, feed, None))


def _torch(make: Callable[[], Module], names: Sequence[str], threads: int) -> Run:
    import torch

    torch.set_num_threads(threads)
    module = make()

    def run(feed: Feed) -> list[Array]:
        with torch.inference_mode():
            return [module(*(torch.from_numpy(feed[name]) for name in names)).numpy()]

    return run


def _is_saturating() -> bool:
    """Return whether sums of two products may overflow here: then weights have 7 bits, as LRAI's.

    So onnxruntime's documentation has it for processors without VNNI.
    """
    return isa_class() in SATURATING


def _dynamic(model: Model, out: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.registry import IntegerOpsRegistry

    # Without convolutions, which this makes 4 to 12 times slower: nobody would serve that.
    kinds = [kind for kind in IntegerOpsRegistry if kind != "Conv"]
    quantize_dynamic(
        model.source,
        out,
        op_types_to_quantize=kinds,
        per_channel=True,
        reduce_range=_is_saturating(),
        weight_type=QuantType.QInt8,
    )


def _blocks(model: Model, out: Path) -> None:
    """Weights and activations in int8 by blocks of 32: the closest that onnxruntime has."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantiser = MatMulNBitsQuantizer(
        onnx.load(model.source), bits=8, block_size=32, is_symmetric=True, accuracy_level=4
    )
    quantiser.process()
    quantiser.model.save_model_to_file(str(out))


def _static(model: Model, out: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    ready = out.with_suffix(".ready.onnx")
    quant_pre_process(model.source, ready, skip_symbolic_shape=True)
    # Of a transformer the products alone: with what lies between them it is wrong, nobody's peer.
    products = ["MatMul", "Gemm"] if "attention_mask" in model.evaluation else None
    quantize_static(
        ready,
        out,
        _Reader(_calibration(model)),
        op_types_to_quantize=products,
        per_channel=True,
        reduce_range=_is_saturating(),
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )


class _Reader(CalibrationDataReader):  # type: ignore[misc] # without types
    """Rows for onnxruntime's quantiser."""

    def __init__(self, feeds: Sequence[Feed]) -> None:
        self._feeds = iter(feeds)

    def get_next(self) -> Feed | None:
        return next(self._feeds, None)


def _calibration(model: Model) -> list[Feed]:
    """Return 100 of the rows that the model is compiled with, or all, without padding."""
    names = list(model.unseen[0])
    feeds = []
    for index in range(min(100, len(model.evaluation[names[0]]))):
        feed = {name: model.evaluation[name][index : index + 1] for name in names}
        if "attention_mask" in feed:
            length = int(feed["attention_mask"].sum())
            feed = {name: array[:, :length] for name, array in feed.items()}
        feeds.append(feed)
    return feeds


def cell_shapes(model: Model) -> frozenset[Shapes]:
    """Return the shapes of the inputs in the calls that are timed."""
    arrays = model.unseen[0].values()
    return frozenset(
        tuple((rows, length) if length else (rows, *array.shape[1:]) for array in arrays)
        for rows, length in model.cells
    )


def openvino_run(network: Any, precision: str, wanted: Set[Shapes], threads: int) -> Run:
    """Return OpenVINO's network, compiled as it is, and for each of the `wanted` shapes anew.

    So do those who know in which shapes they will be asked.
    """
    import openvino as ov

    config = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
    config |= {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision}
    kinds = {one.get_type_name() for one in network.get_ops()}
    # Where shapes are known, two small layers in int8 become one operator that computes rubbish.
    is_apart = "FakeQuantize" in kinds and "Convolution" not in kinds
    apart = {"SNIPPETS_MODE": "DISABLE"} if is_apart else {}
    core, requests = ov.Core(), dict[Shapes, Any]()

    def request_of(shapes: Shapes, names: Sequence[str]) -> Any:
        if not shapes:
            return core.compile_model(network, "CPU", config).create_infer_request()
        fixed = network.clone()
        fixed.reshape(dict(zip(names, map(ov.PartialShape, map(list, shapes)), strict=True)))
        return core.compile_model(fixed, "CPU", config | apart).create_infer_request()

    if not wanted:
        request = request_of((), ())
        return lambda feed: list(request.infer(feed).values())

    def run(feed: Feed) -> list[Array]:
        shapes = tuple([array.shape for array in feed.values()])
        if (request := requests.get(shapes)) is None:
            own = shapes if shapes in wanted else ()
            if own not in requests:
                requests[own] = request_of(own, list(feed))
            request = requests[own]
        return list(request.infer(feed).values())

    return run


def _openvino(model: Model) -> Iterator[Peer]:
    """Yield OpenVINO's, each as it is and compiled for the shapes that it is timed in."""
    import openvino as ov

    core, fixed = ov.Core(), cell_shapes(model)
    # It says what is said in these shapes only if it is judged in them.
    sizes = sorted({1, *(rows for rows, length in model.cells if not length)})

    def both(
        network: Any, words: Sequence[str], size_mb: float, seconds: float = 0.0
    ) -> Iterator[Peer]:
        for precision, name in zip(("f32", "bf16"), words, strict=True):
            opens = partial(openvino_run, network, precision, frozenset())
            yield Peer(f"openvino {name}", opens, size_mb, seconds)
            opens = partial(openvino_run, network, precision, fixed)
            yield Peer(f"openvino {name}, fixed shapes", opens, size_mb, seconds, sizes=sizes)

    yield from both(core.read_model(model.source), ("fp32", "bf16"), file_mb(model.source))
    if importlib.util.find_spec("nncf") is None:
        console.print("nncf is not installed: OpenVINO's int8 is left out")
        return
    import nncf

    began, kind = time.perf_counter(), {}
    if "attention_mask" in model.evaluation:
        kind = {"model_type": nncf.ModelType.TRANSFORMER}
    quantised = nncf.quantize(
        core.read_model(model.source), nncf.Dataset(_calibration(model)), **kind
    )
    seconds = time.perf_counter() - began
    name, rest = "int8, nncf", ", the rest in bf16"
    yield from both(quantised, (name, name + rest), float("nan"), seconds)
    if _operators(model.source)["Conv"]:
        return  # whose weights it leaves: the same graph a second time
    began = time.perf_counter()
    weights = nncf.compress_weights(core.read_model(model.source))
    seconds, name = time.perf_counter() - began, "int8 weights, nncf"
    yield from both(weights, (name, name + rest), float("nan"), seconds)
