from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from lrai_shared.turns import unhurried, wait_for_turns


def seen_by_a_thread_of(policy: int) -> list[int]:
    """Return the policies of a thread, of one that it starts unhurried, and its own afterwards."""
    seen: list[int] = []

    def note() -> None:
        seen.append(os.sched_getscheduler(0))

    def run() -> None:
        os.sched_setscheduler(0, policy, os.sched_param(0))
        note()
        with unhurried():
            started = threading.Thread(target=note)
            started.start()
        started.join()
        note()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return seen


def test_who_starts_a_thread_that_waits_for_its_turn_does_not_wait() -> None:
    usual, waits = os.SCHED_OTHER, os.SCHED_BATCH
    assert seen_by_a_thread_of(usual) == [usual, waits, usual]


@pytest.mark.parametrize("chosen", [os.SCHED_BATCH, os.SCHED_IDLE])
def test_a_policy_that_somebody_chose_stays(chosen: int) -> None:
    assert seen_by_a_thread_of(chosen) == [chosen] * 3


def test_where_no_descriptor_is_left_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    def iterdir(_: Path) -> object:
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr(Path, "iterdir", iterdir)
    assert not wait_for_turns(wait=True)
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


def test_a_sandbox_that_knows_of_one_policy_only_is_no_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(*_: object) -> object:
        raise OSError(errno.ENOSYS, "function not implemented")

    monkeypatch.setattr(os, "sched_getscheduler", refused)
    monkeypatch.setattr(os, "sched_setscheduler", refused)
    with unhurried():
        pass
    assert not wait_for_turns(wait=True), "a tick of who waits would only cost"
