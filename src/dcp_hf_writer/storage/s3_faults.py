"""What the errors of an S3 client mean: which ones pass, and what users may read of them.

Texts made here hold no credential. URLs of requests and the messages of the client library may
hold some (in an endpoint, or as the store's echo of the request), so they are not repeated.
"""

from __future__ import annotations

import asyncio
import errno
import re
from typing import TYPE_CHECKING, Any

from dcp_hf_writer.storage.object_retries import RequestFault

if TYPE_CHECKING:
    from collections.abc import Collection

_PASSING_STATUS = frozenset({408, 429, 500, 502, 503, 504})
_PASSING_CODES = frozenset(
    {
        *("InternalError", "ServiceUnavailable", "SlowDown", "RequestTimeout", "OperationAborted"),
        *("ConditionalRequestConflict", "Throttling", "ThrottlingException", "TooManyRequests"),
        *("RequestLimitExceeded", "BandwidthLimitExceeded", "RequestThrottled"),
        # The bytes were damaged or cut on their way.
        *(
            "BadDigest",
            "IncompleteBody",
            "XAmzContentSHA256Mismatch",
            "XAmzContentChecksumMismatch",
        ),
    }
)
_ASKS_FOR_LESS = frozenset(
    {"SlowDown", "ServiceUnavailable", "Throttling", "ThrottlingException", "TooManyRequests"}
)
_TOO_MANY = frozenset({429, 503})
# Messages of these may quote keys, signatures or tokens.
_CREDENTIAL_STATUS = frozenset({401, 403})
_CREDENTIAL_CODE = re.compile(r"Token|Credential|Auth|Signature|AccessKey")

# Keys, tokens and signatures that are not in the options: those of the environment or a role.
_LIKE_A_SECRET = re.compile(r"(?=[^\s\d]*\d)[\w/+=-]{16,}")

UPLOAD_IS_GONE = "NoSuchUpload"
"""Code of a multipart upload that was completed, aborted or never begun."""
NO_DIGEST_MATCH = "BadDigest"
"""Code of bytes that differ from the digest that came with them."""

_ERRNO = {401: errno.EACCES, 403: errno.EACCES, 404: errno.ENOENT, 501: errno.ENOSYS}
_HINTS = {
    "NoSuchBucket": "create the bucket, or correct the URL",
    403: "check the credentials in storage_options or the environment, and their permissions and "
    "expiry",
    401: "check the credentials in storage_options or the environment",
}
_MAX_MESSAGE_CHARS = 200

NO_ANSWER = RequestFault(passes=True, text="no answer in time")


def fault_of(error: BaseException, secrets: Collection[str] = ()) -> RequestFault:
    """Return what an error of s3fs, aiobotocore or aiohttp means.

    Args:
        error: The error.
        secrets: Values that no text may hold.
    """
    import botocore.exceptions as known  # noqa: PLC0415 - takes long, and only S3 needs it
    from botocore.parsers import ResponseParserError  # noqa: PLC0415

    if isinstance(error, known.ClientError):
        return _answered(error.response, secrets)
    # s3fs translates errors into builtin ones, and keeps the error of the client as the cause.
    cause = error.__cause__
    if cause is not None and not isinstance(error, known.BotoCoreError):
        return fault_of(cause, secrets)
    if isinstance(error, known.SSLError):
        return RequestFault(
            passes=False,
            text="SSLError",
            hint="check the certificate of the endpoint, and the option verify",
        )
    lost = (known.HTTPClientError, known.ConnectionError, known.IncompleteReadError)
    broken = (ResponseParserError, OSError, EOFError, asyncio.TimeoutError)
    if isinstance(error, (*lost, *broken)) or _is_aiohttp(error):
        return RequestFault(passes=True, text=f"no answer ({type(error).__name__})")
    return RequestFault(
        passes=False,
        text=type(error).__name__,
        hint="check storage_options: the client library could not send the request",
    )


def _masked(message: str, secrets: Collection[str]) -> str:
    for secret in secrets:
        message = message.replace(secret, "***")
    return _LIKE_A_SECRET.sub("***", message)


def _is_aiohttp(error: BaseException) -> bool:
    return type(error).__module__.partition(".")[0] == "aiohttp"


def _answered(response: dict[str, Any], secrets: Collection[str]) -> RequestFault:
    details = response.get("Error", {})
    status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    code = re.sub(r"\W", "", str(details.get("Code", "")))[:60]
    text = f"{status} {code}" if code != str(status) else str(status)
    message = str(details.get("Message", "")).strip()
    is_about_credentials = status in _CREDENTIAL_STATUS or _CREDENTIAL_CODE.search(code)
    if message and message != code and not is_about_credentials:
        text += f": {_masked(message, secrets)[:_MAX_MESSAGE_CHARS]}"
    return RequestFault(
        passes=status in _PASSING_STATUS or code in _PASSING_CODES,
        text=text,
        code=code,
        asks_for_less=status in _TOO_MANY or code in _ASKS_FOR_LESS,
        errno=_ERRNO.get(status),
        hint=_HINTS.get(code) or _HINTS.get(status),
    )
