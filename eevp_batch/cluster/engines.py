"""The engines of one replica, around one set of layers: with exits, at full depth, for audits.

Replicas alone import it, for it loads torch.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from eevp_batch.calibration_file import Calibration
from eevp_batch.cluster.audit import AUDIT_BATCH, AuditedEngine
from eevp_batch.cluster.engine_loop import RowEncoder, RowEngine
from eevp_batch.cluster.learn_task import CALIBRATION, LearnTask, learned_exit
from eevp_batch.cluster.learning import LearnAttempt, LearnOrder
from eevp_batch.cluster.phased import PhasedEngine
from eevp_batch.engine.cut import merge_adapter
from eevp_batch.engine.engine import Engine
from eevp_batch.engine.fitted import FittedExits
from eevp_batch.engine.limits import page_bytes
from eevp_batch.engine.load import Loaded, build_engine, load_engine, load_job_model, original_model
from eevp_batch.engine.placed_model import place_model
from eevp_batch.errors import EngineError
from eevp_batch.fitted_config import has_adapter
from eevp_batch.model_config import ModelConfig, resolve_exit_layers
from eevp_batch.records import Phase
from eevp_batch.spec import EngineSpec, JobSpec
from eevp_batch.storage.learned import fetch_learned, read_learned
from eevp_batch.storage.plan import Plan
from eevp_batch.storage.store import Store
from eevp_batch.tune.outputs import full_depth_engine

AUDIT_MEMORY = 8
"""The keys and values of audits get so many times less memory than those of the job."""


def load_engines(
    spec: JobSpec,
    model: ModelConfig,
    plan: Plan,
    store_text: str,
    num_threads: int | None = None,
    num_gpus: float | None = None,
) -> tuple[RowEngine, RowEncoder]:
    """What a replica needs of a job's model.

    Args:
        spec: the job.
        model: what `read_model_config` said of its model.
        plan: the job's plan; its list of chunks is not used and may be empty.
        store_text: what `Store.open` takes for the job's output.
        num_threads: CPU threads for torch; None leaves them alone.
        num_gpus: GPUs of the replica; None: one, where there is any.

    Raises:
        UsageError: the job's settings do not fit the model or the GPUs.
    """
    if spec.exit.mode != "learn" and not spec.audit.full_depth_fraction:
        return load_engine(spec, model, num_threads, num_gpus)
    loaded = load_job_model(spec, model, num_threads, num_gpus)
    return JobEngine(spec, model, plan, Store.open(store_text), loaded), loaded.encoder


class JobEngine(PhasedEngine):
    """The engine of a job that audits rows or learns its exits.

    Args:
        spec: the job.
        model: its model.
        plan: its plan.
        store: its output folder.
        loaded: weights and tokenizer; on several devices placed for the job's exits, whose
            layers the engine without exits shares.
    """

    def __init__(
        self, spec: JobSpec, model: ModelConfig, plan: Plan, store: Store, loaded: Loaded
    ) -> None:
        self._spec, self._store, self._loaded = spec, store, loaded
        kv_memory = None if spec.engine.kv_memory == "auto" else spec.engine.kv_memory
        layers = [model.num_layers]
        if spec.exit.mode != "learn":
            layers = resolve_exit_layers(spec.exit, model.num_layers)
            merge_adapter(loaded.weights, spec.exit)
        self._cut = place_model(loaded.weights, layers, loaded.devices, kv_memory)
        # What an adapted model says at full depth is no measure of its exits.
        is_adapted = has_adapter(spec.exit)
        self._original = original_model(spec, model, loaded.devices) if is_adapted else self._cut
        self._task = LearnTask(spec, model, plan, loaded, self._cut)
        has_exits = True
        if spec.exit.mode == "learn":
            learned = read_learned(store)
            has_exits = learned is not None and learned.has_exits
        super().__init__(self._engine_of, "exits" if has_exits else "full")

    def learn(self, order: LearnOrder, encoder: RowEncoder, store: Store) -> LearnAttempt:
        """See `LearningEngine`; the engine is made again when it is asked for the next time."""
        self.release()
        try:
            return self._task.run(order, store)
        finally:
            self._empty_cache()

    def _engine_of(self, phase: Phase) -> RowEngine:
        """The engine of a phase; the one of the phase before has been given up."""
        self._empty_cache()
        if phase == "full":
            return self._whole(self._spec.engine)
        engine = self._with_exits()
        fraction = self._spec.audit.full_depth_fraction
        if not fraction:
            return engine
        limits = EngineSpec(
            max_batch=AUDIT_BATCH,
            max_resident=AUDIT_BATCH,
            kv_memory=max(1, engine.pool.num_pages // AUDIT_MEMORY) * page_bytes(self._cut),
        )
        seed = self._spec.sampling.seed
        return AuditedEngine(engine, self._whole(limits), seed, fraction)

    def _with_exits(self) -> Engine:
        exit, fitted = self._spec.exit, None
        if exit.mode == "learn":
            learned = read_learned(self._store)
            if learned is None or not learned.has_exits:
                raise EngineError("a chunk is to have exits, but none have been learned")
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                fetch_learned(self._store, learned, folder)
                fitted = FittedExits.load(folder)
                thresholds = Calibration.load(folder / CALIBRATION).thresholds
                exit = learned_exit(exit, folder, fitted.exit_layers, thresholds)
        weights, tokenizer, *_ = self._loaded
        spec = self._spec
        return build_engine(
            weights, tokenizer, exit, spec.sampling, spec.engine, fitted, cut=self._cut
        )

    def _whole(self, limits: EngineSpec) -> Engine:
        weights, tokenizer, *_ = self._loaded
        return full_depth_engine(weights, self._original, tokenizer, self._spec.sampling, limits)

    def _empty_cache(self) -> None:
        if self._cut.device.type == "cuda":
            torch.cuda.empty_cache()
