"""A job as a manifest for KubeRay: a ConfigMap with the job file, and the RayJob that runs it.

Knows the job file and Kubernetes' words; asks no cluster, opens no storage, reads no secret. What a
pod cannot see is refused here, because there it would fail after the nodes have been paid for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import PurePosixPath
from typing import Any

import yaml

from eevp_batch.errors import SpecError, UsageError
from eevp_batch.spec import ClusterSpec, JobSpec
from eevp_batch.spec_file import SpecSource, dump_spec
from eevp_batch.storage.location import is_uri

JOB_FILE = "/etc/eevp-batch/job.yaml"
_MOST_NAME = 47  # KubeRay adds to the name, and Kubernetes allows 63 letters
_MOST_SPEC_BYTES = 1_000_000  # of the 1 MiB that etcd holds for a ConfigMap
_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_QUANTITY = re.compile(r"\d+(\.\d+)?([KMGTPE]i?)?")
_LABEL = re.compile(r"[A-Za-z0-9._/-]+=[A-Za-z0-9._-]*")
_AUTO_CPUS = 4.0


@dataclass(frozen=True, slots=True)
class Pods:
    """What a manifest needs beside the job.

    Attributes:
        image: has this package and its environment.
        token_secret: name of a Secret whose key `auth_token` holds Ray's token.
        env_secret: name of a Secret that becomes environment variables, such as keys for storage.
        service_account: whose rights the pods have.
        claim: `NAME:/path`: a PersistentVolumeClaim that every pod sees there.
        memory: of one worker pod, such as 32Gi.
        nodes: `label=value` each: workers go to nodes that have them, tainted or not.
    """

    image: str
    token_secret: str = "eevp-ray-token"
    env_secret: str | None = None
    service_account: str | None = None
    claim: str | None = None
    memory: str = "32Gi"
    nodes: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class _Workers:
    """How replicas are packed into pods."""

    pods: int
    cpus: int
    gpus: int
    cluster: dict[str, float] = field(default_factory=dict)


def render_rayjob(source: SpecSource, pods: Pods) -> str:
    """The manifest as YAML: two documents.

    Args:
        source: the job file; its `cluster` section says how many pods of which size.
        pods: the rest.

    Raises:
        UsageError: a pod could not see what the job names, or Kubernetes would refuse a name.
    """
    spec = source.spec
    _check(pods)
    name = _name(spec.name)
    for where, path in _paths(spec):
        _check_path(source, where, path, pods)
    workers = _workers(spec.cluster)
    cluster = {"address": None, **workers.cluster}
    embedded = spec.model_copy(update={"cluster": spec.cluster.model_copy(update=cluster)})
    text = dump_spec(embedded)
    if len(text.encode()) > _MOST_SPEC_BYTES:
        raise UsageError(
            f"{source.document.origin(()).file}: found {len(text.encode()):,} bytes once resolved; "
            f"allowed: {_MOST_SPEC_BYTES:,}, which fit into a ConfigMap"
        )
    labels = {"app.kubernetes.io/name": "eevp-batch", "app.kubernetes.io/instance": name}
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{name}-spec", "labels": labels},
        "data": {"job.yaml": text},
    }
    job = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": name, "labels": labels},
        "spec": _job(name, workers, pods),
    }
    return yaml.dump_all([config_map, job], Dumper=_Dumper, sort_keys=False, width=100)


class _Dumper(yaml.SafeDumper):
    """Writes the job file as a block, so that a person can read and edit it."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


# --- what is refused -----------------------------------------------------------------------------


def _check(pods: Pods) -> None:
    names = (
        ("--token-secret", pods.token_secret),
        ("--env-secret", pods.env_secret),
        ("--service-account", pods.service_account),
        ("--claim", pods.claim and pods.claim.partition(":")[0]),
    )
    for option, name in names:
        if name is not None and not (_NAME.fullmatch(name) and len(name) <= 63):
            raise UsageError(f"{option}: found {name!r}; allowed: a Kubernetes object's name")
    mount = pods.claim.partition(":")[2] if pods.claim else "/claim"
    if not mount.startswith("/") or mount == "/":
        raise UsageError(f"--claim: found {pods.claim!r}; allowed: NAME:/path")
    if not pods.image.strip() or any(letter.isspace() for letter in pods.image):
        raise UsageError(f"--image: found {pods.image!r}; allowed: an image's name")
    if not _QUANTITY.fullmatch(pods.memory):
        raise UsageError(f"--memory: found {pods.memory!r}; allowed: a quantity such as 32Gi")
    for label in pods.nodes:
        if not _LABEL.fullmatch(label):
            raise UsageError(f"--node: found {label!r}; allowed: label=value")


def _name(job: str) -> str:
    """A job's name as Kubernetes allows it.

    Raises:
        UsageError: nothing is left of it.
    """
    name = re.sub(r"[^a-z0-9]+", "-", job.lower())[:_MOST_NAME].strip("-")
    if not name or not name[0].isalpha():
        name = f"job-{name}"[:_MOST_NAME].strip("-")
    return name


def _paths(spec: JobSpec) -> Iterator[tuple[str, str]]:
    """Every path of a job, with its field."""
    inputs = spec.input.path
    for path in inputs if isinstance(inputs, list) else [inputs]:
        yield "input.path", path
    yield "model.path", spec.model.path
    yield "output.path", spec.output.path
    for name in ("heads", "calibration"):
        path = getattr(spec.exit, name)
        if path is not None:
            yield f"exit.{name}", path


