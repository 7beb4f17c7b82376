"""A task runs in a child, and whatever becomes of the child is told in a sentence."""

from __future__ import annotations

import importlib
import os
import resource
import sys
from pathlib import Path
from typing import Any

import pytest

from lrai_core.errors import CompileError, EnvironmentProblem
from lrai_core.executor import TaskError, find_task, limit_memory, run_task

TASKS = '''
import os, signal, time
from subprocess import run
from lrai_core.errors import CompileError

def lengths(words: list[str]) -> dict[str, int]:
    print("libraries print", flush=True)
    os.write(1, b"and write")
    return {word: len(word) for word in words}

def refuse(name: str) -> int:
    class Local(CompileError):
        """Known to the child only."""
    raise Local(f"no {name} here")

def fail(name: str) -> int:
    raise KeyError(name)

def die(number: int) -> int:
    os.kill(os.getpid(), number)
    return number

def allocate(size: int) -> int:
    return len(bytearray(size))

def wait(seconds: float) -> float:
    time.sleep(seconds)
    return seconds

def _private(number: int) -> int:
    return number

class Thing:
    pass
'''


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a module of functions in an lrai package that children find, too."""
    (tmp_path / "lrai_example").mkdir()
    (tmp_path / "lrai_example" / "tasks.py").write_text(TASKS)
    path = [str(tmp_path), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, path)))
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("lrai_example", "lrai_example.tasks"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("lrai_example.tasks")


def run(function: Any, argument: Any, *, timeout_seconds: float = 60) -> Any:
    return run_task(function, argument, memory_bytes=2 << 30, timeout_seconds=timeout_seconds)


def test_a_task_gives_what_the_function_returns_whatever_it_prints(tasks: Any) -> None:
    assert run(tasks.lengths, ["a", "bc"]) == {"a": 1, "bc": 2}


def test_an_error_of_ours_arrives_as_the_nearest_that_everybody_knows(tasks: Any) -> None:
    with pytest.raises(CompileError, match=r"^no file here$") as caught:
        run(tasks.refuse, "file")
    assert type(caught.value) is CompileError


def test_another_error_is_told_by_its_last_line(tasks: Any) -> None:
    with pytest.raises(TaskError, match="process failed: KeyError: 'x'"):
        run(tasks.fail, "x")


def test_a_killed_child_is_told_with_its_signal(tasks: Any) -> None:
    with pytest.raises(TaskError, match=r"killed \(signal 11\)"):
        run(tasks.die, 11)


def test_more_memory_than_allowed_is_refused(tasks: Any) -> None:
    assert run(tasks.allocate, 1 << 20) == 1 << 20
    with pytest.raises(TaskError, match="MemoryError"):
        run(tasks.allocate, 4 << 30)


@pytest.mark.parametrize(("hard", "limit"), [(-1, 10), (7, 7), (20, 10)])
def test_a_limit_of_the_machine_stays_and_is_not_exceeded(
    monkeypatch: pytest.MonkeyPatch, hard: int, limit: int
) -> None:
    """Nobody but root may raise it, as where `ulimit -v` is set."""
    found = list[tuple[int, int]]()
    monkeypatch.setattr(resource, "getrlimit", lambda _: (5, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, both: found.append(both))
    limit_memory(10)
    assert found == [(limit, hard)]


def test_a_child_that_takes_too_long_is_killed(tasks: Any) -> None:
    with pytest.raises(TaskError, match=r"over 0\.5 s"):
        run(tasks.wait, 60.0, timeout_seconds=0.5)


def test_an_argument_of_the_wrong_type_fails_in_the_child(tasks: Any) -> None:
    with pytest.raises(TaskError, match="Expected `int`, got `str`"):
        run(tasks.allocate, "much")


def test_no_interpreter_is_a_problem_of_the_machine(
    tasks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(EnvironmentProblem, match="cannot be started: No such file"):
        run(tasks.allocate, 1)


@pytest.mark.parametrize(
    "task",
    [
        "os:system",
        "subprocess:run",
        "lrai_example.tasks:run",
        "lrai_example.tasks:_private",
        "lrai_example.tasks:Thing",
        "lrai_example.tasks:absent",
        "lrai_example.tasks:os.system",
        "lrai_example.tasks",
    ],
)
def test_only_public_functions_of_lrai_packages_are_tasks(tasks: Any, task: str) -> None:
    with pytest.raises(ValueError, match="no public function of an lrai package"):
        find_task(task)
    assert find_task("lrai_example.tasks:die") is tasks.die


def test_a_child_that_lies_about_its_error_chooses_none(
    tasks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = rb"\203\246result\300\245error\247shorten\247message\242no"
    liar = tmp_path / "python"
    liar.write_bytes(b"#!/bin/sh\nprintf '" + answer + b"'\n")
    liar.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(liar))
    with pytest.raises(TaskError, match="process failed: no"):
        run(tasks.allocate, 1)
