"""Check an installed wheel: the modules named come from it, and `lrai` starts."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path


def main(modules: list[str]) -> int:
    """Import `modules` and run `lrai --help`; any fault is an exception."""
    for name in modules:
        where = Path(str(importlib.import_module(name).__file__))
        if not where.is_relative_to(sys.prefix):
            raise RuntimeError(f"{name} came from {where}, not from the wheel")
    lrai = Path(sys.executable).with_name("lrai")
    subprocess.run([lrai, "--help"], check=True, capture_output=True)
    print(f"wheel works: {', '.join(modules)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
