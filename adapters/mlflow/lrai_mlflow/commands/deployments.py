"""Models of MLflow as deployments of a runtime: `mlflow deployments COMMAND -t lrai`.

Target: `lrai`, the runtime that all processes of this user share. It stays when MLflow has ended,
until `lrai runtime stop`. `lrai:/FOLDER` is another one of this machine, and
`lrai:tcp://HOST:PORT?keys=FOLDER` one of another machine, which has to see the model's path.
There a table goes to the version with the largest share alone, whose folder has to be seen here,
too: it says which column is which. Arrays by input name go to every version.

Model URI: a folder, or one of file:, models:, runs:, mlflow-artifacts:, s3:, gs:, wasbs:, abfss:.
The model is of the flavor lrai; `lrai mlflow convert URI` makes one of others.

`create --name NAME -m URI`, `update --name NAME -m URI`, with these, each after -C:

* `canary=SHARE`, of update: the new version answers this share of the requests, 0 to 1. Without it
  the new version is warmed up and answers all, and the old one ends what it has begun.
* `require.NAME=VALUE`: refuse the model unless its certificate has this tier, sampler, epsilon,
  delta or confidence, or a better one.
* `variant=ID`: another variant than the chosen one.
* `actor.threads=N`, or another setting of one model: `lrai config` lists them all.

`update --name NAME -C canary=SHARE` changes the share of a canary that is there already, and
`update --name NAME -C rollback=true` goes back to what served before the last change: while there
is a canary, to the version beside it.

`run-local --name NAME -m URI` serves a model over HTTP until Ctrl-C, to try it, with `host=`,
`port=` and `workers=`, each after -C.

A canary that fails more often than the version beside it is taken back, and the name frozen: it can
be neither updated nor deleted until `lrai unfreeze NAME --by WHO --reason WHY` has said that it may
(of another target with `--address`, the FOLDER or tcp://… of that).

With `runtime.memory_mib` what was not used for longest makes room for others: then it is no
deployment until it is created again, and `lrai runtime deployments` says so.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlparse

import pandas as pd
from mlflow.deployments import BaseDeploymentClient, PredictionsResponse
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, RESOURCE_DOES_NOT_EXIST
from mlflow.pyfunc.backend import PyFuncBackend
from mlflow.pyfunc.scoring_server import predictions_to_json
from mlflow.tracking.artifact_utils import _download_artifact_from_uri
from mlflow.utils import env_manager
from msgspec.structs import replace

import lrai_core as lrai
from lrai_codecs import in_turn, rows_at_a_time
from lrai_core import OWN_SETTINGS, ArtifactError, LraiError, ModelNotFound, UsageError
from lrai_import.held import lock_folder, running, tell_unheard, when_gone
from lrai_import.hosted import load
from lrai_mlflow.commands.facts import saved_model
from lrai_mlflow.serving import FLAVOR_NAME, from_lrai, mlflow_errors, ordered, to_lrai
from lrai_mlflow.settings import flat, settings_of

_SCHEMES: Final = ("", "file", "models", "runs", "mlflow-artifacts", "s3", "gs", "wasbs", "abfss")
_READ: Final = ", ".join(f"{name}:" for name in _SCHEMES if name)
_START_SECONDS: Final = 60
_MOST_SAID: Final = 32  # versions of a deployment of which it is kept what they take


class Client(BaseDeploymentClient):
    """Deployments of one runtime. Flavor and endpoints of MLflow mean nothing here."""

    def create_deployment(
        self,
        name: str,
        model_uri: str,
        flavor: str | None = None,
        config: Mapping[str, Any] | None = None,
        endpoint: str | None = None,
    ) -> dict[str, Any]:
        """Serve a model under a name, until it is deleted or the runtime is stopped.

        Raises:
            MlflowException: The name is taken or none, or the model cannot be served.
        """
        del flavor, endpoint
        with mlflow_errors():
            if not name or ":" in name or not name.isprintable():
                raise UsageError(f"{name!r} is no name of a deployment: printable, without ':'")
            _check_options(config)
            if name in self._found():
                raise MlflowException(f"deployment {name!r} is there", RESOURCE_ALREADY_EXISTS)
            with self._alone():
                artifact, said = self._keep(model_uri)
                how = self._how(config, said["saved"])
                with self._saying(name, artifact.version, said):
                    load(self._runtime, artifact, name, **how)
                    if artifact.version not in self._versions(name):  # but what replaced it
                        self._runtime.swap(name, artifact, **how)
                self._forget()
        return self.get_deployment(name)

    def update_deployment(
        self,
        name: str,
        model_uri: str | None = None,
        flavor: str | None = None,
        config: Mapping[str, Any] | None = None,
        endpoint: str | None = None,
    ) -> dict[str, Any]:
        """Change who serves under a name; no request is lost. See `target_help` for `config`.

        Raises:
            MlflowException: There is no such deployment, or the change cannot be made; then who
                served serves on.
        """
        del flavor, endpoint
        options = dict(config or {})
        share, back = options.pop("canary", None), options.pop("rollback", None)
        with mlflow_errors(), self._alone():
            shares = self._known(name).shares
            _check_options(options)
            if options and model_uri is None:
                given = ", ".join(map(str, options))
                raise UsageError(f"{given}: goes with a model (-m), not with what serves already")
            if back is not None:
                if str(back).lower() != "true" or model_uri or share is not None:
                    raise UsageError("rollback is true or absent, and goes with nothing else")
                self._runtime.rollback(name)
                for version in [v for v, has in self._known(name).shares.items() if not has]:
                    self._runtime.unload(name, version)  # a canary, which can be loaded again
            elif model_uri is None:
                self._weigh(name, shares, _number(share))
            else:
                artifact, said = self._keep(model_uri)
                known = self._said(name).get(artifact.version, {})
                same = known.get("saved", {}) == said["saved"]
                loaded = [one for one in shares if _artifact_of(one) == artifact.version]
                there = "".join(loaded[-1:]) if same and not options else ""  # else otherwise
                how = self._how(options, said["saved"])
                with self._saying(name, artifact.version, said):
                    self._serve(name, shares, artifact, share, how, there)
            self._forget()
        return self.get_deployment(name)

    def delete_deployment(
        self, name: str, config: Mapping[str, Any] | None = None, endpoint: str | None = None
    ) -> None:
        """Stop serving under a name, if it is served."""
        del config, endpoint
        with mlflow_errors(), contextlib.suppress(ModelNotFound), self._alone():
            if ":" not in name:  # those of others are no deployments
                self._runtime.unload(name)
            self._forget()

    def list_deployments(self, endpoint: str | None = None) -> list[dict[str, Any]]:
        """Return every deployment; models that workers of MLflow hold are not among them."""
        del endpoint
        with mlflow_errors():
            models = self._runtime.models()  # first: what is deleted after that is not listed
            return [_shown(models, one) for one in self._found().values()]

    def get_deployment(self, name: str, endpoint: str | None = None) -> dict[str, Any]:
        """Return a deployment: its versions with share, variant, certificate and state.

        Raises:
            MlflowException: There is none of that name.
        """
        del endpoint
        with mlflow_errors():
            return _shown(self._runtime.models(), self._known(name))

    def predict(
        self, deployment_name: str | None = None, inputs: Any = None, endpoint: str | None = None
    ) -> PredictionsResponse:
        """Return the predictions, in the form of MLflow's scoring server.

        Args:
            deployment_name: Needed.
            inputs: As `ServedModel.predict` takes them; of a table, see `target_help`.
            endpoint: Means nothing here.

        Raises:
            MlflowException: There is no such deployment, or the request was refused.
        """
        del endpoint
        name, content = deployment_name or "", io.StringIO()
        with mlflow_errors():
            try:
                answer = self._answer(name, inputs)
            except ModelNotFound:  # an update has just ended the version that was to answer
                answer = self._answer(name, inputs)
        predictions_to_json(answer, content)
        return PredictionsResponse(json.loads(content.getvalue()))

    def _answer(self, name: str, inputs: Any) -> Any:
        models = [] if ":" in name else self._runtime.models()  # those of others are no deployments
        served = {one.version: one for one in models if one.name == name}
        # What could not be started keeps its share, for later; of one version none need be asked.
        known = dict.fromkeys(served, 1.0) if len(served) == 1 else self._known(name).shares
        shares = {version: share for version, share in known.items() if share and version in served}
        alive = {one: share for one, share in shares.items() if served[one].state != "dead"}
        shares = alive or shares
        said = self._said(name) if isinstance(inputs, pd.DataFrame) else {}
        if isinstance(inputs, pd.DataFrame) and self._copies is None:
            if not said:
                seen = f"only the folder of {name!r} says, and it is not seen here"
                raise UsageError(f"which column is which {seen}: give arrays by input name")
            shares = {one: share for one, share in shares.items() if _artifact_of(one) in said}
        if not shares:
            raise ModelNotFound(f"what served {name!r} has just ended or was given up")
        version = random.choices([*shares], [*shares.values()])[0]
        # What others have put in the place of a version, as `lrai tune`, takes what that took.
        said = said.get(_artifact_of(version), next(reversed(said.values()), {}))
        table, signature = ordered(inputs, said.get("columns", [])), served[version].signature
        # One version answers all parts: what is in order for one is not for the others. Where none
        # lives nobody is named: only then does the runtime have the one before serve again.
        named, own = version if alive else "", self._runtime.config
        request = replace(to_lrai(table, signature.inputs, {}, name), model_version=named)
        most = rows_at_a_time(request, config := running(own) or own)
        response = in_turn(self._runtime.infer, request, signature, most, config)
        if said and response.model_version != version:  # it does by now, and may take other columns
            raise ModelNotFound(f"what served {name!r} has just ended")
        return from_lrai(response, inputs, by_row=said.get("by_row", False))

    def _said(self, name: str) -> dict[str, Any]:
        """Return what is known of a deployment's models, by version, the latest last."""
        if self._copies is None:
            return self._seen(name)
        file = self._file(name)
        return dict(json.loads(file.read_text(encoding="utf-8"))) if file and file.is_file() else {}

    def _seen(self, name: str) -> dict[str, Any]:
        """Return the same of what another machine serves, if it lies there where it lies here."""
        if found := self._found().get(name):
            with contextlib.suppress(LraiError, MlflowException, OSError):  # it does not, by now
                artifact, said = saved_model(str(Path(found.artifact).parent), verify=False)
                if artifact.version in map(_artifact_of, found.shares):
                    return {artifact.version: said}
        return {}

    @contextlib.contextmanager
    def _saying(self, name: str, version: str, said: Mapping[str, Any]) -> Iterator[None]:
        """Keep what is known of a version's model, if the block has it serve."""
        before, served = self._said(name), self._versions(name)
        latest = next(reversed(before.values()), None)
        # What others have put in the place of a version takes what that took, whatever comes later.
        pinned = dict.fromkeys(served - before.keys(), latest) if latest else {}
        before = pinned | before
        self._write(name, {version: said} | before)  # what serves already is what it was
        try:
            yield
        except BaseException:
            came = set[str]()
            with contextlib.suppress(LraiError):  # it may serve all the same
                came = self._versions(name) - served
            self._write(name, before | {version: said} if version in came else before)
            raise
        rest = {one: known for one, known in before.items() if one != version}
        self._write(name, dict([*rest.items(), (version, said)][-_MOST_SAID:]))

    def _versions(self, name: str) -> set[str]:
        found = self._found().get(name)
        return set(map(_artifact_of, found.shares)) if found else set()

    def _how(self, config: Mapping[str, Any] | None, saved: Mapping[str, Any]) -> Any:
        """Return how a model is loaded, and warn of what its runtime has not as it was saved."""
        asked = settings_of({**(config or {}), **self._where}, saved)
        tell_unheard(asked)
        return asked.how

    @cached_property
    def _where(self) -> dict[str, Any]:
        address = str(self.target_uri).partition(":")[2]
        return {"runtime.address": address} if address else {}

    @cached_property
    def _runtime(self) -> lrai.Runtime:
        """Attach, for as long as this client lives; a runtime of this machine stays from now on."""
        config = settings_of(self._where).config
        address = config.runtime.address
        if address == "embedded":
            raise UsageError("deployments outlive this process: LRAI_RUNTIME is embedded")
        if "://" not in address:
            command = [sys.executable, "-P", "-c", "from lrai_core.cli import main; main()"]
            try:
                done = subprocess.run(
                    [*command, "runtime", "start", "--address", address], stdin=subprocess.DEVNULL,
                    capture_output=True, text=True, timeout=_START_SECONDS, check=False,
                    env={**os.environ, "LRAI_LOG": ""},  # which would hold what is captured open
                )  # fmt: skip
            except subprocess.TimeoutExpired:
                raise lrai.NotReady(f"the runtime did not start in {_START_SECONDS} s") from None
            if done.returncode:
                raise UsageError(f"the runtime cannot be started: {done.stderr.strip()[-300:]}")
        runtime = lrai.Runtime(config)
        when_gone(self, runtime.close)  # MLflow makes a client for each who wants one
        return runtime

    def _found(self) -> dict[str, Any]:
        # Nobody here reads what it would write; what is away for room, create loads again.
        here = [one for one in self._runtime.deployments(save=False) if one.shares and not one.away]
        return {one.name: one for one in here if ":" not in one.name}

    def _known(self, name: str) -> Any:
        found = self._found()
        if name not in found:
            problem = f"no deployment {name[:120]!r}; there are: {', '.join(found) or 'none'}"
            raise MlflowException(problem, RESOURCE_DOES_NOT_EXIST)
        return found[name]

    def _serve(
        self,
        name: str,
        shares: dict[str, float],
        artifact: lrai.Artifact,
        share: Any,
        how: Mapping[str, Any],
        there: str,
    ) -> None:
        """Have a version serve all requests, or a share; `there`: the one that is loaded so."""
        version = there or artifact.version
        if there and share is not None:
            self._weigh(name, shares, _number(share), version)
        elif there:
            self._runtime.route(name, {version: 1.0})
        elif share is None:
            self._runtime.swap(name, artifact, **how)
        else:
            self._runtime.load(artifact, name=name, share=_number(share), **how)
        if share is None:
            for other in shares.keys() - {version}:
                with contextlib.suppress(ModelNotFound):  # a swap ends those that served
                    self._runtime.unload(name, other)

    def _weigh(self, name: str, shares: dict[str, float], share: float, canary: str = "") -> None:
        """Give the canary, the one that came later, its share; what is left goes to the other."""
        if len(shares) != 2:
            has = f"{name!r} has {len(shares)} version(s)"
            raise UsageError(f"{has}, a canary is needed beside one")
        canary = canary or [*shares][-1]  # which came later: it may have the most by now
        (stable,) = shares.keys() - {canary}
        self._runtime.route(name, {canary: share, stable: 1.0 - share})

    def _keep(self, model_uri: str) -> tuple[lrai.Artifact, dict[str, Any]]:
        """Return the artifact of a model, copied to where it stays, and what else it says.

        Raises:
            UsageError: The address is of no kind that is read here.
        """
        scheme = urlparse(str(model_uri)).scheme
        if scheme not in _SCHEMES:
            raise UsageError(f"{scheme[:40]}: is not read here, but a path and {_READ}")
        if self._copies is None:  # the runtime of another machine
            return saved_model(_download_artifact_from_uri(str(model_uri)))
        with tempfile.TemporaryDirectory(prefix="lrai-deploy-") as scratch:
            model = _download_artifact_from_uri(str(model_uri), output_path=scratch)
            artifact, said = saved_model(model)
            kept = self._copies / f"{artifact.version}.lrai"
            self._copies.mkdir(mode=0o700, parents=True, exist_ok=True)
            partial = kept.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            if kept.exists() and not _is_whole(kept):  # in a temporary folder: a part may be gone
                shutil.rmtree(kept)
            if not kept.exists():
                shutil.copytree(artifact.path, partial)
                partial.rename(kept)
            issued = artifact.path / "certificates"  # of which there may be more by now
            if issued.is_dir():
                shutil.copytree(issued, kept / issued.name, dirs_exist_ok=True)
        return lrai.Artifact.open(kept), said

    def _file(self, name: str) -> Path | None:
        """Return where it is kept what a deployment's models take: in the runtime's own state."""
        if self._copies is None:
            return None
        one = self._found().get(name)
        place = self._place(Path(one.traffic).parents[1]) if one and one.traffic else self._copies
        return place / f"{_digest(name)}.said"

    def _write(self, name: str, said: Mapping[str, Any]) -> None:
        if (file := self._file(name)) is not None:
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            written = file.with_suffix(".new")
            written.write_text(json.dumps(said), encoding="utf-8")
            written.replace(file)  # which others may be reading

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the copies: what somebody is loading, the runtime does not list yet."""
        with contextlib.ExitStack() as stack:
            if self._locks is not None:
                lock = stack.enter_context((self._locks / "deployed.lock").open("ab"))
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    @cached_property
    def _locks(self) -> Path | None:
        return lock_folder(self._runtime.config)  # the runtime has made it; None: another machine's

    @cached_property
    def _copies(self) -> Path | None:
        if self._locks is None:
            return None
        state = self._runtime.config.runtime.state_dir
        return self._place(Path(state).absolute() if state else self._locks.parent)

    def _place(self, state: Path) -> Path:
        """Return the folder of this runtime's deployments in a state folder."""
        return state / "deployed" / _digest(str(self._locks))[:8]

    def _forget(self) -> None:
        """Remove the copies that no deployment serves, or could go back to."""
        found = self._runtime.deployments(save=False)
        needed = {_artifact_of(version) for one in found for version in (*one.shares, one.previous)}
        names = {_digest(one.name) for one in found}
        states = {Path(one.traffic).parents[1] for one in found if one.traffic}
        places = {self._copies, *map(self._place, states)} if self._copies else set[Path]()
        for kept in [path for place in places for path in place.glob("*")]:
            if kept.suffix == ".lrai" and kept.stem not in needed:
                shutil.rmtree(kept)
            elif kept.suffix == ".said" and kept.stem not in names:
                kept.unlink()


