"""A model in a runtime, for as long as some process of this user serves it.

All workers of a server, and all servers of one artifact, find it loaded. A lock on a file says who
holds it, so that a worker that was killed does not; what nobody holds is unloaded by whoever comes
or goes next, and with the runtime at the latest. Names of what is held lie beside the record of the
runtime, too: where that outlives the locks, as on a volume, the next runtime serves what it has.
"""

from __future__ import annotations

import _thread
import asyncio
import atexit
import contextlib
import fcntl
import hashlib
import json
import logging
import math
import os
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any, BinaryIO, Final

import msgspec

import lrai_core as lrai
from lrai_import.hosted import Asked, load

_WHICH: Final = {"runtime.address", "runtime.socket_dir"}  # runtime it is
_FOLDERS: Final = {"runtime.model_roots", "runtime.state_dir"}
_LOAD_SECONDS: Final = 60.0
_MOST_PAUSE_SECONDS: Final = 60.0
_log: Final = logging.getLogger("lrai.hosted")


class Held:
    """One artifact in a runtime.

    Attributes:
        name: Under which the runtime knows it.
        settings: That were asked for.
        runtime: That serves it.
        variant: That answers; another one than was asked for where that is for other machines.
    """

    def __init__(self, artifact: lrai.Artifact, settings: Asked, name: str = "") -> None:
        """Load it, or find it loaded with the same settings.

        Args:
            artifact: Opened.
            settings: What is asked for.
            name: Which says what it is, and with which settings; by default made of these.

        Raises:
            LraiError: It cannot be served as the settings demand.
        """
        asked = json.dumps([settings.own, settings.require, settings.variant], sort_keys=True)
        self.name = name or f"{artifact.manifest.name}:{artifact.version}-{_digest(asked)[:8]}"
        self.runtime = lrai.Runtime(settings.config, address="embedded" if settings.here else "")
        # Where links lead to now: it is loaded from there again, though they may be moved.
        self._artifact = replace(artifact, path=artifact.path.resolve())
        self.settings, self._loads = settings, threading.Lock()
        self._folders = [] if settings.here else folders(settings.config)
        self._lock: BinaryIO | None = None
        self._closed = self._failed = False
        self._pause, self._looks_at = 1.0, -math.inf
        try:
            tell_unheard(settings)
            if self._folders:
                file = self._folders[0] / f"{_digest(self.name)[:32]}.held"
                self._lock = _held(file)
                for folder in self._folders:
                    with contextlib.suppress(OSError):  # it is unloaded with the runtime then
                        (folder / file.name).write_text(self.name, encoding="utf-8")
            self._load()
            self._sweep()
            atexit.register(self.close)  # where nobody does, as in the process that only checks
        except BaseException:
            self.close()
            raise

    def state(self, gone: str = "dead") -> str:
        """Return the model's state: `ok`, `idle`, `stalled`, `dead`; `gone` if it is not there.

        `dead` too where it is not there and could not be loaded again.

        Raises:
            NotReady: The runtime does not answer.
        """
        return self._state() or ("dead" if self._failed else gone)

    def kept_state(self) -> str:
        """Return the same, and have a model that is gone loaded again: it is `stalled` meanwhile.

        So is one that was given up. For hosts of one model, whose traffic stops as long as it is
        not ready. It is `dead` where loading it again has failed, until it has not. More and more
        rarely, where it fails or goes again each time: models that do not fit beside one another
        would take turns for ever, and one that dies of what it is asked would be started for ever.
        """
        under_way = self._loads.locked()  # asked first: what ends now has not been seen
        state, now = self._state(), time.monotonic()
        state = "" if state == "dead" else state  # it was given up, and is started again
        if not state and not under_way and now >= self._looks_at:
            stayed = now - self._looks_at > _MOST_PAUSE_SECONDS
            self._pause = 1.0 if stayed else min(2 * self._pause, _MOST_PAUSE_SECONDS)
            self._looks_at = now + self._pause
            self.load_again()
        if state:  # whoever has loaded it
            self._failed = False
        return state or ("dead" if self._failed else "stalled")

    def _state(self) -> str:
        return next((one.state for one in self.runtime.models() if one.name == self.name), "")

    def infer(self, request: lrai.InferenceRequest) -> lrai.InferenceResponse:
        """Return the answer of the runtime; where it has unloaded the model, see `load_again`.

        Raises:
            NotReady: It has: what it says of it names the models of others.
        """
        with self._there():
            return self.runtime.infer(request)

    async def infer_async(self, request: lrai.InferenceRequest) -> lrai.InferenceResponse:
        """Return the same without blocking the event loop."""
        with self._there():
            return await self.runtime.infer_async(request)

    @contextlib.contextmanager
    def _there(self) -> Iterator[None]:
        try:
            yield
        except lrai.ModelNotFound:
            self.load_again()
            why = "the runtime had unloaded the model, which is loaded again"
            raise lrai.NotReady(why) from None

    def load_again(self) -> None:
        """Have a model loaded again that the runtime has unloaded, for others or by hand.

        Beside what else is done; who asks meanwhile finds it so.
        """
        if self._loads.acquire(blocking=False):
            try:
                threading.Thread(target=self._load_again, daemon=True).start()
            except RuntimeError:  # no other thread can be: who asks for the model next tries again
                self._failed = True
                self._loads.release()

    def _load_again(self) -> None:
        try:
            self._load()
            self._failed = False
        except lrai.LraiError as error:  # who asks for the model next tries again
            self._failed = True
            _log.warning("model %s cannot be loaded again: %s", self.name, error)
        finally:
            self._loads.release()

    def _load(self) -> None:
        folder = self._artifact.path
        there = lrai.Artifact.open(folder, verify=False).version
        # The name says which one it is; the folder of what was built is named by its source's hash.
        if there != self._artifact.version and folder.parent.name != "built":
            raise lrai.ArtifactError(f"its artifact was replaced: {there[:12]} lies there now")
        self.variant = load(self.runtime, self._artifact, self.name, **self.settings.how)

    def close(self) -> None:
        """Let go of the model; where nobody else holds it, it is unloaded."""
        if self._closed:
            return
        self._closed = True
        self._loads.acquire(timeout=_LOAD_SECONDS)  # else what is being loaded again is not found
        atexit.unregister(self.close)
        if self._lock is not None:
            self._lock.close()
        self._sweep()
        self.runtime.close()

    def _sweep(self) -> None:
        """Unload what nobody holds any more: a server that SIGTERM ends does not get to it."""
        for path in [path for folder in self._folders for path in folder.glob("*.held")]:
            lock_file = self._folders[0] / path.name
            # It is gone, or another host's.
            with contextlib.suppress(OSError, lrai.LraiError), lock_file.open("ab") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if name := path.read_text(encoding="utf-8", errors="replace"):
                    with contextlib.suppress(lrai.ModelNotFound):
                        self.runtime.unload(name)
                    path.write_bytes(b"")


