from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from eevp_batch.report.figures import JobFigures, gather
from eevp_batch.report.page import render_page
from eevp_batch.report.plots import dot_plot, stacked_plot, steps, time_ticks
from eevp_batch.storage import layout
from eevp_batch.storage.plan import make_plan, open_plan
from eevp_batch.storage.store import Store
from tests.report.outputs import EVIL, TEXT, audited_spec, make_output, write_prompts
from tests.storage.jobs import MODEL, make_spec, run_job, write_input

OUTSIDE = re.compile(r"""(?:src|href|action)\s*=|url\(|@import|https?:""")


class Page(HTMLParser):
    """What a browser would make of a page: its elements, scripts and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.texts: list[str] = []
        self._in_script = self._in_style = False
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in_script, self._in_style = tag == "script", tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._in_script = self._in_style = False

    def handle_data(self, data: str) -> None:
        if self._in_script:
            self.scripts.append(data)
        elif not self._in_style:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


@pytest.fixture(scope="module")
def html(evil_figures: JobFigures) -> str:
    return render_page(evil_figures, 0.0)


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_texts_of_the_data_stay_texts(page: Page) -> None:
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"img", "b", "iframe", "object", "form"}, "no element comes from the data"
    assert sum(tag == "script" for tag, _ in page.tags) == 2
    handlers = [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert not handlers
    assert page.text.count('<img src=x onerror="document.title') > 5, "they are there to be read"


def test_the_page_asks_for_nothing(html: str) -> None:
    outside = OUTSIDE.findall(re.sub(re.escape(EVIL), "", html.split("<body>")[0]))
    assert outside == ["href="], "nothing but the empty icon"
    assert '<link rel="icon" href="data:,">' in html
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)[1]
    assert policy.startswith("default-src 'none';")


def test_only_our_script_may_run(page: Page, html: str) -> None:
    data, script = page.scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in html
    assert len(json.loads(data)["samples"]) == 20


def test_samples_carry_tokens_layers_and_confidences(page: Page, evil_store: Store) -> None:
    data = json.loads(page.scripts[0])
    assert data["layers"] == [2, 4, 6]
    for sample in data["samples"]:
        assert "".join(sample["pieces"]) == TEXT + "<|endoftext|>"
        assert len(sample["pieces"]) == len(sample["exits"]) == len(sample["confidences"])
        assert sample["exits"][:4] == [0, 1, 2, 0]
        assert sample["prompt"].startswith(EVIL)


def test_everything_that_is_known_is_shown(page: Page) -> None:
    for text in ("Speed over time", "By position", "By token class", "word start", "By column task",
                 "Tokens that differ", "Confidence against agreement", "FLOPs, estimated",
                 "EmptyPromptError", "replica-1", "Deaths", "Longest generations",
                 "Recall of the ids kept", "Slowest rows", "Tokens of the last layer"):  # fmt: skip
        assert text in page.text, text
    assert "Not known" not in page.text and "Not recorded" not in page.text
    assert "From every finished generation: 20 generations" in page.text


def test_every_id_is_used_once(page: Page) -> None:
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    tabs = [attrs["aria-controls"] for _, attrs in page.tags if attrs.get("role") == "tab"]
    assert set(tabs) <= set(ids)


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    source = write_input(tmp_path / "in.parquet", ["a", "b", "c", "d", "e", "f"])
    store = Store.open(tmp_path / "out")
    run_job(store, make_spec(source, token_stats=False, input={"keep_columns": []}))
    store.delete(layout.RESOLVED_SPEC)
    found = Page(render_page(gather(store), 0.0))
    for text in (
        "_eevp/events.jsonl is not there",
        "no row was audited",
        "output.token_stats: false",
        "the model's config.json is not at hand",
        "keeps no column of its input",
        "_eevp/job.resolved.yaml is not there",
        "a version of eevp-batch that kept no times",
        "no token went through the last layer so far",
        "did not write what its replicas ran on",
    ):
        assert text in found.text, text
    assert not any(tag == "svg" for tag, _ in found.tags), "no empty chart"


def test_a_tokenizer_that_is_gone_is_said(tmp_path: Path) -> None:
    source = write_input(tmp_path / "in.parquet", ["a", "b", "c", "d", "e", "f"])
    store = Store.open(tmp_path / "out")
    run_job(store, make_spec(source))
    found = Page(render_page(gather(store), 0.0))
    assert "tokenizer.json is not at hand" in found.text
    assert "By position" in found.text and any(tag == "rect" for tag, _ in found.tags)
    assert all(sample["pieces"] is None for sample in json.loads(found.scripts[0])["samples"])


def test_a_job_that_has_made_nothing_has_a_page(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "out")
    spec = audited_spec(write_prompts(tmp_path / "in.parquet"))
    open_plan(store, make_plan(spec, MODEL), "version: 1\n")
    found = Page(render_page(gather(store), 0.0))
    assert "The job is planned: 0 of 6 chunks are committed." in found.text
    assert "no finished generation to show" in found.text


def test_a_job_without_early_exits_has_a_page(tmp_path: Path, tiny_llama: Path) -> None:
    source = write_prompts(tmp_path / "in.parquet")
    store = make_output(tmp_path, tiny_llama, make_spec(source, exit={"mode": "off"}))
    found = Page(render_page(gather(store), 0.0))
    assert "exits are off" in found.text and "Threshold" not in found.text
    assert found.text.count("every token took all 6 layers") == 2, "instead of grey charts"
    assert not any(tag == "rect" for tag, _ in found.tags)


def test_figures_are_json(evil_figures: JobFigures) -> None:
    data = json.loads(json.dumps(evil_figures.to_json()))
    assert data["sampled"]["rows"] == data["totals"]["generations"] == 20
    by_class = data["sampled"]["exits_by_token_class"]
    assert sum(map(sum, by_class.values())) == data["totals"]["generated_tokens"]
    assert data["timeline"]["replica_deaths"] == 1
    assert data["savings"]["flops_full"] > 0


# --- charts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("high", [0.3, 1, 7, 99, 12_345, 9.9e9])
def test_an_axis_reaches_what_it_shows_in_round_steps(high: float) -> None:
    ticks = steps(high)
    assert ticks[0] == 0 and ticks[-1] >= high > ticks[-2] and 3 <= len(ticks) <= 6


@pytest.mark.parametrize("end_s", [0.5, 3, 59, 601, 7_300, 100_000, 5e6])
def test_an_axis_of_time_has_few_ticks_within_it(end_s: float) -> None:
    ticks = time_ticks(end_s)
    assert 1 <= len(ticks) <= 6 and all(0 <= tick.place <= 100 for tick in ticks)
    assert len({tick.label.split()[1] for tick in ticks}) == 1, "one unit for all"


@pytest.mark.parametrize("positions", [1, 39, 41, 96, 1024, 4096])
def test_columns_of_shares_fill_the_chart(positions: int) -> None:
    import numpy as np

    counts = np.ones((positions, 2), np.int64)
    plot = stacked_plot("", "", counts, ["a", "b"], ["x0", "x1"])
    assert len(plot.rows) <= 40 and len(plot.rects) == 2 * len(plot.rows)
    assert sum(int(row[1].replace(",", "")) for row in plot.rows) == 2 * positions
    assert all(0 <= tick.place <= 100 for tick in plot.x_ticks)
    assert all(rect.y == pytest.approx(500) or rect.y == pytest.approx(0) for rect in plot.rects)


def test_dots_stay_on_the_chart_whatever_the_confidence() -> None:
    dot = {"low": -1.0, "high": 1.0, "agreement": 0.5, "interval": (0.0, 1.0), "tokens": 3}
    dots = [dot | {"confidence": confidence} for confidence in (-0.5, 0.0, 0.97, 1.0)]
    plot = dot_plot("", [("layer 2", "x0", dots)])
    assert all(0 <= d.x <= 1000 and d.top == 0 and d.bottom == 1000 for d in plot.dots)
    assert all(0 <= tick.place <= 100 for tick in plot.x_ticks)