def _check_options(config: Mapping[str, Any] | None) -> None:
    """Refuse what is no setting of one model: the runtime has its own, from where it started."""
    settings_of(config)  # for its errors
    for key in flat(config or {}):
        if key not in OWN_SETTINGS and key != "variant" and not key.startswith("require."):
            raise UsageError(f"{key} is the runtime's, not one model's: say it where that starts")


def _shown(models: Sequence[Any], found: Any) -> dict[str, Any]:
    """Return what is said of a deployment, and of its versions among the models."""
    versions = {
        model.version: {"share": found.shares.get(model.version, 0.0)}
        | {what: getattr(model, what) for what in ("variant", "certificate", "state")}
        for model in models
        if model.name == found.name
    }
    frozen = found.frozen and f"by {found.frozen.by}: {found.frozen.reason}"
    said = {"versions": versions, "previous": found.previous or None, "frozen": frozen}
    return {"name": found.name, "flavor": FLAVOR_NAME, **said}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:32]


def _is_whole(path: Path) -> bool:
    with contextlib.suppress(ArtifactError):
        return bool(lrai.Artifact.open(path))
    return False


def _artifact_of(label: str) -> str:
    """Return the artifact of a version, which has a number behind it where that is loaded twice."""
    return label.partition("-")[0]


