"""ONNX Runtime's `conformer` fusions: each residual Add and the normalization after it become one operator.

SkipLayerNormalization saves kernel launches on CUDA. On the CPU it takes 0.7 to 1 ms longer than Add and
LayerNormalization (onnxruntime 1.32, [250, 1024]); there are 96 of them, 6 to 10 % of a 4-bit encoder's time.
"""

from collections import Counter
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data

from common.contract import MICROSOFT
from common.onnx_io import model_of, read_proto


def fuse(path: Path) -> tuple[ir.Model, Counter[str]]:
    """The fused form of the model at `path`; also the number of fused nodes by operator.

    The fusions read biases, so vectors are loaded, but matrices are not. Symbolic shape inference is off: it takes more
    than a second a layer, and shows only that the Adds do not broadcast; if one did, `fidelity.compare` would notice.
    """
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.optimizer import optimize_model

    proto = read_proto(path)
    for tensor in proto.graph.initializer:
        if uses_external_data(tensor) and len(tensor.dims) == 1:
            load_external_data_for_tensor(tensor, str(path.parent))
            tensor.data_location = onnx.TensorProto.DEFAULT
            del tensor.external_data[:]
    options = FusionOptions("conformer")
    options.enable_shape_inference = False
    options.enable_attention = False  # its patterns are of attention with absolute positions
    # Patterns that the exported encoder does not have; the search for them takes three quarters of the time.
    options.enable_rotary_embeddings = options.enable_embed_layer_norm = options.enable_qordered_matmul = False
    options.enable_gelu = options.enable_bias_gelu = False
    model = model_of(optimize_model(proto, "conformer", opt_level=0, optimization_options=options).model, path.parent)
    return model, Counter(node.op_type for node in model.graph if node.domain == MICROSOFT)
