"""The two error families: what refuses a request (`ServiceError`) and what refuses to start (`StartupError`).

Every `ServiceError` knows its HTTP status and a stable machine-readable code, so that the API maps the whole family in
one place. A `StartupError` says what was wrong, where, and what to do; the command line prints it and exits with 2.
"""

from __future__ import annotations

from typing import Any, ClassVar


class ServiceError(Exception):
    """A request that cannot be answered. Subclasses fix the HTTP `status` and the `code`."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal"

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.variant: str | None = None
        """The variant that was to answer, where one was chosen."""

    def __reduce__(self) -> tuple[Any, ...]:
        """For another process: whatever the class's own constructor takes."""
        return _as_it_was, (type(self), self.args, self.__dict__)


def _as_it_was(kind: type[ServiceError], args: tuple[Any, ...], attributes: dict[str, Any]) -> ServiceError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(attributes)
    return error


class BadInput(ServiceError):
    """The body, a tensor or an option is wrong. Nothing reached a queue, unless only the model could tell."""

    status = 400
    code = "bad_input"


class Unauthorized(ServiceError):
    """The request has no key, or one that nobody knows."""

    status = 401
    code = "unauthorized"


class Forbidden(ServiceError):
    """Who asks is known, and may not do this; or a web page asks that may not."""

    status = 403
    code = "forbidden"


class NotFound(ServiceError):
    """The model, the variant or the path does not exist."""

    status = 404
    code = "not_found"


class MethodNotAllowed(ServiceError):
    """The path is asked by other methods: those in `allow`, which is sent as the header of that name."""

    status = 405
    code = "method_not_allowed"

    def __init__(self, message: str, allow: str) -> None:
        super().__init__(message)
        self.allow = allow


class Conflict(ServiceError):
    """What is asked for does not go with what is going on."""

    status = 409
    code = "conflict"


class BodyTooLarge(ServiceError):
    """The body, or what it inflates to, is above the configured limit."""

    status = 413
    code = "body_too_large"


class UnsupportedMediaType(ServiceError):
    """The content type is none that the base's codecs take."""

    status = 415
    code = "unsupported_media_type"


class RateLimited(ServiceError):
    """The key was used more often than its rate allows; `Retry-After` says when it may be again."""

    status = 429
    code = "rate_limited"


class QueueFull(ServiceError):
    """The variant's queue holds as many rows as it may; `Retry-After` comes from the measured drain rate."""

    status = 429
    code = "queue_full"


class DeadlineUnreachable(ServiceError):
    """By the measured cost table the request cannot be answered before its deadline; refused at the door."""

    status = 429
    code = "deadline_unreachable"


class BackendFailed(ServiceError):
    """The backend raised while running this request alone; the text carries an id, the log carries the stack."""

    status = 500
    code = "backend_failed"


class NotReady(ServiceError):
    """The service is starting or draining, or the named variant was excluded by its gate."""

    status = 503
    code = "not_ready"


class OutOfMemory(ServiceError):
    """Memory ran out on this request, also by itself; it may be there again in a moment."""

    status = 503
    code = "out_of_memory"

    def __init__(self, message: str) -> None:
        super().__init__(message, retry_after_s=1.0)


class WorkerLost(ServiceError):
    """The process that runs the variant ended or hung on this request twice, or is not back in time."""

    status = 503
    code = "worker_lost"

    def __init__(self, message: str, *, ran: bool = True, alone: bool = False) -> None:
        """`ran`: the rows were in the worker when it was lost. `alone`: no others were."""
        super().__init__(message, retry_after_s=1.0)
        self.ran = ran
        self.alone = alone


class DeviceLost(Exception):
    """A fault after which a device computes nothing right any more for this process, which therefore ends itself."""


class QueueTimeout(ServiceError):
    """The request waited in the queue past its deadline and was never executed."""

    status = 504
    code = "queue_timeout"


class ClientGone(ServiceError):
    """The client left before its rows were executed. Never sent; it exists to be counted."""

    status = 499
    code = "client_gone"


class StartupError(Exception):
    """Something that must be right before serving is not. The message names the place and the remedy."""


class ConfigError(StartupError):
    """The config file is wrong; the message starts with `file:line`."""


class PassFailed(StartupError):
    """A pass could not be applied; the message names the variant, the pass, its position and the option.

    `lasting`: it will fail again; else something was missing that may be there the next time, such as memory.
    """

    def __init__(self, message: str, *, lasting: bool = True) -> None:
        super().__init__(message)
        self.lasting = lasting


class GateFailed(StartupError):
    """A variant answers too differently from its base and its gate says `on_fail: abort`."""


class ArtifactCorrupt(StartupError):
    """A stored artifact does not match its checksums. The builder catches it, says so and rebuilds."""
