"""What a replica finds under other names on its own node than the coordinator did on its.

Files that were sent along lie in Ray's working folder of a node, and a model of the hub in the
node's own cache.
"""

from __future__ import annotations

import os
from functools import partial

from eevp_batch.cluster.engine_loop import Build, RowEncoder, RowEngine
from eevp_batch.cluster.fleet import Resources
from eevp_batch.errors import ModelError
from eevp_batch.model_config import ModelConfig, read_model_config
from eevp_batch.spec import JobSpec
from eevp_batch.storage.plan import Plan


def loader(
    spec: JobSpec, model: ModelConfig, plan: Plan, store_text: str, resources: Resources
) -> Build:
    """What builds a replica's engine and encoder, wherever the replica is.

    Args:
        spec: the job, with paths of this process.
        model: its model, as this process found it.
        plan: its plan; the list of chunks may be empty.
        store_text: what `Store.open` takes for the job's output.
        resources: what a replica has.
    """
    return partial(_load, spec, model, plan, store_text, resources, os.getcwd())


def _load(
    spec: JobSpec,
    model: ModelConfig,
    plan: Plan,
    store_text: str,
    resources: Resources,
    working_dir: str,
) -> tuple[RowEngine, RowEncoder]:
    # Imported in the replica only: the driver needs no torch.
    from eevp_batch.cluster.engines import load_engines

    spec, model = at_home(spec, model, working_dir)
    threads, gpus = resources.num_threads, resources.num_gpus
    return load_engines(spec, model, plan, store_text, threads, gpus)


def at_home(spec: JobSpec, model: ModelConfig, working_dir: str) -> tuple[JobSpec, ModelConfig]:
    """The job and its model with paths of this node.

    Args:
        spec: the job, as the coordinator has it.
        model: its model, as the coordinator has it.
        working_dir: the coordinator's working folder.

    Raises:
        ModelError: the model is not here, or is another one.
    """
    return _with_sent_files(spec, working_dir), _with_own_model(spec, model)


def _with_sent_files(spec: JobSpec, working_dir: str) -> JobSpec:
    own = os.getcwd()
    heads = spec.exit.heads
    if heads is None or os.path.exists(heads) or not heads.startswith(working_dir + os.sep):
        return spec
    moved = os.path.join(own, os.path.relpath(heads, working_dir))
    return spec.model_copy(update={"exit": spec.exit.model_copy(update={"heads": moved})})


def _with_own_model(spec: JobSpec, model: ModelConfig) -> ModelConfig:
    if os.path.isdir(model.path):
        return model
    pinned = spec.model.model_copy(update={"revision": model.revision or spec.model.revision})
    found = read_model_config(pinned)
    if found.content_hash != model.content_hash:
        raise ModelError(
            f"model.path: {spec.model.path}: found another model on this node than on the "
            f"coordinator's: hash {found.content_hash}; allowed: {model.content_hash}"
        )
    return found
