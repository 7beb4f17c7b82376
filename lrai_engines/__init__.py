"""Engines beside onnxruntime, each with an extra of its own, and the forms that they bring."""

import sys

# OpenVINO would report its import to Google, from a process of its own, and keep an id in HOME,
# without which it does not load. So it has a stand-in, which is its own.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
