"""What holds for every test: threads, time for those that start servers, who runs beside whom."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

settings.register_profile("lrai", deadline=None, derandomize=True)  # a busy machine is no failure
settings.register_profile("search", deadline=None, max_examples=2000)  # --hypothesis-profile
settings.load_profile("lrai")
os.environ["OPENBLAS_NUM_THREADS"] = "1"  # read when numpy is imported, here and in children
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"  # the only local one that mlflow-skinny has
os.environ["BENTOML_DO_NOT_TRACK"] = "true"
os.environ["BENTOML_HOME"] = tempfile.mkdtemp(prefix="lrai-bentoml-")
# Who starts tests in the background has interrupts ignored, which children would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Open files as usual: where a process may have many more, what is left open goes unseen.
resource.setrlimit(resource.RLIMIT_NOFILE, (1024, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))

from lrai_core.compiler import search  # noqa: E402 - after the lines above

search.MOST_ROUNDS = search.ROUNDS  # what models of a test take matters to none

_SERVER_SECONDS = 600
_SHARING = "triton", "bento", "sagemaker"  # folders of tests that share one server


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("server") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(_SERVER_SECONDS))
    if hasattr(config, "workerinput"):  # what takes long starts first, lest one waits for it
        items.sort(key=_turn)


@pytest.fixture
def no_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have no folder be there that could be the temporary one."""
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr("tempfile._candidate_tempdir_list", lambda: [str(tmp_path / "nowhere")])


class _ByServer(LoadScopeScheduling):  # type: ignore[misc] # without types
    """Of several processes one has all tests of a file, or of a server."""

    def _split_scope(self, nodeid: str) -> str:
        return _group(Path(nodeid.partition("::")[0]))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> _ByServer:
    return _ByServer(config, log)


def _group(path: Path) -> str:
    if path.stem == "test_conformance":  # starts every server, Triton's among them
        return "triton"
    return path.parent.name if path.parent.name in _SHARING else str(path)


def _turn(item: pytest.Item) -> tuple[bool, int]:
    group = _group(item.path)
    return "integration" not in item.path.parts, [*_SHARING, group].index(group)


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["BENTOML_HOME"], ignore_errors=True)
