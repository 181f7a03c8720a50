// Contractions that are no matrix product, and their gradients: eager.py's `contract` and `contract_gradient`, float32.
//
// Legend: M tokens of a chunk, V prototypes, D width, t an entry of x - w. The sign of Terms goes to x on the way in
// and to its gradient on the way out: |x + w| = |-x - w|.
//
// Forward, tokens lie along the vector lanes, as in cpu.cpp: a register tile holds the sums of a few prototypes and up
// to 64 tokens. Backward, 16 entries of the width do: a *slice* of all tokens and prototypes is one thread's own, and
// each slope serves both gradients. The order of every sum depends on the shapes alone: same inputs, same bits, with
// any number of threads; in `contract`, with any number of other tokens and prototypes too.

#include "cpu.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cfloat>
#include <cmath>
#include <type_traits>
#include <vector>

namespace overtone {
namespace {

constexpr int64_t TERMS = 32;          // summed before they join the sum in memory: of one sign, they round worse
constexpr int64_t TASK_ROWS = 96;      // prototypes whose entries stay in L2 while all tokens pass
constexpr int64_t BLOCK_TOKENS = 128;  // of a slice: with the gradient half of L1; dw joins the total after so many
constexpr int64_t BLOCK_ROWS = 128;    // prototypes whose part of dx is summed on its own; their G stays in L2
constexpr int64_t PREPARED_ROWS = 64 * BLOCK_ROWS;  // prototypes for which one more value a pair is kept in memory
constexpr int64_t GROUP_SLICES = 8;    // slices that read a block of G while it is in L2
constexpr float SMALLEST = 0x1p-60f;   // as in eager.py

__m512 absolute(__m512 t) { return _mm512_abs_ps(t); }

// -1, 0 or 1; NaN stays NaN.
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

// 1 / x for x > 0 within 1 ulp: division takes as long as all else together.
__m512 inverse_of(__m512 x, __mmask16 where) {
  const __m512 near = _mm512_maskz_rcp14_ps(where, x);
  return _mm512_fmadd_ps(near, _mm512_fnmadd_ps(x, near, _mm512_set1_ps(1.0f)), near);
}

// ------------------------------------------------------------------------------------------------------------ forward

// What happens to an entry: a kind makes a term of x, w and, for some, another value of the pair, and joins terms.
// Powers come in several at a time.

struct Sum {
  static __m512 join(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
};

struct Manhattan : Sum {
  static constexpr int ROWS = 6;
  __m512 operator()(__m512 sum, __m512 x, __m512 w, __m512, int64_t) const {
    const __m512 size = absolute(_mm512_sub_ps(x, w));
    return _mm512_fmadd_ps(size, _mm512_set1_ps(1.0f), sum);  // not on the ports of subtractions: a quarter faster
  }
};

struct Largest {
  static constexpr int ROWS = 6;
  __m512 operator()(__m512 top, __m512 x, __m512 w, __m512, int64_t) const {
    return join(top, absolute(_mm512_sub_ps(x, w)));
  }
  static __m512 join(__m512 a, __m512 b) {  // in the order of integers NaN is above all numbers and stays
    return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
  }
};

// Which entry is the largest, whose size is given: its sign, and below it TIE + its place, summed over all that tie.
struct Ties {
  static constexpr int ROWS = 6;
  static constexpr uint32_t TIE = 1u << 16, SIGN = 1u << 31;
  static constexpr int64_t WIDEST = 1 << 14;  // then no number of ties looks like one
  __m512 operator()(__m512 sum, __m512 x, __m512 w, __m512 top, int64_t k) const {
    const __m512 t = _mm512_sub_ps(x, w);
    const __mmask16 equal = _mm512_cmp_ps_mask(absolute(t), top, _CMP_EQ_OQ);
    const __m512i place = _mm512_set1_epi32(int(TIE + k)), sign = _mm512_set1_epi32(int(SIGN));
    const __m512i signed_place = _mm512_ternarylogic_epi32(place, _mm512_castps_si512(t), sign, 0xF8);  // p | (t & s)
    const __m512i before = _mm512_castps_si512(sum);
    return _mm512_castsi512_ps(_mm512_mask_add_epi32(before, equal, before, signed_place));
  }
  static __m512 join(__m512 a, __m512 b) {
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
  }
};

struct Canberra : Sum {
  static constexpr int ROWS = 4;
  __m512 operator()(__m512 sum, __m512 x, __m512 w, __m512, int64_t) const {
    const __m512 size = _mm512_add_ps(absolute(x), absolute(w));
    const __mmask16 some = _mm512_cmp_ps_mask(size, _mm512_set1_ps(SMALLEST), _CMP_NLE_UQ);
    return _mm512_fmadd_ps(absolute(_mm512_sub_ps(x, w)), inverse_of(size, some), sum);
  }
};

struct Cubes : Sum {
  static constexpr int ROWS = 6;
  __m512 operator()(__m512 sum, __m512 x, __m512 w, __m512, int64_t) const {
    const __m512 t = _mm512_sub_ps(x, w);
    return _mm512_fmadd_ps(_mm512_mul_ps(t, t), absolute(t), sum);
  }
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
    const int64_t row = std::min<int64_t>(i, rows - 1);
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

// (sum |t|^p)^(1/p) = top (sum (|t| / top)^p)^(1/p): no power over- or underflows.
struct Norm {
  Power power, root;

