"""`eevp-batch rayjob`: a manifest that Kubernetes takes, or one clear error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from eevp_batch.cli import main
from eevp_batch.spec_file import load_spec, load_spec_text
from tests.infra.validate import problems

JOB = """\
name: {name}
input: {{path: "s3://bucket/prompts"}}
model: {{path: someone/some-model}}
sampling: {{stop: ["\\n\\n", "yes: no"]}}
cluster: {{replicas: 8}}
output: {{path: "s3://bucket/out"}}
"""
IMAGE = ("--image", "registry.example/eevp:1")


@pytest.fixture
def job(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(JOB.format(name="Corpus.demo_v2"))
    return path


def invoke(job: Path, *options: str) -> Result:
    return CliRunner().invoke(main, ["rayjob", str(job), *options])


def manifest(job: Path, *options: str) -> tuple[dict[str, Any], dict[str, Any]]:
    result = invoke(job, *IMAGE, *options)
    assert result.exit_code == 0, result.stderr
    assert problems(result.stdout) == []
    config_map, rayjob = yaml.safe_load_all(result.stdout)
    return config_map, rayjob


def workers(rayjob: dict[str, Any]) -> dict[str, Any]:
    (group,) = rayjob["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    return group


def limits(group: dict[str, Any]) -> dict[str, str]:
    (container,) = group["template"]["spec"]["containers"]
    assert container["resources"]["requests"] == container["resources"]["limits"]
    return container["resources"]["limits"]


def test_the_embedded_job_file_reads_back_as_the_job(job: Path, tmp_path: Path) -> None:
    config_map, rayjob = manifest(job, "--set", "cluster.gpus_per_replica=2")
    inside = load_spec_text(config_map["data"]["job.yaml"], "job.yaml", tmp_path / "elsewhere")
    outside = load_spec(job, ["cluster.gpus_per_replica=2", "cluster.cpus_per_replica=4"])
    assert inside == outside
    assert rayjob["spec"]["entrypoint"].startswith("eevp-batch run /etc/eevp-batch/job.yaml ")


def test_every_pod_sees_the_job_file_where_the_entry_point_looks(job: Path) -> None:
    config_map, rayjob = manifest(job)
    cluster = rayjob["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {m["mountPath"]: volumes[m["name"]] for m in pod["containers"][0]["volumeMounts"]}
        assert mounts["/etc/eevp-batch"]["configMap"]["name"] == config_map["metadata"]["name"]


def test_names_are_those_that_kubernetes_allows(job: Path) -> None:
    assert manifest(job)[1]["metadata"]["name"] == "corpus-demo-v2"
    job.write_text(JOB.format(name="1." + "x" * 90))
    name = manifest(job)[1]["metadata"]["name"]
    assert name.startswith("job-1-x")
    assert len(name) == 47
    job.write_text(JOB.format(name="_"))
    assert manifest(job)[1]["metadata"]["name"] == "job"


@pytest.mark.parametrize(
    ("gpus", "cpus", "pods", "pod_gpus", "pod_cpus"),
    [
        ("auto", "auto", 8, "1", "4"),
        ("2", "6.5", 8, "2", "7"),
        ("0.5", "2", 4, "1", "4"),
        ("0.3", "1", 3, "1", "3"),
        ("0", "4", 8, None, "4"),
    ],
)
def test_pods_are_as_large_as_the_replicas_in_them(
    job: Path, gpus: str, cpus: str, pods: int, pod_gpus: str | None, pod_cpus: str
) -> None:
    sizes = (f"cluster.gpus_per_replica={gpus}", f"cluster.cpus_per_replica={cpus}")
    group = workers(manifest(job, *(f"--set={size}" for size in sizes))[1])
    assert (group["replicas"], group["maxReplicas"]) == (pods, pods)
    assert limits(group).get("nvidia.com/gpu") == pod_gpus
    assert limits(group)["cpu"] == pod_cpus
    tolerated = [t["key"] for t in group["template"]["spec"].get("tolerations", [])]
    assert tolerated == (["nvidia.com/gpu"] if pod_gpus else [])


def test_no_replica_is_placed_beside_the_coordinator(job: Path) -> None:
    head = manifest(job)[1]["spec"]["rayClusterSpec"]["headGroupSpec"]
    assert head["rayStartParams"] == {"num-cpus": "0", "num-gpus": "0"}


def test_secrets_are_named_and_never_written(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "do-not-print-me")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nor-me")
    result = invoke(job, *IMAGE, "--token-secret", "mine", "--env-secret", "keys")
    assert problems(result.stdout) == []
    assert "do-not-print-me" not in result.stdout
    assert "nor-me" not in result.stdout
    cluster = list(yaml.safe_load_all(result.stdout))[1]["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token", "secretName": "mine"}
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        assert container["envFrom"] == [{"secretRef": {"name": "keys"}}]


def test_workers_go_where_they_are_told_and_the_head_does_not(job: Path) -> None:
    _, rayjob = manifest(job, "--node", "cloud.example/spot=true", "--service-account", "writer")
    cluster = rayjob["spec"]["rayClusterSpec"]
    worker = cluster["workerGroupSpecs"][0]["template"]["spec"]
    head = cluster["headGroupSpec"]["template"]["spec"]
    assert worker["nodeSelector"] == {"cloud.example/spot": "true"}
    assert [t["key"] for t in worker["tolerations"]] == ["nvidia.com/gpu", "cloud.example/spot"]
    assert "nodeSelector" not in head and "tolerations" not in head
    assert worker["serviceAccountName"] == head["serviceAccountName"] == "writer"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("input.path", "prompts/*.parquet"),
        ("input.path", '["s3://bucket/a", b.parquet]'),
        ("model.path", "./model"),
        ("exit.heads", "exits"),
        ("output.path", "out"),
        ("output.path", "file:///data/out"),
    ],
)
def test_a_path_that_no_pod_sees_is_refused_with_its_field(
    job: Path, field: str, value: str
) -> None:
    result = invoke(job, *IMAGE, "--set", f"{field}={value}")
    assert result.exit_code == 2
    assert f"--set: {field}: found " in result.stderr
    assert "which no pod can see; allowed: a URI" in result.stderr


def test_a_path_below_a_mounted_volume_is_seen(job: Path) -> None:
    _, rayjob = manifest(job, "--claim", "shared:/data", "--set", "output.path=/data/out")
    pod = workers(rayjob)["template"]["spec"]
    assert {"name": "data", "persistentVolumeClaim": {"claimName": "shared"}} in pod["volumes"]
    assert {"name": "data", "mountPath": "/data"} in pod["containers"][0]["volumeMounts"]
    result = invoke(job, *IMAGE, "--claim", "shared:/data", "--set", "output.path=/database/out")
    assert result.exit_code == 2
    assert "a path below /data" in result.stderr


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("--claim", "shared", "NAME:/path"),
        ("--claim", "shared:data", "NAME:/path"),
        ("--claim", "shared:/", "NAME:/path"),
        ("--token-secret", "Not A Name", "a Kubernetes object's name"),
        ("--memory", "lots", "a quantity such as 32Gi"),
        ("--node", "spot", "label=value"),
    ],
)
def test_an_option_that_kubernetes_would_refuse_is_refused_here(
    job: Path, option: str, value: str, allowed: str
) -> None:
    result = invoke(job, *IMAGE, option, value)
    assert result.exit_code == 2
    assert result.stderr == f"eevp-batch: {option}: found {value!r}; allowed: {allowed}\n"


def test_without_an_image_nothing_is_printed(job: Path) -> None:
    result = invoke(job)
    assert result.exit_code == 2
    assert "--image" in result.stderr
    assert not result.stdout


def test_a_job_file_that_a_config_map_cannot_hold_is_refused(job: Path) -> None:
    job.write_text(job.read_text() + "prompt: {system: " + "é" * 510_000 + "}\n")
    result = invoke(job, *IMAGE)
    assert result.exit_code == 2
    assert "allowed: 1,000,000, which fit into a ConfigMap" in result.stderr
