"""The certificate: one machine-checkable statement about one variant, as a JSON file."""

from __future__ import annotations

import contextlib
import hashlib
import stat
from pathlib import Path
from typing import Final, Literal

import msgspec

from lrai_core.artifact import CERTIFICATES, Artifact, disk_errors
from lrai_core.errors import VerificationError, shorten
from lrai_core.protocol import OutputMap

SCHEMA_VERSION: Final = 1
_MAX_BYTES: Final = 4 << 20
_MAX_FAILURES: Final = 100_000  # all of them fit into the bytes
_VACUOUS: Final = 0.1  # a bound above says too little to be preferred for its epsilon

Tier = Literal["STATISTICAL"]


class _Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of what a certificate is made of: strict, immutable."""


class Closeness(_Record, frozen=True, kw_only=True):
    """`|f(x) - g(x)| <= epsilon` for every element, after each output's map.

    f is the source model, g the variant, both run alone on one row.
    """

    epsilon: float
    output_maps: dict[str, OutputMap]


class Sampler(_Record, frozen=True, kw_only=True):
    """Where the n inputs came from, so that they can be drawn again.

    Attributes:
        kind: `evaluation`: the gate rows themselves; `box`: a gate row drawn by the seed, plus
            uniform noise of at most `radius` on each element of its floating-point inputs.
        seed: Of the box sampler; 0 for `evaluation`.
        radius: Half the width of the box, in the inputs' unit; 0 for `evaluation`.
        rows_sha256: Hash over the hashes of the gate rows, in order.
    """

    kind: Literal["evaluation", "box"]
    seed: int
    radius: float = 0.0
    rows_sha256: str


class Certificate(_Record, frozen=True, kw_only=True):
    """A statement with everything needed to check it.

    Attributes:
        tier: What kind of truth this is: here, an exact binomial bound on a sample.
        n: Inputs drawn, fixed before the first was run.
        failures: Indices of those where the property did not hold.
        upper_bound: With `confidence`, at most this share of inputs of the same kind violates it.
        comparisons: Candidates among which the variant was chosen on the same rows; the bound pays
            for them all (Bonferroni).
        assumption: What must be true of future inputs for the bound to speak about them.
        files: sha256 of the files of source and variant, by name inside the artifact.
    """

    schema_version: int = SCHEMA_VERSION
    tier: Tier
    closeness: Closeness
    variant: str
    sampler: Sampler
    n: int
    failures: tuple[int, ...]
    confidence: float
    comparisons: int
    upper_bound: float
    assumption: str
    manifest_sha256: str
    files: dict[str, str]
    environment: dict[str, str]
    created: str

    @property
    def id(self) -> str:
        """Return the name that replies carry: the variant and 12 digits of the content's sha256."""
        return f"{self.variant}-{hashlib.sha256(msgspec.json.encode(self)).hexdigest()[:12]}"

    def statement(self) -> str:
        """Return what is certified, in a sentence."""
        maps = ", ".join(f"{name} ({kind})" for name, kind in self.closeness.output_maps.items())
        near = f"within {self.sampler.radius:g} of an evaluation row"
        inputs = near if self.sampler.kind == "box" else "like the evaluation rows"
        return (
            f"with {self.confidence:.0%} confidence, for all but {self.upper_bound:.2%} of inputs "
            f"{inputs} no element of {maps} of variant {self.variant} differs from the source "
            f"model by more than {self.closeness.epsilon:g} "
            f"({len(self.failures)} failures in {self.n})"
        )


def write_certificate(folder: Path, certificate: Certificate) -> Path:
    """Write the certificate into the artifact at `folder`, and return its path.

    Raises:
        EnvironmentProblem: The disk is full, read-only or not permitted.
        VerificationError: It has more failures than a certificate can list.
    """
    if (failures := len(certificate.failures)) > _MAX_FAILURES:
        raise VerificationError(
            f"{failures} inputs differ by more than {certificate.closeness.epsilon:g}, "
            f"a certificate lists at most {_MAX_FAILURES}: choose a larger epsilon"
        )
    target = folder / CERTIFICATES / f"{certificate.id}.json"
    content = msgspec.json.format(msgspec.json.encode(certificate), indent=1)
    temporary = target.with_suffix(".partial")
    with disk_errors(target):
        target.parent.mkdir(exist_ok=True)
        try:
            temporary.write_bytes(content + b"\n")
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    return target


def read_certificate(path: Path) -> Certificate:
    """Return the certificate in the file.

    Raises:
        VerificationError: It cannot be read, or says what no certificate can say.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise VerificationError(f"{path.name} is not a plain file")
        if path.stat().st_size > _MAX_BYTES:
            raise VerificationError(f"{path.name} has over {_MAX_BYTES} bytes")
        raw = path.read_bytes()
    except OSError as error:
        raise VerificationError(f"{path.name} cannot be read: {error.strerror}") from None
    try:
        certificate = msgspec.json.decode(raw, type=Certificate)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        why = shorten(str(error), 200)
        raise VerificationError(f"{path.name} is not a certificate: {why}") from None
    if certificate.schema_version != SCHEMA_VERSION:
        raise VerificationError(
            f"{path.name} has schema {certificate.schema_version}, this lrai reads {SCHEMA_VERSION}"
        )
    return certificate


def certificates(artifact: Artifact, variant: str = "") -> list[Certificate]:
    """Return the certificates that name the artifact's manifest, the most telling first.

    On the evaluation rows before a box around them, then a bound that is not vacuous, then the
    smallest epsilon, then the smallest bound. Whether they hold is for `check` to say.

    Args:
        artifact: Beside which they lie. Files that this version cannot read are passed over.
        variant: Only those of this variant.
    """
    folder = artifact.path / CERTIFICATES
    if not folder.is_dir():
        return []
    found = []
    for path in sorted(folder.glob("*.json")):
        with contextlib.suppress(VerificationError):  # a tier or schema of another version
            found.append(read_certificate(path))
    mine = [c for c in found if c.manifest_sha256 == artifact.sha256 and variant in ("", c.variant)]
    return sorted(mine, key=_rank)


def _rank(c: Certificate) -> tuple[bool, bool, float, float]:
    box, vacuous = c.sampler.kind == "box", not c.upper_bound <= _VACUOUS
    return box, vacuous, c.closeness.epsilon, c.upper_bound