  void operator()(Prototypes w, const Panels& x, int64_t panel, Pairs out) const {
    alignas(64) float tops[TASK_ROWS * PANEL], inverses[TASK_ROWS * PANEL];
    contract_panel(Largest{}, w, x, panel, {tops, PANEL});
    for_each_vector({tops, PANEL}, w.count, x.vectors(panel), [&](int64_t i, int64_t v, float* at) {
      const __m512 top = _mm512_max_ps(_mm512_set1_ps(FLT_MIN), _mm512_load_ps(at));  // NaN stays
      _mm512_store_ps(at, top);
      _mm512_store_ps(inverses + i * PANEL + v * LANES, _mm512_div_ps(_mm512_set1_ps(1.0f), top));
    });
    contract_panel(Powers{{}, power}, w, x, panel, out, {inverses, PANEL});
    for_each_vector(out, w.count, x.vectors(panel), [&](int64_t i, int64_t v, float* at) {
      const __m512 top = _mm512_load_ps(tops + i * PANEL + v * LANES);
      _mm512_storeu_ps(at, _mm512_mul_ps(top, root(_mm512_loadu_ps(at))));
    });
  }
};

// p = 3 without a power, but for pairs whose cubes over- or underflow.
struct CubicNorm {
  Norm norm;

  static __mmask16 outside(__m512 sum) {
    return _mm512_cmp_ps_mask(sum, _mm512_set1_ps(0x1p-90f), _CMP_LT_OQ) |
           _mm512_cmp_ps_mask(sum, _mm512_set1_ps(0x1p+100f), _CMP_GT_OQ);
  }

