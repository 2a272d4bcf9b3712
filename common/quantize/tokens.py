"""8-bit weights for the graphs that run once for each token: the decoder and the joint."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from common.cli import CheckError
from common.contract import MICROSOFT, Graph
from common.onnx_io import input_of, load, name_of, save_model, shape_of, shared_initializer, tensor_of
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
        for name, (product, *_) in quantizable(model).items():
            rows, _ = shape_of(input_of(product, 1))
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
    for node in list(model.graph):
        table = input_of(node, 0) if node.op_type == "Gather" else None
        if table is None or not table.is_initializer() or tensor_of(table).dtype != ir.DataType.FLOAT:
            continue
        name, tape = name_of(table), Tape()
        rows = quantize_columns(tensor_of(table).numpy().T, form.bits, full_range=form.full_range)
        codes = shared_initializer(model.graph, f"{name}.codes", np.ascontiguousarray(rows.codes.T))
        scales = shared_initializer(model.graph, f"{name}.scales", rows.scales[:, None])
        taken, scale = (tape.op("Gather", [part, input_of(node, 1)]) for part in (codes, scales))
        row = tape.op("Mul", [tape.op("Cast", [taken], {"to": ir.DataType.FLOAT}), scale])
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], tape.nodes, node.outputs, [row])
        stored[name] = Stored(form, rows.error)
    return stored


def quantize_lstms(model: ir.Model, form: Format) -> dict[str, Stored]:
    """Replace each LSTM by a DynamicQuantizeLSTM, in place, with a scale for each gate of each unit. Returns how each
    weight was stored, by name.

    Activations, here of one token, share one scale. A layer reads a quarter of the bytes (0.07 ms instead of 0.42 ms).
    """
    stored: dict[str, Stored] = {}
    for node in list(model.graph):
        if (node.op_type, node.domain) != ("LSTM", ""):
            continue
        x, _, _, *others = (*node.inputs, *[None] * 8)[:8]  # others: bias, lengths, h, c, peepholes
        w, r = input_of(node, 1), input_of(node, 2)
        w_codes, *w_scales = _lstm_parameters(model.graph, w, form, stored)
        r_codes, *r_scales = _lstm_parameters(model.graph, r, form, stored)
        inputs = [x, w_codes, r_codes, *others, *w_scales, *r_scales]
        new = ir.Node(MICROSOFT, "DynamicQuantizeLSTM", inputs, node.attributes.values(), num_outputs=3, name=node.name)
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], [new], node.outputs, new.outputs)
    return stored


def _lstm_parameters(graph: ir.Graph, matrix: ir.Value, form: Format, stored: dict[str, Stored]) -> list[ir.Value]:
    """[directions, gates, width] → codes [directions, width, gates], scales and zero points [directions, gates]; also
    adds to `stored`, by name, how the matrix was stored."""
    weight = tensor_of(matrix).numpy().transpose(0, 2, 1)
    directions = [quantize_columns(one, form.bits, full_range=form.full_range) for one in weight]
    codes = np.stack([one.codes for one in directions])
    scales = np.stack([one.scales for one in directions])
    name = name_of(matrix)
    stored[name] = Stored(form, relative_error(weight, codes * scales[:, None]))
    parts = {"codes": codes, "scales": scales, "zero_points": np.zeros(scales.shape, np.int8)}
    return [shared_initializer(graph, f"{name}.{part}", array) for part, array in parts.items()]
