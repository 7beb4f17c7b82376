"""The versions that run here, of what lrai brings: constraints for where its wheel is installed."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution, version

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from lrai_core import Artifact

# Of onnxruntime-extensions, one of which every graph has of a model that takes text. Its
# domain stands in every graph that was optimised in a process which had registered it.
_OPERATORS = (b"BertTokenizer", b"GPT2Tokenizer", b"SentencepieceTokenizer")


def extras_of(artifact: Artifact) -> dict[str, str]:
    """Return the extras of lrai that an artifact needs, each with the package that it brings."""
    found = {engine: engine for engine in artifact.engines}
    graph = artifact.manifest.source.file or artifact.manifest.variants[0].model  # if it is slim
    content = artifact.file(graph).read_bytes()
    if any(operator in content for operator in _OPERATORS):
        found["text"] = "onnxruntime-extensions"
    return found


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
