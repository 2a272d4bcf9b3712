"""What the five scripts share. It is divided into rooms, modules and packages, by pipeline step. A room imports only
from earlier rooms (tests/test_rooms.py).

    contract     tensors, graphs, views, the legend of axes, roles of weights, tolerances: declared once
    cli          parser, stages, progress bars, exit statuses and command lines of all scripts
    folder       output folders and files: checks, atomic replacement, manifest
    onnx_io      ONNX files and graphs
    checkpoint   checkpoints of NeMo and transformers, as untrusted input: download, numbers, tokenizer, model
    run          audio and clips in, tokens out: NumPy's greedy loop, ONNX Runtime, ONNX Runtime GenAI, NeMo
    layouts      model folders of each runtime
    quantize     4-bit and 8-bit weights of the encoder, calibration, fidelity
    export       NeMo's modules → ONNX graphs, verified against NeMo; float16
    evaluate     word error rates, differences with their reasons, timestamps, subtitles, stress
    report       the report of an optimization, the model card, the page of clips
    optimize     the pipeline of optimize_encoder.py

Importing the package checks that this Python is new enough, and makes Python report a missing package, and that it was
interrupted, in one line: the scripts import it before any other package.
"""

import sys

OLDEST_PYTHON = (3, 11)
if sys.version_info < OLDEST_PYTHON:
    found = ".".join(map(str, sys.version_info[:3]))
    print(f"error: Python {found} is too old for this; run it with Python 3.11 or newer", file=sys.stderr)
    raise SystemExit(2)

from common.cli import report_at_start  # noqa: E402  not for an older Python to read

sys.excepthook = report_at_start
