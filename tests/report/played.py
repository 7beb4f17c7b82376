"""A runtime that is played: its calls take as long as it is told."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from lrai_core import InferenceRequest, LraiConfig, Runtime, Signature, TensorSpec
from lrai_report.replay import Server

IDS = TensorSpec(
    name="ids", datatype="INT64", shape=("n", "l"), batch_axis=0, length_axis=1, pad_value=9
)


class Played:
    """A runtime whose calls take so long; remembers what it was sent."""

    def __init__(self, call_seconds: float = 0.0, error: Exception | None = None) -> None:
        self.config = LraiConfig()
        self.sent: list[InferenceRequest] = []
        self.inside = 0
        self._seconds, self._error = call_seconds, error

    async def infer_async(self, request: InferenceRequest) -> None:
        self.sent.append(request)
        self.inside += 1
        try:
            if self._error:
                raise self._error
            await asyncio.sleep(self._seconds)
        finally:
            self.inside -= 1

    def stats(self) -> dict[str, int]:
        return {"outstanding_rows": self.inside, "batch_completed": len(self.sent)}


def server(policy: str, runtime: Any) -> Server:
    return Server(policy, cast("Runtime", runtime), Signature(inputs=(IDS,), outputs=()))
