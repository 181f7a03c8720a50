// Matrix products of bfloat16 with float32 sums and results, for CPUs with AVX512_BF16; eager.py's `product`.
//
// Legend: M tokens of a chunk, V prototypes, D width.
//   scores (V, M) = rows (V, D) . x' (D, M)      pairs of a row lie side by side, as they are stored
//   dw     (V, D) = G    (V, M) . x  (M, D)      likewise
//   dx     (M, D) = G'   (M, V) . rows (V, D)    both packed, block by block
// `_mm512_dpbf16_ps` adds the products of *pairs* of bfloat16 to float32 lanes: the left operand is a pair broadcast to
// all lanes, the right one 16 pairs packed side by side. An odd number of terms leaves half a pair, which counts as
// zero.
//
// The order of every sum depends on the shapes alone: same inputs, same bits, with any number of threads.

#include "cpu.h"

#include <torch/library.h>

#include <vector>

namespace overtone {
namespace {

using pair32 = uint32_t;  // two bfloat16

constexpr int64_t TILE_ROWS = 6;     // a register tile is 6 rows x 4 vectors: 24 sums, 4 right vectors, 1 broadcast
constexpr int64_t DEPTH = 512;       // terms of a sum taken at a time (measured: 192, 256 and 384 are slower)
constexpr int64_t PRODUCT_ROWS = 40 * TILE_ROWS;  // of the left operand, of one task: whole register tiles
constexpr int64_t BLOCK_ROWS = 512, BLOCK_COLUMNS = 384;  // of the product whose operands are packed as it goes

// The left operand of a product: entry (i, k) at i * row + k * (terms of a pair side by side), pairs `pair` apart.
struct Left {
  const bits16* at;
  int64_t row;
  int64_t pair;
};

__m512 broadcast_pair(const bits16* at) {
  pair32 both;
  __builtin_memcpy(&both, at, sizeof both);  // a row of odd width starts between words
  return _mm512_castsi512_ps(_mm512_set1_epi32(int(both)));
}

#ifdef __AVX512BF16__
__m512 multiply_add(__m512 sum, __m512 a, __m512 b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
#else  // cpu.py selects float32 only
__m512 multiply_add(__m512 sum, __m512, __m512) { return sum; }
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
  if (terms % 2) {  // the upper half of the pair is zeros, not the next row's first entry
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
    for (int64_t k = 0; k < terms; k += SUM_TERMS) {  // each joins c in memory: no sum in a register is longer
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

// A right operand (terms, width) packed as a whole, once for all tasks: in blocks of DEPTH terms, each in panels of 64
// columns.
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
  // blocks have DEPTH / 2 pairs, and so have their panels, the last block's too, though it may fill fewer
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
    const Left left{bits(a) + i * a.stride(0), a.stride(0), 2};  // as stored: only its pairs are broadcast
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
      // a row of a' is a lane of the packed pairs: the next row is one pair on, the next pair of a row one line
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
    if (i >= height || j >= width) return;  // blocks were rounded up to whole tiles: the last may be empty
    TransposedBlock{a, b, c, i, j, std::min(tall, height - i), std::min(wide, width - j)}.multiply();
  });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(overtone_cpu, library) {
  library.def("multiply(Tensor a, Tensor b, bool transposed, Tensor c, bool add) -> ()", &multiply);
  library.def("multiply_transposed(Tensor a, Tensor b, Tensor c) -> ()", &multiply_transposed);
}

}  // namespace overtone
