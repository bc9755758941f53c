// The batch sampler on the CPU: the source of the GPU kernel (native/kernels/sampler/), compiled
// for the host.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mlx_serving {

constexpr std::size_t kSamplerColumns = 20;  // of `table`

enum class LogitsType { kFloat32, kBFloat16 };

// Row-major arrays, as a GPU's kernel gets them; `mlx_serving/worker/engine/sampling/` says what
// they hold. B rows, V tokens, C columns of state, W words of a mask.
struct SamplerInputs {
  LogitsType type;
  const void* logits;   // [B, V]
  const int* table;     // [B, kSamplerColumns]
  const int* state;     // [B, C]
  const int* inputs;    // [B]
  const int* lists;
  const int* mask;      // [B, W]; null if no row is masked
  std::size_t rows;
  std::size_t vocabulary;
  std::size_t state_size;
  std::size_t mask_size;
};

struct SamplerOutputs {
  int* tokens;             // [B]
  float* chosen_logprobs;  // [B]
  int* top_tokens;         // [B, K]
  float* top_logprobs;     // [B, K]
  int* state_after;        // [B, C]
  float* scratch;          // [rows with penalties, bias or a mask, V]
};

// Samples one token a row. Large batches are shared out among threads by rows.
void sample(const SamplerInputs& in, const SamplerOutputs& out);

// The same by groups of 8 threads that work on one row together, as a GPU's do: for tests.
void sample_by_groups(const SamplerInputs& in, const SamplerOutputs& out);

}  // namespace mlx_serving
