"""What can go wrong, as exceptions whose messages say what to do."""

import os
import re
from collections.abc import Mapping
from typing import Any

import grpc

from dreamfeed._channel import is_loopback

NEXT_SEQUENCE = "dreamfeed-next-sequence"


class DreamfeedError(RuntimeError):
    """Base of every error of this package.

    All of them can be made from their message alone, because a DataLoader carries no more than that from its workers.
    """

    #: The gRPC status code, for example ``"UNAVAILABLE"``; ``None`` where no call was involved.
    code: str | None = None


class UnavailableError(DreamfeedError):
    """The daemon does not answer, is starting or draining, or its storage does not answer: try again later."""

    code = "UNAVAILABLE"


class InvalidRequestError(DreamfeedError):
    """The daemon refuses the request or the student; the message names the field or the tensor."""

    code = "INVALID_ARGUMENT"


class GapError(DreamfeedError):
    """The next image is not there."""

    #: The sequence from which a new stream can go on: ``stream.seek(error.next_sequence)``.
    next_sequence: int | None

    def __init__(self, message: str, next_sequence: int | None = None) -> None:
        if next_sequence is None:
            # Through a DataLoader's worker only the text survives.
            found = re.search(r"\[next_sequence=(\d+)\]", message)
            next_sequence = int(found[1]) if found else None
        elif "[next_sequence=" not in message:
            message = f"{message} [next_sequence={next_sequence}]"
        super().__init__(message)
        self.next_sequence = next_sequence


class PositionLostError(GapError):
    """The start or the reader's position lies outside what the log still holds, or the cursor is of another log."""

    code = "OUT_OF_RANGE"


class DataLossError(GapError):
    """The next image is lost to damage in the daemon's storage."""

    code = "DATA_LOSS"


class NotFoundError(DreamfeedError):
    """No student was pushed yet, or the version asked for is not held any more."""

    code = "NOT_FOUND"


class ConflictError(DreamfeedError):
    """``replaces`` is not the current version: somebody else pushed; fetch that student, or push without it."""

    code = "FAILED_PRECONDITION"


class AuthenticationError(DreamfeedError):
    """The daemon does not accept the token."""

    code = "UNAUTHENTICATED"


class ResourceExhaustedError(DreamfeedError):
    """A bound of the daemon's is reached: streams, pushes under way, or the size of a student or message."""

    code = "RESOURCE_EXHAUSTED"


class CallTimeoutError(DreamfeedError, TimeoutError):
    """The call took longer than its time-out."""

    code = "DEADLINE_EXCEEDED"


class ProtocolError(DreamfeedError):
    """The daemon's message is not what the contract says: daemon and client are of different versions."""


class StudentPushWarning(UserWarning):
    """A student could not be pushed in the background; training goes on."""


_HINTS = {
    "UNAVAILABLE": "Is `dreamfeed serve` running there, and has it loaded its teacher (/readyz)?",
    "UNAUTHENTICATED": "Pass the daemon's token as token=.",
    "PERMISSION_DENIED": "Pass a token that may do this as token=.",
    "UNIMPLEMENTED": "The daemon is older than this client: upgrade it.",
    "DEADLINE_EXCEEDED": "Pass a longer timeout=, or see what the daemon is busy with.",
}

_KINDS: Mapping[str, type[DreamfeedError]] = {
    kind.code: kind
    for kind in (
        UnavailableError,
        InvalidRequestError,
        NotFoundError,
        ConflictError,
        AuthenticationError,
        ResourceExhaustedError,
        CallTimeoutError,
    )
    if kind.code
} | {"PERMISSION_DENIED": AuthenticationError}


def _proxy_of(address: str) -> str | None:
    """The variable that names the HTTP proxy by which gRPC goes to `address` (HOST:PORT or unix:PATH)."""
    host = address.rpartition(":")[0].strip("[]")
    spared = next((os.environ[name] for name in ("no_grpc_proxy", "no_proxy") if os.environ.get(name)), "")
    if is_loopback(address) or any(
        host.endswith(suffix.strip()) for suffix in spared.split(",") if suffix.strip()
    ):
        return None
    # In gRPC's order.
    return next((name for name in ("grpc_proxy", "https_proxy", "http_proxy") if os.environ.get(name)), None)


def translate(error: grpc.RpcError, action: str, address: str) -> DreamfeedError:
    """`error` of a call as one of this module's, with what was being done and what helps."""
    code = error.code().name
    details = (error.details() or "no details").rstrip(".")
    text = f"{action} at {address}: {code}: {details}."
    proxy = _proxy_of(address) if code == "UNAVAILABLE" else None
    if "http2 header with status" in details or "Failed parsing HTTP/2" in details:
        text = (
            f"{action} at {address}: this port speaks HTTP and not gRPC, as the daemon's admin pages do; give the "
            "address of its gRPC port (its setting listen, 7461 by default)"
        )
    elif proxy is not None:
        text = (
            f"{action} at {address}: {code} through the proxy that the environment variable {proxy} names ({details}); "
            f"set no_proxy={address.rpartition(':')[0]} to reach the daemon without it"
        )
    elif code in _HINTS:
        text = f"{text} {_HINTS[code]}"
    if code in ("OUT_OF_RANGE", "DATA_LOSS"):
        pairs: Any = error.trailing_metadata()  # as its stubs do not say
        trailers = dict(pairs or ())
        digits = str(trailers.get(NEXT_SEQUENCE, ""))
        following = int(digits) if digits.isdecimal() else None
        if following is not None:
            text = f"{text} Go on with stream.seek({following}), or pass on_gap='skip'."
        return (PositionLostError if code == "OUT_OF_RANGE" else DataLossError)(text, following)
    kind = _KINDS.get(code, DreamfeedError)
    translated = kind(text)
    translated.code = code
    return translated
