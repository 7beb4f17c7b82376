"""Compile a model, serve it, compare its answers, check its certificate: LRAI in a minute.

The model is a small classifier that is trained here; any ONNX file and rows to judge it will do.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime

import lrai_core as lrai

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.models import classifier


def main() -> None:
    """Run the example."""
    with tempfile.TemporaryDirectory() as folder:
        model, rows = classifier(Path(folder, "classifier.onnx"), seed=0, hidden=512)

        # 1. Compile: fp32, and whatever is faster and passes the gate on these labelled rows.
        artifact = lrai.compile(
            model, out=Path(folder, "classifier.lrai"), evaluation=rows, output_map="softmax"
        )
        for variant in artifact.variants:
            print(f"{variant.id:14} {variant.speedup:4.2f} x fp32  {variant.why}")

        # 2. Infer: the model runs in a process of its own, requests of all threads share calls.
        features = rows["features"][:100]
        with lrai.Runtime.open(artifact) as runtime:
            request = lrai.InferenceRequest(model_name="classifier", inputs={"features": features})
            answer = runtime.infer(request)
        print(f"answered by {answer.parameters['variant']}, version {answer.model_version}")

        # 3. Compare with the model as it was given.
        session = onnxruntime.InferenceSession(model)
        (expected,) = session.run(None, {"features": features})
        same = np.mean(answer.outputs["logits"].argmax(axis=1) == expected.argmax(axis=1))
        print(f"same class as the original on {same:.0%} of {len(features)} rows")

        # 4. Check the certificate: every field, and a part of its sample on the real engines.
        for certificate in lrai.certificates(artifact):
            print(certificate.statement())
            verdict = lrai.check(certificate, artifact)
            print("the certificate holds" if verdict.holds else f"objections: {verdict.objections}")


if __name__ == "__main__":
    main()
