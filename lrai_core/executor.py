"""Run one of our functions in a child process that may die of its task; or many calls at once.

A task is a function's name and msgspec bytes: nothing else of the parent travels, and only public
functions of lrai packages can be named. Libraries may print: the answer has its own descriptor.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import resource
import subprocess
import sys
import typing
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, TypeVar

import msgspec

from lrai_core import errors
from lrai_core.config import available_cpus
from lrai_core.errors import EnvironmentProblem, LraiError, UnusableFile, shorten

A = TypeVar("A")
R = TypeVar("R")

_TASK: Final = re.compile(r"(lrai_\w+(?:\.\w+)*):([A-Za-z]\w*)")
_CARRIED: Final = (UnusableFile, EnvironmentProblem)  # what the parent raises as the child did


class TaskError(LraiError):
    """The child gave no answer: it was killed, took too long, or failed."""


class _Answer(msgspec.Struct):
    """The result, or the name of an error of ours and its message."""

    result: msgspec.Raw = msgspec.Raw(b"\xc0")  # nil
    error: str = ""
    message: str = ""


def run_task(
    function: Callable[[A], R], argument: A, *, memory_bytes: int, timeout_seconds: float
) -> R:
    """Return `function(argument)`, computed in a child process.

    Args:
        function: Public, of a module of an lrai package; its one parameter and its result are
            annotated with types that msgspec knows.
        argument: Travels as msgspec bytes.
        memory_bytes: See `limit_memory`; the function may set another limit for itself.
        timeout_seconds: After so long the child is killed.

    Raises:
        TaskError: The child gave no answer; says why.
        UnusableFile: The function did.
        EnvironmentProblem: The function did, or no process can be started.
    """
    task = f"{function.__module__}:{function.__name__}"
    command = [sys.executable, "-P", "-m", "lrai_core.executor", task, str(memory_bytes)]
    given = msgspec.msgpack.encode(argument)
    try:
        child = subprocess.run(
            command, input=given, capture_output=True, timeout=timeout_seconds, check=False
        )
    except subprocess.TimeoutExpired:
        raise TaskError(f"its process took over {timeout_seconds:g} s") from None
    except OSError as error:
        raise EnvironmentProblem(f"{sys.executable} cannot be started: {error.strerror}") from None
    if child.returncode < 0:
        raise TaskError(f"its process was killed (signal {-child.returncode})")
    try:
        answer = msgspec.msgpack.decode(child.stdout, type=_Answer)
        if not answer.error:
            returned = typing.get_type_hints(function)["return"]
            return typing.cast("R", msgspec.msgpack.decode(answer.result, type=returned))
    except msgspec.MsgspecError:
        last = child.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise TaskError(f"its process failed: {shorten(' '.join(last), 300)}") from None
    kind = getattr(errors, answer.error, None)
    if isinstance(kind, type) and issubclass(kind, _CARRIED):  # the child may be a liar by now
        raise kind(answer.message)
    raise TaskError(f"its process failed: {shorten(answer.message, 300)}")


def on_all_cpus(function: Callable[[A], R], arguments: Iterable[A], threads: int) -> Iterator[R]:
    """Yield what `function` makes of each argument, in order; many at once, on `threads` CPUs each.

    In threads of this process, so for what runs engines: they let other threads run meanwhile.
    """
    from concurrent.futures import ThreadPoolExecutor  # which actors need not have

    pool = ThreadPoolExecutor(max(1, available_cpus() // threads))
    try:
        yield from pool.map(function, arguments)
    finally:
        pool.shutdown(cancel_futures=True)


def limit_memory(memory_bytes: int) -> None:
    """Keep this process below so much address space, of which libraries reserve more than they use.

    What asks for more memory than that, a constant in a hostile file say, is refused it instead of
    taking the machine's. The limit can be set anew.
    """
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]  # which root alone can raise; -1 is none
    resource.setrlimit(resource.RLIMIT_AS, (min(memory_bytes, hard % (1 << 64)), hard))


def find_task(task: str) -> Callable[[Any], Any]:
    """Return the function that `module:name` names.

    Raises:
        ValueError: It is no public function that a module of an lrai package defines.
    """
    if named := _TASK.fullmatch(task):
        found = getattr(importlib.import_module(named[1]), named[2], None)
        if inspect.isfunction(found) and found.__module__ == named[1]:
            return found
    raise ValueError(f"task {shorten(task)!r} is no public function of an lrai package")


def main(argv: list[str]) -> None:
    """Run the task named first, below the memory named second, on what is read from stdin."""
    answers = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    limit_memory(int(argv[1]))
    function = find_task(argv[0])
    (wanted,) = (kind for name, kind in typing.get_type_hints(function).items() if name != "return")
    argument = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=wanted)
    try:
        answer = _Answer(msgspec.Raw(msgspec.msgpack.encode(function(argument))))
    except _CARRIED as error:
        known = next(kind for kind in type(error).__mro__ if kind.__module__ == errors.__name__)
        answer = _Answer(error=known.__name__, message=str(error))
    os.write(answers, msgspec.msgpack.encode(answer))


if __name__ == "__main__":
    main(sys.argv[1:])
