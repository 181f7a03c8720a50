"""Logarithm and exponential of base 2 as an NVIDIA GPU has them in one instruction each, for all Triton kernels here;
and the hyperbolic tangent made of them.

Errors, from the PTX manual (lg2.approx.ftz.f32, ex2.approx.ftz.f32): of log2, 2^-22 absolute between 1/2 and 2 and
2^-22 relative elsewhere; of exp2, 2^-22 relative. Denormal numbers count as 0. libdevice's log2 is within 1 ulp and
takes about 25 instructions; `tl.exp2` is the instruction already. A score -n log d = -(n / 2) log2(q) ln 2 is then
off by no more than SCORE_ERROR * (n / 2) max(1, |log2 q|): about as much as the float32 rounding of the score itself.
"""

# Annotations must stay objects here: Triton's interpreter reads `tl.constexpr` from them.

import triton
import triton.language as tl
from triton import knobs

SCORE_ERROR = 2.0**-22
LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)

if knobs.runtime.interpret:  # which knows no machine code

    @triton.jit
    def log2(x):
        """As numpy has it, nearer than the hardware's."""
        return tl.log2(x)

    @triton.jit
    def settled(x):
        """x as it is: no compiler moves anything here."""
        return x

else:

    @triton.jit
    def log2(x):
        """The hardware's: `is_pure`, so that the compiler may drop or share calls."""
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )

    @triton.jit
    def settled(x):
        """x as it is: what follows, such as a rounding, is not moved before what made it. (Triton 3.6 would otherwise
        choose between numbers of 16 bits, and take pairs of them apart for it.)
        """
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def not_below(x, least):
    """max(x, least), NaN where x is."""
    return tl.maximum(x, least, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def tanh(x):
    """tanh(x) and its slope, both without cancellation; NaN stays NaN."""
    size = tl.abs(x)
    e = tl.exp2(size * (-2 * LOG2E))
    below = 1.0 / (1.0 + e)
    square = x * x
    near = -0.33333318 + square * (0.13332602 + square * (-0.05385385 + square * (0.02107771 + square * -0.00628241)))
    value = tl.where(size < 0.55, size + size * square * near, (1.0 - e) * below)  # the second loses digits near 0
    return tl.where(x < 0, -value, value), 4.0 * e * below * below
