from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrai_core.config import (
    ActorConfig,
    LraiConfig,
    Setting,
    available_bytes,
    available_cpus,
    explain_config,
    load_config,
    with_settings,
)
from lrai_core.errors import EnvironmentProblem, UsageError

ROWS = "scheduler.max_queue_rows"
VARIABLE = "LRAI_SCHEDULER_MAX_QUEUE_ROWS"


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    path = tmp_path / "lrai.toml"
    path.write_text("[scheduler]\nmax_queue_rows = 10\n")
    return path


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)


def setting(key: str, **layers: object) -> Setting:
    found = explain_config(**{"environ": {}, **layers})  # type: ignore[arg-type]
    return next(entry for entry in found if entry.key == key)


def test_without_any_source_every_value_is_the_default() -> None:
    settings = explain_config(environ={})
    assert {entry.origin for entry in settings} == {"default"}
    assert load_config(environ={}) == LraiConfig()


def test_every_leaf_of_the_tree_is_explained_in_order() -> None:
    keys = [
        f"{section.name}.{item.name}"
        for section in dataclasses.fields(LraiConfig)
        for item in dataclasses.fields(getattr(LraiConfig(), section.name))
    ]
    assert [entry.key for entry in explain_config(environ={})] == keys


def test_call_beats_flag_beats_host_beats_environment_beats_file_beats_default(toml: Path) -> None:
    layers: dict[str, object] = {}
    seen = [setting(ROWS)]
    layers["file"] = toml
    seen.append(setting(ROWS, **layers))
    layers["environ"] = {VARIABLE: "11"}
    seen.append(setting(ROWS, **layers))
    for number, layer in enumerate(("host", "flags", "call"), start=12):
        layers[layer] = {ROWS: number}
        seen.append(setting(ROWS, **layers))
    assert [(entry.value, entry.origin) for entry in seen] == [
        (4096, "default"),
        (10, "lrai.toml"),
        (11, VARIABLE),
        (12, "host"),
        (13, "flag"),
        (14, "call"),
    ]


def test_the_file_in_the_working_directory_is_read_without_being_named() -> None:
    Path("lrai.toml").write_text('[limits]\nnan_policy = "reject"\n')
    assert load_config(environ={}).limits.nan_policy == "reject"


def test_a_working_directory_that_may_not_be_looked_into_has_no_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(path: Path) -> bool:  # as of a service's user in another one's home
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(Path, "is_file", refused)
    assert load_config(environ={}) == LraiConfig()


def test_the_process_environment_is_the_default_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "77")
    assert load_config().scheduler.max_queue_rows == 77


