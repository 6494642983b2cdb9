"""A fault that is not the client's: what the log is told, and what the client. The only place where both meet."""

from __future__ import annotations

import logging

from leanserve.errors import OutOfMemory, ServiceError
from leanserve.memory import is_out_of_memory
from leanserve.request_identity import CURRENT_REQUEST, RequestIdentity, request_id

logger = logging.getLogger(__name__)


def log_incident(what: str, error: BaseException, identity: RequestIdentity | None = None) -> str:
    """Log the stack; the result tells a client where it is: under the id of the request (by default the task's)."""
    logger.error("%s", what, exc_info=error, extra={"identity": identity})
    return details_in_log(identity)


def details_in_log(identity: RequestIdentity | None = None) -> str:
    """Where the log tells more of a request (by default the task's), in words."""
    identity = identity or CURRENT_REQUEST.get()
    return f"the server's log has the details under id {request_id(identity) if identity else 'unknown'}"


def unexpected_failure(error: Exception, what: str) -> ServiceError:
    """Memory that ran out on a request, or a bug of ours, as the client is told of it."""
    if is_out_of_memory(error):
        logger.error("memory ran out on %s: %s", what, error)
        return OutOfMemory("memory ran out on this request; try again later")
    return ServiceError(f"the service failed on this request; {log_incident(f'failed on {what}', error)}")
