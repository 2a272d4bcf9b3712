"""The format `.nemo`: a tar of a YAML config, a pickle of weights, and files that the config names; or its folder.

All of it is checked here before anything is unpacked, built or loaded (docs/safety.md). NeMo 3.0.0 has guards of its
own behind these checks: tarfile's `data` filter, which skips an unsafe member without a message; an allow-list of
`_target_`s (nemo/core/classes/common.py), which still lets functions that write files be called; and torch's
weights_only unpickler, which is asked for here.

NeMo and torch are imported inside the functions that build a model, since their import takes ten seconds.
"""

import contextlib
import gzip
import os
import pickle
import posixpath
import re
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast
from unittest import mock

from common.checkpoint import Checkpoint
from common.checkpoint.hub import NOT_LOADED, Origin, on_disk, require_inside
from common.folder import require_free

NAME = "nemo"  # as --checkpoint_format takes it
CONFIG_MEMBER = "model_config.yaml"
WEIGHTS_MEMBER = "model_weights.ckpt"
# Classes of NeMo's own modules, by their spelling; NeMo's allow-list then asks what the class is.
ALLOWED_TARGET = re.compile(r"nemo\.(collections|core)(\.[a-z_][a-z0-9_]*)*\.[A-Z]\w*")
TARGET_KEYS = ("_target_", "target", "cls")
SECTIONS = ("preprocessor", "encoder", "decoder", "joint", "decoding", "tokenizer")
GZIP = b"\x1f\x8b"
# Tensors of a preprocessor that a checkpoint stores, although they follow from its config.
FEATURE_BUFFERS = ("preprocessor.featurizer.window", "preprocessor.featurizer.fb")


def read(origin: Origin) -> Checkpoint | None:
    """The checkpoint of this format at a place: a file, an unpacked folder, or the `.nemo` file of a folder or of a
    repository. None where there is none.

    Raises ValueError unless it is one, a complete, safe TDT model with a SentencePiece tokenizer, and as Origin.get.
    """
    found = [origin.file] if origin.file else [name for name in origin.sizes if name.endswith(".nemo")]
    # NVIDIA publishes `owner/model` as `model.nemo` (nemo/core/classes/common.py). Others give the file another name.
    usual = f"{(origin.repository or '').rpartition('/')[2]}.nemo"
    if CONFIG_MEMBER in origin.sizes and not origin.repository:
        path = origin.folder
    elif usual in found or len(found) == 1:
        name = usual if usual in found else found[0]
        # On this disk it may be a link to any place: its own content is checked.
        path = origin.get(name) if origin.repository else origin.folder / name
    elif not found:
        return None
    else:
        raise ValueError(f"{origin} has {', '.join(found)}; pass the path of one of them, downloaded if need be")
    with open_archive(path) as members:
        text = members[CONFIG_MEMBER].read()
        config = parse_config(text, members)
        _require_tdt(path, config)
        model_path = (config.get("tokenizer") or {}).get("model_path")
        if not model_path:
            raise ValueError(f"the tokenizer in {path} is not SentencePiece's, and no other can be exported")
        if not zipfile.is_zipfile(members[WEIGHTS_MEMBER]):
            raise ValueError(f"{WEIGHTS_MEMBER} in {path} is not a file as torch.save writes it, {NOT_LOADED}")
        files = [path]
        if path.is_dir():  # which may hold other files as well: those that the config names belong to the checkpoint
            named = [name for name in members if f"nemo:{name}".encode() in text]
            files = [path / name for name in (CONFIG_MEMBER, WEIGHTS_MEMBER, *named)]
        return Checkpoint(
            origin=origin,
            format=NAME,
            path=path,
            files=files,
            loaded_bytes=members[WEIGHTS_MEMBER].seek(0, os.SEEK_END),
            sentencepiece=members[model_path.removeprefix("nemo:")].read(),
            load_model=partial(load_model, path, config),
        )


def _require_tdt(path: Path, config: Mapping[str, Any]) -> None:
    """Raise ValueError ("not a TDT model: …") unless the config describes a token-and-duration transducer."""
    joint = config.get("joint") or {}
    decoding = config.get("decoding") or {}
    if not (config.get("decoder") and joint.get("num_extra_outputs") and decoding.get("durations")):
        raise ValueError(
            f"{path.name} is not a TDT model: its config lacks a prediction network, a joint with duration outputs, or "
            "durations, as CTC, RNNT and multi-blank models do; pass a Parakeet-TDT checkpoint"
        )


# Archive


