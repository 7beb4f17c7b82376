"""ONNX Runtime in a service of BentoML's, in the ways in which people write it.

All of them run requests unpadded. BentoML's own batcher hands over lists of one tensor alone, so
that there the mask, which is all ones, is made here.
"""

# BentoML reads bare arrays only, and its decorators have no types that mypy knows.
# mypy: disable-error-code="type-arg, untyped-decorator, attr-defined"

import os

import bentoml
import numpy as np

from benchmarks.hosts_fastapi import create, groups, run, served, session


@bentoml.service(workers=int(os.environ.get("HOSTS_WORKERS", "1")))
@bentoml.asgi_app(create())  # POST /invocations, the same session
class Plain:
    """One session of one thread in each worker."""

    def __init__(self) -> None:
        """Open the model that the environment names."""
        self._session = session(served())

    @bentoml.api
    async def predict(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
        """Return the embeddings, computed in the event loop."""
        return run(self._session, input_ids, attention_mask)

    @bentoml.api
    def threaded(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
        """Return the embeddings, computed in a thread."""
        return run(self._session, input_ids, attention_mask)

    @bentoml.api(batchable=True)
    def batched(self, rows: list[list[int]]) -> np.ndarray:
        """Return the embedding of each row, run one by one."""
        return np.concatenate([run(self._session, np.array([row], np.int64)) for row in rows])

    @bentoml.api(batchable=True)
    def grouped(self, rows: list[list[int]]) -> np.ndarray:
        """Return the embedding of each row; those that are equally long are run together."""
        found = np.zeros((len(rows), 384), np.float32)
        for indices in groups(rows):
            ids = np.array([rows[index] for index in indices], np.int64)
            found[indices] = run(self._session, ids)
        return found
