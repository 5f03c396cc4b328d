"""``python -m embedcache``, and ``embedcache``, are the command line."""

from __future__ import annotations

import signal
import sys


def main() -> None:
    """Run the command line and exit; Ctrl-C costs one line at any moment."""
    try:
        from embedcache.cli import run

        status = run()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 1
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # what was asked for is done: closing down is not to be interrupted
    sys.exit(status)


if __name__ == "__main__":
    main()
