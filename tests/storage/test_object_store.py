"""An output on S3: the same promises over HTTP, whatever the server and the network do."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from eevp_batch.errors import JobFailedError, StorageError, UsageError
from eevp_batch.spec import JobSpec
from eevp_batch.storage import inputs, location
from eevp_batch.storage.commit import Committer
from eevp_batch.storage.plan import make_plan, open_plan
from eevp_batch.storage.retries import NO_PATIENCE
from eevp_batch.storage.store import Store
from eevp_batch.storage.verify import verify
from tests.s3_server import FAULTS, Fault, S3Server
from tests.storage.jobs import (
    MODEL,
    attempt_chunk,
    make_spec,
    run_job,
    snapshot,
    takers,
    write_input,
)

OpenS3 = Callable[[str], Store]
Act = Callable[[Store], object]

# Each operation on a folder that holds `a` with "content", and what it answers.
OPERATIONS: dict[str, tuple[str, Act, object]] = {
    "read": ("GET", lambda store: store.read("a"), b"content"),
    "look up": ("HEAD", lambda store: store.size("a"), 7),
    "list": ("GET", lambda store: store.list(""), ["a"]),
    "write": ("PUT", lambda store: (store.write("b", b"new"), store.read("b"))[1], b"new"),
    "replace": ("PUT", lambda store: (store.write("a", b"new"), store.read("a"))[1], b"new"),
    "create": ("PUT", lambda store: (store.create_exclusive("b", b"n"), store.read("b"))[1], b"n"),
    "copy": ("PUT", lambda store: (store.publish("a", "b"), store.list(""))[1], ["b"]),
    "delete": ("DELETE", lambda store: (store.delete("a"), store.list(""))[1], []),
    "append": ("PUT", lambda store: (store.append_line("l", "x"), [*store.read_lines("l")])[1], 0),
}


# A client waits for seconds before it gives a silent server up, so few are tried with that.
CASES = [(name, fault) for name in OPERATIONS for fault in FAULTS if fault != "hang"]
CASES += [(name, "hang") for name in ("read", "write", "create", "copy")]


@pytest.mark.parametrize(("name", "fault"), CASES)
def test_an_operation_survives_a_bad_answer(
    s3: S3Server, s3_store: Store, name: str, fault: Fault
) -> None:
    method, act, answer = OPERATIONS[name]
    s3_store.write("a", b"content")
    s3.faults.plan(method, "out", *[fault] * (1 if fault == "hang" else 2))
    found = act(s3_store)
    assert s3.faults.injected
    if name == "append":
        assert isinstance(found, list) and set(found) == {"x"}, "a lost answer may double a line"
    else:
        assert found == answer


def test_a_record_whose_answer_was_lost_is_known_as_ours(s3: S3Server, s3_store: Store) -> None:
    s3.faults.plan("PUT", "record", "lost")
    s3_store.create_exclusive("record", b"mine")
    assert [request[:3] for request in s3.faults.requests].count("PUT") == 2, (
        "the first PUT created the record, the second was refused because of it"
    )
    assert s3_store.read("record") == b"mine"


def test_a_record_of_another_is_not_taken_for_ours(s3: S3Server, s3_store: Store) -> None:
    s3_store.create_exclusive("record", b"theirs")
    for fault in FAULTS:
        s3.faults.plan("PUT", "record", fault)
        with pytest.raises(FileExistsError):
            s3_store.create_exclusive("record", b"mine")
    assert s3_store.read("record") == b"theirs"
    assert len(s3.faults.injected) == len(FAULTS)


def test_of_many_writers_one_takes_a_name(s3_store: Store) -> None:
    won = takers(s3_store, lambda number: b"%d" % number)
    assert len(won) == 1
    assert s3_store.read("record") == b"%d" % won[0]


def test_publishing_what_is_not_there(s3_store: Store) -> None:
    with pytest.raises(FileNotFoundError):
        s3_store.publish("nothing", "part")


def test_what_does_not_pass_is_told_at_once(s3: S3Server, open_s3: OpenS3) -> None:
    elsewhere = open_s3("x")
    elsewhere.root = elsewhere.root.replace("bucket", "no-such-bucket")
    for act in (lambda: elsewhere.write("a", b""), lambda: elsewhere.create_exclusive("a", b"")):
        s3.faults.heal()
        with pytest.raises((OSError, UsageError)) as caught:
            act()
        assert not isinstance(caught.value, StorageError)
        assert len(s3.faults.requests) == 1, "nothing was tried twice"


def test_the_layers_of_retries_multiply_as_stated(s3: S3Server) -> None:
    store = Store.open(s3.uri("layers"))
    store.patience = NO_PATIENCE
    s3.faults.plan("HEAD", "layers/a", *["503"] * 9)
    with pytest.raises(StorageError, match="looking up a: failed 1 times"):
        store.exists("a")
    assert len(s3.faults.injected) == location.CLIENT_TRIES
    s3.faults.plan("PUT", "layers/record", *["503"] * 9)
    with pytest.raises(StorageError, match="creating record: failed 1 times"):
        store.create_exclusive("record", b"")
    assert len(s3.faults.injected) == location.CLIENT_TRIES + 1


def test_without_obstore_it_is_said_what_to_install(
    s3_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "obstore", None)
    with pytest.raises(UsageError, match=r"eevp-batch\[object-store\]"):
        s3_store.create_exclusive("record", b"")


def test_the_endpoint_may_come_from_the_environment(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{s3.port}")
    store = Store.open("s3://bucket/environment?region=us-east-1")
    store.create_exclusive("record", b"1")
    assert store.list("") == ["record"]


class Google(BaseHTTPRequestHandler):
    """Answers what Google Cloud Storage answers to an upload on condition, and to a look-up."""

    taken: ClassVar[set[str]] = set()
    conditions: ClassVar[list[str | None]] = []

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.conditions.append(self.headers["x-goog-if-generation-match"])
        is_taken = self.path in self.taken
        self.taken.add(self.path)  # before the answer, for the next request comes at once
        self.answer(412 if is_taken else 200, b"")

    def do_GET(self) -> None:
        self.answer(200, b'{"name": "out/record", "bucket": "bucket", "size": "1"}')

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        for name, value in (("ETag", '"1"'), ("Content-Length", str(len(body)))):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_google_is_asked_for_a_name_that_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOOGLE_BEARER_TOKEN", "testing")
    with ThreadingHTTPServer(("127.0.0.1", 0), Google) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"endpoint_override=127.0.0.1:{server.server_port}&scheme=http"
        store = Store.open(f"gs://anonymous@bucket/out?{endpoint}")
        store.create_exclusive("record", b"1")
        with pytest.raises(FileExistsError):
            store.create_exclusive("record", b"2")
        server.shutdown()
    assert Google.conditions == ["0", "0"], "the condition that no generation is there"


# --- whole jobs ------------------------------------------------------------------------------


@pytest.fixture
def spec(tmp_path: Path) -> JobSpec:
    return make_spec(write_input(tmp_path / "in.parquet", [f"row {n}" for n in range(14)]))


@pytest.fixture
def expected(tmp_path: Path, spec: JobSpec) -> dict[str, bytes]:
    """The parts that the same job leaves on a local disk."""
    store = Store.open(tmp_path / "out")
    run_job(store, spec)
    return snapshot(store)


@pytest.mark.parametrize("seed", range(3))
def test_a_job_comes_out_the_same_over_a_bad_network(
    s3: S3Server, s3_store: Store, spec: JobSpec, expected: dict[str, bytes], seed: int
) -> None:
    s3.faults.at_random(0.25, ("500", "503", "lost", "cut"), seed)
    run_job(s3_store, spec)
    assert len(s3.faults.injected) > 10, "the network was bad"
    s3.faults.heal()
    assert snapshot(s3_store) == expected
    assert verify(s3_store).problems == []
    assert s3_store.list("_eevp/attempts") == []


def test_a_job_waits_for_an_outage_to_end(
    s3: S3Server, s3_store: Store, spec: JobSpec, expected: dict[str, bytes]
) -> None:
    plan = open_plan(s3_store, make_plan(spec, MODEL))
    committer = Committer(s3_store, plan)
    attempts = [attempt_chunk(s3_store, plan, spec, chunk) for chunk in plan.chunks]
    s3.faults.at_random(1.0, ("503",), 0)
    threading.Timer(1.0, s3.faults.heal).start()
    for attempt in attempts:
        committer.commit(attempt, 1)
    committer.finish({})
    assert snapshot(s3_store) == expected


def test_an_outage_without_an_end_leaves_a_job_that_goes_on(
    s3: S3Server, s3_store: Store, spec: JobSpec, expected: dict[str, bytes]
) -> None:
    s3_store.patience = replace(s3_store.patience, total_s=0.2)
    s3.faults.plan("PUT", "00002", *["503"] * 1000)
    with pytest.raises(StorageError, match="the same command goes on"):
        run_job(s3_store, spec)
    s3.faults.heal()
    committed = s3_store.list("_eevp/commits")
    assert committed == ["00000.json", "00001.json"], "what came before it is committed"
    run_job(s3_store, spec)
    assert snapshot(s3_store) == expected
    assert verify(s3_store).problems == []


def test_a_copy_without_its_delete_is_harmless(
    s3: S3Server, s3_store: Store, spec: JobSpec, expected: dict[str, bytes]
) -> None:
    plan = open_plan(s3_store, make_plan(spec, MODEL))
    attempt = attempt_chunk(s3_store, plan, spec, plan.chunks[0])
    s3_store.patience = NO_PATIENCE
    s3.faults.plan("DELETE", "attempts", "503")
    with pytest.raises(JobFailedError):
        Committer(s3_store, plan).commit(attempt, 1)
    assert s3_store.list("_eevp/attempts") and snapshot(s3_store), "both names are there"
    assert s3_store.list("_eevp/commits") == [], "and neither counts"
    run_job(s3_store, spec)
    assert snapshot(s3_store) == expected
    assert s3_store.list("_eevp/attempts") == []


def test_input_is_read_over_a_bad_network(
    s3: S3Server, open_s3: OpenS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_input(tmp_path / "in.parquet", [f"row {number}" for number in range(14)])
    bucket = open_s3("inputs")
    bucket.write("x/in.parquet", path.read_bytes())
    spec = make_spec(s3.uri("inputs/x/*.parquet"))
    plan, store = make_plan(spec, MODEL), Store.open(tmp_path / "out")
    monkeypatch.setattr(inputs, "PATIENCE", bucket.patience)
    s3.faults.at_random(0.3, ("500", "503", "lost", "cut"), 5)
    attempts = [attempt_chunk(store, plan, spec, chunk) for chunk in plan.chunks]
    assert s3.faults.injected
    assert sum(attempt.rows_ok + attempt.rows_error for attempt in attempts) == 14
