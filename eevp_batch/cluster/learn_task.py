"""A replica's part in learning exits: read rows, search, fit, certify, and say what it is worth.

Knows tensors through `tune` alone; which rows, and what becomes of the result, is `learning`'s.
"""

from __future__ import annotations

import tempfile
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eevp_batch.cluster.learning import (
    CALIBRATION_SHARE,
    LearnAttempt,
    LearnOrder,
    shuffled,
)
from eevp_batch.engine.cut import cut_model
from eevp_batch.engine.fitted import FittedExits
from eevp_batch.engine.load import Loaded
from eevp_batch.engine.segmented_model import SegmentedModel
from eevp_batch.errors import CalibrationError, UsageError
from eevp_batch.fitted_config import job_binding
from eevp_batch.model_config import ModelConfig
from eevp_batch.spec import ExitSpec, JobSpec
from eevp_batch.storage.learned import Learned, write_attempt_files
from eevp_batch.storage.plan import Plan
from eevp_batch.storage.store import Store
from eevp_batch.tune.calibrate import calibrate
from eevp_batch.tune.calibrate_job import job_costs, replay_settings
from eevp_batch.tune.calibration_result import CalibrationResult
from eevp_batch.tune.choose import choose_exits
from eevp_batch.tune.costs import for_job, measured_costs
from eevp_batch.tune.fit import SHORTLIST, FitSettings, fit_exits, split_rows
from eevp_batch.tune.job_rows import chunk_rows
from eevp_batch.tune.states import Row, prompt_key

CALIBRATION = "calibration.json"
_BATCH = 64  # tokens that costs are measured with
_RANK = 128  # of the proposal
_HELD_OUT = 0.2  # of the rows that are fitted to; they order the thresholds, too


