"""In which phase the next chunk is leased, and what is to be told when that changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from eevp_batch.cluster.audit_watch import AuditWatch
from eevp_batch.cluster.learning import LearnAttempt, Learning, LearnOrder
from eevp_batch.cluster.news import News
from eevp_batch.fitted_config import certified_delta
from eevp_batch.records import Phase
from eevp_batch.spec import JobSpec
from eevp_batch.storage.attempts import Attempt
from eevp_batch.storage.learned import Learned
from eevp_batch.storage.plan import Plan
from eevp_batch.storage.store import Store


class Phases:
    """Exits that are learned while the job runs, and exits that an audit may stop.

    Args:
        spec: the job.
        plan: its chunks.
        store: its output folder.
        before: gives the attempts that earlier runs committed.
    """

    def __init__(
        self,
        spec: JobSpec,
        plan: Plan,
        store: Store,
        before: Callable[[], Iterator[Attempt]] = lambda: iter(()),
    ) -> None:
        self._audit = AuditWatch(spec, store, certified_delta(spec))
        self._learning = Learning(spec, plan, store)
        wants_past = self._learning.is_collecting or self._audit.is_watching
        past = before() if wants_past else iter(())
        self._found_before = [news for attempt in past for news in self.committed(attempt)]

    @property
    def phase(self) -> Phase:
        """Of the next lease."""
        return "full" if self._audit.is_stopped else self._learning.phase

    def order(self) -> Iterator[int]:
        """All chunks as they are leased."""
        return self._learning.order()

    def start(self) -> Iterator[News]:
        """Before the first lease."""
        learned = self._learning.too_small()
        if learned is not None:
            yield _told(learned)
        yield from self._found_before

    def committed(self, attempt: Attempt) -> Iterator[News]:
        """Take a committed attempt in."""
        self._learning.committed(attempt)
        drift = self._audit.look(attempt.stats.audit)
        if drift is not None:
            yield News("audit_drift", drift.text, drift.to_json())

    @property
    def is_learning_due(self) -> bool:
        """Whether a replica should learn exits now."""
        return self._learning.is_due

    def learn(self, rows_left: int) -> LearnOrder:
        """What that replica is asked for."""
        return self._learning.begin(rows_left)

    def has_learned(self, attempt: LearnAttempt) -> News:
        """Publish what it has learned."""
        return _told(self._learning.take(attempt))

    def learner_died(self) -> Iterator[News]:
        """The replica that was learning is gone."""
        learned = self._learning.lost()
        if learned is not None:
            yield _told(learned)


def _told(learned: Learned) -> News:
    event = "exits_learned" if learned.has_exits else "learning_failed"
    fields = {"reason": learned.reason, "files": learned.files, **learned.figures}
    return News(event, learned.text, fields)
