"""``python -m embedcache`` is the command line."""

from embedcache.cli import main

main()
