"""LRAI in BentoML: artifacts in its model store, and the runner that services answer with.

    @bentoml.service
    class Classifier:
        model = lrai_bentoml.runner("classifier:latest")

        @bentoml.api
        async def predict(self, features: np.ndarray) -> np.ndarray:
            return await self.model.async_run(features)

The name of this package is stored in saved models.
"""

from typing import TYPE_CHECKING, Any

from lrai_bentoml.errors import BentoMLMissing as BentoMLMissing

try:
    import bentoml.exceptions as _  # noqa: F401 - not `bentoml` alone: any folder may be called so
except ImportError:
    raise BentoMLMissing("BentoML is not here: pip install 'lrai[bentoml]'") from None

from lrai_bentoml.app import asgi_app as asgi_app
from lrai_bentoml.guard import Guard as Guard
from lrai_bentoml.models import get as get
from lrai_bentoml.models import load_model as load_model
from lrai_bentoml.runner import Runner as Runner
from lrai_bentoml.runner import runner as runner

if TYPE_CHECKING:
    from lrai_bentoml.commands.saving import import_model as import_model
    from lrai_bentoml.commands.saving import save_model as save_model


def __getattr__(name: str) -> Any:
    if name not in ("import_model", "save_model"):
        raise AttributeError(f"module 'lrai_bentoml' has no attribute {name!r}")
    from lrai_bentoml.commands import saving

    return getattr(saving, name)
