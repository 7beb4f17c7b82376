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

    To a caller BentoML says what it was below 500; from 500 on, only that there was an error, and
    its log says which.
    """
    from bentoml.exceptions import BentoMLException

    try:
        yield
    except LraiError as error:
        status = HTTPStatus(error.http_status)
        known = BentoMLException.error_mapping.get(status, BentoMLException)
        # A service's own may want more than words.
        kind = known if known.__module__.startswith("bentoml.") else BentoMLException
        if (wait := getattr(error, "retry_after_seconds", None)) is not None:
            waiting.get([]).append(wait)
        raise kind(str(error), error_code=status) from error
