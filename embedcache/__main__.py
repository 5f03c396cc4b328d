"""``python -m embedcache``, and ``embedcache``, are the command line."""

from __future__ import annotations

import os
import signal
import sys


def main() -> None:
    """Run the command line and exit; Ctrl-C costs one line at any moment."""
    _open_streams()
    try:
        from embedcache.cli import run

        status = run()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 1
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # what was asked for is done: closing down is not to be interrupted
    sys.exit(status)


def _open_streams() -> None:
    """Put /dev/null where stdin, stdout or stderr is closed (``2>&-``, some schedulers).

    Otherwise the next file that is opened takes its number, and what a library prints lands in a shard.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
            os.set_inheritable(descriptor, True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, "w" if descriptor else "r", closefd=False))  # noqa: SIM115


if __name__ == "__main__":
    main()
