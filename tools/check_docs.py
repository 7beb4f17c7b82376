"""Check what the pages say: relative links lead to a file and a heading, `lrai` commands exist.

Commands of the README, of the pages below `docs/` and of the hosts' pages; not of decisions, which
tell of what was.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]*))?")
HEADING = re.compile(r"^#+ +(.*)$", re.MULTILINE)
CODE = re.compile(r"^ *```.*?^ *```", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(r"(?:^(?:\$ )?|`)(lrai [^`\n]*)", re.MULTILINE)
GUIDES = [*ROOT.glob("adapters/*/README.md"), *ROOT.glob("docs/*.md")]
WORD = re.compile(r"[a-z][a-z-]*")


def main() -> int:
    """Print each fault; return 1 when there is one."""
    pages = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *GUIDES})
    faults = [
        f"{page.relative_to(ROOT)}: nothing at {target}{'#' * bool(place)}{place}"
        for page in pages
        for target, place in LINK.findall(page.read_text())
        if not is_there(page.parent / target if target else page, place)
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


def is_there(target: Path, place: str) -> bool:
    """Return whether a link leads to a file or folder and, if it names one, to a heading of it."""
    if not (place and target.suffix == ".md"):
        return target.exists()
    text = CODE.sub("", target.read_text()) if target.exists() else ""
    return place in {slug(title) for title in HEADING.findall(text)}


def slug(title: str) -> str:
    """Return the anchor that a heading has on the web."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


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