@contextlib.contextmanager
def open_archive(path: Path) -> Iterator[dict[str, IO[bytes]]]:
    """The files of a checkpoint by normalised name: of a `.nemo` file, which is a plain tar or (before NeMo 1.7) gzip,
    or of the folder of an unpacked one.

    Raises ValueError unless they are safe, and a config and weights are among them.
    """
    members: dict[str, IO[bytes]]
    with contextlib.ExitStack() as stack:
        if path.is_dir():
            paths = [path / name for name in on_disk(path).sizes]
            for one in paths:
                require_inside(one)
            members = {one.name: stack.enter_context(one.open("rb")) for one in paths}
        else:
            with path.open("rb") as file:
                is_gzip = file.read(len(GZIP)) == GZIP
            try:
                tar = stack.enter_context(tarfile.open(path, "r:gz" if is_gzip else "r:"))
                checked = _checked_members(path, tar)
            except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise ValueError(
                    f"{path} is not a NeMo checkpoint, or it is truncated or damaged ({error}); pass a .nemo file, "
                    "which is a tar, or the folder of a checkpoint, or download it again. If it is a pointer of Git "
                    "LFS, run: git lfs pull. NeMo's save_to makes a .nemo file of the .ckpt of a training run"
                ) from None
            # These are regular files only, of which extractfile gives the content.
            members = {name: cast(IO[bytes], tar.extractfile(member)) for name, member in checked.items()}
        for name in (CONFIG_MEMBER, WEIGHTS_MEMBER):
            if name not in members:
                raise ValueError(
                    f"{path} has no {name} at its top, so it is not a whole NeMo checkpoint; download it again, or "
                    "unpack it, and pass the folder that has the file"
                )
        yield members


def _checked_members(path: Path, tar: tarfile.TarFile) -> dict[str, tarfile.TarInfo]:
    """The files of the archive by name. Raises ValueError naming the first member that a checkpoint must not have."""
    members: dict[str, tarfile.TarInfo] = {}
    for member in tar:
        name = posixpath.normpath(member.name)
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(member.name).parts:
            raise ValueError(f"{path} has a member outside its folder, {member.name!r}, {NOT_LOADED}")
        if not (member.isreg() or member.isdir()) or member.issparse():
            raise ValueError(f"{path} has a member that is neither file nor folder, {member.name!r}, {NOT_LOADED}")
        if member.isreg():
            if name in members:
                raise ValueError(f"{path} has two members {name!r}, {NOT_LOADED}")
            members[name] = member
    return members


# Config


def parse_config(text: bytes, members: Collection[str]) -> dict[str, Any]:
    """The content of the YAML in an archive with these members, by the reader that NeMo uses.

    Raises ValueError where it is not a config, or a value in it refers to something outside.
    """
    from omegaconf import DictConfig, OmegaConf

    try:
        config = OmegaConf.create(text.decode("utf-8"))
        if not isinstance(config, DictConfig):
            raise ValueError("it is not a mapping")
        content = cast(dict[str, Any], OmegaConf.to_container(config, resolve=False))
    except Exception as error:  # PyYAML and OmegaConf raise many types, AssertionError among them
        reason = str(error) or type(error).__name__
        raise ValueError(f"{CONFIG_MEMBER} cannot be used: {reason}; download it again") from None
    for name in SECTIONS:
        if not isinstance(content.get(name) or {}, dict):
            raise ValueError(f"{name} in {CONFIG_MEMBER} is {content[name]!r}, not a mapping; download it again")
    for path, value in _values(content):
        if problem := _problem(value, members, path):
            raise ValueError(f"{'.'.join(path)} in {CONFIG_MEMBER} is {str(value)[:80]!r}, {problem}")
    return content


def _values(content: object, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], object]]:
    """Every value of a config that is no mapping and no list, with the keys that lead to it."""
    if isinstance(content, dict):
        for name, value in content.items():
            yield from _values(value, (*path, str(name)))
    elif isinstance(content, list):
        for value in content:
            yield from _values(value, path)
    else:
        yield path, content


def _problem(value: object, members: Collection[str], path: tuple[str, ...]) -> str | None:
    """Why a checkpoint cannot have this value there, or None.

    NeMo saves configs with their references resolved (Serialization.to_config_file). One could read the environment
    (`${oc.env:…}`).
    """
    key = path[-1]
    if path[0] == "tokenizer" and key.endswith("_path") and value and not str(value).startswith("nemo:"):
        return f"which is not a file of the checkpoint, {NOT_LOADED}"
    if not isinstance(value, str):
        return None
    if "${" in value:
        return f"a reference, and NeMo saves none, {NOT_LOADED}"
    if key in TARGET_KEYS and not ALLOWED_TARGET.fullmatch(value):
        return f"which is not a class of NeMo, {NOT_LOADED}"
    if value.startswith("nemo:") and value.removeprefix("nemo:") not in members:
        return "a file that the checkpoint does not hold; download it again"
    return None


# Model


