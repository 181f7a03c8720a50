// What the contractions that are no matrix product and their gradients share: powers, and sums of a tile of pairs.
//
// Legend: M tokens of a chunk, V prototypes, D width, t an entry of x - w. The sign of Terms goes to x on the way in
// and to its gradient on the way out: |x + w| = |-x - w|.
//
// Tokens lie along the vector lanes: a register tile holds the sums of a few prototypes and up to 64 tokens. The order
// of every sum depends on the shapes alone: same inputs, same bits, with any number of threads.

#pragma once

#include "cpu.h"

#include <cmath>

namespace overtone {
namespace {  // each of the two files has its own: the compiler may fit them to their calls

constexpr int64_t TERMS = 32;          // summed before they join the sum in memory: of one sign, they round worse
constexpr int64_t TASK_ROWS = 96;      // prototypes whose entries stay in L2 while all tokens pass
constexpr float SMALLEST = 0x1p-60f;   // as in eager.py

__m512 absolute(__m512 t) { return _mm512_abs_ps(t); }

// -1, 0 or 1; NaN stays NaN. The table has 4 bits for each class of numbers, from the right: NaN of two kinds
// (2: as it is), 0 (8: 0), then 1, -inf, inf, below 0, above 0 (9: -1, A: 1).
__m512 sign_of(__m512 t) { return _mm512_fixupimm_ps(t, t, _mm512_set1_epi32(int(0xA9A9A822)), 0); }

// work(0 .. N - 1), unrolled
template <int N, class Work>
inline __attribute__((always_inline)) void each(const Work& work) {
#pragma GCC unroll 8
  for (int v = 0; v < N; ++v) work(v);
}

// ------------------------------------------------------------------------------------------------------------- powers

// x^exponent for x >= 0 with 0^exponent = 0, about as near as |exponent| roundings of x.
//   x = 2^e m, m in [0.75, 1.5);  log2 x = (e + logs[i]) + log2(1 + z);  1 + z = m reciprocals[i];  i: m's first bits
// The reciprocals are those whose logarithms are nearest to multiples of 2^-16: e + logs[i] is exact, and so is 0 at 1.
// The power is then 2^n 2^(j / 16) 2^f with |f| <= 1 / 32; log2(1 + z) / z and 2^f are minimax fits.
struct Power {
  __m512 exponent;
  int halves;  // of the exponent; 0 where they are not whole, or too many

  explicit Power(double power) : exponent(_mm512_set1_ps(float(power))), halves(0) {
    if (power > 0 && power <= 8 && 2 * power == std::floor(2 * power)) halves = int(2 * power);
  }

  static __m512 reciprocals() {
    return _mm512_setr_ps(
        0x1p+0f, 0x1.d384dep-1f, 0x1.ba6bc8p-1f, 0x1.a4657ep-1f, 0x1.8fb8cep-1f, 0x1.7d259ep-1f, 0x1.6b7b36p-1f,
        0x1.5c18bep-1f, 0x1.4efd3p+0f, 0x1.41109ep+0f, 0x1.359dc8p+0f, 0x1.29d684p+0f, 0x1.1fae02p+0f, 0x1.15375ep+0f,
        0x1.0d1882p+0f, 0x1p+0f);
  }
  static __m512 logs() {  // of m below 1, one more: getexp counts from the power of 2 below
    return _mm512_setr_ps(
        0.0f, 0x1.0c88p-3f, 0x1.af9p-3f, 0x1.2338p-2f, 0x1.6db8p-2f, 0x1.b404p-2f, 0x1.fa2p-2f, 0x1.1d02p-1f,
        0x1.395cp-1f, 0x1.58b8p-1f, 0x1.738ap-1f, 0x1.903p-1f, 0x1.a9d2p-1f, 0x1.c53p-1f, 0x1.db26p-1f, 1.0f);
  }
  static __m512 sixteenths() {  // 2^(j / 16)
    return _mm512_setr_ps(
        0x1p+0f, 0x1.0b5586p+0f, 0x1.172b84p+0f, 0x1.2387a6p+0f, 0x1.306fep+0f, 0x1.3dea64p+0f, 0x1.4bfdaep+0f,
        0x1.5ab07ep+0f, 0x1.6a09e6p+0f, 0x1.7a1148p+0f, 0x1.8ace54p+0f, 0x1.9c4918p+0f, 0x1.ae89fap+0f, 0x1.c199bep+0f,
        0x1.d5818ep+0f, 0x1.ea4afap+0f);
  }

  // Where x is not above `least` the result is 0. One power is a long chain: the processor looks ahead far enough to
  // overlap chains only if they take turns (measured: 4 at a time are a sixth faster).
  template <int N>
  void raise(__m512 (&x)[N], __m512 least) const {
    halves ? raise_by_products(x) : raise_by_logarithm(x, least);
  }

