// The Metal dialect, as far as a C++ compiler can follow it: its address spaces are spelled away
// and a few of its functions stood in for, so that its macros expand, compile and compute.
#include <atomic>
#include <bit>
#include <cmath>
#include <cstddef>
#include <vector>

#define thread
#define device
#define threadgroup
#define constant

namespace metal {
namespace precise {
inline float exp(float x) { return std::exp(x); }
inline float log(float x) { return std::log(x); }
}  // namespace precise
namespace mem_flags {
constexpr int mem_threadgroup = 1;
constexpr int mem_device = 2;
}  // namespace mem_flags
using atomic_uint = unsigned int;
using Word = volatile unsigned int;
constexpr int memory_order_relaxed = 0;
inline void threadgroup_barrier(int) {}
inline void atomic_fetch_add_explicit(Word* at, unsigned int value, int) { *at = *at + value; }
inline void atomic_fetch_or_explicit(Word* at, unsigned int value, int) { *at = *at | value; }
inline unsigned int atomic_load_explicit(Word* at, int) { return *at; }
inline void atomic_store_explicit(Word* at, unsigned int value, int) { *at = value; }
}  // namespace metal

template <typename To, typename From>
To as_type(From value) {
  return std::bit_cast<To>(value);
}

#include "../kernels/sampler/metal.h"
#include "../kernels/sampler/sampler.h"

#include "check.hpp"

namespace {

struct Position {
  unsigned int x;
};

// What MLX makes of the body on a Mac.
template <typename T, int kThreads>
void kernel(const T* logits, const int* logits_shape, const int* rows, const int* state,
            const int* state_shape, const int* inputs, const int* lists, const int* mask,
            const int* mask_shape, int* tokens, float* chosen_logprobs, int* top_tokens,
            float* top_logprobs, int* state_after, float* scratch,
            Position thread_position_in_threadgroup, Position threadgroup_position_in_grid) {
#include "../kernels/sampler/metal_threads.inc"
#include "../kernels/sampler/main.inc"
}

void a_row_is_sampled() {
  using namespace mlx_serving_sampler;
  const std::vector<float> logits = {0.5f, 2.0f, -1.0f, 1.0f, 0.0f, 0.0f, 0.0f, 0.0f};
  std::vector<int> rows(kColumns, 0);
  for (const int column : {kTemperature, kTopP, kRepetition}) {
    rows[column] = std::bit_cast<int>(1.0f);
  }
  rows[kFrequency] = std::bit_cast<int>(1.5f);
  rows[kFlags] = kGreedy | kPenalised;
  rows[kTopK] = int(logits.size());
  rows[kLogprobs] = rows[kTopLogprobs] = 1;
  const int state[8] = {};
  const int inputs[1] = {1};  // the prompt's last token
  const int lists[8] = {1, 1, 0, 0, 0, 0, 0, 0};
  rows[kHistoryEnd] = 2;  // both of the completion, so token 1 loses 3.0
  const int shape[2] = {1, 8};
  int token = 0;
  int top_token = 0;
  int after[8];
  float chosen = 0.0f;
  float top = 0.0f;
  float scratch[8];
  kernel<float, 1>(logits.data(), shape, rows.data(), state, shape, inputs, lists, state, shape,
                   &token, &chosen, &top_token, &top, after, scratch, {0}, {0});
  CHECK(token == 3);
  CHECK(top_token == 1);
  CHECK(scratch[1] == -1.0f);
  CHECK(after[0] == 1 && after[1] == 1);
}

void log1p_keeps_its_precision() {
  for (float x = -0.9999999f; x < -1e-9f; x *= 0.7f) {
    const float expected = std::log1p(x);
    CHECK(std::abs(mlx_serving_sampler::log1p_of(x) - expected) <= 4e-7f * std::abs(expected));
  }
}

}  // namespace

int main() {
  a_row_is_sampled();
  log1p_keeps_its_precision();
  return check::result();
}
