"""Count code lines per package and room, and fail when one is over its budget.

A code line bears a token: blank lines, comments and docstrings are free, so nobody saves on those.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LONG_FILE = 300

WORDS = ("errors", "protocol", "config", "events", "confidence", "fairness")
BUDGETS = {  # paths below the root, without .py; a package or room that is not there yet is skipped
    "core": (5000, ["lrai_core"]),
    "core: words": (680, [f"lrai_core/{name}" for name in WORDS]),
    "core: artifact": (380, ["lrai_core/artifact", "lrai_core/executor"]),
    "core: wire": (315, ["lrai_core/wire"]),
    "core: engine": (260, ["lrai_core/engine"]),
    "core: compiler": (1130, ["lrai_core/compiler"]),
    "core: verifier": (540, ["lrai_core/verifier"]),
    "core: scheduler": (880, ["lrai_core/scheduler"]),
    "core: actor": (350, ["lrai_core/actor"]),
    "core: runtime": (615, ["lrai_core/runtime"]),
    "core: cli": (40, ["lrai_core/cli"]),
    "engines": (2598, ["lrai_engines"]),
    "prover": (2300, ["lrai_prover"]),
    "monitor": (1400, ["lrai_monitor"]),
    "report": (2634, ["lrai_report"]),
    "import": (2769, ["lrai_import"]),
    "shared": (1395, ["lrai_shared"]),
    "deployments": (2058, ["lrai_deployments"]),
    "journal": (400, ["lrai_journal"]),
    "codecs": (877, ["lrai_codecs"]),
    "wheel": (120, ["lrai_wheel"]),
}
ADAPTER_BUDGET = 400  # what the host loads
COMMANDS_BUDGET = 750  # an adapter's commands/ folder

COLUMNS = "{:<22}{:>6}{:>7}{:>7}{:>8}{:>6}"

NOT_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table."""

    name: str
    files: int
    code: int
    raw: int
    budget: int

    def __str__(self) -> str:
        """Return the row in the table's columns."""
        used = f"{self.code / self.budget:.0%}"
        return COLUMNS.format(self.name, self.files, self.code, self.raw, self.budget, used)


def main() -> int:
    """Print the table; return 1 when a budget is exceeded."""
    rows = list(table(ROOT))
    print(COLUMNS.format("package", "files", "code", "raw", "budget", "used"))
    for row in rows:
        print(row)
    for path in sorted([*ROOT.glob("lrai_*/**/*.py"), *ROOT.glob("adapters/**/*.py")]):
        if (lines := count(path)) > LONG_FILE:
            print(f"long file: {path.relative_to(ROOT)} has {lines} code lines")
    over = [row for row in rows if row.code > row.budget]
    for row in over:
        print(f"over budget: {row.name} has {row.code} code lines, {row.budget} allowed")
    return 1 if over else 0


def table(root: Path) -> Iterator[Row]:
    """Yield a row per package or room that has files."""
    for name, (budget, places) in BUDGETS.items():
        files = [path for place in places for path in sources(root / place)]
        if files:
            yield measure(name, files, budget)
    for host in sorted(root.glob("adapters/*/lrai_*")):
        commands = sources(host / "commands")
        loaded = [path for path in sources(host) if path not in commands]
        yield measure(f"adapter: {host.parent.name}", loaded, ADAPTER_BUDGET)
        if commands:
            yield measure(f"adapter: {host.parent.name} cmd", commands, COMMANDS_BUDGET)


def sources(place: Path) -> list[Path]:
    """Return the module at `place`, or all modules below it, or nothing."""
    module = place.with_suffix(".py")
    return [module] if module.is_file() else sorted(place.rglob("*.py"))


def measure(name: str, files: list[Path], budget: int) -> Row:
    """Return the row for `files`."""
    raw = sum(len(path.read_text().splitlines()) for path in files)
    code = sum(count(path) for path in files)
    return Row(name=name, files=len(files), code=code, raw=raw, budget=budget)


def count(path: Path) -> int:
    """Return how many lines of `path` bear a token outside comments and docstrings."""
    text = path.read_text()
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NOT_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if ast.get_docstring(node) is not None and first is not None:
                lines.difference_update(range(first.lineno, (first.end_lineno or 0) + 1))
    return len(lines)


if __name__ == "__main__":
    sys.exit(main())
