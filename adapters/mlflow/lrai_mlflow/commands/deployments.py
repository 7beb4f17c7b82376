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

A canary that fails more often than the version beside it is taken back while it has less than half
of the requests, and the name frozen: it can be neither updated nor deleted until
`lrai unfreeze NAME --by WHO --reason WHY` has said that it may (of another target with `--address`,
the FOLDER or tcp://… of that).

With `runtime.memory_mib` what was not used for longest makes room for others: then it is no
deployment until it is created again, and `lrai runtime deployments` says so.
"""

# ruff: noqa: ARG001, ARG002 - the signatures are MLflow's, and not all of it means something here

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Final

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
from lrai_core import OWN_SETTINGS, Artifact, ModelNotFound, UsageError
from lrai_import.held import running, tell_unheard, when_gone
from lrai_import.hosted import load
from lrai_mlflow.commands.deployed import Deployed, artifact_of
from lrai_mlflow.serving import FLAVOR_NAME, from_lrai, mlflow_errors, ordered, to_lrai
from lrai_mlflow.settings import flat, settings_of

_START_SECONDS: Final = 60


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
        with mlflow_errors():
            if not name or ":" in name or not name.isprintable():
                raise UsageError(f"{name!r} is no name of a deployment: printable, without ':'")
            _check_options(config)
            if name in self._deployed.found():
                raise MlflowException(f"deployment {name!r} is there", RESOURCE_ALREADY_EXISTS)
            with self._deployed.alone():
                artifact, said = self._deployed.keep(model_uri)
                how = self._how(config, said["saved"])
                with self._deployed.saying(name, artifact.version, said):
                    load(self._runtime, artifact, name, **how)
                    # If it does not serve, what replaced it does.
                    if artifact.version not in self._deployed.versions(name):
                        self._runtime.swap(name, artifact, **how)
                self._deployed.forget()
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
        options = dict(config or {})
        share, back = options.pop("canary", None), options.pop("rollback", None)
        with mlflow_errors(), self._deployed.alone():
            shares = self._known(name).shares
            _check_options(options)
            if options and model_uri is None:
                given = ", ".join(map(str, options))
                raise UsageError(f"{given}: goes with a model (-m), not with what serves already")
            if model_uri is back is share is None:
                raise UsageError("nothing to change: give a model, canary=SHARE or rollback=true")
            if back is not None:
                if str(back).lower() != "true" or model_uri or share is not None:
                    raise UsageError("rollback is true or absent, and goes with nothing else")
                self._runtime.rollback(name)
                for version in [v for v, has in self._known(name).shares.items() if not has]:
                    self._runtime.unload(name, version)  # a canary, which can be loaded again
            elif model_uri is None:
                self._weigh(name, shares, _number(share))
            else:
                artifact, said = self._deployed.keep(model_uri)
                known = self._deployed.said(name).get(artifact.version, {})
                same = known.get("saved", {}) == said["saved"]
                loaded = [one for one in shares if artifact_of(one) == artifact.version]
                there = "".join(loaded[-1:]) if same and not options else ""  # else otherwise
                how = self._how(options, said["saved"])
                with self._deployed.saying(name, artifact.version, said):
                    self._serve(name, shares, artifact, share, how, there)
            self._deployed.forget()
        return self.get_deployment(name)

    def delete_deployment(
        self, name: str, config: Mapping[str, Any] | None = None, endpoint: str | None = None
    ) -> None:
        """Stop serving under a name, if it is served."""
        with mlflow_errors(), contextlib.suppress(ModelNotFound), self._deployed.alone():
            if ":" not in name:  # those of others are no deployments
                self._runtime.unload(name)
            self._deployed.forget()

    def list_deployments(self, endpoint: str | None = None) -> list[dict[str, Any]]:
        """Return every deployment; models that workers of MLflow hold are not among them."""
        with mlflow_errors():
            models = self._runtime.models()  # first: what is deleted after that is not listed
            return [_shown(models, one) for one in self._deployed.found().values()]

    def get_deployment(self, name: str, endpoint: str | None = None) -> dict[str, Any]:
        """Return a deployment: its versions with share, variant, certificate and state.

        Raises:
            MlflowException: There is none of that name.
        """
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
        shares = (alive := {v: n for v, n in shares.items() if served[v].state != "dead"}) or shares
        said = self._deployed.said(name) if isinstance(inputs, pd.DataFrame) else {}
        if isinstance(inputs, pd.DataFrame) and self._deployed.copies is None:
            if not said:
                seen = f"only the folder of {name!r} says, and it is not seen here"
                raise UsageError(f"which column is which {seen}: give arrays by input name")
            shares = {one: share for one, share in shares.items() if artifact_of(one) in said}
        if not shares:
            raise ModelNotFound(f"what served {name!r} has just ended or was given up")
        if isinstance(inputs, pd.DataFrame) and not len(inputs):
            return inputs  # no rows, of which MLflow's answer names no columns: as `ServedModel`
        version = random.choices([*shares], [*shares.values()])[0]
        # What others have put in the place of a version, as `lrai tune`, takes what that took.
        said = said.get(artifact_of(version), next(reversed(said.values()), {}))
        signature = served[version].signature
        # Several inputs are found by their names; a signature's optional columns may be missing.
        table = ordered(inputs, said.get("columns", [])) if len(signature.inputs) == 1 else inputs
        # One version answers all parts: what is in order for one is not for the others. Where none
        # lives nobody is named: only then does the runtime have the one before serve again.
        named, own = version if alive else "", self._runtime.config
        request = replace(to_lrai(table, signature.inputs, {}, name), model_version=named)
        most = rows_at_a_time(request, config := running(own) or own)
        response = in_turn(self._runtime.infer, request, signature, most, config)
        if said and response.model_version != version:  # it does by now, and may take other columns
            raise ModelNotFound(f"what served {name!r} has just ended")
        return from_lrai(response, inputs, by_row=said.get("by_row", False))

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
        if (address := config.runtime.address) == "embedded":
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

    @cached_property
    def _deployed(self) -> Deployed:
        return Deployed(self._runtime)

    def _known(self, name: str) -> Any:
        found = self._deployed.found()
        if name not in found:
            problem = f"no deployment {name[:120]!r}; there are: {', '.join(found) or 'none'}"
            raise MlflowException(problem, RESOURCE_DOES_NOT_EXIST)
        return found[name]

    def _serve(
        self, name: str, shares: dict[str, float], new: Artifact, share: Any, how: Any, there: str
    ) -> None:
        """Have a version serve all requests, or a share; `there`: the one that is loaded so."""
        version = there or new.version
        if there and share is not None:
            self._weigh(name, shares, _number(share), version)
        elif there:
            self._runtime.route(name, {version: 1.0})
        elif share is None:
            self._runtime.swap(name, new, **how)
        else:
            self._runtime.load(new, name=name, share=_number(share), **how)
        if share is None:
            for other in shares.keys() - {version}:
                with contextlib.suppress(ModelNotFound):  # a swap ends those that served
                    self._runtime.unload(name, other)

    def _weigh(self, name: str, shares: dict[str, float], share: float, canary: str = "") -> None:
        """Give the canary, the one that came later, its share; what is left goes to the other."""
        if len(shares) != 2:
            raise UsageError(f"{name!r} has {len(shares)} version(s); canary=SHARE takes two")
        canary = canary or [*shares][-1]  # which came later: it may have the most by now
        (stable,) = shares.keys() - {canary}
        self._runtime.route(name, {canary: share, stable: 1.0 - share})


def _check_options(config: Mapping[str, Any] | None) -> None:
    """Refuse what is no setting of one model: the runtime has its own, from where it started."""
    settings_of(config)  # for its errors
    for key in flat(config or {}):
        if key not in OWN_SETTINGS and key != "variant" and not key.startswith("require."):
            raise UsageError(f"{key} is the runtime's, not one model's: set it where that starts")


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
