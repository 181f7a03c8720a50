// Exponential, logarithm and hyperbolic tangent of 16 numbers, for the kernels over scores.

#pragma once

#include "cpu.h"

namespace overtone {

// Coefficients: minimax fits of degree 6 (exp) and 10 (log); both within 1 ulp of the true value, NaN stays NaN.
// exp(x) = 2^n exp(r), |r| <= log(2) / 2. Below -104 the result is 0.
inline __m512 exp_of(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-104.0f), x);  // of a NaN the second operand is what comes out
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(0x1.715476p+0f)), _MM_FROUND_TO_NEAREST_INT);
  // log(2) in two parts: with one float32 of it, r would be off by n times its rounding
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0x1.62e430p-1f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-0x1.05c610p-29f), r);
  __m512 y = _mm512_set1_ps(0x1.6a1a72p-10f);
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(0x1.123fc6p-7f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(0x1.555916p-5f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(0x1.55548ap-3f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(0x1.fffffcp-2f));
  y = _mm512_add_ps(_mm512_fmadd_ps(_mm512_mul_ps(r, r), y, r), _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(y, n);  // unlike an exponent added to the bits, also for subnormal results
}

// log(x) = e log(2) + log(1 + r), 1 + r in [0.75, 1.5): around x = 1 no digits cancel.
inline __m512 log_of(__m512 x) {
  const __m512 mantissa = _mm512_getmant_ps(x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_src);
  const __m512 one = _mm512_set1_ps(1.0f);
  const __m512 low = _mm512_getexp_ps(x);  // the exponent of the mantissa in [1, 2)
  const __m512 e = _mm512_mask_add_ps(low, _mm512_cmp_ps_mask(mantissa, one, _CMP_LT_OQ), low, one);
  const __m512 r = _mm512_sub_ps(mantissa, one);
  __m512 y = _mm512_set1_ps(-0x1.7140b8p-5f);
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(0x1.ac90bep-4f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(-0x1.0d8a8ep-3f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(0x1.28847cp-3f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(-0x1.54efdcp-3f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(0x1.9969b0p-3f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(-0x1.000040p-2f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(0x1.5555a4p-2f));
  // the smallest addends first; near x = 1, where e is 0, r is nearly all there is
  const __m512 square = _mm512_mul_ps(r, r);
  y = _mm512_mul_ps(_mm512_mul_ps(square, r), y);
  y = _mm512_fmadd_ps(e, _mm512_set1_ps(-0x1.05c610p-29f), y);
  y = _mm512_fnmadd_ps(square, _mm512_set1_ps(0.5f), y);
  return _mm512_fmadd_ps(e, _mm512_set1_ps(0x1.62e430p-1f), _mm512_add_ps(r, y));
}

// tanh(x) and its slope 1 - tanh(x)^2, both without cancellation; NaN stays NaN.
struct Tanh {
  __m512 value, slope;
};

inline Tanh tanh_of(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f), size = _mm512_abs_ps(x);
  const __m512 e = exp_of(_mm512_mul_ps(size, _mm512_set1_ps(-2.0f)));
  const __m512 below = _mm512_div_ps(one, _mm512_add_ps(one, e));
  __m512 value = _mm512_mul_ps(_mm512_sub_ps(one, e), below);  // loses digits where e is near 1
  const __m512 square = _mm512_mul_ps(x, x);
  __m512 y = _mm512_set1_ps(-0x1.9bb94ap-8f);  // a minimax fit of degree 9 for |x| < 0.55, within 1 ulp
  y = _mm512_fmadd_ps(y, square, _mm512_set1_ps(0x1.595658p-6f));
  y = _mm512_fmadd_ps(y, square, _mm512_set1_ps(-0x1.b92bb4p-5f));
  y = _mm512_fmadd_ps(y, square, _mm512_set1_ps(0x1.110d3ap-3f));
  y = _mm512_fmadd_ps(y, square, _mm512_set1_ps(-0x1.55554cp-2f));
  const __m512 near = _mm512_fmadd_ps(_mm512_mul_ps(size, square), y, size);
  value = _mm512_mask_mov_ps(value, _mm512_cmp_ps_mask(size, _mm512_set1_ps(0.55f), _CMP_LT_OQ), near);
  const __m512 sign = _mm512_and_ps(x, _mm512_set1_ps(-0.0f));
  return {_mm512_or_ps(value, sign), _mm512_mul_ps(_mm512_mul_ps(_mm512_set1_ps(4.0f), e), _mm512_mul_ps(below, below))};
}

// The targets' columns, -1 where there is none.
inline std::vector<int32_t> padded_columns(const Tensor& local, const Tensor& kept) {
  const bool fits = local.dim() == 1 && local.numel() == kept.size(1) && local.scalar_type() == at::kLong;
  TORCH_CHECK(fits, "expected an int64 column for every token");
  const Tensor flat = local.contiguous();
  std::vector<int32_t> out(size_t(blocks_of(local.numel(), LANES) * LANES), -1);
  const int64_t* from = flat.const_data_ptr<int64_t>();
  for (int64_t m = 0; m < local.numel(); ++m) {
    TORCH_CHECK(from[m] < kept.size(0), "column ", from[m], " of ", kept.size(0));
    out[m] = int32_t(from[m]);
  }
  return out;
}

inline void add_to(double* sums, const float* terms) {
  for (int half = 0; half < 2; ++half) {
    const __m512d more = _mm512_cvtps_pd(_mm256_loadu_ps(terms + 8 * half));
    _mm512_storeu_pd(sums + 8 * half, _mm512_add_pd(_mm512_loadu_pd(sums + 8 * half), more));
  }
}

constexpr int64_t SCORE_ROWS = 128;  // prototypes whose scores are summed while they are in L2
constexpr int64_t FLOAT_TERMS = 16;  // terms summed in float32 before they join a sum in float64

}  // namespace overtone
