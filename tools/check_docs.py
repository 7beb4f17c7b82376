"""Check what the pages say: relative links lead somewhere, and `lrai` commands exist.

Commands of the README and of the hosts' pages.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)")
COMMAND = re.compile(r"(?:^(?:\$ )?|`)(lrai [^`\n]*)", re.MULTILINE)
GUIDES = list(ROOT.glob("adapters/*/README.md"))
WORD = re.compile(r"[a-z][a-z-]*")


def main() -> int:
    """Print each fault; return 1 when there is one."""
    faults = [
        f"{page.relative_to(ROOT)}: nothing at {target}"
        for page in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *GUIDES])
        for target in LINK.findall(page.read_text())
        if not (page.parent / target).exists()
    ]
    commands = sorted(
        {
            (str(page.relative_to(ROOT)), command)
            for page in (ROOT / "README.md", *GUIDES)
            for command in COMMAND.findall(page.read_text())
        }
    )
    faults += [f"{page}: {fault}" for page, command in commands for fault in check(command)]
    for fault in faults:
        print(fault)
    print(f"{len(commands)} commands looked up, {len(faults)} faults")
    return 1 if faults else 0


def check(command: str) -> list[str]:
    """Return what is wrong with `command`, by asking for the help of the words it starts with."""
    words = []
    command = re.split(r" -- | lrai ", command)[0]  # what follows is another program's
    for word in command.split()[1:]:
        if not WORD.fullmatch(word):
            break
        words.append(word)
    lrai = Path(sys.executable).with_name("lrai")
    done = subprocess.run(
        [lrai, *words, "--help"],
        capture_output=True,
        text=True,
        env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"},
        check=False,
    )
    if done.returncode != 0:
        return [f"no such command: {command}"]
    options = re.findall(r"(?<=\s)--[a-z][a-z-]*", command)
    return [f"no {option} in: {command}" for option in options if option not in done.stdout]


if __name__ == "__main__":
    sys.exit(main())
