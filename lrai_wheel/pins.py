"""The versions that are installed here, to have the same ones elsewhere."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version


def pins(extra: str) -> list[str]:
    """Return `name==version` for every package that lrai and an extra of it bring here.

    lrai itself is left out, and a version that no index has, such as 2.1.0+cpu.
    """
    found: dict[str, str] = {}
    wanted, seen = [("lrai", frozenset({extra}))], set()
    while wanted:
        name, extras = wanted.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            here = distribution(name)
        except PackageNotFoundError:
            continue
        found[name] = here.version
        for line in here.requires or ():
            requirement = Requirement(line)
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": e}) for e in extras or {""}):
                wanted.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    return sorted(
        f"{name}=={version}"
        for name, version in found.items()
        if name != "lrai" and Version(version).local is None
    )
