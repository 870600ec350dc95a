"""A job's status on a terminal, redrawn until the job has ended; plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from eevp_batch.report.text import histogram, number, percent, printable, status_facts
from eevp_batch.storage.status import Status

EVERY_S = 2.0
_ENDED = ("done", "failed", "interrupted")
_STYLES = {"done": "green", "failed": "red", "interrupted": "yellow", "running": "cyan"}


def watch(
    read: Callable[[], Status],
    console: Console,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Show a job until it is done, has failed or was interrupted, or Ctrl-C.

    Args:
        read: gives the newest status; where it takes long, it is asked seldom.
        console: where to show it.
        sleep: waits so many seconds.
    """
    try:
        if console.is_terminal:
            with Live(console=console, auto_refresh=False) as live:
                _follow(
                    read,
                    lambda status: live.update(status_view(status, console.width), refresh=True),
                    sleep,
                )
        else:
            _follow(read, _Lines(console).show, sleep)
    except KeyboardInterrupt:
        return  # the way to end watching; the job goes on


def _follow(
    read: Callable[[], Status], show: Callable[[Status], None], sleep: Callable[[float], None]
) -> None:
    while True:
        started_s = time.monotonic()
        status = read()
        show(status)
        if status.state in _ENDED:
            return
        sleep(max(EVERY_S, 4 * (time.monotonic() - started_s)))


class _Lines:
    """A line for every change."""

    def __init__(self, console: Console) -> None:
        self._console, self._last = console, ""

    def show(self, status: Status) -> None:
        """Print it where it says something new."""
        share = percent(status.rows_done / max(status.rows_total, 1))
        line = (
            f"{status.run_id}: {status.state}, {number(status.rows_done)} of "
            f"{number(status.rows_total)} rows ({share})"
        )
        if line != self._last:
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)
        self._last = line


def status_view(status: Status, width: int) -> RenderableType:
    """One look at a job, for a terminal.

    Args:
        status: the look.
        width: columns of the terminal.
    """
    style = _STYLES.get(status.state, "")
    head = Text.assemble((status.run_id, "bold"), "  ", (status.state, style))
    if status.reason:
        head.append(f"  {printable(status.reason)}", style=style)
    gauge = Table.grid(padding=(0, 1))
    total, done = max(status.rows_total, 1), status.rows_done
    gauge.add_row(
        ProgressBar(total=total, completed=done, width=max(8, min(48, width - 10))),
        percent(done / total),
    )
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim", no_wrap=True)
    for name, value in status_facts(status, time.time()).items():
        facts.add_row(name, Text(str(value)))
    parts: list[RenderableType] = [head, Padding(gauge, (1, 0)), facts]
    exits = status.totals.exit_histogram
    if exits:
        layers = {f"layer {layer}": exits[layer] for layer in sorted(exits)}
        parts += [
            Text("\ntokens by exit layer", style="dim"),
            Text(histogram(layers, min(width, 80))),
        ]
    return Group(*parts)
