// What the kernels of cpu_*.cpp share.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

namespace overtone {

using at::Tensor;
using bits16 = uint16_t;  // a bfloat16, as stored

constexpr int64_t LANES = 16;
constexpr int64_t TILE_VECTORS = 4;  // of a register tile
constexpr int64_t PANEL = TILE_VECTORS * LANES;
constexpr int64_t SUM_TERMS = 128;  // terms summed before they join the sum in memory: longer sums round worse
#ifdef __AVX512BF16__
constexpr bool HAS_BFLOAT16 = true;
#else  // cpu.py selects float32 only
constexpr bool HAS_BFLOAT16 = false;
#endif

inline int64_t blocks_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

inline __mmask16 first_lanes(int64_t count) { return count >= LANES ? 0xffff : __mmask16((1u << count) - 1); }

// Calls work(0 .. tasks - 1). A thread takes the next task when it is free: a busy core does not hold up the others.
template <class Work>
void for_each_task(int64_t tasks, const Work& work) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(tasks, at::get_num_threads()), 1, [&](int64_t, int64_t) {
    for (int64_t task = next++; task < tasks; task = next++) work(task);
  });
}

inline void check_rows(const Tensor& t, at::ScalarType dtype, const char* name) {
  const bool fits = t.dim() == 2 && t.scalar_type() == dtype && t.is_cpu();
  TORCH_CHECK(fits, name, ": expected a matrix of ", dtype, " on the CPU");
  TORCH_CHECK(t.size(1) <= 1 || t.stride(1) == 1, name, ": expected rows without gaps");
  TORCH_CHECK(HAS_BFLOAT16 || dtype != at::kBFloat16, "built for a CPU without AVX512_BF16: expected float32");
}

// A vector of M values, one per token, padded to whole vector registers: kernels read it without a mask.
inline std::vector<float> padded(const Tensor& t, int64_t tokens, float fill) {
  const bool fits = t.dim() == 1 && t.numel() == tokens && t.scalar_type() == at::kFloat;
  TORCH_CHECK(fits, "expected ", tokens, " float32 values");
  const Tensor flat = t.contiguous();
  std::vector<float> out(size_t(blocks_of(tokens, LANES) * LANES), fill);
  std::copy_n(flat.const_data_ptr<float>(), tokens, out.begin());
  return out;
}

}  // namespace overtone
