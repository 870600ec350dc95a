"""Manifests and cluster files are what KubeRay, Kubernetes and Ray say that they take."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from eevp_batch.spec_file import load_spec_text
from tests.infra.validate import problems

ROOT = Path(__file__).resolve().parents[2]
MANIFESTS = sorted((ROOT / "infra" / "kuberay").glob("*.yaml"))
CLUSTERS = sorted((ROOT / "infra" / "ray-up").glob("*.yaml"))

PINS = dict(
    line.strip().split("==")
    for line in (ROOT / "infra" / "constraints.txt").read_text().splitlines()
    if "==" in line
)


def named(path: Path) -> str:
    return path.name


@pytest.mark.parametrize("path", MANIFESTS, ids=named)
def test_a_manifest_is_valid(path: Path) -> None:
    assert problems(path.read_text()) == []


def rayjob() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((ROOT / "infra" / "kuberay" / "rayjob.yaml").read_text()))


def pod(documents: list[dict[str, Any]]) -> dict[str, Any]:
    return documents[1]["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda d: d[1]["spec"].update(entryPoint="typo"),
        lambda d: d[1]["spec"]["rayClusterSpec"]["authOptions"].update(mode="password"),
        lambda d: d[1]["spec"]["rayClusterSpec"].pop("headGroupSpec"),
        lambda d: d[1]["spec"]["rayClusterSpec"]["workerGroupSpecs"][0].update(spot=True),
        lambda d: pod(d).update(terminationGracePeriod=30),
        lambda d: pod(d)["tolerations"][0].update(effects="NoSchedule"),
        lambda d: pod(d)["containers"][0].update(resources={"limit": {}}),
        lambda d: d[0].update(spec={}),
        lambda d: d[1].update(kind="RayJobs"),
    ],
)
def test_a_field_that_does_not_exist_is_found(spoil: Callable[[Any], Any]) -> None:
    documents = rayjob()
    spoil(documents)
    assert problems(yaml.safe_dump_all(documents)) != []


def test_the_job_file_inside_the_manifest_is_a_job_file(tmp_path: Path) -> None:
    spec = load_spec_text(rayjob()[0]["data"]["job.yaml"], "rayjob.yaml", tmp_path)
    group = rayjob()[1]["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    limits = pod(rayjob())["containers"][0]["resources"]["limits"]
    assert group["replicas"] == spec.cluster.replicas
    assert limits["nvidia.com/gpu"] == f"{spec.cluster.gpus_per_replica:g}"
    assert limits["cpu"] == f"{spec.cluster.cpus_per_replica:g}"


@pytest.mark.parametrize("path", MANIFESTS, ids=named)
def test_a_manifest_names_the_pinned_ray_asks_for_a_token_and_runs_nothing_as_root(
    path: Path,
) -> None:
    documents = yaml.safe_load_all(path.read_text())
    specs = [d["spec"] for d in documents if d["apiVersion"] == "ray.io/v1"]
    for spec in (spec.get("rayClusterSpec", spec) for spec in specs):
        assert spec["rayVersion"] == PINS["ray"]
        assert spec["authOptions"]["mode"] == "token"
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            template = group["template"]["spec"]
            assert template["securityContext"]["runAsNonRoot"]
            assert template["terminationGracePeriodSeconds"] >= 30


@pytest.mark.parametrize("path", CLUSTERS, ids=named)
def test_a_cluster_file_is_valid_and_every_ray_in_it_asks_for_a_token(path: Path) -> None:
    written = yaml.safe_load(path.read_text())
    config = prepare_config(copy.deepcopy(written))
    validate_config(config)  # Ray's own ray-schema.json
    starts = [
        command
        for name in ("head_start_ray_commands", "worker_start_ray_commands")
        for command in config[name]
        if "ray start" in command
    ]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in command for command in starts)
    assert "~/.ray/auth_token" in config["file_mounts"]
    unknown = set(written) - set(config) - {"min_workers"}
    assert not unknown


@pytest.mark.parametrize("path", CLUSTERS, ids=named)
def test_an_unknown_field_of_a_cluster_file_is_found(path: Path) -> None:
    config = prepare_config(yaml.safe_load(path.read_text()) | {"spot": True})
    with pytest.raises(Exception, match="spot"):
        validate_config(config)
