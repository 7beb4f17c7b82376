"""`mlflow deployments … -t lrai`: where MLflow looks for the plugin; all of it is a command."""

from lrai_mlflow.commands.deployments import Client, run_local, target_help

__all__ = ["Client", "run_local", "target_help"]
