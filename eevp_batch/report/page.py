"""A job's report as one HTML file that loads nothing: style, script, charts and data are inside.

The template escapes everything that is filled in. Texts of the data also cross to the page's
script, as JSON in which no markup can end; the script puts them on the page as text, never as
markup, and a content security policy lets only that script run.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from eevp_batch import __version__
from eevp_batch.report.colours import ExitColour, exit_colours
from eevp_batch.report.figures import JobFigures
from eevp_batch.report.page_exits import exits
from eevp_batch.report.page_overview import overview
from eevp_batch.report.page_quality import quality
from eevp_batch.report.page_replicas import clock, replicas
from eevp_batch.report.page_rows import rows
from eevp_batch.report.text import number, size

_FOLDER = Path(__file__).parent / "page"
_TABS = (
    ("overview", "Overview"),
    ("exits", "Exits"),
    ("quality", "Quality"),
    ("replicas", "Replicas"),
    ("rows", "Rows"),
    ("samples", "Samples"),
    ("job", "Job"),
)
_NAMES = {"system": "System", "python": "Python"}
_DARK = """
  --ground: #0f141a; --paper: #171e26; --ink: #e6ebf0; --soft: #9aa7b4; --rule: #2a333e;
  --grid: #242d37; --accent: #4fd1c0; --tip: #e6ebf0; --tip-ink: #16202c; --track: #222b35;
  --good: #7ee0a8; --good-ground: #12341f; --warn: #f2c879; --warn-ground: #38290c;
  --bad: #ff8f86; --bad-ground: #43191a; --wait: #b98d3c; --start: #536170; --learn: #9d93ea;
"""


def render_page(figures: JobFigures, written_unix_s: float) -> str:
    """The whole page.

    Args:
        figures: what `gather` gave.
        written_unix_s: the time now.
    """
    colours = exit_colours(figures.summary.exit_layers)
    script = (_FOLDER / "report.js").read_text(encoding="utf-8")
    parts = rows(figures)
    data = {"layers": figures.summary.exit_layers, "samples": parts["samples"]}
    page: str = _template().render(
        **overview(figures, colours),
        **exits(figures, colours),
        **quality(figures, colours),
        **replicas(figures),
        **parts,
        **_job(figures),
        tabs=_TABS,
        version=__version__,
        written=clock(written_unix_s),
        css=Markup(_css(colours)),  # our own text, as the script's
        script=Markup(script),
        script_hash=_csp_hash(script),
        samples_json=htmlsafe_json_dumps(data),
    )
    return page


def _template() -> Any:
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2")


def _css(colours: list[ExitColour]) -> str:
    """The style sheet, with both themes and a class for each exit layer."""
    light = "".join(f".{c.name} {{ --c: {c.light}; }}\n" for c in colours)
    last = colours[-1].name
    light += f".tokens span {{ --mix: 45%; }}\n.tokens span.{last} {{ --mix: 28%; }}\n"
    dark = ":root{where} .tokens span {{ --mix: 36%; }}\n"  # bright ones would drown the text
    dark += ":root{where} {{ color-scheme: dark;{values}}}\n"
    shades = "".join(f":root{{where}} .{c.name} {{{{ --c: {c.dark}; }}}}\n" for c in colours)
    by_system, by_button = ":not([data-theme=light])", "[data-theme=dark]"
    system = (dark + shades).format(where=by_system, values=_DARK)
    button = (dark + shades).format(where=by_button, values=_DARK)
    base = (_FOLDER / "report.css").read_text(encoding="utf-8")
    scheme = ":root { color-scheme: light; }\n"
    dots = f":root .dots .{last} {{ --c: var(--soft); }}\n"  # a grey dot is too faint
    return (
        f"{base}\n{scheme}{light}"
        f"@media screen and (prefers-color-scheme: dark) {{\n{system}}}\n"
        f"@media screen {{\n{button}}}\n{dots}"
    )


def _csp_hash(script: str) -> str:
    """How a content security policy names the one script that may run."""
    digest = hashlib.sha256(script.encode()).digest()
    return "sha256-" + base64.b64encode(digest).decode()


def _job(figures: JobFigures) -> dict[str, Any]:
    summary = figures.summary
    return {
        "name": summary.run_id.rpartition("-")[0] or summary.run_id,
        "state": summary.state,
        "reason": summary.reason or "",
        "headline": _headline(figures),
        "job_facts": _facts(figures),
        "machines": [_machine(dict(found), count) for found, count in figures.timeline.machines],
        "no_machine": "Not recorded: the version of eevp-batch that ran this job did not write "
        "what its replicas ran on, or no replica became ready.",
        "spec_text": figures.spec_text,
    }


def _headline(figures: JobFigures) -> str:
    summary = figures.summary
    runs = figures.timeline.runs
    when = f", started {clock(runs[0].started_unix_s)}" if runs else ""
    return f"{Path(summary.model).name} on {number(summary.rows_in)} rows{when}"


def _facts(figures: JobFigures) -> list[tuple[str, str]]:
    summary, plan = figures.summary, figures.plan
    fields, run = plan.fields, figures.success.get("run", {})
    mode = fields["exit.mode"]
    is_sampled = fields["sampling.temperature"] > 0
    drawn = f"temperature {fields['sampling.temperature']}, top_p {fields['sampling.top_p']}"
    found = [
        ("Run", summary.run_id),
        ("Output", summary.out),
        ("Model", summary.model),
        ("Revision or hash", plan.model_revision_or_hash),
        ("Number type", str(fields["model.dtype"])),
        ("Exits", f"{mode}; after layer {', '.join(map(str, summary.exit_layers))}"),
    ]
    if mode != "off":
        found.append(("KV policy", str(fields["exit.kv"])))
        found.append(("Confidence", str(fields["exit.confidence"])))
    if mode == "on":
        found.append(("Threshold", str(fields["exit.threshold"])))
    found += [
        ("Sampling", drawn if is_sampled else "greedy"),
        ("Most new tokens", str(fields["sampling.max_new_tokens"])),
        ("Input files", number(len(plan.files))),
        (
            "Chunks",
            f"{number(len(plan.chunks))}, of at most {number(fields['run.chunk_rows'])} rows",
        ),
        ("Fingerprint", plan.fingerprint),
    ]
    if "eevp_batch" in run:
        found.append(("Finished by", f"eevp-batch {run['eevp_batch']}"))
    return found


def _machine(machine: dict[str, Any], count: int) -> list[tuple[str, str]]:
    gpus = machine.pop("gpus", [])
    hardware = [
        ("Replicas started", str(count)),
        ("Processor", f"{machine.pop('cpu', 'unknown')}, {machine.pop('cores', '?')} cores"),
        ("Memory", size(machine.pop("memory_bytes", 0))),
        ("GPUs", ", ".join(map(str, gpus)) or "none"),
    ]
    rest = [(str(name), str(value)) for name, value in machine.items()]
    return hardware + [(_NAMES.get(name, name), value) for name, value in rest]
