"""The one tree of settings: frozen, checked when made, read from one file format.

Precedence: call > flag > host's parameter > `LRAI_*` > `lrai.toml` > default. A key is the path in
the tree (`scheduler.max_queue_rows`); its variable is the same in capitals
(`LRAI_SCHEDULER_MAX_QUEUE_ROWS`). Nothing else in LRAI reads the environment.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lrai_core.errors import EnvironmentProblem, UsageError, shorten


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Bounds of the queue and of one call. Rows and bytes count over all models of a runtime."""

    max_queue_rows: int = 4096
    max_queue_bytes: int = 256 << 20
    max_batch_rows: int = 64
    max_batch_elements: int = 0  # padded rows x length in one call; 0: what the gate measured with
    default_timeout_ms: float = 60_000

    def __post_init__(self) -> None:
        _at_least("scheduler", self, 1, "max_queue_rows", "max_queue_bytes", "max_batch_rows")
        _at_least("scheduler", self, 0, "max_batch_elements")
        _at_least("scheduler", self, 1, "default_timeout_ms")


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorConfig:
    """How the process of a model is started and watched."""

    python: str = ""  # interpreter of the actor; empty: the one that runs the runtime
    threads: int = 0  # engine threads; 0: the CPUs in the affinity mask
    heartbeat_ms: int = 200
    hang_seconds: float = 5.0  # no progress for max(this, hang_factor x predicted): killed
    hang_factor: float = 10.0
    start_timeout_seconds: float = 120.0
    restart_limit: int = 5  # more restarts than this within the window: stopped and reported
    restart_window_seconds: float = 60.0

    def __post_init__(self) -> None:
        _at_least("actor", self, 0, "threads")
        _at_least("actor", self, 1, "heartbeat_ms", "restart_limit", "hang_factor")
        _at_least("actor", self, 0.1, "hang_seconds", "start_timeout_seconds")
        _at_least("actor", self, 0.1, "restart_window_seconds")
        if self.heartbeat_ms >= self.hang_seconds * 500:
            raise ValueError(
                f"actor.heartbeat_ms is {self.heartbeat_ms}, at most half of actor.hang_seconds "
                f"({self.hang_seconds:g} s) is needed"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeConfig:
    """Where a runtime keeps what changes, and how long it drains."""

    socket_dir: str = ""  # parent of the 0700 folder of sockets; empty: the temporary folder
    drain_seconds: float = 30.0

    def __post_init__(self) -> None:
        _at_least("runtime", self, 0, "drain_seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitsConfig:
    """What one request may hold."""

    request_bytes: int = 64 << 20
    request_rows: int = 4096
    nan_policy: Literal["pass", "reject"] = "pass"

    def __post_init__(self) -> None:
        _at_least("limits", self, 1, "request_bytes", "request_rows")
        if self.nan_policy not in ("pass", "reject"):
            raise ValueError(f"limits.nan_policy is {self.nan_policy!r}, allowed: pass, reject")


@dataclass(frozen=True, slots=True, kw_only=True)
class LraiConfig:
    """Every setting there is."""

    limits: LimitsConfig = field(default_factory=LimitsConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    actor: ActorConfig = field(default_factory=ActorConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)


@dataclass(frozen=True, slots=True)
class Setting:
    """One value with where it came from."""

    key: str
    value: Any
    origin: str


def load_config(
    *,
    call: Mapping[str, Any] | None = None,
    flags: Mapping[str, Any] | None = None,
    host: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
    file: Path | None = None,
) -> LraiConfig:
    """Return the settings of this call; see `explain_config` for the arguments."""
    return _build(explain_config(call=call, flags=flags, host=host, environ=environ, file=file))


def explain_config(
    *,
    call: Mapping[str, Any] | None = None,
    flags: Mapping[str, Any] | None = None,
    host: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
    file: Path | None = None,
) -> list[Setting]:
    """Return every setting with its origin, in the order of the tree.

    Args:
        call: Dotted key to value, from Python.
        flags: The same, from a command line; values may be text.
        host: The same, from a host's own parameters; values may be text.
        environ: The process environment by default.
        file: An `lrai.toml`; the one in the working directory by default, if there is one.

    Raises:
        UsageError: An unknown key, or a value of the wrong type or out of range.
    """
    known = dict(_leaves(LraiConfig(), ""))
    values = {key: Setting(key, value, "default") for key, value in known.items()}
    environ = os.environ if environ is None else environ
    implicit = file is None
    file = Path("lrai.toml") if file is None else file
    layers: list[tuple[str, Mapping[str, Any]]] = []
    if not implicit or file.is_file():
        layers.append((file.name, _read_toml(file)))
        if implicit and "actor.python" in layers[0][1]:
            raise UsageError(
                f"{file.name} sets actor.python, which would run a program that the working folder "
                "names; set it where you name the file, in LRAI_ACTOR_PYTHON or in code"
            )
    variables = {_variable(key): key for key in known}
    layers.append(("environment", _from_environ(environ, variables)))
    layers += [("host", host or {}), ("flag", flags or {}), ("call", call or {})]
    for origin, layer in layers:
        for key, raw in layer.items():
            if key not in known:
                close = ", ".join(sorted(k for k in known if k.split(".")[0] == key.split(".")[0]))
                allowed = close or ", ".join(sorted({k.split(".")[0] for k in known}))
                raise UsageError(f"{origin}: unknown setting {shorten(key)!r}; known: {allowed}")
            shown = _variable(key) if origin == "environment" else origin
            values[key] = Setting(key, _convert(key, raw, origin), shown)
    settings = list(values.values())
    _build(settings)
    return settings


def available_cpus() -> int:
    """Return how many CPUs this process may use: its affinity mask where the system has one."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def actor_python(config: ActorConfig) -> str:
    """Return the interpreter that runs actors."""
    return config.python or sys.executable


def _build(settings: list[Setting]) -> LraiConfig:
    sections: dict[str, dict[str, Any]] = {}
    for setting in settings:
        section, _, name = setting.key.partition(".")
        sections.setdefault(section, {})[name] = setting.value
    try:
        return LraiConfig(
            limits=LimitsConfig(**sections["limits"]),
            scheduler=SchedulerConfig(**sections["scheduler"]),
            actor=ActorConfig(**sections["actor"]),
            runtime=RuntimeConfig(**sections["runtime"]),
        )
    except ValueError as error:
        raise UsageError(str(error)) from None


def _leaves(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for item in dataclasses.fields(node):
        value = getattr(node, item.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", value


def _variable(key: str) -> str:
    return "LRAI_" + key.replace(".", "_").upper()


def _from_environ(environ: Mapping[str, str], variables: Mapping[str, str]) -> dict[str, str]:
    sections = {f"LRAI_{name.upper()}_" for name in LraiConfig.__dataclass_fields__}
    found = {}
    for name, value in environ.items():
        if name in variables:
            found[variables[name]] = value
        elif any(name.startswith(section) for section in sections):
            raise UsageError(f"environment: {shorten(name)} is no setting of LRAI")
    return found


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        tree = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise EnvironmentProblem(f"{file}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} is not TOML: {error}") from None
    flat: dict[str, Any] = {}
    for section, content in tree.items():
        if not isinstance(content, dict):
            raise UsageError(f"{file}: {shorten(section)!r} stands outside a section")
        flat |= {f"{section}.{name}": value for name, value in content.items()}
    return flat


def _convert(key: str, raw: Any, origin: str) -> Any:
    """Return `raw`, which may be text, in the type of the setting."""
    section, _, name = key.partition(".")
    kind = typing.get_type_hints(_SECTIONS[section])[name]
    if typing.get_origin(kind) is Literal:
        allowed = typing.get_args(kind)
        if raw in allowed:
            return raw
        raise UsageError(f"{origin}: {key} is {shorten(str(raw))!r}, allowed: {', '.join(allowed)}")
    try:
        if kind is str and isinstance(raw, str):
            return raw
        if kind in (int, float) and not isinstance(raw, bool):
            value = kind(raw)
            if kind is float or not isinstance(raw, float):
                return value
    except (TypeError, ValueError, OverflowError):
        pass
    raise UsageError(
        f"{origin}: {key} is {shorten(repr(raw))}, a value of type {kind.__name__} is needed"
    )


def _at_least(section: str, node: Any, least: float, *names: str) -> None:
    for name in names:
        value = getattr(node, name)
        if not value >= least:
            raise ValueError(f"{section}.{name} is {value}, at least {least} is needed")


_SECTIONS: typing.Final = types.MappingProxyType(
    {
        "limits": LimitsConfig,
        "scheduler": SchedulerConfig,
        "actor": ActorConfig,
        "runtime": RuntimeConfig,
    }
)
