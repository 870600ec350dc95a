"""Pictures of a running job: what the Ray dashboard and Prometheus show of it.

    python infra/monitoring/screenshots.py FOLDER

Needs a `chromium` and a `prometheus` (`apt-get install chromium prometheus`) and the test extra.
Submits jobs/corpus.yaml to a Ray of its own, as check.py does, and writes PNG files into FOLDER:
the list of jobs, the page of this one, the list of actors, our metrics in Prometheus. Fails where a
name of ours is not on the page that should have it.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
import urllib.parse
from pathlib import Path

import check

os.environ.setdefault("RAY_AUTH_MODE", "token")  # of the job's Ray, and for us, who ask it
sys.path.insert(0, str(check.ROOT))
from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled
from ray.job_submission import JobSubmissionClient

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
RELOAD_S = 60.0
OPEN = "[...document.querySelectorAll('h4, h5, p, span')].find(e => e.innerText === %s).click()"
"""Opens a part of the page that is closed at first."""
LONG = [word.replace("input.limit=96", "input.limit=4000") for word in check.DEMO]
"""More rows than are done before the last picture; the job is interrupted then."""


def wait_for(browser: Browser, text: str) -> None:
    """Until the page has this text.

    The dashboard gives up after one answer that it did not get, so the page is loaded again.

    Raises:
        CheckError: it never had it.
    """
    shown = f"document.body !== null && document.body.innerText.includes({json.dumps(text)})"
    now_s = time.monotonic()
    until, reload_s = now_s + check.PATIENCE_S, now_s + RELOAD_S
    while not browser.evaluate(shown):
        if time.monotonic() > reload_s:
            browser.page("Page.reload")
            reload_s = time.monotonic() + RELOAD_S
        if time.monotonic() > until:
            page = browser.evaluate("document.body.innerText")
            raise check.CheckError(f"no {text!r} in {page}")
        time.sleep(0.5)


def pictures_of_ray(browser: Browser, url: str, folder: Path) -> None:
    """The dashboard's pages on the job and its replicas."""
    (job,) = [
        job
        for job in JobSubmissionClient(url).list_jobs()
        if (job.metadata or {}).get("job_name") == JOB
    ]
    print(f"metadata of the job: {job.metadata}")
    # Ray asks a person for the token once.
    headers = get_auth_headers_if_auth_enabled({})
    browser.page("Network.setExtraHTTPHeaders", headers=headers)
    browser.visit(f"{url}/#/jobs", WIDTH, HEIGHT)
    wait_for(browser, JOB)
    picture(browser, folder / "jobs.png")
    browser.visit(f"{url}/#/jobs/{job.job_id}", WIDTH, HEIGHT)
    wait_for(browser, "Task Table")
    for table in ("Actor Table", "Task Table"):
        browser.evaluate(OPEN % json.dumps(table))
    wait_for(browser, "generate a chunk")
    picture(browser, folder / "job.png")
    browser.visit(f"{url}/#/actors", WIDTH, HEIGHT)
    for replica in REPLICAS:
        wait_for(browser, f"{JOB}/{replica}")
    picture(browser, folder / "actors.png")


def pictures_of_prometheus(browser: Browser, url: str, folder: Path) -> None:
    """Our metrics, drawn by Prometheus' own page."""
    wanted = check.Query("some minutes", "count_over_time(ray_eevp_tokens_total[5m]) > 20")
    until = time.monotonic() + check.PATIENCE_S
    while not wanted.series and time.monotonic() < until:
        check.ask(url, wanted)
        time.sleep(check.SCRAPE_S)
    query = {
        f"g{place}.{key}": value
        for place, expr in enumerate(GRAPHS)
        for key, value in (("expr", expr), ("tab", "0"), ("range_input", "2m"), ("stacked", "1"))
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
                check.running_job(Path(name), job, LONG) as running,
                check.running_prometheus(Path(name), running.targets) as prometheus,
                contextlib.closing(Browser(Path(name))) as browser,
            ):
                pictures_of_ray(browser, running.dashboard_url, folder)
                pictures_of_prometheus(browser, prometheus, folder)
        except check.CheckError as error:
            sys.exit(f"failed: {error}")


if __name__ == "__main__":
    main()
