"""What the workers benchmark concludes from its rounds, and the processes that benchmarks start."""

from __future__ import annotations

import os
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest

from benchmarks.host import Helper, Host, held
from benchmarks.workers import EACH, ONE, Round, Side, agreement, checks_of, compare
from tests.integration.test_runtime_faults import wait_until


def sides(*pairs: tuple[Round, Round]) -> list[Side]:
    with Host() as host:
        one, each = Side(ONE, host, []), Side(EACH, host, [])
    if pairs:
        one.rounds, each.rounds = map(list, zip(*pairs, strict=True))
    return [one, each]


def test_ratios_are_taken_within_rounds() -> None:
    found = compare(
        sides(
            (Round(100, 4, 10), Round(50, 2, 20)),
            (Round(1_000, 8, 1), Round(500, 4, 2)),  # a round on a faster machine
        )
    )
    assert {name: value.median for name, value in found[ONE].items()} == {
        "requests_per_second": 2,
        "rows_per_call": 2,
        "p95_ms": 0.5,
    }


@pytest.mark.parametrize(
    ("speed", "rows", "holds"), [(1.0, 2.0, [True, True]), (0.9, 1.0, [False, False])]
)
def test_more_rows_per_call_and_not_behind_is_what_has_to_hold(
    speed: float, rows: float, holds: list[bool]
) -> None:
    ratios = compare(sides(*[(Round(100 * speed, 2 * rows, 10), Round(100, 2, 10))] * 5))
    assert [check.holds for check in checks_of("fp32", ratios)] == holds


def test_answers_of_all_sides_are_compared_by_worker_and_request() -> None:
    one, each = sides()
    each.answers = [{index: np.eye(50)[[at + index]] for index in range(40)} for at in (0, 5)]
    one.answers = [dict(answers) for answers in each.answers]
    del one.answers[0][3]  # whom nobody has asked there
    assert [check.holds for check in agreement("fp32", [one, each])] == [True, True]
    one.answers.reverse()
    assert [check.holds for check in agreement("fp32", [one, each])] == [False, False]


def echo(line: Connection, first: int) -> None:
    line.send(first)
    while True:
        (number,) = line.recv()
        line.send(1 / number)


@pytest.mark.server
def test_a_process_is_asked_fails_with_its_reason_and_is_ended() -> None:
    with Helper(echo, 7) as process, Helper(echo, 8) as other:
        assert process.hear() == 7
        assert process.ask(4) == 0.25
        assert held(process.pid).pss_bytes > 1 << 20
        assert held(process.pid).own_bytes > 0
        assert held(process.pid).descriptors > 2
        with pytest.raises(RuntimeError, match="division by zero"):
            process.ask(0)
        with pytest.raises(RuntimeError, match="has ended"):
            process.hear()
        assert other.hear() == 8
        with pytest.raises(RuntimeError, match="said nothing"):
            other.hear(0.01)
    assert process.wait(0)
    assert other.wait(0)
    assert held(process.pid).pss_bytes == 0


@pytest.mark.server
def test_a_host_finds_its_own_processes_and_ends_them() -> None:
    sleep = "import time; time.sleep(60)"
    with Host() as host:
        ours, theirs = (
            subprocess.Popen([sys.executable, "-c", sleep, "lrai_shared.daemon", folder, "end"])
            for folder in (host.address, "/nobody/d")
        )
        actor = subprocess.Popen(
            [sys.executable, "-c", sleep, "lrai_core.actor.actor", f"ipc://{host.folder}/x/actors"]
        )
        try:
            wait_until(lambda: host.daemons() == [ours.pid])  # an exec has no command line at first
            wait_until(lambda: host.actors() == [actor.pid])
            assert host.config.runtime.socket_dir == str(host.folder)
            actor.kill()
            actor.wait()
            host.close()
            assert ours.wait(5) != 0
            assert theirs.poll() is None
            assert not Path(host.folder).exists()
            assert os.getpid() not in host.daemons()
        finally:
            for process in (ours, theirs, actor):
                process.kill()
                process.wait()
