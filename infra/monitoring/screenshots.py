"""Pictures of a running job: what the Ray dashboard and Prometheus show of it.

    python infra/monitoring/screenshots.py FOLDER

Needs a `chromium` and a `prometheus` (`apt-get install chromium prometheus`) and the test extra.
Submits jobs/corpus.yaml to a Ray of its own, as check.py does, and writes PNG files into FOLDER:
the list of jobs, the job's page, the list of actors, and our metrics in Prometheus. Fails where a
name of ours is not on the page that should have it.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import time
import urllib.parse
from pathlib import Path

import check

sys.path.insert(0, str(check.ROOT))
from tests.report.browser import Browser

WIDTH, HEIGHT = 1500, 1000
JOB, REPLICAS = "eevp:corpus-demo", ("replica-0", "replica-1")
GRAPHS = (
    "sum by (exit_layer) (rate(ray_eevp_tokens_total[30s]))",
    "sum by (status) (ray_eevp_rows)",
    "sum by (queue) (ray_eevp_queue_length)",
)
DRAWN_S = 3.0
"""What a page that has its data may take to draw it."""


def shows(text: str) -> str:
    """An expression: the page's text has this in it."""
    return f"document.body !== null && document.body.innerText.includes({json.dumps(text)})"


def pictures_of_ray(browser: Browser, url: str, folder: Path) -> None:
    """The dashboard's pages on the job and its replicas."""
    (job,) = [
        job for job in check.get_list(url, "/api/jobs/") if job["metadata"]["job_name"] == JOB
    ]
    print(f"metadata of the job: {job['metadata']}")
    browser.visit(f"{url}/#/jobs", WIDTH, HEIGHT)
    browser.wait_for(shows(JOB))
    picture(browser, folder / "jobs.png")
    browser.visit(f"{url}/#/jobs/{job['job_id']}", WIDTH, HEIGHT)
    browser.wait_for(shows("generate a chunk"))
    picture(browser, folder / "job.png")
    browser.visit(f"{url}/#/actors", WIDTH, HEIGHT)
    for replica in REPLICAS:
        browser.wait_for(shows(f"{JOB}/{replica}"))
    picture(browser, folder / "actors.png")


def pictures_of_prometheus(browser: Browser, url: str, folder: Path) -> None:
    """Our metrics, drawn by Prometheus' own page."""
    wanted = check.Query("rows over some time", "count_over_time(ray_eevp_rows[5m]) > 8")
    until = time.monotonic() + check.PATIENCE_S
    while not wanted.series and time.monotonic() < until:
        check.ask(url, wanted)
        time.sleep(check.SCRAPE_S)
    query = {
        f"g{place}.{key}": value
        for place, expr in enumerate(GRAPHS)
        for key, value in (("expr", expr), ("tab", "0"), ("range_input", "5m"), ("stacked", "1"))
    }
    browser.visit(f"{url}/graph?{urllib.parse.urlencode(query)}", WIDTH, HEIGHT)
    time.sleep(DRAWN_S)
    picture(browser, folder / "prometheus.png")


def picture(browser: Browser, path: Path) -> None:
    """Once it is drawn."""
    time.sleep(DRAWN_S)
    browser.screenshot(path)
    print(path)


def main() -> None:
    """Run a job, and take the pictures while it runs."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    job = check.ROOT / "jobs" / "corpus.yaml"
    with tempfile.TemporaryDirectory(prefix="eevp-pictures-") as name:
        try:
            with (
                check.running_job(Path(name), job, check.DEMO) as running,
                check.running_prometheus(Path(name), running.targets) as prometheus,
                contextlib.closing(Browser(Path(name))) as browser,
            ):
                pictures_of_prometheus(browser, prometheus, folder)
                pictures_of_ray(browser, running.dashboard_url, folder)
        except check.CheckError as error:
            sys.exit(f"failed: {error}")


if __name__ == "__main__":
    main()
