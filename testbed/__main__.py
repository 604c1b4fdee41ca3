"""`python -m testbed` is the command `ballast`."""

from testbed.cli import main

main()
