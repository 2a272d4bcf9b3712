"""The oldest ONNX Runtime whose CPU provider runs a graph, which depends on its opset, operators and types.

docs/runtimes.md has the versions in which graphs of each method were run.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx

from common.contract import MICROSOFT
from common.folder.onnx_files import read_proto

MINIMUM_RUNTIME = "minimum_onnxruntime"  # in manifest.json
Version = tuple[int, int]
# By opset of ONNX's own operators (onnxruntime.ai/docs/reference/compatibility.html). The operators of ONNX Runtime
# that are used here are older, except for the product with weights of a few bits.
OPSETS: dict[int, Version] = {17: (1, 12), 18: (1, 14), 19: (1, 15), 20: (1, 17), 21: (1, 18)}
MATMUL_NBITS: dict[int, Version] = {4: (1, 17), 8: (1, 22)}  # by bits
INT4: Version = (1, 23)  # 1.22 has no Cast of 4-bit integers
INT4_TYPES = (onnx.TensorProto.INT4, onnx.TensorProto.UINT4)


def minimum_runtime(graphs: Iterable[Path]) -> str:
    """The oldest version that runs all of these graphs, such as `1.17`.

    Raises ValueError for an opset or a number of bits that is not in the tables, and as read_proto does.
    """
    major, minor = max(version for path in graphs for version in _needed(read_proto(path), path))
    return f"{major}.{minor}"


def _needed(proto: onnx.ModelProto, path: Path) -> Iterator[Version]:
    for opset in proto.opset_import:
        if opset.domain in ("", "ai.onnx"):
            yield _known(OPSETS, opset.version, f"opset of {path}")
    for node in proto.graph.node:
        if (node.op_type, node.domain) == ("MatMulNBits", MICROSOFT):
            bits = next((attribute.i for attribute in node.attribute if attribute.name == "bits"), 4)
            yield _known(MATMUL_NBITS, bits, f"bits of {node.name} in {path}")
    if any(tensor.data_type in INT4_TYPES for tensor in proto.graph.initializer):
        yield INT4


def _known(table: dict[int, Version], key: int, what: str) -> Version:
    if key not in table:
        raise ValueError(f"expected {', '.join(map(str, table))} as the {what}, got {key}; add it to {__name__}")
    return table[key]
