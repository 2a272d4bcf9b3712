"""8-bit weights for the graphs that run once for each token: the decoder and the joint."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from common.cli import CheckError
from common.contract import MICROSOFT, Graph
from common.onnx_io import load, save_model
from common.quantize.blocks import BLOCK_SIZES, RTN
from common.quantize.fidelity import token_sqnr
from common.quantize.methods import Format, OptimizeOptions
from common.quantize.rewrite import Stored, quantizable, quantize_weights
from common.quantize.rounding import HIGH_BITS, quantize_columns, relative_error

# Measured on the tiny checkpoint: decoder 40 dB, joint 41 dB.
MIN_TOKEN_SQNR_DB = 20.0
# The joint multiplies one row at a time, which mostly means reading weights: MatMulNBits of 8 bits takes 0.26 ms a
# token (0.38 ms with block 32), DynamicQuantizeMatMul 0.39 ms, float32 0.75 ms.
JOINT_BLOCK = 128


def quantize_token_graphs(
    source: Path, target: Path, graphs: Iterable[Graph], vocabulary: int, options: OptimizeOptions
) -> tuple[dict[str, float], dict[str, dict[str, Stored]]]:
    """Write the graphs of folder `source` with 8-bit weights into `target`. Returns, by the name of the graph, its SQNR
    on noise in dB, and how its weights were stored.

    Raises CheckError where an SQNR is so low that something must be broken.
    """
    sqnr_db: dict[str, float] = {}
    stored: dict[str, dict[str, Stored]] = {}
    for graph in graphs:
        model = load(source / graph.file)
        embeddings = quantize_embeddings(model)
        lstms = quantize_lstms(model, Format(HIGH_BITS, full_range=options.full_range))
        plan = {}
        for name, weight in quantizable(model).items():
            rows, _ = weight.shape
            # In smaller blocks where a column is shorter and would be padded with zeros.
            plan[name] = Format(HIGH_BITS, next(size for size in BLOCK_SIZES if size >= min(rows, JOINT_BLOCK)))
        products = quantize_weights(model, plan, RTN, OptimizeOptions(), {})
        stored[graph.name] = {**embeddings, **lstms, **products}
        save_model(model, target / graph.file, single_file=True)
        ratio = sqnr_db[graph.name] = token_sqnr(source, target, graph, vocabulary)
        if not ratio >= MIN_TOKEN_SQNR_DB:
            raise CheckError(
                f"the 8-bit {graph.name} is broken: it has an SQNR of {ratio:.1f} dB, and needs "
                f"{MIN_TOKEN_SQNR_DB:.0f} dB or more"
            )
    return sqnr_db, stored


def quantize_embeddings(model: ir.Model) -> dict[str, Stored]:
    """Replace each lookup of a row in a float32 table by one in codes of 8 bits, times the scale of that row, in place.
    Returns how each table was stored, by name. At full size a table takes 5 MB instead of 21 MB."""
    stored: dict[str, Stored] = {}
    form = Format(HIGH_BITS, full_range=True)  # rows are looked up, and not multiplied as integers
    for name, table in list(model.graph.initializers.items()):
        if table.const_value is None or table.const_value.dtype != ir.DataType.FLOAT:
            continue
        lookups = [use.node for use in table.uses() if use.node.op_type == "Gather" and use.idx == 0]
        for node in lookups:
            rows = quantize_columns(table.const_value.numpy().T, form.bits, full_range=form.full_range)
            stored[name] = Stored(form, rows.error)
            parts = {"codes": np.ascontiguousarray(rows.codes.T), "scales": rows.scales[:, None]}
            tape = Tape()
            taken, scale = (tape.op("Gather", [part, node.inputs[1]]) for part in _added(model.graph, name, parts))
            row = tape.op("Mul", [tape.op("Cast", [taken], {"to": ir.DataType.FLOAT}), scale])
            ir.convenience.replace_nodes_and_values(model.graph, node, [node], tape.nodes, node.outputs, [row])
    return stored


def quantize_lstms(model: ir.Model, form: Format) -> dict[str, Stored]:
    """Replace each LSTM by a DynamicQuantizeLSTM, in place, with a scale for each gate of each unit. Returns how each
    weight was stored, by name.

    Activations, here of one token, share one scale. A layer reads a quarter of the bytes (0.07 ms instead of 0.42 ms).
    """
    stored: dict[str, Stored] = {}
    for node in [node for node in model.graph if (node.op_type, node.domain) == ("LSTM", "")]:
        inputs = [*node.inputs, *[None] * 8][:8]  # x, two matrices, bias, lengths, h, c, peepholes
        for place in (1, 2):
            matrix = node.inputs[place]
            assert matrix is not None
            assert matrix.name is not None
            assert matrix.const_value is not None
            weight = matrix.const_value.numpy().transpose(0, 2, 1)  # [directions, width, gates]
            directions = [quantize_columns(one, form.bits, full_range=form.full_range) for one in weight]
            codes = np.stack([one.codes for one in directions])
            scales = np.stack([one.scales for one in directions])  # [directions, gates]
            stored[matrix.name] = Stored(form, relative_error(weight, codes * scales[:, None]))
            parts = {"codes": codes, "scales": scales, "zero_points": np.zeros(scales.shape, np.int8)}
            inputs[place], *others = _added(model.graph, matrix.name, parts)
            inputs += others
        new = ir.Node(MICROSOFT, "DynamicQuantizeLSTM", inputs, node.attributes.values(), num_outputs=3, name=node.name)
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], [new], node.outputs, new.outputs)
    return stored


def _added(graph: ir.Graph, name: str, parts: Mapping[str, np.ndarray]) -> list[ir.Value]:
    """New initializers of `graph`: the parts of a weight."""
    return [Tape(graph).initializer(ir.tensor(array, name=f"{name}.{part}")) for part, array in parts.items()]
