"""int8 and int4: matrices in codes and scales (`lathe.quantize`, `lathe quantize`)."""

from __future__ import annotations

from lathe.model.codes import Codes
from lathe.quantization.layer import Quantized, QuantizedEmbedding, QuantizedLinear

__all__ = ["Codes", "Quantized", "QuantizedEmbedding", "QuantizedLinear"]
