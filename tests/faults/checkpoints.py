"""Checkpoints that must not be loaded: each is written by a function that is named after what is wrong with it.

Those that carry code would write the file that CANARY names; after they were rejected it must not be there.
"""

import bz2
import gzip
import io
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

from tests.helpers import CONFIG, TINY, WEIGHTS, rewrite_config, rewrite_text, rewrite_weights, small_members, write_tar

CANARY = "canary"  # beside the checkpoint

Writer = Callable[[Path], None]
CHECKPOINTS: dict[str, Writer] = {}


def case(name: str) -> Callable[[Writer], Writer]:
    def register(writer: Writer) -> Writer:
        CHECKPOINTS[name] = writer
        return writer

    return register


def with_member(path: Path, name: str, content: bytes = b"", **fields) -> None:
    """The bundled checkpoint with one more member, which has these tar fields."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    write_tar(path, small_members(), (info, content))


def with_weights(path: Path, content: bytes) -> None:
    write_tar(path, {**small_members(), WEIGHTS: content})


class Code:
    """If it is unpickled carelessly, it touches the canary."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch '{self.canary}'",)


# ---- the archive


@case("empty file")
def _(path):
    path.write_bytes(b"")


@case("text, not an archive")
def _(path):
    path.write_text("hello " * 1000)


@case("random bytes")
def _(path):
    path.write_bytes(os.urandom(100_000))


@case("a folder of that name")
def _(path):
    path.mkdir()


