// Gradients of contractions that are no matrix product: eager.py's `contract_gradient`, float32.
//
// 16 entries of the width lie along the vector lanes: a *slice* of all tokens and prototypes is one thread's own, and
// each slope serves both gradients.

#include "cpu_elementwise.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cfloat>
#include <type_traits>

namespace overtone {
namespace {

constexpr int64_t BLOCK_TOKENS = 128;  // of a slice: with the gradient half of L1; dw joins the total after so many
constexpr int64_t BLOCK_ROWS = 128;    // prototypes whose part of dx is summed on its own; their G stays in L2
constexpr int64_t PREPARED_ROWS = 64 * BLOCK_ROWS;  // prototypes for which one more value a pair is kept in memory
constexpr int64_t GROUP_SLICES = 8;    // slices that read a block of G while it is in L2

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
    each<N>([&](int j) { right[j] = left[j] = _mm512_mul_ps(left[j], absolute(left[j])); });  // sgn(t) (|t| / c)^2
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
      // the sign of t, put back on the power of its size
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
    // one token meets ROWS prototypes: dw stays in registers over all tokens, dx goes to L1 once for ROWS of them
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
    for (; j < w.count; ++j) rows(std::integral_constant<int, 1>{}, j);  // repeated rows would count twice in dx
    for (int64_t i = 0; i < count * LANES; i += LANES) {
      float* at = dx + m * LANES + i;
      _mm512_storeu_ps(at, _mm512_add_ps(_mm512_loadu_ps(at), _mm512_load_ps(part + i)));
    }
  }
  for (int64_t j = 0; j < w.count; ++j) {  // t = x - w: dw has the other sign
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
    // at least two tasks for each thread, where there are so many slices
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
    // dw here, by prototypes, and dx in add_rows, by tokens: each number has one owner, and one order
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
    if ((found & ~Ties::SIGN) / Ties::TIE == 1 && c != 0 && grad == grad) {  // one is the largest
      sums[found % Ties::TIE] += found & Ties::SIGN ? -grad : grad;
    } else if (c != 0 || grad != grad) {  // ties, or NaN, which reaches all of the gradient
      const float *x = x_ + token * width_, *w = w_.const_data_ptr<float>() + row * w_.stride(0);
      const auto slope = [&](int64_t k) {
        const float t = sign_ * x[k] - w[k];
        return std::abs(t) == c ? float((t > 0) - (t < 0)) : 0.0f;
      };
      int64_t ties = 0;
      for (int64_t k = 0; k < width_; ++k) ties += slope(k) != 0;
      // 0 * c is NaN where c is inf or NaN
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
  library.def(
      "contract_gradient(str kind, float p, float sign, Tensor x, Tensor w, Tensor values, Tensor grads, Tensor total) "
      "-> Tensor",
      &contract_gradient);
}

}  // namespace overtone
