"""Notices a job whose audited rows come to differ more than they may, however late that begins.

An e-detector (Shin, Ramdas and Rinaldo, arXiv 2203.03532) of Shiryaev-Roberts form. Whoever bets
from look k on that the disagreement is above the bound has, after look n, the capital

    E(k, n) = mean over bets b of prod over rows of looks k..n of (1 + b (D / R - C) / F)

(`audited` says what D, C, F and R are). While rows differ no more than they may, it is not expected
to grow. The sum of all E(k, n) raises a false alarm sooner or later; here each beginning gets a
share w(k) of a capital of 1 instead, w(k) = k^-s - (k + 1)^-s, and these sum to 1. So the whole is
one bet, which may be looked at as often as one likes in a job of any length: by Ville's inequality
it ever gets to 1 / ALPHA with a probability of at most ALPHA. A change at look k has to earn
log(1 / (ALPHA w(k))) before it is told, 15 at the 10,000th look, whatever came before it.

When the change began is the last time that a CUSUM of the same bets was at nothing: an estimate.

What is held does not grow with the rows. Knows counts, nothing of tokens, files or jobs.
"""

from __future__ import annotations

import math

import numpy as np

from eevp_batch.records import AuditCounts
from eevp_batch.tune.audited import BETS, log_returns

ALPHA = 0.05
"""Probability, over all of a job that stays within the bound, that anything is told."""
_DECAY = 0.125  # of what is set aside for beginnings from the k-th on: k^-s


class DriftDetector:
    """Watches audited rows in the order in which they come.

    Args:
        bound: disagreement that is allowed, in (0, 1).

    Attributes:
        rows: audited, so far.
        since: what is counted of those since the change, if there was one.
    """

    def __init__(self, bound: float) -> None:
        self.bound = bound
        self._num_looks = 0
        self._capital = np.full(len(BETS), -math.inf)  # [bets] logs: of all beginnings so far
        self._cusum = np.zeros(len(BETS))  # [bets] logs: of the one at `since`
        self.rows = 0
        self.since = AuditCounts()

    def add(self, counts: AuditCounts) -> None:
        """Look at the next rows; their order among themselves does not matter.

        Args:
            counts: of rows that come together; of none, nothing happens.
        """
        if not counts.rows:
            return
        self._num_looks += 1
        self.rows += counts.rows
        returns = log_returns(counts, self.bound)
        begins_with = math.log(_share(self._num_looks) / len(BETS))
        self._capital = np.logaddexp(self._capital, begins_with) + returns
        if np.logaddexp.reduce(self._cusum) <= math.log(len(BETS)):
            self._cusum, self.since = np.zeros(len(BETS)), AuditCounts()
        self._cusum, self.since = self._cusum + returns, self.since + counts

    @property
    def has_noticed(self) -> bool:
        """Whether the rows up to now refute that all of them kept within the bound."""
        return bool(np.logaddexp.reduce(self._capital) >= -math.log(ALPHA))


def _share(look: int) -> float:
    """What the beginning at a look gets, 1-based; all of them get 1."""
    return float(look**-_DECAY - (look + 1) ** -_DECAY)