def run_local(
    name: str, model_uri: str, flavor: str | None = None, config: Mapping[str, Any] | None = None
) -> None:
    """Serve a model over HTTP until Ctrl-C, in this environment, to try it.

    Args:
        name: Means nothing here.
        model_uri: Of a model of any flavor.
        flavor: Means nothing here.
        config: `host`, `port`, `workers`.

    Raises:
        MlflowException: Another option, or a number that is none.
    """
    del name, flavor
    known = {"host": "127.0.0.1", "port": "5000", "workers": "1"}
    options = known | dict(config or {})
    with mlflow_errors():
        if unknown := options.keys() - known.keys():
            raise UsageError(f"no option {min(unknown)[:60]!r}; there are {', '.join(known)}")
        port, workers = (int(_number(options[key])) for key in ("port", "workers"))
    backend = PyFuncBackend({}, env_manager=env_manager.LOCAL, workers=workers)
    backend.serve(_download_artifact_from_uri(model_uri), port, options["host"], None)


def target_help() -> str:
    """Return what `mlflow deployments help -t lrai` prints."""
    return __doc__ or ""


def _number(text: Any) -> float:
    with contextlib.suppress(TypeError, ValueError):
        if math.isfinite(number := float(text)):
            return number
    raise UsageError(f"{text!r} is no number")