  template <int N>
  void raise_by_products(__m512 (&x)[N]) const {
    __m512 product[N];
    // powers by squaring, all N in step, so that their chains overlap
    each<N>([&](int v) { product[v] = halves % 2 ? _mm512_sqrt_ps(x[v]) : _mm512_set1_ps(1.0f); });
    for (int whole = halves / 2; whole; whole /= 2) {
      if (whole % 2) each<N>([&](int v) { product[v] = _mm512_mul_ps(product[v], x[v]); });
      if (whole > 1) each<N>([&](int v) { x[v] = _mm512_mul_ps(x[v], x[v]); });
    }
    each<N>([&](int v) { x[v] = product[v]; });
  }

  template <int N>
  void raise_by_logarithm(__m512 (&x)[N], __m512 least) const {
    __mmask16 some[N];
    __m512 m[N], z[N], whole[N], y[N], n[N], sixteenth[N];
    const __m512 shift = _mm512_set1_ps(0x1.8p+19f);  // added, it rounds to sixteenths and leaves j in the last 4 bits
    const auto step = [](__m512(&value)[N], const __m512(&factor)[N], float term) {
      each<N>([&](int v) { value[v] = _mm512_fmadd_ps(value[v], factor[v], _mm512_set1_ps(term)); });
    };
    // unordered: NaN counts, and stays
    each<N>([&](int v) { some[v] = _mm512_cmp_ps_mask(x[v], least, _CMP_NLE_UQ); });
    each<N>([&](int v) { m[v] = _mm512_getmant_ps(x[v], _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_src); });
    each<N>([&](int v) {
      const __m512i i = _mm512_srli_epi32(_mm512_castps_si512(m[v]), 19);  // the permutations read 4 bits of it
      z[v] = _mm512_fmsub_ps(m[v], _mm512_permutexvar_ps(i, reciprocals()), _mm512_set1_ps(1.0f));
      whole[v] = _mm512_add_ps(_mm512_getexp_ps(x[v]), _mm512_permutexvar_ps(i, logs()));
    });
    each<N>([&](int v) { y[v] = _mm512_set1_ps(0x1.1597cp-2f); });
    step(y, z, -0x1.716c82p-2f);
    step(y, z, 0x1.ec75f6p-2f);
    step(y, z, -0x1.715478p-1f);
    step(y, z, 0x1.715476p+0f);
    each<N>([&](int v) { z[v] = _mm512_mul_ps(y[v], z[v]); });  // log2(1 + z)
    each<N>([&](int v) { y[v] = _mm512_fmadd_ps(exponent, _mm512_add_ps(whole[v], z[v]), shift); });
    each<N>([&](int v) { n[v] = _mm512_sub_ps(y[v], shift); });
    each<N>([&](int v) { sixteenth[v] = _mm512_permutexvar_ps(_mm512_castps_si512(y[v]), sixteenths()); });
    // what is large cancels in one rounding, before what is small joins it
    each<N>([&](int v) { whole[v] = _mm512_fmsub_ps(exponent, whole[v], n[v]); });
    each<N>([&](int v) { z[v] = _mm512_fmadd_ps(exponent, z[v], whole[v]); });  // f
    each<N>([&](int v) { y[v] = _mm512_set1_ps(0x1.c6ac6ap-5f); });
    step(y, z, 0x1.ebfff4p-3f);
    step(y, z, 0x1.62e43p-1f);
    each<N>([&](int v) { y[v] = _mm512_fmadd_ps(_mm512_mul_ps(y[v], z[v]), sixteenth[v], sixteenth[v]); });
    each<N>([&](int v) { x[v] = _mm512_maskz_scalef_ps(some[v], y[v], n[v]); });  // scalef takes the floor of n
  }

  __m512 operator()(__m512 x) const {
    __m512 one[1] = {x};
    raise(one, _mm512_setzero_ps());
    return one[0];
  }
};

// ------------------------------------------------------------------------------------------------------------- terms

// What happens to an entry: a kind makes a term of x, w and, for some, another value of the pair, and joins terms.
// Powers come in several at a time.

struct Sum {
  static __m512 join(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
};

// |t|^p in units of the largest, whose inverse is given.
struct Powers : Sum {
  static constexpr int ROWS = 2;
  Power power;
};

template <class Kind, int N>
inline __attribute__((always_inline)) void add_terms(
    const Kind& kind, __m512 (&sums)[N], const __m512 (&x)[N], __m512 w, const __m512 (&others)[N], int64_t k) {
  each<N>([&](int v) { sums[v] = kind(sums[v], x[v], w, others[v], k); });
}

template <int N>
inline __attribute__((always_inline)) void add_terms(
    const Powers& kind, __m512 (&sums)[N], const __m512 (&x)[N], __m512 w, const __m512 (&inverses)[N], int64_t) {
  __m512 terms[N];
  each<N>([&](int v) { terms[v] = _mm512_mul_ps(absolute(_mm512_sub_ps(x[v], w)), inverses[v]); });
  kind.power.raise(terms, _mm512_setzero_ps());
  each<N>([&](int v) { sums[v] = _mm512_add_ps(sums[v], terms[v]); });
}

// The tokens (M, D), times a sign, in panels of up to 64: (panels, D, tokens of the panel in whole vectors).
// Lanes beyond the last token are zeros, and what comes of them lies in the padding of the results.
class Panels {
 public:
  Panels(const Tensor& x, float sign)
      : tokens_(x.size(0)), width_(x.size(1)), data_(size_t(blocks_of(tokens_, LANES) * LANES * width_)) {
    const float* from = x.const_data_ptr<float>();
    const int64_t row = x.stride(0);
    for_each_task(count(), [&](int64_t panel) {
      const int64_t first = panel * PANEL, lanes = vectors(panel) * LANES;
      float* to = data_.data() + first * width_;
      for (int64_t lane = 0; lane < std::min(PANEL, tokens_ - first); ++lane) {
        for (int64_t k = 0; k < width_; ++k) to[k * lanes + lane] = sign * from[(first + lane) * row + k];
      }
    });
  }

