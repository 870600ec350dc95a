"""What `calibrate` does on the command line: from a job to its calibration file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from eevp_batch.engine.cut import CutModel, cut_model
from eevp_batch.engine.load import load_job_model, original_model
from eevp_batch.engine.prompts import PromptEncoder
from eevp_batch.engine.proposals import LowRankProposal
from eevp_batch.errors import CalibrationError
from eevp_batch.fitted_config import job_binding, read_manifest, refuse_sampling
from eevp_batch.model_config import ModelConfig
from eevp_batch.spec import ExitSpec, JobSpec, PValueKind
from eevp_batch.tune.calibrate import GRID, Risk, calibrate
from eevp_batch.tune.calibration_result import CalibrationResult
from eevp_batch.tune.costs import for_job, measured_costs
from eevp_batch.tune.free_run import FreeRuns, SequenceRisk, confirm
from eevp_batch.tune.outputs import data_facts, full_depth_rows
from eevp_batch.tune.replay import ReplaySettings
from eevp_batch.tune.search import Costs
from eevp_batch.tune.states import Row

TUNING_SHARE, CONFIRMATION_SHARE = 0.2, 0.2
"""Of the rows; what is left calibrates."""
_COSTED_BATCH = 64

Say = Callable[[str], None]
"""Takes one line about what is going on."""


@dataclass(frozen=True, slots=True)
class CalibrateOptions:
    """How a job is calibrated.

    Attributes:
        delta: bound on the risk.
        epsilon: probability with which the risk may be higher.
        rows: how many rows are drawn from the job's input.
        source: a finished full-depth output of the same job to draw from; None: rows are generated.
        metric: distance of whole outputs; None: differing tokens of a replay.
        kind: the p-value.
        grid: settings to look at.
        seed: of the choice of rows, and of `bounds.betting`.
    """

    delta: float
    epsilon: float
    rows: int
    source: str | None = None
    metric: str | None = None
    kind: PValueKind = "betting"
    grid: int = GRID
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Split:
    """Rows by what they are for; no row is in two of them."""

    tuning: Sequence[Row]
    calibration: Sequence[Row]
    confirmation: Sequence[Row]


def split(rows: Sequence[Row]) -> Split:
    """Cut rows that are in random order.

    Raises:
        CalibrationError: too few for every part to have one.
    """
    tuning = max(1, round(TUNING_SHARE * len(rows)))
    last = len(rows) - max(1, round(CONFIRMATION_SHARE * len(rows)))
    if last <= tuning:
        raise CalibrationError(f"rows: found {len(rows)}; allowed: enough for three parts")
    return Split(rows[:tuning], rows[tuning:last], rows[last:])


def run_calibrate(
    spec: JobSpec,
    config: ModelConfig,
    fields: Mapping[str, Any],
    out: str,
    options: CalibrateOptions,
    say: Say,
) -> dict[str, Any]:
    """Calibrate a job, confirm it and write its file; where nothing is certified, none is written.

    Args:
        spec: the job, its layers taken from its fitted exits, without a calibration.
        config: its model.
        fields: of its plan, by dotted name.
        out: where the file goes.
        options: how.
        say: progress.

    Returns:
        The result as JSON, with `confirmation` (None where nothing was certified) and `file`.

    Raises:
        UsageError: the job cannot be calibrated.
    """
    refuse_sampling(spec)
    if spec.exit.mode == "off":
        raise CalibrationError("exit.mode: found off; allowed: on, to calibrate its exits")
    binding = job_binding(spec, config)
    weights, tokenizer, encoder, _ = load_job_model(spec, config)
    cut = cut_model(weights, tokenizer, spec.exit)
    original = original_model(spec, config) if cut.is_adapted else None
    runs = FreeRuns(cut, tokenizer, spec.exit, spec.sampling, spec.engine, original)
    parts = split(_rows(spec, fields, encoder, runs, options, say))
    result = calibrate_rows(cut, spec, runs, parts, options, say)
    report = result.to_json() | {"confirmation": None, "file": None}
    if result.chosen is None:
        return report
    say(f"generating {len(parts.confirmation)} other rows with exits and without, in turns")
    confirmed = confirm(runs, parts.confirmation, result.chosen.thresholds)
    confirmation = asdict(confirmed) | {"speed": confirmed.speed}
    facts = data_facts(spec, options.source, options.seed, Path(out).parent)
    facts["confirmation"] = confirmation
    result.to_calibration(binding, facts).save(Path(out))
    return report | {"confirmation": confirmation, "file": out}


def calibrate_rows(
    cut: CutModel,
    spec: JobSpec,
    runs: FreeRuns,
    parts: Split,
    options: CalibrateOptions,
    say: Say,
) -> CalibrationResult:
    """Calibrate a job with rows that are there; see `calibrate`.

    Args:
        cut: its model, cut.
        spec: the job.
        runs: of the job, for a distance of whole outputs.
        parts: the rows.
        options: how.
        say: progress.
    """
    risk: Risk | None = None
    if options.metric is not None:
        risk = SequenceRisk(runs, options.metric)
    return calibrate(
        cut.model,
        replay_settings(cut, spec),
        parts.tuning,
        parts.calibration,
        delta=options.delta,
        epsilon=options.epsilon,
        costs=job_costs(cut, spec.exit, parts.tuning),
        kind=options.kind,
        grid=options.grid,
        risk=risk,
        seed=options.seed,
        say=say,
    )


def replay_settings(cut: CutModel, spec: JobSpec) -> ReplaySettings:
    """How a job is replayed.

    Args:
        cut: its model, cut.
        spec: the job.
    """
    return ReplaySettings(
        exits=spec.exit,
        sampling=spec.sampling,
        prune_layer=cut.prune_layer,
        always_kept=sorted(cut.end_ids),
        proposal=cut.proposal,
        short_prompt=cut.short_prompt,
    )


def job_costs(cut: CutModel, exit: ExitSpec, rows: Sequence[Row]) -> Costs:
    """What each part of a token costs here under a job's exits.

    Args:
        cut: the model, cut.
        exit: the job's exits.
        rows: of the job, for how many prompt tokens come with a generated one.
    """
    rank = len(cut.proposal.right) if isinstance(cut.proposal, LowRankProposal) else None
    listed = cut.proposal.ids if cut.proposal is not None else None
    size = None if listed is None else len(listed)
    costs = measured_costs(
        cut.model,
        _COSTED_BATCH,
        exit.vocab.top_k,
        rank,
        shortlist=size,
        mlp_width=cut.model.head_mlp_width,
    )
    costs = for_job(costs, exit, rows)
    return costs if exit.heads is not None else replace(costs, exit_head=0.0)


def _rows(
    spec: JobSpec,
    fields: Mapping[str, Any],
    encoder: PromptEncoder,
    runs: FreeRuns,
    options: CalibrateOptions,
    say: Say,
) -> list[Row]:
    """Rows of the job at full depth, in random order, none of which its exits were fitted to."""
    seen: list[str] = []
    if spec.exit.heads is not None:
        seen = str(read_manifest(Path(spec.exit.heads))["data"].get("prompt_keys", "")).split()
    draw = (options.rows, options.seed, seen)
    return full_depth_rows(
        spec, fields, encoder, lambda: runs.engine(None), say, options.source, *draw
    )
