"""What the benchmark of the hosts' faults makes of what is said of them, on ledgers made here."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from benchmarks.hosts_faults import HELD, HELD_SECONDS, Entry, Told, checks, told
from benchmarks.hosts_servers import BENTO, MLFLOW

FAULT, END = 5.0, 20.0
KILL_SECONDS = 0.5  # until somebody is answered again


def ledger(silent_seconds: float, unready_until: float) -> tuple[list[float], list[Entry]]:
    """Return when somebody was answered, with a silence from the fault on, and what was said."""
    answers = np.arange(0, END, 0.02)
    quiet = (answers > FAULT) & (answers < FAULT + silent_seconds)
    probes = [
        Entry(at, at + 0.002, 503 if FAULT + 0.05 < at < unready_until else 200)
        for at in np.arange(0, END, 0.052).tolist()
    ]
    return answers[~quiet].tolist(), probes


@pytest.mark.parametrize("silent_seconds", [KILL_SECONDS, HELD_SECONDS])
def test_a_host_that_is_always_called_ready_is_found_out(silent_seconds: float) -> None:
    answers, probes = ledger(silent_seconds, 0)
    assert told(answers, probes, [FAULT]) == Told(silences=1, in_vain=1, late=0)


@pytest.mark.parametrize("silent_seconds", [KILL_SECONDS, HELD_SECONDS])
def test_a_host_that_is_ready_a_call_before_its_first_answer_is_believed(
    silent_seconds: float,
) -> None:
    answers, probes = ledger(silent_seconds, FAULT + silent_seconds - 0.1)
    assert told(answers, probes, [FAULT]) == Told(silences=1, in_vain=0, late=0)


@pytest.mark.parametrize(("unready_until", "late"), [(6.4, 0), (6.6, 1), (END, 1)])
def test_a_host_that_is_not_ready_again_soon_is_found_out(unready_until: float, late: int) -> None:
    answers, probes = ledger(KILL_SECONDS, unready_until)
    assert told(answers, probes, [FAULT]) == Told(silences=1, in_vain=0, late=late)


def test_who_waits_for_a_reply_was_told_nothing() -> None:
    answers, probes = ledger(KILL_SECONDS, 0)
    back = FAULT + KILL_SECONDS
    others = [probe for probe in probes if not FAULT < probe.begun < back]
    waited = Entry(FAULT + 0.15, back - 0.01, 200)
    assert told(answers, [*others, waited], [FAULT]) == Told(silences=0, in_vain=0, late=0)


@pytest.mark.parametrize(("silent_seconds", "found"), [(KILL_SECONDS, 0), (2.0, 1)])
def test_a_silence_without_a_fault_counts_where_it_is_long(
    silent_seconds: float, found: int
) -> None:
    answers, probes = ledger(silent_seconds, 0)
    assert told(answers, probes, []) == Told(silences=found, in_vain=found, late=0)


@pytest.mark.parametrize("host", [MLFLOW, BENTO])
@pytest.mark.parametrize(
    ("fault", "ready", "failures"),
    [
        (HELD, Told(1, 0, 0), 0),
        (HELD, Told(1, 1, 0), 1),
        (HELD, Told(0, 0, 0), 1),  # nobody has asked: that shows nothing
        ("actor killed", Told(0, 0, 0), 0),
        ("actor killed", Told(1, 1, 1), 2),
    ],
)
def test_what_was_said_in_vain_or_too_late_is_a_failure(
    host: str, fault: str, ready: Told, failures: int
) -> None:
    counts = dict.fromkeys(("silent", "broken", "refused", "not_ready_later"), 0)
    row: dict[str, Any] = {"host": host, "fault": fault, "times": 1, "back_s": [0.5], **counts}
    row |= {"whole_s": [1.0], "ready": ready._asdict(), "asked_later": 9, "cosines": [1.0]}
    assert sum(not check.holds for check in checks([row])) == failures
