"""A container of the standard library alone, sound but for one fault that its argument names.

    SAGEMAKER_BIND_TO_PORT=8080 python planted.py FAULT

It answers `{"x": …}` with `{"y": …}`, a second and a half later.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from typing import Any

FAULT = sys.argv[1]
TRACE = 'Traceback (most recent call last):\n  File "app.py", line 1'
MODELS: dict[str, str] = {}
ANSWERED = itertools.count()
BEFORE_SIGTERM = 5  # requests that the check sends before those that SIGTERM comes upon


class Handler(BaseHTTPRequestHandler):
    """The contract, as a first version of a container often has it."""

    def do_GET(self) -> None:
        name = self.path.removeprefix("/models/")
        if self.path == "/ping":
            time.sleep(2.5 if FAULT == "ping slow" else 0)
            self.answer(404 if FAULT == "ping missing" else 200)
        elif self.path == "/execution-parameters":
            most = 200 if FAULT == "advice beyond its bounds" else 10
            strategy = "" if FAULT == "advice without strategy" else "MULTI_RECORD"
            advice = {"MaxConcurrentTransforms": most, "MaxPayloadInMB": 6}
            self.answer(200, {**advice, "BatchStrategy": strategy})
        elif self.path == "/models":
            listed = [{"modelName": name, "modelUrl": url} for name, url in MODELS.items()]
            self.answer(200, {"models": [] if FAULT == "models not listed" else listed})
        else:
            self.answer(200 if name in MODELS or FAULT == "every model known" else 404)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if FAULT == "large body dropped" and len(body) > 1 << 20:
            self.connection.close()
            return None
        if self.path == "/models":
            return self.load(json.loads(body))
        name = self.path.removeprefix("/models/").removesuffix("/invoke")
        if self.path != "/invocations" and name not in MODELS:
            return self.answer(404)
        if FAULT == "ping lies":
            return self.answer(503, {"error": "the model is not there yet"})
        try:
            if self.headers["Content-Type"] != "application/json":
                raise ValueError("JSON is needed")
            value = json.loads(body)["x"]
        except (ValueError, KeyError, RecursionError) as error:
            said = TRACE if FAULT == "stack trace" else str(error)
            status = {"bad is fine": 200, "bad is an own fault": 500}.get(FAULT, 400)
            return self.answer(status, {"error": said})
        if FAULT == "requests dropped" and next(ANSWERED) >= BEFORE_SIGTERM:
            time.sleep(60)  # it ends before, however late SIGTERM comes
        time.sleep(2.5 if FAULT == "ping waits" else 1.5)
        return self.answer(200, {"y": value})

    def do_DELETE(self) -> None:
        gone = MODELS.pop(self.path.removeprefix("/models/"), "")
        self.answer(200 if gone or FAULT == "unload of nothing" else 404)

    def load(self, given: dict[str, str]) -> None:
        twice = given["model_name"] in MODELS and FAULT != "loaded twice"
        MODELS[given["model_name"]] = given["url"]
        self.answer(409 if twice else 200)

    def answer(self, status: int, content: object = None) -> None:
        body = json.dumps(content or {}).encode()
        self.send_response(status)
        if FAULT != "no type":
            self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def main() -> None:
    port = 0 if FAULT == "port ignored" else int(os.environ["SAGEMAKER_BIND_TO_PORT"])
    host = "127.0.0.1" if FAULT == "this machine only" else "0.0.0.0"  # noqa: S104
    kind = HTTPServer if FAULT == "ping waits" else ThreadingHTTPServer
    server = kind((host, port), Handler)
    if FAULT == "none, but slow to accept":
        accept = server.get_request

        def late() -> Any:
            time.sleep(0.2)
            return accept()

        server.get_request = late  # type: ignore[method-assign]

    def end(*_: object) -> None:
        if FAULT == "sigterm ignored":
            return
        if FAULT == "requests dropped":
            os._exit(0)
        threading.Thread(target=server.shutdown).start()

    signal.signal(signal.SIGTERM, end)
    if FAULT == "ends at once":
        sys.exit(1)
    if isinstance(server, ThreadingHTTPServer):
        server.daemon_threads = False  # their answers are waited for
    server.serve_forever()
    server.server_close()
    sys.exit(1 if FAULT == "wrong status" else 0)


if __name__ == "__main__":
    main()
