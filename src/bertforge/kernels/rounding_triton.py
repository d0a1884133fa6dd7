"""Values as a tensor takes them: rounded to its type, and cut to its range where that has 8 bits."""

import triton
import triton.language as tl

INT8_SHIFT = tl.constexpr(12582912.0)  # 1.5 * 2^23: float32 holds whole numbers alone from 2^23 on


@triton.jit
def rounded_to(values, TYPE: tl.constexpr):
    """`values`, float32, as TYPE: to the nearest, ties to even, as ONNX's QuantizeLinear does."""
    if TYPE == tl.int8:  # noqa: SIM300  # a constant for the compiler alone
        # Adding rounds, and leaves the number in the lowest byte; a conversion would cut off what is behind the point.
        shifted = tl.clamp(values, -128.0, 127.0) + INT8_SHIFT
        return shifted.to(tl.int32, bitcast=True).to(tl.int8)
    if TYPE == tl.float8e4nv:  # noqa: SIM300
        return tl.clamp(values, -448.0, 448.0).to(TYPE)
    return values.to(TYPE)
