"""A `.nemo` as found on the internet: a tar of a YAML config, a pickle of weights, and files that the config names.

Nothing in it is believed. Before anything is unpacked, built or loaded:
    the archive   holds files and folders with plain names, each once; no links, no devices; no more than it could
    the config    holds values, no references to the environment, no aliases that multiply; its `_target_`s are NeMo
                  classes; the files it names are members
    the weights   are stored as they are, so that they cannot unpack to more than they are

NeMo 3.0.0 has guards of its own behind these: tarfile's `data` filter, which skips an unsafe member in silence; an
allow-list of `_target_`s (nemo/core/classes/common.py), by which functions that write files may still be called; and
torch's weights_only unpickler, which common/model.py asks for.
"""

import contextlib
import gzip
import posixpath
import re
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

CONFIG_MEMBER = "model_config.yaml"
WEIGHTS_MEMBER = "model_weights.ckpt"

GZIP_MAGIC = b"\x1f\x8b"
# NeMo before 1.7 gzipped its checkpoints. Trained weights hardly compress; gzip at its best gains a factor of 1030.
MAX_EXPANSION = 10
# The largest checkpoints with one file per tensor of an optimizer have hundreds; a Parakeet has five.
MAX_MEMBERS = 1000
BLOCK = 2**20  # bytes read at a time
# A config with 8192 pieces, listed twice, has 16,500 values. OmegaConf takes 0.1 ms for each.
MAX_CONFIG_VALUES = 100_000
MAX_CONFIG_DEPTH = 30  # eight are in use
# Beyond these counts and sizes NeMo builds without end. The largest in use are 48 layers and 48 kHz.
MAX_NUMBER, LARGEST = 100_000, {"n_layers": 1000, "pred_rnn_layers": 100}
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
    """Open a `.nemo` whose members are checked, its config and weights among them. Raises ValueError."""
    try:
        with path.open("rb") as file:
            zipped = file.read(len(GZIP_MAGIC)) == GZIP_MAGIC
        if zipped:
            _check_expansion(path)
        with tarfile.open(path, "r:gz" if zipped else "r:") as tar:
            archive = Archive(path, tar, _checked_members(path, tar))
            for name in (CONFIG_MEMBER, WEIGHTS_MEMBER):
                if name not in archive.members:
                    raise ValueError(f"{path} is not a whole NeMo checkpoint: it holds no {name}; download it again")
            yield archive
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is truncated or not a NeMo checkpoint ({error}); download it again") from None


def _check_expansion(path: Path) -> None:
    """Raise ValueError if a gzipped file holds more than MAX_EXPANSION times its size."""
    limit, total = MAX_EXPANSION * path.stat().st_size, 0
    with gzip.open(path) as file:
        while block := file.read(BLOCK):
            total += len(block)
            if total > limit:
                raise ValueError(
                    f"{path} unpacks to more than {MAX_EXPANSION} times its size, as no weights do; refused"
                )


def _checked_members(path: Path, tar: tarfile.TarFile) -> dict[str, tarfile.TarInfo]:
    """The files of the archive by name. Raises ValueError naming the first member that no checkpoint has."""
    found: dict[str, tarfile.TarInfo] = {}
    limit, total = MAX_EXPANSION * path.stat().st_size, 0
    for count, member in enumerate(tar, 1):
        name, total = posixpath.normpath(member.name), total + member.size
        windows = PureWindowsPath(member.name)
        if windows.drive or windows.root or ".." in windows.parts:
            raise ValueError(f"{path} has a member outside its folder, {member.name!r}; refused")
        if not (member.isreg() or member.isdir()) or member.issparse():
            raise ValueError(f"{path} has a member that is neither file nor folder, {member.name!r}; refused")
        if count > MAX_MEMBERS:
            raise ValueError(f"{path} has more than {MAX_MEMBERS} members; refused")
        if total > limit:
            raise ValueError(
                f"{path} has members of {total} bytes up to {member.name!r}, more than it can hold; download it again"
            )
        if member.isreg():
            if name in found:
                raise ValueError(f"{path} has two members {name!r}; refused")
            found[name] = member
    return found


def unpacked_bytes(archive: Archive) -> int:
    """What the files take on a disk."""
    return sum(member.size for member in archive.members.values())


