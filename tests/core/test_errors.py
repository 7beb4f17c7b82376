from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrai_core import errors
from lrai_core.errors import InvalidTensor, LraiError, QueueFull, shorten

CLASSES = {
    name: found
    for name, found in vars(errors).items()
    if isinstance(found, type) and issubclass(found, LraiError)
}


def drawn() -> dict[str, tuple[str, str]]:
    """Return parent and remark of every error in the module's drawing."""
    found: dict[str, tuple[str, str]] = {}
    above: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        entry = re.match(r"( *)[*+.-] (\w+) +(.*)", line)
        if entry:
            above = [(depth, name) for depth, name in above if depth < len(entry[1])]
            found[entry[2]] = (above[-1][1] if above else "Exception", entry[3])
            above.append((len(entry[1]), entry[2]))
    return found


def test_the_drawn_tree_is_the_tree_in_the_code() -> None:
    parents = {name: found.__bases__[0].__name__ for name, found in CLASSES.items()}
    assert {name: parent for name, (parent, _) in drawn().items()} == parents


def test_the_drawn_statuses_and_exit_codes_are_those_in_the_code() -> None:
    for name, (_, remark) in drawn().items():
        status, code = re.match(r"\d{3}", remark), re.search(r"exit (\d)", remark)
        assert status or code, name
        assert not status or CLASSES[name].http_status == int(status[0]), name
        assert not code or CLASSES[name].exit_code == int(code[1]), name


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("RequestError", 400),
        ("InvalidTensor", 400),
        ("ModelNotFound", 404),
        ("QueueFull", 429),
        ("NotReady", 503),
        ("ActorError", 503),
        ("PoisonRequest", 500),
        ("DeadlineExceeded", 504),
    ],
)
def test_hosts_answer_the_statuses_that_the_architecture_promises(name: str, status: int) -> None:
    assert CLASSES[name].http_status == status


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("LraiError", 1),
        ("UsageError", 2),
        ("ConditionNotMet", 3),
        ("CompileError", 4),
        ("CalibrationError", 4),
        ("ArtifactError", 4),
        ("VerificationError", 4),
        ("EnvironmentProblem", 5),
        ("NotReady", 5),
    ],
)
def test_the_command_line_ends_with_the_codes_that_the_architecture_promises(
    name: str, code: int
) -> None:
    assert CLASSES[name].exit_code == code


def test_an_invalid_tensor_names_the_tensor_in_its_message_and_as_data() -> None:
    error = InvalidTensor("tokens", "missing")
    assert error.tensor == "tokens"
    assert str(error) == "tensor 'tokens': missing"


def test_a_full_queue_says_when_to_come_back() -> None:
    error = QueueFull("full", limit=7, retry_after_seconds=0.5)
    assert (error.limit, error.retry_after_seconds) == (7, 0.5)


@pytest.mark.parametrize(
    "name",
    ["a" * (1 << 20), "nul\0in", "line\nbreak", "\x1b[31mred", "half\ud800", "left\u202eright"],
)
def test_a_hostile_tensor_name_leaves_a_short_printable_message(name: str) -> None:
    message = str(InvalidTensor(name, "missing"))
    assert message.isprintable()
    assert len(message) < 160
    assert len(InvalidTensor(name, "missing").tensor) <= 120


@given(st.text(), st.integers(1, 200))
def test_shortened_text_is_printable_and_within_its_limit(text: str, limit: int) -> None:
    short = shorten(text, limit)
    assert len(short) <= limit
    assert short.isprintable()


@given(st.text(st.characters(categories=["L", "N"]), max_size=120))
def test_short_printable_text_stays_as_it_is(text: str) -> None:
    assert shorten(text) == text


def test_who_has_sent_what_kills_is_not_asked_to_send_it_again() -> None:
    assert errors.PoisonRequest("killed").retry_after_seconds is None
    assert errors.ActorError("gone").retry_after_seconds == 1.0
