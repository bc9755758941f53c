#include "mlx_serving/sampler.hpp"

#include <algorithm>
#include <thread>
#include <vector>

#include "../kernels/sampler/host.h"

namespace mlx_serving {
namespace {

static_assert(kSamplerColumns == mlx_serving_sampler::kColumns);

constexpr unsigned kGroupThreads = 8;
constexpr std::size_t kValuesPerThread = 1 << 16;  // fewer cost less than starting a thread
constexpr std::size_t kMostThreads = 8;

struct BFloat16 {
  unsigned short bits;
  explicit operator float() const {
    return std::bit_cast<float>(static_cast<unsigned>(bits) << 16);
  }
};

// What `<input>_shape` is to a GPU's kernel.
struct Shape {
  std::size_t values[2];
  std::size_t operator[](int axis) const { return values[axis]; }
};

// One thread's part of one row: the kernel's body, with the names that it expects.
template <typename T, unsigned kThreads>
void run_thread(const SamplerInputs& in, const SamplerOutputs& out, unsigned row_index,
                unsigned thread_index, mlx_serving_sampler::Partial* partials,
                std::barrier<>* barrier) {
  const T* logits = static_cast<const T*>(in.logits);
  const auto [type, all, rows, state, inputs, lists, mask, count, size, columns, words] = in;
  const auto [tokens, chosen_logprobs, top_tokens, top_logprobs, state_after, scratch] = out;
  const Shape logits_shape{{count, size}};
  const Shape state_shape{{count, columns}};
  const Shape mask_shape{{count, words}};
#include "../kernels/sampler/main.inc"
}

template <typename T>
void sample_rows(const SamplerInputs& in, const SamplerOutputs& out, std::size_t begin,
                 std::size_t end) {
  mlx_serving_sampler::Partial partials[1];
  for (std::size_t row = begin; row < end; ++row) {
    run_thread<T, 1>(in, out, static_cast<unsigned>(row), 0, partials, nullptr);
  }
}

template <typename T>
void sample_of(const SamplerInputs& in, const SamplerOutputs& out) {
  const std::size_t hardware = std::max(1u, std::thread::hardware_concurrency());
  const std::size_t useful = 1 + in.rows * in.vocabulary / kValuesPerThread;
  const std::size_t threads = std::min({hardware, useful, in.rows, kMostThreads});
  std::vector<std::thread> others;
  for (std::size_t at = 1; at < threads; ++at) {
    others.emplace_back(sample_rows<T>, std::cref(in), std::cref(out), in.rows * at / threads,
                        in.rows * (at + 1) / threads);
  }
  sample_rows<T>(in, out, 0, in.rows / std::max<std::size_t>(1, threads));
  for (auto& other : others) other.join();
}

template <typename T>
void sample_by_groups_of(const SamplerInputs& in, const SamplerOutputs& out) {
  std::vector<mlx_serving_sampler::Partial> partials(kGroupThreads);
  std::barrier<> barrier(kGroupThreads);
  const auto work = [&](unsigned thread) {
    for (unsigned row = 0; row < in.rows; ++row) {
      run_thread<T, kGroupThreads>(in, out, row, thread, partials.data(), &barrier);
    }
  };
  std::vector<std::thread> group;
  for (unsigned thread = 0; thread < kGroupThreads; ++thread) group.emplace_back(work, thread);
  for (auto& thread : group) thread.join();
}

}  // namespace

void sample(const SamplerInputs& in, const SamplerOutputs& out) {
  if (in.type == LogitsType::kBFloat16) return sample_of<BFloat16>(in, out);
  sample_of<float>(in, out);
}

void sample_by_groups(const SamplerInputs& in, const SamplerOutputs& out) {
  if (in.type == LogitsType::kBFloat16) return sample_by_groups_of<BFloat16>(in, out);
  sample_by_groups_of<float>(in, out);
}

}  // namespace mlx_serving
