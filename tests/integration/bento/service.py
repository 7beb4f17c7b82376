"""What the servers of these tests serve; it is copied into a project of its own."""

# BentoML reads bare arrays only, and its decorators have no types that mypy knows.
# mypy: disable-error-code="type-arg, untyped-decorator, attr-defined"

import bentoml
import numpy as np

import lrai_bentoml
import lrai_core as lrai

tokens = lrai_bentoml.runner("tokens:latest")
classifier = lrai_bentoml.runner("classifier:latest")
minilm = lrai_bentoml.runner("minilm:latest")


@bentoml.service(workers=3, traffic={"timeout": 280})
@bentoml.asgi_app(lrai_bentoml.asgi_app(tokens, classifier, minilm))
class Shop:
    """Three models, asked in each way that there is."""

    tokens = tokens
    classifier = classifier
    minilm = minilm

    @bentoml.api
    async def mean(
        self, input_ids: np.ndarray, attention_mask: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Return both outputs of the token model."""
        mean, each = await self.tokens.async_run(input_ids, attention_mask=attention_mask)
        return {"mean": mean, "tokens": each}

    @bentoml.api
    async def classify(self, features: np.ndarray) -> np.ndarray:
        """Return logits, awaited."""
        logits: np.ndarray = await self.classifier.async_run(features)
        return logits

    @bentoml.api
    def classify_in_a_thread(self, features: np.ndarray) -> np.ndarray:
        """Return logits, without a coroutine."""
        logits: np.ndarray = self.classifier.run(features)
        return logits

    @bentoml.api
    async def embed(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
        """Return the embeddings of sentences."""
        embeddings: np.ndarray = await self.minilm.async_run(input_ids, attention_mask)
        return embeddings

    @bentoml.api
    async def hurry(self, features: list[list[float]], timeout_ms: float) -> np.ndarray:
        """Return logits within a time."""
        inputs = {"features": np.array(features, np.float32)}
        request = lrai.InferenceRequest(model_name="", inputs=inputs, timeout_ms=timeout_ms)
        return np.asarray((await self.classifier.infer_async(request)).outputs["logits"])


Shop.add_asgi_middleware(lrai_bentoml.Guard)
