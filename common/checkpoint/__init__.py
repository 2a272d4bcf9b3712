"""Checkpoints, treated as untrusted input. Importing this package registers every format, `.nemo` first."""

from common.checkpoint.format import FORMATS, format_of
from common.checkpoint.nemo import NEMO
from common.checkpoint.transformers import TRANSFORMERS

FORMAT_NAMES = tuple(known.name for known in FORMATS)
MODEL_NAME_HELP = "Hugging Face name, .nemo file, or folder of a transformers checkpoint (%(default)s)"
FORMAT_HELP = "the format to use where a repository or a folder has both (nemo, if it is there)"

__all__ = ["FORMAT_HELP", "FORMAT_NAMES", "MODEL_NAME_HELP", "NEMO", "TRANSFORMERS", "format_of"]
