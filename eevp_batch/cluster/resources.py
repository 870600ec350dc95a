"""What a replica asks of Ray, from what the job says and what the nodes have."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import ray

from eevp_batch.cluster.fleet import Resources
from eevp_batch.errors import UsageError
from eevp_batch.spec import ClusterSpec

Offer = dict[str, float]
"""Ray's resources of one node, `CPU` and `GPU` among them."""


def replica_resources(cluster: ClusterSpec, nodes: Sequence[Offer]) -> Resources:
    """What each replica asks of Ray; `auto` shares out what there is.

    GPUs: one each; replicas share where there are fewer GPUs than replicas have to fit; none where
    there is none. CPUs: an equal share in whole cores, one at least, so that all replicas for which
    there is room find a place on the nodes.

    Args:
        cluster: what the job says.
        nodes: what there is.

    Raises:
        UsageError: the job asks more than there is of a Ray of its own, so that a replica would
            wait for ever. A cluster may grow.
    """
    needed, cpus = _needed(cluster), [node.get("CPU", 0.0) for node in nodes]
    gpus = sum(node.get("GPU", 0.0) for node in nodes)
    if cluster.gpus_per_replica == "auto":
        num_gpus = min(1.0, 1 / math.ceil(needed / gpus)) if gpus else 0.0
    else:
        num_gpus = cluster.gpus_per_replica
    if cluster.cpus_per_replica == "auto":
        fitting = int(gpus / num_gpus + 1e-6) if num_gpus else 0
        most = min(fitting or cluster.max_replicas, cluster.max_replicas)
        num_cpus = _share(cpus, max(needed, most))
    else:
        num_cpus = cluster.cpus_per_replica
    asked = (("cpus", num_cpus, sum(cpus)), ("gpus", num_gpus, gpus))
    for name, each, there in asked if cluster.address is None else ():
        if each * needed > there + 1e-6:
            raise UsageError(
                f"cluster.{name}_per_replica: found {each:g} for each of {needed} "
                f"replicas; allowed: {there:g} in all, which is what Ray has here"
            )
    return Resources(num_cpus=num_cpus, num_gpus=num_gpus)


def fleet_size(cluster: ClusterSpec, nodes: Sequence[Offer], each: Resources) -> int:
    """How many replicas the job asks for at most; a Ray of its own does not grow.

    Args:
        cluster: what the job says.
        nodes: what there is.
        each: what each replica asks for.
    """
    if cluster.address is not None:
        return cluster.max_replicas
    fitting = sum(num_fitting(node, each) for node in nodes)
    return min(cluster.max_replicas, max(_needed(cluster), fitting))


def num_fitting(node: Offer, each: Resources) -> int:
    """Replicas that a node without other work has room for."""
    asked = [(node.get("CPU", 0.0), each.num_cpus), (node.get("GPU", 0.0), each.num_gpus)]
    return min(int(there / one + 1e-6) for there, one in asked if one)


def _needed(cluster: ClusterSpec) -> int:
    """Replicas that have to fit where nothing grows: a number means all of them."""
    return cluster.replicas if isinstance(cluster.replicas, int) else cluster.min_replicas


def _share(cpus: Sequence[float], replicas: int) -> float:
    """The most whole cores that each replica can have; one where there are too few."""
    for each in range(int(max(cpus, default=1.0)), 1, -1):
        if sum(node // each for node in cpus) >= replicas:
            return float(each)
    return 1.0


def cpus_to_offer(cluster: ClusterSpec) -> int:
    """Logical CPUs of a local Ray: this process's cores, and more where the job asks for more."""
    each = 1.0 if cluster.cpus_per_replica == "auto" else cluster.cpus_per_replica
    return max(len(os.sched_getaffinity(0)), math.ceil(_needed(cluster) * each))


def offered() -> list[Offer]:
    """What the living nodes of the Ray that this process is connected to have."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
