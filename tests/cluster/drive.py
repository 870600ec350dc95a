"""A driver in a process of its own, for tests that kill or interrupt it.

Usage: python -m tests.cluster.drive FOLDER   (FOLDER holds `script.pickle` and the job's input)
"""

from __future__ import annotations

import pickle
import signal
import sys
from pathlib import Path

from eevp_batch.errors import EevpError
from tests.cluster.jobs import make_job


def main(folder: Path) -> int:
    """Run the job; its exit code."""
    # Whoever started the tests in the background had SIGINT ignored for all of us.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    options, script = pickle.loads((folder / "script.pickle").read_bytes())
    job = make_job(folder, **options)
    try:
        job.run(script)
    except EevpError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    finally:
        for message in job.messages:
            print(message, file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
