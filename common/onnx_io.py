"""ONNX files with external data, and the oldest ONNX Runtime that runs them.

`NAME.onnx` is a whole model, or a graph whose large tensors are in `NAME.onnx.data`. When such a graph is read, its
tensors stay on disk and are mapped when they are needed, so that a model of gigabytes takes little memory.

The oldest ONNX Runtime whose CPU provider runs a graph depends on its opset, operators and types. docs/runtimes.md has
the versions in which graphs of each method were run.
"""

import os
from collections.abc import Iterable
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError
from onnx.external_data_helper import uses_external_data

from common.cli import size_text
from common.contract import MICROSOFT
from common.folder import FILES, link, read_manifest

# Smaller tensors stay inside the .onnx, where graph optimizers look for constants.
EXTERNAL_DATA_THRESHOLD = 1024  # bytes
EXTERNAL_DATA_ALIGNMENT = 65536  # bytes; the allocation granularity of Windows, the coarsest
EXTERNAL_DATA_ALIGNED_FROM = 2**20  # bytes; onnx_ir's default
SINGLE_FILE_MAX = 2e9  # bytes of weights; a protobuf ends at 2^31, and the operators need some of it
MINIMUM_RUNTIME = "minimum_onnxruntime"  # in manifest.json
Version = tuple[int, int]
# By opset of ONNX's own operators (onnxruntime.ai/docs/reference/compatibility.html). The operators of ONNX Runtime
# that are used here are older, except for the product with weights of a few bits.
OPSETS: dict[int, Version] = {17: (1, 12), 18: (1, 14), 19: (1, 15), 20: (1, 17), 21: (1, 18), 25: (1, 24)}
MATMUL_NBITS: dict[int, Version] = {2: (1, 24), 4: (1, 17), 8: (1, 22)}  # by bits
INT4: Version = (1, 23)  # 1.22 has no Cast of 4-bit integers
INT4_TYPES = (onnx.TensorProto.INT4, onnx.TensorProto.UINT4)


def save_model(model: ir.Model, path: Path, *, single_file: bool = False) -> None:
    """Write a model as `path` and `path`.data, large tensors at offsets that every system can map.

    The largest tensors come first. Their sizes are mostly multiples of the alignment, so there is almost no padding
    between them; without this order a 4-bit encoder of 0.6B had 5 MB of padding.

    single_file: write `path` alone, which holds the weights, instead. Raises ValueError where they are too large.
    """
    initializers = model.graph.initializers
    tensors = {name: value.const_value for name, value in initializers.items()}
    sizes = {name: tensor.nbytes for name, tensor in tensors.items() if tensor is not None}
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        initializers[name] = initializers.pop(name)
    if not single_file:
        data, threshold = f"{path.name}.data", EXTERNAL_DATA_THRESHOLD
        ir.save(model, path, external_data=data, size_threshold_bytes=threshold, alignment=EXTERNAL_DATA_ALIGNMENT)
        return
    size = sum(sizes.values())
    if size > SINGLE_FILE_MAX:
        raise ValueError(
            f"the weights of {path.name} take {size_text(size)}, and one ONNX file holds {size_text(SINGLE_FILE_MAX)} "
            "at most; leave --single_file out"
        )
    ir.save(ir.external_data.load_to_model(model), path)


def data_bytes(sizes: Iterable[int]) -> int:
    """Bytes of the data file that save_model writes for tensors of these sizes."""
    offset = 0
    for size in sorted(sizes, reverse=True):
        if size > EXTERNAL_DATA_ALIGNED_FROM:
            offset += -offset % EXTERNAL_DATA_ALIGNMENT  # up to the next boundary
        offset += size
    return offset


def read_proto(path: Path) -> onnx.ModelProto:
    """The graph at `path`; its tensors in a data file give the absolute path of that file.

    So onnx_ir maps them where the file is a symbolic link, as in the cache of the Hub, or has several hard links, as in
    a folder for several runtimes; relative to a folder it reads neither, since both can be an attack. Raises ValueError
    if it is not an ONNX model, or if its weights are outside its folder.
    """
    try:
        proto = onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise ValueError(f"{path} is not an ONNX model ({error}); export it again") from None
    for tensor in filter(uses_external_data, proto.graph.initializer):
        for entry in tensor.external_data:
            if entry.key == "location":
                if Path(entry.value).name != entry.value:
                    raise ValueError(f"{path} has weights outside its folder, in {entry.value}; export it again")
                entry.value = os.path.realpath(path.parent / entry.value)
    return proto


def model_of(proto: onnx.ModelProto) -> ir.Model:
    """The model of a graph of read_proto; it may use ONNX Runtime's own operators."""
    model = ir.from_proto(proto)
    model.graph.opset_imports.setdefault(MICROSOFT, 1)
    return model


def load(path: Path) -> ir.Model:
    """The model at `path`, with its large tensors left on disk. Raises ValueError as read_proto does."""
    return model_of(read_proto(path))


def share_equal_graphs(folders: Iterable[Path]) -> None:
    """Store graphs and data files of several folders only once, under several names, where the manifests say that they
    are equal. Where the file system has no hard links, they stay copies."""
    first: dict[str, Path] = {}
    for folder in folders:
        files = read_manifest(folder)[FILES]
        for path in sorted(folder.glob("*.onnx*")):
            same = first.setdefault(files[path.name]["sha256"], path)
            if same is not path:
                path.unlink()
                link(same, path)


def minimum_runtime(graphs: Iterable[Path]) -> str:
    """The oldest ONNX Runtime that runs all of these graphs, such as `1.17`. Raises ValueError as read_proto does."""
    needed = []
    for path in graphs:
        proto = read_proto(path)
        needed += [OPSETS[opset.version] for opset in proto.opset_import if opset.domain in ("", "ai.onnx")]
        for node in proto.graph.node:
            if (node.op_type, node.domain) == ("MatMulNBits", MICROSOFT):
                bits = next((attribute.i for attribute in node.attribute if attribute.name == "bits"), 4)
                needed.append(MATMUL_NBITS[bits])
        if any(tensor.data_type in INT4_TYPES for tensor in proto.graph.initializer):
            needed.append(INT4)
    major, minor = max(needed)
    return f"{major}.{minor}"
