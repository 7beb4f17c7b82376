"""The one tree of settings: frozen, checked when made, read from one file format.

Precedence: call > flag > host's parameter > `LRAI_*` > `lrai.toml` > default. A key is the path in
the tree (`scheduler.max_queue_rows`); its variable is the same in capitals
(`LRAI_SCHEDULER_MAX_QUEUE_ROWS`). Of LRAI's own variables only these are read, and `LRAI_LOG` by
who starts a shared runtime.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import msgspec

from lrai_core.errors import EnvironmentProblem, UsageError, shorten


@dataclass(frozen=True, slots=True)
class _Section:
    """Checks the bounds that the fields of a section declare."""

    def __post_init__(self) -> None:
        section = type(self).__name__.removesuffix("Config").lower()
        for item in dataclasses.fields(self):
            value, least = getattr(self, item.name), item.metadata.get("least")
            name = f"{section}.{item.name}"
            most = 1e9 if isinstance(value, float) else item.metadata.get("most")
            if least is not None and not least <= value <= most:
                raise ValueError(f"{name} is {value}, at least {least} is needed, at most {most:g}")
            allowed = typing.get_args(typing.get_type_hints(type(self))[item.name])
            if allowed and value not in allowed:
                raise ValueError(f"{name} is {value!r}, allowed: {', '.join(allowed)}")


def _least(least: float, default: Any, most: int = 1 << 62) -> Any:
    return field(default=default, metadata={"least": least, "most": most})


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig(_Section):
    """Bounds of the queue and of one call. Rows and bytes count over all models of a runtime."""

    max_queue_rows: int = _least(1, 4096)
    max_queue_bytes: int = _least(1, 256 << 20)
    max_batch_rows: int = _least(1, 64)
    max_batch_elements: int = _least(0, 0)  # padded rows x length; 0: what the gate measured with
    default_timeout_ms: float = _least(1, 60_000)
    latency_slo_ms: float = _least(0, 0)  # for who names no time; 0: as soon as can be, for all
    weight: float = _least(0.001, 1.0)  # of a model beside others, where not all can be in time
    deterministic: bool = False  # each answer is bit for bit what the request alone gives


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorConfig(_Section):
    """How the process of a model is started and watched."""

    isolation: Literal["process", "inline"] = "process"  # inline: none, where a process costs more
    python: str = ""  # interpreter of the actor; empty: the one that runs the runtime
    threads: int = _least(0, 0, 4096)  # engine threads; 0: the CPUs in the affinity mask and quota
    replicas: int = _least(1, 1, 1024)  # actors of a model; weights are shared inside each only
    devices: str = ""  # GPUs, as in CUDA_VISIBLE_DEVICES: each has an actor, which sees no other
    heartbeat_ms: int = _least(1, 200)
    hang_seconds: float = _least(0.1, 5.0)  # no progress for max(this, hang_factor x predicted)
    hang_factor: float = _least(1, 10.0)
    start_timeout_seconds: float = _least(0.1, 120.0)
    restart_limit: int = _least(1, 5)  # more within the window, not of what is asked: stopped
    restart_window_seconds: float = _least(0.1, 60.0)

    def __post_init__(self) -> None:
        """Check the bounds, and that an actor is heard of often enough."""
        _Section.__post_init__(self)
        if self.heartbeat_ms >= self.hang_seconds * 500:
            most = f"at most half of actor.hang_seconds ({self.hang_seconds:g} s) is needed"
            raise ValueError(f"actor.heartbeat_ms is {self.heartbeat_ms}, {most}")

    @property
    def device_of_each(self) -> list[str]:
        """Return the device of each actor of a model, empty where it may see all."""
        devices = self.devices.replace(",", " ").split() or [""]
        return [devices[i % len(devices)] for i in range(max(self.replicas, len(devices)))]


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeConfig(_Section):
    """Where a runtime is, where it keeps what changes, how long it drains, what it may load."""

    address: str = "embedded"  # auto, FOLDER of a daemon, tcp://…?keys=…; also LRAI_RUNTIME
    socket_dir: str = ""  # parent of the 0700 folder of sockets; empty: the temporary folder
    state_dir: str = ""  # of freezes and audit; empty: a daemon's own folder, nowhere if embedded
    drain_seconds: float = _least(0, 30.0)
    memory_mib: int = _least(0, 0)  # of all actors; 0: no limit
    model_roots: str = ""  # folders that artifacts may lie in, with : between; empty: anywhere
    capture_rows: int = _least(0, 0)  # of real requests, kept in state_dir to tune on; 0: none
    capture_ttl_hours: float = _least(0.01, 24.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitsConfig(_Section):
    """What one request may hold."""

    request_bytes: int = _least(1, 64 << 20)
    request_rows: int = _least(1, 4096)
    nan_policy: Literal["pass", "reject"] = "pass"


@dataclass(frozen=True, slots=True, kw_only=True)
class LraiConfig:
    """Every setting there is."""

    limits: LimitsConfig = field(default_factory=LimitsConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    actor: ActorConfig = field(default_factory=ActorConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)


# What Kubernetes tells every pod of a service, say one that is called lrai-runtime.
_LINK: Final = re.compile(r"_SERVICE_(HOST|PORT\w*)$|_PORT(_\d+_(TCP|UDP|SCTP)(_\w+)?)?$")
_QUOTA: Final = Path("/sys/fs/cgroup/cpu.max")
_LIMIT: Final = Path("/sys/fs/cgroup/memory.max")
_MEMORY: Final = Path("/proc/meminfo")
_SECTIONS: Final = typing.get_type_hints(LraiConfig)
_KINDS: Final = {  # dotted key to type, in the order of the tree
    f"{section}.{name}": kind
    for section, node in _SECTIONS.items()
    for name, kind in typing.get_type_hints(node).items()
}


OWN_SETTINGS: Final = {  # of one model
    "actor.devices", "actor.isolation", "actor.replicas", "actor.threads", "runtime.capture_rows",
    "runtime.capture_ttl_hours", "scheduler.deterministic", "scheduler.latency_slo_ms",
    "scheduler.max_batch_elements", "scheduler.max_batch_rows", "scheduler.weight",
}  # fmt: skip


class Setting(NamedTuple):
    """One value with where it came from."""

    key: str
    value: Any
    origin: str


def load_config(**said: Any) -> LraiConfig:
    """Return the settings of this call; see `explain_config`, which takes the same."""
    return _build(explain_config(**said))


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
    layers = [
        *_from_file(file),
        ("environment", _from_environ(os.environ if environ is None else environ)),
        *(("host", host or {}), ("flag", flags or {}), ("call", call or {})),
    ]
    return _settings(LraiConfig(), layers)


def with_settings(config: LraiConfig, settings: Mapping[str, Any]) -> LraiConfig:
    """Return `config` but for these settings of one model, by dotted key, checked as any are.

    Raises:
        UsageError: As `explain_config`, or one that is not a model's own.
    """
    if others := settings.keys() - OWN_SETTINGS:
        known = ", ".join(sorted(OWN_SETTINGS))
        raise UsageError(f"{shorten(min(others))!r} is no setting of one model: {known} are")
    return _build(_settings(config, [("settings", settings)]))


def available_cpus() -> int:
    """Return how many CPUs this process may use: of its affinity mask, and of its cgroup's quota.

    The quota is version 2's, as a container sees its own: what Kubernetes calls a limit.
    """
    count = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):  # no quota: max
        quota, period = map(int, _QUOTA.read_text(encoding="ascii").split())
        count = min(count, max(1, quota // period))
    return count


def available_bytes() -> int:
    """Return how much memory a process may yet take: of the machine's, and of its cgroup's limit.

    Of the limit all counts as free: in what is in use are pages of files, which make room.
    """
    (told,) = re.findall(r"MemAvailable:\s+(\d+) kB", _MEMORY.read_text(encoding="ascii"))
    found = int(told) << 10
    with contextlib.suppress(OSError, ValueError):  # no limit: max
        found = min(found, int(_LIMIT.read_text(encoding="ascii")))
    return found


def _settings(base: LraiConfig, layers: list[tuple[str, Mapping[str, Any]]]) -> list[Setting]:
    """Return every setting of `base`, but for what the layers say, the last one first."""
    values = {key: Setting(key, attrgetter(key)(base), "default") for key in _KINDS}
    for origin, layer in layers:
        for key, raw in layer.items():
            if key not in _KINDS:
                near = [known for known in _KINDS if known.split(".")[0] == key.split(".")[0]]
                allowed = ", ".join(sorted(near or _SECTIONS))
                raise UsageError(f"{origin}: unknown setting {shorten(key)!r}; known: {allowed}")
            shown = _variable(key) if origin == "environment" else origin
            values[key] = Setting(key, _convert(key, raw, origin), shown)
    settings = list(values.values())
    _build(settings)
    return settings


def _build(settings: list[Setting]) -> LraiConfig:
    tree: dict[str, dict[str, Any]] = {section: {} for section in _SECTIONS}
    for setting in settings:
        section, _, name = setting.key.partition(".")
        tree[section][name] = setting.value
    try:
        return LraiConfig(**{section: kind(**tree[section]) for section, kind in _SECTIONS.items()})
    except ValueError as error:
        raise UsageError(str(error)) from None


def _from_file(file: Path | None) -> list[tuple[str, Mapping[str, Any]]]:
    """Return the layer of the file, none where no file was named and none lies here."""
    found = Path("lrai.toml") if file is None else file
    if file is None and not (os.access(found, os.F_OK) and found.is_file()):  # nor may look
        return []
    try:
        tree = tomllib.loads(found.read_text(encoding="utf-8"))
    except OSError as error:
        raise EnvironmentProblem(f"{found}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{found} is not TOML: {error}") from None
    flat: dict[str, Any] = {}
    for section, content in tree.items():
        if not isinstance(content, dict):
            raise UsageError(f"{found}: {shorten(section)!r} stands outside a section")
        flat |= {f"{section}.{name}": value for name, value in content.items()}
    if file is None and ("actor.python" in flat or "://" in str(flat.get("runtime.address"))):
        why = "names a program to run, or another machine to ask, which a working folder must not"
        where = "set it where you name the file, in the environment or in code"
        raise UsageError(f"{found} {why}; {where}")
    return [(found.name, flat)]


def _from_environ(environ: Mapping[str, str]) -> dict[str, str]:
    variables = {_variable(key): key for key in _KINDS}
    sections = tuple(f"{_variable(section)}_" for section in _SECTIONS)
    said = {name for name, value in environ.items() if value}  # what is empty is not set
    named = {name for name in said if name.startswith(sections) or name in variables}
    if unknown := min((n for n in named - variables.keys() if not _LINK.search(n)), default=""):
        own = sorted(v for v in variables if v.split("_")[1] == unknown.split("_")[1])
        raise UsageError(f"environment: {shorten(unknown)} is no setting; known: {', '.join(own)}")
    return {variables[name]: environ[name] for name in named & variables.keys()}


def _variable(key: str) -> str:
    return "LRAI_" + key.removesuffix(".address").replace(".", "_").upper()


def _convert(key: str, raw: Any, origin: str) -> Any:
    """Return `raw`, which may be text, in the type of the setting."""
    kind = _KINDS[key]
    try:
        return msgspec.convert(raw, kind, strict=False)
    except (msgspec.ValidationError, ValueError):
        choices = ", ".join(typing.get_args(kind))  # of a Literal
        needed = f"allowed: {choices}" if choices else f"a value of type {kind.__name__} is needed"
    raise UsageError(f"{origin}: {key} is {shorten(repr(raw))}, {needed}")
