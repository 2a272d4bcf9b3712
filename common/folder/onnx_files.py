"""ONNX files with external data: `NAME.onnx`, the graph, and `NAME.onnx.data`, its large tensors.

When a graph is read, its tensors stay on disk and are mapped when they are needed, so that a model of gigabytes takes
little memory; a graph from disk is checked first. Operations on a graph are in onnx_graph.py.
"""

import shutil
from collections.abc import Iterable
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from common.contract import MICROSOFT
from common.folder.atomic import link
from common.folder.manifest import FILES, read_manifest

# Smaller tensors stay inside the .onnx, where graph optimizers look for constants.
EXTERNAL_DATA_THRESHOLD = 1024  # bytes
EXTERNAL_DATA_ALIGNMENT = 65536  # bytes; the allocation granularity of Windows, the coarsest
EXTERNAL_DATA_ALIGNED_FROM = 2**20  # bytes; onnx_ir's default


def save_model(model: ir.Model, path: Path) -> None:
    """Write a model as `path` and `path`.data, large tensors at offsets that every system can map.

    The largest tensors come first. Their sizes are mostly multiples of the alignment, so there is almost no padding
    between them; without this order a 4-bit encoder of 0.6B had 5 MB of padding.
    """
    initializers = model.graph.initializers
    for name in sorted(initializers, key=lambda name: -tensor_bytes(initializers[name])):
        initializers[name] = initializers.pop(name)
    ir.save(
        model,
        path,
        external_data=f"{path.name}.data",
        size_threshold_bytes=EXTERNAL_DATA_THRESHOLD,
        alignment=EXTERNAL_DATA_ALIGNMENT,
    )


def tensor_bytes(value: ir.Value) -> int:
    """Bytes of an initializer's tensor."""
    return 0 if value.const_value is None else value.const_value.nbytes


def data_bytes(sizes: Iterable[int]) -> int:
    """Bytes of the data file that save_model writes for tensors of these sizes."""
    offset = 0
    for size in sorted(sizes, reverse=True):
        if size > EXTERNAL_DATA_ALIGNED_FROM:
            offset += -offset % EXTERNAL_DATA_ALIGNMENT  # up to the next boundary
        offset += size
    return offset


def of_one_name(source: Path, names: Iterable[str], scratch: Path) -> Path:
    """A folder with the files `names` of `source` in which each file has only one name.

    That is `source` itself or, where another folder shares one of the files by a hard link, the new folder `scratch`
    with copies: onnx and onnx_ir do not read external data with several hard links, for safety.
    """
    names = list(names)
    if all((source / name).stat().st_nlink == 1 for name in names):
        return source
    scratch.mkdir()
    for name in names:
        shutil.copyfile(source / name, scratch / name)
    return scratch


def share_equal_data(folders: Iterable[Path]) -> None:
    """Store data files of several folders only once, under several names, where the manifests say that they are equal.

    Where the file system has no hard links, they stay copies.
    """
    first: dict[str, Path] = {}
    for folder in folders:
        for path in sorted(folder.glob("*.data")):
            same = first.setdefault(read_manifest(folder)[FILES][path.name]["sha256"], path)
            if same is not path:
                path.unlink()
                link(same, path)


def load(path: Path) -> ir.Model:
    """The model at `path`, with its large tensors left on disk. Raises ValueError as read_proto does."""
    return model_of(read_proto(path), path.parent)


def read_proto(path: Path) -> onnx.ModelProto:
    """The graph at `path` without its external data.

    Raises ValueError if it is not an ONNX model, or if the data file ends before its tensors do.
    """
    try:
        proto = onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise ValueError(f"{path} is not an ONNX model ({error}); export it again") from None
    for tensor in filter(uses_external_data, proto.graph.initializer):
        place = ExternalDataInfo(tensor)
        data = path.parent / place.location
        end = (place.offset or 0) + (place.length or 0)
        size = data.stat().st_size
        if size < end:
            raise ValueError(f"expected {end} bytes or more in {data} for {tensor.name}, got {size}; export it again")
    return proto


def model_of(proto: onnx.ModelProto, folder: Path) -> ir.Model:
    """The model of a graph whose external data lies in `folder`; it may use ONNX Runtime's own operators."""
    model = ir.from_proto(proto)
    model.graph.opset_imports.setdefault(MICROSOFT, 1)
    ir.external_data.set_base_dir(model.graph, folder)
    return model
