"""`lrai triton watch`: Triton never starts a dead stub again, so we do.

A stub is the process in which Triton runs a Python model. When it is killed, its model stays
"ready", and every request fails until somebody unloads the model and loads it again.
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import json
import os
import re
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Collection, Mapping
from math import prod
from pathlib import Path
from typing import Annotated, Any, Final
from urllib.parse import quote, unquote, urlsplit

import typer

from lrai_core import ConditionNotMet, EnvironmentProblem, UsageError, load_config
from lrai_import.built import locked, state_folder
from lrai_triton.commands.app import app, out
from lrai_triton.settings import WATCH, instances_of

_URL: Final = "http://127.0.0.1:8000"
KEY, LOADING = "TRITON_REPOSITORY_KEY", "model-repository"  # whoever has the one may do the other
_ASKED = {"model-config": "/config", "statistics": "/stats", "metadata": "", "inference": "/infer"}
_MOST_RELOADS, _WINDOW_SECONDS = 5, 60.0
_TIMES_USUAL: Final = 3  # what a request takes: so long a model may be silent in any case
_LOST: Final = (OSError, http.client.HTTPException, ValueError)  # the last is no Triton's
# Triton takes a name as it stands in the path: what can stand there is not escaped.
_AS_IT_IS: Final = "/!#$%&'()*+,:;<=>@[\\]^`{|}"
_SIZES: Final = {"BOOL": 1, "BYTES": 4}  # of a zero, in bytes; of an empty text, its length

Models = Annotated[list[str] | None, typer.Option(help="Model to watch; by default all of LRAI's.")]
Url = Annotated[str, typer.Option(help="Where the server answers HTTP.")]
Interval = Annotated[float, typer.Option(min=0.05, help="Seconds between looks.")]
Silent = Annotated[float, typer.Option(min=1.0, help="Seconds until a silent model is dead.")]


@app.command()
def watch(
    url: Url = _URL, model: Models = None, interval: Interval = 1.0, silent_seconds: Silent = 30.0
) -> None:
    """Reload models whose process has died; needs a server with --model-control-mode=explicit.

    A model whose requests are answered is left alone. Any other one is sent a request that its stub
    answers by itself. If a watch is killed, the next one finishes what it was doing. Models that
    another watch looks after are left to it until it ends.
    """
    if urlsplit(url).scheme != "http":
        raise UsageError(f"--url is {url!r}, http://HOST:PORT is needed")
    marks = Path(os.devnull)  # where there is no place for them
    with contextlib.suppress(OSError, EnvironmentProblem):
        # By this machine, too: the disk may be a shared one.
        marks = state_folder(load_config()) / quote(f"watch-{os.uname()[1]}-{urlsplit(url).netloc}")
        marks.mkdir(mode=0o700, exist_ok=True)
    watched, said = dict[str, _Model](), ""
    while True:
        words = f"watching {url}"
        try:
            if words != said:  # a server has come up: does it let us ask, and unload models?
                asked = {api: _ask(url, f"/models/-{p}", b"{}")[0] for api, p in _ASKED.items()}
                asked[LOADING], _ = _ask(url, "/repository/models/-/unload", b"{}")
                if asked[LOADING] == http.client.SERVICE_UNAVAILABLE:
                    raise EnvironmentProblem(f"{url} lacks --model-control-mode=explicit")
                if others := [api for api in asked if asked[api] == http.client.FORBIDDEN]:
                    what = f"{url} restricts {', '.join(others)} to who has another key"
                    raise EnvironmentProblem(f"{what}: set {KEY} to HEADER=VALUE, one for all")
            ready, marked = _models(url, model), [p for p in marks.glob("*") if p.stat().st_size]
            # A server that was started since then has not had it.
            left = [n for p in marked if (n := unquote(p.name)) in _index(url, ready=False)]
            lost = watched and all(each.lost for each in watched.values())
            if lost and (model or not _index(url)):  # what others serve is not ours to end
                raise ConditionNotMet(f"no model is left to watch; given up: {', '.join(watched)}")
            for name in model or [*ready, *left]:
                known = watched.get(name)  # given up or unloaded, it may have been loaded again
                if known is None or (not known.is_alive() and name in ready):
                    watched[name] = _Model(url, name, interval, silent_seconds, marks)
        except _LOST as error:
            words = f"no answer from {url}: {error}"
        if words != said:
            say(words)
            said = words
        time.sleep(interval)


class _Model(threading.Thread):
    """A model that is watched, until somebody unloads it, or reloading it helps no more.

    In a thread: a slow load delays no other's.

    Attributes:
        lost: It was given up.
    """

    def __init__(self, url: str, name: str, interval: float, silent: float, marks: Path) -> None:
        super().__init__(name=name, daemon=True)
        self._url, self._path, self._interval = url, f"/models/{name}", interval
        # By version; the last: since when probes got no answer.
        self._counts, self._stubs, self._silent = dict[str, Any](), _stubs(name), dict[str, float]()
        self._left, self._left_until = set[int](), 0.0  # stubs of before a reload, their time
        self._silent_seconds, self._reloads = silent, list[float]()
        self._mark, self._unloaded, self.lost = marks / quote(name, safe=""), "", False
        self.start()

    def run(self) -> None:
        """Look and reload until it is given up; where another watch does, once that has ended."""
        with contextlib.ExitStack() as alone:
            with contextlib.suppress(OSError):  # there is no place for its mark
                try:
                    alone.enter_context(locked(self._mark, fcntl.LOCK_EX | fcntl.LOCK_NB))
                except BlockingIOError:
                    say(f"{self.name} is left to another watch of {self._url} until that ends")
                    alone.enter_context(locked(self._mark, fcntl.LOCK_EX))
                if self._mark.stat().st_size:
                    self._unloaded = "a watch was killed while it reloaded it"
            say(f"{self.name} is watched")
            while not self.lost:
                try:
                    stubs, counts = _stubs(self.name), self._count()  # what is loaded has a stub
                    self._end_left(stubs)
                    self._note("" if counts else self._unloaded)  # whoever has loaded it
                    if not (counts or self._unloaded or self._left):
                        return  # somebody has unloaded it
                    deaths = [self._dead(each, counts[each], stubs[each]) for each in counts]
                    self._counts, self._stubs = self._count(), stubs  # with the probes
                    why = next(filter(None, deaths), self._unloaded)
                    self.lost = bool(why) and not self._reload(why)
                except _LOST:  # `watch` says so
                    self._silent.clear()  # what comes back has its time
                time.sleep(self._interval)

    def _count(self) -> dict[str, Any]:
        """Return what the server has counted, by version; {} if the model is unloaded."""
        _, found = _ask(self._url, f"{self._path}/stats")
        return {each["version"]: each["inference_stats"] for each in found.get("model_stats", [])}

    def _end_left(self, stubs: Mapping[str, Collection[int]]) -> None:
        """End what Triton forgets, which unloads a model of several stubs of which one is dead."""
        self._left &= _pids(stubs)
        for pid in self._left if time.monotonic() > self._left_until else ():
            with contextlib.suppress(OSError):  # it has ended, or is another user's
                os.kill(pid, signal.SIGKILL)

    def _dead(self, version: str, now: Any, stubs: Collection[int]) -> str:
        """Return in what way a version is dead, nothing if it lives."""
        path = f"{self._path}/versions/{version}"
        _, model = _ask(self._url, path)
        if self._stubs[version] and not stubs and model.get("platform") in {"lrai", "python"}:
            return "its stub is gone"  # a probe might wait behind many others that will fail
        before = self._counts.get(version, now)
        answered, failed = (now[k]["count"] - before[k]["count"] for k in ("success", "fail"))
        if failed and 0 < len(stubs) < instances_of(_ask(self._url, f"{path}/config")[1]):
            return "one of its stubs is gone"  # of several: hardly a probe would come to that one
        since = self._silent.pop(version, 0.0) * (answered <= 0)  # an answer counts however late
        if answered > 0 and not failed:
            return ""
        body, headers, asked = *_zeros(model.get("inputs", [])), time.monotonic()
        try:
            _, answer = _ask(self._url, f"{path}/infer", body, headers)
        except TimeoutError:
            success = self._count().get(version, now)["success"]
            if success["count"] > now["success"]["count"]:  # it is slow, not dead
                return ""
            usual = success["ns"] / 1e9 / max(1, success["count"])
            self._silent[version] = since or asked
            silent = time.monotonic() - self._silent[version]
            dead = silent > max(self._silent_seconds, _TIMES_USUAL * usual)
            return f"it has given no answer for {silent:.0f} s" if dead else ""
        return "its stub is not healthy" if "Stub process" in str(answer) else ""

    def _reload(self, why: str) -> bool:
        """Unload and load the model; return False where that was done too often."""
        now, path = time.monotonic(), f"/repository{self._path}"
        self._reloads = [at for at in self._reloads if now - at < _WINDOW_SECONDS]
        if len(self._reloads) >= _MOST_RELOADS:
            # Nobody else would find out: a model that is dead is "ready" as long as it is loaded.
            _ask(self._url, f"{path}/unload", b"{}")
            self._note("")
            say(f"{self.name}: {why} after {_MOST_RELOADS} reloads in a minute: unloaded, given up")
            return False
        if self._reloads:
            seen = _pids(_stubs(self.name))
            time.sleep(max(0.0, self._reloads[-1] + 2 ** (len(self._reloads) - 1) - now))
            if not self._unloaded and (not self._count() or _pids(_stubs(self.name)) - seen):
                return True  # somebody has unloaded or loaded it meanwhile
        begun, before = time.monotonic(), _pids(_stubs(self.name))
        self._reloads.append(begun)
        say(f"{self.name}: {why}; reloading it")
        self._note(why)
        _ask(self._url, f"{path}/unload", b"{}")
        status, answer = _ask(self._url, f"{path}/load", b"{}")
        self._silent.clear()
        now_there = _pids(_stubs(self.name))
        servers = {parent_of(pid) for pid in now_there - before}  # another one has stubs of its own
        self._left = {pid for pid in now_there & before if parent_of(pid) in servers}
        self._left_until = time.monotonic() + self._silent_seconds  # to answer what they have
        self._note("" if status == http.client.OK else f"it did not load: {answer}")
        say(f"{self.name}: {self._unloaded or f'reloaded in {time.monotonic() - begun:.1f} s'}")
        return True

    def _note(self, unloaded: str) -> None:
        """Take note why this watch has unloaded it, if it has; in its file for the next one."""
        self._unloaded = unloaded
        with contextlib.suppress(OSError):  # it has none; a full disk has room for this
            os.truncate(self._mark, bool(unloaded))


def _ask(url: str, path: str, body: bytes | None = None, headers: Any = None) -> tuple[int, Any]:
    """Return status and JSON of an answer, {} where it has none or is one of tensors.

    Args:
        url: The server's.
        path: Below /v2.
        body: Sent by POST; else the request is a GET.
        headers: Of the request.
    """
    # What is built at the first load takes its time.
    seconds = {"infer": 5.0, "load": 600.0}.get(path.rpartition("/")[2], 10.0)
    name, _, value = named_key(told_key()).partition("=")
    sent = {name: value, **(headers or {})}
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=seconds)
    with contextlib.closing(connection):
        connection.request("POST" if body else "GET", quote(f"/v2{path}", _AS_IT_IS), body, sent)
        reply = connection.getresponse()
        tensors = "octet-stream" in str(reply.headers["Content-Type"])
        return reply.status, json.loads(b"{}" if tensors else reply.read() or b"{}")


def _models(url: str, named: Any) -> list[str]:
    """Return the names of the models that are ready and LRAI's, or whose ever if some are named."""
    paths = {name: f"/models/{name}/config" for name in _index(url)}
    return [n for n, path in paths.items() if named or _ask(url, path)[1].get("backend") == "lrai"]


