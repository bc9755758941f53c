// Penalties, logit bias and the mask of allowed tokens.
#pragma once

#include "passes.h"

namespace mlx_serving_sampler {

constexpr MLXS_CONSTANT word kSeen = 0x40000000u;  // in the prompt or the completion

// Counts the row's history into its scratch: kSeen + how often the completion holds the token.
template <typename T>
MLXS_FUNCTION void count_history(Row<T> row, Group group) {
  MLXS_DEVICE word* counts = (MLXS_DEVICE word*)row.scratch;
  for (word id = group.index; id < row.size; id += group.size) MLXS_STORE(counts + id, 0u);
  MLXS_BARRIER(group);
  const int prompt_end = row.columns[kPromptEnd];
  const int end = row.columns[kHistoryEnd];
  const int threads = int(group.size);
  for (int at = row.columns[kHistoryBegin] + int(group.index); at < end; at += threads) {
    MLXS_DEVICE word* count = counts + row.lists[at];
    MLXS_ATOMIC_OR(count, kSeen);
    if (at >= prompt_end) MLXS_ATOMIC_ADD(count, 1u);
  }
  // The input at position 0 is the last token of the prompt, every later one a sampled token.
  const int step = row.state[0];
  for (int at = int(group.index); at <= step; at += threads) {
    const int token = at < step ? row.state[at + 1] : row.input;
    if (token < 0) continue;  // a broken row's
    MLXS_DEVICE word* count = counts + token;
    MLXS_ATOMIC_OR(count, kSeen);
    if (row.columns[kPosition] + at > 0) MLXS_ATOMIC_ADD(count, 1u);
  }
  MLXS_BARRIER(group);
}

MLXS_FUNCTION float penalised(float value, word counted, const MLXS_DEVICE int* columns) {
  const float repetition = number(columns, kRepetition);
  if (counted != 0u) value = value > 0.0f ? value / repetition : MLXS_MULTIPLY(value, repetition);
  const word count = counted & (kSeen - 1u);
  if (count == 0u) return value;
  const float frequency = MLXS_MULTIPLY(number(columns, kFrequency), float(count));
  return value - (number(columns, kPresence) + frequency);
}

// Writes the row's final logits into its scratch.
template <typename T>
MLXS_FUNCTION void adjust(Row<T> row, Group group) {
  const int flags = row.columns[kFlags];
  const bool masked = (flags & kMasked) != 0;
  const bool counted = (flags & kPenalised) != 0;
  if (counted) count_history(row, group);
  MLXS_DEVICE word* counts = (MLXS_DEVICE word*)row.scratch;
  for (word id = group.index; id < row.size; id += group.size) {
    float value = float(row.logits[id]);
    if (counted) value = penalised(value, MLXS_LOAD(counts + id), row.columns);
    if (masked && ((word(row.mask[id / 32]) >> (id % 32)) & 1u) == 0u) {
      value = key_value(kMinusInfinityKey);
    }
    row.scratch[id] = value;
  }
  MLXS_BARRIER(group);
  // A row names each biased token once.
  const MLXS_DEVICE int* tokens = row.lists + row.columns[kBiasBegin];
  const MLXS_DEVICE int* values = row.lists + row.columns[kBiasValues];
  const int count = row.columns[kBiasCount];
  for (int at = int(group.index); at < count; at += int(group.size)) {
    row.scratch[tokens[at]] += number(values, at);
  }
  MLXS_BARRIER(group);
}

}  // namespace mlx_serving_sampler