  void operator()(Prototypes w, const Panels& x, int64_t panel, Pairs out) const {
    alignas(64) float careful[TASK_ROWS * PANEL];
    contract_panel(Cubes{}, w, x, panel, out);
    bool within = true;
    for_each_vector(out, w.count, x.vectors(panel), [&](int64_t, int64_t, const float* at) {
      within &= !outside(_mm512_loadu_ps(at));
    });
    if (!within) norm(w, x, panel, {careful, PANEL});
    for_each_vector(out, w.count, x.vectors(panel), [&](int64_t i, int64_t v, float* at) {
      const __m512 sum = _mm512_loadu_ps(at), c = norm.root(sum);
      const __m512 excess = _mm512_fmsub_ps(_mm512_mul_ps(c, c), c, sum);  // a step of Newton: 1 / 3 was rounded
      const __m512 slope = _mm512_mul_ps(_mm512_set1_ps(3.0f), _mm512_mul_ps(c, c));
      const __m512 root = _mm512_sub_ps(c, _mm512_div_ps(excess, slope));
      _mm512_storeu_ps(at, _mm512_mask_loadu_ps(root, outside(sum), careful + i * PANEL + v * LANES));
    });
  }
};

// Calls work(prototypes from `first` on, panel, their place in out) for all of them. out (V, whole vectors of tokens)
template <class Work>
void for_each_block(const Tensor& w, const Panels& x, const Tensor& out, const Work& work) {
  const float* from = w.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  for_each_task(blocks_of(w.size(0), TASK_ROWS), [&](int64_t task) {
    const int64_t first = task * TASK_ROWS;
    const Prototypes prototypes{from + first * w.stride(0), w.stride(0), std::min(TASK_ROWS, w.size(0) - first)};
    for (int64_t panel = 0; panel < x.count(); ++panel) {
      work(prototypes, first, panel, Pairs{to + first * out.stride(0) + panel * PANEL, out.stride(0)});
    }
  });
}

void check_operands(const Tensor& x, const Tensor& w) {
  check_rows(x, at::kFloat, "x");
  check_rows(w, at::kFloat, "w");
  TORCH_CHECK(x.size(1) == w.size(1), "expected tokens and prototypes of one width");
}

// c into out (V, whole vectors of tokens)
void contract(
    c10::string_view kind, double p, double sign, const Tensor& x, const Tensor& w, const Tensor& out) {
  check_operands(x, w);
  check_rows(out, at::kFloat, "out");
  TORCH_CHECK(out.size(0) == w.size(0) && out.size(1) == blocks_of(x.size(0), LANES) * LANES, "out: expected padding");
  const Panels panels(x, float(sign));
  const auto each = [&](const auto& work) {
    for_each_block(w, panels, out, [&](Prototypes rows, int64_t, int64_t panel, Pairs into) {
      work(rows, panels, panel, into);
    });
  };
  const auto sums = [](const auto& entry) {
    return [entry](Prototypes rows, const Panels& from, int64_t panel, Pairs into) {
      contract_panel(entry, rows, from, panel, into);
    };
  };
  const Norm norm{Power(p), Power(1 / p)};
  if (kind == "l1") each(sums(Manhattan{}));
  else if (kind == "linf") each(sums(Largest{}));
  else if (kind == "canberra") each(sums(Canberra{}));
  else if (p == 3) each(CubicNorm{norm});
  else each(norm);
}

// ----------------------------------------------------------------------------------------------------------- backward

// 16 entries of a token and N prototypes: dx += scale left, dw += scale right (whose sign is turned at the end). A kind
// makes these of the entries, of G, which `scale` holds, and, for some, of another value of each pair. The N take turns
// at every step: see Power.

struct ManhattanSlope {
  static constexpr int ROWS = 8;
  template <int N>
  void operator()(
      __m512 x, const __m512 (&w)[N], const __m512 (&)[N], __m512 (&)[N], __m512 (&left)[N], __m512 (&right)[N]) const {
    each<N>([&](int j) { left[j] = _mm512_sub_ps(x, w[j]); });
    each<N>([&](int j) { right[j] = left[j] = sign_of(left[j]); });
  }
};

// The other value is 1 / c.
struct CubicSlope {
  static constexpr int ROWS = 8;
  template <int N>
  void operator()(
      __m512 x, const __m512 (&w)[N], const __m512 (&inverse)[N], __m512 (&)[N], __m512 (&left)[N],
      __m512 (&right)[N]) const {
    each<N>([&](int j) { left[j] = _mm512_mul_ps(_mm512_sub_ps(x, w[j]), inverse[j]); });
    each<N>([&](int j) { right[j] = left[j] = _mm512_mul_ps(left[j], absolute(left[j])); });
  }
};

// The other value is 1 / c.
struct PowerSlope {
  static constexpr int ROWS = 4;
  Power power;   // p - 1
  __m512 least;  // ratios up to this one have no slope
  template <int N>
  void operator()(
      __m512 x, const __m512 (&w)[N], const __m512 (&inverse)[N], __m512 (&)[N], __m512 (&left)[N],
      __m512 (&right)[N]) const {
    each<N>([&](int j) { left[j] = _mm512_mul_ps(_mm512_sub_ps(x, w[j]), inverse[j]); });
    each<N>([&](int j) { right[j] = absolute(left[j]); });
    power.raise(right, least);
    each<N>([&](int j) {
      right[j] = left[j] = _mm512_or_ps(right[j], _mm512_and_ps(left[j], _mm512_set1_ps(-0.0f)));
    });
  }
};

// dx: sgn(t) (|w| + sgn(x) w) / (|x| + |w|)^2, and dw with x and w exchanged.
struct CanberraSlope {
  static constexpr int ROWS = 4;
  template <int N>
  void operator()(
      __m512 x, const __m512 (&w)[N], const __m512 (&)[N], __m512 (&scale)[N], __m512 (&left)[N],
      __m512 (&right)[N]) const {
    const __m512 sign = sign_of(x), size = absolute(x);
    __m512 sum[N], inverse[N];
    __mmask16 some[N];
    each<N>([&](int j) { sum[j] = _mm512_add_ps(size, absolute(w[j])); });
    each<N>([&](int j) { some[j] = _mm512_cmp_ps_mask(sum[j], _mm512_set1_ps(SMALLEST), _CMP_NLE_UQ); });
    each<N>([&](int j) { inverse[j] = _mm512_maskz_rcp14_ps(some[j], sum[j]); });
    each<N>([&](int j) { scale[j] = _mm512_mul_ps(scale[j], sign_of(_mm512_sub_ps(x, w[j]))); });
    each<N>([&](int j) { sum[j] = _mm512_fnmadd_ps(sum[j], inverse[j], _mm512_set1_ps(1.0f)); });
    each<N>([&](int j) { inverse[j] = _mm512_fmadd_ps(inverse[j], sum[j], inverse[j]); });
    each<N>([&](int j) { scale[j] = _mm512_mul_ps(scale[j], inverse[j]); });
    each<N>([&](int j) { left[j] = _mm512_fmadd_ps(sign, w[j], absolute(w[j])); });
    each<N>([&](int j) { right[j] = _mm512_fmadd_ps(x, sign_of(w[j]), size); });
    each<N>([&](int j) { scale[j] = _mm512_mul_ps(scale[j], inverse[j]); });
  }
};

// The tokens of one slice, times a sign: (slices, M, 16). Beyond the width there are zeros.
std::vector<float> sliced(const Tensor& x, float sign) {
  const int64_t tokens = x.size(0), width = x.size(1);
  std::vector<float> out(size_t(blocks_of(width, LANES) * tokens * LANES));
  const float* from = x.const_data_ptr<float>();
  for_each_task(blocks_of(width, LANES), [&](int64_t slice) {
    const __mmask16 lanes = first_lanes(width - slice * LANES);
    float* to = out.data() + slice * tokens * LANES;
    for (int64_t m = 0; m < tokens; ++m) {
      const __m512 entries = _mm512_maskz_loadu_ps(lanes, from + m * x.stride(0) + slice * LANES);
      _mm512_storeu_ps(to + m * LANES, _mm512_mul_ps(_mm512_set1_ps(sign), entries));
    }
  });
  return out;
}

void sliced_back(const std::vector<float>& slices, float sign, const Tensor& out) {
  const int64_t tokens = out.size(0), width = out.size(1);
  float* to = out.mutable_data_ptr<float>();
  at::parallel_for(0, tokens, 16, [&](int64_t first, int64_t end) {
    for (int64_t m = first; m < end; ++m) {
      for (int64_t k = 0; k < width; ++k) {
        to[m * out.stride(0) + k] = sign * slices[((k / LANES) * tokens + m) * LANES + k % LANES];
      }
    }
  });
}

// ROWS prototypes and some tokens of one slice; x, dx (tokens, 16), dw (ROWS, 16).
template <int ROWS, class Kind>
void differentiate_tile(
    const Kind& kind, const float* x, int64_t tokens, const float* w, int64_t w_stride, __mmask16 lanes,
    GivenPairs grads, GivenPairs others, float* dx, float* dw) {
  __m512 row[ROWS], sums[ROWS];
#pragma GCC unroll 8
  for (int j = 0; j < ROWS; ++j) {
    row[j] = _mm512_maskz_loadu_ps(lanes, w + j * w_stride);
    sums[j] = _mm512_setzero_ps();
  }
  for (int64_t m = 0; m < tokens; ++m) {
    const __m512 token = _mm512_loadu_ps(x + m * LANES);
    __m512 sum = _mm512_loadu_ps(dx + m * LANES);
    __m512 scale[ROWS], other[ROWS], left[ROWS], right[ROWS];
    each<ROWS>([&](int j) { scale[j] = _mm512_set1_ps(grads.at[j * grads.stride + m]); });
    each<ROWS>([&](int j) { other[j] = _mm512_set1_ps(others.at[j * others.stride + m]); });
    kind(token, row, other, scale, left, right);
    each<ROWS>([&](int j) { sums[j] = _mm512_fmadd_ps(scale[j], right[j], sums[j]); });
    __m512 odd = _mm512_setzero_ps();  // two chains of additions take half as long
    each<ROWS>([&](int j) {
      __m512& half = j % 2 ? odd : sum;
      half = _mm512_fmadd_ps(scale[j], left[j], half);
    });
    _mm512_storeu_ps(dx + m * LANES, _mm512_add_ps(sum, odd));
  }
#pragma GCC unroll 8
  for (int j = 0; j < ROWS; ++j) {
    _mm512_storeu_ps(dw + j * LANES, _mm512_add_ps(_mm512_loadu_ps(dw + j * LANES), sums[j]));
  }
}

// Up to BLOCK_ROWS prototypes and all tokens of one slice. x, dx (tokens, 16); w and total start at the slice.
template <class Kind>
void differentiate_block(
    const Kind& kind, const float* x, int64_t tokens, Prototypes w, __mmask16 lanes, GivenPairs grads,
    GivenPairs others, float* dx, float* total, int64_t total_stride) {
  alignas(64) float part[BLOCK_TOKENS * LANES], dw[BLOCK_ROWS * LANES];
  std::fill_n(dw, w.count * LANES, 0.0f);
  for (int64_t m = 0; m < tokens; m += BLOCK_TOKENS) {
    const int64_t count = std::min(BLOCK_TOKENS, tokens - m);
    std::fill_n(part, count * LANES, 0.0f);
    const auto rows = [&](auto number, int64_t j) {
      differentiate_tile<number()>(
          kind, x + m * LANES, count, w.at + j * w.stride, w.stride, lanes, grads.from(j, m), others.from(j, m), part,
          dw + j * LANES);
    };
    int64_t j = 0;
    for (; j + Kind::ROWS <= w.count; j += Kind::ROWS) rows(std::integral_constant<int, Kind::ROWS>{}, j);
    for (; j < w.count; ++j) rows(std::integral_constant<int, 1>{}, j);
    for (int64_t i = 0; i < count * LANES; i += LANES) {
      float* at = dx + m * LANES + i;
      _mm512_storeu_ps(at, _mm512_add_ps(_mm512_loadu_ps(at), _mm512_load_ps(part + i)));
    }
  }
  for (int64_t j = 0; j < w.count; ++j) {
    float* at = total + j * total_stride;
    const __m512 less = _mm512_sub_ps(_mm512_maskz_loadu_ps(lanes, at), _mm512_load_ps(dw + j * LANES));
    _mm512_mask_storeu_ps(at, lanes, less);
  }
}

struct Gradient {
  const Tensor &x, &w, &total;
  float sign;
  int64_t tokens = x.size(0);
  std::vector<float> from = sliced(x, sign), to = std::vector<float>(from.size());  // x and dx

