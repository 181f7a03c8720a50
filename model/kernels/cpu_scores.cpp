// The head's chunk operations for CPUs with AVX512, called by cpu.py; model/kernels/eager.py is their readable twin.
//
// Legend: M tokens of a chunk, V prototypes, D width. Scores lie with the *tokens along the vector lanes*, (V, M):
//   scores (V, M) = rows (V, D) . x' (D, M)      pairs of a row lie side by side, as they are stored
//   dw     (V, D) = G    (V, M) . x  (M, D)      likewise
//   dx     (M, D) = G'   (M, V) . rows (V, D)    both packed, block by block
// so that maxima and sums over the prototypes never cross lanes. `_mm512_dpbf16_ps` adds the products of *pairs* of
// bfloat16 to float32 lanes: the left operand is a pair broadcast to all lanes, the right one 16 pairs packed side by
// side. An odd number of terms leaves half a pair, which counts as zero.
//
// The order of every sum depends on the shapes alone: same inputs, same bits, with any number of threads.

#include "cpu.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <sys/mman.h>

#include <cfloat>
#include <cmath>
#include <tuple>
#include <vector>

namespace overtone {
namespace {

using bits16 = uint16_t;  // a bfloat16, as stored
using pair32 = uint32_t;  // two of them

constexpr int64_t TILE_ROWS = 6;     // a register tile is 6 rows x 4 vectors: 24 sums, 4 right vectors, 1 broadcast
constexpr int64_t DEPTH = 512;       // terms of a sum taken at a time (measured: 192, 256 and 384 are slower)
constexpr int64_t PRODUCT_ROWS = 40 * TILE_ROWS;
constexpr int64_t BLOCK_ROWS = 512, BLOCK_COLUMNS = 384;  // of the product whose operands are packed as it goes
constexpr int64_t SCORE_ROWS = 128;  // prototypes whose scores are summed while they are in L2
constexpr int64_t SCORE_TOKENS = 512;
constexpr int64_t FLOAT_TERMS = 16;  // terms summed in float32 before they join a sum in float64
constexpr size_t HUGE_PAGE = size_t(2) << 20;

// ------------------------------------------------------------------------------------------------------- exp and log

// Coefficients: minimax fits of degree 6 (exp) and 10 (log); both within 1 ulp of the true value, NaN stays NaN.
// exp(x) = 2^n exp(r), |r| <= log(2) / 2. Below -104 the result is 0.
__m512 exp_of(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-104.0f), x);
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(0x1.715476p+0f)), _MM_FROUND_TO_NEAREST_INT);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0x1.62e430p-1f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-0x1.05c610p-29f), r);
  __m512 y = _mm512_set1_ps(0x1.6a1a72p-10f);
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(0x1.123fc6p-7f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(0x1.555916p-5f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(0x1.55548ap-3f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(0x1.fffffcp-2f));
  y = _mm512_add_ps(_mm512_fmadd_ps(_mm512_mul_ps(r, r), y, r), _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(y, n);
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
  const __m512 square = _mm512_mul_ps(r, r);
  y = _mm512_mul_ps(_mm512_mul_ps(square, r), y);
  y = _mm512_fmadd_ps(e, _mm512_set1_ps(-0x1.05c610p-29f), y);
  y = _mm512_fnmadd_ps(square, _mm512_set1_ps(0.5f), y);
  return _mm512_fmadd_ps(e, _mm512_set1_ps(0x1.62e430p-1f), _mm512_add_ps(r, y));
}

// ----------------------------------------------------------------------------------------------- products of bfloat16

// The left operand of a product: entry (i, k) at i * row + k * (terms of a pair side by side), pairs `pair` apart.
struct Left {
  const bits16* at;
  int64_t row;
  int64_t pair;
};

__m512 broadcast_pair(const bits16* at) {
  pair32 both;
  __builtin_memcpy(&both, at, sizeof both);
  return _mm512_castsi512_ps(_mm512_set1_epi32(int(both)));
}

#ifdef __AVX512BF16__
__m512 multiply_add(__m512 sum, __m512 a, __m512 b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
__m256i round_to_bfloat16(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }
#else  // cpu.py selects float32 only
__m512 multiply_add(__m512 sum, __m512, __m512) { return sum; }
__m256i round_to_bfloat16(__m512) { return _mm256_setzero_si256(); }
#endif

// One register tile: c (rows, 16 * VECTORS) = or += a (rows, terms) . panel (terms, 16 * VECTORS). Rows beyond `rows`
// repeat the last one and are not stored; `last` masks the lanes of the last vector.
template <int VECTORS>
void multiply_tile(
    Left a, const pair32* panel, int64_t terms, float* c, int64_t stride, int64_t rows, __mmask16 last, bool add) {
  __m512 sums[TILE_ROWS][VECTORS];
  const bits16* left[TILE_ROWS];
#pragma GCC unroll 6
  for (int64_t i = 0; i < TILE_ROWS; ++i) {
    left[i] = a.at + std::min(i, rows - 1) * a.row;
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) sums[i][v] = _mm512_setzero_ps();
  }
  int64_t offset = 0;
  for (int64_t k = 0; k + 1 < terms; k += 2, offset += a.pair, panel += VECTORS * LANES) {
    __m512 right[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) right[v] = _mm512_loadu_ps(panel + v * LANES);
#pragma GCC unroll 6
    for (int64_t i = 0; i < TILE_ROWS; ++i) {
      const __m512 broadcast = broadcast_pair(left[i] + offset);
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) sums[i][v] = multiply_add(sums[i][v], broadcast, right[v]);
    }
  }
  if (terms % 2) {
    for (int64_t i = 0; i < TILE_ROWS; ++i) {
      const __m512 half = _mm512_castsi512_ps(_mm512_set1_epi32(left[i][offset]));
      for (int v = 0; v < VECTORS; ++v) sums[i][v] = multiply_add(sums[i][v], half, _mm512_loadu_ps(panel + v * LANES));
    }
  }
#pragma GCC unroll 6
  for (int64_t i = 0; i < TILE_ROWS; ++i) {
    if (i >= rows) break;
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) {
      float* at = c + i * stride + v * LANES;
      const __mmask16 lanes = v == VECTORS - 1 ? last : __mmask16(0xffff);
      const __m512 before = add ? _mm512_maskz_loadu_ps(lanes, at) : _mm512_setzero_ps();
      _mm512_mask_storeu_ps(at, lanes, _mm512_add_ps(before, sums[i][v]));
    }
  }
}

