// A row of the batch: its parameters, inputs and outputs.
#pragma once

namespace mlx_serving_sampler {

typedef unsigned int word;

// Columns of `rows`, a row's parameters as 32-bit words (sampling/parameters.py writes them);
// the first of them are floats by their bits.
enum Column {
  kTemperature, kTopP, kLogMinP, kRepetition, kPresence, kFrequency,
  kFlags, kTopK, kLogprobs, kTopLogprobs, kStreamFirst, kStreamSecond, kPosition, kScratchRow,
  kHistoryBegin, kPromptEnd, kHistoryEnd, kBiasBegin, kBiasValues, kBiasCount, kColumns
};
enum Flag { kGreedy = 1, kPenalised = 2, kMasked = 4 };

constexpr MLXS_CONSTANT int kInvalidToken = -1;
constexpr MLXS_CONSTANT word kNoId = 0xffffffffu;

// A row's parameters, and where its inputs and outputs are.
template <typename T>
struct Row {
  const MLXS_DEVICE T* logits;
  word size;
  const MLXS_DEVICE int* columns;
  const MLXS_DEVICE int* lists;  // of all rows: histories, biased tokens, biases by their bits
  const MLXS_DEVICE int* mask;   // a bit a token, set if it is allowed
  const MLXS_DEVICE int* state;  // calls before this one, then the tokens they took in
  int input;                     // what the model took in at this one
  MLXS_DEVICE float* scratch;    // [size], of rows with penalties, bias or a mask
};

// The token, and the log probabilities of rows that ask for them.
struct Result {
  MLXS_DEVICE int* token;
  MLXS_DEVICE float* logprob;
  MLXS_DEVICE int* top_tokens;
  MLXS_DEVICE float* top_logprobs;
};

MLXS_FUNCTION float number(const MLXS_DEVICE int* columns, int column) {
  return MLXS_BITS_FLOAT(columns[column]);
}

}  // namespace mlx_serving_sampler
