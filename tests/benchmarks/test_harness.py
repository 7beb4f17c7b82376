"""What benchmarks are made of: intervals, reports, callers and servers."""

from __future__ import annotations

import http.server
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from benchmarks import harness, load
from benchmarks.harness import Check, bar_chart, conclude, environment, int8_check, interval
from benchmarks.processes import Server, on_cpus
from tests.core.small_artifact import manifest


class Echo(http.server.BaseHTTPRequestHandler):
    """Answers a JSON number with itself, and a negative one with 500."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(500 if json.loads(body) < 0 else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name there
        pass


@pytest.fixture
def port() -> Iterator[int]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Echo) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def test_answers_come_back_in_order_whoever_asked(port: int) -> None:
    bodies = [str(number).encode() for number in range(100)]
    figures, contents = load.send(port, "/", bodies, concurrency=7)
    assert contents == bodies
    assert 0 < figures.p50_ms <= figures.p95_ms
    assert figures.requests_per_second > 0


def test_a_request_that_fails_ends_the_round(port: int) -> None:
    with pytest.raises(RuntimeError, match="answered 500"):
        load.send(port, "/", [b"1", b"-1", b"2"], concurrency=2)


def test_an_interval_holds_the_median_and_excludes_what_no_round_showed() -> None:
    found = interval([1.2, 1.3, 1.25, 1.28, 1.22])
    assert found.median == 1.25
    assert 1.2 <= found.low <= found.median <= found.high <= 1.3


@pytest.mark.parametrize(("holds", "status"), [(True, 0), (False, 1)])
def test_a_check_that_fails_is_the_exit_status(tmp_path: Path, holds: bool, status: int) -> None:
    checks = [Check("always", 1.0, "> 0", holds=True), Check("sometimes", 2.0, "> 1", holds=holds)]
    facts = environment(1, ["numpy"])
    assert conclude("example", tmp_path, facts, [{"server": "a"}], checks, rounds=3) == status
    written = json.loads((tmp_path / "example.json").read_text())
    assert written["checks"][1] == {
        "name": "sometimes",
        "value": 2.0,
        "goal": "> 1",
        "holds": holds,
    }
    assert written["environment"]["threads"] == 1
    assert set(written["environment"]["versions"]) == {"lrai", "numpy"}
    assert len(written["environment"]["load_average"]) == 3
    assert written["environment"]["huge_pages"]
    assert written["rounds"] == 3


def git(*words: str) -> str:
    command = ["git", *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize(("changed", "mark"), [(False, ""), (True, "+")])
def test_the_commit_is_written_and_whether_it_is_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: bool, mark: str
) -> None:
    monkeypatch.setattr(harness, "__file__", str(tmp_path / "benchmarks" / "harness.py"))
    (tmp_path / "benchmarks").mkdir()
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert environment(1, [])["commit"] == ""
    (file := tmp_path / "benchmarks" / "harness.py").touch()
    of = ("-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b")
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        git(*of, *words)
    file.write_text("pass" * changed)
    assert environment(1, [])["commit"] == git(*of, "rev-parse", "HEAD") + mark


def test_a_chart_is_a_picture(tmp_path: Path) -> None:
    path = tmp_path / "charts" / "bars.png"
    bar_chart(path, "title", ["1", "8"], {"speed": {"a": [1, 2], "b": [2, 3]}}, "note")
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.server
def test_a_server_is_pinned_measured_and_ended_with_its_children(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import http.server, subprocess, sys\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "http.server.HTTPServer(('127.0.0.1', int(sys.argv[1])),"
        " http.server.SimpleHTTPRequestHandler).serve_forever()\n"
    )
    command = [sys.executable, str(program), "{port}"]
    cpu = min(os.sched_getaffinity(0))
    with Server(command, tmp_path / "log", cpus=[cpu]) as server:
        server.wait_until_ready("/")
        pids = server.processes()
        assert len(pids) == 2
        for pid in pids:
            status = Path(f"/proc/{pid}/status").read_text()
            assert f"Cpus_allowed_list:\t{cpu}\n" in status
        assert server.memory_bytes() > 1 << 20
        assert server.stop(grace_seconds=3) == pids[1:]  # the child had not been told
    assert state(pids[1]) == "Z"


@pytest.mark.server
def test_who_is_put_on_one_cpu_does_not_hand_that_down_to_servers(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import os; raise SystemExit(str(os.sched_getaffinity(0)))"]
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        with (
            Server(command, tmp_path / "log") as server,
            pytest.raises(RuntimeError, match=re.escape(f"{before}")),
        ):
            server.wait_until_ready("/")
        with on_cpus():
            assert os.sched_getaffinity(0) == before
        assert os.sched_getaffinity(0) == {min(before)}
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.server
def test_a_server_that_ends_shows_its_log(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such model')"]
    with (
        Server(command, tmp_path / "log") as server,
        pytest.raises(RuntimeError, match="no such model"),
    ):
        server.wait_until_ready("/")


def state(pid: int) -> str:
    """Return what a process does; one that is gone is as dead as one that was not reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def test_fp32_is_not_taken_for_int8() -> None:
    made = manifest()
    smooth = msgspec.structs.replace(made.variants[0], id="int8-smooth-50")
    several = msgspec.structs.replace(made, variants=(*made.variants, smooth))
    found = {
        chosen: int8_check(msgspec.structs.replace(several, chosen=chosen)).holds
        for chosen in ("int8-smooth-50", "fp32")
    }
    assert found == {"int8-smooth-50": True, "fp32": False}
