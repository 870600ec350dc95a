"""`python -m eevp_batch`: the program `eevp-batch`, also where that is not on the path."""

from eevp_batch.cli import start

start()
