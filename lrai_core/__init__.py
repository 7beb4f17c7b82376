"""LRAI: coalesced requests, gated compiled models and certificates for an existing serving stack.

The names below are the public API. The words are here at once; what needs more libraries is
imported when it is first used, so that a process that only attaches to a runtime loads neither
onnxruntime nor the compiler.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from lrai_core import errors
from lrai_core.config import OWN_SETTINGS as OWN_SETTINGS
from lrai_core.config import LraiConfig as LraiConfig
from lrai_core.config import explain_config as explain_config
from lrai_core.config import load_config as load_config
from lrai_core.errors import ActorError as ActorError
from lrai_core.errors import ArtifactError as ArtifactError
from lrai_core.errors import CompileError as CompileError
from lrai_core.errors import ConditionNotMet as ConditionNotMet
from lrai_core.errors import DeadlineExceeded as DeadlineExceeded
from lrai_core.errors import EnvironmentProblem as EnvironmentProblem
from lrai_core.errors import InvalidTensor as InvalidTensor
from lrai_core.errors import LraiError as LraiError
from lrai_core.errors import MemoryBudgetExceeded as MemoryBudgetExceeded
from lrai_core.errors import ModelNotFound as ModelNotFound
from lrai_core.errors import NotReady as NotReady
from lrai_core.errors import OutOfResources as OutOfResources
from lrai_core.errors import QueueFull as QueueFull
from lrai_core.errors import RequestError as RequestError
from lrai_core.errors import UnsupportedOperator as UnsupportedOperator
from lrai_core.errors import UsageError as UsageError
from lrai_core.events import Event as Event
from lrai_core.protocol import InferenceRequest as InferenceRequest
from lrai_core.protocol import InferenceResponse as InferenceResponse
from lrai_core.protocol import Signature as Signature
from lrai_core.protocol import Tensor as Tensor
from lrai_core.protocol import TensorSpec as TensorSpec

if TYPE_CHECKING:  # and in `_LATE`
    from lrai_core.artifact import Artifact as Artifact
    from lrai_core.artifact import Variant as Variant
    from lrai_core.compiler.compiler import Step as Step
    from lrai_core.compiler.compiler import compile as compile
    from lrai_core.compiler.model import Imported as Imported
    from lrai_core.compiler.model import check_loads as check_loads
    from lrai_core.compiler.model import declared as declared
    from lrai_core.executor import TaskError as TaskError
    from lrai_core.executor import limit_memory as limit_memory
    from lrai_core.executor import run_task as run_task
    from lrai_core.runtime.runtime import Runtime as Runtime
    from lrai_core.verifier.certificate import Certificate as Certificate
    from lrai_core.verifier.certificate import Spec as Spec
    from lrai_core.verifier.certificate import certificates as certificates
    from lrai_core.verifier.check import check as check
    from lrai_core.verifier.verifier import verify as verify

__version__ = errors.VERSION

# onnxruntime reports what it runs to its maker; a server tells nobody. It reads the variable when
# it is imported, here and in actors; who wants the reports sets it to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_LATE = {
    "artifact": ("Artifact", "Variant"),
    "compiler.compiler": ("Step", "compile"),
    "compiler.model": ("Imported", "check_loads", "declared"),
    "executor": ("TaskError", "limit_memory", "run_task"),
    "runtime.runtime": ("Runtime",),
    "verifier.certificate": ("Certificate", "Spec", "certificates"),
    "verifier.check": ("check",),
    "verifier.verifier": ("verify",),
}
_HOMES = {name: home for home, names in _LATE.items() for name in names}
_WORDS = [n for n, v in globals().items() if getattr(v, "__module__", "").startswith("lrai_core.")]

__all__ = sorted(["OWN_SETTINGS", *_WORDS, *_HOMES])  # noqa: PLE0605 - one list, kept with the imports


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lrai_core' has no attribute {name!r}")
    return getattr(import_module(f"lrai_core.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
