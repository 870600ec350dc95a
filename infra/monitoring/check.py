"""Runs a job beside a real Prometheus, and asks it everything that dashboard and alerts ask.

    python infra/monitoring/check.py [--json FILE] [JOB.yaml [--set FIELD=VALUE ...]]

Needs `prometheus` and `promtool` (`apt-get install prometheus`). The job is jobs/corpus.yaml unless
another one is named, with its output in a folder that is removed. Ends with 0 when every query of
the dashboard returned data while the job ran and every alert could be evaluated.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
DASHBOARD = HERE / "grafana" / "dashboards" / "eevp-batch.json"
CONFIG, ALERTS = HERE / "prometheus.yml", HERE / "alerts.yml"
SCRAPE_S = 2
VARIABLES = {"$__rate_interval": "30s", "$job_name": ".*", "$run_id": ".*", "$replica": ".*"}
DEMO = ["--set", "input.limit=96", "--set", "run.chunk_rows=4", "--set", "engine.max_resident=8"]
PATIENCE_S = 600.0


class CheckError(Exception):
    """Something is missing or wrong; its text says what."""


@dataclass
class Query:
    """One question to Prometheus.

    Attributes:
        where: the panel or alert that asks.
        expr: in PromQL.
        series: what came back last; None before it was asked.
        values: of some of them.
    """

    where: str
    expr: str
    series: int | None = None
    values: Sequence[float] = ()


@dataclass
class RunningJob:
    """A job that runs in a process of its own.

    Attributes:
        dashboard_url: of its Ray.
        targets: the file that says where its metrics are.
    """

    process: subprocess.Popen[str]
    dashboard_url: str
    targets: Path


@contextmanager
def running_job(folder: Path, job: Path, overrides: Sequence[str]) -> Iterator[RunningJob]:
    """Submit a job to a Ray of its own; it is interrupted, if it still runs, at the end.

    Raises:
        CheckError: it ended before it told where its dashboard is.
    """
    command = [sys.executable, "-m", "eevp_batch", "submit", str(job), *overrides]
    command += ["--set", f"output.path={folder / 'out'}"]
    variables = {"RAY_metrics_report_interval_ms": str(1000 * SCRAPE_S), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **variables, "PYTHONPATH": str(ROOT)},
    )
    try:
        yield RunningJob(process, *_told(process))
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        process.wait(PATIENCE_S)


def _told(process: subprocess.Popen[str]) -> tuple[str, Path]:
    """What a job says of its Ray; the rest of its messages goes to our stderr."""
    found: dict[str, str] = {}
    lines: list[str] = []
    stream = process.stderr
    for line in stream or ():
        lines.append(line)
        for name in ("Ray dashboard", "targets for Prometheus"):
            if line.startswith(f"{name}: "):
                found[name] = line.partition(": ")[2].strip()
        if len(found) == 2:
            threading.Thread(target=_pass_on, args=(stream,), daemon=True).start()
            return found["Ray dashboard"], Path(found["targets for Prometheus"])
    raise CheckError(f"the job ended at its start: {''.join(lines[-5:])}")


def _pass_on(stream: Any) -> None:
    for line in stream:
        sys.stderr.write(line)


@contextmanager
def running_prometheus(folder: Path, targets: Path) -> Iterator[str]:
    """A Prometheus on 127.0.0.1 with the configuration of this folder; yields its address.

    Only the file of targets and the intervals differ.
    """
    config = yaml.safe_load(CONFIG.read_text())
    config["global"] = dict.fromkeys(("scrape_interval", "evaluation_interval"), f"{SCRAPE_S}s")
    config["rule_files"] = [str(ALERTS)]
    config["scrape_configs"][0]["file_sd_configs"] = [
        {"files": [str(targets)], "refresh_interval": f"{SCRAPE_S}s"}
    ]
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(config))
    port = _free_port()
    with open(folder / "prometheus.log", "wb") as log:
        process = subprocess.Popen(
            [
                _program("prometheus"),
                f"--config.file={path}",
                f"--storage.tsdb.path={folder / 'tsdb'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=log,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(lambda: _answers(f"{url}/-/ready"), process, "Prometheus", folder / "prometheus.log")
        yield url
    finally:
        process.terminate()
        process.wait(PATIENCE_S)


def dashboard_queries() -> list[Query]:
    """Every query of the dashboard, its variables set to everything."""
    found = []
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", ()):
            expr = target["expr"]
            for name, value in VARIABLES.items():
                expr = expr.replace(name, value)
            found.append(Query(panel["title"], expr))
    return found


def alert_queries() -> list[Query]:
    """The expression of every alert."""
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    return [Query(rule["alert"], rule["expr"]) for group in groups for rule in group["rules"]]


def ask(url: str, query: Query) -> None:
    """Ask once.

    Raises:
        CheckError: Prometheus does not understand the expression.
    """
    answer = get(url, f"/api/v1/query?{urllib.parse.urlencode({'query': query.expr})}")
    if answer["status"] != "success":
        raise CheckError(f"{query.where}: {query.expr}: {answer}")
    result = answer["data"]["result"]
    values = [float(series["value"][1]) for series in result]
    query.values = [value for value in values if value == value]  # a rate of nothing is NaN
    query.series = len(query.values)


def get(url: str, path: str) -> dict[str, Any]:
    """What Prometheus answers."""
    try:
        with urllib.request.urlopen(url + path, timeout=60) as answer:
            found = json.load(answer)
    except urllib.error.HTTPError as error:
        found = json.load(error)
    return dict(found)


def check_files() -> None:
    """Let promtool read configuration and rules."""
    for what, path in (("config", CONFIG), ("rules", ALERTS)):
        command = [_program("promtool"), "check", what, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CheckError(f"promtool check {what}: {done.stdout}{done.stderr}")


def ask_until_all_answer(url: str, queries: Sequence[Query], job: RunningJob) -> float:
    """Ask while the job runs until each query has returned data; the seconds that took.

    Raises:
        CheckError: the job ended before.
    """
    begun_s = time.monotonic()
    while True:
        has_ended = job.process.poll() is not None
        for query in queries:
            if not query.series:
                ask(url, query)
        empty = [f"{query.where}: {query.expr}" for query in queries if not query.series]
        if not empty:
            for query in queries:  # once more, for values of one moment
                ask(url, query)
            return time.monotonic() - begun_s
        if has_ended:
            raise CheckError("the job has ended, and no data came for\n  " + "\n  ".join(empty))
        time.sleep(SCRAPE_S)


def check_rules(url: str, num_rules: int) -> None:
    """Every alert has been evaluated by Prometheus itself, without an error."""
    rules: list[dict[str, Any]] = []
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        groups = get(url, "/api/v1/rules")["data"]["groups"]
        rules = [rule for group in groups for rule in group["rules"]]
        if len(rules) == num_rules and all(rule["health"] == "ok" for rule in rules):
            return
        time.sleep(SCRAPE_S)
    bad = [f"{rule['name']}: {rule['health']} {rule.get('lastError', '')}" for rule in rules]
    raise CheckError(f"{num_rules} alerts, of which Prometheus says: {', '.join(bad)}")


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _wait(is_true: Callable[[], bool], process: subprocess.Popen[Any], who: str, log: Path) -> None:
    until = time.monotonic() + PATIENCE_S
    while not is_true():
        if process.poll() is not None or time.monotonic() > until:
            raise CheckError(f"{who} did not start: {log.read_text()[-2000:]}")
        time.sleep(0.2)


def _program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise CheckError(f"{name} is not installed; apt-get install prometheus brings it")
    return found


def run(job: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Do all of it; what was found."""
    check_files()
    queries, alerts = dashboard_queries(), alert_queries()
    with tempfile.TemporaryDirectory(prefix="eevp-check-") as name:
        folder = Path(name)
        with (
            running_job(folder, job, overrides) as running,
            running_prometheus(folder, running.targets) as url,
        ):
            seconds = ask_until_all_answer(url, queries, running)
            check_rules(url, len(alerts))
            for alert in alerts:
                ask(url, alert)
            version = get(url, "/api/v1/status/buildinfo")["data"]["version"]
            names = get(url, "/api/v1/label/__name__/values")["data"]
    return {
        "prometheus": version,
        "seconds_until_all_answered": round(seconds, 1),
        "metrics": sorted(name for name in names if re.match("ray_eevp_", name)),
        "dashboard": [vars(query) for query in queries],
        "alerts": [vars(alert) for alert in alerts],
    }


def main() -> None:
    """Check, and print what came back."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("job", nargs="?", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    overrides = [word for field in options.set for word in ("--set", field)]
    job = options.job or ROOT / "jobs" / "corpus.yaml"
    try:
        found = run(job, overrides if options.job else [*DEMO, *overrides])
    except CheckError as error:
        sys.exit(f"failed: {error}")
    for query in found["dashboard"]:
        print(f"{query['where']:36} {query['series']:3} series, such as {query['values'][0]:.6g}")
    for alert in found["alerts"]:
        print(f"{alert['where']:36} evaluated, {'fires' if alert['series'] else 'does not fire'}")
    print(
        f"Prometheus {found['prometheus']}: {len(found['dashboard'])} queries returned data after "
        f"{found['seconds_until_all_answered']} s; {len(found['metrics'])} names of ours"
    )
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
