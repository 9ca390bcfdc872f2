"""Whether kernels run in Triton's interpreter, which knows no assembly and multiplies the bits of bfloat16."""

import triton.language as tl
from triton import knobs

IS_INTERPRETED = tl.constexpr(knobs.runtime.interpret)
