"""The lrai flavor of MLflow: an artifact saved, logged, loaded and served as a model.

    import lrai_mlflow

    lrai_mlflow.log_model("minilm.lrai", name="minilm")  # then: mlflow models serve -m …

The name of this package is stored in saved models.
"""

from lrai_mlflow.flavor import FLAVOR_NAME, load_model, log_model, save_model, signature_of
from lrai_mlflow.flavor import _load_pyfunc as _load_pyfunc

__all__ = ["FLAVOR_NAME", "load_model", "log_model", "save_model", "signature_of"]
