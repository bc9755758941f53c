// The sampler under the sanitizers: on the CPU, and as a GPU's group of threads runs it. What it
// draws is checked from Python (tests/unit/test_sampling_*.py), against the reference.
#include "mlx_serving/sampler.hpp"

#include <limits>
#include <random>
#include <vector>

#include "../kernels/sampler/host.h"
#include "check.hpp"

namespace {

using namespace mlx_serving_sampler;

constexpr std::size_t kRows = 6;
constexpr std::size_t kVocabulary = 203;
constexpr std::size_t kStateSize = 9;
constexpr std::size_t kMaskWords = (kVocabulary + 31) / 32;
constexpr int kTop = 5;
constexpr int kHistory = 40;

int bits(float value) { return std::bit_cast<int>(value); }

struct Batch {
  std::vector<float> logits;
  std::vector<int> rows, state, inputs, lists, mask;
};

// Rows: greedy, all filters, penalties, bias and mask, NaN, nothing but -inf.
Batch make_batch() {
  Batch batch;
  std::mt19937 chance(1);
  std::normal_distribution<float> normal(0.0f, 3.0f);
  for (std::size_t at = 0; at < kRows * kVocabulary; ++at) batch.logits.push_back(normal(chance));
  batch.logits[4 * kVocabulary + 11] = std::numeric_limits<float>::quiet_NaN();
  for (std::size_t id = 0; id < kVocabulary; ++id) {
    batch.logits[5 * kVocabulary + id] = -std::numeric_limits<float>::infinity();
  }
  for (int at = 0; at < kHistory; ++at) batch.lists.push_back((at * 7) % int(kVocabulary));
  batch.lists.insert(batch.lists.end(), {3, 200, bits(2.5f), bits(-1.0f)});
  batch.rows.assign(kRows * kColumns, 0);
  for (std::size_t row = 0; row < kRows; ++row) {
    int* columns = batch.rows.data() + row * kColumns;
    columns[kTemperature] = bits(row == 1 ? 0.7f : 1.0f);
    columns[kTopP] = bits(row == 1 ? 0.9f : 1.0f);
    columns[kLogMinP] = bits(row == 1 ? -4.0f : -std::numeric_limits<float>::infinity());
    columns[kRepetition] = bits(row == 2 ? 1.3f : 1.0f);
    columns[kPresence] = columns[kFrequency] = bits(row == 2 ? 0.4f : 0.0f);
    columns[kFlags] = row == 0 ? kGreedy : row == 2 ? kPenalised : row == 3 ? kMasked : 0;
    columns[kTopK] = row == 1 ? 50 : int(kVocabulary);
    columns[kLogprobs] = row % 2 == 0 ? kTop : -1;
    columns[kTopLogprobs] = kTop;
    columns[kStreamFirst] = int(row) * 17;
    columns[kStreamSecond] = int(row) * 31;
    columns[kPosition] = 3;
    columns[kScratchRow] = row == 2 ? 0 : row == 3 ? 1 : -1;
    columns[kHistoryEnd] = row == 2 ? kHistory : 0;
    columns[kPromptEnd] = row == 2 ? 25 : 0;
    columns[kBiasBegin] = kHistory;
    columns[kBiasValues] = kHistory + 2;
    columns[kBiasCount] = row == 3 ? 2 : 0;
  }
  for (std::size_t row = 0; row < kRows; ++row) {
    const int state[kStateSize] = {2, 5, 202, 0, 0, 0, 0, 0, 0};
    batch.state.insert(batch.state.end(), state, state + kStateSize);
  }
  batch.inputs = {1, 2, 202, 4, -1, 6};
  for (std::size_t at = 0; at < kRows * kMaskWords; ++at) batch.mask.push_back(0x0f0f0f0f);
  return batch;
}

struct Drawn {
  std::vector<int> tokens = std::vector<int>(kRows);
  std::vector<float> chosen = std::vector<float>(kRows);
  std::vector<int> top_tokens = std::vector<int>(kRows * kTop);
  std::vector<float> top = std::vector<float>(kRows * kTop);
  std::vector<int> state = std::vector<int>(kRows * kStateSize);
  std::vector<float> scratch = std::vector<float>(2 * kVocabulary);
};

Drawn draw_rows(const Batch& batch, bool by_groups) {
  Drawn drawn;
  const mlx_serving::SamplerInputs in{
      mlx_serving::LogitsType::kFloat32, batch.logits.data(), batch.rows.data(),
      batch.state.data(), batch.inputs.data(), batch.lists.data(), batch.mask.data(), kRows,
      kVocabulary, kStateSize, kMaskWords};
  const mlx_serving::SamplerOutputs out{drawn.tokens.data(), drawn.chosen.data(),
                                        drawn.top_tokens.data(), drawn.top.data(),
                                        drawn.state.data(), drawn.scratch.data()};
  by_groups ? mlx_serving::sample_by_groups(in, out) : mlx_serving::sample(in, out);
  return drawn;
}

void a_group_draws_what_one_thread_draws() {
  const Batch batch = make_batch();
  const Drawn alone = draw_rows(batch, false);
  const Drawn group = draw_rows(batch, true);
  CHECK(alone.tokens == group.tokens);
  CHECK(alone.top_tokens == group.top_tokens);
  CHECK(alone.state == group.state);
  CHECK(alone.scratch == group.scratch);
}

void a_group_repeats_itself_to_the_bit() {
  const Batch batch = make_batch();
  const Drawn first = draw_rows(batch, true);
  for (int run = 0; run < 5; ++run) {
    const Drawn again = draw_rows(batch, true);
    CHECK(again.tokens == first.tokens);
    CHECK(again.chosen == first.chosen);
    CHECK(again.top == first.top);
  }
}

void tokens_are_in_range_and_broken_rows_have_none() {
  const Drawn drawn = draw_rows(make_batch(), true);
  for (std::size_t row = 0; row < 4; ++row) {
    CHECK(drawn.tokens[row] >= 0 && drawn.tokens[row] < int(kVocabulary));
  }
  CHECK((0x0f0f0f0f >> drawn.tokens[3] % 32) & 1);
  CHECK(drawn.tokens[4] == kInvalidToken && drawn.tokens[5] == kInvalidToken);
}

void the_state_takes_the_input_in() {
  const Drawn drawn = draw_rows(make_batch(), false);
  CHECK((std::vector<int>(drawn.state.begin(), drawn.state.begin() + 5) ==
         std::vector<int>{3, 5, 202, 1, 0}));
}

void keys_are_in_the_order_of_the_floats() {
  const float infinity = std::numeric_limits<float>::infinity();
  const float ascending[] = {-infinity, -3.0f, -1e-40f, 0.0f, 1e-40f, 2.0f, infinity};
  for (std::size_t at = 1; at < std::size(ascending); ++at) {
    CHECK(order_key(ascending[at - 1]) < order_key(ascending[at]));
    CHECK(key_value(order_key(ascending[at])) == ascending[at]);
  }
  CHECK(order_key(-0.0f) == order_key(0.0f));
  CHECK(order_key(infinity) == kInfinityKey && order_key(-infinity) == kMinusInfinityKey);
}

}  // namespace

int main() {
  a_group_draws_what_one_thread_draws();
  a_group_repeats_itself_to_the_bit();
  tokens_are_in_range_and_broken_rows_have_none();
  the_state_takes_the_input_in();
  keys_are_in_the_order_of_the_floats();
  return check::result();
}
