// Passes over rows (V, D): squared norms, rows of length 1, and what is left to do for their gradients.
//
// Legend: V prototypes (or tokens), D width.

#include "cpu.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <sys/mman.h>

#include <cfloat>
#include <cmath>

namespace overtone {
namespace {

constexpr size_t HUGE_PAGE = size_t(2) << 20;

__m512 load_wide(const float* at, __mmask16 lanes) { return _mm512_maskz_loadu_ps(lanes, at); }

// A bfloat16 is the upper half of a float32.
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
    _mm512_mask_storeu_ps(total + k, lanes, _mm512_add_ps(half, half));  // doubling is exact: one rounding in all
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

// A row of length 1 is row / largest / length, with the length of row / largest: no square overflows, nor does the
// product of the two, which is never made.
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
      any = _mm512_fmadd_ps(unit, unit, any);  // 0 for a row of zeros alone: else it is about 1
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

// Asks for huge pages under a large new tensor: touching it page by page costs more than a pass over it.
void advise_huge_pages(const Tensor& t) {
  const auto from = reinterpret_cast<uintptr_t>(t.data_ptr());
  // only pages that are the tensor's alone
  const uintptr_t first = (from + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
  const uintptr_t end = (from + t.nbytes()) / HUGE_PAGE * HUGE_PAGE;
  if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);  // no huge pages: no harm
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(overtone_cpu, library) {
  library.def("finish_rows(Tensor total, Tensor rows, Tensor columns) -> ()", &finish_rows);
  library.def("unit_rows(Tensor rows) -> Tensor", &unit_rows);
  library.def("unit_rows_gradient(Tensor rows, Tensor grad) -> Tensor", &unit_rows_gradient);
  library.def("square_norms(Tensor rows) -> Tensor", &square_norms);
  library.def("advise_huge_pages(Tensor t) -> ()", &advise_huge_pages);
}

}  // namespace overtone