@case("half of the file")
def _(path):
    path.write_bytes(TINY.read_bytes()[: TINY.stat().st_size // 2])


@case("all but the end")
def _(path):
    path.write_bytes(TINY.read_bytes()[: TINY.stat().st_size * 99 // 100])


@case("another compression (bzip2)")
def _(path):
    path.write_bytes(bz2.compress(TINY.read_bytes(), 1))


@case("gzip cut in half")
def _(path):
    whole = gzip.compress(TINY.read_bytes(), 1)
    path.write_bytes(whole[: len(whole) // 2])


@case("a member that claims 1 TB")
def _(path):
    info = tarfile.TarInfo("huge")
    info.size = 10**12
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + TINY.read_bytes())


@case("a sparse member of 1 TB")
def _(path):
    info = tarfile.TarInfo("sparse")
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[156:157] = b"S"
    header[386:398] = header[398:410] = b"00000000000\0"
    header[483:495] = b"\x80\0\0\0\0\0\0\xe8\xd4\xa5\x10\0"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path.write_bytes(bytes(header) + TINY.read_bytes())


@case("a member ../canary")
def _(path):
    with_member(path, f"../{CANARY}", b"x")


@case("a member with an absolute path")
def _(path):
    with_member(path, str(path.parent / CANARY), b"x")


@case("a symbolic link out, and a file through it")
def _(path):
    info = tarfile.TarInfo("out")
    info.type, info.linkname = tarfile.SYMTYPE, str(path.parent)
    file = tarfile.TarInfo(f"out/{CANARY}")
    write_tar(path, small_members(), (info, b""), (file, b""))


@case("a hard link to a file outside")
def _(path):
    with_member(path, "passwords", type=tarfile.LNKTYPE, linkname="/etc/passwd")


@case("a named pipe")
def _(path):
    with_member(path, "pipe", type=tarfile.FIFOTYPE)


@case("a device")
def _(path):
    with_member(path, "memory", type=tarfile.CHRTYPE, devmajor=1, devminor=1)


@case("two members model_weights.ckpt")
def _(path):
    with_member(path, WEIGHTS, b"x")


@case("no config")
def _(path):
    write_tar(path, {name: content for name, content in small_members().items() if name != CONFIG})


@case("the config in a subfolder only")
def _(path):
    write_tar(path, {f"sub/{CONFIG}" if name == CONFIG else name: c for name, c in small_members().items()})


# ---- the config


@case("YAML that asks for Python objects")
def _(path):
    canary = path.parent / CANARY
    rewrite_text(path, lambda text: f"x: !!python/object/apply:os.system [\"touch '{canary}'\"]\n{text}")


@case("a reference to the environment")
def _(path):
    rewrite_text(path, lambda text: "x: ${oc.env:HOME}\n" + text)


@case("a reference whose resolver is a reference")
def _(path):
    rewrite_text(path, lambda text: "name: oc.env\nx: ${${name}:HOME}\n" + text)


@case("references that double 60 times")
def _(path):
    lines = "".join(f"x{n + 1}: ${{x{n}}}${{x{n}}}\n" for n in range(60))
    rewrite_text(path, lambda text: f"x0: bomb\n{lines}{text}")


@case("an alias inside itself")
def _(path):
    rewrite_text(path, lambda text: "x: &x [*x]\n" + text)


@case("5000 levels")
def _(path):
    rewrite_text(path, lambda text: f"x: {'[' * 5000}{']' * 5000}\n{text}")


@case("not YAML")
def _(path):
    rewrite_text(path, lambda text: "\t{]:" + text)


@case("not UTF-8")
def _(path):
    write_tar(path, {**small_members(), CONFIG: b"\xff\xfe\xfa"})


@case("a number for a config")
def _(path):
    rewrite_text(path, lambda text: "5")


@case("a list for an encoder")
def _(path):
    rewrite_config(path, lambda config: config.update(encoder=[1, 2]))


@case("_target_: os.system")
def _(path):
    canary = path.parent / CANARY
    rewrite_config(path, lambda config: config["encoder"].update(_target_="os.system", command=f"touch '{canary}'"))


@case("_target_: a NeMo function that writes files")
def _(path):
    call = {"_target_": "nemo.collections.asr.parts.utils.manifest_utils.write_text", "output_path": CANARY}
    rewrite_config(path, lambda config: config.update(preprocessor=call))


@case("_target_: deep in a list")
def _(path):
    rewrite_config(path, lambda config: config.update(extra=[[{"_target_": "subprocess.Popen", "args": "id"}]]))


@case("target: not a model")
def _(path):
    rewrite_config(path, lambda config: config.update(target="subprocess.Popen"))


@case("_target_: a NeMo class that is no encoder")
def _(path):
    target = "nemo.collections.asr.modules.SpectrogramAugmentation"
    rewrite_config(path, lambda config: config["encoder"].update(_target_=target))


@case("an artifact nemo:../../etc/passwd")
def _(path):
    rewrite_config(path, lambda config: config["tokenizer"].update(model_path="nemo:../../../../../../etc/passwd"))


@case("a tokenizer at /etc/passwd")
def _(path):
    rewrite_config(path, lambda config: config["tokenizer"].update(model_path="/etc/passwd"))


@case("a width of -1")
def _(path):
    rewrite_config(path, lambda config: config["encoder"].update(d_model=-1))


@case("a width of 'wide'")
def _(path):
    rewrite_config(path, lambda config: config["encoder"].update(d_model="wide"))


@case("negative durations")
def _(path):
    def change(config):
        for section in (config["decoding"], config["loss"]["tdt_kwargs"]):  # NeMo decodes by the durations of the loss
            section["durations"] = [0, -1, 2, 3, 4]

    rewrite_config(path, change)


# ---- the weights


@case("a pickle with code in the zip of torch")
def _(path):
    import torch

    buffer = io.BytesIO()
    torch.save({"weight": Code(path.parent / CANARY)}, buffer)
    with_weights(path, buffer.getvalue())


@case("a pickle with code, bare")
def _(path):
    with_weights(path, pickle.dumps(Code(path.parent / CANARY)))


@case("a tensor that is a string")
def _(path):
    rewrite_weights(path, lambda state: state.update({next(iter(state)): "weight"}))


@case("a tensor missing")
def _(path):
    rewrite_weights(path, lambda state: state.pop(next(iter(state))))


@case("a tensor of another shape")
def _(path):
    import torch

    rewrite_weights(path, lambda state: state.update({"joint.enc.weight": torch.zeros(3, 5)}))


@case("a weight that is not a number (NaN)")
def _(path):
    rewrite_weights(path, lambda state: state["joint.enc.weight"][3, 4].fill_(float("nan")))


@case("weights from random bytes")
def _(path):
    with_weights(path, os.urandom(100_000))
