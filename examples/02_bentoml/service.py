"""A service of one's own around a runner: it turns logits into the likeliest classes."""

# BentoML reads bare arrays only, and its decorators have no types that mypy knows.
# mypy: disable-error-code="type-arg, untyped-decorator, attr-defined"

import bentoml
import numpy as np

import lrai_bentoml


@bentoml.service(workers=2)
class Classifier:
    """Two workers, one runtime behind them."""

    model = lrai_bentoml.runner("classifier:latest")

    @bentoml.api
    async def classify(self, features: np.ndarray, top: int = 3) -> list[dict[int, float]]:
        """Return, for each row of features [rows, 64], the likeliest classes and how likely."""
        logits = await self.model.async_run(features)
        shares = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        order = np.argsort(-shares, axis=1)[:, :top]
        return [
            {int(label): round(float(row[label]), 4) for label in best}
            for row, best in zip(shares, order, strict=True)
        ]


Classifier.add_asgi_middleware(lrai_bentoml.Guard)
