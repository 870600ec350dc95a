"""The threads of several devices: each takes batches for its own segments from the depth queues.

There is no global step. What the threads share (queues, residents, results, counters) is touched
under one lock, which nobody holds while a batch runs; only a prefix is filled under it. A batch in
a thread's hands belongs to that thread, its pages and its rows of the per-seat buffers too.
"""

from __future__ import annotations

import threading
from typing import Protocol

import torch

from eevp_batch.engine.depth_queues import Batch
from eevp_batch.engine.sequence import Sequence
from eevp_batch.engine.stage import Ran, Stage


class Desk(Protocol):
    """Where batches come from and go to; called under the crew's lock."""

    @property
    def has_work(self) -> bool:
        """Whether anything waits or is resident."""

    @property
    def has_results(self) -> bool:
        """Whether anything is finished that nobody has fetched."""

    def take(self, stage: Stage) -> Batch[Sequence] | None:
        """The next batch for a stage; None where nobody waits there."""

    def grow(self, sequences: list[Sequence], running: set[Sequence]) -> list[Sequence] | None:
        """See `Residents.grow`."""

    def put_back(self, batch: Batch[Sequence]) -> None:
        """A batch that was taken and does not run."""

    def give_back(self, batch: Batch[Sequence], ran: Ran | None) -> None:
        """What a batch has come to."""

    def check_stall(self) -> None:
        """Called when nothing runs and nothing could be taken.

        Raises:
            EngineStalledError: work remains all the same.
        """


class Crew:
    """One thread per stage, as long as there is work.

    Args:
        stages: of the devices, in the order in which tokens come by.
        desk: where batches come from.
    """

    def __init__(self, stages: list[Stage], desk: Desk) -> None:
        self._stages, self._desk = stages, desk
        self.lock = threading.RLock()
        self._changed = threading.Condition(self.lock)  # there may be something to take
        self._progress = threading.Condition(self.lock)  # there is something to tell
        self._at_work: dict[int, threading.Thread] = {}  # by number of the stage
        self._running: set[Sequence] = set()
        self._num_held = 0  # batches that wait for pages
        self._num_given_back = self._num_seen = 0
        self._is_stopping = False
        self._error: BaseException | None = None

    def step(self) -> None:
        """Wait until some batch is through, or all work is done; threads go on afterwards.

        Raises:
            BaseException: what ended a thread; from then on every step raises it.
        """
        with self.lock:
            self._start()
            self._progress.wait_for(
                lambda: (
                    self._error is not None
                    or self._num_given_back > self._num_seen
                    or self._desk.has_results
                    or not self._desk.has_work
                )
            )
            self._num_seen = self._num_given_back
            if self._error is not None:
                raise self._error

    def stop(self) -> None:
        """Let every thread finish its batch and end; what waits goes on with the next step."""
        with self.lock:
            self._is_stopping = True
            self._changed.notify_all()
            threads = list(self._at_work.values())
        for thread in threads:
            thread.join()
        self._is_stopping = False

    def tell(self) -> None:
        """Something new may be taken; call it with the lock held."""
        self._changed.notify_all()

    def _start(self) -> None:
        for number in range(len(self._stages)) if self._error is None else ():
            if number not in self._at_work and self._desk.has_work:
                thread = threading.Thread(
                    target=self._work, args=(number,), name=f"eevp-device-{number}", daemon=True
                )
                self._at_work[number] = thread
                thread.start()

    # --- in the threads --------------------------------------------------------------------------

    def _work(self, number: int) -> None:
        stage = self._stages[number]
        try:
            with stage.model.place.thread(), torch.inference_mode():
                while (batch := self._next(number)) is not None:
                    ran = stage.run(*batch)
                    with self.lock:
                        self._desk.give_back(batch, ran)
                        self._running.difference_update(batch.sequences)
                        self._num_given_back += 1
                        self._tell_all()
        except BaseException as error:
            with self.lock:
                self._error = self._error or error
                self._at_work.pop(number, None)
                self._tell_all()

    def _tell_all(self) -> None:
        self._changed.notify_all()
        self._progress.notify_all()

    def _next(self, number: int) -> Batch[Sequence] | None:
        """The next batch, waited for; None when the thread is to end."""
        stage, desk = self._stages[number], self._desk
        with self.lock:
            while desk.has_work and not self._is_stopping and self._error is None:
                batch = desk.take(stage)
                if batch is None:
                    if number == 0 and not self._running and not self._num_held:
                        desk.check_stall()
                    if desk.has_results:  # somebody was refused
                        self._progress.notify_all()
                    self._changed.wait()
                    continue
                sequences = self._grown(batch)
                if sequences:
                    self._running.update(sequences)
                    return Batch(batch.depth, sequences)
            # Noted under the lock, so that whoever adds work knows who has gone.
            self._at_work.pop(number, None)
            self._tell_all()
            return None

    def _grown(self, batch: Batch[Sequence]) -> list[Sequence]:
        """Those of a batch that have pages and may run.

        Where pages run out the youngest resident goes; if another thread has it in hand, this one
        waits until it comes back.
        """
        sequences = batch.sequences
        self._num_held += 1
        try:
            while (grown := self._desk.grow(sequences, self._running)) is None:
                self._changed.wait()
                if self._is_stopping or self._error is not None:
                    self._desk.put_back(batch)
                    return []
            return grown
        finally:
            self._num_held -= 1
