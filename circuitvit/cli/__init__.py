"""The command line, `circuitvit COMMAND`: it parses, calls the library and prints.

One file for each command; `options` holds what they share. Nothing heavy is imported before a command runs,
so help appears at once: imports of the library's rooms stand inside functions.
"""

from circuitvit.cli.app import app, main

__all__ = ["app", "main"]
