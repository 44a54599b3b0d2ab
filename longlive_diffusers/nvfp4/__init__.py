"""Four-bit weights, activations, caches and training. Start with `format.py`, which explains the format."""

from .format import NVFP4Tensor, dequantize, quantize
from .hadamard import random_hadamard
from .linear import NVFP4Linear, nvfp4_layers
from .matmul import swizzle, unswizzle
from .quantizer import NVFP4Config, NVFP4Quantizer, quantize_model


__all__ = [
    "NVFP4Config",
    "NVFP4Linear",
    "NVFP4Quantizer",
    "NVFP4Tensor",
    "dequantize",
    "nvfp4_layers",
    "quantize",
    "quantize_model",
    "random_hadamard",
    "swizzle",
    "unswizzle",
]
