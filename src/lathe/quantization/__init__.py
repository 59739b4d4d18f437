"""int8 and int4: matrices in codes and scales (`lathe.quantize`, `lathe quantize`).

(The package is not called `quantize` because `lathe.quantize` is the function.)
"""

from __future__ import annotations

from lathe.model.codes import Codes
from lathe.model.quantized import Quantized, QuantizedEmbedding, QuantizedLinear
from lathe.quantization.place import codes_of, install, is_quantized

__all__ = ["Codes", "Quantized", "QuantizedEmbedding", "QuantizedLinear", "codes_of", "install", "is_quantized"]
