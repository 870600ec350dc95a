"""What a workload's benchmark is given: stages of exits, sizes, and where everything lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eevp_batch.engine.load import load_job_model
from eevp_batch.fitted_config import read_manifest
from eevp_batch.prepare import prepare
from eevp_batch.tune.job_rows import output_rows
from eevp_batch.tune.states import Row
from tests.bench.workloads_jobs import Sizes, Workload


@dataclass(frozen=True)
class Stage:
    """Exits that are tried.

    Attributes:
        fit: what `fit` is asked for, beside the rows; None: nothing is fitted for it.
        heads: the stage whose fit it uses; None: no heads.
        exit: what the job says of them.
    """

    fit: tuple[str, ...] | None
    heads: str | None
    exit: tuple[str, ...]


_LOW_RANK = ("exit.kv=bridge", "exit.vocab.proposal=low_rank")
BRIDGED = "exit.prefill=bridge"
_FIT = ("--tail", "2")
STAGES: dict[str, Stage] = {
    "logit lens": Stage(None, None, ("exit.kv=propagate",)),
    "heads": Stage(_FIT, "heads", _LOW_RANK),
    "heads, prompts bridged": Stage(None, "heads", (*_LOW_RANK, BRIDGED)),
    # Its training takes minutes, so that it is only run where `--stage` names it.
    "heads and adapter": Stage((*_FIT, "--adapter-rank", "16"), "heads and adapter", _LOW_RANK),
}


@dataclass(frozen=True)
class Bench:
    """A workload, its folder, and how it is measured.

    Attributes:
        model: folder of the model.
        dtype: number type that it runs in.
        deltas: risks to certify.
        settings: of thresholds, that are tried on the tuning rows.
        targets: of the search of exit layers; the next one where none pays at the one before.
        rounds, processes: of the timed part.
        fit_options: of every `fit`.
        fields: of the job, for all stages with heads.
        finished: a full-depth output that is there already.
    """

    workload: Workload
    folder: Path
    sizes: Sizes
    model: Path
    dtype: str
    deltas: Sequence[float]
    settings: int
    targets: Sequence[float]
    rounds: int
    processes: int
    fit_options: Sequence[str] = ()
    fields: Sequence[str] = ()
    finished: Path | None = None

    @property
    def job(self) -> str:
        return str(self.folder / "job.yaml")

    @property
    def out(self) -> Path:
        """The full-depth output."""
        return self.finished or self.folder / "full-depth"

    def heads(self, stage: str) -> Path:
        """Where the fit of a stage is."""
        return self.folder / slug(stage)

    def certificate(self, stage: str, delta: float) -> Path:
        """The certified thresholds of a stage."""
        return self.folder / f"{slug(stage)}-{delta:g}.json"

    def step_file(self, name: str) -> Path:
        """What a step found."""
        return self.folder / f"step-{name}.json"

    def exit_fields(self, name: str) -> list[str]:
        """What a job says to have the exits of a stage, thresholds apart."""
        stage = STAGES[name]
        fields = ["exit.mode=on", *stage.exit]
        if stage.heads is not None:
            return [*fields, *self.fields, f"exit.heads={self.heads(stage.heads).name}"]
        return [*fields, f"exit.layers={self.layers()}"]

    def layers(self) -> list[int]:
        """Those of the first fit: what is not fitted is tried at the same exits."""
        return list(read_manifest(self.heads("heads"))["exit_layers"])

    def rows(self, count: int, *, fitted: bool) -> list[Row]:
        """Rows of the full-depth output in random order, exits fitted to them or not."""
        job = prepare(self.job, [])
        encoder = load_job_model(job.spec, job.model).encoder
        keys = str(read_manifest(self.heads("heads"))["data"]["prompt_keys"]).split()
        seed = self.sizes.seed
        if not fitted:
            return output_rows(str(self.out), job.plan.fields, encoder, count, seed, keys)
        return output_rows(str(self.out), job.plan.fields, encoder, self.sizes.fit, seed)[:count]


def slug(name: str) -> str:
    """A stage's name as that of a file."""
    return name.replace(",", "").replace(" ", "-")