def _check_path(source: SpecSource, where: str, path: str, pods: Pods) -> None:
    """Refuse a path of this machine.

    Raises:
        SpecError: it is one.
    """
    is_hub_id = where == "model.path" and not path.startswith("/")
    is_remote = is_uri(path) and not path.startswith("file:")
    mount = PurePosixPath(pods.claim.partition(":")[2]) if pods.claim else None
    if is_hub_id or is_remote or (mount and PurePosixPath(path).is_relative_to(mount)):
        return
    origin = source.origin(where)
    below = (
        f"a path below {mount}" if mount else "a path below a volume that --claim NAME:/path mounts"
    )
    hub = ", a hub id" if where == "model.path" else ""
    found = f"{path}, which no pod can see"
    allowed = f"a URI such as s3://bucket/folder{hub}, or {below}"
    raise SpecError(origin.file, origin.line, where, found, allowed)


# --- what is asked of Kubernetes -----------------------------------------------------------------


def _workers(cluster: ClusterSpec) -> _Workers:
    """One pod for each replica; replicas that ask for a part of a GPU share a pod with one."""
    cpus = _AUTO_CPUS if cluster.cpus_per_replica == "auto" else cluster.cpus_per_replica
    gpus = 1.0 if cluster.gpus_per_replica == "auto" else cluster.gpus_per_replica
    together = int(1 / gpus + 1e-9) if 0 < gpus < 1 else 1
    return _Workers(
        pods=math.ceil(cluster.max_replicas / together),
        cpus=math.ceil(cpus * together),
        gpus=math.ceil(gpus),
        # `auto` looks at the nodes that are there, and at first there is none.
        cluster={"cpus_per_replica": cpus, "gpus_per_replica": gpus},
    )


def _job(name: str, workers: _Workers, pods: Pods) -> dict[str, Any]:
    return {
        # The job file names the cluster nowhere: this is the one that the entry point runs in.
        "entrypoint": f"eevp-batch run {JOB_FILE} --set cluster.address=auto",
        "submissionMode": "K8sJobMode",
        # Another try is a new cluster and the same command, which goes on from what is committed.
        "backoffLimit": 3,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": 600,
        "metadata": {"eevp-batch": name},
        "rayClusterSpec": {
            "rayVersion": version("ray"),
            "authOptions": {"mode": "token", "secretName": pods.token_secret},
            "enableInTreeAutoscaling": True,
            "autoscalerOptions": {"version": "v2", "idleTimeoutSeconds": 120},
            "headGroupSpec": {
                # No replica runs beside the coordinator.
                "rayStartParams": {"num-cpus": "0", "num-gpus": "0"},
                "template": _template(name, pods, "ray-head", _resources(2, "8Gi", 0), {}),
            },
            "workerGroupSpecs": [
                {
                    "groupName": "replicas",
                    # The job asks for all at once, and starts with `cluster.replicas.min` of them.
                    "replicas": workers.pods,
                    # Its replicas leave when nothing is left for them: no pod outlives its use.
                    "minReplicas": 0,
                    "maxReplicas": workers.pods,
                    "rayStartParams": {},
                    "template": _template(
                        name,
                        pods,
                        "ray-worker",
                        _resources(workers.cpus, pods.memory, workers.gpus),
                        _placement(pods, workers.gpus),
                    ),
                }
            ],
        },
    }


def _resources(cpus: int, memory: str, gpus: int) -> dict[str, Any]:
    """Asked for and allowed alike: a pod that may be squeezed loses its replica under load."""
    each: dict[str, Any] = {"cpu": str(cpus), "memory": memory}
    if gpus:
        each["nvidia.com/gpu"] = str(gpus)
    return {"requests": each, "limits": each}


def _placement(pods: Pods, gpus: int) -> dict[str, Any]:
    """Where workers may go; a toleration of a taint that is not there does nothing."""
    labels = dict(label.split("=", 1) for label in pods.nodes)
    tolerations: list[dict[str, str]] = [
        {"key": key, "operator": "Equal", "value": value, "effect": "NoSchedule"}
        for key, value in labels.items()
    ]
    if gpus:
        gpu = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
        tolerations.insert(0, gpu)
    found: dict[str, Any] = {"nodeSelector": labels} if labels else {}
    return {**found, "tolerations": tolerations} if tolerations else found


def _template(
    name: str, pods: Pods, container: str, resources: Mapping[str, Any], place: Mapping[str, Any]
) -> dict[str, Any]:
    """A pod: not root, no rights beyond its own, the job file at `JOB_FILE`."""
    mounts: list[dict[str, Any]] = [
        {"name": "spec", "mountPath": str(PurePosixPath(JOB_FILE).parent), "readOnly": True},
        {"name": "shm", "mountPath": "/dev/shm"},
    ]
    volumes: list[dict[str, Any]] = [
        {"name": "spec", "configMap": {"name": f"{name}-spec"}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "2Gi"}},
    ]
    if pods.claim:
        claim, _, mount = pods.claim.partition(":")
        mounts.append({"name": "data", "mountPath": mount})
        volumes.append({"name": "data", "persistentVolumeClaim": {"claimName": claim}})
    body: dict[str, Any] = {
        "name": container,
        "image": pods.image,
        "resources": resources,
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": mounts,
    }
    if pods.env_secret:
        body["envFrom"] = [{"secretRef": {"name": pods.env_secret}}]
    account = {"serviceAccountName": pods.service_account} if pods.service_account else {}
    return {
        "spec": {
            **account,
            **place,
            # A preempted replica drains nothing; this is for Ray to say goodbye.
            "terminationGracePeriodSeconds": 30,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": 1000,
                "runAsGroup": 1000,
                "fsGroup": 1000,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [body],
            "volumes": volumes,
        }
    }
