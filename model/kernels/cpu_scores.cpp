// Sums over scores, for CPUs with AVX512; eager.py's `statistics`. Their gradients: cpu_scores_gradient.cpp.
//
// Legend: M tokens of a chunk, V prototypes. Scores lie with the *tokens along the vector lanes*, (V, M): maxima and sums
// over the prototypes never cross lanes.
//
// The order of every sum depends on the shapes alone: same inputs, same bits, with any number of threads.

#include "cpu_scores.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <optional>
#include <tuple>

namespace overtone {
namespace {

constexpr int64_t SCORE_TOKENS = 512;  // whose two sums, 4 KiB, stay in L1

// What turns a product into a score, by way of log q, or if LINEAR of q; the vectors are (M,).
template <bool LINEAR>
struct Quadratic {
  static constexpr bool MORE = false;
  std::vector<float> x_squares, floor, target_q;
  std::vector<int32_t> local;
  const float* row_squares;
  __m512 factor;  // -coefficient

  // log q, or q, from the dot product of prototype `row` and the 16 tokens from `token` on
  __m512 value(__m512 dot, int64_t row, int64_t token) const {
    const __m512 squares = _mm512_add_ps(_mm512_loadu_ps(&x_squares[token]), _mm512_set1_ps(row_squares[row]));
    __m512 q = _mm512_fnmadd_ps(_mm512_set1_ps(2.0f), dot, squares);
    const __mmask16 here = _mm512_cmpeq_epi32_mask(_mm512_loadu_si512(&local[token]), _mm512_set1_epi32(int(row)));
    q = _mm512_mask_loadu_ps(q, here, &target_q[token]);  // its own difference: no digits cancelled
    if constexpr (LINEAR) return q;
    return log_of(_mm512_max_ps(_mm512_loadu_ps(&floor[token]), q));  // NaN stays
  }
  __m512 score(__m512 value) const { return _mm512_mul_ps(value, factor); }
};

// Products that are scores as they are.
struct Dot {
  static constexpr bool MORE = false;
  __m512 value(__m512 dot, int64_t, int64_t) const { return dot; }
  __m512 score(__m512 dot) const { return dot; }
};

struct Product : Dot {
  __m512 factor;  // coefficient
  __m512 score(__m512 dot) const { return _mm512_mul_ps(dot, factor); }
};

// Any contraction c of a token and a prototype, by way of log c; `floor` is (M,).
struct Logarithm {
  static constexpr bool MORE = false;
  std::vector<float> floor;
  __m512 factor;  // -coefficient

  __m512 value(__m512 c, int64_t, int64_t token) const {
    return log_of(_mm512_max_ps(_mm512_loadu_ps(&floor[token]), c));  // NaN stays
  }
  __m512 score(__m512 log_c) const { return _mm512_mul_ps(log_c, factor); }
};

// A kind of which all seven sums are asked for: of the scores, and of u = n ds/dn. CAP: s = cap tanh(score / cap).
template <class Kind, bool CAP>
struct Shaped {
  static constexpr bool MORE = true;
  Kind kind;
  __m512 cap, inverse, lift;  // of log c, times the coefficient

