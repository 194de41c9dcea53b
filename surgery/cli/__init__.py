"""The command line: parse, make one call, print. A thin coat over the Python API.

``main`` is the only place that catches errors and turns them into one line and an exit code. Commands are imported
when they are run, so that ``--help`` stays as fast as Python itself.
"""

from surgery.cli.main import main

__all__ = ["main"]
