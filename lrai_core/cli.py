"""The command line: finds the command that is asked for, and says what became of it.

Exit codes: 0 ok, 1 bug, 2 usage, 3 condition not met, 4 bad input file, 5 environment, 130 Ctrl-C.
"""

from __future__ import annotations

import errno
import signal
import sys
from importlib.metadata import entry_points

from rich.console import Console

from lrai_core.errors import LraiError, shorten


def main() -> None:
    """Run the command line; it exits where something is wrong."""
    for number in (signal.SIGTERM, signal.SIGHUP):  # clean up like Ctrl-C, but under nohup
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    error_console = Console(stderr=True, soft_wrap=True, markup=False, highlight=False, emoji=False)
    try:
        commands = entry_points(group="lrai.commands")  # functions of the arguments
        named = bool(sys.argv[1:]) and sys.argv[1] in commands.names
        commands[sys.argv[1] if named else "help"].load()(sys.argv[1 + named :])
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