def test_text_becomes_the_type_of_the_setting() -> None:
    flags = {ROWS: "5", "actor.hang_seconds": "2.5", "actor.python": "/usr/bin/python3"}
    config = load_config(flags=flags, environ={})
    assert config.scheduler.max_queue_rows == 5
    assert config.actor.hang_seconds == 2.5
    assert config.actor.python == "/usr/bin/python3"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("scheduler.max_rows", 1, "unknown setting 'scheduler.max_rows'.*max_queue_rows"),
        ("nonsense.key", 1, "unknown setting 'nonsense.key'; known: actor, limits, runtime, sched"),
        ("", 1, "unknown setting ''"),
        (ROWS, "many", "scheduler.max_queue_rows is 'many', a value of type int is needed"),
        (ROWS, 1.5, "type int is needed"),
        (ROWS, True, "type int is needed"),
        (ROWS, None, "type int is needed"),
        (ROWS, {}, "type int is needed"),
        (ROWS, "9" * 5000, "type int is needed"),
        (ROWS, 0, r"scheduler.max_queue_rows is 0, at least 1 is needed"),
        (ROWS, -(10**400), "at least 1 is needed"),
        ("actor.hang_seconds", 10**400, "type float is needed"),
        ("actor.hang_seconds", math.nan, "actor.hang_seconds is nan, at least 0.1 is needed"),
        ("actor.replicas", 10**9, "is 1000000000, at least 1 is needed, at most 1024"),
        ("actor.threads", 4097, "is 4097, at least 0 is needed, at most 4096"),
        ("actor.python", 3, "type str is needed"),
        ("limits.nan_policy", "ignore", "'ignore', allowed: pass, reject"),
        ("limits.nan_policy", ["pass"], "allowed: pass, reject"),
    ],
)
def test_a_wrong_setting_is_refused_by_its_key(key: str, value: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_config(call={key: value}, environ={})


def test_a_hostile_key_or_value_leaves_a_short_printable_message() -> None:
    for layer in ({"\0" * (1 << 20): 1}, {ROWS: "\x1b[31m" * (1 << 18)}):
        with pytest.raises(UsageError) as caught:
            load_config(call=layer, environ={})
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 400


def test_a_misspelt_variable_is_refused_and_strangers_are_left_alone() -> None:
    known = "LRAI_SCHEDULER_DEFAULT_TIMEOUT_MS, .*, LRAI_SCHEDULER_WEIGHT$"
    with pytest.raises(UsageError, match=f"LRAI_SCHEDULER_MAX_ROWS is no setting; known: {known}"):
        load_config(environ={"LRAI_SCHEDULER_MAX_ROWS": "1"})
    assert load_config(environ={"LRAI_HOME": "/", "HOME": "/"}) == LraiConfig()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[scheduler\n", "is not TOML"),
        (b"\xff\xfe", "is not TOML"),
        (b"max_queue_rows = 1\n", "'max_queue_rows' stands outside a section"),
        (b"[scheduler]\nmax_rows = 1\n", "unknown setting 'scheduler.max_rows'"),
        (b"[scheduler.more]\nmax_queue_rows = 1\n", "unknown setting 'scheduler.more'"),
    ],
)
def test_a_wrong_file_is_refused_with_a_reason(toml: Path, content: bytes, message: str) -> None:
    toml.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        load_config(file=toml, environ={})


def test_a_named_file_has_to_exist(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match="No such file"):
        load_config(file=tmp_path / "missing.toml", environ={})


def test_settings_are_frozen_and_take_keywords_only() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        LraiConfig().actor.threads = 2  # type: ignore[misc]
    with pytest.raises(TypeError):
        ActorConfig("process")  # type: ignore[call-arg]


@pytest.mark.parametrize("number", [-1, 0])
def test_a_section_made_by_hand_is_checked_too(number: int) -> None:
    with pytest.raises(ValueError, match=f"actor.restart_limit is {number}, at least 1"):
        ActorConfig(restart_limit=number)


@given(st.dictionaries(st.text(max_size=20), st.one_of(st.text(), st.floats(), st.integers())))
def test_whatever_is_given_makes_a_config_or_a_usage_error(layer: dict[str, object]) -> None:
    try:
        load_config(call=layer, environ={})
    except UsageError:
        return
    assert layer.keys() <= {setting.key for setting in explain_config(environ={})}


def test_cpus_are_those_of_the_affinity_mask(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("lrai_core.config._QUOTA", tmp_path / "none")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5, 7})
    assert available_cpus() == 3


@pytest.mark.parametrize(
    ("quota", "cpus"),
    [
        ("200000 100000", 2),
        ("150000 100000", 1),
        ("50000 100000", 1),
        ("900000 100000", 3),
        ("max 100000", 3),
        ("", 3),
        (None, 3),
    ],
)
def test_cpus_are_no_more_than_the_quota_of_the_cgroup(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quota: str | None, cpus: int
) -> None:
    file = tmp_path / "cpu.max"
    if quota is not None:
        file.write_text(quota)
    monkeypatch.setattr("lrai_core.config._QUOTA", file)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5, 7})
    assert available_cpus() == cpus


@pytest.mark.parametrize(
    ("limit", "free"),
    [(None, 8 << 20), ("max\n", 8 << 20), ("4194304\n", 4 << 20), ("99999999999\n", 8 << 20)],
    ids=["no cgroup", "no limit", "a limit", "more than there is"],
)
def test_memory_that_is_free_is_the_machines_or_what_the_cgroup_leaves(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limit: str | None, free: int
) -> None:
    told, file = tmp_path / "meminfo", tmp_path / "memory.max"
    told.write_text("MemTotal:  16384 kB\nMemFree:  1 kB\nMemAvailable:  8192 kB\n")
    if limit is not None:
        file.write_text(limit)
    monkeypatch.setattr("lrai_core.config._MEMORY", told)
    monkeypatch.setattr("lrai_core.config._LIMIT", file)
    assert available_bytes() == free