def load_model(path: Path, config: Mapping[str, Any], device: str = "cpu", scratch: Path | None = None) -> Any:
    """Build the NeMo model in evaluation mode. Weights are mapped from disk, not copied over random ones.

    path, config: of a checkpoint that has been checked. NeMo unpacks a file into a temporary folder, in `scratch` if
    that is given, else where there is room. Raises ValueError for a checkpoint that does not fit its config or holds
    more than tensors, OSError where there is no room.
    """
    import torch
    from nemo.collections.asr.models import ASRModel
    from omegaconf import OmegaConf

    size = 0 if path.is_dir() else path.stat().st_size
    if scratch is None:
        scratch = Path(tempfile.gettempdir())
        if shutil.disk_usage(scratch).free < size:  # often a part of the memory
            scratch = Path.cwd()
            require_free(size, scratch)
    connector = _assigning_connector(path)
    connector.model_extracted_dir = str(path.resolve()) if path.is_dir() else None
    # The random initialisation is most of the time of building a large model, and every value is loaded later.
    initializers = [name for name in dir(torch.nn.init) if name.endswith("_") and not name.startswith("_")]
    unchanged: dict[str, Any] = dict.fromkeys(initializers, lambda tensor, *args, **kwargs: tensor)
    try:
        # NeMo has no option for either.
        with mock.patch.multiple(torch.nn.init, **unchanged), mock.patch.object(tempfile, "tempdir", str(scratch)):
            model = ASRModel.restore_from(
                str(path),
                OmegaConf.create(_config_to_build(config)),
                map_location=device,
                save_restore_connector=connector,
            )
    except OSError:
        raise
    except pickle.UnpicklingError as error:  # its own text would explain how to run the code nevertheless
        raise ValueError(
            f"{path}: {WEIGHTS_MEMBER} holds more than tensors, and that might run code, {NOT_LOADED}"
        ) from error
    except Exception as error:  # NeMo raises whatever the constructors that it calls raise
        # After a failure NeMo tries its abstract base class; its log, shown by --verbose, has the reason.
        reason = "NeMo cannot build it from its config" if "abstract class" in str(error) else error
        raise ValueError(f"{path} does not load: {reason}") from error
    return model.eval().requires_grad_(requires_grad=False)


def _config_to_build(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with batched greedy decoding, which the runtimes follow (beam search may choose other words, and plain
    greedy decoding other durations), and without two lists of pieces, which NeMo takes seconds to copy around. While
    NeMo's BPE models are built, they take these lists from their tokenizer instead (rnnt_bpe_models.py,
    hybrid_rnnt_ctc_bpe_models.py)."""
    joint, decoding = config["joint"], {**config["decoding"], "strategy": "greedy_batch"}
    if str(config.get("target")).endswith("BPEModel"):
        config = {name: value for name, value in config.items() if name != "labels"}
        joint = {name: value for name, value in joint.items() if name != "vocabulary"}
    return {**config, "joint": joint, "decoding": decoding}


def _assigning_connector(path: Path) -> Any:
    """NeMo's SaveRestoreConnector, but it uses the checkpoint's tensors instead of copying them: half the memory."""
    import torch
    from nemo.core.connectors.save_restore_connector import SaveRestoreConnector

    class AssigningConnector(SaveRestoreConnector):  # type: ignore[misc]
        @staticmethod
        def _load_state_dict_from_disk(model_weights: str, map_location: Any = "cpu") -> dict[str, Any]:
            # weights_only does not run code in a pickle.
            state_dict: dict[str, Any] = torch.load(
                model_weights, map_location=map_location, weights_only=True, mmap=True
            )
            return state_dict

        def load_instance_with_state_dict(self, instance: Any, state_dict: dict[str, Any], strict: bool) -> None:  # noqa: FBT001  NeMo's signature
            state_dict = {
                name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state_dict.items()
            }
            state_dict |= _exact_features(path, instance, state_dict)
            wrong = [name for name, tensor in state_dict.items() if not torch.isfinite(tensor).all()]
            if wrong:
                raise ValueError(f"{wrong[0]} and {len(wrong) - 1} more of its tensors hold values that are not finite")
            instance.load_state_dict(state_dict, strict=strict, assign=True)
            instance._set_model_restore_state(is_being_restored=False)

    return AssigningConnector()


def _exact_features(path: Path, instance: Any, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The window and the filter bank that NeMo has computed from the config, where the stored ones are rounded copies.

    `model.half()` rounds them like weights, but runtimes compute their own from the config. Stored values that rounding
    does not explain are kept, and ModelSpec reports how they differ.
    """
    import torch

    exact = {}
    for name in FEATURE_BUFFERS:
        own, stored = instance.state_dict().get(name), state_dict.get(name)
        if own is None or stored is None or own.shape != stored.shape:
            continue
        own = own.float().to(stored.device)
        # Versions of librosa and torch differ in the last bits of float32; bfloat16 has 8 bits.
        if not torch.allclose(stored, own) and torch.allclose(stored, own, rtol=2**-8, atol=1e-6):
            print(f"{path.name}: {name} is rounded; the exact one of its config is used instead", flush=True)
            exact[name] = own
    return exact
