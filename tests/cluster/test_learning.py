"""Which chunks are learned from, and what the state of a learning job becomes; no Ray, no model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from eevp_batch.cluster.learning import (
    LearnAttempt,
    Learning,
    learning_chunks,
    rows_to_learn,
)
from eevp_batch.errors import JobFailedError
from eevp_batch.records import Phase
from eevp_batch.spec import ExitSpec, JobSpec
from eevp_batch.storage.attempts import Attempt
from eevp_batch.storage.commit import Committer
from eevp_batch.storage.learned import (
    Learned,
    clean_learned,
    fetch_learned,
    publish_learned,
    read_learned,
    write_attempt_files,
)
from eevp_batch.storage.plan import Plan, make_plan, open_plan
from eevp_batch.storage.store import Store
from eevp_batch.tune.bounds import least_rows, p_value
from tests.storage.jobs import MODEL, attempt_chunk, make_spec, write_input

FILES = {"fitted.json": b"{}", "fitted.safetensors": b"weights", "calibration.json": b"{}"}


class Job:
    """A planned job of 200 rows in 20 chunks that learns from 50 of them."""

    def __init__(self, folder: Path, **exit: Any) -> None:
        source = write_input(folder / "in.parquet", [f"row {row}" for row in range(200)])
        settings = {"mode": "learn", "learn_rows": 50} | exit
        self.spec: JobSpec = make_spec(
            source, chunk_rows=10, exit=ExitSpec.model_validate(settings)
        )
        self.store = Store.open(folder / "out")
        self.plan: Plan = open_plan(self.store, make_plan(self.spec, MODEL))

    def attempt(self, chunk_id: int, phase: Phase = "full") -> Attempt:
        found = attempt_chunk(self.store, self.plan, self.spec, self.plan.chunks[chunk_id])
        return Attempt.from_json(found.to_json() | {"phase": phase})

    def learning(self, before: Iterable[Attempt] = ()) -> Learning:
        clean_learned(self.store)
        learning = Learning(self.spec, self.plan, self.store)
        for attempt in before:
            learning.committed(attempt)
        return learning

    def learned(self, reason: str | None = None) -> LearnAttempt:
        files = {} if reason else FILES
        return LearnAttempt("ab12", Learned(reason, write_attempt_files(self.store, files, "ab12")))


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def test_as_few_rows_as_can_certify(job: Job) -> None:
    for delta, epsilon in ((0.01, 0.05), (0.1, 0.2)):
        least = least_rows("betting", delta, epsilon)
        for count, passes in ((least, True), (least - 1, False)):
            found = p_value("betting", [0.0] * count, delta, epsilon=epsilon, seed=0)
            assert (found <= epsilon) == passes
    auto = job.spec.exit.model_copy(update={"learn_rows": "auto"})
    wanted = rows_to_learn(job.spec.model_copy(update={"exit": auto}))
    assert 0.6 * wanted >= least_rows("betting", 0.01, 0.05), "the calibration part is enough"


def test_the_learning_chunks_are_random_and_the_plan_alone_decides(job: Job) -> None:
    chunks = learning_chunks(job.spec, job.plan)
    assert len(set(chunks)) == 5 and chunks == sorted(chunks)
    assert chunks == learning_chunks(job.spec, job.plan) != list(range(5))
    sampling = job.spec.sampling.model_copy(update={"seed": 1})
    other = learning_chunks(job.spec.model_copy(update={"sampling": sampling}), job.plan)
    assert other != chunks, "another seed, another choice"
    order = list(job.learning().order())
    assert order[:5] == chunks and sorted(order) == list(range(20))


def test_a_job_learns_once_its_learning_chunks_are_there(job: Job) -> None:
    learning = job.learning()
    chunks = learning_chunks(job.spec, job.plan)
    others = [chunk for chunk in range(20) if chunk not in chunks]
    for chunk_id in [*others[:3], *chunks[:-1]]:
        learning.committed(job.attempt(chunk_id))
        assert not learning.is_due and learning.phase == "full"
    learning.committed(job.attempt(chunks[-1]))
    assert learning.is_due
    order = learning.begin(rows_left=120)
    assert [chunk.chunk_id for chunk in order.chunks] == chunks and order.num_rows == 50
    assert order.seconds_per_row > 0 and not learning.is_due, "one replica learns, not two"
    assert learning.take(job.learned()).has_exits and learning.phase == "exits"
    assert not learning.is_due


def test_a_resumed_job_finds_its_state_in_storage(job: Job) -> None:
    chunks = learning_chunks(job.spec, job.plan)
    committer = Committer(job.store, job.plan)
    for chunk_id in chunks:
        committer.commit(job.attempt(chunk_id), 1)

    def resumed() -> Learning:
        return job.learning(record.attempt for record in committer.records())

    assert resumed().is_due, "everything is there to learn from"
    learning = resumed()
    learning.begin(120)
    job.learned()  # the driver dies before it takes this in
    assert resumed().is_due
    learning.take(job.learned())
    assert resumed().phase == "exits" and not resumed().is_due
    (Path(job.store.text) / "_eevp" / "learned" / "fitted.safetensors").unlink()
    again = resumed()
    assert again.phase == "full" and again.is_due, "what is not whole is learned again"
    again.take(job.learned("nothing was certified"))
    assert resumed().phase == "full" and not resumed().is_due, "that too is settled"


def test_replicas_that_die_while_they_learn_leave_the_job_at_full_depth(job: Job) -> None:
    learning = job.learning()
    for chunk_id in learning_chunks(job.spec, job.plan):
        learning.committed(job.attempt(chunk_id))
    for _ in range(2):
        learning.begin(120)
        assert learning.lost() is None and learning.is_due
    learning.begin(120)
    given_up = learning.lost()
    assert given_up is not None and "3 replicas died" in str(given_up.reason)
    assert not learning.is_due and job.learning().phase == "full"


@pytest.mark.parametrize("exit", [{"learn_rows": 201}, {"learn_rows": "auto"}])
def test_a_job_with_too_few_rows_is_settled_at_once(tmp_path: Path, exit: dict[str, Any]) -> None:
    job = Job(tmp_path, **exit)
    settled = job.learning().too_small()
    assert settled is not None and not settled.has_exits
    assert job.learning().too_small() is None, "that is said once"


def test_a_job_that_does_not_learn_has_the_phase_of_its_mode(tmp_path: Path) -> None:
    for mode, phase in (("on", "exits"), ("off", "full")):
        spec = make_spec(write_input(tmp_path / "in.parquet", ["a"]), exit=ExitSpec(mode=mode))
        learning = Learning(spec, make_plan(spec, MODEL), Store.open(tmp_path / "out"))
        assert learning.phase == phase and not learning.is_due and learning.too_small() is None


def test_half_a_publication_is_removed_and_an_altered_one_refused(job: Job, tmp_path: Path) -> None:
    attempt = job.learned()
    broken = Store.open(job.store.text)
    broken.create_exclusive = lambda rel, data: (_ for _ in ()).throw(OSError("gone"))  # type: ignore[method-assign]
    with pytest.raises(OSError, match="gone"):
        publish_learned(broken, attempt.learned, attempt.token)
    assert read_learned(job.store) is None and job.store.list("_eevp/learned")
    clean_learned(job.store)
    assert not job.store.list("_eevp/learned")
    with pytest.raises(JobFailedError, match="is gone"):
        publish_learned(job.store, attempt.learned, attempt.token)
    attempt = job.learned()
    publish_learned(job.store, attempt.learned, attempt.token)
    learned = read_learned(job.store)
    assert learned == attempt.learned
    fetch_learned(job.store, attempt.learned, tmp_path)
    assert (tmp_path / "fitted.safetensors").read_bytes() == b"weights"
    job.store.write("_eevp/learned/fitted.safetensors", b"other")
    with pytest.raises(JobFailedError, match="altered"):
        fetch_learned(job.store, attempt.learned, tmp_path)
