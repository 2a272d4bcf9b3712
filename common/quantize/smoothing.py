"""SmoothQuant-style channel scaling (Xiao et al. 2022; AWQ, Lin et al. 2023), before weights are quantized.

Each channel of a LayerNormalization's output is divided by a factor, and the row of each weight that this channel goes
into is multiplied by it, so that channels differ less in magnitude. The function stays the same, and nothing is added
to the graph: the factors go into the normalization's own scale and bias.
"""

from collections.abc import Collection, Mapping

import numpy as np
import onnx_ir as ir

from common.onnx_io import (
    add_initializer,
    computed_from,
    input_of,
    name_of,
    release,
    tensor_of,
)

# Where the scale is among the inputs, by operator; the bias follows it.
SCALE_INPUT = {"LayerNormalization": 1, "SkipLayerNormalization": 2}
MIN_FACTOR = 1e-2  # of the largest: a channel that is silent on this speech may not be silent on other speech
# How far the magnitudes of a channel and of the weight rows that it goes into are brought together: half way, where
# they meet, as in SmoothQuant.
SMOOTHING = 0.5
MIN_ROW_POWER = 1e-6  # of the mean: a row of zeros would have an infinite factor


def row_factors(power: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Σ x² of each input of products, and Σ W² of the row that it goes into, [K] → the factors of the rows, [K, 1]: the
    root mean square of the input over that of the row, to the power SMOOTHING, scaled so that the largest factor is 1.

    If a checkpoint has a channel times s and its rows divided by s, the factors undo that, whatever s is.
    """
    ratios = power / np.maximum(rows, MIN_ROW_POWER * np.mean(rows) + 1e-30)
    factors = (ratios / max(ratios.max(), 1e-30)) ** (SMOOTHING / 2)
    return np.asarray(np.maximum(factors, MIN_FACTOR), np.float32)[:, None]


def row_powers(model: ir.Model, weights: Collection[str]) -> dict[str, np.ndarray]:
    """Σ W² of each row, [K], summed over all weights that follow the same normalization; for those that follow one."""
    powers: dict[str, np.ndarray] = {}
    for names in normalized_inputs(model, weights).values():
        parts = [computed_from(model.graph.initializers[name], _row_power) for name in names]
        powers |= dict.fromkeys(names, np.sum(parts, axis=0))
    return powers


def _row_power(weight: np.ndarray) -> np.ndarray:
    return np.asarray(np.einsum("kn,kn->k", weight, weight))


def factors_without_speech(model: ir.Model, weights: Collection[str]) -> dict[str, np.ndarray]:
    """Row factors [K, 1] of the weights that follow a normalization, from the parameters of the graph alone: a channel
    with scale γ and bias β has a mean square of about γ² + β²."""
    rows = row_powers(model, weights)
    factors: dict[str, np.ndarray] = {}
    for node, names in normalized_inputs(model, weights).items():
        parameters = [tensor_of(value).numpy() for _, value in parameters_of(node)]
        factors |= dict.fromkeys(names, row_factors(np.sum(np.square(parameters), axis=0), rows[names[0]]))
    return factors


def normalized_inputs(model: ir.Model, weights: Collection[str]) -> dict[ir.Node, list[str]]:
    """Normalizations whose output goes only into products with some of the weights → those weights."""
    nodes = (node for node in model.graph if node.op_type in SCALE_INPUT)
    multiplied = {node: _multiplied_by(node.outputs[0], weights) for node in nodes}
    return {node: names for node, names in multiplied.items() if names}


def _multiplied_by(x: ir.Value, weights: Collection[str]) -> list[str]:
    """The weights that multiply x and nothing else; none if x is used in any other way."""
    names: list[str] = []
    for use in x.uses():
        behind = _weights_of_use(use.node, weights)
        if not behind:
            return []
        names += behind
    return [] if x.is_graph_output() else names


def _weights_of_use(node: ir.Node, weights: Collection[str]) -> list[str]:
    if node.op_type == "Transpose" and _keeps_channels(node):
        return _multiplied_by(node.outputs[0], weights)
    if node.op_type != "MatMul":
        return []
    weight = input_of(node, 1)
    return [name_of(weight)] if weight.name in weights and len(weight.uses()) == 1 else []


def _keeps_channels(transpose: ir.Node) -> bool:
    axes = transpose.attributes["perm"].as_ints()
    return axes[-1] == len(axes) - 1


def fold(model: ir.Model, factors: Mapping[str, np.ndarray]) -> None:
    """Divide the inputs of the products with these weights by the row factors and multiply the weights by them, in
    place: the function stays the same. A weight is multiplied each time that it is read, and the result is not kept.

    factors: weight name → [K, 1]; weights that follow the same normalization have equal factors.
    Raises ValueError where a weight has no normalization before it: the factors were computed from another graph.
    """
    normalized = normalized_inputs(model, factors)
    left = set(factors) - {name for names in normalized.values() for name in names}
    if left:
        raise ValueError(f"expected a normalization before {min(left)}, as in the graph that was calibrated, got none")
    for node, names in normalized.items():
        for i, value in parameters_of(node):
            array = tensor_of(value).numpy() / factors[names[0]][:, 0]
            if len(value.uses()) > 1:  # another normalization has the same numbers
                copy = add_initializer(model.graph, ir.tensor(array, name=f"{names[0]}.smoothed.{i}"))
                node.replace_input_with(i, copy)
            else:
                value.const_value = ir.tensor(array, name=value.name)
        for name in names:
            weight = model.graph.initializers[name]
            weight.const_value = _times(tensor_of(weight), factors[name])


def parameters_of(node: ir.Node) -> list[tuple[int, ir.Value]]:
    """Scale and bias of a normalization, each with its place among the inputs; it may have no bias."""
    first = SCALE_INPUT[node.op_type]
    return [(i, value) for i, value in enumerate(node.inputs[first : first + 2], first) if value is not None]


def _times(tensor: ir.TensorProtocol, factors: np.ndarray) -> ir.LazyTensor:
    """The tensor times `factors`, computed when it is read; its data file is mapped only meanwhile."""

    def product() -> ir.TensorProtocol:
        try:
            return ir.tensor(tensor.numpy() * factors, name=tensor.name)
        finally:
            release(tensor)

    return ir.LazyTensor(product, tensor.dtype, ir.Shape(tensor.shape.numpy()), name=tensor.name)