// c (rows, width <= 64) = or += a (rows, terms) . panel (terms, width).
void multiply_panel(
    Left a, const pair32* panel, int64_t terms, float* c, int64_t stride, int64_t rows, int64_t width, bool add) {
  const int64_t vectors = blocks_of(width, LANES);
  const auto tile = vectors == 4   ? multiply_tile<4>
                    : vectors == 3 ? multiply_tile<3>
                    : vectors == 2 ? multiply_tile<2>
                                   : multiply_tile<1>;
  const __mmask16 last = first_lanes(width - (vectors - 1) * LANES);
  for (int64_t i = 0; i < rows; i += TILE_ROWS) {
    for (int64_t k = 0; k < terms; k += SUM_TERMS) {
      const Left at{a.at + i * a.row + k / 2 * a.pair, a.row, a.pair};
      const pair32* right = panel + k / 2 * vectors * LANES;
      const int64_t height = std::min(TILE_ROWS, rows - i), depth = std::min(SUM_TERMS, terms - k);
      tile(at, right, depth, c + i * stride, stride, height, last, add || k > 0);
    }
  }
}

// Packs two rows: lane j of `into` is the pair (upper[j], lower[j]); a missing lower row counts as zeros.
void interleave(const bits16* upper, const bits16* lower, int64_t width, pair32* into) {
  for (int64_t j = 0; j < width; j += LANES) {
    const __mmask16 lanes = first_lanes(width - j);
    __m512i both = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, upper + j));
    if (lower) {
      const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, lower + j));
      both = _mm512_or_si512(both, _mm512_slli_epi32(high, 16));
    }
    _mm512_storeu_si512(into + j, both);
  }
}

