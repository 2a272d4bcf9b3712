"""Whether this CPU adds products of 8-bit integers exactly.

ONNX Runtime multiplies uint8 activations by int8 weights. On x86 without VNNI it uses VPMADDUBSW, which adds each pair
of products in 16 bits and cuts larger sums off at 32767: 2 · 255 · 127 is 64770, and 2 · 255 · 63, with weights of 7
bits, 32130.
"""

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from common.quantize.options import OptimizeOptions
from common.run.ort import open_session

LARGEST_UINT8, LARGEST_INT8 = 255, 127
SIZE = 64  # rows of the product: more than any vector register holds, so that no slower code for a remainder runs


def exact_bits() -> int:
    """How many bits int8 weights may have so that this CPU sums their products exactly: 8, or 7 without VNNI.

    It is found by running one product of the largest numbers.
    """
    weight = numpy_helper.from_array(np.full((SIZE, SIZE), LARGEST_INT8, np.int8), "w")
    x = helper.make_tensor_value_info("x", TensorProto.UINT8, [8, SIZE])
    y = helper.make_tensor_value_info("y", TensorProto.INT32, [8, SIZE])
    graph = helper.make_graph([helper.make_node("MatMulInteger", ["x", "w"], ["y"])], "sums", [x], [y], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = open_session(model.SerializeToString())
    sums = session.run(None, {"x": np.full((8, SIZE), LARGEST_UINT8, np.uint8)})[0]
    return 8 if (sums == SIZE * LARGEST_UINT8 * LARGEST_INT8).all() else 7


def reduce_range_advice(options: OptimizeOptions) -> str | None:
    """A line for the user where 8-bit weights are asked for and this CPU does not sum their products exactly."""
    if not options.has_8_bit_products or options.reduce_range or exact_bits() == 8:
        return None
    return (
        "this CPU has no VNNI, so sums of 8-bit products overflow, which makes the model less exact here: add "
        "--reduce_range if it is to run on such a CPU; CPUs with VNNI are exact without"
    )
