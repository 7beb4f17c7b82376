"""`lrai help`: which commands there are, and what each does."""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, entry_points, version
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import typer

from lrai_report.terminal import out

app: Final = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def lrai() -> None:
    """Make the model that you already serve faster, and say how far off it can be.

    Start with `lrai compile`; `lrai COMMAND --help` explains a command.
    Exit status: 0 done, 1 a bug, 2 wrong arguments, 3 the answer is no,
    4 a file that cannot be used, 5 the machine stands in the way.
    `lrai --version` says which version this is.
    """


def main(arguments: Sequence[str]) -> None:
    """Show them, or the help of the one that is named; or refuse what is none."""
    if list(arguments) == ["--version"]:
        out.print(f"lrai {version('lrai')}")
        return
    for entry in sorted(entry_points(group="lrai.commands")):
        app.command(entry.name, help=_about(entry))(_help_of(entry))
    app(args=list(arguments), prog_name="lrai")


def _help_of(command: EntryPoint) -> Callable[[], None]:
    def show() -> None:
        command.load()(["--help"])

    return show


def _about(command: EntryPoint) -> str:
    """Return what a command's function or file says of it first, without running it.

    Loading all of them takes seconds: adapters import their hosts.
    """
    package, *names = command.module.split(".")
    spec = find_spec(package)  # of the package alone: what lies above a module would be run
    path = Path(spec.origin if spec and spec.origin else "").parent.joinpath(*names)
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    module = ast.parse(file.read_text())
    functions = [node for node in module.body if isinstance(node, ast.FunctionDef)]
    docs = [ast.get_docstring(node) for node in functions if node.name == command.attr]
    docs.append(ast.get_docstring(module))
    said = [(text or "").partition("\n\n")[0].partition(": ") for text in docs]
    return next((words[:1].upper() + words[1:] for _, _, words in said if words), "")