  int64_t count() const { return blocks_of(tokens_, PANEL); }
  int64_t vectors(int64_t panel) const { return std::min(TILE_VECTORS, blocks_of(tokens_ - panel * PANEL, LANES)); }
  int64_t width() const { return width_; }
  const float* at(int64_t panel) const { return data_.data() + panel * PANEL * width_; }

 private:
  int64_t tokens_, width_;
  std::vector<float> data_;
};

// Some prototypes: rows of (V, D) memory.
struct Prototypes {
  const float* at;
  int64_t stride;
  int64_t count;
};

// One value for each of some prototypes and the tokens of a panel, in memory.
struct Pairs {
  float* at;
  int64_t stride;
};

struct GivenPairs {
  const float* at;
  int64_t stride;
  GivenPairs(const float* where, int64_t row) : at(where), stride(row) {}
  GivenPairs(Pairs pairs) : at(pairs.at), stride(pairs.stride) {}
  GivenPairs from(int64_t row, int64_t token) const { return {at + row * stride + token, stride}; }
};

// One register tile: sums over `depth` terms from the `first` on become, or join, those in memory. Rows beyond `rows`
// repeat the last one and are not stored.
template <int VECTORS, class Kind>
void contract_tile(
    const Kind& kind, const float* w, int64_t w_stride, int64_t rows, const float* panel, int64_t first, int64_t depth,
    Pairs sums, GivenPairs others) {
  constexpr int ROWS = Kind::ROWS;
  __m512 tile[ROWS][VECTORS], other[ROWS][VECTORS];
  const float* left[ROWS];
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i) {
    const int64_t row = std::min<int64_t>(i, rows - 1);  // a full tile always: one loop, unrolled, no branches
    left[i] = w + row * w_stride;
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) {
      tile[i][v] = _mm512_setzero_ps();
      other[i][v] = others.at ? _mm512_loadu_ps(others.at + row * others.stride + v * LANES) : _mm512_setzero_ps();
    }
  }
  for (int64_t k = 0; k < depth; ++k, panel += VECTORS * LANES) {
    __m512 right[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) right[v] = _mm512_loadu_ps(panel + v * LANES);
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) {
      add_terms(kind, tile[i], right, _mm512_set1_ps(left[i][k]), other[i], first + k);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i) {
    if (i >= rows) break;
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) {
      float* at = sums.at + i * sums.stride + v * LANES;
      // the first span writes: nobody had to fill the memory with zeros
      _mm512_storeu_ps(at, first ? Kind::join(_mm512_loadu_ps(at), tile[i][v]) : tile[i][v]);
    }
  }
}

// Prototypes against one panel. A part of the panel stays in L1 while the prototypes pass.
template <class Kind>
void contract_panel(
    const Kind& kind, Prototypes w, const Panels& x, int64_t panel, Pairs sums, GivenPairs others = {nullptr, 0}) {
  const int64_t vectors = x.vectors(panel);
  const auto tile = vectors == 4   ? contract_tile<4, Kind>
                    : vectors == 3 ? contract_tile<3, Kind>
                    : vectors == 2 ? contract_tile<2, Kind>
                                   : contract_tile<1, Kind>;
  for (int64_t k = 0; k < x.width(); k += TERMS) {
    const int64_t depth = std::min(TERMS, x.width() - k);
    for (int64_t i = 0; i < w.count; i += Kind::ROWS) {
      const Pairs into{sums.at + i * sums.stride, sums.stride};
      const GivenPairs other = others.at ? others.from(i, 0) : others;
      const int64_t rows = std::min<int64_t>(Kind::ROWS, w.count - i);
      const float* terms = x.at(panel) + k * vectors * LANES;
      tile(kind, w.at + i * w.stride + k, w.stride, rows, terms, k, depth, into, other);
    }
  }
}

// Calls work(vector) for every vector of a panel's pairs.
template <class Work>
void for_each_vector(Pairs pairs, int64_t rows, int64_t vectors, const Work& work) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t v = 0; v < vectors; ++v) work(i, v, pairs.at + i * pairs.stride + v * LANES);
  }
}

void check_operands(const Tensor& x, const Tensor& w) {
  check_rows(x, at::kFloat, "x");
  check_rows(w, at::kFloat, "w");
  TORCH_CHECK(x.size(1) == w.size(1), "expected tokens and prototypes of one width");
}

}  // namespace
}  // namespace overtone
