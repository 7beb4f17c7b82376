"""The checker: does a certificate follow from the files, and do the real engines agree with it?

Trusted part: it imports nothing of a prover and recomputes every figure from what it is given.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lrai_core.artifact import Artifact
from lrai_core.engine.engine import installed_version, isa_class
from lrai_core.errors import ConditionNotMet, EngineError, UsageError, VerificationError, shorten
from lrai_core.verifier import statistics
from lrai_core.verifier.certificate import Certificate, certificates, read_certificate
from lrai_core.verifier.sample import Rows, digest

_ALL = 2048  # up to so many draws are all run again;
_PART = 512  # of more a random part, and the recorded failures up to as many
_ROUNDING = 1e-6  # how near epsilon a difference may lie and still fall on the other side,
_ROUNDING_SHARE = 0.01  # and at most this share of epsilon


@dataclass(frozen=True, slots=True)
class Verdict:
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
    try:
        rows, hashes = statistics.evaluation(artifact)
        claims = list(_claims(certificate, artifact, rows, hashes))
        if all(holds for holds, _ in claims):
            copy = "the source model is the artifact's own copy; --source checks with the original"
            claims += [(True, copy)] if source is None else []
            claims.append(_rerun(certificate, artifact, rows, source, seed))
    except VerificationError as error:
        claims = [(False, f"its rows can be read: {error}")]
    return Verdict(
        certificate.id,
        all(holds for holds, _ in claims),
        tuple(sentence for holds, sentence in claims if holds),
        tuple(f"not so: {sentence}" for holds, sentence in claims if not holds),
    )


def require_certificate(
    artifact: Artifact, variant: str, require: Mapping[str, Any]
) -> Certificate:
    """Return a certificate of the variant that meets `require`, and follows from the files.

    Its sample is not run again: that is for `check`.

    Args:
        artifact: Opened; its evaluation rows are hashed again, its models are not.
        variant: The variant about to be served.
        require: `tier` and `sampler` (by default `evaluation`): exactly; `epsilon`, `delta`: at
            most; `confidence` (by default 0.95): at least.

    Raises:
        ConditionNotMet: There is none; the message says what there is.
        UsageError: An unknown key, or a value that is no number.
        VerificationError: The evaluation rows cannot be read.
    """
    known = ("tier", "epsilon", "delta", "confidence", "sampler")
    if unknown := set(require) - set(known):
        raise UsageError(
            f"require: unknown key {shorten(str(min(unknown)))!r}; known: {', '.join(known)}"
        )
    epsilon = _number(require, "epsilon", math.inf)
    delta = _number(require, "delta", 1.0)
    confidence = _number(require, "confidence", statistics.CONFIDENCE)
    rows, hashes = statistics.evaluation(artifact)
    own = [
        certificate
        for certificate in certificates(artifact, variant)
        if all(holds for holds, _ in _claims(certificate, artifact, rows, hashes))
    ]
    for certificate in own:
        if (
            require.get("tier", certificate.tier) == certificate.tier
            and require.get("sampler", "evaluation") == certificate.sampler.kind
            and certificate.closeness.epsilon <= epsilon
            and certificate.upper_bound <= delta
            and certificate.confidence >= confidence
        ):
            return certificate
    there = "; ".join(c.statement() for c in own) or "it has none that follows from the files"
    wanted = ", ".join(f"{key}={value}" for key, value in require.items()) or "any"
    raise ConditionNotMet(
        f"variant {variant} has no certificate that meets the requirement ({wanted}): {there}"
    )


def _number(require: Mapping[str, Any], key: str, default: float) -> float:
    value = require.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UsageError(f"require: {key} is {shorten(repr(value))}, a number is needed")
    return float(value)


def _claims(
    c: Certificate, artifact: Artifact, rows: Rows, hashes: list[bytes]
) -> Iterator[tuple[bool, str]]:
    """Yield whatever must be so for the certificate to follow from the files, and whether it is."""
    manifest, box = artifact.manifest, c.sampler.kind == "box"
    yield c.manifest_sha256 == artifact.sha256, "it was issued for this artifact's manifest"
    variants = {variant.id: variant for variant in manifest.variants}
    known = c.variant in variants
    yield known, f"variant {c.variant!r} is one of {', '.join(variants)}"
    needed = {manifest.source.file} | set(artifact.files_of(variants[c.variant]) if known else ())
    recorded = {name: entry.sha256 for name, entry in manifest.files.items()}
    yield (
        needed <= set(c.files) and c.files.items() <= recorded.items(),
        f"the {len(c.files)} files it speaks of are the ones here",
    )
    due = manifest.candidates
    yield (
        c.comparisons >= due,
        f"its bound pays for {c.comparisons} candidates, {due} were judged on its rows",
    )
    maps = {spec.name: spec.output_map for spec in manifest.signature.outputs}
    stated_maps = c.closeness.output_maps
    yield stated_maps == maps, f"its output maps {stated_maps} are the manifest's {maps}"
    sane = (
        c.closeness.epsilon > 0
        and 0 < c.confidence < 1
        and 1 <= c.comparisons < 1 << 20
        and 1 <= c.n < 1 << 32
        and 1 - (1 - c.confidence) / c.comparisons < 1
        and c.sampler.seed >= 0
    )
    yield sane, "epsilon, confidence, n and seed are in range"
    ordered = list(c.failures) == sorted(set(c.failures))
    drawn = ordered and all(0 <= index < c.n for index in c.failures)
    yield drawn, "the failures are draws of the sample"
    if sane and drawn:
        rate = statistics.bound(len(c.failures), c.n, c.confidence, c.comparisons)
        claim = f"{len(c.failures)} failures of {c.n} bound the rate at {rate:.3%}"
        yield c.upper_bound >= rate * (1 - 1e-9), f"{claim}, it claims {c.upper_bound:.3%}"
    same_rows = len(rows) > 0 and c.sampler.rows_sha256 == digest(hashes)
    yield same_rows, "its sampler is the artifact's evaluation rows"
    whole = box or c.n == len(rows) == len(hashes)
    yield whole, f"n is {c.n}, of {len(hashes)} rows, {len(rows)} of them kept"
    assumption = statistics.BOX_ASSUMPTION if box else statistics.EVALUATION_ASSUMPTION
    fits = c.assumption == assumption and (c.sampler.radius > 0) == box
    yield fits and (box or c.sampler.seed == 0), "its assumption is that of its sampler"
    target = manifest.target
    here = (isa_class(), installed_version(target.engine))
    stated = (c.environment.get("isa"), c.environment.get("engine_version"))
    made = f"it was made on {stated[0]} with {target.engine} {stated[1]}"
    same_kind = stated == here == (target.isa, target.engine_version)
    yield same_kind, f"{made}, this is {here[0]} with {here[1]}"


def _rerun(
    c: Certificate, artifact: Artifact, rows: Rows, source: str | Path | None, seed: int | None
) -> tuple[bool, str]:
    """Run all or part of the sample on the real engines and compare each draw's outcome."""
    draws = list(range(c.n)) if c.n <= _ALL else _part(c, np.random.default_rng(seed))
    sampler, epsilon, failures = c.sampler, c.closeness.epsilon, set(c.failures)
    gaps = statistics.differences(
        statistics.source_session(artifact, source),
        statistics.variant_session(artifact, artifact.manifest.variant(c.variant)),
        (statistics.draw(sampler.kind, rows, i, sampler.seed, sampler.radius) for i in draws),
        artifact.manifest.signature,
    )
    rounding = min(_ROUNDING, _ROUNDING_SHARE * epsilon)
    try:
        wrong = [
            index
            for index, gap in zip(draws, gaps, strict=True)
            if (not gap <= epsilon) != (index in failures) and not abs(gap - epsilon) <= rounding
        ]
    except (EngineError, ValueError) as error:  # a source with other inputs or outputs
        return False, f"source and variant run on its draws: {error}"
    but = f", but for {len(wrong)}: {wrong[:5]}" if wrong else ""
    return not wrong, f"{len(draws)} of {c.n} draws, run again here, came out as it says{but}"


def _part(c: Certificate, random: np.random.Generator) -> list[int]:
    chosen = random.choice(c.n, _PART, replace=False).tolist()
    return sorted({*chosen, *c.failures[:_PART]})
