// Contractions that are no matrix product: eager.py's `contract`, float32. A value has the same bits with any number of
// other tokens and prototypes.

#include "cpu_elementwise.h"

#include <torch/library.h>

#include <cfloat>

namespace overtone {
namespace {

// 1 / x for x > 0 within 1 ulp: division takes as long as all else together.
__m512 inverse_of(__m512 x, __mmask16 where) {
  const __m512 near = _mm512_maskz_rcp14_ps(where, x);  // 14 bits, which a step of Newton makes 28
  return _mm512_fmadd_ps(near, _mm512_fnmadd_ps(x, near, _mm512_set1_ps(1.0f)), near);
}

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

struct Canberra : Sum {
  static constexpr int ROWS = 4;
  __m512 operator()(__m512 sum, __m512 x, __m512 w, __m512, int64_t) const {
    const __m512 size = _mm512_add_ps(absolute(x), absolute(w));
    const __mmask16 some = _mm512_cmp_ps_mask(size, _mm512_set1_ps(SMALLEST), _CMP_NLE_UQ);  // NaN counts
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

// (sum |t|^p)^(1/p) = top (sum (|t| / top)^p)^(1/p): no power over- or underflows.
struct Norm {
  Power power, root;

  void operator()(Prototypes w, const Panels& x, int64_t panel, Pairs out) const {
    alignas(64) float tops[TASK_ROWS * PANEL], inverses[TASK_ROWS * PANEL];
    contract_panel(Largest{}, w, x, panel, {tops, PANEL});
    for_each_vector({tops, PANEL}, w.count, x.vectors(panel), [&](int64_t i, int64_t v, float* at) {
      // FLT_MIN at a match: it has an inverse, and all ratios are 0; NaN stays
      const __m512 top = _mm512_max_ps(_mm512_set1_ps(FLT_MIN), _mm512_load_ps(at));
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

// p = 3 without a power, but for pairs whose cubes over- or underflow: of a sum from 2^-90 on, cubes that are
// lost, below 2^-126, are no digit.
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

}  // namespace

TORCH_LIBRARY_FRAGMENT(overtone_cpu, library) {
  library.def("contract(str kind, float p, float sign, Tensor x, Tensor w, Tensor out) -> ()", &contract);
}

}  // namespace overtone