def when_gone(owner: object, close: Callable[[], object]) -> None:
    """Have `close` run when nobody has the owner any more, in a thread of its own.

    Garbage is found in any thread, whatever lock it holds: also in the one that `close` waits for.
    """
    weakref.finalize(owner, _thread.start_new_thread, close, ()).atexit = False


class Questions:
    """What hosts ask of a runtime that may hang: each question in a thread of its own, once.

    The threads hold up neither the host's pool nor the end of the process.
    """

    def __init__(self) -> None:
        """Ask nothing yet."""
        self._asking: dict[Callable[[], Any], Future[Any]] = {}

    async def soon(self, question: Callable[[], Any], seconds: float) -> Any:
        """Return the answer, of the same question that is under way if one is.

        Raises:
            TimeoutError: There is none so soon.
            Exception: What the question raises.
        """
        known = self._asking.get(question)
        if known is None or known.done():
            known = Future[Any]()
            threading.Thread(target=_answer, args=(question, known), daemon=True).start()
            self._asking[question] = known
        return await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(known)), seconds)


def _answer(question: Callable[[], Any], answer: Future[Any]) -> None:
    try:
        answer.set_result(question())
    except Exception as error:  # noqa: BLE001 - edge: it is told to who asks
        answer.set_exception(error)


def _held(file: Path) -> BinaryIO:
    """Return a lock on a file, which is made; not on one that was deleted meanwhile, by its age."""
    while True:
        lock = file.open("ab")
        fcntl.flock(lock, fcntl.LOCK_SH)  # waits while another one unloads it
        with contextlib.suppress(OSError):
            if file.stat().st_ino == os.fstat(lock.fileno()).st_ino:
                return lock
        lock.close()


def folders(config: lrai.LraiConfig) -> list[Path]:
    """Return the folders that name what is held: that of the locks, and one beside the record.

    The record may outlive the folder of sockets, as on a volume, and has the next runtime serve it.
    """
    if (locks := lock_folder(config)) is None:
        return []
    has = running(config)
    beside = Path(has.runtime.state_dir, "held") if has else locks
    with contextlib.suppress(OSError):  # it is not to be seen from here, or full
        beside.mkdir(mode=0o700, exist_ok=True)
    return [locks, beside]


def lock_folder(config: lrai.LraiConfig) -> Path | None:
    """Return the folder of locks beside a shared runtime of this machine; None for any other.

    The runtime has made the folder that it lies in, which is this user's alone.
    """
    address = config.runtime.address
    if address == "embedded" or "://" in address:
        return None
    if address == "auto":
        parent = config.runtime.socket_dir or tempfile.gettempdir()
        address = str(Path(parent, f"lrai-{os.geteuid()}"))
    folder = Path(address, "held")
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def tell_unheard(asked: Asked) -> None:
    """Warn of settings that a shared runtime does not have as they are asked for with a model.

    It has those of who started it. Of one of another machine they are not known, so it is all.
    """
    if asked.here or asked.config.runtime.address == "embedded":
        return
    has = running(asked.config)
    wanted = {key: _meant(asked.config, key) for key in asked.rest.keys() - _WHICH}
    if others := [key for key, value in wanted.items() if has is None or _meant(has, key) != value]:
        words = "%s: the shared runtime keeps what it was started with, not what is asked for here"
        _log.warning(words, ", ".join(sorted(others)))


def running(config: lrai.LraiConfig) -> lrai.LraiConfig | None:
    """Return what the shared runtime of this machine was started with; None where not known."""
    with contextlib.suppress(OSError, msgspec.MsgspecError, ValueError):  # of another version
        if (locks := lock_folder(config)) is not None:
            content = locks.with_name("settings").read_bytes()  # it keeps them for the next one
            return msgspec.msgpack.decode(content, type=tuple[lrai.LraiConfig, str])[0]
    return None


def _meant(config: lrai.LraiConfig, key: str) -> Any:
    """Return what a setting says: of folders where they are, for a runtime keeps them absolute."""
    said = attrgetter(key)(config)
    return [Path(one).resolve() for one in said.split(":") if one] if key in _FOLDERS else said


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
