"""The Python client of Tunesmith: `TuningClient`, `LLMClient`, typed results, and one error tree.

Names are loaded when they are first used, so that importing the package stays cheap.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tuning_sdk.client import TuningClient
    from tuning_sdk.errors import (
        AuthenticationError,
        BadRequestError,
        ConflictError,
        ConnectionError,
        NotFoundError,
        PermissionError,
        RateLimitError,
        ServerError,
        TimeoutError,
        TuningAPIError,
        ValidationError,
    )
    from tuning_sdk.inference import AsyncLLMClient, LLMClient
    from tuning_sdk.models import (
        ChatAnswer,
        CreatedJob,
        Dataset,
        Estimate,
        Generation,
        Job,
        JobEvent,
        LoadedModel,
        LogLines,
        Model,
        ModelInfo,
        Preview,
        Token,
    )

__version__ = "0.1.0"

_HOMES = {
    "TuningClient": "client",
    "AsyncLLMClient": "inference",
    "LLMClient": "inference",
    "ChatAnswer": "models",
    "Generation": "models",
    "LoadedModel": "models",
    "ModelInfo": "models",
    "AuthenticationError": "errors",
    "BadRequestError": "errors",
    "ConflictError": "errors",
    "ConnectionError": "errors",
    "NotFoundError": "errors",
    "PermissionError": "errors",
    "RateLimitError": "errors",
    "ServerError": "errors",
    "TimeoutError": "errors",
    "TuningAPIError": "errors",
    "ValidationError": "errors",
    "CreatedJob": "models",
    "Estimate": "models",
    "Dataset": "models",
    "Job": "models",
    "JobEvent": "models",
    "LogLines": "models",
    "Model": "models",
    "Preview": "models",
    "Token": "models",
}

__all__ = [
    "AsyncLLMClient",
    "AuthenticationError",
    "BadRequestError",
    "ChatAnswer",
    "ConflictError",
    "ConnectionError",
    "CreatedJob",
    "Dataset",
    "Estimate",
    "Generation",
    "Job",
    "JobEvent",
    "LLMClient",
    "LoadedModel",
    "LogLines",
    "Model",
    "ModelInfo",
    "NotFoundError",
    "PermissionError",
    "Preview",
    "RateLimitError",
    "ServerError",
    "TimeoutError",
    "Token",
    "TuningAPIError",
    "TuningClient",
    "ValidationError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tuning_sdk' has no attribute {name!r}")
    return getattr(import_module(f"tuning_sdk.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
