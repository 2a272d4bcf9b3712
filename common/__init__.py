"""What the five scripts share, in pipeline order.

graphs, download, model, wrappers, export, parity, tokenizer, configs, optimize, runtime, decode; console and files
serve all. Importing the package checks that this Python is new enough, and has a missing package reported in one line:
the scripts import it before any other.
"""

import sys

OLDEST_PYTHON = (3, 11)
if sys.version_info < OLDEST_PYTHON:
    found = ".".join(map(str, sys.version_info[:3]))
    print(f"error: expected Python 3.11 or newer, got {found}; run this with a newer one", file=sys.stderr)
    raise SystemExit(2)

from common.console import report_missing_package  # noqa: E402  not for an older Python to read

sys.excepthook = report_missing_package
