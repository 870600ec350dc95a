"""What the commands share: options, JSON on stdout, and how wide the terminal is."""

from __future__ import annotations

import json
import shutil
from typing import Any

import click

spec_overrides = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="A.B=C",
    help="Overrides a field of the job file; the value is YAML. May be repeated.",
)
address_option = click.option(
    "--address",
    metavar="ADDRESS",
    help="The run's cluster, as in cluster.address; by default where it was submitted to.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Prints JSON.")


def echo_json(value: dict[str, Any]) -> None:
    """Print JSON."""
    click.echo(json.dumps(value, indent=1, ensure_ascii=False))


def width() -> int:
    """Columns to write for: the terminal's, at most 120."""
    return min(shutil.get_terminal_size().columns, 120)
