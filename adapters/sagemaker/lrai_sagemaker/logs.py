"""What happens, on standard error, in UTC, a line each; the platform keeps it."""

from __future__ import annotations

import logging
import time
from typing import Final

log: Final = logging.getLogger("lrai.sagemaker")
_LINE: Final = "%(asctime)sZ %(levelname)s %(name)s[%(process)d] %(message)s"


def set_up_log(level: str) -> None:
    """Write to standard error what is at least of that level."""
    logging.Formatter.converter = time.gmtime
    logging.basicConfig(format=_LINE, datefmt="%Y-%m-%dT%H:%M:%S", level=level.upper())
    logging.getLogger("uvicorn").setLevel(logging.WARNING)


def one_line(text: object) -> str:
    """Return what `text` says, fit for a line."""
    words = " ".join(str(text).split())[:2000]
    return "".join(c if c.isprintable() else "?" for c in words)