  // Adds the part of the prototypes from `first` to `end`, whose G and other values are given.
  template <class Kind>
  void add(const Kind& kind, int64_t first, int64_t end, GivenPairs grads, GivenPairs others) {
    const int64_t slices = blocks_of(w.size(1), LANES);
    const int64_t group = std::min(GROUP_SLICES, blocks_of(slices, 2 * at::get_num_threads()));
    for_each_task(blocks_of(slices, group), [&](int64_t task) {
      for (int64_t row = first; row < end; row += BLOCK_ROWS) {
        for (int64_t slice = task * group; slice < std::min(slices, (task + 1) * group); ++slice) {
          const int64_t k = slice * LANES, offset = slice * tokens * LANES;
          const float* entries = w.const_data_ptr<float>() + row * w.stride(0) + k;
          differentiate_block(
              kind, from.data() + offset, tokens, {entries, w.stride(0), std::min(BLOCK_ROWS, end - row)},
              first_lanes(w.size(1) - k), grads.from(row - first, 0), others.from(row - first, 0), to.data() + offset,
              total.mutable_data_ptr<float>() + row * total.stride(0) + k, total.stride(0));
        }
      }
    });
  }
};

// Calls prepare(some prototypes, the first of them, where their values go) for a part of the prototypes, then
// use(first, end, these values), part by part.
template <class Prepare, class Use>
void in_parts(const Tensor& w, int64_t tokens, const Prepare& prepare, const Use& use) {
  const int64_t stride = blocks_of(tokens, LANES) * LANES;
  std::vector<float> prepared(size_t(std::min(PREPARED_ROWS, w.size(0)) * stride));
  for (int64_t first = 0; first < w.size(0); first += PREPARED_ROWS) {
    const int64_t end = std::min(first + PREPARED_ROWS, w.size(0));
    for_each_task(blocks_of(end - first, TASK_ROWS), [&](int64_t task) {
      const int64_t row = first + task * TASK_ROWS;
      const float* entries = w.const_data_ptr<float>() + row * w.stride(0);
      prepare(
          Prototypes{entries, w.stride(0), std::min(TASK_ROWS, end - row)}, row,
          Pairs{prepared.data() + (row - first) * stride, stride});
    });
    use(first, end, GivenPairs{prepared.data(), stride});
  }
}

// linf: only the largest entries have a slope. `prepare` finds them, and the rest is one addition a pair and gradient.
class LargestGradient {
 public:
  LargestGradient(
      const Tensor& x, const Tensor& w, float sign, GivenPairs values, GivenPairs grads, const Tensor& total)
      : x_(x.const_data_ptr<float>()), w_(w), sign_(sign), tokens_(x.size(0)), width_(x.size(1)), values_(values),
        grads_(grads), total_(total), panels_(x, sign), dx_(size_t(tokens_ * width_)) {
    TORCH_CHECK(width_ <= Ties::WIDEST, "linf: expected a width of at most ", Ties::WIDEST);
  }

