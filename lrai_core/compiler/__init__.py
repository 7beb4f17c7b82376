"""From an ONNX file to an artifact with the fastest form that passes the gate."""
