"""Passwords and keys in URIs: found wherever a job names something, and never repeated."""

from __future__ import annotations

import re
from urllib.parse import parse_qsl, urlsplit

ALLOWED_CREDENTIALS = "credentials from the environment or from the machine's role"

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/+")
_PIECE = re.compile(_SCHEME.pattern + r"[^\s'\"]+")
_SECRET_OPTION = re.compile(r"key|secret|token|password|passwd|credential|signature|\bsig\b", re.I)
# pip puts the variable's value in when it installs.
_REFERENCE = re.compile(r"\$\{\w+\}(:\$\{\w+\})?")


def has_secret(text: str) -> bool:
    """Whether a text is, or holds, a URI with a password in it or an option that names a secret.

    Options are judged by their names: `secret_key`, `sas_token`, `X-Amz-Signature`, `sig`. Over
    HTTP a user's name alone is one, too: `git+https://TOKEN@host`. What looks like a URI and
    cannot be taken apart is not looked at further: it opens nothing.
    """
    whole = [text.strip()] if _SCHEME.match(text.strip()) else []  # may hold spaces
    return any(_is_secret(uri) for uri in whole + _PIECE.findall(text))


def _is_secret(uri: str) -> bool:
    try:
        parts = urlsplit(uri)
    except ValueError:
        return "@" in uri
    user = parts.netloc.rpartition("@")[0].lower()
    is_token = bool(user) and parts.scheme.rpartition("+")[2] in ("http", "https")
    options = parse_qsl(parts.query.replace(";", "&"), keep_blank_values=True)
    return ((is_token or ":" in user or "%3a" in user) and not _REFERENCE.fullmatch(user)) or any(
        _SECRET_OPTION.search(name) or has_secret(value) for name, value in options
    )
