"""A `.nemo` file: a tar of a YAML config, a pickle of weights, and files that the config names.

The folder into which such a file was unpacked is read as well, as by NeMo (SaveRestoreConnector.model_extracted_dir).

Checkpoints are treated as untrusted input. Before anything is unpacked, built or loaded, it is checked that
    the archive   holds files and folders with plain names, each once; no links, no devices
    a folder      holds the files themselves, or links that stay inside it
    the config    holds values, no references to the environment; its `_target_`s are NeMo classes; the files it names
                  are members
    the weights   are a zip, as torch.save writes it

NeMo 3.0.0 has guards of its own behind these: tarfile's `data` filter, which skips an unsafe member without a message;
an allow-list of `_target_`s (nemo/core/classes/common.py), which still lets functions that write files be called; and
torch's weights_only unpickler, which nemo.py asks for.

Like NeMo, this reads a plain tar, as NeMo writes it, or gzip (before 1.7). An error names any other packing.
"""

import contextlib
import gzip
import posixpath
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from common.checkpoint import NOT_LOADED
from common.checkpoint.hub import require_inside

CONFIG_MEMBER = "model_config.yaml"
WEIGHTS_MEMBER = "model_weights.ckpt"
# Classes of NeMo's own modules, by their spelling; NeMo's allow-list then asks what the class is.
ALLOWED_TARGET = re.compile(r"nemo\.(collections|core)(\.[a-z_][a-z0-9_]*)*\.[A-Z]\w*")
TARGET_KEYS = ("_target_", "target", "cls")
SECTIONS = ("preprocessor", "encoder", "decoder", "joint", "decoding", "tokenizer")

GZIP = b"\x1f\x8b"
PICKLE = b"\x80"  # as torch.save wrote it before 1.6, which now writes a zip with PICKLE_MEMBER
PICKLE_MEMBER = "data.pkl"
ZIP = b"PK\x03\x04"
# First bytes of files that are passed for a .nemo file → what they are.
ARCHIVES = {ZIP: "zip", b"\x28\xb5\x2f\xfd": "Zstandard", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"7z\xbc\xaf": "7-Zip"}
LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class Archive:
    """An open checkpoint: its files by normalised name."""

    path: Path
    sizes: Mapping[str, int]  # in bytes
    open_member: Callable[[str], IO[bytes]]


@contextlib.contextmanager
def open_archive(path: Path) -> Iterator[Archive]:
    """Open a `.nemo` file, or the folder of an unpacked one, and check its members, which must include a config and
    weights. Raises ValueError."""
    if path.is_dir():
        yield _with_config_and_weights(Archive(path, _checked_files(path), lambda name: (path / name).open("rb")))
        return
    try:
        with path.open("rb") as file:
            start = file.read(len(LFS_POINTER))
        with _open_tar(path, start) as tar:
            members = _checked_members(path, tar)
            sizes = {name: member.size for name, member in members.items()}
            # _checked_members returns regular files only, of which extractfile gives the content.
            yield _with_config_and_weights(
                Archive(path, sizes, lambda name: cast(IO[bytes], tar.extractfile(members[name])))
            )
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is truncated or damaged ({error}); download it again") from None


def _open_tar(path: Path, start: bytes) -> tarfile.TarFile:
    """The tar of a `.nemo` file, whose first bytes are given. Raises ValueError naming what any other file is."""
    if start == LFS_POINTER:
        raise ValueError(f"{path} is a pointer of Git LFS, not the file itself; fetch it with: git lfs pull")
    if start.startswith(PICKLE) or (start.startswith(ZIP) and _is_saved_by_torch(path)):
        raise ValueError(
            f"{path} is a file of torch.save, such as the .ckpt of a training run, without a config and a tokenizer; "
            "in NeMo, load it with load_from_checkpoint, and write a .nemo file with save_to"
        )
    if kind := next((kind for magic, kind in ARCHIVES.items() if start.startswith(magic)), None):
        raise ValueError(
            f"{path} is packed with {kind}, and NeMo packs with tar; unpack it, and pass the .nemo file or the folder "
            f"with {CONFIG_MEMBER} in it. If it has neither, ask its publisher for a .nemo file (save_to of NeMo)"
        )
    try:
        return tarfile.open(path, "r:gz" if start.startswith(GZIP) else "r:")
    except tarfile.TarError as error:
        raise ValueError(
            f"{path} is not a NeMo checkpoint ({error}); pass a .nemo file or the folder of a checkpoint, or download "
            "it again"
        ) from None


def _is_saved_by_torch(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as content:
            return any(posixpath.basename(name) == PICKLE_MEMBER for name in content.namelist())
    except zipfile.BadZipFile:
        return False


def _with_config_and_weights(archive: Archive) -> Archive:
    for name in (CONFIG_MEMBER, WEIGHTS_MEMBER):
        if name in archive.sizes:
            continue
        deeper = next((other for other in archive.sizes if posixpath.basename(other) == name), None)
        if deeper:
            raise ValueError(
                f"expected {name} at the top of {archive.path}, as NeMo writes it, got {deeper}; unpack the file, and "
                "pass the folder that has both"
            )
        raise ValueError(f"expected {name} in {archive.path}, which is not a whole NeMo checkpoint; download it again")
    return archive


def _checked_files(folder: Path) -> dict[str, int]:
    """Name → bytes of the files of an unpacked checkpoint. Raises ValueError for a link to a place outside."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    for path in files:
        require_inside(path, folder)
    return {path.name: path.stat().st_size for path in files}


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
    name = posixpath.normpath(name)
    if name not in archive.sizes:
        raise ValueError(f"{archive.path} names {name} in its config but does not hold it; download it again")
    with archive.open_member(name) as file:
        return file.read()


def check_weights(archive: Archive) -> None:
    """Raise ValueError unless the weights are a zip, as torch.save writes it."""
    with archive.open_member(WEIGHTS_MEMBER) as file:
        if not zipfile.is_zipfile(file):
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
