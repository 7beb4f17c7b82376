"""The command line: finds the commands of all packages, and says what became of one.

Exit codes: 0 ok, 1 bug, 2 usage, 3 condition not met, 4 bad input file, 5 environment, 130 Ctrl-C.
"""

from __future__ import annotations

import ast
import errno
import signal
import sys
from importlib.metadata import EntryPoint, entry_points, version
from importlib.util import find_spec
from pathlib import Path

import typer
from rich.console import Console

from lrai_core.errors import LraiError, shorten

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def lrai() -> None:
    """Make the model that you already serve faster, and say how far off it can be.

    Start with `lrai compile`; `lrai COMMAND --help` explains a command.
    Exit status: 0 done, 1 a bug, 2 wrong arguments, 3 the answer is no,
    4 a file that cannot be used, 5 the machine stands in the way.
    `lrai --version` says which version this is.
    """


def main() -> None:
    """Run the command line; it exits where something is wrong."""
    for number in (signal.SIGTERM, signal.SIGHUP):  # clean up like Ctrl-C, but under nohup
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    error_console = Console(stderr=True, soft_wrap=True, markup=False, highlight=False, emoji=False)
    try:
        # Functions of the arguments.
        found = {entry.name: entry for entry in entry_points(group="lrai.commands")}
        if sys.argv[1:2] and sys.argv[1] in found:
            found[sys.argv[1]].load()(sys.argv[2:])
        elif sys.argv[1:] == ["--version"]:
            Console(highlight=False).print(f"lrai {version('lrai')}")
        else:
            for name in sorted(found):  # for the help alone
                app.command(name, help=_about(found[name]))(lambda: None)
            app()
    except (LraiError, OSError) as error:
        kind = getattr(error, "errno", 0)
        if kind not in (0, errno.ENAMETOOLONG, errno.ENOSPC, errno.EDQUOT):
            raise
        most = "; a name has 255 bytes at most, a path 4095" * (kind == errno.ENAMETOOLONG)
        error_console.print(shorten(f"lrai: {error}", 2000) + most, style="red")
        sys.stdout = sys.stderr  # what it could not write it would try to as Python ends
        sys.exit(getattr(error, "exit_code", 5))
    except (SystemExit, KeyboardInterrupt) as end:
        code = getattr(end, "code", 130)
        if code == 130:  # Ctrl-C
            error_console.print("lrai: interrupted")
        sys.exit(code)


def _about(command: EntryPoint) -> str:
    """Return what a command's function or file says of it first, without running it."""
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
