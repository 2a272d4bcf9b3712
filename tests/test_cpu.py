"""Whether this CPU adds 8-bit products exactly, and what the user is told where it does not."""

import platform
import sys
from pathlib import Path

import numpy as np
import pytest

from common.quantize import fidelity
from common.quantize.fidelity import exact_bits, reduce_range_advice
from common.quantize.methods import OptimizeOptions
from tests.helpers import printed_by

INT8 = OptimizeOptions(quant_method="int8")
INT8_TOKENS = OptimizeOptions(decoder_joint_precision="int8")
EXACT_SUM = 64 * 255 * 127
CUT_OFF_SUM = 32 * 32767  # pairs of products, each cut off at the largest 16-bit number


class Session:
    """A session of a CPU on which every sum of the product is `total`."""

    def __init__(self, total: int) -> None:
        self.total = total

    def run(self, names, inputs) -> list[np.ndarray]:
        return [np.full((8, 64), self.total, np.int32)]


@pytest.fixture(params=[EXACT_SUM, CUT_OFF_SUM], ids=["with VNNI", "without VNNI"])
def bits(request, monkeypatch) -> int:
    """The number of bits that is exact on each kind of CPU, which is told by the sums of its products."""
    monkeypatch.setattr(fidelity, "open_session", lambda model: Session(request.param))
    return 8 if request.param == EXACT_SUM else 7


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="reads the flags that Linux lists for x86"
)
def test_the_product_agrees_with_the_flags_of_this_cpu():
    flags = Path("/proc/cpuinfo").read_text().split()
    assert exact_bits() == (8 if {"avx512_vnni", "avx_vnni"} & set(flags) else 7)


@pytest.mark.parametrize("options", [INT8, INT8_TOKENS], ids=["encoder", "decoder and joint"])
def test_8_bit_weights_are_warned_of_where_sums_overflow(options, bits):
    advice = reduce_range_advice(options)
    assert exact_bits() == bits
    if bits == 8:
        assert advice is None
    else:
        assert "add --reduce_range" in advice
        assert "CPUs with VNNI are exact" in advice


@pytest.mark.parametrize(
    "options",
    [
        OptimizeOptions(),
        OptimizeOptions(quant_method="int8", reduce_range=True),
        OptimizeOptions(quant_method="int8", weight_bits=4),
        OptimizeOptions(quant_method="int8", skip_quantization=True),
    ],
    ids=["4 bits", "7 bits", "int8 in 4 bits", "float32"],
)
def test_other_weights_are_not_warned_of(options, bits):
    assert reduce_range_advice(options) is None


@pytest.mark.slow
def test_the_script_warns_at_the_start_and_repeats_it_at_the_end(optimized):
    folder = optimized("--quant_method", "int8")
    assert printed_by(folder, "errors").count("warning: this CPU has no VNNI") == (exact_bits() == 7)
    assert printed_by(folder).count("this CPU has no VNNI") == (exact_bits() == 7)
