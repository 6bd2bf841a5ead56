if not __name__.startswith("adaptax."):
  raise ImportError(
    "import adaptax.layers, not layers: a second copy would define every class twice"
  )

from adaptax.layers import adapters
from adaptax.layers.decoder import Attend, Decoder, DecoderConfig
from adaptax.layers.dropout import reseed
from adaptax.layers.linear import is_linear, kernel_of, with_kernel
from adaptax.layers.quantized import QuantizedLinear, quantize
from adaptax.layers.rope import RopeScaling
from adaptax.layers.stack import apply_stack, stack

__all__ = [
  "Attend",
  "Decoder",
  "DecoderConfig",
  "QuantizedLinear",
  "RopeScaling",
  "adapters",
  "apply_stack",
  "is_linear",
  "kernel_of",
  "quantize",
  "reseed",
  "stack",
  "with_kernel",
]
