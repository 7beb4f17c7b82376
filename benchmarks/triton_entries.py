"""The entries of a model repository that are compared: LRAI's, and each way of writing a peer."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from benchmarks.processes import HOST
from lrai_core import Artifact

_FOLDER: Final = Path(__file__).resolve().parent
_LOAD_SECONDS: Final = 300.0
_UNSETTLED: Final = ("LOADING", "UNLOADING")
_TOKENS: Final = (("input_ids", "TYPE_INT64"), ("attention_mask", "TYPE_INT64"))


@dataclass(frozen=True, slots=True)
class Queue:
    """Triton's `default_queue_policy`, in shares of the deadline."""

    limit: int | None = None
    timeout: float | None = None

    def __str__(self) -> str:
        """Return it as tables show it."""
        limit = "no limit" if self.limit is None else f"limit {self.limit}"
        timeout = "no timeout" if self.timeout is None else f"timeout {self.timeout:g}"
        return f"{limit}, {timeout}"


@dataclass(frozen=True, slots=True)
class Peer:
    """A setting of the plain python backend.

    Attributes:
        way: How its `model.py` runs a list, see `triton_peer.py`.
        rows: `max_batch_size`; one is without `dynamic_batching`.
        ragged: Whether requests of different lengths come in one list.
        instances: Of the model.
        queue: The queue policy of the batcher, which there is then; None for Triton's own.
        delay_us: For how long the batcher waits for more (`max_queue_delay_microseconds`).
    """

    way: str
    rows: int = 1
    ragged: bool = False
    instances: int = 1
    queue: Queue | None = None
    delay_us: int = 0

    def __str__(self) -> str:
        """Return it as tables show it."""
        if self.way == "constant":
            return "constant"
        lists = f"lists to {self.rows}, " if self.rows > 1 else ""
        way = {"one": "one by one", "equal": "equal shapes in a call"}
        queue = f", {self.queue}" if self.queue else ""
        queue += f", waits {self.delay_us} us" if self.delay_us else ""
        return f"{lists}{way.get(self.way, self.way)}, {_instances(self.instances)}{queue}"


@dataclass(frozen=True, slots=True)
class Ours:
    """A setting of LRAI."""

    execution: str
    instances: int = 1

    def __str__(self) -> str:
        """Return it as tables show it."""
        return f"{self.execution}, {_instances(self.instances)}"


@dataclass(frozen=True, slots=True)
class Entry:
    """A model that the server can be told to load."""

    name: str
    setting: Peer | Ours
    variant: str

    @property
    def side(self) -> str:
        """Return who answers with what, for whom answers are counted."""
        return f"{'lrai' if isinstance(self.setting, Ours) else 'peer'}, {self.variant}"


WAYS: Final = (
    Peer("one"),
    Peer("equal", 8),
    Peer("equal", 32),
    Peer("one", 32, ragged=True),
    Peer("padded", 16, ragged=True),
    Peer("grouped", 8, ragged=True),
    Peer("grouped", 32, ragged=True, delay_us=2_000),
    Peer("grouped", 32, ragged=True),
)
QUICK_WAYS: Final = (WAYS[1], WAYS[3], WAYS[7])  # those that were best somewhere
# What runs while requests come faster than they can be answered: the shorter a list, the fewer
# run in vain. A low limit alone is no help: this batcher then often sleeps for half a second.
OPEN_WAYS: Final = (Peer("one"), Peer("one", 4, ragged=True))
QUEUES: Final = (
    Queue(None, 0.7),
    Queue(None, 0.5),
    Queue(None, 0.3),
    Queue(32, 0.5),
    Queue(8, 0.7),
    Queue(4, None),
)
QUICK_QUEUES: Final = (QUEUES[1],)
EXECUTIONS: Final = ("inline", "lists", "sender")
CONSTANTS: Final = ("constant", "constant-alone")  # names of entries without a model
AS_GIVEN: Final = Ours("auto")  # by the one line, without another setting


