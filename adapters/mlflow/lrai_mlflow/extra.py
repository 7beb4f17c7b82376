"""Looks for MLflow, before anything here imports it."""

from importlib.util import find_spec

from lrai_core import EnvironmentProblem


class MissingExtra(EnvironmentProblem, ImportError):
    """MLflow is not installed."""


if find_spec("mlflow") is None:
    raise MissingExtra("lrai_mlflow needs MLflow: pip install 'lrai[mlflow]'")
