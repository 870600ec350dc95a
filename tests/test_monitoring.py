"""Dashboard and alerts ask for what jobs publish, and for nothing else."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from eevp_batch.cluster.metrics import METRICS

MONITORING = Path(__file__).resolve().parent.parent / "infra" / "monitoring"
DASHBOARD = json.loads((MONITORING / "grafana/dashboards/eevp-batch.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
ALERTS = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"]
RULES = [rule for group in ALERTS for rule in group["rules"]]

# Ray's own, as `ray/dashboard/modules/reporter/reporter_agent.py` defines them, and Prometheus'.
OF_RAY = {
    "ray_node_cpu_utilization",
    "ray_node_disk_utilization_percentage",
    "ray_node_mem_total",
    "ray_node_mem_used",
    "up",
}
OURS = {name: metric for metric in METRICS for name in metric.exported}
SELECTOR = re.compile(r"\b(ray_\w+|up(?={))(?:\{([^}]*)\})?")
GROUPED = re.compile(r"\b(?:by|on) \(([^)]*)\)")


def expressions() -> list[Any]:
    queries = [
        (f"panel {panel['title']}", target["expr"])
        for panel in PANELS
        for target in panel["targets"]
    ]
    alerts = [(f"alert {rule['alert']}", rule["expr"]) for rule in RULES]
    return [pytest.param(expr, id=where) for where, expr in (*queries, *alerts)]


@pytest.mark.parametrize("expr", expressions())
def test_an_expression_asks_for_what_there_is(expr: str) -> None:
    found = SELECTOR.findall(expr)
    assert found, "it asks for no metric"
    tags: set[str] = {"le"}
    for name, selector in found:
        assert name in OURS or name in OF_RAY, f"nobody publishes {name}"
        if name in OURS:
            tags |= set(OURS[name].tags)
            asked = set(re.findall(r"(\w+)=~?\"", selector))
            assert asked <= set(OURS[name].tags), f"{name} has no tag {asked}"
    for group in GROUPED.findall(expr):
        asked = {tag.strip() for tag in group.split(",") if tag.strip()}
        assert asked <= tags, f"none of its metrics has all of {asked}"


@pytest.mark.parametrize("expr", expressions())
def test_a_counter_is_asked_for_its_rate(expr: str) -> None:
    for name, _ in SELECTOR.findall(expr):
        if name.endswith(("_total", "_bucket")) and name in OURS:
            assert re.search(rf"rate\({name}\b", expr), f"{name} only grows"


def test_every_metric_is_shown() -> None:
    asked = " ".join(target["expr"] for panel in PANELS for target in panel["targets"])
    missing = [m.name for m in METRICS if not any(name in asked for name in m.exported)]
    assert not missing, f"no panel shows {missing}"


def test_the_dashboard_is_one_that_grafana_loads() -> None:
    assert DASHBOARD["uid"] and DASHBOARD["title"] and DASHBOARD["schemaVersion"] >= 36
    assert "id" not in DASHBOARD, "a number of one Grafana refuses provisioning in another"
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    provisioned = MONITORING / "grafana" / "provisioning"
    source = yaml.safe_load((provisioned / "datasources/prometheus.yml").read_text())
    uids = {entry["uid"] for entry in source["datasources"]}
    variables = {entry["name"] for entry in DASHBOARD["templating"]["list"]}
    cells: set[tuple[int, int]] = set()
    for panel in PANELS:
        assert panel["type"] in ("stat", "timeseries") and panel["title"]
        letters = [target["refId"] for target in panel["targets"]]
        assert len(letters) == len(set(letters)) > 0
        for target in (panel, *panel["targets"]):
            assert target["datasource"]["uid"] in uids, "a source that is not provisioned"
        for target in panel["targets"]:
            used = set(re.findall(r"\$(\w+)", target["expr"])) - {"__rate_interval"}
            assert used <= variables
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        covered = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not covered & cells, f"{panel['title']} lies over another panel"
        cells |= covered


def test_grafana_is_told_where_the_dashboard_is() -> None:
    path = MONITORING / "grafana/provisioning/dashboards/eevp-batch.yml"
    (provider,) = yaml.safe_load(path.read_text())["providers"]
    assert provider["type"] == "file"
    mounted = provider["options"]["path"]
    readme = (MONITORING / "README.md").read_text()
    assert f"monitoring/grafana/dashboards:{mounted}" in readme, "the README mounts it elsewhere"


def test_alerts_say_what_to_do() -> None:
    names = [rule["alert"] for rule in RULES]
    assert len(names) == len(set(names))
    for rule in RULES:
        assert {"summary", "action"} <= set(rule["annotations"])
        assert rule["labels"]["severity"] in ("info", "warning", "critical")


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
@pytest.mark.parametrize(("kind", "name"), [("config", "prometheus.yml"), ("rules", "alerts.yml")])
def test_promtool_finds_nothing_wrong(kind: str, name: str) -> None:
    command = ["promtool", "check", kind, str(MONITORING / name)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