  // For some prototypes: where they are the furthest from each token; adds dw.
  void prepare(Prototypes w, int64_t row, Pairs places) const {
    alignas(64) float tops[TASK_ROWS * PANEL];
    for (int64_t panel = 0; panel < panels_.count(); ++panel) {
      const int64_t first = panel * PANEL;
      for_each_vector({tops, PANEL}, w.count, panels_.vectors(panel), [&](int64_t i, int64_t v, float* at) {
        const int64_t token = first + v * LANES;
        _mm512_store_ps(at, _mm512_maskz_loadu_ps(first_lanes(tokens_ - token), values_.from(row + i, token).at));
      });
      contract_panel(Ties{}, w, panels_, panel, {places.at + first, places.stride}, {tops, PANEL});
    }
    std::vector<double> sums(static_cast<size_t>(width_));
    for (int64_t i = 0; i < w.count; ++i) {
      std::fill(sums.begin(), sums.end(), 0.0);
      for (int64_t m = 0; m < tokens_; ++m) add(row + i, m, places.at[i * places.stride + m], sums.data());
      float* at = total_.mutable_data_ptr<float>() + (row + i) * total_.stride(0);
      for (int64_t k = 0; k < width_; ++k) at[k] -= float(sums[k]);
    }
  }

  // Adds the part of the prototypes from `first` to `end` to dx.
  void add_rows(int64_t first, int64_t end, GivenPairs places) {
    for_each_task(blocks_of(tokens_, LANES), [&](int64_t task) {
      for (int64_t row = first; row < end; ++row) {
        for (int64_t m = task * LANES; m < std::min(tokens_, (task + 1) * LANES); ++m) {
          add(row, m, *places.from(row - first, m).at, dx_.data() + m * width_);
        }
      }
    });
  }

