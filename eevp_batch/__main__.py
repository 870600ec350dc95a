"""`python -m eevp_batch`: the program `eevp-batch`, for where it is not on the path."""

from eevp_batch.cli import start

if __name__ == "__main__":
    start()
