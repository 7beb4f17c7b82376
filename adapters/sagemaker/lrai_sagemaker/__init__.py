"""The container contract of SageMaker: what `lrai sagemaker serve` runs.

A supervisor (`commands/supervisor.py`) binds the port, loads the model into the shared runtime and
keeps workers (`worker.py`) running, which answer HTTP (`app.py`). A multi-model endpoint has names
of the platform's (`names.py`) for its models (`models.py`).
"""