def _index(url: str, *, ready: bool = True) -> list[str]:
    """Return the names of the models that are ready, or of all that this server has ever loaded."""
    status, index = _ask(url, "/repository/index", json.dumps({"ready": ready}).encode())
    if status != http.client.OK or not isinstance(index, list):
        raise ValueError(f"status {status}")  # as of one that is no Triton
    return [each["name"] for each in index if each.get("state")]


def _stubs(model: str) -> defaultdict[str, list[int]]:
    """Return the stubs of a model that run on this machine, by version."""
    found = defaultdict[str, list[int]](list)
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError, ValueError):  # it has ended
            program, file, *more = process.read_text(errors="replace").split("\0")
            *_, name, version, _ = Path(file).parts  # REPOSITORY/MODEL/VERSION/model.py
            # A copy of a repository in a cloud has another name, but the instance has the model's.
            own = any(re.fullmatch(rf"{re.escape(model)}_\d+_\d+", one) for one in more)
            if program.endswith("python_backend_stub") and (name == model or own):
                found[version].append(int(process.parent.name))
    return found


def _pids(stubs: Mapping[str, Collection[int]]) -> set[int]:
    return {pid for pids in stubs.values() for pid in pids}


def parent_of(pid: int) -> int:
    """Return the process that has started it, 0 if it has ended."""
    with contextlib.suppress(OSError, ValueError):
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        state, parent, *_ = text.rpartition(")")[2].split()
        return int(parent) if state != "Z" else 0
    return 0


