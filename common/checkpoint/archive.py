"""A `.nemo` file: a tar of a YAML config, a pickle of weights, and files that the config names.

Checkpoints are treated as untrusted input. Before anything is unpacked, built or loaded, it is checked that
    the archive   holds files and folders with plain names, each once; no links, no devices
    the config    holds values, no references to the environment; its `_target_`s are NeMo classes; the files it names
                  are members
    the weights   are a zip, as torch.save writes it

NeMo 3.0.0 has guards of its own behind these: tarfile's `data` filter, which skips an unsafe member without a message;
an allow-list of `_target_`s (nemo/core/classes/common.py), which still lets functions that write files be called; and
torch's weights_only unpickler, which nemo.py asks for.
"""

import contextlib
import gzip
import posixpath
import re
import tarfile
import zipfile
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from common.checkpoint import NOT_LOADED

CONFIG_MEMBER = "model_config.yaml"
WEIGHTS_MEMBER = "model_weights.ckpt"
# Classes of NeMo's own modules, by their spelling; NeMo's allow-list then asks what the class is.
ALLOWED_TARGET = re.compile(r"nemo\.(collections|core)(\.[a-z_][a-z0-9_]*)*\.[A-Z]\w*")
TARGET_KEYS = ("_target_", "target", "cls")
SECTIONS = ("preprocessor", "encoder", "decoder", "joint", "decoding", "tokenizer")


@dataclass(frozen=True)
class Archive:
    """An open tar and its files by normalised name."""

    path: Path
    tar: tarfile.TarFile
    members: dict[str, tarfile.TarInfo]


@contextlib.contextmanager
def open_archive(path: Path) -> Iterator[Archive]:
    """Open a `.nemo` file and check its members, which must include a config and weights. Raises ValueError."""
    try:
        with path.open("rb") as file:
            zipped = file.read(2) == b"\x1f\x8b"  # NeMo before 1.7 gzipped its checkpoints
        with tarfile.open(path, "r:gz" if zipped else "r:") as tar:
            archive = Archive(path, tar, _checked_members(path, tar))
            for name in (CONFIG_MEMBER, WEIGHTS_MEMBER):
                if name not in archive.members:
                    raise ValueError(
                        f"expected {name} in {path}, which is not a whole NeMo checkpoint; download it again"
                    )
            yield archive
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is truncated or not a NeMo checkpoint ({error}); download it again") from None


def _checked_members(path: Path, tar: tarfile.TarFile) -> dict[str, tarfile.TarInfo]:
    """The files of the archive by name. Raises ValueError naming the first member that a checkpoint must not have."""
    members: dict[str, tarfile.TarInfo] = {}
    for member in tar:
        name = posixpath.normpath(member.name)
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(member.name).parts:
            raise ValueError(f"{path} has a member outside its folder, {member.name!r}; {NOT_LOADED}")
        if not (member.isreg() or member.isdir()) or member.issparse():
            raise ValueError(f"{path} has a member that is neither file nor folder, {member.name!r}; {NOT_LOADED}")
        if member.isreg():
            if name in members:
                raise ValueError(f"{path} has two members {name!r}; {NOT_LOADED}")
            members[name] = member
    return members


def read_member(archive: Archive, name: str) -> bytes:
    """The content of a file. Raises ValueError where the archive does not hold it."""
    member = archive.members.get(posixpath.normpath(name))
    if member is None:
        raise ValueError(f"{archive.path} names {name} in its config but does not hold it; download it again")
    return _open_member(archive, member).read()


def _open_member(archive: Archive, member: tarfile.TarInfo) -> IO[bytes]:
    file = archive.tar.extractfile(member)
    assert file is not None  # _checked_members returns regular files only
    return file


def check_weights(archive: Archive) -> None:
    """Raise ValueError unless the weights are a zip, as torch.save writes it."""
    if not zipfile.is_zipfile(_open_member(archive, archive.members[WEIGHTS_MEMBER])):
        raise ValueError(
            f"expected {WEIGHTS_MEMBER} in {archive.path} as torch.save writes it, got another file; {NOT_LOADED}"
        )


def parse_config(text: bytes, members: Collection[str]) -> dict[str, Any]:
    """The content of a config in an archive with these members, by the reader that NeMo uses. Raises ValueError."""
    from omegaconf import DictConfig, OmegaConf

    try:
        config = OmegaConf.create(text.decode("utf-8"))
        if not isinstance(config, DictConfig):
            raise ValueError("no mapping at its top")
        content = cast(dict[str, Any], OmegaConf.to_container(config, resolve=False))
    except Exception as error:  # PyYAML and OmegaConf raise many types, AssertionError among them
        raise ValueError(f"{str(error) or type(error).__name__}; download it again") from None
    for name in SECTIONS:
        if not isinstance(content.get(name) or {}, dict):
            raise ValueError(f"expected a mapping as {name}, got {content[name]!r}; download it again")
    _check_values(content, members)
    return content


def _check_values(content: object, members: Collection[str], path: tuple[str, ...] = ("",)) -> None:
    """Raise ValueError naming a value that refers to something outside the config.

    NeMo saves configs with their interpolations resolved (Serialization.to_config_file). An interpolation could read
    the environment (`${oc.env:…}`).
    """
    if isinstance(content, dict):
        for name, value in content.items():
            _check_values(value, members, (*path, str(name)))
    elif isinstance(content, list):
        for value in content:
            _check_values(value, members, path)
    elif problem := _problem(content, members, path[1:]):
        raise ValueError(f"{'.'.join(path[1:])} is {str(content)[:80]!r}, {problem}")


def _problem(value: object, members: Collection[str], path: tuple[str, ...]) -> str | None:
    """Why a checkpoint cannot have this value there, or None."""
    key = path[-1]
    if path[0] == "tokenizer" and key.endswith("_path") and value and not str(value).startswith("nemo:"):
        return f"expected a file of the checkpoint; {NOT_LOADED}"
    if not isinstance(value, str):
        return None
    if "${" in value:
        return f"a reference; NeMo saves none; {NOT_LOADED}"
    if key in TARGET_KEYS and not ALLOWED_TARGET.fullmatch(value):
        return f"which is not a class of NeMo; {NOT_LOADED}"
    if value.startswith("nemo:") and value.removeprefix("nemo:") not in members:
        return "a file that the checkpoint does not hold; download it again"
    return None
