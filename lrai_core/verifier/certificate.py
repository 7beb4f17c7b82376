"""The certificate: one machine-checkable statement about one variant, as a JSON file."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from typing import Final, Literal

import msgspec

from lrai_core.artifact import CERTIFICATES, Artifact, disk_errors, read_record
from lrai_core.confidence import upper_bound
from lrai_core.errors import ArtifactError, UsageError, VerificationError, shorten
from lrai_core.protocol import OutputMap
from lrai_core.verifier.spec import FAR, round_up

CONFIDENCE: Final = 0.95
_MAX_BYTES: Final = 4 << 20
_VACUOUS: Final = 0.1  # a bound above says too little to be preferred for its epsilon


class Spec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What to certify, and on which sample.

    Attributes:
        epsilon: Largest difference allowed after the output maps.
        variant: Its id; the chosen variant by default.
        radius: Half the width of the box around evaluation rows, in the inputs' unit; 0 takes the
            rows themselves.
        samples: Draws from the box; for radius 0 every row that was kept is one.
        seed: Of the box sampler; ignored for radius 0.
        confidence: Of the bound, one-sided.
    """

    epsilon: float
    variant: str = ""
    radius: float = 0.0
    samples: int = 1000
    seed: int = 0
    confidence: float = CONFIDENCE

    def __post_init__(self) -> None:
        """Refuse what cannot be certified, and what no certificate can say."""
        for name, holds, allowed in (
            ("epsilon", 0 < self.epsilon < FAR, "above 0 and finite"),
            ("radius", 0 <= self.radius < 1e300, "0 or more and below 1e300"),
            ("samples", 1 <= self.samples < 1 << 32, "1 or more and below 2^32"),
            ("seed", self.seed >= 0, "0 or more"),
            ("confidence", 1e-9 < self.confidence < 1 - 1e-9, "above 1e-9 and below 1 - 1e-9"),
        ):
            if not holds:
                raise UsageError(f"{name} is {getattr(self, name)}, it must be {allowed}")

    @property
    def sampler(self) -> Literal["evaluation", "box"]:
        """Return what the draws are.

        `evaluation`: the gate rows themselves; `box`: a gate row drawn by the seed, plus uniform
        noise of at most `radius` on each element of its floating-point inputs.
        """
        return "box" if self.radius else "evaluation"


class Certificate(Spec, frozen=True, kw_only=True):
    """A specification, and what was found: `|f(x) - g(x)| <= epsilon` for all but few inputs.

    f is the source model, g the variant, both run alone on one row; the difference is the largest
    over all elements, after each output's map. `variant`, `samples` and `seed` are filled in.

    Attributes:
        tier: What kind of truth this is: here, an exact binomial bound on a sample.
        failures: Indices of the draws where the property did not hold.
        upper_bound: With `confidence`, at most this share of inputs of the same kind violates it.
        comparisons: Candidates among which the variant was chosen on the same rows; the bound pays
            for them all (Bonferroni), but for the share that was demanded of them beforehand: they
            were judged by it in a fixed order, and the first to fail ended it.
        output_maps: By output.
        assumption: What must be true of future inputs for the bound to speak about them.
        environment: Processor class and engine; on others the variant computes something else.
        manifest_sha256: Of the artifact, whose manifest names the files of source, variant and rows
            by their hashes.
        issuer: The version of lrai.
    """

    schema_version: int = 1  # of certificates, which say nothing of named calls
    tier: Literal["STATISTICAL"] = "STATISTICAL"
    failures: tuple[int, ...]
    upper_bound: float
    comparisons: int
    output_maps: dict[str, OutputMap]
    assumption: str
    environment: str
    manifest_sha256: str
    issuer: str
    created: str

    @property
    def id(self) -> str:
        """Return the name that replies carry: the variant and 12 digits of the content's sha256."""
        return f"{self.variant}-{hashlib.sha256(msgspec.json.encode(self)).hexdigest()[:12]}"

    def statement(self) -> str:
        """Return what is certified, in a sentence."""
        maps = ", ".join(f"{name} ({kind})" for name, kind in self.output_maps.items())
        box = f"within {self.radius!r} of an evaluation row"
        inputs = box if self.radius else "like the evaluation rows"
        share = f"{100 * round_up(self.upper_bound, 3):g}%"  # more would be said by less
        return (
            f"with {100 * self.confidence:.10g}% confidence, for all but {share} of inputs "
            f"{inputs}, each run alone, no element of {maps} of variant {self.variant} differs "
            f"from the source model by more than {self.epsilon!r} "
            f"({len(self.failures)} failures in {self.samples}, {self.environment})"
        )


def write_certificate(folder: Path, certificate: Certificate) -> None:
    """Write the certificate into the artifact at `folder`.

    Raises:
        EnvironmentProblem: The disk is full, read-only or not permitted.
        VerificationError: It has more failures than a certificate can list.
    """
    content = msgspec.json.format(msgspec.json.encode(certificate)) + b"\n"
    if len(content) > _MAX_BYTES:
        count = len(certificate.failures)
        raise VerificationError(f"{count} inputs differ, too many to list: choose a larger epsilon")
    target = folder / CERTIFICATES / f"{certificate.id}.json"
    temporary = target.with_suffix(".partial")
    with disk_errors(target):
        target.parent.mkdir(exist_ok=True)
        try:
            temporary.write_bytes(content)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)


def read_certificate(path: Path) -> Certificate:
    """Return the certificate in the file.

    Raises:
        VerificationError: It cannot be read, or says what no certificate can say.
    """
    try:
        return read_record(path, Certificate, _MAX_BYTES)[0]
    except (OSError, ArtifactError, UsageError) as error:
        raise VerificationError(f"{path.name} cannot be read: {shorten(str(error), 300)}") from None


def certificates(artifact: Artifact, variant: str = "") -> list[Certificate]:
    """Return the certificates that name the artifact's manifest, the most telling first.

    On the evaluation rows before a box around them, then a bound that is not vacuous, then the
    smallest epsilon, then the smallest bound. Whether they hold is for `check` to say; what claims
    a bound below that of its own failures is passed over.

    Args:
        artifact: Beside which they lie. Files that this version cannot read are passed over.
        variant: Only those of this variant.
    """
    found = []
    for path in sorted((artifact.path / CERTIFICATES).glob("*.json")):
        with contextlib.suppress(VerificationError):  # a tier or schema of another version
            found.append(read_certificate(path))
    mine = [c for c in found if c.manifest_sha256 == artifact.sha256 and variant in ("", c.variant)]
    own = [upper_bound(min(len(c.failures), c.samples), c.samples, c.confidence) for c in mine]
    mine = [c for c, least in zip(mine, own, strict=True) if c.upper_bound >= least * (1 - 1e-9)]
    mine.sort(key=lambda c: (c.radius > 0, c.upper_bound > _VACUOUS, c.epsilon, c.upper_bound))
    return mine
