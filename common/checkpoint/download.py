"""XXX docstring of checkpoint.download"""

from pathlib import Path

from common.checkpoint.archive import open_archive

DEFAULT_MODEL = "nvidia/parakeet-tdt-0.6b-v3"


def find_checkpoint(model_name: str) -> Path:
    """The `.nemo` file for a path or a Hugging Face name (`owner/model`), downloaded if need be.

    Raises FileNotFoundError for a path that is not there, ConnectionError when Hugging Face cannot be reached,
    ValueError when it has no such model or the file is not a whole NeMo checkpoint.
    """
    path = Path(model_name)
    if path.suffix != ".nemo" and not path.exists() and model_name.count("/") == 1:
        path = _download(model_name)
    if not path.is_file():
        raise FileNotFoundError(f"wanted a .nemo file or a Hugging Face name, found nothing at {model_name}")
    with open_archive(path):
        return path


def _download(model_name: str) -> Path:
    """Fetch `owner/model`'s checkpoint; NVIDIA publishes it as `model.nemo` (nemo/core/classes/common.py)."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    filename = model_name.split("/")[1] + ".nemo"
    print(f"looking for {filename} of {model_name}, in the local cache and on Hugging Face", flush=True)
    try:
        return Path(hf_hub_download(model_name, filename))
    except LocalEntryNotFoundError:
        raise ConnectionError(
            f"wanted {filename} of {model_name}, but Hugging Face cannot be reached and it is not in the local cache; "
            "check the network, or pass the path of a .nemo file as --model_name"
        ) from None
    except (RepositoryNotFoundError, EntryNotFoundError):
        raise ValueError(f"Hugging Face has no {filename} in {model_name}; check --model_name") from None
    except HfHubHTTPError as error:
        raise ConnectionError(f"wanted {filename} of {model_name}, Hugging Face answered: {error}") from error
