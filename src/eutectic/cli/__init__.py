"""The command line: each command is a few lines over the API.

Exit status: 0 done, 1 ``diff`` found a difference or ``audit`` a suspect, or a bug struck, 2 the input was refused (one
message, nothing left behind).
"""

# isort: off
# in the order in which --help shows their commands
from eutectic.cli import merging, fusing, scoring, safety, zoo
from eutectic.cli._app import app, main

__all__ = ["app", "fusing", "main", "merging", "safety", "scoring", "zoo"]