// Packs rows (terms, width) whose *columns* are the lanes: a pair comes from two rows. Pairs lie `stride` apart.
void pack_columns(const bits16* rows, int64_t row, int64_t terms, int64_t width, pair32* into, int64_t stride) {
  for (int64_t k = 0; k < terms; k += 2, into += stride) {
    const bits16* upper = rows + k * row;
    interleave(upper, k + 1 < terms ? upper + row : nullptr, width, into);
  }
}

// Packs rows (width, terms) whose *rows* are the lanes: pairs lie side by side already.
void pack_rows(const bits16* rows, int64_t row, int64_t terms, int64_t width, pair32* into, int64_t stride) {
  for (int64_t lane = 0; lane < stride; ++lane) {
    for (int64_t k = 0; k < terms; k += 2) {
      pair32 both = 0;
      if (lane < width) __builtin_memcpy(&both, rows + lane * row + k, (k + 1 < terms ? 2 : 1) * sizeof(bits16));
      into[k / 2 * stride + lane] = both;
    }
  }
}

// A right operand (terms, width) packed as a whole, in blocks of DEPTH terms, each in panels of 64 columns.
class Packed {
 public:
  Packed(const bits16* at, int64_t row, int64_t terms, int64_t width, bool lanes_are_rows)
      : terms_(terms), width_(width), pairs_(size_t(blocks_of(terms, DEPTH) * (DEPTH / 2) * padded())) {
    const int64_t panels = blocks_of(width, PANEL);
    for_each_task(blocks_of(terms, DEPTH) * panels, [&](int64_t task) {
      const int64_t k = task / panels * DEPTH, j = task % panels * PANEL;
      const bits16* from = lanes_are_rows ? at + j * row + k : at + k * row + j;
      auto pack = lanes_are_rows ? pack_rows : pack_columns;
      pack(from, row, terms_at(k), std::min(PANEL, width - j), pairs_.data() + offset(k, j), stride_at(j));
    });
  }

  // c (rows, width) = or += a (rows, terms) . this
  void multiply(Left a, float* c, int64_t stride, int64_t rows, bool add) const {
    for (int64_t j = 0; j < width_; j += PANEL) {
      for (int64_t k = 0; k < terms_; k += DEPTH) {  // inside: this panel of c stays in L2
        const Left from{a.at + k / 2 * a.pair, a.row, a.pair};
        const int64_t width = std::min(PANEL, width_ - j);
        multiply_panel(from, pairs_.data() + offset(k, j), terms_at(k), c + j, stride, rows, width, add || k > 0);
      }
    }
  }

 private:
  int64_t padded() const { return blocks_of(width_, LANES) * LANES; }
  int64_t terms_at(int64_t k) const { return std::min(DEPTH, terms_ - k); }
  int64_t stride_at(int64_t j) const { return std::min(PANEL, padded() - j); }
  int64_t offset(int64_t k, int64_t j) const { return k / 2 * padded() + j * (DEPTH / 2); }

  int64_t terms_, width_;
  std::vector<pair32> pairs_;
};

const bits16* bits(const Tensor& t) { return static_cast<const bits16*>(t.const_data_ptr()); }

// c (I, J) = or += a (I, K) . b, with b given as (K, J) or, transposed, as (J, K).
void multiply(const Tensor& a, const Tensor& b, bool transposed, const Tensor& c, bool add) {
  check_rows(a, at::kBFloat16, "a");
  check_rows(b, at::kBFloat16, "b");
  check_rows(c, at::kFloat, "c");
  const int64_t terms = a.size(1), height = a.size(0);
  const Packed right(bits(b), b.stride(0), terms, c.size(1), transposed);
  float* out = c.mutable_data_ptr<float>();
  for_each_task(blocks_of(height, PRODUCT_ROWS), [&](int64_t task) {
    const int64_t i = task * PRODUCT_ROWS;
    const Left left{bits(a) + i * a.stride(0), a.stride(0), 2};
    right.multiply(left, out + i * c.stride(0), c.stride(0), std::min(PRODUCT_ROWS, height - i), add);
  });
}