@dataclass(frozen=True, slots=True)
class LearnTask:
    """Everything that learning needs of a replica.

    Attributes:
        spec: the job.
        config: its model.
        plan: of its chunks, only those of the order are needed.
        loaded: the model's weights and tokenizer.
        cut: the model as engines share it.
    """

    spec: JobSpec
    config: ModelConfig
    plan: Plan
    loaded: Loaded
    cut: SegmentedModel

    def run(self, order: LearnOrder, store: Store) -> LearnAttempt:
        """Learn, and leave the files of an attempt; why there are no exits is a result, too."""
        started, token = time.perf_counter(), uuid.uuid4().hex[:8]
        figures: dict[str, Any] = {}
        files: dict[str, bytes] = {}
        reason = None
        try:
            with tempfile.TemporaryDirectory() as folder:
                self._learn(order, store, Path(folder), figures, started)
                files = {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
        except UsageError as error:
            reason = str(error)
        except (MemoryError, torch.OutOfMemoryError) as error:
            reason = f"memory ran out: {error}"
        figures["seconds"] = round(time.perf_counter() - started, 2)
        digests = write_attempt_files(store, files, token)
        return LearnAttempt(token, Learned(reason, digests, figures))

    def _learn(
        self,
        order: LearnOrder,
        store: Store,
        folder: Path,
        figures: dict[str, Any],
        started: float,
    ) -> None:
        """Fill the folder.

        Raises:
            UsageError: why there are no exits.
        """
        rows = self._rows(order, store)
        fitting, calibration = self._split(rows)
        figures |= {"rows": len(rows), "fitting_rows": len(fitting)}
        figures |= {"delta": self.spec.exit.delta, "epsilon": self.spec.exit.epsilon}
        layers = self._layers(fitting, order, figures, started)
        fitted = self._fit(fitting, layers)
        fitted.save(folder)
        tuning = split_rows(fitting, _HELD_OUT, self.spec.sampling.seed)[1]
        certified = self._calibrate(fitted, folder, tuning, calibration, figures)
        self._check_gain(order, certified["speed"], time.perf_counter() - started)

    def _rows(self, order: LearnOrder, store: Store) -> list[Row]:
        found: list[Row] = []
        for chunk in order.chunks:
            found += chunk_rows(store, self.plan, chunk, self.loaded.encoder)
        return shuffled(found, self.spec.sampling.seed)

    def _split(self, rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
        """Rows to fit to and rows to certify with; no prompt is in both."""
        border = len(rows) - round(CALIBRATION_SHARE * len(rows))
        known = {prompt_key(row.prompt_ids) for row in rows[:border]}
        others = [row for row in rows[border:] if prompt_key(row.prompt_ids) not in known]
        if border < 3 or not others:
            raise CalibrationError(f"{len(rows)} rows are too few, or their prompts too alike")
        return list(rows[:border]), others

    def _layers(
        self, rows: Sequence[Row], order: LearnOrder, figures: dict[str, Any], started: float
    ) -> list[int]:
        """The exit layers that the job names, or the best ones by quick heads."""
        exit = self.spec.exit
        if exit.layers != "auto":
            early = [layer for layer in exit.layers if layer < self.config.num_layers]
            if not early:
                raise UsageError("exit.layers names the last layer alone")
            return early
        k, rank, shortlist = exit.vocab.top_k, self._proposal_rank, self._shortlist
        costs = measured_costs(self.cut, _BATCH, k, rank, shortlist=shortlist)
        costs = for_job(costs, exit, rows)
        best = choose_exits(self.cut, rows, costs, 1 - exit.delta, seed=self.spec.sampling.seed)[0]
        figures["search"] = best.to_json()
        if not best.layers:
            raise UsageError("no layer was found after which an exit would pay")
        self._check_gain(order, best.speed, time.perf_counter() - started)
        return list(best.layers)

    @property
    def _proposal_rank(self) -> int | None:
        """Of the low-rank proposal that is to be fitted; None: none is asked for."""
        vocab = self.spec.exit.vocab
        if vocab.top_k is None or vocab.proposal != "low_rank":
            return None
        return min(vocab.rank or _RANK, self.config.hidden_size)

    @property
    def _shortlist(self) -> int | None:
        """Ids of the shortlist that is to be made; None: none is asked for."""
        return SHORTLIST if self.spec.exit.vocab.proposal == "shortlist" else None

    def _fit(self, rows: Sequence[Row], layers: Sequence[int]) -> FittedExits:
        settings = FitSettings(
            exit_layers=layers,
            held_out_share=_HELD_OUT,
            prompt_bridge=self.spec.exit.prefill == "bridge",
            proposal_rank=self._proposal_rank,
            shortlist=self._shortlist,
            seed=self.spec.sampling.seed,
        )
        data = {"learned_by": self.plan.run_id}
        return fit_exits(self.cut, self.config.content_hash, rows, settings, data)

    def _calibrate(
        self,
        fitted: FittedExits,
        folder: Path,
        tuning: Sequence[Row],
        rows: Sequence[Row],
        figures: dict[str, Any],
    ) -> dict[str, Any]:
        """Certify thresholds and write them beside the fitted exits; their figures."""
        exit = learned_exit(self.spec.exit, folder, fitted.exit_layers, [])
        spec = self.spec.model_copy(update={"exit": exit})
        weights, tokenizer, *_ = self.loaded
        cut = cut_model(weights, tokenizer, exit, fitted, cut=self.cut)
        result = calibrate(
            cut.model,
            replay_settings(cut, spec),
            tuning,
            rows,
            delta=exit.delta,
            epsilon=exit.epsilon,
            costs=job_costs(cut, exit, tuning),
            seed=spec.sampling.seed,
        )
        found = _figures(result)
        figures |= found
        if result.chosen is None:
            raise CalibrationError(f"nothing was certified: {result.reason}")
        binding = job_binding(spec, self.config)
        result.to_calibration(binding, {"learned_by": self.plan.run_id}).save(folder / CALIBRATION)
        return found

    def _check_gain(self, order: LearnOrder, speed: float, spent_s: float) -> None:
        """Refuse exits that save less than was spent on them, as far as can be predicted."""
        if speed <= 1:
            raise UsageError(f"what could be certified has {speed:.2f} times the speed")
        saved_s = order.rows_left * order.seconds_per_row * (1 - 1 / speed)
        needed_s = self.spec.exit.learn_gain * spent_s
        if saved_s < needed_s:
            raise UsageError(
                f"at {speed:.2f} times the speed they would save {saved_s:.0f} s on the "
                f"{order.rows_left} rows that are left, and took {spent_s:.0f} s to learn; "
                f"allowed: {needed_s:.0f} s or more (exit.learn_gain {self.spec.exit.learn_gain:g})"
            )


def learned_exit(
    exit: ExitSpec, folder: Path, layers: Sequence[int], thresholds: Sequence[float]
) -> ExitSpec:
    """The exits of a job once it has learned them.

    Args:
        exit: of the learning job.
        folder: of the fitted exits.
        layers: exit layers, the last layer apart.
        thresholds: one for each; none: not known yet.
    """
    found: dict[str, Any] = {"mode": "on", "heads": str(folder), "layers": list(layers)}
    found["threshold"] = list(thresholds) or 0.0
    return exit.model_copy(update=found)


def _figures(result: CalibrationResult) -> dict[str, Any]:
    """What is told of a calibration."""
    figures: dict[str, Any] = {
        "calibration_rows": result.num_rows,
        "layers": list(result.exit_layers[:-1]),
    }
    chosen = result.chosen
    if chosen is not None:
        figures |= {
            "thresholds": list(chosen.thresholds),
            "exit_share": chosen.exit_share,
            "mean_layer": chosen.mean_layer,
            "speed": chosen.speed,
            "risk": chosen.calibration_risk,
            "p_value": chosen.p_value,
        }
    return figures
