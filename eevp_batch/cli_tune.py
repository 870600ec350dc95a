"""The commands that make a model worth exiting. Heavy imports are inside them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from eevp_batch.console import echo_json, json_option, spec_overrides, width
from eevp_batch.errors import UsageError

if TYPE_CHECKING:
    from eevp_batch.tune.command import Source

_Command = TypeVar("_Command", bound=Callable[..., Any])

DTYPES = ("bfloat16", "float32", "float16")


def _source_command(command: _Command) -> _Command:
    """MODEL, PROMPTS and how many, for a command that looks at a model's own generations."""
    options = (
        click.argument("model", metavar="MODEL"),
        click.argument("prompts", metavar="PROMPTS"),
        click.option("--column", default="prompt", show_default=True, help="Holds the prompts."),
        click.option("--rows", default=256, show_default=True, type=click.IntRange(min=4)),
        click.option(
            "--max-new-tokens", default=128, show_default=True, type=click.IntRange(min=1)
        ),
        click.option("--stop", multiple=True, metavar="TEXT", help="Ends a generation."),
        click.option("--dtype", default="bfloat16", type=click.Choice(list(DTYPES))),
        click.option(
            "--target",
            default=0.99,
            show_default=True,
            type=click.FloatRange(0.5, 1.0),
            help="Share of all tokens that has to stay as at full depth.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


_SOURCE = ("model", "prompts", "column", "rows", "max_new_tokens", "stop", "dtype")


def _split_source(options: dict[str, Any]) -> tuple[Source, dict[str, Any]]:
    """The source that `_source_command` asked for, and the other options."""
    from eevp_batch.tune.command import Source

    source = Source(**{name: options.pop(name) for name in _SOURCE})
    return source, options | {"say": lambda line: click.echo(line, err=True)}


@click.command()
@_source_command
@click.option("--heads", metavar="DIR", help="Folder of fitted exits; they are looked at too.")
@click.option("--quick-heads", is_flag=True, help="Fits closed-form heads to half of the rows.")
@click.option("--plot", metavar="FILE", help="Writes the curves as SVG.")
@json_option
def potential(plot: str | None, as_json: bool, **options: Any) -> None:
    """Say whether exits could pay for a model on some prompts (Parquet), and why."""
    from eevp_batch.report.potential import potential_chart, render_potential
    from eevp_batch.tune.command import run_potential

    source, others = _split_source(options)
    found = run_potential(source, **others)
    if plot is not None:
        Path(plot).write_text(potential_chart(found), encoding="utf-8")
    if as_json:
        echo_json(found)
    else:
        click.echo(render_potential(found, width()))


_AT_FULL_DEPTH = (
    "exit.mode=off",
    "exit.layers=auto",
    "exit.heads=null",
    "exit.calibration=null",
)
"""What `fit` changes in a job; its KV policy, prefill and pruning stay for the search of layers."""


@click.command()
@click.argument("spec", metavar="SPEC")
@click.argument("folder", metavar="DIR")
@spec_overrides
@click.option("--rows", default=512, show_default=True, type=click.IntRange(min=4))
@click.option("--from", "source", metavar="OUT", help="Finished full-depth output to draw from.")
@click.option("--layers", metavar="L,L", default="", help="Exit layers; searched if not given.")
@click.option(
    "--target",
    default=0.99,
    show_default=True,
    type=click.FloatRange(0.5, 1.0),
    help="Share of all tokens that has to stay as at full depth, for the search.",
)
@click.option("--bridge-rank", type=click.IntRange(min=1), help="Of the bridges; 2/3 of the width.")
@click.option("--proposal-rank", default=128, show_default=True, type=click.IntRange(min=1))
@click.option(
    "--shortlist",
    default=4096,
    show_default=True,
    type=click.IntRange(min=1),
    help="Ids of the shortlist, those that the rows' tokens mostly are.",
)
@click.option(
    "--head",
    default="affine",
    show_default=True,
    type=click.Choice(["affine", "mlp"]),
    help="Kind of the exit heads; mlp adds a residual MLP to the affine map, which did not pay on "
    "the demo model's narrow job.",
)
@click.option(
    "--head-width",
    type=click.IntRange(min=1),
    help="Hidden units of an MLP head; 1/4 of the model's width.",
)
@click.option(
    "--tail",
    default=1,
    show_default=True,
    type=click.IntRange(min=1),
    help="Tokens at a prompt's end at full depth under exit.prefill: bridge.",
)
@click.option(
    "--adapter-rank",
    metavar="R",
    type=click.IntRange(min=1),
    help="Trains an adapter (LoRA) of this rank on the model first, exits and bridges in the loop.",
)
@click.option(
    "--adapter-steps",
    metavar="N",
    type=click.IntRange(min=1),
    help="Of its training; as many as --adapter-minutes are enough for if not given.",
)
@click.option(
    "--adapter-minutes",
    default=8.0,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    help="Of its training, checkpoints in DIR; the same command goes on with it.",
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0))
@json_option
def fit(
    spec: str,
    folder: str,
    overrides: tuple[str, ...],
    layers: str,
    as_json: bool,
    **options: Any,
) -> None:
    """Fit exits to what a job's model itself generates for its prompts; DIR gets them."""
    from eevp_batch.prepare import check_prompts, prepare
    from eevp_batch.report.fitted import render_fitted
    from eevp_batch.report.stages import make_stages
    from eevp_batch.tune.command import FitOptions, run_fit

    if not all(part.strip().isdigit() for part in layers.split(",") if layers):
        raise UsageError(f"--layers: found {layers!r}; allowed: numbers with commas between them")
    numbers = [int(part) for part in layers.split(",") if layers]
    if options["adapter_steps"] and not options["adapter_rank"]:
        raise UsageError("--adapter-steps: found no --adapter-rank; allowed: both")
    if options["head_width"] and options["head"] != "mlp":
        raise UsageError("--head-width: found --head affine; allowed: --head mlp")
    job = prepare(spec, [*overrides, *_AT_FULL_DEPTH])
    check_prompts(job)
    chosen = FitOptions(layers=numbers, **options)
    with make_stages(sys.stderr) as shown:
        manifest = run_fit(
            job.spec, job.model, job.plan.fields, folder, chosen, shown.message, shown.update
        )
    if as_json:
        echo_json(manifest)
    else:
        click.echo(render_fitted(manifest))


@click.command()
@click.argument("spec", metavar="SPEC")
@spec_overrides
@click.option("--out", required=True, metavar="FILE", help="Where the calibration goes.")
@click.option(
    "--delta",
    default=0.01,
    show_default=True,
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Bound on the risk: what a row may lose on average.",
)
@click.option(
    "--epsilon",
    default=0.05,
    show_default=True,
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Probability with which the risk may be higher all the same.",
)
@click.option("--rows", default=1500, show_default=True, type=click.IntRange(min=3))
@click.option("--from", "source", metavar="OUT", help="Finished full-depth output to draw from.")
@click.option(
    "--metric",
    metavar="NAME",
    help="Risk of whole outputs: edit, diverged, or module:function of two texts.",
)
@click.option(
    "--p-value",
    "kind",
    default="betting",
    show_default=True,
    type=click.Choice(["betting", "hoeffding_bentkus"]),
)
@click.option("--settings", "size", default=24, show_default=True, type=click.IntRange(min=2))
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0))
@click.option("--grid", "with_grid", is_flag=True, help="Prints every setting that was tried.")
@click.option("--plot", metavar="FILE", help="Writes quality against speed as SVG.")
@json_option
def calibrate(
    spec: str,
    overrides: tuple[str, ...],
    out: str,
    size: int,
    with_grid: bool,
    plot: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Find and certify the thresholds of a job's exits; FILE is what exit.calibration takes."""
    from eevp_batch.errors import CalibrationError
    from eevp_batch.prepare import check_prompts, prepare
    from eevp_batch.report.calibration import calibration_chart, render_calibration
    from eevp_batch.tune.calibrate_job import CalibrateOptions, run_calibrate

    job = prepare(spec, [*overrides, "exit.calibration=null"])
    check_prompts(job)
    if options["metric"] is not None:
        sys.path.insert(0, "")  # where the user's module is
    found = run_calibrate(
        job.spec,
        job.model,
        job.plan.fields,
        out,
        CalibrateOptions(**options, grid=size),
        lambda line: click.echo(line, err=True),
    )
    if plot is not None:
        Path(plot).write_text(calibration_chart(found), encoding="utf-8")
    if as_json:
        echo_json(found)
    else:
        click.echo(render_calibration(found, with_grid))
    if found["file"] is None:
        raise CalibrationError(f"{spec}: not certified: {found['reason']}")
