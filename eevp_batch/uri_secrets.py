"""Passwords and keys in URIs: found wherever a job names something, and never repeated."""

from __future__ import annotations

import re
from urllib.parse import parse_qsl, urlsplit

ALLOWED_CREDENTIALS = "credentials from the environment or from the machine's role"

_SCHEME = re.compile(r"^\s*[A-Za-z][A-Za-z0-9+.-]*:/+")
_SECRET_OPTION = re.compile(r"key|secret|token|password|passwd|credential|signature|\bsig\b", re.I)


def has_secret(text: str) -> bool:
    """Whether a text is a URI with a password in it, or with an option that names a secret.

    Options are judged by their names: `secret_key`, `sas_token`, `X-Amz-Signature`, `sig`. What
    looks like a URI and cannot be taken apart is not looked at further: it opens nothing.
    """
    if not _SCHEME.match(text):
        return False
    try:
        parts = urlsplit(text.strip())
    except ValueError:
        return "@" in text
    user = parts.netloc.rpartition("@")[0].lower()
    options = parse_qsl(parts.query.replace(";", "&"), keep_blank_values=True)
    return (
        ":" in user
        or "%3a" in user
        or any(_SECRET_OPTION.search(name) or has_secret(value) for name, value in options)
    )
