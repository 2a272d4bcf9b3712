"""Channels made more alike before they are quantized: a LayerNormalization's output is divided by a factor a channel,
and the rows of the weights it goes into are multiplied by them (SmoothQuant, Xiao et al. 2022; AWQ, Lin et al. 2023).

The function is the same and nothing more is computed: the factors go into the normalization's own scale and bias.
"""

from collections.abc import Collection, Mapping

import numpy as np
import onnx_ir as ir

# Where the scale is among the inputs, by operator; the bias follows it.
SCALE_INPUT = {"LayerNormalization": 1, "SkipLayerNormalization": 2}
MIN_FACTOR = 1e-2  # of the largest: a channel that is silent on this speech may not be on another


def row_factors(power: np.ndarray, exponent: float) -> np.ndarray:
    """Σ x² of each input of a product, [K] → what its rows are multiplied by, [K, 1]: root mean squares to `exponent`,
    1 for the largest."""
    factors = (power / max(power.max(), 1e-30)) ** (exponent / 2)
    return np.maximum(factors, MIN_FACTOR).astype(np.float32)[:, None]


def normalized_inputs(model: ir.Model, weights: Collection[str]) -> dict[ir.Node, list[str]]:
    """Normalizations whose output goes into products with some of the weights and nowhere else → those weights."""
    nodes = (node for node in model.graph if node.op_type in SCALE_INPUT)
    found = {node: _multiplied_by(node.outputs[0], weights) for node in nodes}
    return {node: names for node, names in found.items() if names}


def _multiplied_by(x: ir.Value, weights: Collection[str]) -> list[str]:
    """The weights that x, and nothing else, is multiplied by; none if anything else is done with it."""
    names = []
    for use in x.uses():
        node = use.node
        if node.op_type == "Transpose" and _keeps_channels(node):
            behind = _multiplied_by(node.outputs[0], weights)
        elif node.op_type == "MatMul" and node.inputs[1].name in weights and len(node.inputs[1].uses()) == 1:
            behind = [node.inputs[1].name]
        else:
            behind = []
        if not behind:
            return []
        names += behind
    return [] if x.is_graph_output() else names


def _keeps_channels(transpose: ir.Node) -> bool:
    axes = transpose.attributes["perm"].as_ints()
    return axes[-1] == len(axes) - 1


def fold(model: ir.Model, factors: Mapping[str, np.ndarray]) -> None:
    """Divide what goes into the products with these weights by their row factors, in place.

    Raises ValueError where it cannot be: the graph is another than the one they were found in.
    """
    found = normalized_inputs(model, factors)
    left = set(factors) - {name for names in found.values() for name in names}
    if left:
        raise ValueError(f"wanted a normalization before {min(left)}, as in the graph that was calibrated, found none")
    for node, names in found.items():
        first = SCALE_INPUT[node.op_type]
        for i, value in enumerate(node.inputs[first : first + 2], first):
            if value is None:  # no bias
                continue
            array = value.const_value.numpy() / factors[names[0]][:, 0]
            name = f"{names[0]}.smoothed.{i}"
            new = ir.Value(name=name, shape=value.shape, type=value.type, const_value=ir.tensor(array, name=name))
            model.graph.register_initializer(new)
            node.replace_input_with(i, new)
            if not value.uses():
                del model.graph.initializers[value.name]
