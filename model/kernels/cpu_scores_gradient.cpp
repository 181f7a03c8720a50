// Gradients of scores, for CPUs with AVX512; eager.py's `gradients`.
//
// Legend: M tokens of a chunk, V prototypes. What cpu_scores.cpp kept lies with the *tokens along the vector lanes*, (V, M).
//
// The order of every sum depends on the shapes alone: same inputs, same bits, with any number of threads.

#include "cpu_scores.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

namespace overtone {
namespace {

#ifdef __AVX512BF16__
__m256i round_to_bfloat16(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }
#else  // cpu.py selects float32 only
__m256i round_to_bfloat16(__m512) { return _mm256_setzero_si256(); }
#endif

// Stores 16 gradients rounded to the operands' dtype; returns them as rounded.
__m512 store_rounded(float* at, __mmask16 lanes, __m512 grad) {
  _mm512_mask_storeu_ps(at, lanes, grad);
  return grad;
}

__m512 store_rounded(bits16* at, __mmask16 lanes, __m512 grad) {
  const __m256i rounded = round_to_bfloat16(grad);
  _mm256_mask_storeu_epi16(at, lanes, rounded);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16));
}

// G from a kept value, for the 16 tokens from `token` on; the vectors are (M,). Of log q, and of log c.
struct LogarithmGradient {
  std::vector<float> lse, weight, log_floor, target_inverse;  // 1 / q of the target
  std::vector<int32_t> local;
  __m512 steepness;  // -(coefficient + 1): p / q = exp(-(coefficient + 1) log q - lse)

  __m512 operator()(__m512 log_q, int64_t row, int64_t token) const {
    __m512 grad = exp_of(_mm512_fmsub_ps(log_q, steepness, _mm512_loadu_ps(&lse[token])));
    const __mmask16 here = _mm512_cmpeq_epi32_mask(_mm512_loadu_si512(&local[token]), _mm512_set1_epi32(int(row)));
    grad = _mm512_mask_sub_ps(grad, here, grad, _mm512_loadu_ps(&target_inverse[token]));
    // an ordered comparison: NaN is at no floor, and gets through
    const __mmask16 floored = _mm512_cmp_ps_mask(log_q, _mm512_loadu_ps(&log_floor[token]), _CMP_LE_OQ);
    return _mm512_maskz_mul_ps(__mmask16(~floored), grad, _mm512_loadu_ps(&weight[token]));
  }
};

// Of scores that are linear: of products, and of q.
struct LinearGradient {
  std::vector<float> lse, weight;
  std::vector<int32_t> local;
  __m512 steep;  // of the score by the value

  __m512 operator()(__m512 value, int64_t row, int64_t token) const {
    __m512 grad = exp_of(_mm512_fmsub_ps(value, steep, _mm512_loadu_ps(&lse[token])));
    const __mmask16 here = _mm512_cmpeq_epi32_mask(_mm512_loadu_si512(&local[token]), _mm512_set1_epi32(int(row)));
    grad = _mm512_mask_sub_ps(grad, here, grad, _mm512_set1_ps(1.0f));
    return _mm512_mul_ps(grad, _mm512_loadu_ps(&weight[token]));
  }
};

// With the weights of options, and a cap: (weight p - own onehot - uniform) / c, times the slope of the cap. The weights
// are those of the value, the score's slope by log c or the value included.
template <bool LINEAR, bool CAP>
struct ShapedGradient {
  std::vector<float> lse, weight, own, uniform, log_floor;
  std::vector<int32_t> local;
  __m512 steep, cap, inverse, lift;

