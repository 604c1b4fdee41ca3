"""The `ballast` command: arguments in, one function of another package, tables or one JSON object out."""

from testbed.cli.commands import app, main

__all__ = ["app", "main"]
