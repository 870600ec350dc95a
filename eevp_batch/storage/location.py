"""Where things are: a local path or a URI becomes one pyarrow filesystem and a path inside it.

A local path is taken literally: spaces, `#`, `%` and any letter are part of the name. Only a text
with `scheme://` is a URI, and only there `%20` means a space. Nothing here opens a file.

Clients of object stores retry by themselves; here they are told how often, because `retries` tries
again above them.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from urllib.parse import quote, unquote, urlsplit, urlunsplit

import pyarrow as pa
import pyarrow.fs

from eevp_batch.errors import UsageError
from eevp_batch.uri_secrets import ALLOWED_CREDENTIALS, has_secret

_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*://")

# One operation on an object store asks at most so often before `retries` hears of it (S3), or for
# so long (Google): enough for a blip in the middle of a Parquet file that is read in many requests.
CLIENT_TRIES = 3
CLIENT_RETRY_S = 10.0
CONNECT_TIMEOUT_S = 5.0
REQUEST_TIMEOUT_S = 15.0  # without a byte


@dataclass(frozen=True)
class Location:
    """One place in one filesystem.

    Attributes:
        filesystem: the pyarrow filesystem.
        path: path inside `filesystem`.
        text: what locates it again: an absolute local path, or a URI.
    """

    filesystem: Any
    path: str
    text: str


def is_uri(text: str) -> bool:
    """Tell a URI (`s3://...`, `file:///...`) from a local path."""
    return _SCHEME.match(text) is not None


def is_inside(path: str, folder: str) -> bool:
    """Whether a local path is a folder's, or the folder itself; links are not looked into."""
    return os.path.isabs(path) and os.path.commonpath([path, folder]) == folder


def seen_from(folder: str | os.PathLike[str], text: str) -> str:
    """A local path as a file in a folder names it, so that both can be moved; URIs stay."""
    return text if is_uri(text) else os.path.relpath(text, folder)


def locate(text: str | os.PathLike[str]) -> Location:
    """Find the filesystem and the path of a local path or a URI.

    Raises:
        UsageError: the URI cannot be parsed, its filesystem is unknown, or it carries a secret.
    """
    text = os.fspath(text)
    if not is_uri(text):
        path = os.path.abspath(text)
        return Location(pa.fs.LocalFileSystem(), path, path)
    shown = _check_uri(text)
    encoded = _encode(text)
    try:
        filesystem, path = pa.fs.FileSystem.from_uri(encoded)
    except (pa.ArrowException, ValueError, OSError) as error:
        raise UsageError(f"{shown}: not a URI that pyarrow.fs can open: {error}") from error
    return Location(_with_few_retries(filesystem), path, encoded)


def client_options(filesystem: Any) -> dict[str, Any]:
    """What a pyarrow filesystem was opened with: by name, as its constructor takes it."""
    _, (options,) = filesystem.__reduce__()
    return dict(options)


def _with_few_retries(filesystem: Any) -> Any:
    """The same filesystem with time limits and a number of tries of our own choice."""
    if filesystem.type_name == "s3":
        own = {
            "retry_strategy": pa.fs.AwsStandardS3RetryStrategy(max_attempts=CLIENT_TRIES),
            "connect_timeout": CONNECT_TIMEOUT_S,
            "request_timeout": REQUEST_TIMEOUT_S,
            "allow_delayed_open": True,  # a small file is one PUT
        }
    elif filesystem.type_name == "gcs":
        own = {"retry_time_limit": timedelta(seconds=CLIENT_RETRY_S)}
    else:
        return filesystem
    rebuild, (options,) = filesystem.__reduce__()
    return rebuild({**options, **own})


def join(text: str, relative: str) -> str:
    """Append a relative path to a local path or to a URI's path, its options kept.

    `relative` is literal; it is percent-encoded where `text` is a URI.
    """
    if not is_uri(text):
        return os.path.join(text, relative)
    parts = urlsplit(text)
    path = parts.path.rstrip("/") + "/" + quote(relative)
    return urlunsplit(parts._replace(path=path))


def split_uri(text: str) -> tuple[str, str]:
    """Split a URI into one without a path and its decoded path, so that patterns can be matched."""
    parts = urlsplit(text)
    return urlunsplit(parts._replace(path="")), unquote(parts.path)


def _encode(text: str) -> str:
    """Percent-encode what a person writes literally in a URI's path (a space, an umlaut)."""
    parts = urlsplit(text)
    return urlunsplit(parts._replace(path=quote(parts.path, safe="/%:@!$&'()*+,;=~-._")))


def _check_uri(text: str) -> str:
    """Refuse what pyarrow would drop silently, and secrets: plans are written for others to read.

    Returns:
        The URI without user and options, for messages.
    """
    try:
        parts = urlsplit(text)
    except ValueError as error:
        raise UsageError(f"found a URI that cannot be taken apart: {error}") from error
    shown = urlunsplit(
        parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="")
    )
    if has_secret(text):
        raise UsageError(
            f"{shown}: found a password or an access key in the URI; allowed: {ALLOWED_CREDENTIALS}"
        )
    options = parts.query.split("&") if parts.query else []
    if parts.fragment or any("=" not in option for option in options):
        raise UsageError(
            f"{shown}: found a bare # or ? in a URI; allowed: %23 and %3F for the characters, "
            "?name=value for options"
        )
    return shown
