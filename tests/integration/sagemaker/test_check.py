"""`lrai sagemaker check` finds what is wrong with a container, and nothing in ours."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.integration.sagemaker.conftest import HOST, LRAI, Container, free_port

pytestmark = pytest.mark.server

Expected = tuple[str, str] | None  # how "where" begins in a row, and what "found" holds in it
Checked = Future[tuple[int, str]]  # exit status, and the table
PLANTED = [sys.executable, str(Path(__file__).with_name("planted.py"))]


def check(
    folder: Path, *arguments: str, sockets: Path | None = None, expected: Expected = None
) -> tuple[int, str]:
    """Return the exit status of a check and its table.

    They are those of a second one where nothing is wrong with the first but that a ping was late: a
    machine that stands still for two seconds makes any ping so.
    """
    status, said = checked_once(folder, *arguments, sockets=sockets)
    more = [cells for cells in rows(said) if not is_expected(cells, expected)]
    if more and all(is_expected(cells, ("GET /ping", "timed out")) for cells in more):
        return checked_once(folder, *arguments, sockets=sockets)
    return status, said


def checked_once(folder: Path, *arguments: str, sockets: Path | None) -> tuple[int, str]:
    own = {"COLUMNS": "400", "LRAI_ACTOR_THREADS": "1"}
    own |= {"LRAI_RUNTIME_SOCKET_DIR": str(sockets)} if sockets else {}
    done = subprocess.run(
        [*LRAI, "sagemaker", "check", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={**os.environ, **own},
        timeout=280,
    )
    return done.returncode, done.stdout


def rows(text: str) -> list[list[str]]:
    """Return the cells of the lines of a table, whatever is said before it."""
    lines = [line for line in text.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines]


def is_expected(cells: list[str], expected: Expected) -> bool:
    """Return whether a row says what is looked for."""
    return expected is not None and cells[0].startswith(expected[0]) and expected[1] in cells[1]


PLANTED_FAULTS = (
    ("ping missing", "GET /ping", "404"),
    ("ping slow", "GET /ping", "timed out"),
    ("ping lies", "POST /invocations", "503 {"),
    ("ping waits", "GET /ping", "timed out while 4 requests were answered"),
    ("bad is fine", "POST /invocations, ", "200 {"),
    ("bad is an own fault", "POST /invocations, ", "500 {"),
    ("stack trace", "POST /invocations, ", "a stack trace in the answer"),
    ("large body dropped", "POST /invocations, 6 MB of blanks", ""),
    ("no type", "POST /invocations", "without Content-Type"),
    ("advice beyond its bounds", "GET /execution-parameters", "200"),
    ("advice without strategy", "GET /execution-parameters", "200"),
    ("this machine only", "socket", "only this machine is answered"),
    ("port ignored", "SAGEMAKER_BIND_TO_PORT", "Connection refused"),
    ("ends at once", "start", "exit status 1"),
    ("sigterm ignored", "SIGTERM", "killed after 3 s"),
    ("wrong status", "SIGTERM", "exit status 1"),
    ("requests dropped", "SIGTERM", "requests lost"),
)
# Seconds, all of which pass; of the first two the server has to be up by then, however busy it is.
NEVER_READY = {"ping missing": 15, "ping slow": 15, "port ignored": 4}
FAULTS_OF_MANY_MODELS = (
    ("loaded twice", "POST /models", "200"),
    ("every model known", "GET /models/check-2", "200"),
    ("models not listed", "GET /models", '{"models": []}'),
    ("unload of nothing", "DELETE /models/check-1", "200"),
)


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, Checked]]:
    """Yield what each fault comes to, some ahead of the tests: most of a check is waiting."""
    folder = tmp_path_factory.mktemp("planted")
    (folder / "row.json").write_text('{"x": 1}')
    given = ["--payload", "row.json"]
    with ThreadPoolExecutor(3) as pool:
        begun = {}
        for faults, more in (
            (PLANTED_FAULTS, []),
            (FAULTS_OF_MANY_MODELS, ["--model-url", "/opt/ml/models/x"]),
        ):
            for fault, where, found in faults:
                start = NEVER_READY.get(fault, 30)
                grace = 3 if fault == "sigterm ignored" else 30
                limits = ["--start-seconds", str(start), "--grace-seconds", str(grace)]
                arguments = [*given, *limits, *more, *PLANTED, fault]
                expected = where, found
                begun[fault] = pool.submit(check, folder, *arguments, expected=expected)
        yield begun
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize(("fault", "where", "found"), PLANTED_FAULTS)
def test_a_planted_fault_is_found_and_nothing_else(
    checked: Mapping[str, Checked], fault: str, where: str, found: str
) -> None:
    status, said = checked[fault].result()
    assert status == 3, said
    assert rows(said), said
    for cells in rows(said):
        assert cells[0].startswith(where), said
        assert found in cells[1], said


@pytest.mark.parametrize(("fault", "where", "found"), FAULTS_OF_MANY_MODELS)
def test_a_fault_of_many_models_is_found_and_nothing_else(
    checked: Mapping[str, Checked], fault: str, where: str, found: str
) -> None:
    status, said = checked[fault].result()
    (cells,) = rows(said)
    assert (status, cells[0]) == (3, where), said
    assert found in cells[1]


def test_nothing_is_found_where_nothing_was_planted(tmp_path: Path) -> None:
    (tmp_path / "row.json").write_text('{"x": 1}')
    for more in ([], ["--model-url", "/opt/ml/models/x"]):
        status, said = check(tmp_path, "--payload", "row.json", *more, *PLANTED, "none")
        assert (status, said) == (0, "nothing that the platform would trip over\n")


def test_requests_that_a_busy_container_accepts_late_are_not_taken_for_lost(tmp_path: Path) -> None:
    (tmp_path / "row.json").write_text('{"x": 1}')
    slow = [*PLANTED, "none, but slow to accept"]
    status, said = check(tmp_path, "--payload", "row.json", *slow)
    assert (status, said) == (0, "nothing that the platform would trip over\n")


def test_nothing_is_found_in_ours(models: Path, tmp_path: Path, sockets: Path) -> None:
    many = tmp_path / "models"
    shutil.copytree(models / "tokens.lrai", many / "a" / "model.lrai")
    artifact = ["--artifact", str(models / "tokens.lrai")]
    serve = [*LRAI, "sagemaker", "serve", "--host", "0.0.0.0"]  # noqa: S104
    for arguments in (
        [*artifact, *serve, "--workers", "2", str(models / "tokens.lrai")],
        [
            *artifact,
            "--model-url",
            str(tmp_path / "models" / "a"),
            *serve,
            str(tmp_path / "models"),
        ],
    ):
        status, said = check(tmp_path, *arguments, sockets=sockets)
        assert (status, said) == (0, "nothing that the platform would trip over\n")


def test_a_container_that_runs_is_checked_by_its_address(
    tokens: Container, models: Path, tmp_path: Path
) -> None:
    url = f"http://{HOST}:{tokens.port}"
    status, said = check(tmp_path, "--artifact", str(models / "tokens.lrai"), url)
    assert (status, said) == (0, "nothing that the platform would trip over\n")
    assert tokens.process.poll() is None
    status, said = check(tmp_path, url)
    assert status == 0
    assert "without --payload or --artifact nothing was asked" in said


def test_what_cannot_be_checked_is_explained(tmp_path: Path) -> None:
    assert check(tmp_path, "no-such-command")[0] == 5
    assert check(tmp_path, f"http://{HOST}:1", "--payload", "row.json")[0] == 2
    status, said = check(tmp_path, "--start-seconds", "0.5", f"http://{HOST}:{free_port()}")
    assert status == 3
    assert "refused" in said
