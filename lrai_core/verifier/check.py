"""The checker: does a certificate follow from the files, and do the real engines agree with it?

Trusted part: it imports nothing of a prover and recomputes every figure from what it is given.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lrai_core.artifact import Artifact
from lrai_core.confidence import upper_bound
from lrai_core.errors import ConditionNotMet, EngineError, UsageError, VerificationError, shorten
from lrai_core.verifier import verifier
from lrai_core.verifier.certificate import CONFIDENCE, Certificate, certificates, read_certificate
from lrai_core.verifier.sample import Rows
from lrai_core.verifier.spec import round_up

_ALL = 1 << 15  # up to so many draws are all run again;
_FAILURES = 512  # of more a random part, as many, and of the recorded failures so many


class Verdict(NamedTuple):
    """What the checker found.

    Attributes:
        certificate: The id.
        holds: Whether every statement was confirmed.
        confirmed: What was, a line each.
        objections: What was not, a line each.
    """

    certificate: str
    holds: bool
    confirmed: tuple[str, ...]
    objections: tuple[str, ...]


def check(
    certificate: Certificate | str | Path,
    artifact: Artifact | str | Path,
    *,
    source: str | Path | None = None,
    seed: int | None = None,
) -> Verdict:
    """Validate every field of a certificate against the artifact, and run its sample again.

    Args:
        certificate: Or the path of its file.
        artifact: Or its path; either way every file is hashed now.
        source: The original model file, to compare with instead of the artifact's copy of it.
        seed: Of the choice among more draws than are all run again. By default nobody can foresee
            it: who knows it could hide failures from it.

    Raises:
        VerificationError: The certificate cannot be read.
        ArtifactError: The artifact cannot, or the source.
    """
    if not isinstance(certificate, Certificate):
        certificate = read_certificate(Path(certificate))
    artifact = Artifact.open(artifact.path if isinstance(artifact, Artifact) else artifact)
    confirmed: list[str] = []
    try:
        rows = verifier.evaluation(artifact)
        objections = _objections(certificate, artifact, rows)
        if not objections:
            confirmed.append("what it says follows from the artifact's files")
            copy = "the source model is the artifact's own copy; --source checks with the original"
            confirmed += [copy] if source is None else []
            confirmed.append(_rerun(certificate, artifact, rows, source, seed))
    except VerificationError as error:
        objections = [str(error)]
    return Verdict(certificate.id, not objections, tuple(confirmed), tuple(objections))


def require_certificate(
    artifact: Artifact, variant: str, require: Mapping[str, Any]
) -> Certificate:
    """Return a certificate of the variant that meets `require`, and follows from the files.

    Its sample is not run again, and it could have been forged: that is for `check`.

    Args:
        artifact: Opened; its evaluation rows are hashed again, its models are not.
        variant: The variant about to be served.
        require: `tier` and `sampler` (by default `evaluation`): exactly; `epsilon` (by default
            any) and `delta` (0.1): at most; `confidence` (0.95): at least.

    Raises:
        ConditionNotMet: There is none; the message says what there is.
        UsageError: An unknown key, or a value that is no number.
        VerificationError: The evaluation rows cannot be read.
    """
    wanted: dict[str, Any] = {"tier": "STATISTICAL", "epsilon": math.inf, "delta": 0.1}
    wanted |= {"confidence": CONFIDENCE, "sampler": "evaluation"}
    for key, value in require.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if key not in wanted or (isinstance(wanted[key], float) and not number):
            known = "tier, sampler, and the numbers epsilon, delta and confidence"
            raise UsageError(f"require: {shorten(f'{key} is {value!r}')}; known: {known}")
        wanted[key] = value
    rows, found = verifier.evaluation(artifact), certificates(artifact, variant)
    both = (artifact, Artifact.open(artifact.path, verify=False))  # as measured here, and at home
    own = [c for c in found if not all(_objections(c, one, rows) for one in both)]
    for c in own:
        same = (c.tier, c.sampler) == (wanted["tier"], wanted["sampler"])
        close = c.epsilon <= wanted["epsilon"] and c.upper_bound <= wanted["delta"]
        if same and close and c.confidence >= wanted["confidence"]:
            return c
    there = "; ".join(c.statement() for c in own) or "it has none that follows from the files"
    asked = ", ".join(f"{key}={value}" for key, value in require.items()) or "any"
    lacks = f"variant {variant} has no certificate that meets the requirement"
    raise ConditionNotMet(f"{lacks} ({asked}): {there}")


def _objections(c: Certificate, artifact: Artifact, rows: Rows) -> list[str]:
    """Return what the certificate says and would not, were it issued again from the files."""
    try:
        again = verifier.issue(artifact, c, rows, c.failures)
    except (ConditionNotMet, UsageError, VerificationError) as error:
        return [f"it cannot be issued again: {error}"]
    wider = c.upper_bound >= again.upper_bound * (1 - 1e-9)  # is still true
    free = ("issuer", "created", "upper_bound") if wider else ("issuer", "created")
    return [
        f"{name} is {shorten(str(getattr(c, name)))}, {getattr(again, name)} follows from the files"
        for name in Certificate.__struct_fields__
        if getattr(c, name) != getattr(again, name) and name not in free
    ]


def _rerun(
    c: Certificate, artifact: Artifact, rows: Rows, source: str | Path | None, seed: int | None
) -> str:
    """Run all or part of the sample on the real engines and say that each draw came out as stated.

    Raises:
        VerificationError: One did not.
    """
    draws: Sequence[int] = range(c.samples)
    failures, alone = set(c.failures), ""
    if c.samples > _ALL:
        part = np.random.default_rng(seed).choice(c.samples, _ALL, replace=False).tolist()
        draws = sorted({*part, *c.failures[:_FAILURES]})
        shown = upper_bound(len(failures & {*part}), _ALL, 1 - (1 - c.confidence) / c.comparisons)
        alone = f"; by themselves they bound the share by {round_up(shown):g}"
    gaps = verifier.gaps(artifact, c, rows, draws, None if source is None else Path(source))
    # How near epsilon a difference may lie and, rounded otherwise, fall on the other side.
    rounding, epsilon = min(1e-6, 0.01 * c.epsilon), c.epsilon
    try:
        found = zip(draws, gaps, strict=True)
        clear = [(i, not gap <= epsilon) for i, gap in found if not abs(gap - epsilon) <= rounding]
        wrong = [i for i, beyond in clear if beyond != (i in failures)]
    except (EngineError, ValueError) as error:  # a source with other inputs or outputs
        raise VerificationError(f"source and variant do not run on its draws: {error}") from None
    ran = f"{len(draws)} of {c.samples} draws, run again here, came out as it says"
    if wrong:
        raise VerificationError(f"{ran}, but for {len(wrong)}: {wrong[:5]}")
    return f"{ran}, to within {rounding:.1g} of epsilon{alone}"
