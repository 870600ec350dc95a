"""Passwords and tokens stay where they are: not in messages, not in anything that a job leaves."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eevp_batch.cluster.guard import marked_processes
from eevp_batch.cluster.job_server import JobServer
from eevp_batch.errors import ModelError, SpecError, UsageError
from eevp_batch.model_config import read_model_config
from eevp_batch.spec import ModelSpec
from eevp_batch.spec_file import load_spec_text
from eevp_batch.storage.location import locate
from eevp_batch.uri_secrets import has_secret
from tests.cluster.test_driver import SLOW, Driver, wait_for
from tests.real_jobs import command, finished, write_job

CANARY = "hunter2-canary-0123456789"
SECRET_URIS = [
    f"s3://key:{CANARY}@bucket/a",
    f"s3://key%3A{CANARY}@bucket/a",
    f"s3://bucket/a?secret_key={CANARY}&region=x",
    f"abfss://c@a.dfs.core.windows.net/a?sas_token={CANARY}",
    f"https://host/a?X-Amz-Signature={CANARY}",
    f"https://host/a?sig={CANARY}",
    f"s3://bucket/a?endpoint_override=http://key:{CANARY}@host",
    f"https://user:{CANARY}@[bad/a",
    f"https://{CANARY}@host/a",
    f"s3://key:{CANARY} with a space@bucket/a",
]
SECRET_PACKAGES = [
    f"--extra-index-url=https://user:{CANARY}@pypi.example.org/simple",
    f"-i https://{CANARY}@pypi.example.org/simple",
    f"ours @ git+https://{CANARY}@example.org/ours.git",
    f"ours@https://example.org/ours.whl?token={CANARY}",
]
JOB = "input: {path: in.parquet}\nmodel: {path: m}\noutput: {path: out}\n"


@pytest.mark.parametrize("uri", SECRET_URIS)
def test_a_secret_in_a_uri_is_refused_and_never_repeated(uri: str) -> None:
    for field in ("input.path", "output.path", "model.path", "exit.heads", "cluster.address"):
        with pytest.raises(SpecError) as told:
            load_spec_text(JOB, "job.yaml", "/", [f"{field}='{uri}'"])
        assert str(told.value) == (
            f"--set: {field}: found a URI with a password or an access key; "
            "allowed: credentials from the environment or from the machine's role"
        )
    with pytest.raises(SpecError, match=r"^job\.yaml:1: input\.path\[1\]: found a URI with a pass"):
        load_spec_text(JOB.replace("in.parquet", f"[a, '{uri}']"), "job.yaml", "/")
    with pytest.raises(UsageError) as refused:
        locate(uri)
    with pytest.raises(ModelError) as model:
        read_model_config(ModelSpec(path=uri))
    assert CANARY not in f"{refused.value} {model.value}"


@pytest.mark.parametrize("package", SECRET_PACKAGES)
def test_a_secret_in_a_package_to_install_is_refused_unseen(package: str) -> None:
    with pytest.raises(SpecError) as told:
        load_spec_text(f"cluster: {{pip: [torch, '{package}']}}\n{JOB}", "job.yaml", "/")
    assert str(told.value).startswith("job.yaml:1: cluster.pip[1]: found a URI with a password")
    assert CANARY not in str(told.value)


def test_packages_without_secrets_are_taken() -> None:
    packages = ["ours @ git+https://example.org/ours.git@v1.2", "git+ssh://git@example.org/a"]
    packages += ["-i https://${NAME}:${TOKEN}@example.org/simple", "-i https://${TOKEN}@a.org"]
    job = load_spec_text(f"cluster: {{pip: {json.dumps(packages)}}}\n{JOB}", "job.yaml", "/")
    assert job.cluster.pip == packages


def test_a_variable_is_named_without_its_value() -> None:
    with pytest.raises(SpecError) as told:
        load_spec_text(f"cluster: {{env: [A, 'TOKEN={CANARY}']}}\n{JOB}", "job.yaml", "/")
    assert str(told.value) == (
        "job.yaml:1: cluster.env[1]: found a variable with its value; "
        "allowed: its name alone: `submit` has it"
    )


def test_a_password_in_the_address_of_a_cluster_is_refused_unseen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    uri = f"http://user:{CANARY}@127.0.0.1:1"
    monkeypatch.setenv("RAY_ADDRESS", uri)
    for address in (uri, "auto"):
        with pytest.raises(UsageError, match="found a password in it") as told:
            JobServer(address)
        assert CANARY not in str(told.value)


@pytest.mark.parametrize(
    "uri",
    [
        "s3://bucket/a?region=eu&endpoint_override=http://127.0.0.1:9000",
        "/data/key:value@home/in.parquet",
        "hdfs://user@host:8020/a",
        "https://huggingface.co/a/b",
    ],
)
def test_other_names_are_no_secrets(uri: str) -> None:
    assert not has_secret(uri)


def test_endless_texts_are_judged_too() -> None:
    """By the square of their length it would take hours."""
    assert not has_secret("x" * 10**6) and not has_secret("a+b.c-" * 10**5)
    assert not has_secret("s3://a " * 10**5)
    assert has_secret("s3://b?a=" * 10**4), "no end of URIs in options of URIs"


def test_a_prompt_may_speak_of_passwords() -> None:
    job = load_spec_text(f"prompt: {{system: 'https://u:{CANARY}@h'}}\n{JOB}", "job.yaml", "/")
    assert CANARY in str(job.prompt.system)


@pytest.mark.ray
@pytest.mark.slow
def test_what_the_environment_holds_is_in_nothing_that_a_job_leaves(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["HF_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"]
    names += ["AZURE_STORAGE_KEY", "MY_PASSWORD"]
    for name in names:
        monkeypatch.setenv(name, f"{CANARY}-{name}")
    pq.write_table(
        pa.table({"id": ["a", "b", "c"], "prompt": ["the dog", None, "a fox"]}),
        tmp_path / "in.parquet",
    )
    fields = {
        "input": {"path": "in.parquet"},
        "model": {"path": str(tiny_llama), "dtype": "float32"},
        "exit": {"layers": [2]},
        "sampling": {"max_new_tokens": 4},
        "run": {"max_error_rate": 1.0},
    }
    job = write_job(tmp_path, fields)
    code, stdout, stderr = finished(command("submit", job))
    assert code == 0, stderr
    left = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {"plan.json", "job.resolved.yaml", "events.jsonl", "_SUCCESS"} <= {p.name for p in left}
    for path in left:
        assert CANARY.encode() not in path.read_bytes(), f"{path.name} holds a secret"
    for table in (pq.read_table(path) for path in left if path.suffix == ".parquet"):
        assert CANARY not in f"{table.to_pylist()}{table.schema.metadata}"
    assert CANARY not in stdout + stderr
    code, stdout, stderr = finished(command("report", tmp_path / "out", "--json"))
    assert CANARY not in stdout + stderr and code == 0, stderr


@pytest.mark.ray
def test_no_process_of_a_local_ray_listens_beyond_loopback(tmp_path: Path) -> None:
    driver = Driver(tmp_path, SLOW)
    driver.until_committed(1)
    marker, _ = driver.session()
    found = {
        address
        for pid in [driver.process.pid, *marked_processes(marker)]
        for address in _listening(pid)
    }
    driver.process.kill()
    driver.end()
    wait_for(lambda: not any(marked_processes(marker)), timeout_s=15)
    assert found, "Ray listens somewhere"
    assert found <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}, f"others reach it at {found}"


def _listening(pid: int) -> set[str]:
    """Addresses on which a process accepts TCP connections."""
    inodes = set()
    for descriptor in Path(f"/proc/{pid}/fd").glob("*"):
        try:
            target = os.readlink(descriptor)
        except OSError:
            continue
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    found = set()
    for family, table in ((socket.AF_INET, "tcp"), (socket.AF_INET6, "tcp6")):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:  # 0A: TCP_LISTEN
                raw = bytes.fromhex(fields[1].partition(":")[0])
                words = [raw[i : i + 4][::-1] for i in range(0, len(raw), 4)]
                found.add(socket.inet_ntop(family, b"".join(words)))
    return found
