"""Whether every node sees a job's paths: asked before replicas start, one small task on each node.

A model, an input or an output folder that only some nodes see would end the job somewhere in its
middle, or leave rows on the disk of a machine that nobody looks at.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from eevp_batch.cluster.fleet import Resources
from eevp_batch.cluster.resources import num_fitting
from eevp_batch.errors import SpecError
from eevp_batch.spec import JobSpec
from eevp_batch.storage import layout
from eevp_batch.storage.location import is_uri
from eevp_batch.storage.plan import Plan
from eevp_batch.storage.store import Store

_ANSWER_S = 180.0


@dataclass(frozen=True, slots=True)
class JobPath:
    """A local path that every node has to see.

    Attributes:
        field: of the job file.
        path: as the user knows it.
        probe: a file or folder that is there wherever the path is seen.
    """

    field: str
    path: str
    probe: str


def job_paths(spec: JobSpec, plan: Plan, store: Store) -> list[JobPath]:
    """The local paths of a job; none where all is on storage that every node reaches.

    Args:
        spec: the job.
        plan: its plan, which is written.
        store: its output folder.
    """
    own = os.getcwd() + os.sep  # sent along, and moved on each node
    found = [JobPath("output.path", store.text, os.path.join(store.text, layout.PLAN))]
    folders = {os.path.dirname(file.path): file.path for file in plan.files}
    found += [JobPath("input.path", path, path) for path in folders.values()]
    if os.path.isabs(spec.model.path):
        probe = os.path.join(spec.model.path, "config.json")
        found.append(JobPath("model.path", spec.model.path, probe))
    if spec.exit.mode == "on" and spec.exit.heads is not None:
        found.append(JobPath("exit.heads", spec.exit.heads, spec.exit.heads))
    return [item for item in found if not is_uri(item.path) and not item.path.startswith(own)]


def check_nodes(paths: Sequence[JobPath], resources: Resources) -> None:
    """Ask every other node that could hold a replica for the paths.

    A node that does not answer is left alone: replicas that never come up there are told of later.

    Args:
        paths: what has to be seen.
        resources: what a replica asks for.

    Raises:
        SpecError: a node does not see a path; whoever knows the job file adds its line.
    """
    here = ray.get_runtime_context().get_node_id()
    nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    others = [
        node
        for node in nodes
        if node["NodeID"] != here and num_fitting(node["Resources"], resources)
    ]
    if not paths or not others:
        return
    look = ray.remote(_missing)
    asked = {
        look.options(
            name="eevp-check-paths",
            num_cpus=0,
            max_retries=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
        ).remote([item.probe for item in paths]): node["NodeManagerAddress"]
        for node in others
    }
    answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_ANSWER_S)
    for reference in answered:
        try:
            missing = ray.get(reference)
        except RayError:  # the node has left
            continue
        if missing:
            item = paths[missing[0]]
            raise SpecError(
                "job file",
                None,
                item.field,
                f"{item.path}, which node {asked[reference]} does not see",
                "a URI, or a path that is the same on every node",
            )


def _missing(probes: Sequence[str]) -> list[int]:
    """Numbers of the paths that this node does not see."""
    return [number for number, probe in enumerate(probes) if not os.path.exists(probe)]
