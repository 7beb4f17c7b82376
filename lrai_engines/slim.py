"""`lrai slim NAME.lrai`: a smaller artifact, of nothing but the variant that serves.

What is left out is the source model, by which fp32 would serve on another machine, and every other
variant. The source is named by its hash. Certificates are issued again, from a run of what is kept.
"""

from __future__ import annotations

import secrets
import shutil
import stat
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Final

import msgspec
import onnx
import typer
from onnx.external_data_helper import load_external_data_for_model
from rich.console import Console

from lrai_core import Artifact, ConditionNotMet, EnvironmentProblem, UsageError, load_config
from lrai_core import artifact as store
from lrai_core.artifact import Variant, disk_errors
from lrai_core.compiler.model import SharedWeights
from lrai_core.verifier.certificate import certificates, write_certificate
from lrai_core.verifier.verifier import environment, evaluation, failing, gaps, issue
from lrai_deployments.measured import measured_here

out: Final = Console(highlight=False, markup=False, emoji=False)
_MOST_DRAWS: Final = 100_000  # of a certificate that is to be issued again
app: Final = typer.Typer(add_completion=False, rich_markup_mode=None)


def main(arguments: Sequence[str]) -> None:
    """Run the command; what `lrai` says of errors is its own business."""
    app(args=list(arguments), prog_name="lrai slim")


@app.command()
def command(
    path: Annotated[Path, typer.Argument(help="Artifact, a directory NAME.lrai.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where to; by default, replace it.")
    ] = None,
) -> None:
    """Leave only the variant that serves here: neither the source model nor fp32.

    The artifact gets smaller, and no longer loads on another class of processor, or with another
    onnxruntime. Its certificates are issued again.
    """
    before = _size(path)
    artifact = slim(path, output)
    kept, mebi = artifact.manifest.variants[0].id, 1 << 20
    after = _size(artifact.path)
    out.print(f"{artifact.path.name}: {kept} alone, {after / mebi:.1f} of {before / mebi:.1f} MiB")
    issued = len(certificates(artifact, kept))
    out.print(f"{issued} certificate(s), from a run of it; {artifact.manifest.source.sha256[:16]}…")


def slim(path: str | Path, to: str | Path | None = None) -> Artifact:
    """Write an artifact that holds the chosen variant of another, and return it.

    Args:
        path: The artifact; every file is hashed.
        to: Directory to write; by default it takes the other's place once it is whole.

    Raises:
        UsageError: It is slim already, or `to` exists.
        ConditionNotMet: What is chosen was made for another machine.
        ArtifactError: It cannot be read.
        EnvironmentProblem: The disk is full or read-only, or an engine is not installed.
    """
    artifact = Artifact.open(path)
    if not artifact.manifest.source.file:
        raise UsageError(f"{artifact.path.name} is slim already")
    chosen = artifact.manifest.variant(artifact.manifest.chosen)
    if (made_for := artifact.manifest.made_for(chosen)) != (here := environment(chosen)):
        why = "slim it there, it would serve nowhere else"
        raise ConditionNotMet(f"{chosen.id} was made for {made_for}, this is {here}: {why}")
    serves = measured_here(artifact, load_config()).manifest.chosen
    if serves != chosen.id:
        why = "compile it here, and slim that"
        raise ConditionNotMet(f"lrai requalify found that {serves} is to serve here: {why}")
    folder = artifact.path.absolute()
    written = Path(to) if to else folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.slim")
    with store.writing(written) as made:
        made.chmod(stat.S_IMODE(folder.stat().st_mode) | 0o700)  # it may hold requests of users
        _write(artifact, made)
    try:
        made_anew = Artifact.open(written)  # before what it is made of is gone
        if to is None:
            _exchange(written, folder)
            made_anew = replace(made_anew, path=folder)
    except BaseException:  # an interrupt, too
        shutil.rmtree(written, ignore_errors=True)
        raise
    return made_anew


def _exchange(new: Path, old: Path) -> None:
    """Have the one take the other's place; whatever is refused leaves the old one there."""
    aside = new.with_suffix(".whole")
    try:
        with disk_errors(old):
            old.rename(aside)
            try:
                new.rename(old)
            except BaseException:
                aside.rename(old)
                raise
    except (EnvironmentProblem, OSError) as error:
        shutil.rmtree(new, ignore_errors=True)
        raise EnvironmentProblem(f"{old.name} cannot be replaced, use -o: {error}") from None
    try:
        shutil.rmtree(aside)
    except BaseException as error:  # an interrupt, too: it is done by now
        shutil.rmtree(aside, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        if aside.exists():
            raise EnvironmentProblem(f"{old.name} is slim, but {aside} cannot be removed") from None


def _write(artifact: Artifact, folder: Path) -> None:
    manifest = artifact.manifest
    chosen = manifest.variant(manifest.chosen)
    home = folder / "variants" / chosen.id
    if chosen.weights:
        home.mkdir(parents=True)
        chosen = _with_own_weights(artifact, chosen, home)
    else:
        shutil.copytree(artifact.file(chosen.model).parent, home)
    for name in (store.EVALUATION, store.QUANTIZATION_LOG):
        if name in manifest.files:
            shutil.copyfile(artifact.file(name), folder / name)
    source = msgspec.structs.replace(manifest.source, file="")
    alone = msgspec.structs.replace(manifest, source=source, variants=(chosen,), together=())
    store.write_manifest(folder, alone)
    made, rows = Artifact.open(folder, verify=False), evaluation(artifact)
    original = artifact.file(manifest.source.file)
    own = [c for c in certificates(artifact, chosen.id) if c.environment == environment(chosen)]
    stated = {(c.epsilon, c.radius, c.samples, c.seed, c.confidence): c for c in own}
    for certificate in stated.values():
        if certificate.samples > _MOST_DRAWS:
            continue  # nobody could wait for it
        draws = range(certificate.samples if certificate.radius else len(rows))
        failures = failing(gaps(made, certificate, rows, draws, original), certificate.epsilon)
        write_certificate(folder, issue(made, certificate, rows, failures))


def _with_own_weights(artifact: Artifact, variant: Variant, folder: Path) -> Variant:
    """Write a graph that shares its weights with the source, and what it takes of them."""
    graph = artifact.file(variant.model)
    proto = onnx.load(graph, load_external_data=False)
    load_external_data_for_model(proto, str(artifact.path / variant.weights))
    SharedWeights(folder).write(proto, folder / graph.name)
    size = sum(file.stat().st_size for file in folder.iterdir())
    return msgspec.structs.replace(variant, weights=f"variants/{variant.id}", size_bytes=size)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