  __m512 operator()(__m512 value, int64_t row, int64_t token) const {
    __m512 score = _mm512_mul_ps(value, steep), slope = _mm512_set1_ps(1.0f);
    if constexpr (CAP) {
      const Tanh bent = tanh_of(_mm512_mul_ps(_mm512_add_ps(score, lift), inverse));
      score = _mm512_mul_ps(bent.value, cap);
      slope = bent.slope;
    }
    score = _mm512_sub_ps(score, _mm512_loadu_ps(&lse[token]));
    const __mmask16 here = _mm512_cmpeq_epi32_mask(_mm512_loadu_si512(&local[token]), _mm512_set1_epi32(int(row)));
    __m512 less = _mm512_loadu_ps(&uniform[token]);
    less = _mm512_mask_add_ps(less, here, less, _mm512_loadu_ps(&own[token]));
    __mmask16 sloped = 0xffff;
    if constexpr (!LINEAR) {
      score = _mm512_sub_ps(score, value);  // p / c by one exponential
      less = _mm512_mul_ps(less, exp_of(_mm512_sub_ps(_mm512_setzero_ps(), value)));
      sloped = __mmask16(~_mm512_cmp_ps_mask(value, _mm512_loadu_ps(&log_floor[token]), _CMP_LE_OQ));
    }
    const __m512 grad = _mm512_fmsub_ps(exp_of(score), _mm512_loadu_ps(&weight[token]), less);
    return _mm512_maskz_mul_ps(sloped, grad, slope);
  }
};

// G over one row of kept values (tokens,), in the same memory: a rounded value never lies behind its own origin.
// Adds G to `tokens_sums` (M,); returns the sum over the row.
template <class Stored, class Kind>
float gradient_row(const Kind& kind, float* kept, int64_t row, int64_t tokens, float* token_sums) {
  Stored* grads = reinterpret_cast<Stored*>(kept);
  __m512 sum = _mm512_setzero_ps();
  for (int64_t m = 0; m < tokens; m += LANES) {
    const __mmask16 lanes = first_lanes(tokens - m);
    const __m512 value = _mm512_maskz_loadu_ps(lanes, kept + m);
    // lanes beyond the last token hold anything: they must not join the sum over the row
    const __m512 grad = _mm512_maskz_mov_ps(lanes, store_rounded(grads + m, lanes, kind(value, row, m)));
    _mm512_storeu_ps(token_sums + m, _mm512_add_ps(_mm512_loadu_ps(token_sums + m), grad));
    sum = _mm512_add_ps(sum, grad);
  }
  return _mm512_reduce_add_ps(sum);
}

// partial (blocks, padded M) -> (M,)
Tensor summed_blocks(const std::vector<double>& partial, int64_t width, const Tensor& like) {
  const Tensor out = at::empty({like.size(1)}, like.options());
  float* at = out.mutable_data_ptr<float>();
  for (int64_t m = 0; m < out.numel(); ++m) {
    double sum = 0;
    for (size_t block = 0; block < partial.size(); block += width) sum += partial[block + m];
    at[m] = float(sum);
  }
  return out;
}

// kept (V, M) becomes G in the same memory, as `Stored`; returns the sums of G over prototypes (M,) and tokens (V,).
template <class Stored, class Kind>
std::tuple<Tensor, Tensor> differentiate(const Kind& kind, const Tensor& kept) {
  const int64_t rows = kept.size(0), tokens = kept.size(1), width = blocks_of(tokens, LANES) * LANES;
  const int64_t blocks = blocks_of(rows, SCORE_ROWS);
  std::vector<double> partial(size_t(blocks * width));
  const Tensor over_tokens = at::empty({rows}, kept.options());
  float *at = kept.mutable_data_ptr<float>(), *out = over_tokens.mutable_data_ptr<float>();
  for_each_task(blocks, [&](int64_t task) {
    std::vector<float> sums(size_t(width), 0.0f);  // this block's own: no other thread adds to them
    const int64_t end = std::min(rows, (task + 1) * SCORE_ROWS);
    for (int64_t first = task * SCORE_ROWS; first < end; first += FLOAT_TERMS) {
      std::fill(sums.begin(), sums.end(), 0.0f);
      for (int64_t v = first; v < std::min(end, first + FLOAT_TERMS); ++v) {
        out[v] = gradient_row<Stored>(kind, at + v * kept.stride(0), v, tokens, sums.data());
      }
      for (int64_t m = 0; m < width; m += LANES) add_to(&partial[task * width + m], &sums[m]);
    }
  });
  return {summed_blocks(partial, width, kept), over_tokens};
}