def _zeros(inputs: list[dict[str, Any]]) -> tuple[bytes, dict[str, str]]:
    """Return a request of zeros, the smallest that inputs allow, and its headers."""
    tensors, total = list[dict[str, Any]](), 0
    for given in inputs:
        shape = [1 if n < 0 else n for n in given["shape"]]
        bits = "".join(filter(str.isdigit, given["datatype"]))
        size = prod(shape) * (int(bits) // 8 if bits else _SIZES[given["datatype"]])
        tensors.append(given | {"shape": shape, "parameters": {"binary_data_size": size}})
        total += size
    answer = {"binary_data_output": True}  # JSON would have no half-precision numbers
    text = json.dumps({"id": WATCH, "inputs": tensors, "parameters": answer}).encode()
    return text + bytes(total), {"Inference-Header-Content-Length": str(len(text))}


def told_key() -> str:
    """Return the key of the environment, without the end of the line that a file of it has."""
    return os.environ.get(KEY, "").strip()


def named_key(key: str) -> str:
    """Return HEADER=VALUE; a value alone, of which base64 may end with =, is of our header."""
    return key if re.fullmatch(r"[\w-]+=(?!=+$).+", key) else f"lrai-key={key}"


def say(words: str) -> None:
    """Print what happened, and when."""
    out.print(time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), words, soft_wrap=True)
