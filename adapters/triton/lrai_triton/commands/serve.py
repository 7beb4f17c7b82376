"""`lrai triton serve`: the server, the shared runtime and the watch: one process of a container."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from lrai_core import ConditionNotMet, EnvironmentProblem, UsageError, load_config
from lrai_triton.commands.app import BACKENDS, END_SECONDS, PROGRAM, app
from lrai_triton.commands.watch import KEY, LOADING, named_key, parent_of, say, told_key

_RESTRICTIONS: Final = ("http-restricted-api", "grpc-restricted-protocol")
_LOOK_SECONDS: Final = 0.2
_RESTART_SECONDS: Final = 2.0  # before a watch that has ended is started again

Watched = Annotated[bool, typer.Option("--watch/--no-watch", help="Reload models that have died.")]
Arguments = Annotated[list[str], typer.Argument(help="Arguments of tritonserver, after --.")]


@app.command()
def serve(arguments: Arguments, *, watched: Watched = True) -> None:
    """Run tritonserver with the shared runtime and the watch: the one process of a container.

    SIGTERM and SIGINT go to the server, which drains; its exit status is this one's.
    """
    if not (program := shutil.which("tritonserver")):
        raise EnvironmentProblem(f"no tritonserver on PATH, which is {os.environ.get('PATH')!r}")
    backends = _given(arguments, "backend-directory", BACKENDS)[-1]
    if not Path(backends, "lrai", "model.py").is_file():
        raise EnvironmentProblem(f"no backend: lrai triton install --backend-directory {backends}")
    if watched and _given(arguments, "allow-http", "")[-1].lower() in ("false", "0"):
        raise UsageError("--allow-http is false, but the watch asks by HTTP: see --no-watch")
    if watched and not _given(arguments, "model-control-mode"):
        # There, that of Vertex AI is open by default.
        ports = {"vertex-ai": str(os.environ.get("AIP_MODE") == "PREDICTION"), "sagemaker": ""}
        arguments = [*arguments, "--model-control-mode=explicit"]
        arguments += ["--load-model=*"] * (not _given(arguments, "load-model"))  # as without a mode
        if {_given(arguments, f"allow-{p}", ports[p])[-1].lower() for p in ports} & {"true", "1"}:
            why = "the port of Vertex AI or SageMaker would load models for all, without a key"
            raise UsageError(f"{why}: see --no-watch")
        keys = _keys(arguments)
        said = next(iter(keys.values()), "") or told_key() or secrets.token_hex(16)
        # Else whoever asks could load code, by the protocol that is left open.
        name, _, value = named_key(said).partition("=")  # gRPC knows names in lower case alone
        own = f"{LOADING}:{name.lower()}={value}"
        arguments += [f"--{option}={own}" for option in _RESTRICTIONS if option not in keys]
    commands = [[program, *arguments]]
    if watched:
        os.environ[KEY] = _keys(arguments).get(_RESTRICTIONS[0]) or told_key()
        host = _given(arguments, "http-address", "127.0.0.1")[-1]  # 0.0.0.0 leads there, too
        url = f"http://{host}:{_given(arguments, 'http-port', '8000')[-1]}"
        commands.append([*PROGRAM, "triton", "watch", "--url", url])
    told, ours = list[int](), False
    # From now on: process 1 of a container hears nothing that it does not handle.
    before = _handled_by(lambda number, _: told.append(number))
    try:
        # The runtime is not left to the first stub: like this its settings are those given here,
        # whatever model loads first, what is wrong with it is said at once, and it lives on during
        # reloads. One on another machine is not ours to start.
        ours = "://" not in load_config().runtime.address and _start_runtime(told)
        status = -told[0] if told else _run_both(commands, told)
    finally:
        if ours:
            subprocess.run([*PROGRAM, "runtime", "stop"], capture_output=True, check=False)
        for kept, handler in before.items():
            signal.signal(kept, handler)
    raise typer.Exit(status if status >= 0 else 128 - status)


def _keys(arguments: list[str]) -> dict[str, str]:
    """Return what the server demands of who loads models, HEADER=VALUE, by option."""
    found = [(o, one.partition(":")) for o in _RESTRICTIONS for one in _given(arguments, o)]
    return {o: key for o, (apis, _, key) in found if LOADING in apis.split(",")}


def _given(arguments: list[str], name: str, *default: str) -> list[str]:
    """Return the values of an option of tritonserver, which holds no NUL; the last one counts."""
    return [*default, *re.findall(rf"\0--{name}[=\0]([^\0]*)", "\0".join(["", *arguments]))]


def _start_runtime(told: list[int]) -> bool:
    """Have the shared runtime run; return whether it was started for that.

    One that is started here is ended again where this is told to end meanwhile, or waited for it in
    vain: by a signal, for it hears no client until it serves what it served before, which may take
    minutes.
    """
    command, begun, stopped = [*PROGRAM, "runtime", "start"], set[int](), False
    # In a group of its own, as the others are: Ctrl-C comes from here alone.
    with subprocess.Popen(command, stdout=subprocess.PIPE, process_group=0) as start:
        while start.poll() is None and not stopped:
            if stopped := bool(told):
                start.send_signal(signal.SIGSTOP)  # lest it starts the next one
            running = (int(folder.name) for folder in Path("/proc").glob("[0-9]*"))
            found = {pid for pid in running if parent_of(pid) == start.pid}
            begun = found if start.poll() is None else begun  # then they are no longer its own
            time.sleep(_LOOK_SECONDS)
        until = time.monotonic() + (float("inf") if told else END_SECONDS)
        if start.poll() != 0:
            for pid in begun:
                with contextlib.suppress(ProcessLookupError):  # it has ended by itself
                    os.kill(pid, signal.SIGTERM)
            # A second signal waits for nothing; what hangs in the kernel may never end.
            while any(map(parent_of, begun)) and len(told) < 2 and time.monotonic() < until:
                time.sleep(_LOOK_SECONDS)
            start.kill()
        said, _ = start.communicate()
    if start.returncode and not told:
        raise EnvironmentProblem("the shared runtime cannot be started, see above")
    return b"was started" in said


def _run_both(commands: list[list[str]], told: list[int]) -> int:
    """Return the first program's exit status when it has ended; what is told goes to both."""
    # The stub is the first python3 on PATH.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environ, processes = {**os.environ, "PATH": path}, list[subprocess.Popen[bytes]]()
    try:
        for command in commands:  # in groups of their own: Ctrl-C comes from here alone
            processes.append(subprocess.Popen(command, env=environ, process_group=0))
        (server, *watches), passed_on = processes, 0
        while server.poll() is None:
            for number in told[passed_on:]:  # a terminal that closes ends a server, as others do
                passed_on += 1
                for process in processes:
                    process.send_signal(number if number == signal.SIGINT else signal.SIGTERM)
            ended = watches[0].poll() if watches else None
            if ended == ConditionNotMet.exit_code:  # whoever runs us starts us anew
                say("no model is left: the server ends, too")
                return ConditionNotMet.exit_code
            if ended == EnvironmentProblem.exit_code:
                say("nothing is watched, for the reason above")
                watches = []
            elif ended is not None and not told:
                say(f"the watch has ended with status {ended}: it is started again")
                time.sleep(_RESTART_SECONDS)
                with contextlib.suppress(OSError):  # no process can be made now: at the next look
                    processes[1] = subprocess.Popen(commands[1], env=environ, process_group=0)
                watches = processes[1:]
            time.sleep(_LOOK_SECONDS)
        return server.returncode
    finally:
        for process in processes:
            process.terminate()
            process.wait()


def _handled_by(handler: Any) -> dict[int, Any]:
    """Have what ends a program told to this; return whom it was told to, by signal."""
    ends = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    # One that nohup has had ignored stays so.
    return {n: signal.signal(n, handler) for n in ends if signal.getsignal(n) != signal.SIG_IGN}