def read_member(archive: Archive, name: str, limit: int) -> bytes:
    """The content of a file of at most `limit` bytes. Raises ValueError."""
    member = archive.members.get(posixpath.normpath(name))
    if member is None:
        raise ValueError(f"{archive.path} names {name} in its config but does not hold it; download it again")
    if member.size > limit:
        raise ValueError(f"{archive.path} has a {name} of {member.size} bytes, wanted at most {limit}; refused")
    return archive.tar.extractfile(member).read()


def check_weights(archive: Archive) -> None:
    """Raise ValueError unless the weights are a zip of stored entries, as torch.save writes it."""
    file = archive.tar.extractfile(archive.members[WEIGHTS_MEMBER])
    try:
        with zipfile.ZipFile(file) as weights:
            entries = weights.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise ValueError(f"{archive.path}: {WEIGHTS_MEMBER} is not what torch.save writes ({error}); refused") from None
    size = archive.members[WEIGHTS_MEMBER].size
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or sum(e.file_size for e in entries) > size:
        raise ValueError(f"{archive.path}: {WEIGHTS_MEMBER} has compressed entries, as torch.save writes none; refused")


def parse_config(text: bytes, members: set[str]) -> dict:
    """The content of a config, by the reader that NeMo uses, in an archive with these members. Raises ValueError."""
    from omegaconf import DictConfig, OmegaConf

    try:
        plain = text.decode("utf-8")
        _check_yaml(plain)
        config = OmegaConf.create(plain)
        if not isinstance(config, DictConfig):
            raise ValueError("no mapping at its top")
        content = OmegaConf.to_container(config, resolve=False)
    except Exception as error:  # of odd documents PyYAML and OmegaConf raise many types, AssertionError among them
        raise ValueError(f"{str(error) or type(error).__name__}; download it again") from None
    for name in SECTIONS:
        if not isinstance(content.get(name) or {}, dict):
            raise ValueError(f"{name} is {content[name]!r}, not a mapping; download it again")
    _check_values(content, members)
    return content


def _check_yaml(text: str) -> None:
    """Raise ValueError if the document is larger, with its aliases written out, or deeper than any config."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    open_nodes: list[list] = []  # [anchor, values so far] of each mapping and list that has begun
    sizes = Counter()  # values of each finished anchor
    for event in yaml.parse(text, Loader=loader):
        size = 0
        if isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append([event.anchor, 1])
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size = open_nodes.pop()
        elif isinstance(event, yaml.ScalarEvent):
            anchor, size = event.anchor, 1
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise ValueError(f"alias {event.anchor!r} stands inside what it repeats")
            anchor, size = None, sizes[event.anchor]
        if size and anchor:
            sizes[anchor] = size
        if size and open_nodes:
            open_nodes[-1][1] += size
        if sum(count for _, count in open_nodes) > MAX_CONFIG_VALUES or len(open_nodes) > MAX_CONFIG_DEPTH:
            raise ValueError(f"it has more than {MAX_CONFIG_VALUES} values or {MAX_CONFIG_DEPTH} levels")


def _check_values(content: object, members: set[str], path: tuple[str, ...] = ("",)) -> None:
    """Raise ValueError naming a value that would reach outside the config, or that no memory could follow.

    NeMo saves configs with their interpolations resolved (Serialization.to_config_file); one that is there would read
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


def _problem(value: object, members: set[str], path: tuple[str, ...]) -> str | None:
    """Why a checkpoint cannot have this value there, or None."""
    section, key = path[0], path[-1]
    if section in SECTIONS and isinstance(value, int | float) and not abs(value) <= LARGEST.get(key, MAX_NUMBER):
        return f"wanted at most {LARGEST.get(key, MAX_NUMBER)}; refused"
    if section == "tokenizer" and key.endswith("_path") and value and not str(value).startswith("nemo:"):
        return "wanted a file of the checkpoint; refused"
    if not isinstance(value, str):
        return None
    if "${" in value:
        return "a reference; NeMo saves none; refused"
    if key in TARGET_KEYS and not ALLOWED_TARGET.fullmatch(value):
        return "which is not a class of NeMo; refused"
    if value.startswith("nemo:") and value.removeprefix("nemo:") not in members:
        return "a file that the checkpoint does not hold; download it again"
    return None
