"""LRAI's errors as BentoML's, which its server answers with the same status."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from http import HTTPStatus

from lrai_core import EnvironmentProblem, LraiError


class BentoMLMissing(EnvironmentProblem, ImportError):
    """The extra `bentoml` is not installed."""


# Set by `Guard` for a request, in whose headers BentoML has no place for what an error knows.
waiting: ContextVar[list[float]] = ContextVar("lrai_bentoml_waiting")


@contextlib.contextmanager
def bento_errors() -> Iterator[None]:
    """Raise LRAI's errors as BentoML's of the same status.

    What is raised has `retry_after_seconds` where trying again makes sense. To a caller BentoML
    says what it was below 500; from 500 on only that there was an error, and the log says which.
    """
    from bentoml.exceptions import BentoMLException

    try:
        yield
    except LraiError as error:
        status = HTTPStatus(error.http_status)
        kind = BentoMLException.error_mapping.get(status, BentoMLException)
        raised = kind(str(error), error_code=status)
        wait: float | None = getattr(error, "retry_after_seconds", None)
        if wait is not None:
            raised.retry_after_seconds = wait  # type: ignore[attr-defined] # for who catches it
            if (told := waiting.get(None)) is not None:
                told.append(wait)
        raise raised from error