  const std::vector<double>& dx() const { return dx_; }

 private:
  // Adds G slope of one pair to sums (D,).
  void add(int64_t row, int64_t token, float places, double* sums) const {
    const float c = *values_.from(row, token).at, grad = *grads_.from(row, token).at;
    const uint32_t found = bits_of(places);
    if ((found & ~Ties::SIGN) / Ties::TIE == 1 && c != 0 && grad == grad) {
      sums[found % Ties::TIE] += found & Ties::SIGN ? -grad : grad;
    } else if (c != 0 || grad != grad) {  // ties, or NaN, which reaches all of the gradient
      const float *x = x_ + token * width_, *w = w_.const_data_ptr<float>() + row * w_.stride(0);
      const auto slope = [&](int64_t k) {
        const float t = sign_ * x[k] - w[k];
        return std::abs(t) == c ? float((t > 0) - (t < 0)) : 0.0f;
      };
      int64_t ties = 0;
      for (int64_t k = 0; k < width_; ++k) ties += slope(k) != 0;
      const float share = (grad + 0 * c) / float(std::max<int64_t>(ties, 1));
      for (int64_t k = 0; k < width_; ++k) sums[k] += share * slope(k);
    }
  }

  static uint32_t bits_of(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    return bits;
  }

  const float* x_;
  const Tensor& w_;
  float sign_;
  int64_t tokens_, width_;
  GivenPairs values_, grads_;
  const Tensor& total_;
  Panels panels_;
  std::vector<double> dx_;
};

// For some prototypes: 1 / c.
void invert(int64_t rows, int64_t tokens, GivenPairs values, Pairs into) {
  for_each_vector(into, rows, blocks_of(tokens, LANES), [&](int64_t i, int64_t v, float* at) {
    const __m512 c = _mm512_maskz_loadu_ps(first_lanes(tokens - v * LANES), values.from(i, v * LANES).at);
    _mm512_storeu_ps(at, _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_max_ps(_mm512_set1_ps(FLT_MIN), c)));
  });
}

// From G and c (V, M): dx (M, D); dw is added to total (V, D).
Tensor contract_gradient(
    c10::string_view kind, double p, double sign, const Tensor& x, const Tensor& w, const Tensor& values,
    const Tensor& grads, const Tensor& total) {
  check_operands(x, w);
  check_rows(values, at::kFloat, "values");
  check_rows(grads, at::kFloat, "grads");
  check_rows(total, at::kFloat, "total");
  TORCH_CHECK(values.sizes() == grads.sizes() && total.sizes() == w.sizes(), "expected a gradient for every value");
  TORCH_CHECK(grads.size(0) == w.size(0) && grads.size(1) == x.size(0), "expected a value for every pair");
  const GivenPairs c{values.const_data_ptr<float>(), values.stride(0)};
  const GivenPairs g{grads.const_data_ptr<float>(), grads.stride(0)};
  const Tensor out = at::empty(x.sizes(), x.options());
  if (kind == "linf") {
    LargestGradient gradient(x, w, float(sign), c, g, total);
    in_parts(
        w, x.size(0), [&](auto... part) { gradient.prepare(part...); },
        [&](auto... part) { gradient.add_rows(part...); });
    std::transform(
        gradient.dx().begin(), gradient.dx().end(), out.mutable_data_ptr<float>(),
        [&](double sum) { return float(sign * sum); });
    return out;
  }
  Gradient gradient{x, w, total, float(sign)};
  const auto with_inverse = [&](const auto& slope) {
    in_parts(
        w, x.size(0),
        [&](Prototypes rows, int64_t row, Pairs into) { invert(rows.count, x.size(0), c.from(row, 0), into); },
        [&](int64_t first, int64_t end, GivenPairs inverse) {
          gradient.add(slope, first, end, g.from(first, 0), inverse);
        });
  };
  if (kind == "l1") gradient.add(ManhattanSlope{}, 0, w.size(0), g, g);
  else if (kind == "canberra") gradient.add(CanberraSlope{}, 0, w.size(0), g, g);
  else if (p == 3) with_inverse(CubicSlope{});
  else with_inverse(PowerSlope{Power(p - 1), _mm512_set1_ps(p < 1 ? SMALLEST : 0.0f)});
  sliced_back(gradient.to, float(sign), out);
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(overtone_cpu, library) {
  library.def("contract(str kind, float p, float sign, Tensor x, Tensor w, Tensor out) -> ()", &contract);
  library.def(
      "contract_gradient(str kind, float p, float sign, Tensor x, Tensor w, Tensor values, Tensor grads, Tensor total) "
      "-> Tensor",
      &contract_gradient);
}

}  // namespace overtone
