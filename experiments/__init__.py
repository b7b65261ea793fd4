"""Makes records: runs the figures of the paper on an engine and stores what happened, raw."""

import os
import signal
import sys


def _interrupted(*_: object) -> None:
    os.write(2, b"interrupted\n")
    os._exit(130)


if sys.argv[:1] == ["-m"]:  # of `python -m`, which imports for a second or two before main can see to Ctrl-C itself
    signal.signal(signal.SIGINT, _interrupted)
