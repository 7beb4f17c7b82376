"""What holds for every test: one thread for numpy, and more time for those that start servers."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile

import pytest

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # read when numpy is imported, here and in children
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"  # the only local one that mlflow-skinny has
os.environ["BENTOML_DO_NOT_TRACK"] = "true"
os.environ["BENTOML_HOME"] = tempfile.mkdtemp(prefix="lrai-bentoml-")
# Who starts tests in the background has interrupts ignored, which children would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)

_SERVER_SECONDS = 300


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("server") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(_SERVER_SECONDS))


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["BENTOML_HOME"], ignore_errors=True)