class Repository:
    """A model repository that entries are written into."""

    def __init__(self, folder: Path, source: Path, artifact: Artifact, noop: Path) -> None:
        """Make it, empty.

        Args:
            folder: Where.
            source: The encoder as an ONNX file.
            artifact: What was compiled from it.
            noop: A model that computes nothing, as an ONNX file.
        """
        self.folder, self._source, self._artifact, self.noop = folder, source, artifact, noop
        folder.mkdir()

    def peer(self, name: str, variant: str, peer: Peer, slo_us: float = 0.0) -> Entry:
        """Write a plain python backend with the model, or with the same file as the variant."""
        parameters = {"way": peer.way, "rows": str(peer.rows), "model": str(self._source)}
        parameters["weights"] = ""
        if variant != "fp32":
            found = self._artifact.manifest.variant(variant)
            parameters["model"] = str(self._artifact.file(found.model))
            parameters["weights"] = str(self._artifact.path / (found.weights or "."))
        lines = ['backend: "python"', f"max_batch_size: {peer.rows}"]
        ragged = " allow_ragged_batch: true" if peer.ragged else ""
        for tensor, datatype in _TOKENS:
            lines += [f'input {{ name: "{tensor}" data_type: {datatype} dims: [ -1 ]{ragged} }}']
        lines += ['output { name: "sentence_embedding" data_type: TYPE_FP32 dims: [ 384 ] }']
        if peer.rows > 1 or peer.queue:
            lines.append(f"dynamic_batching {{ {_policy(peer, slo_us)} }}")
        self._write(name, [*lines, *_ending(peer.instances, parameters)])
        shutil.copy(_FOLDER / "triton_peer.py", self.folder / name / "1" / "model.py")
        return Entry(name, peer, variant)

    def noop_peer(self, name: str, way: str, width: int, *, batches: bool = True) -> Entry:
        """Write a plain python backend that computes nothing, with a session or without.

        Where it `batches`, Triton's own batcher hands over lists.
        """
        lines = ['backend: "python"', "max_batch_size: 64"]
        lines += ["dynamic_batching { }"] * batches
        lines += [f'input {{ name: "x" data_type: TYPE_FP32 dims: [ {width} ] }}']
        lines += ['output { name: "y" data_type: TYPE_FP32 dims: [ 1 ] }']
        parameters = {"way": way, "model": str(self.noop), "weights": ""}
        self._write(name, [*lines, *_ending(1, parameters)])
        shutil.copy(_FOLDER / "triton_peer.py", self.folder / name / "1" / "model.py")
        return Entry(name, Peer(way, 64), "noop")

    def ours(self, name: str, variant: str, ours: Ours, model: Path | None = None) -> Entry:
        """Write LRAI's: the ONNX file as it is for fp32, else the artifact; or another model."""
        given = {} if ours.execution == "auto" else {"execution": ours.execution}
        self._write(name, ['backend: "lrai"', *_ending(ours.instances, given)])
        folder = self.folder / name / "1"
        if model is not None or variant == "fp32":
            os.link(model or self._source, folder / "model.onnx")
        else:
            shutil.copytree(self._artifact.path, folder / "model.lrai", copy_function=_link)
        return Entry(name, ours, variant)

    def version(self, name: str, number: int) -> None:
        """Add a version with the same artifact to an entry, where it is not there yet."""
        folder = self.folder / name / str(number)
        if not folder.exists():
            shutil.copytree(self._artifact.path, folder / "model.lrai", copy_function=_link)

    def _write(self, name: str, lines: list[str]) -> None:
        (self.folder / name / "1").mkdir(parents=True)
        (self.folder / name / "config.pbtxt").write_text("\n".join([*lines, ""]))


def peers_of(ways: tuple[Peer, ...], instances: tuple[int, ...]) -> list[Peer]:
    """Return every way with each number of instances."""
    return [replace(way, instances=count) for way in ways for count in instances]


def load(port: int, name: str) -> None:
    """Have the server load a model.

    Raises:
        RuntimeError: It does not.
    """
    _post(port, f"models/{name}/load")


def unload(port: int, name: str) -> None:
    """Have the server begin to let go of a model."""
    _post(port, f"models/{name}/unload")


def wait_until_settled(port: int) -> None:
    """Return once the server is neither loading nor unloading anything."""
    while any(model.get("state") in _UNSETTLED for model in json.loads(_post(port, "index"))):
        time.sleep(0.05)


def _post(port: int, path: str) -> str:
    connection = http.client.HTTPConnection(HOST, port, timeout=_LOAD_SECONDS)
    connection.request("POST", f"/v2/repository/{path}", b"{}")
    with connection.getresponse() as reply:
        said = reply.read().decode(errors="replace")
    connection.close()
    if reply.status != http.client.OK:
        raise RuntimeError(f"{path}: {said[:600]}")
    return said


def _policy(peer: Peer, slo_us: float) -> str:
    delay = f"max_queue_delay_microseconds: {peer.delay_us}" if peer.delay_us else ""
    if (queue := peer.queue) is None:
        return delay
    fields = ["timeout_action: REJECT"]
    if queue.limit is not None:
        fields.append(f"max_queue_size: {queue.limit}")
    if queue.timeout is not None:
        fields.append(f"default_timeout_microseconds: {int(queue.timeout * slo_us)}")
    return f"{delay} default_queue_policy {{ {' '.join(fields)} }}"


def _ending(instances: int, parameters: dict[str, str]) -> list[str]:
    lines = [f"instance_group {{ count: {instances} kind: KIND_CPU }}"]
    for key, value in parameters.items():
        text = json.dumps(value)
        lines.append(f'parameters {{ key: "{key}" value {{ string_value: {text} }} }}')
    return lines


def _instances(count: int) -> str:
    return "1 instance" if count == 1 else f"{count} instances"


def _link(source: str, target: str) -> Any:
    """Link a file, or copy it where it lies on another file system."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target
