"""A `.nemo` file: a tar of a YAML config, a pickle of weights, and files that the config names.

Checkpoints are treated as untrusted input. Before anything is unpacked, built or loaded, it is checked that
    the archive   holds files and folders with plain names, each once; no links, no devices; no more bytes than fit
    the config    holds values, no references to the environment, no aliases that multiply; its `_target_`s are NeMo
                  classes; the files it names are members
    the weights   are stored uncompressed, so that they cannot unpack to more than they are

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
from pathlib import Path, PureWindowsPath
from typing import IO, Any, cast

NOT_LOADED = "not loaded; get it from its publisher"  # ends the message of every check for safety
CONFIG_MEMBER = "model_config.yaml"
WEIGHTS_MEMBER = "model_weights.ckpt"
GZIP_MAGIC = b"\x1f\x8b"
# NeMo before 1.7 gzipped its checkpoints. Trained weights hardly compress; gzip at its best gains a factor of 1030.
MAX_EXPANSION = 10
# The largest checkpoints, with one file per tensor of an optimizer, have hundreds of members; a Parakeet has five.
MAX_MEMBERS = 1000
BLOCK = 2**20  # bytes read at a time
# A config with 8192 pieces, listed twice, has 16,500 values. OmegaConf takes 0.1 ms for each.
MAX_CONFIG_VALUES = 100_000
MAX_CONFIG_DEPTH = 30  # configs in use have eight levels
# With larger counts and sizes NeMo takes hours to build a model. The largest in use are 48 layers and 48 kHz.
MAX_NUMBER = 100_000
LARGEST = {"n_layers": 1000, "pred_rnn_layers": 100}
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
            zipped = file.read(len(GZIP_MAGIC)) == GZIP_MAGIC
        if zipped:
            _check_expansion(path)
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


def _check_expansion(path: Path) -> None:
    """Raise ValueError if a gzipped file holds more than MAX_EXPANSION times its size."""
    limit = MAX_EXPANSION * path.stat().st_size
    total = 0
    with gzip.open(path) as file:
        while block := file.read(BLOCK):
            total += len(block)
            if total > limit:
                raise ValueError(
                    f"{path} unpacks to more than {MAX_EXPANSION} times its size, as no weights do; {NOT_LOADED}"
                )


def _checked_members(path: Path, tar: tarfile.TarFile) -> dict[str, tarfile.TarInfo]:
    """The files of the archive by name. Raises ValueError naming the first member that a checkpoint must not have."""
    members: dict[str, tarfile.TarInfo] = {}
    limit = MAX_EXPANSION * path.stat().st_size
    total = 0
    for count, member in enumerate(tar, 1):
        name = posixpath.normpath(member.name)
        total += member.size
        windows = PureWindowsPath(member.name)
        if windows.drive or windows.root or ".." in windows.parts:
            raise ValueError(f"{path} has a member outside its folder, {member.name!r}; {NOT_LOADED}")
        if not (member.isreg() or member.isdir()) or member.issparse():
            raise ValueError(f"{path} has a member that is neither file nor folder, {member.name!r}; {NOT_LOADED}")
        if count > MAX_MEMBERS:
            raise ValueError(f"{path} has more than {MAX_MEMBERS} members; {NOT_LOADED}")
        if total > limit:
            raise ValueError(
                f"{path} has members of {total} bytes up to {member.name!r}, more than it can hold; download it again"
            )
        if member.isreg():
            if name in members:
                raise ValueError(f"{path} has two members {name!r}; {NOT_LOADED}")
            members[name] = member
    return members


def unpacked_bytes(archive: Archive) -> int:
    """Bytes of the unpacked files."""
    return sum(member.size for member in archive.members.values())


def read_member(archive: Archive, name: str, limit: int) -> bytes:
    """The content of a file of at most `limit` bytes. Raises ValueError."""
    member = archive.members.get(posixpath.normpath(name))
    if member is None:
        raise ValueError(f"{archive.path} names {name} in its config but does not hold it; download it again")
    if member.size > limit:
        raise ValueError(f"expected at most {limit} bytes of {name} in {archive.path}, got {member.size}; {NOT_LOADED}")
    return _open_member(archive, member).read()


def _open_member(archive: Archive, member: tarfile.TarInfo) -> IO[bytes]:
    file = archive.tar.extractfile(member)
    assert file is not None  # _checked_members returns regular files only
    return file


def check_weights(archive: Archive) -> None:
    """Raise ValueError unless the weights are a zip of stored entries, as torch.save writes it."""
    file = _open_member(archive, archive.members[WEIGHTS_MEMBER])
    try:
        with zipfile.ZipFile(file) as weights:
            entries = weights.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise ValueError(
            f"expected {WEIGHTS_MEMBER} in {archive.path} as torch.save writes it, got another file ({error}); "
            f"{NOT_LOADED}"
        ) from None
    size = archive.members[WEIGHTS_MEMBER].size
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or sum(e.file_size for e in entries) > size:
        raise ValueError(
            f"expected stored entries in {WEIGHTS_MEMBER} of {archive.path}, as torch.save writes them, got compressed "
            f"ones; {NOT_LOADED}"
        )


def parse_config(text: bytes, members: Collection[str]) -> dict[str, Any]:
    """The content of a config in an archive with these members, by the reader that NeMo uses. Raises ValueError."""
    from omegaconf import DictConfig, OmegaConf

    try:
        plain = text.decode("utf-8")
        _check_yaml(plain)
        config = OmegaConf.create(plain)
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


def _check_yaml(text: str) -> None:
    """Raise ValueError if the document, with its aliases written out, is larger or deeper than any config is."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    anchors: list[str | None] = []  # of each mapping and list that is not finished yet
    counts: list[int] = []  # number of values so far in each of them
    sizes: dict[str, int] = {}  # number of values of each finished anchor
    for event in yaml.parse(text, Loader=loader):
        anchor = None
        size = 0
        if isinstance(event, yaml.CollectionStartEvent):
            anchors.append(event.anchor)
            counts.append(1)
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor = anchors.pop()
            size = counts.pop()
        elif isinstance(event, yaml.ScalarEvent):
            anchor = event.anchor
            size = 1
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise ValueError(f"alias {event.anchor!r} is inside what it repeats")
            size = sizes[event.anchor]
        if size and anchor:
            sizes[anchor] = size
        if size and counts:
            counts[-1] += size
        if sum(counts) > MAX_CONFIG_VALUES or len(counts) > MAX_CONFIG_DEPTH:
            raise ValueError(f"it has more than {MAX_CONFIG_VALUES} values or {MAX_CONFIG_DEPTH} levels")


def _check_values(content: object, members: Collection[str], path: tuple[str, ...] = ("",)) -> None:
    """Raise ValueError naming a value that refers to something outside the config, or that is too large.

    NeMo saves configs with their interpolations resolved (Serialization.to_config_file). An interpolation could read
    the environment (`${oc.env:…}`), or repeat itself without bound.
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
    section = path[0]
    key = path[-1]
    if section in SECTIONS and isinstance(value, int | float) and not abs(value) <= LARGEST.get(key, MAX_NUMBER):
        return f"expected at most {LARGEST.get(key, MAX_NUMBER)}; {NOT_LOADED}"
    if section == "tokenizer" and key.endswith("_path") and value and not str(value).startswith("nemo:"):
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
