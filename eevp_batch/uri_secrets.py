"""Passwords and keys in URIs: found wherever a job names something, and never repeated."""

from __future__ import annotations

import re
from urllib.parse import parse_qsl, urlsplit

ALLOWED_CREDENTIALS = "credentials from the environment or from the machine's role"

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/+")
# It begins where such a run of characters does, so that the time does not grow with its square.
_PIECE = re.compile(r"(?<![A-Za-z0-9+.-])[A-Za-z0-9+.-]+:/+[^\s'\"]+")
_SECRET_OPTION = re.compile(r"key|secret|token|password|passwd|credential|signature|\bsig\b", re.I)
# pip puts the variable's value in when it installs.
_REFERENCE = re.compile(r"\$\{\w+\}(:\$\{\w+\})?")
_MOST_LEVELS = 4
"""Of URIs that stand in options of URIs; deeper ones are taken for secrets."""


def has_secret(text: str) -> bool:
    """Whether a text is, or holds, a URI with a password in it or an option that names a secret.

    Options are judged by their names: `secret_key`, `sas_token`, `X-Amz-Signature`, `sig`. Over
    HTTP a user's name alone is one, too: `git+https://TOKEN@host`. What looks like a URI and
    cannot be taken apart is not looked at further: it opens nothing.
    """
    # The whole may hold spaces; a piece may have an option of a command line before it.
    pieces = (piece.lstrip("+.-0123456789") for piece in _PIECE.findall(text))
    return any(_is_secret(uri, 1) for uri in (text, *pieces))


def _is_secret(uri: str, level: int) -> bool:
    uri = uri.strip()
    if not _SCHEME.match(uri):
        return False
    if level > _MOST_LEVELS:
        return True
    try:
        parts = urlsplit(uri)
    except ValueError:
        return "@" in uri
    user = parts.netloc.rpartition("@")[0].lower()
    options = parse_qsl(parts.query.replace(";", "&"), keep_blank_values=True)
    return _is_password(user, parts.scheme) or any(
        _SECRET_OPTION.search(name) or _is_secret(value, level + 1) for name, value in options
    )


def _is_password(user: str, scheme: str) -> bool:
    """Whether what stands before the @ is more than a name."""
    if not user or _REFERENCE.fullmatch(user):
        return False
    return ":" in user or "%3a" in user or scheme.rpartition("+")[2] in ("http", "https")
