"""Runtimes that only measure: nothing is kept, and what was measured here counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from lrai_core import Artifact, load_config
from lrai_deployments.measured import place
from lrai_report.own import own_config
from tests.core import small_artifact


@pytest.mark.parametrize("variable", ["LRAI_RUNTIME_STATE_DIR", "LRAI_RUNTIME", "HOME"])
def test_what_was_requalified_is_looked_for_where_the_server_looks(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, str(tmp_path / "state"))
    artifact = Artifact.open(small_artifact.build(tmp_path / "small.lrai"))
    own = own_config({"actor.replicas": 1})
    assert place(artifact, own) == place(artifact, load_config())
    assert (own.runtime.state_dir, own.runtime.capture_rows) == ("", 0)


def test_what_is_asked_for_outranks_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LRAI_ACTOR_REPLICAS", "3")
    own = own_config({"actor.replicas": 1})
    assert own.actor.replicas == 1


def test_what_limits_who_serves_does_not_limit_who_measures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LRAI_SCHEDULER_LATENCY_SLO_MS", "7")
    monkeypatch.setenv("LRAI_SCHEDULER_DEFAULT_TIMEOUT_MS", "50")
    monkeypatch.setenv("LRAI_RUNTIME_MODEL_ROOTS", "/srv/models")
    own = own_config({})
    assert own.scheduler.latency_slo_ms == 0
    assert own.scheduler.default_timeout_ms >= 3_600_000
    assert own.runtime.model_roots == ""