// A block (I, J) of c = a' b for a (K, I), b (K, J) and K large: both are packed DEPTH terms at a time, in L2.
struct TransposedBlock {
  const Tensor &a, &b, &c;
  int64_t i, j, height, width;

  void multiply() const {
    // the odd number of cache lines between pairs spreads them over the sets of L1
    const int64_t left_stride = blocks_of(height, LANES) * LANES + LANES * (1 - blocks_of(height, LANES) % 2);
    std::vector<pair32> left(size_t(DEPTH / 2 * left_stride));
    std::vector<pair32> right(size_t(DEPTH / 2 * blocks_of(width, LANES) * LANES));
    for (int64_t k = 0; k < a.size(0); k += DEPTH) {
      const int64_t terms = std::min(DEPTH, a.size(0) - k);
      pack_columns(bits(a) + k * a.stride(0) + i, a.stride(0), terms, height, left.data(), left_stride);
      const Left from{reinterpret_cast<const bits16*>(left.data()), 2, 2 * left_stride};
      for (int64_t column = 0; column < width; column += PANEL) {
        const int64_t lanes = std::min(PANEL, width - column);
        const bits16* from_b = bits(b) + k * b.stride(0) + j + column;
        pack_columns(from_b, b.stride(0), terms, lanes, right.data(), blocks_of(lanes, LANES) * LANES);
        float* out = c.mutable_data_ptr<float>() + i * c.stride(0) + j + column;
        multiply_panel(from, right.data(), terms, out, c.stride(0), height, lanes, k > 0);
      }
    }
  }
};

// c (I, J) = a' b for a (K, I), b (K, J).
void multiply_transposed(const Tensor& a, const Tensor& b, const Tensor& c) {
  check_rows(a, at::kBFloat16, "a");
  check_rows(b, at::kBFloat16, "b");
  check_rows(c, at::kFloat, "c");
  const int64_t height = c.size(0), width = c.size(1);
  const int64_t across = blocks_of(width, BLOCK_COLUMNS), threads = at::get_num_threads();
  int64_t down = blocks_of(height, BLOCK_ROWS);
  while (down * across % threads && down * 4 * TILE_ROWS < height) ++down;  // as much work for every thread
  const int64_t tall = blocks_of(blocks_of(height, down), TILE_ROWS) * TILE_ROWS;
  const int64_t wide = blocks_of(blocks_of(width, across), PANEL) * PANEL;
  for_each_task(down * across, [&](int64_t task) {
    const int64_t i = task / across * tall, j = task % across * wide;
    if (i >= height || j >= width) return;
    TransposedBlock{a, b, c, i, j, std::min(tall, height - i), std::min(wide, width - j)}.multiply();
  });
}

// ------------------------------------------------------------------------------------------------ sums over the scores

// A vector of M values, one per token, padded to whole vector registers.
std::vector<float> padded(const Tensor& t, int64_t tokens, float fill) {
  const bool fits = t.dim() == 1 && t.numel() == tokens && t.scalar_type() == at::kFloat;
  TORCH_CHECK(fits, "expected ", tokens, " float32 values");
  const Tensor flat = t.contiguous();
  std::vector<float> out(size_t(blocks_of(tokens, LANES) * LANES), fill);
  std::copy_n(flat.const_data_ptr<float>(), tokens, out.begin());
  return out;
}

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
    q = _mm512_mask_loadu_ps(q, here, &target_q[token]);
    return log_of(_mm512_max_ps(_mm512_loadu_ps(&floor[token]), q));
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
    if (below < -104) continue;
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
    std::vector<float> sums(size_t(width), 0.0f);
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

// 1 / q of every token's target, from log q as kept.
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

// -------------------------------------------------------------------------------------------------------------- rows

__m512 load_wide(const float* at, __mmask16 lanes) { return _mm512_maskz_loadu_ps(lanes, at); }

__m512 load_wide(const bits16* at, __mmask16 lanes) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, at)), 16));
}

