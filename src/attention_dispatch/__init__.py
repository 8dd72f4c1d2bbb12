"""Route any PyTorch attention call to any attention kernel: one interface, one meaning, every kernel."""

from . import policies
from .api import dispatch_attention_fn, explain, scaled_dot_product_attention
from .errors import (
    AttentionDispatchError,
    BackendRejectedError,
    BackendUnavailableError,
    InvalidCallError,
    NoBackendError,
    Reason,
    UnknownBackendError,
)
from .models import AttentionModelMixin, reset_attention_backend, set_attention_backend
from .recording import record
from .registry import Backend, Status, register_backend
from .registry import names as list_backends
from .registry import status as backend_status
from .request import attention_backend
from .settings import _AttentionBackendRegistry, set_checks
from .tuning.session import tuning

__version__ = "0.1.0"

__all__ = [
    "AttentionDispatchError",
    "AttentionModelMixin",
    "Backend",
    "BackendRejectedError",
    "BackendUnavailableError",
    "InvalidCallError",
    "NoBackendError",
    "Reason",
    "Status",
    "UnknownBackendError",
    "_AttentionBackendRegistry",
    "attention_backend",
    "backend_status",
    "dispatch_attention_fn",
    "explain",
    "list_backends",
    "policies",
    "record",
    "register_backend",
    "reset_attention_backend",
    "scaled_dot_product_attention",
    "set_attention_backend",
    "set_checks",
    "tuning",
]
