// The host dialect of native/kernels/sampler.h: the kernel's own source, run on the CPU by one
// thread of the host for each thread of a group.
#pragma once

#include <atomic>
#include <barrier>
#include <bit>
#include <cmath>
#include <cstddef>
#include <thread>
#include <vector>

#define MLXS_FUNCTION inline
#define MLXS_CONSTANT
#define MLXS_THREAD
#define MLXS_DEVICE
#define MLXS_SHARED

#define MLXS_BARRIER_TYPE std::barrier<>*
#define MLXS_BARRIER(group) (group).barrier->arrive_and_wait()

#define MLXS_FLOAT_BITS(value) std::bit_cast<unsigned int>(value)
#define MLXS_BITS_FLOAT(bits) std::bit_cast<float>(static_cast<unsigned int>(bits))
#define MLXS_EXP(x) std::exp(x)
#define MLXS_LOG(x) std::log(x)
#define MLXS_LOG1P(x) std::log1p(x)
#define MLXS_MULTIPLY(x, y) ((x) * (y))

#define MLXS_ATOMIC_ADD(pointer, value) std::atomic_ref(*(pointer)).fetch_add(value)
#define MLXS_ATOMIC_OR(pointer, value) std::atomic_ref(*(pointer)).fetch_or(value)
#define MLXS_LOAD(pointer) (*(pointer))
#define MLXS_STORE(pointer, value) (*(pointer) = (value))

#include "../kernels/sampler.h"

namespace sampler_host {

// A row-major array of two dimensions, as MLX hands it to a kernel.
struct Shape {
  std::size_t values[2];
  std::size_t operator[](int axis) const { return values[axis]; }
};

// A float of 16 bits, as numpy's uint16 holds it.
struct BFloat16 {
  unsigned short bits;
  explicit operator float() const {
    return std::bit_cast<float>(static_cast<unsigned int>(bits) << 16);
  }
};

struct Inputs {
  const int* rows;
  const int* state;
  const int* inputs;
  const int* lists;
  const int* mask;
};

struct Outputs {
  int* tokens;
  float* chosen_logprobs;
  int* top_tokens;
  float* top_logprobs;
  int* state_after;
  float* scratch;
};

template <typename T, unsigned int kThreads>
void run_thread(const T* logits, Shape logits_shape, Inputs in, Shape state_shape,
                Shape mask_shape, Outputs out, unsigned int row_index, unsigned int thread_index,
                mlx_serving_sampler::Partial* partials, std::barrier<>* barrier) {
  const auto [rows, state, inputs, lists, mask] = in;
  const auto [tokens, chosen_logprobs, top_tokens, top_logprobs, state_after, scratch] = out;
#include "../kernels/sampler_main.inc"
}

// One group of kThreads threads works through the rows, as a GPU's groups do side by side.
template <typename T, unsigned int kThreads>
void run(const T* logits, Shape logits_shape, Inputs in, Shape state_shape, Shape mask_shape,
         Outputs out) {
  std::vector<mlx_serving_sampler::Partial> partials(kThreads);
  std::barrier<> barrier(kThreads);
  const auto work = [&](unsigned int thread) {
    for (unsigned int row = 0; row < logits_shape[0]; ++row) {
      run_thread<T, kThreads>(logits, logits_shape, in, state_shape, mask_shape, out, row, thread,
                              partials.data(), &barrier);
    }
  };
  std::vector<std::jthread> others;
  for (unsigned int thread = 1; thread < kThreads; ++thread) others.emplace_back(work, thread);
  work(0);
}

}  // namespace sampler_host
