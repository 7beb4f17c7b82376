"""The versions that run here, of what lrai brings: constraints for where its wheel is installed."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution, version

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version


def pins(*extras: str) -> list[str]:
    """Return a pin for every package that lrai and these extras of it bring here.

    A version that no index has, such as 2.1.0+cpu, is left out.
    """
    found: dict[str, str] = {}
    wanted = [("lrai", frozenset(extras))]
    seen = set()
    while wanted:
        name, asked = wanted.pop()
        here = installed_version(name)
        if (name, asked) in seen or not here:
            continue
        seen.add((name, asked))
        found[name] = here
        for line in distribution(name).requires or ():
            requirement = Requirement(line)
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": e}) for e in asked or {""}):
                wanted.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    return sorted(
        f"{name}=={here}"
        for name, here in found.items()
        if name != "lrai" and Version(here).local is None
    )


def installed_version(name: str) -> str:
    """Return the version of a package that is installed here, empty where it is not."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
