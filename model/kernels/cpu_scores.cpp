// Sums over scores and their gradients, for CPUs with AVX512; eager.py's `statistics` and `gradients`.
//
// Legend: M tokens of a chunk, V prototypes. Scores lie with the *tokens along the vector lanes*, (V, M): maxima and sums
// over the prototypes never cross lanes.
//
// The order of every sum depends on the shapes alone: same inputs, same bits, with any number of threads.

#include "cpu.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <tuple>

namespace overtone {
namespace {

constexpr int64_t SCORE_ROWS = 128;  // prototypes whose scores are summed while they are in L2
constexpr int64_t SCORE_TOKENS = 512;  // whose two sums, 4 KiB, stay in L1
constexpr int64_t FLOAT_TERMS = 16;  // terms summed in float32 before they join a sum in float64

// ------------------------------------------------------------------------------------------------------- exp and log

// Coefficients: minimax fits of degree 6 (exp) and 10 (log); both within 1 ulp of the true value, NaN stays NaN.
// exp(x) = 2^n exp(r), |r| <= log(2) / 2. Below -104 the result is 0.
__m512 exp_of(__m512 x) {
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
__m512 log_of(__m512 x) {
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

// ------------------------------------------------------------------------------------------------ sums over the scores

// The targets' columns, -1 where there is none.
std::vector<int32_t> padded_columns(const Tensor& local, const Tensor& kept) {
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

// What turns a dot product into a score; the vectors are (M,).
struct Quadratic {
  std::vector<float> x_squares, floor, target_q;
  std::vector<int32_t> local;
  const float* row_squares;
  __m512 factor;  // -coefficient

  // log q from the dot product of prototype `row` and the 16 tokens from `token` on
  __m512 value(__m512 dot, int64_t row, int64_t token) const {
    const __m512 squares = _mm512_add_ps(_mm512_loadu_ps(&x_squares[token]), _mm512_set1_ps(row_squares[row]));
    __m512 q = _mm512_fnmadd_ps(_mm512_set1_ps(2.0f), dot, squares);
    const __mmask16 here = _mm512_cmpeq_epi32_mask(_mm512_loadu_si512(&local[token]), _mm512_set1_epi32(int(row)));
    q = _mm512_mask_loadu_ps(q, here, &target_q[token]);  // its own difference: no digits cancelled
    return log_of(_mm512_max_ps(_mm512_loadu_ps(&floor[token]), q));  // NaN stays
  }
  __m512 score(__m512 log_q) const { return _mm512_mul_ps(log_q, factor); }
};

struct Dot {
  __m512 value(__m512 dot, int64_t, int64_t) const { return dot; }
  __m512 score(__m512 dot) const { return dot; }
};

// The sums of one block of prototypes, (M,) each: max s, sum exp(s - max), sum (s - max) exp(s - max).
struct Sums {
  std::vector<float> top;
  std::vector<double> total, moment;
  explicit Sums(size_t tokens) : top(tokens, -INFINITY), total(tokens), moment(tokens) {}
};

void add_to(double* sums, const float* terms) {
  for (int half = 0; half < 2; ++half) {
    const __m512d more = _mm512_cvtps_pd(_mm256_loadu_ps(terms + 8 * half));
    _mm512_storeu_pd(sums + 8 * half, _mm512_add_pd(_mm512_loadu_pd(sums + 8 * half), more));
  }
}

// Scores of up to SCORE_ROWS prototypes and SCORE_TOKENS tokens: values replace the dot products, `sums` says the rest.
template <class Kind>
void sum_block(
    const Kind& kind, float* kept, int64_t stride, int64_t row, int64_t rows, int64_t token, int64_t tokens,
    Sums& sums) {
  alignas(64) float totals[SCORE_TOKENS], moments[SCORE_TOKENS];
  // The maxima of the whole block first: then no sum has to be scaled, and the values are read again from L2.
  for (int64_t v = row; v < row + rows; ++v) {
    for (int64_t m = token; m < token + tokens; m += LANES) {
      const __mmask16 lanes = first_lanes(token + tokens - m);
      float* at = kept + v * stride + m;
      const __m512 value = kind.value(_mm512_maskz_loadu_ps(lanes, at), v, m);
      _mm512_mask_storeu_ps(at, lanes, value);
      _mm512_storeu_ps(&sums.top[m], _mm512_max_ps(_mm512_loadu_ps(&sums.top[m]), kind.score(value)));
    }
  }
  for (int64_t first = row; first < row + rows; first += FLOAT_TERMS) {
    std::fill_n(totals, SCORE_TOKENS, 0.0f);
    std::fill_n(moments, SCORE_TOKENS, 0.0f);
    for (int64_t v = first; v < std::min(first + FLOAT_TERMS, row + rows); ++v) {
      for (int64_t m = token; m < token + tokens; m += LANES) {
        const __m512 value = _mm512_maskz_loadu_ps(first_lanes(token + tokens - m), kept + v * stride + m);
        const __m512 below = _mm512_sub_ps(kind.score(value), _mm512_loadu_ps(&sums.top[m]));
        const __m512 weight = exp_of(below);
        float *total = totals + (m - token), *moment = moments + (m - token);
        _mm512_store_ps(total, _mm512_add_ps(_mm512_load_ps(total), weight));
        _mm512_store_ps(moment, _mm512_fmadd_ps(below, weight, _mm512_load_ps(moment)));
      }
    }
    for (int64_t m = 0; m < tokens; m += LANES) {
      add_to(&sums.total[token + m], totals + m);
      add_to(&sums.moment[token + m], moments + m);
    }
  }
}

using FourSums = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// Joins the blocks' sums of one token: (max s, sum exp(s - max), sum s exp(s - max)), in the order of the prototypes.
std::tuple<float, float, float> joined(const std::vector<Sums>& blocks, int64_t token) {
  float top = -INFINITY;
  for (const Sums& block : blocks) top = std::max(top, block.top[token]);
  double total = 0, moment = 0;
  for (const Sums& block : blocks) {
    const double below = double(block.top[token]) - top;
    if (below < -104) continue;  // exp(below) is no float32 above 0
    const double part = std::exp(below);
    total += part * block.total[token];
    moment += part * (block.moment[token] + below * block.total[token]);
  }
  return {top, float(total), float(moment + double(top) * total)};
}

// kept (V, M), in place; the four sums of eager.py, (M,) each.
template <class Kind>
FourSums sum_scores(const Kind& kind, const Tensor& kept, const std::vector<int32_t>& column) {
  const int64_t rows = kept.size(0), tokens = kept.size(1), stride = kept.stride(0);
  float* at = kept.mutable_data_ptr<float>();
  std::vector<Sums> blocks(size_t(blocks_of(rows, SCORE_ROWS)), Sums(size_t(blocks_of(tokens, LANES) * LANES)));
  // Each block has sums of its own, joined in their order below: who is done first changes no bit.
  for_each_task(int64_t(blocks.size()), [&](int64_t task) {
    const int64_t row = task * SCORE_ROWS;
    for (int64_t token = 0; token < tokens; token += SCORE_TOKENS) {
      const int64_t count = std::min(SCORE_TOKENS, tokens - token);
      sum_block(kind, at, stride, row, std::min(SCORE_ROWS, rows - row), token, count, blocks[task]);
    }
  });
  const auto options = kept.options();
  const Tensor top = at::empty({tokens}, options), total = at::empty({tokens}, options);
  const Tensor moment = at::empty({tokens}, options), target = at::empty({tokens}, options);
  float *tops = top.mutable_data_ptr<float>(), *totals = total.mutable_data_ptr<float>();
  float *moments = moment.mutable_data_ptr<float>(), *targets = target.mutable_data_ptr<float>();
  at::parallel_for(0, tokens, 16, [&](int64_t first, int64_t end) {
    for (int64_t m = first; m < end; ++m) {
      std::tie(tops[m], totals[m], moments[m]) = joined(blocks, m);
      const float value = column[m] < 0 ? 0.0f : at[column[m] * stride + m];
      // by the operation that made the maximum: a target that takes all has loss 0, exactly
      targets[m] = column[m] < 0 ? 0.0f : _mm512_cvtss_f32(kind.score(_mm512_set1_ps(value)));
    }
  });
  return {top, total, moment, target};
}

FourSums quadratic_statistics(
    const Tensor& kept, const Tensor& x_squares, const Tensor& row_squares, const Tensor& floor, double coefficient,
    const Tensor& local, const Tensor& target_q) {
  check_rows(kept, at::kFloat, "scores");
  TORCH_CHECK(row_squares.numel() == kept.size(0) && row_squares.is_contiguous(), "expected a square for every row");
  const int64_t tokens = kept.size(1);
  const Quadratic kind{
      padded(x_squares, tokens, 1.0f), padded(floor, tokens, 1.0f), padded(target_q, tokens, 1.0f),
      padded_columns(local, kept), row_squares.const_data_ptr<float>(), _mm512_set1_ps(-float(coefficient))};
  return sum_scores(kind, kept, kind.local);
}

// Any contraction c of a token and a prototype; `floor` is (M,).
struct Contraction {
  std::vector<float> floor;
  __m512 factor;  // -coefficient

  __m512 value(__m512 c, int64_t, int64_t token) const {
    return log_of(_mm512_max_ps(_mm512_loadu_ps(&floor[token]), c));  // NaN stays
  }
  __m512 score(__m512 log_c) const { return _mm512_mul_ps(log_c, factor); }
};

FourSums log_statistics(const Tensor& kept, const Tensor& floor, double coefficient, const Tensor& local) {
  check_rows(kept, at::kFloat, "values");
  const Contraction kind{padded(floor, kept.size(1), 1.0f), _mm512_set1_ps(-float(coefficient))};
  return sum_scores(kind, kept, padded_columns(local, kept));
}

FourSums dot_statistics(const Tensor& kept, const Tensor& local) {
  check_rows(kept, at::kFloat, "scores");
  return sum_scores(Dot{}, kept, padded_columns(local, kept));
}

// ---------------------------------------------------------------------------------------------------------- gradients

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

// G from a kept value, for the 16 tokens from `token` on; the vectors are (M,).
struct QuadraticGradient {
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

struct DotGradient {
  std::vector<float> lse, weight;
  std::vector<int32_t> local;

  __m512 operator()(__m512 score, int64_t row, int64_t token) const {
    __m512 grad = exp_of(_mm512_sub_ps(score, _mm512_loadu_ps(&lse[token])));
    const __mmask16 here = _mm512_cmpeq_epi32_mask(_mm512_loadu_si512(&local[token]), _mm512_set1_epi32(int(row)));
    grad = _mm512_mask_sub_ps(grad, here, grad, _mm512_set1_ps(1.0f));
    return _mm512_mul_ps(grad, _mm512_loadu_ps(&weight[token]));
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

std::tuple<Tensor, Tensor> quadratic_gradient(
    const Tensor& kept, const Tensor& log_floor, double coefficient, const Tensor& lse, const Tensor& weight,
    const Tensor& local, bool bfloat16) {
  check_rows(kept, at::kFloat, "scores");
  const int64_t tokens = kept.size(1);
  const std::vector<int32_t> columns = padded_columns(local, kept);
  const QuadraticGradient kind{
      padded(lse, tokens, 0.0f), padded(weight, tokens, 0.0f), padded(log_floor, tokens, 0.0f),
      target_inverses(kept, columns), columns, _mm512_set1_ps(-float(coefficient + 1))};
  return differentiate(kind, kept, bfloat16);
}

void dot_gradient(const Tensor& kept, const Tensor& lse, const Tensor& weight, const Tensor& local, bool bfloat16) {
  check_rows(kept, at::kFloat, "scores");
  const int64_t tokens = kept.size(1);
  const DotGradient kind{padded(lse, tokens, 0.0f), padded(weight, tokens, 0.0f), padded_columns(local, kept)};
  differentiate(kind, kept, bfloat16);
}

}  // namespace

TORCH_LIBRARY(overtone_cpu, library) {
  library.def(
      "quadratic_statistics(Tensor kept, Tensor x_squares, Tensor row_squares, Tensor floor, float coefficient, "
      "Tensor local, Tensor target_q) -> (Tensor, Tensor, Tensor, Tensor)",
      &quadratic_statistics);
  library.def(
      "log_statistics(Tensor kept, Tensor floor, float coefficient, Tensor local) -> (Tensor, Tensor, Tensor, Tensor)",
      &log_statistics);
  library.def("dot_statistics(Tensor kept, Tensor local) -> (Tensor, Tensor, Tensor, Tensor)", &dot_statistics);
  library.def(
      "quadratic_gradient(Tensor kept, Tensor log_floor, float coefficient, Tensor lse, Tensor weight, Tensor local, "
      "bool bfloat16) -> (Tensor, Tensor)",
      &quadratic_gradient);
  library.def(
      "dot_gradient(Tensor kept, Tensor lse, Tensor weight, Tensor local, bool bfloat16) -> ()", &dot_gradient);
}

}  // namespace overtone