def test_the_working_folder_cannot_choose_a_program_to_run() -> None:
    Path("lrai.toml").write_text('[runtime]\naddress = "tcp://10.0.0.9:7000?keys=k"\n')
    with pytest.raises(UsageError, match=r"lrai\.toml names a .* another machine to ask"):
        load_config(environ={})
    Path("lrai.toml").write_text('[actor]\npython = "./mine"\n')
    with pytest.raises(UsageError, match=r"lrai\.toml names a program to run"):
        load_config(environ={})
    assert load_config(environ={}, file=Path("lrai.toml")).actor.python == "./mine"


def test_a_heartbeat_slower_than_the_hang_limit_is_refused() -> None:
    with pytest.raises(UsageError, match=r"heartbeat_ms is 3000, at most half"):
        load_config(call={"actor.heartbeat_ms": 3000}, environ={})


def test_settings_of_one_model_change_a_copy() -> None:
    config = load_config(call={"actor.threads": 3}, environ={})
    changed = with_settings(config, {"actor.replicas": "2"})
    assert (changed.actor.replicas, changed.actor.threads, config.actor.replicas) == (2, 3, 1)
    assert with_settings(config, {}) == config


@pytest.mark.parametrize(
    ("devices", "replicas", "each"),
    [
        ("", 1, [""]),
        ("", 2, ["", ""]),
        ("0, MIG-7/1/0,", 1, ["0", "MIG-7/1/0"]),
        ("2,5", 3, ["2", "5", "2"]),
    ],
)
def test_each_device_has_an_actor(devices: str, replicas: int, each: list[str]) -> None:
    said = {"actor.devices": devices, "actor.replicas": replicas}
    assert load_config(call=said, environ={}).actor.device_of_each == each


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"actor.replicas": 0}, r"actor\.replicas is 0, at least 1"),
        ({"actor.replicas": "two"}, r"settings: actor\.replicas is 'two', a value of type int"),
        ({"scheduler.max_queue_rows": 1}, r"max_queue_rows' is no setting of one model: actor\.d"),
        ({"actor.replica": 1}, r"'actor\.replica' is no setting of one model"),
    ],
)
def test_settings_of_one_model_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        with_settings(load_config(environ={}), settings)


def test_one_variable_says_which_runtime_a_process_uses() -> None:
    assert load_config(environ={"LRAI_RUNTIME": "auto"}).runtime.address == "auto"
    seen = {entry.key: entry.origin for entry in explain_config(environ={"LRAI_RUNTIME": "/d"})}
    assert seen["runtime.address"] == "LRAI_RUNTIME"
    with pytest.raises(UsageError, match="_ADDRESS is no setting; known: LRAI_RUNTIME, LRAI_"):
        load_config(environ={"LRAI_RUNTIME_ADDRESS": "auto"})


def test_what_a_platform_says_of_its_services_is_no_setting() -> None:
    """Kubernetes does, to every pod beside a service that is called lrai-runtime."""
    links = {
        "LRAI_RUNTIME_SERVICE_HOST": "10.0.0.1",
        "LRAI_RUNTIME_SERVICE_PORT": "7000",
        "LRAI_RUNTIME_SERVICE_PORT_GATE": "7000",
        "LRAI_RUNTIME_PORT": "tcp://10.0.0.1:7000",
        "LRAI_RUNTIME_PORT_7000_TCP": "tcp://10.0.0.1:7000",
        "LRAI_RUNTIME_PORT_7000_TCP_ADDR": "10.0.0.1",
        "LRAI_RUNTIME_PORT_7000_TCP_PROTO": "tcp",
    }
    assert load_config(environ=links) == LraiConfig()
    with pytest.raises(UsageError, match="LRAI_RUNTIME_PORTS is no setting"):
        load_config(environ={"LRAI_RUNTIME_PORTS": "1"})


def test_an_empty_variable_is_not_set() -> None:
    """As from `LRAI_RUNTIME: ${LRAI_RUNTIME:-}` in a file of Compose."""
    assert load_config(environ={"LRAI_RUNTIME": "", "LRAI_ACTOR_THREADS": ""}) == LraiConfig()
