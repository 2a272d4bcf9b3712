"""Open ONNX Runtime sessions on the CPU, with the options that all of them share in one place."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnxruntime as ort

ERRORS_AND_WORSE = 3  # a severity of OrtLoggingLevel


def open_session(
    model: Path | bytes,
    *,
    entries: Mapping[str, str] | None = None,
    disabled_optimizers: Sequence[str] = (),
    options: ort.SessionOptions | None = None,
) -> ort.InferenceSession:
    """A session on the CPU that logs nothing but errors.

    model: a path, or a serialized ModelProto.
    entries: configuration by key, such as {"session.disable_prepacking": "1"}.
    disabled_optimizers: names of graph transformers to leave out.
    options: further options, such as the level of graph optimization; ONNX Runtime's defaults where it is None.
    """
    options = options or ort.SessionOptions()
    options.log_severity_level = ERRORS_AND_WORSE
    for key, value in (entries or {}).items():
        options.add_session_config_entry(key, value)
    return ort.InferenceSession(
        model,
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=list(disabled_optimizers) or None,
    )
