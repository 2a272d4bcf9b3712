"""Making an encoder small and fast. Importing this package registers the methods, in the order of the help."""

from common.quantize.blocks import HQQ, K_QUANT_MIXED, RTN
from common.quantize.int8 import INT8
from common.quantize.methods import METHODS, QuantMethod, register

register(RTN)
register(K_QUANT_MIXED)
register(HQQ)
register(INT8)

__all__ = ["HQQ", "INT8", "K_QUANT_MIXED", "METHODS", "RTN", "QuantMethod", "register"]