  struct Score {
    __m512 s, u;
  };
  __m512 value(__m512 given, int64_t row, int64_t token) const { return kind.value(given, row, token); }
  Score both(__m512 value) const {
    __m512 raw = kind.score(value);
    if constexpr (!CAP) return {raw, raw};
    raw = _mm512_add_ps(raw, lift);
    const Tanh bent = tanh_of(_mm512_mul_ps(raw, inverse));
    return {_mm512_mul_ps(bent.value, cap), _mm512_mul_ps(bent.slope, raw)};
  }
  __m512 score(__m512 value) const { return both(value).s; }
};

// The sums of one block of prototypes, (M,) each: max s, sum exp(s - max), sum (s - max) exp(s - max); with MORE the last
// is sum u exp(s - max), and sum s and sum u come beside.
struct Sums {
  std::vector<float> top;
  std::vector<double> total, moment, every, shares;
  Sums(size_t tokens, bool more)
      : top(tokens, -INFINITY), total(tokens), moment(tokens), every(more ? tokens : 0), shares(more ? tokens : 0) {}
};

// Scores of up to SCORE_ROWS prototypes and SCORE_TOKENS tokens: values replace the dot products, `sums` says the rest.
template <class Kind>
void sum_block(
    const Kind& kind, float* kept, int64_t stride, int64_t row, int64_t rows, int64_t token, int64_t tokens,
    Sums& sums) {
  alignas(64) float totals[SCORE_TOKENS], moments[SCORE_TOKENS];
  [[maybe_unused]] alignas(64) float every[SCORE_TOKENS], shares[SCORE_TOKENS];
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
    if constexpr (Kind::MORE) {
      std::fill_n(every, SCORE_TOKENS, 0.0f);
      std::fill_n(shares, SCORE_TOKENS, 0.0f);
    }
    for (int64_t v = first; v < std::min(first + FLOAT_TERMS, row + rows); ++v) {
      for (int64_t m = token; m < token + tokens; m += LANES) {
        const __m512 value = _mm512_maskz_loadu_ps(first_lanes(token + tokens - m), kept + v * stride + m);
        const int64_t at = m - token;
        float *total = totals + at, *moment = moments + at;
        if constexpr (Kind::MORE) {
          const auto [s, u] = kind.both(value);
          const __m512 weight = exp_of(_mm512_sub_ps(s, _mm512_loadu_ps(&sums.top[m])));
          _mm512_store_ps(total, _mm512_add_ps(_mm512_load_ps(total), weight));
          _mm512_store_ps(moment, _mm512_fmadd_ps(u, weight, _mm512_load_ps(moment)));
          _mm512_store_ps(every + at, _mm512_add_ps(_mm512_load_ps(every + at), s));
          _mm512_store_ps(shares + at, _mm512_add_ps(_mm512_load_ps(shares + at), u));
        } else {
          const __m512 below = _mm512_sub_ps(kind.score(value), _mm512_loadu_ps(&sums.top[m]));
          const __m512 weight = exp_of(below);
          _mm512_store_ps(total, _mm512_add_ps(_mm512_load_ps(total), weight));
          _mm512_store_ps(moment, _mm512_fmadd_ps(below, weight, _mm512_load_ps(moment)));
        }
      }
    }
    for (int64_t m = 0; m < tokens; m += LANES) {
      add_to(&sums.total[token + m], totals + m);
      add_to(&sums.moment[token + m], moments + m);
      if constexpr (Kind::MORE) {
        add_to(&sums.every[token + m], every + m);
        add_to(&sums.shares[token + m], shares + m);
      }
    }
  }
}

// Joins the blocks' sums of one token: (max s, sum exp(s - max), sum u exp(s - max)), in the order of the prototypes.
template <bool MORE>
std::tuple<float, float, float> joined(const std::vector<Sums>& blocks, int64_t token) {
  float top = -INFINITY;
  for (const Sums& block : blocks) top = std::max(top, block.top[token]);
  double total = 0, moment = 0;
  for (const Sums& block : blocks) {
    const double below = double(block.top[token]) - top;
    if (below < -104) continue;  // exp(below) is no float32 above 0
    const double part = std::exp(below);
    total += part * block.total[token];
    moment += part * (MORE ? block.moment[token] : block.moment[token] + below * block.total[token]);
  }
  return {top, float(total), float(MORE ? moment : moment + double(top) * total)};
}

// kept (V, M), in place; the four sums of eager.py, (M,) each, or all seven.
template <class Kind>
std::vector<Tensor> sum_scores(const Kind& kind, const Tensor& kept, const std::vector<int32_t>& column) {
  constexpr bool MORE = Kind::MORE;
  const int64_t rows = kept.size(0), tokens = kept.size(1), stride = kept.stride(0);
  float* at = kept.mutable_data_ptr<float>();
  std::vector<Sums> blocks(size_t(blocks_of(rows, SCORE_ROWS)), Sums(size_t(blocks_of(tokens, LANES) * LANES), MORE));
  // Each block has sums of its own, joined in their order below: who is done first changes no bit.
  for_each_task(int64_t(blocks.size()), [&](int64_t task) {
    const int64_t row = task * SCORE_ROWS;
    for (int64_t token = 0; token < tokens; token += SCORE_TOKENS) {
      const int64_t count = std::min(SCORE_TOKENS, tokens - token);
      sum_block(kind, at, stride, row, std::min(SCORE_ROWS, rows - row), token, count, blocks[task]);
    }
  });
  std::vector<Tensor> sums;
  std::vector<float*> out;
  for (int i = 0; i < (MORE ? 7 : 4); ++i) {
    sums.push_back(at::empty({tokens}, kept.options()));
    out.push_back(sums.back().mutable_data_ptr<float>());
  }
  at::parallel_for(0, tokens, 16, [&](int64_t first, int64_t end) {
    for (int64_t m = first; m < end; ++m) {
      std::tie(out[0][m], out[1][m], out[2][m]) = joined<MORE>(blocks, m);
      const bool here = column[m] >= 0;
      const __m512 value = _mm512_set1_ps(here ? at[column[m] * stride + m] : 0.0f);
      // by the operation that made the maximum: a target that takes all has loss 0, exactly
      out[3][m] = here ? _mm512_cvtss_f32(kind.score(value)) : 0.0f;
      if constexpr (MORE) {
        double every = 0, shares = 0;
        for (const Sums& block : blocks) every += block.every[m], shares += block.shares[m];
        out[4][m] = float(every);
        out[5][m] = here ? _mm512_cvtss_f32(kind.both(value).u) : 0.0f;
        out[6][m] = float(shares);
      }
    }
  });
  return sums;
}

// As they are asked for: four sums, or seven, with a cap or without.
template <class Kind>
std::vector<Tensor> asked(
    const Kind& kind, const Tensor& kept, const std::vector<int32_t>& column, std::optional<double> cap, double lift,
    bool more) {
  if (cap) {
    const float c = float(*cap);
    const __m512 all = _mm512_set1_ps(c), inverse = _mm512_set1_ps(1 / c), raised = _mm512_set1_ps(float(lift));
    return sum_scores(Shaped<Kind, true>{kind, all, inverse, raised}, kept, column);
  }
  return more ? sum_scores(Shaped<Kind, false>{kind, {}, {}, {}}, kept, column) : sum_scores(kind, kept, column);
}

// eager.py's `Given`, in its order: kept (V, M), (M,) targets' columns, coefficient, floor (M,), what makes q.
std::vector<Tensor> statistics(
    const Tensor& kept, const Tensor& local, std::optional<double> coefficient, const std::optional<Tensor>& floor,
    const std::optional<Tensor>& x_squares, const std::optional<Tensor>& row_squares,
    const std::optional<Tensor>& target_q, std::optional<double> cap, double lift, bool more) {
  check_rows(kept, at::kFloat, "scores");
  const int64_t tokens = kept.size(1);
  const std::vector<int32_t> columns = padded_columns(local, kept);
  const float steep = float(coefficient.value_or(1.0));
  if (!x_squares) {
    if (floor) {
      const Logarithm kind{padded(*floor, tokens, 1.0f), _mm512_set1_ps(-steep)};
      return asked(kind, kept, columns, cap, lift, more);
    }
    if (coefficient || cap || more) return asked(Product{{}, _mm512_set1_ps(steep)}, kept, columns, cap, lift, more);
    return sum_scores(Dot{}, kept, columns);
  }
  TORCH_CHECK(row_squares && target_q && coefficient, "expected all that makes squared distances");
  TORCH_CHECK(row_squares->numel() == kept.size(0) && row_squares->is_contiguous(), "expected a square for every row");
  const float* rows = row_squares->const_data_ptr<float>();
  std::vector<float> x = padded(*x_squares, tokens, 1.0f), target = padded(*target_q, tokens, 1.0f);
  if (floor) {
    const Quadratic<false> kind{x, padded(*floor, tokens, 1.0f), target, columns, rows, _mm512_set1_ps(-steep)};
    return asked(kind, kept, columns, cap, lift, more);
  }
  return asked(Quadratic<true>{x, {}, target, columns, rows, _mm512_set1_ps(-steep)}, kept, columns, cap, lift, more);
}

}  // namespace

TORCH_LIBRARY(overtone_cpu, library) {
  library.def(
      "statistics(Tensor kept, Tensor local, float? coefficient, Tensor? floor, Tensor? x_squares, Tensor? row_squares, "
      "Tensor? target_q, float? cap, float lift, bool more) -> Tensor[]",
      &statistics);
}

}  // namespace overtone
