// Runs the body of a GPU kernel on the CPU: one thread block at a time, its threads as fibers that
// take turns at every shuffle and barrier. Enough of CUDA's and Metal's names for the kernels in
// native/kernels; slow, and exact in what it says about indices, lanes and merging.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

namespace shim {

constexpr int WARP = 32;
constexpr std::size_t STACK_BYTES = 256 * 1024;

inline Dim3 grid_dim, block_dim, block_idx, thread_idx;
inline std::vector<ucontext_t> fibers;
inline std::vector<float> slots;
inline std::vector<char> done;
inline ucontext_t scheduler;
inline int current;
inline std::function<void()> body;

inline void yield() { swapcontext(&fibers[current], &scheduler); }

inline void run_fiber() {
  body();
  done[current] = 1;
}

inline float shuffle_xor(float value, int offset) {
  slots[current] = value;
  const int me = current;
  yield();
  const float other = slots[me / WARP * WARP + ((me % WARP) ^ offset)];
  yield();
  return other;
}

inline void run_block(unsigned threads) {
  static std::vector<char> stacks;
  stacks.resize(threads * STACK_BYTES);
  fibers.assign(threads, {});
  slots.assign(threads, 0.0f);
  done.assign(threads, 0);
  for (unsigned t = 0; t < threads; ++t) {
    getcontext(&fibers[t]);
    fibers[t].uc_stack.ss_sp = stacks.data() + t * STACK_BYTES;
    fibers[t].uc_stack.ss_size = STACK_BYTES;
    fibers[t].uc_link = &scheduler;
    makecontext(&fibers[t], run_fiber, 0);
  }
  while (std::count(done.begin(), done.end(), 0) > 0) {
    for (unsigned t = 0; t < threads; ++t) {
      if (!done[t]) {
        current = int(t);
        thread_idx.x = t;
        swapcontext(&scheduler, &fibers[t]);
      }
    }
  }
}

inline void launch(Dim3 grid, unsigned threads, std::function<void()> kernel) {
  body = std::move(kernel);
  grid_dim = grid;
  block_dim.x = threads;
  for (block_idx.z = 0; block_idx.z < grid.z; ++block_idx.z) {
    for (block_idx.y = 0; block_idx.y < grid.y; ++block_idx.y) {
      for (block_idx.x = 0; block_idx.x < grid.x; ++block_idx.x) {
        run_block(threads);
      }
    }
  }
}

}  // namespace shim

// The first 16 bits of a float32, rounded to nearest even.
struct bfloat {
  std::uint16_t bits = 0;
  bfloat() = default;
  explicit bfloat(float value) {
    std::uint32_t word;
    std::memcpy(&word, &value, 4);
    bits = std::uint16_t((word + 0x7fff + ((word >> 16) & 1)) >> 16);
  }
  operator float() const {
    const std::uint32_t word = std::uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
  }
};

// CUDA
#define __shared__ static
#define __device__
#define gridDim shim::grid_dim
#define blockDim shim::block_dim
#define blockIdx shim::block_idx
#define threadIdx shim::current_thread()
namespace shim {
inline Dim3 current_thread() { return {unsigned(current), 0, 0}; }
}  // namespace shim
#define __shfl_xor_sync(mask, value, offset) shim::shuffle_xor(value, offset)
#define __syncthreads() shim::yield()
using std::max;
using std::min;

// Metal
#define threadgroup static
#define device
#define threadgroups_per_grid shim::grid_dim
#define threadgroup_position_in_grid shim::block_idx
#define thread_position_in_threadgroup shim::current_thread()
#define threads_per_threadgroup shim::block_dim
#define threadgroup_barrier(flags) shim::yield()
namespace metal {
using std::exp2;
using std::max;
using std::min;
enum class mem_flags { mem_threadgroup };
inline float simd_shuffle_xor(float value, int offset) { return shim::shuffle_xor(value, offset); }
}  // namespace metal
