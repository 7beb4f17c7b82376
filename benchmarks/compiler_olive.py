"""Olive, which wants an environment of its own: a process there makes forms, model after model.

    python -m venv DIR && DIR/bin/pip install olive-ai onnxruntime transformers requests

It is told one JSON list a line, the arguments of its command, and answers each with an object. What
is asked for is made without a network: `olive optimize`, which is to take the place of `auto-opt`,
calibrates int8 with text that it downloads, whatever the model.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

_FORMS: Final = ("fp32", "int8")
_HERE: Final = ("--device", "cpu", "--provider", "CPUExecutionProvider")
_APART: Final = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")  # of this environment, not of that
_QUIET: Final = {"CI": "true", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}  # no telemetry


class Made(NamedTuple):
    """A form that Olive has made of a model, or why it has not."""

    form: str
    file: Path
    seconds: float
    error: str


class Olive:
    """The process. Leaving it as a context ends it."""

    def __init__(self, python: Path, folder: Path) -> None:
        """Start it in a folder, for what it leaves lying about.

        Args:
            python: Of the environment that Olive is installed in.
            folder: Of no worth.

        Raises:
            SystemExit: It is not installed there, or nothing is.
        """
        own = {name: value for name, value in os.environ.items() if name not in _APART}
        try:
            self._process = subprocess.Popen(
                [str(python.absolute()), "-P", str(Path(__file__).resolve())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                cwd=folder,
                env=own | _QUIET,
            )
        except OSError as problem:
            raise SystemExit(f"--olive {python}: {problem.strerror}") from None
        if error := self._ask([])["error"]:
            self._end()
            raise SystemExit(f"--olive {python}: {error}")

    def __enter__(self) -> Self:
        """Return it."""
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        self._end()

    def made(self, source: Path, folder: Path) -> list[Made]:
        """Return what it makes of a model, each in a folder of its own below this one."""
        found = []
        for form in _FORMS:
            out = folder / f"olive-{form}"
            asked = ["auto-opt", "-m", str(source), "-o", str(out), "--precision", form, *_HERE]
            told = self._ask(asked)
            files = sorted(out.rglob("*.onnx"))
            error = told["error"] or ("" if files else "no model came of it")
            found.append(Made(form, files[0] if files else out, told["seconds"], error))
        return found

    def _end(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _ask(self, asked: list[str]) -> dict[str, Any]:
        gone = {"seconds": 0.0, "error": "its process has ended"}
        try:
            self._process.stdin.write(json.dumps(asked) + "\n")  # type: ignore[union-attr] # a pipe
            self._process.stdin.flush()  # type: ignore[union-attr]
            answer = self._process.stdout.readline()  # type: ignore[union-attr]
        except BrokenPipeError:
            return gone
        told: dict[str, Any] = json.loads(answer) if answer else gone
        return told


def main() -> None:
    """Serve standard input, with Olive; what libraries print goes elsewhere."""
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        for line in sys.stdin:
            began, error = time.perf_counter(), ""
            try:
                _do(json.loads(line))
            except (Exception, SystemExit) as failure:  # noqa: BLE001 - edge: who asked is told
                error = " ".join(f"{type(failure).__name__}: {failure}".split())[:200]
            seconds = time.perf_counter() - began
            answers.write(json.dumps({"seconds": seconds, "error": error}) + "\n")
            answers.flush()


def _do(asked: list[str]) -> None:
    from olive.cli import launcher  # type: ignore[import-not-found,unused-ignore] # not of this one

    if asked:
        launcher.main(asked, called_as_console_script=False)


if __name__ == "__main__":
    main()
