"""SmoothQuant-style channel scaling (Xiao et al. 2022; AWQ, Lin et al. 2023), before weights are quantized.

A LayerNormalization's output is divided by a factor for each channel, and the rows of the weights it goes into are
multiplied by them, so that channels differ less in magnitude. The function is the same and nothing more is computed:
the factors go into the normalization's own scale and bias.
"""

from collections.abc import Collection, Mapping

import numpy as np
import onnx_ir as ir

from common.folder.onnx_graph import add_initializer, input_of, name_of, remove_if_unused, tensor_of

# Where the scale is among the inputs, by operator; the bias follows it.
SCALE_INPUT = {"LayerNormalization": 1, "SkipLayerNormalization": 2}
MIN_FACTOR = 1e-2  # of the largest: a channel that is silent on this speech may not be on another


def row_factors(power: np.ndarray, exponent: float) -> np.ndarray:
    """Σ x² of each input of a product, [K] → what its rows are multiplied by, [K, 1]: root mean squares to `exponent`,
    1 for the largest."""
    factors = (power / max(power.max(), 1e-30)) ** (exponent / 2)
    return np.asarray(np.maximum(factors, MIN_FACTOR), np.float32)[:, None]


def normalized_inputs(model: ir.Model, weights: Collection[str]) -> dict[ir.Node, list[str]]:
    """Normalizations whose output goes into products with some of the weights and nowhere else → those weights."""
    nodes = (node for node in model.graph if node.op_type in SCALE_INPUT)
    multiplied = {node: _multiplied_by(node.outputs[0], weights) for node in nodes}
    return {node: names for node, names in multiplied.items() if names}


def _multiplied_by(x: ir.Value, weights: Collection[str]) -> list[str]:
    """The weights that x, and nothing else, is multiplied by; none if anything else is done with it."""
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
    """Divide what goes into the products with these weights by their row factors, in place.

    factors: weight name → [K, 1]; weights behind one normalization have equal ones.
    Raises ValueError where a weight has no normalization before it: the graph is another than the one that was
    calibrated.
    """
    normalized = normalized_inputs(model, factors)
    left = set(factors) - {name for names in normalized.values() for name in names}
    if left:
        raise ValueError(f"expected a normalization before {min(left)}, as in the graph that was calibrated, got none")
    for node, names in normalized.items():
        first = SCALE_INPUT[node.op_type]
        for i, value in enumerate(node.inputs[first : first + 2], first):
            if value is None:  # no bias
                continue
            array = tensor_of(value).numpy() / factors[names[0]][:, 0]
            scaled = add_initializer(model.graph, ir.tensor(array, name=f"{names[0]}.smoothed.{i}"))
            node.replace_input_with(i, scaled)
            remove_if_unused(model.graph, value)
