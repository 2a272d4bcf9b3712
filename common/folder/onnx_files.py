"""XXX docstring of folder.onnx_files"""

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


def save_model(model, path: Path) -> None:
    """Write an onnx_ir model as `path` and `path`.data, large tensors on boundaries that every system can map."""
    import onnx_ir as ir

    external = {"size_threshold_bytes": EXTERNAL_DATA_THRESHOLD, "alignment": EXTERNAL_DATA_ALIGNMENT}
    ir.save(model, path, external_data=f"{path.name}.data", **external)


def data_bytes(sizes: Iterable[int]) -> int:
    """Bytes of the data file that save_model writes for tensors of these sizes, in this order."""
    offset = 0
    for size in sizes:
        if size > EXTERNAL_DATA_ALIGNED_FROM:
            offset = -(-offset // EXTERNAL_DATA_ALIGNMENT) * EXTERNAL_DATA_ALIGNMENT
        offset += size
    return offset


def of_one_name(source: Path, names: Iterable[str], scratch: Path) -> Path:
    """The folder `source`, or, where one of its files `names` is shared with another folder by hard link, the new
    folder `scratch` with copies of them: onnx and onnx_ir take such a file for an attack, and read none."""
    names = list(names)
    if all((source / name).stat().st_nlink == 1 for name in names):
        return source
    scratch.mkdir()
    for name in names:
        shutil.copyfile(source / name, scratch / name)
    return scratch


def share_equal_data(folders: Iterable[Path]) -> None:
    """Make the weights of several folders that are equal by their manifests one file under several names, where hard
    links are to be had."""
    first: dict[str, Path] = {}
    for folder in folders:
        for path in sorted(folder.glob("*.data")):
            same = first.setdefault(read_manifest(folder)[FILES][path.name]["sha256"], path)
            if same is not path:
                path.unlink()
                link(same, path)


def load(path: Path) -> ir.Model:
    """The model at `path`, its large weights on disk. Raises ValueError if it is no ONNX model."""
    return model_of(read_proto(path), path.parent)


def read_proto(path: Path) -> onnx.ModelProto:
    """The graph alone. Raises ValueError if it is none, or if the data file ends before its tensors do."""
    try:
        proto = onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise ValueError(f"{path} is not an ONNX model ({error}); export it again") from None
    for tensor in filter(uses_external_data, proto.graph.initializer):
        place = ExternalDataInfo(tensor)
        data = path.parent / place.location
        wanted, found = (place.offset or 0) + (place.length or 0), data.stat().st_size
        if found < wanted:
            raise ValueError(f"{data} ends after {found} bytes, {tensor.name} at {wanted}; export it again")
    return proto


def model_of(proto: onnx.ModelProto, folder: Path) -> ir.Model:
    model = ir.from_proto(proto)
    model.graph.opset_imports.setdefault(MICROSOFT, 1)
    ir.external_data.set_base_dir(model.graph, folder)
    return model