template <class Stored>
float sum_squares(const Stored* row, int64_t width) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t k = 0; k < width; k += LANES) {
    const __m512 x = load_wide(row + k, first_lanes(width - k));
    sum = _mm512_fmadd_ps(x, x, sum);
  }
  return _mm512_reduce_add_ps(sum);
}

// total = 2 (factor * row - total), (width,) each
template <class Stored>
void finish_row(float* total, const Stored* row, float factor, int64_t width) {
  for (int64_t k = 0; k < width; k += LANES) {
    const __mmask16 lanes = first_lanes(width - k);
    const __m512 product = _mm512_maskz_loadu_ps(lanes, total + k);
    const __m512 half = _mm512_fmsub_ps(load_wide(row + k, lanes), _mm512_set1_ps(factor), product);
    _mm512_mask_storeu_ps(total + k, lanes, _mm512_add_ps(half, half));
  }
}

// Calls work(v, row v) for every row of (V, D) memory.
template <class Stored, class Work>
void for_each_row(const Tensor& rows, const Work& work) {
  const Stored* at = static_cast<const Stored*>(rows.const_data_ptr());
  const int64_t stride = rows.stride(0);
  at::parallel_for(0, rows.size(0), 64, [&](int64_t first, int64_t end) {
    for (int64_t v = first; v < end; ++v) work(v, at + v * stride);
  });
}

// The same for rows of bfloat16 or float32.
template <class Work>
void for_each_row_of_either(const Tensor& rows, const Work& work) {
  const bool bfloat16 = rows.scalar_type() == at::kBFloat16;
  check_rows(rows, bfloat16 ? at::kBFloat16 : at::kFloat, "rows");
  bfloat16 ? for_each_row<bits16>(rows, work) : for_each_row<float>(rows, work);
}

// (V, D) -> (V,) squared norms
Tensor square_norms(const Tensor& rows) {
  const Tensor out = at::empty({rows.size(0)}, rows.options().dtype(at::kFloat));
  float* at = out.mutable_data_ptr<float>();
  for_each_row_of_either(rows, [&](int64_t v, const auto* row) { at[v] = sum_squares(row, rows.size(1)); });
  return out;
}

// A row of length 1 is row / (largest * length), with the length of row / largest: no overflow.
struct RowLength {
  float largest, length;  // 1 and 1 for a row of zeros
};

RowLength length_of(const float* row, int64_t width) {
  __m512 top = _mm512_setzero_ps();
  for (int64_t k = 0; k < width; k += LANES) {
    top = _mm512_max_ps(top, _mm512_abs_ps(load_wide(row + k, first_lanes(width - k))));
  }
  const float largest = _mm512_reduce_max_ps(top) > 0 ? _mm512_reduce_max_ps(top) : 1.0f;
  __m512 sum = _mm512_setzero_ps();
  for (int64_t k = 0; k < width; k += LANES) {
    const __m512 x = _mm512_div_ps(load_wide(row + k, first_lanes(width - k)), _mm512_set1_ps(largest));
    sum = _mm512_fmadd_ps(x, x, sum);
  }
  const float square = _mm512_reduce_add_ps(sum);
  return {largest, square == 0 ? 1.0f : std::sqrt(square)};
}

__m512 unit_at(const float* at, __mmask16 lanes, RowLength row) {
  const __m512 scaled = _mm512_div_ps(load_wide(at, lanes), _mm512_set1_ps(row.largest));
  return _mm512_div_ps(scaled, _mm512_set1_ps(row.length));
}

// (V, D) -> (V, D) with rows of length 1
Tensor unit_rows(const Tensor& rows) {
  const Tensor out = at::empty(rows.sizes(), rows.options());
  const int64_t width = rows.size(1);
  float* to = out.mutable_data_ptr<float>();
  check_rows(rows, at::kFloat, "rows");
  for_each_row<float>(rows, [&](int64_t v, const float* row) {
    const RowLength length = length_of(row, width);
    for (int64_t k = 0; k < width; k += LANES) {
      const __mmask16 lanes = first_lanes(width - k);
      _mm512_mask_storeu_ps(to + v * width + k, lanes, unit_at(row + k, lanes, length));
    }
  });
  return out;
}

