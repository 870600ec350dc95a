"""Patience with storage: an operation whose error may pass is tried again, for a bounded time.

This is the only place that waits for storage to come back. The clients below it (pyarrow's, and
the one for exclusive creation) make few tries of their own, see `location.CLIENT_TRIES`, and what
bounds an operation is time, so the two layers cannot multiply without bound.
"""

from __future__ import annotations

import errno
import logging
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from eevp_batch.errors import StorageError

_log = logging.getLogger(__name__)
_Answer = TypeVar("_Answer")

# A disk that answers EIO has mostly failed for good; a network filesystem recovers from it.
EIO_PATIENCE_S = 60.0

_FINAL = (StorageError, FileExistsError, FileNotFoundError, PermissionError)
_FULL = {errno.ENOSPC, errno.EDQUOT}
_PASSING = {
    errno.EAGAIN,
    errno.EBUSY,
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.EINTR,
    errno.EIO,
    errno.ENETDOWN,
    errno.ENETRESET,
    errno.ENETUNREACH,
    errno.EPIPE,
    errno.ESTALE,
    errno.ETIMEDOUT,
    255,  # libhdfs gives it for every Java exception that it has no number for
}
# What clients of object stores say where they give no number: the AWS SDK's names of errors, HTTP
# statuses of pyarrow and obstore, Google's status codes, and the words of HTTP libraries.
_PASSING_TEXT = re.compile(
    r"INTERNAL_FAILURE|SERVICE_UNAVAILABLE|SLOW_DOWN|THROTTLING|REQUEST_TIMEOUT"
    r"|REQUEST_TIME_TOO_SKEWED|NETWORK_CONNECTION|UNAVAILABLE|DEADLINE_EXCEEDED"
    r"|RESOURCE_EXHAUSTED|status(?: code)?:? (?:5\d\d|408|409|429)\b|curlCode"
    r"|HTTP error: |timed? ?out"
    r"|connection (?:was )?(?:closed|refused|reset|aborted)",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Patience:
    """How long an operation is tried again while its error may pass.

    The pause doubles from one try to the next, and each is cut by a random share of up to a half,
    so that many replicas do not come back at once.

    Attributes:
        first_s: first pause, seconds.
        longest_s: no pause is longer, seconds.
        total_s: no try begins later than this after the first failure, seconds.
    """

    first_s: float = 0.5
    longest_s: float = 30.0
    total_s: float = 600.0

    def pause_s(self, num_failures: int) -> float:
        """Seconds to wait after so many failures, a random share taken off."""
        longest = min(self.first_s * 2.0 ** min(num_failures - 1, 60), self.longest_s)
        return longest * random.uniform(0.5, 1.0)


NO_PATIENCE = Patience(total_s=0.0)


def may_pass(error: OSError) -> bool:
    """Whether the same operation may succeed later: a server or a network had a bad moment."""
    if isinstance(error, _FINAL):
        return False
    if error.errno is not None:
        return error.errno in _PASSING
    return _PASSING_TEXT.search(str(error)) is not None


def keep_trying(
    operation: Callable[[], _Answer],
    what: str,
    patience: Patience,
    is_done: Callable[[], _Answer | None] = lambda: None,
    before_again: Callable[[], None] = lambda: None,
) -> _Answer:
    """Do an operation, again where its error may pass.

    Args:
        operation: may be done twice, or says by its error that it had been done before.
        what: names place and operation in messages.
        patience: how long to try.
        is_done: asked when a later try is refused, because the answer to an earlier one may have
            been lost: what the operation would have answered if it is done, else None.
        before_again: called before every later try; raises where there must be none.

    Raises:
        StorageError: it kept failing, or the disk is full.
        OSError: an error that does not pass.
    """
    num_failures, failed_s = 0, 0.0
    while True:
        try:
            return operation()
        except OSError as error:
            if error.errno in _FULL:
                raise StorageError(
                    f"{what}: no space is left ({error.strerror}); make room, and the same command "
                    "goes on from what is committed"
                ) from error
            if not may_pass(error):
                if num_failures and (answer := is_done()) is not None:
                    return answer
                raise
            num_failures += 1
            failed_s = failed_s or time.monotonic()
            _wait(what, error, num_failures, time.monotonic() - failed_s, patience)
        before_again()


def _wait(
    what: str, error: OSError, num_failures: int, elapsed_s: float, patience: Patience
) -> None:
    """Wait before the next try.

    Raises:
        StorageError: patience is at its end.
    """
    total_s = patience.total_s
    if error.errno == errno.EIO:
        total_s = min(total_s, EIO_PATIENCE_S)
    pause_s = patience.pause_s(num_failures)
    if elapsed_s + pause_s > total_s:
        raise StorageError(
            f"{what}: failed {num_failures} times in {elapsed_s:.0f} s: {error}; the same command "
            "goes on from what is committed"
        ) from error
    _log.warning("%s: %s; trying again in %.1f s", what, error, pause_s)
    time.sleep(pause_s)
