"""Issue a certificate for a variant. Read this first; `check.py` is its counterpart.

Statistical closeness: run both models on a sample fixed beforehand, count, bound. The bound is
exact (Clopper-Pearson) under one assumption, which the certificate states: future inputs are
exchangeable with the sample. Nothing here is proved about any other input.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec
import numpy as np

from lrai_core.artifact import EVALUATION, Artifact, Variant, check_files
from lrai_core.confidence import upper_bound
from lrai_core.engine.engine import find_engine, installed_version, isa_class
from lrai_core.errors import VerificationError
from lrai_core.protocol import Array
from lrai_core.verifier.certificate import CONFIDENCE, Certificate, Spec, write_certificate
from lrai_core.verifier.sample import Rows, load_rows
from lrai_core.verifier.spec import difference

ASSUMPTIONS = {
    "evaluation": "future inputs are exchangeable with the evaluation rows, each counted once",
    "box": "future inputs are an evaluation row with uniform noise of at most the radius on each "
    "floating-point element; this says nothing about other inputs",
}


def verify(artifact: Artifact, spec: Spec) -> list[Certificate]:
    """Run source and variant on the sample, write what was found beside the artifact, return it.

    Raises:
        VerificationError: The artifact kept no evaluation rows, the box has no input to vary, or
            there are too many failures to list.
        UsageError: The artifact is slim: it has no source model.
    """
    now = Artifact.open(artifact.path)  # with hashes: it may have been changed since
    write_certificate(now.path, certificate := issue(now, spec, evaluation(now)))
    return [certificate]


def issue(
    artifact: Artifact, spec: Spec, rows: Rows, failures: tuple[int, ...] | None = None
) -> Certificate:
    """Return the certificate for these failures, by default those that a run of the sample finds.

    All else follows from artifact and specification: the checker issues every certificate again.
    """
    manifest = artifact.manifest
    variant = manifest.variant(spec.variant or manifest.chosen)
    here = environment(variant)
    if not len(rows):
        remedy = "compile it with --evaluation; rows over 16 MiB are not kept unasked"
        raise VerificationError(f"the artifact has no evaluation rows to run: {remedy}")
    if spec.radius and not any(t.datatype.startswith("FP") for t in manifest.signature.inputs):
        raise VerificationError("the model has no floating-point input for noise; use radius 0")
    n, seed = (spec.samples, spec.seed) if spec.radius else (len(rows), 0)
    spec = msgspec.structs.replace(spec, variant=variant.id, samples=n, seed=seed)
    if failures is None:
        failures = failing(gaps(artifact, spec, rows, range(n)), spec.epsilon)
    if list(failures) != sorted({index for index in failures if 0 <= index < n}):
        raise VerificationError("the failures are not draws of the sample, each once and in order")
    bound = upper_bound(len(failures), n, 1 - (1 - spec.confidence) / manifest.candidates)
    first = spec.confidence <= CONFIDENCE and not spec.radius and manifest.made_for(variant) == here
    # What was demanded was judged there, by parts that add up to the whole level.
    epsilon, delta = manifest.demanded or (spec.epsilon, 0.0)
    if first and epsilon <= spec.epsilon and upper_bound(len(failures), n, CONFIDENCE) <= delta:
        bound = min(bound, delta)
    return Certificate(
        **{name: getattr(spec, name) for name in Spec.__struct_fields__},
        failures=failures,
        upper_bound=bound,
        comparisons=manifest.candidates,
        output_maps={output.name: output.output_map for output in manifest.signature.outputs},
        assumption=ASSUMPTIONS[spec.sampler],
        environment=here,
        manifest_sha256=artifact.sha256,
        issuer=f"lrai {installed_version('lrai')}",
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )


def environment(variant: Variant) -> str:
    """Return the processor class and engine of this machine, in the words of `made_for`."""
    return f"{isa_class()} with {variant.engine} {installed_version(variant.engine) or 'none'}"


def evaluation(artifact: Artifact) -> Rows:
    """Return the rows that the artifact kept; none where it has no file of them.

    Raises:
        VerificationError: They cannot be read.
        ArtifactError: They are not those of the manifest.
    """
    if (entry := artifact.manifest.files.get(EVALUATION)) is None:
        return Rows([], None, [])
    check_files(artifact.path, {EVALUATION: entry})
    return load_rows(artifact.path / EVALUATION, artifact.manifest.signature)


def gaps(
    artifact: Artifact, spec: Spec, rows: Rows, draws: Iterable[int], source: Path | None = None
) -> Iterator[float]:
    """Yield, draw by draw, the largest difference after the output maps, each run alone.

    The source is by default the artifact's copy, run as it is: without optimisation. The variant
    runs as the actors run it.
    """
    variant = artifact.manifest.variant(spec.variant)
    weights = artifact.path / variant.weights if variant.weights else None
    f = find_engine("onnxruntime").load(source or artifact.file(artifact.manifest.source.file))
    g = find_engine(variant.engine).load(artifact.file(variant.model), weights=weights)
    for row in (draw(spec, rows, index) for index in draws):
        yield difference(f.run(row), g.run(row), artifact.manifest.signature.outputs)


def draw(spec: Spec, rows: Rows, index: int) -> list[Array]:
    """Return draw `index` of the sampler; the same arguments give the same bits.

    Raises:
        VerificationError: It is infinite, of which any two models may well make the same.
    """
    if spec.sampler == "evaluation":
        return rows.inputs[index]
    random = np.random.default_rng([spec.seed, index])
    row = list(rows.inputs[int(random.integers(len(rows)))])
    for i, array in enumerate(row):
        if array.dtype.kind == "f":
            noise = random.uniform(-spec.radius, spec.radius, array.shape)
            if (np.isfinite(array) & (abs(array + noise) > np.finfo(array.dtype).max)).any():
                raise VerificationError("an input cannot hold the noise; use a smaller radius")
            row[i] = (array + noise).astype(array.dtype)
    return row


def failing(gaps: Iterable[float], epsilon: float) -> tuple[int, ...]:
    """Return the indices of the draws whose difference exceeds epsilon."""
    return tuple(index for index, gap in enumerate(gaps) if not gap <= epsilon)