// The way back: (grad - unit (unit . grad)) / |row|, 0 for a row of zeros.
Tensor unit_rows_gradient(const Tensor& rows, const Tensor& grad) {
  check_rows(rows, at::kFloat, "rows");
  check_rows(grad, at::kFloat, "grad");
  TORCH_CHECK(rows.sizes() == grad.sizes(), "expected a gradient for every row");
  const Tensor out = at::empty(rows.sizes(), rows.options());
  const int64_t width = rows.size(1);
  const float* from = grad.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  for_each_row<float>(rows, [&](int64_t v, const float* row) {
    const RowLength length = length_of(row, width);
    const float* upstream = from + v * grad.stride(0);
    __m512 sum = _mm512_setzero_ps(), any = _mm512_setzero_ps();
    for (int64_t k = 0; k < width; k += LANES) {
      const __mmask16 lanes = first_lanes(width - k);
      const __m512 unit = unit_at(row + k, lanes, length);
      sum = _mm512_fmadd_ps(unit, load_wide(upstream + k, lanes), sum);
      any = _mm512_fmadd_ps(unit, unit, any);
    }
    const __m512 along = _mm512_set1_ps(_mm512_reduce_add_ps(sum));
    const bool zeros = _mm512_reduce_add_ps(any) == 0;
    for (int64_t k = 0; k < width; k += LANES) {
      const __mmask16 lanes = first_lanes(width - k);
      const __m512 across = _mm512_fnmadd_ps(unit_at(row + k, lanes, length), along, load_wide(upstream + k, lanes));
      const __m512 scaled = _mm512_div_ps(across, _mm512_set1_ps(length.length));
      __m512 back = _mm512_div_ps(scaled, _mm512_set1_ps(length.largest));
      back = _mm512_min_ps(_mm512_set1_ps(FLT_MAX), _mm512_max_ps(_mm512_set1_ps(-FLT_MAX), back));  // NaN stays
      _mm512_mask_storeu_ps(to + v * width + k, lanes, zeros ? _mm512_setzero_ps() : back);
    }
  });
  return out;
}

// total (V, D) = 2 (columns * rows - total), in place
void finish_rows(const Tensor& total, const Tensor& rows, const Tensor& columns) {
  check_rows(total, at::kFloat, "total");
  TORCH_CHECK(total.sizes() == rows.sizes(), "expected a total for every row");
  const std::vector<float> factors = padded(columns, rows.size(0), 0.0f);
  float* at = total.mutable_data_ptr<float>();
  for_each_row_of_either(rows, [&](int64_t v, const auto* row) {
    finish_row(at + v * total.stride(0), row, factors[v], rows.size(1));
  });
}

// ------------------------------------------------------------------------------------------------------------- memory

// Asks for huge pages under a large new tensor: touching it page by page costs more than a pass over it.
void advise_huge_pages(const Tensor& t) {
  const auto from = reinterpret_cast<uintptr_t>(t.data_ptr());
  const uintptr_t first = (from + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
  const uintptr_t end = (from + t.nbytes()) / HUGE_PAGE * HUGE_PAGE;
  if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);  // no huge pages: no harm
}

}  // namespace

TORCH_LIBRARY(overtone_cpu, library) {
  library.def("multiply(Tensor a, Tensor b, bool transposed, Tensor c, bool add) -> ()", &multiply);
  library.def("multiply_transposed(Tensor a, Tensor b, Tensor c) -> ()", &multiply_transposed);
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
  library.def("finish_rows(Tensor total, Tensor rows, Tensor columns) -> ()", &finish_rows);
  library.def("unit_rows(Tensor rows) -> Tensor", &unit_rows);
  library.def("unit_rows_gradient(Tensor rows, Tensor grad) -> Tensor", &unit_rows_gradient);
  library.def("square_norms(Tensor rows) -> Tensor", &square_norms);
  library.def("advise_huge_pages(Tensor t) -> ()", &advise_huge_pages);
}

}  // namespace overtone
