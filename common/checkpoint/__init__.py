"""Checkpoints, treated as untrusted input. Importing this package registers every format, `.nemo` first."""

from common.checkpoint.format import format_of
from common.checkpoint.nemo import NEMO
from common.checkpoint.transformers import TRANSFORMERS

__all__ = ["NEMO", "TRANSFORMERS", "format_of"]
