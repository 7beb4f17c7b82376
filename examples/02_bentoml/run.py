"""From a model to a Bento that serves: compile, init, build, serve, ask.

`lrai bentoml init` writes a service that hands arrays through; the one beside this file is what a
person would make of it. It takes BentoML: `pip install '.[bentoml]'` in a checkout.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import bentoml
import numpy as np
import onnxruntime

import lrai_core as lrai

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.models import classifier

HERE = Path(__file__).parent
BIN = Path(sys.executable).parent


def main() -> None:
    """Run the example."""
    with tempfile.TemporaryDirectory() as scratch:
        project = Path(scratch, "project")
        # Folders of this example's own: a store, and a runtime that nobody else asks.
        variables = {
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "BENTOML_HOME": str(Path(scratch, "home")),
            "BENTOML_DO_NOT_TRACK": "true",
            "LRAI_RUNTIME_SOCKET_DIR": scratch,
        }

        # 1. Compile: fp32, and whatever is faster and passes the gate on these labelled rows.
        model, rows = classifier(Path(scratch, "classifier.onnx"), seed=0)
        out = Path(scratch, "classifier.lrai")
        artifact = lrai.compile(model, out=out, evaluation=rows, output_map="softmax")
        print(f"serving {artifact.manifest.chosen}")

        # 2. A project: the model saved, the wheel of lrai packed. Then a service of our own.
        init = ["lrai", "bentoml", "init", str(out), "--folder", str(project)]
        run(init, Path(scratch), variables)
        shutil.copy(HERE / "service.py", project)

        # 3. Build. The Bento holds service, model and lrai: it runs elsewhere too.
        said = run(["bentoml", "build"], project, variables)
        print(next(line for line in said.splitlines() if "Successfully built" in line))

        # 4. Serve it, and ask.
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        log = Path(scratch, "log")
        command = [str(BIN / "bentoml"), "serve", "classifier:latest", "-p", port]
        with log.open("wb") as output:
            server = subprocess.Popen(
                command, env=os.environ | variables, stdout=output, stderr=output
            )
        try:
            address = f"http://127.0.0.1:{port}"
            with bentoml.SyncHTTPClient(address, server_ready_timeout=120) as client:
                answer = client.call("classify", features=rows["features"][:5].tolist(), top=2)
        finally:
            server.terminate()
            server.wait()

        # 5. Compare with the model as it was given.
        session = onnxruntime.InferenceSession(model)
        (logits,) = session.run(None, {"features": rows["features"][:5]})
        for best, expected in zip(answer, np.argmax(logits, axis=1), strict=True):
            print(f"{best}  the original says {expected}")


def run(command: list[str], folder: Path, variables: Mapping[str, str]) -> str:
    """Return what a command prints."""
    program = str(BIN / command[0])
    done = subprocess.run(
        [program, *command[1:]], cwd=folder, env={**os.environ, **variables}, check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    return done.stdout


if __name__ == "__main__":
    main()
