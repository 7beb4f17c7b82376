"""Issue a certificate for a variant. Read this first; `check.py` is its counterpart."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lrai_core.artifact import Artifact, Manifest, Variant
from lrai_core.engine.engine import installed_version, isa_class
from lrai_core.errors import ConditionNotMet, UsageError, VerificationError
from lrai_core.verifier import statistics
from lrai_core.verifier.certificate import Certificate, Closeness, Sampler, write_certificate
from lrai_core.verifier.sample import digest


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """What to certify, and on which sample.

    Attributes:
        epsilon: Largest difference allowed after the output maps.
        variant: Its id; the chosen variant by default.
        radius: Half the width of the box around evaluation rows; 0 takes the rows themselves.
        samples: Draws from the box; ignored for radius 0, where every kept row is one.
        seed: Of the box sampler.
        confidence: Of the bound, one-sided.
    """

    epsilon: float
    variant: str = ""
    radius: float = 0.0
    samples: int = 1000
    seed: int = 0
    confidence: float = statistics.CONFIDENCE

    def __post_init__(self) -> None:
        """Refuse what cannot be certified."""
        if not 0 < self.epsilon < math.inf:
            raise UsageError(f"epsilon is {self.epsilon}, it must be above 0 and finite")
        if not 0 <= self.radius < math.inf:
            raise UsageError(f"radius is {self.radius}, it must be 0 or more and finite")
        if self.seed < 0:
            raise UsageError(f"seed is {self.seed}, it must be 0 or more")
        if self.samples < 1:
            raise UsageError(f"samples is {self.samples}, at least 1 is needed")
        if not 0 < self.confidence < 1:
            raise UsageError(f"confidence is {self.confidence}, it must lie between 0 and 1")


def verify(artifact: Artifact, spec: Spec) -> list[Certificate]:
    """Run source and variant on the sample, write what was found beside the artifact, return it.

    Raises:
        VerificationError: The artifact kept no evaluation rows, the box has no input to vary, or
            there are too many failures to list.
        ConditionNotMet: The artifact was made for another processor class or engine version.
    """
    manifest = artifact.manifest
    variant = manifest.variant(spec.variant or manifest.chosen)
    target, here = manifest.target, environment(manifest)
    if (here["isa"], here["engine_version"]) != (target.isa, target.engine_version):
        raise ConditionNotMet(
            f"the artifact was made for {target.isa} with {target.engine} {target.engine_version}, "
            f"this is {here['isa']} with {here['engine_version'] or 'none'}: compile it here"
        )
    rows, hashes = statistics.evaluation(artifact)
    if not len(rows):
        raise VerificationError(
            "the artifact has no evaluation rows to run: compile it with --evaluation; "
            "strings, and rows over 16 MiB, are not kept"
        )
    kind: Literal["evaluation", "box"] = "box" if spec.radius else "evaluation"
    if kind == "box" and not any(s.datatype.startswith("FP") for s in manifest.signature.inputs):
        raise VerificationError(
            "the model has no floating-point input to put noise on; use radius 0"
        )
    if kind == "evaluation" and len(rows) != len(hashes):
        raise VerificationError(
            f"the artifact kept {len(rows)} of {len(hashes)} rows; "
            "only a box around them can be certified"
        )
    n = spec.samples if kind == "box" else len(rows)
    seed = spec.seed if kind == "box" else 0
    gaps = statistics.differences(
        statistics.source_session(artifact),
        statistics.variant_session(artifact, variant),
        (statistics.draw(kind, rows, index, seed, spec.radius) for index in range(n)),
        manifest.signature,
    )
    rows_sha256 = digest(hashes)
    certificate = issue(
        manifest=manifest,
        manifest_sha256=artifact.sha256,
        variant=variant,
        epsilon=spec.epsilon,
        gaps=list(gaps),
        sampler=Sampler(kind=kind, seed=seed, radius=spec.radius, rows_sha256=rows_sha256),
        confidence=spec.confidence,
        comparisons=manifest.candidates,  # among which the rows chose
    )
    write_certificate(artifact.path, certificate)
    return [certificate]


def issue(
    *,
    manifest: Manifest,
    manifest_sha256: str,
    variant: Variant,
    epsilon: float,
    gaps: Sequence[float],
    sampler: Sampler,
    confidence: float,
    comparisons: int,
) -> Certificate:
    """Return the certificate that differences on a sample amount to."""
    failures = statistics.failing(gaps, epsilon)
    folders = (str(Path(variant.model).parent), "source")
    return Certificate(
        tier="STATISTICAL",
        closeness=Closeness(
            epsilon=epsilon,
            output_maps={spec.name: spec.output_map for spec in manifest.signature.outputs},
        ),
        variant=variant.id,
        sampler=sampler,
        n=len(gaps),
        failures=failures,
        confidence=confidence,
        comparisons=comparisons,
        upper_bound=statistics.bound(len(failures), len(gaps), confidence, comparisons),
        assumption=(
            statistics.BOX_ASSUMPTION if sampler.kind == "box" else statistics.EVALUATION_ASSUMPTION
        ),
        manifest_sha256=manifest_sha256,
        files={
            name: entry.sha256
            for name, entry in manifest.files.items()
            if str(Path(name).parent) in folders
        },
        environment=environment(manifest),
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )


def environment(manifest: Manifest) -> dict[str, str]:
    """Return what the statement depends on: this processor's class, the engine, its version."""
    return {
        "isa": isa_class(),
        "engine": manifest.target.engine,
        "engine_version": installed_version(manifest.target.engine),
        "lrai": installed_version("lrai"),
    }
