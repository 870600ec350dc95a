"""The engines of one replica, around one set of layers: with exits, at full depth, for audits.

The only module of this room that knows tensors; replicas alone import it.
"""

from __future__ import annotations

import functools

import torch

from eevp_batch.cluster.audit import AUDIT_BATCH, AuditedEngine
from eevp_batch.cluster.engine_loop import RowEncoder, RowEngine
from eevp_batch.cluster.phased import PhasedEngine
from eevp_batch.engine.engine import Engine
from eevp_batch.engine.limits import page_bytes
from eevp_batch.engine.load import Loaded, build_engine, load_engine, load_job_model
from eevp_batch.engine.segmented_model import SegmentedModel
from eevp_batch.model_config import ModelConfig
from eevp_batch.records import Phase
from eevp_batch.spec import EngineSpec, JobSpec
from eevp_batch.tune.outputs import full_depth_engine

AUDIT_MEMORY = 8
"""The keys and values of audits get so many times less memory than those of the job."""


def load_engines(
    spec: JobSpec, model: ModelConfig, num_threads: int | None = None
) -> tuple[RowEngine, RowEncoder]:
    """What a replica needs of a job's model.

    Args:
        spec: the job.
        model: what `read_model_config` said of its model.
        num_threads: CPU threads for torch; None leaves them alone.

    Raises:
        UsageError: the job's settings do not fit the model.
    """
    if not spec.audit.full_depth_fraction:
        return load_engine(spec, model, num_threads)
    loaded = load_job_model(spec, model, num_threads)
    make = functools.partial(
        _make, spec, loaded, SegmentedModel(loaded.weights, [model.num_layers])
    )
    return PhasedEngine(make, "exits"), loaded.encoder


def _make(spec: JobSpec, loaded: Loaded, cut: SegmentedModel, phase: Phase) -> RowEngine:
    """The engine of a phase; the one of the phase before has been given up."""
    if cut.device.type == "cuda":
        torch.cuda.empty_cache()
    if phase == "full":
        return _whole(spec, loaded, cut, spec.engine)
    engine = build_engine(
        loaded.weights, loaded.tokenizer, spec.exit, spec.sampling, spec.engine, cut=cut
    )
    fraction = spec.audit.full_depth_fraction
    if not fraction:
        return engine
    limits = EngineSpec(
        max_batch=AUDIT_BATCH,
        max_resident=AUDIT_BATCH,
        kv_memory=max(1, engine.pool.num_pages // AUDIT_MEMORY) * page_bytes(cut),
    )
    whole = _whole(spec, loaded, cut, limits)
    return AuditedEngine(engine, whole, spec.sampling.seed, fraction)


def _whole(spec: JobSpec, loaded: Loaded, cut: SegmentedModel, limits: EngineSpec) -> Engine:
    return full_depth_engine(loaded.weights, cut, loaded.tokenizer, spec.sampling, limits)
