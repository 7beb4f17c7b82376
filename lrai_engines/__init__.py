"""Engines beside onnxruntime, each with an extra of its own, and the forms that they bring."""
