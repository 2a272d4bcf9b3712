"""Weights W [K, N] that are ternary in groups: in each column, groups of 128 rows hold only −m, 0 and m, each with its
own m. Checkpoints such as parakeet-redux are trained so, and their export to float32 keeps every value.

Such weights are found by their values, and stored in 2 bits: exactly in blocks of MatMulNBits, and for integer products
with m rounded to 8 bits. They are not scaled or fitted, since a factor for a row, or an error that later rows make up
for, would leave groups with more values.

The matrices of relative positions have groups of 64 rows: the export takes sines and cosines apart, which alternate in
the checkpoint (layers.py, RelativeAttention).
"""

import numpy as np

GROUPS = (128, 64)  # rows that share m; the largest that a weight fits is used


def ternary_group(weight: np.ndarray) -> int | None:
    """The size of the groups in which the weight [K, N] is ternary; None where it is not."""
    return next((group for group in GROUPS if _is_ternary(weight, group)), None)


def _is_ternary(weight: np.ndarray, group: int) -> bool:
    """Whether K is a multiple of `group`, and each group of rows holds at most one magnitude but 0 in each column. Most
    weights that are not ternary are told by their first group, and the rest of them is not read."""
    rows = len(weight)
    return rows % group == 0 and all(_holds_one(weight[start : start + group]) for start in range(0, rows, group))


def _holds_one(rows: np.ndarray) -> bool:
    size = np.abs(rows)
    return bool(((size == size.max(axis=0)) | (size == 0)).all())


def signs_and_sizes(weight: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """A weight [K, N] of any type that is ternary in groups of `group` rows → −1, 0 and 1 as int8 [K/group, group, N],
    and m [K/group, N]."""
    groups = weight.reshape(-1, group, weight.shape[1])
    return np.sign(groups).astype(np.int8), np.abs(groups).max(axis=1)