template <class Kind>
std::tuple<Tensor, Tensor> differentiate(const Kind& kind, const Tensor& kept, bool bfloat16) {
  TORCH_CHECK(HAS_BFLOAT16 || !bfloat16, "built for a CPU without AVX512_BF16: expected float32");
  return bfloat16 ? differentiate<bits16>(kind, kept) : differentiate<float>(kind, kept);
}

// 1 / q of every token's target, from log q as kept. Taken before any G is made, which lies over it.
std::vector<float> target_inverses(const Tensor& kept, const std::vector<int32_t>& local) {
  std::vector<float> out(local.size());
  const float* at = kept.const_data_ptr<float>();
  for (int64_t m = 0; m < kept.size(1); ++m) {
    if (local[m] < 0) continue;
    out[m] = _mm512_cvtss_f32(exp_of(_mm512_set1_ps(-at[local[m] * kept.stride(0) + m])));
  }
  return out;
}

// `weight`, `own` and `uniform` (M,): eager.py's `Upstream`, times the score's slope by what is kept, which is `steep`.
std::tuple<Tensor, Tensor> gradient(
    const Tensor& kept, const std::optional<Tensor>& log_floor, double steep, const Tensor& lse, const Tensor& weight,
    const Tensor& local, bool bfloat16) {
  check_rows(kept, at::kFloat, "scores");
  const int64_t tokens = kept.size(1);
  const std::vector<int32_t> columns = padded_columns(local, kept);
  if (log_floor) {
    const LogarithmGradient kind{
        padded(lse, tokens, 0.0f), padded(weight, tokens, 0.0f), padded(*log_floor, tokens, 0.0f),
        target_inverses(kept, columns), columns, _mm512_set1_ps(float(steep - 1))};
    return differentiate(kind, kept, bfloat16);
  }
  const LinearGradient kind{
      padded(lse, tokens, 0.0f), padded(weight, tokens, 0.0f), columns, _mm512_set1_ps(float(steep))};
  return differentiate(kind, kept, bfloat16);
}

std::tuple<Tensor, Tensor> shaped_gradient(
    const Tensor& kept, const std::optional<Tensor>& log_floor, double steep, const Tensor& lse, const Tensor& weight,
    const Tensor& own, const std::optional<Tensor>& uniform, const Tensor& local, std::optional<double> cap,
    double lift, bool bfloat16) {
  check_rows(kept, at::kFloat, "scores");
  const int64_t tokens = kept.size(1);
  const float c = float(cap.value_or(1.0));
  const auto made = [&]<bool LINEAR, bool CAP>() {
    const std::vector<float> none(size_t(blocks_of(tokens, LANES) * LANES), 0.0f);
    const ShapedGradient<LINEAR, CAP> kind{
        padded(lse, tokens, 0.0f), padded(weight, tokens, 0.0f), padded(own, tokens, 0.0f),
        uniform ? padded(*uniform, tokens, 0.0f) : none, log_floor ? padded(*log_floor, tokens, 0.0f) : none,
        padded_columns(local, kept), _mm512_set1_ps(float(steep)), _mm512_set1_ps(c), _mm512_set1_ps(1 / c),
        _mm512_set1_ps(float(lift))};
    return differentiate(kind, kept, bfloat16);
  };
  if (log_floor) return cap ? made.template operator()<false, true>() : made.template operator()<false, false>();
  return cap ? made.template operator()<true, true>() : made.template operator()<true, false>();
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(overtone_cpu, library) {
  library.def(
      "gradient(Tensor kept, Tensor? log_floor, float steep, Tensor lse, Tensor weight, Tensor local, bool bfloat16) -> "
      "(Tensor, Tensor)",
      &gradient);
  library.def(
      "shaped_gradient(Tensor kept, Tensor? log_floor, float steep, Tensor lse, Tensor weight, Tensor own, "
      "Tensor? uniform, Tensor local, float? cap, float lift, bool bfloat16) -> (Tensor, Tensor)",
      &shaped_gradient);
}

}  // namespace overtone
