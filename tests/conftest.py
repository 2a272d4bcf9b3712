"""What the tests share: the bundled checkpoint, exported once a session by the scripts themselves."""

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

import export_parakeet_to_onnx
import export_tokenizer

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = ROOT / "samples"
TINY = SAMPLES / "parakeet-tdt-tiny.nemo"


def exact_bits() -> int:
    """How many bits int8 weights may have so that this CPU sums their products exactly: 8, or 7 where it adds pairs of
    products in 16 bits and cuts off large sums (x86 without VNNI)."""
    weight = numpy_helper.from_array(np.full((64, 64), 127, np.int8), "w")
    x, y = (
        helper.make_tensor_value_info(*one)
        for one in (("x", TensorProto.UINT8, [8, 64]), ("y", TensorProto.INT32, [8, 64]))
    )
    graph = helper.make_graph([helper.make_node("MatMulInteger", ["x", "w"], ["y"])], "sums", [x], [y], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    sums = ort.InferenceSession(model.SerializeToString()).run(None, {"x": np.full((8, 64), 255, np.uint8)})[0]
    return 8 if (sums == 64 * 255 * 127).all() else 7


BITS = exact_bits()
REDUCED = () if BITS == 8 else ("--reduce_range",)
BIT_DB = 6 * (8 - BITS)  # of error that a missing bit is worth


@pytest.fixture(scope="session")
def tiny_model():
    """The bundled checkpoint in NeMo."""
    from common.console import quiet_libraries
    from common.model import load_model

    quiet_libraries(False)
    return load_model(TINY)


@pytest.fixture(scope="session")
def tiny_export(tmp_path_factory) -> Path:
    """The bundled checkpoint exported and verified, with its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny") / "onnx_models"
    assert export_parakeet_to_onnx.main(["--model_name", str(TINY), "--output_dir", str(folder)]) == 0
    assert export_tokenizer.main(["--model_name", str(TINY), "--output_dir", str(folder)]) == 0
    return folder
