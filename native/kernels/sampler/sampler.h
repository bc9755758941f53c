// One decode step's sampling for one row of logits: penalties, bias, mask, temperature, top-k,
// top-p, min-p, Gumbel-max, log probabilities. The Python reference states what each of them
// means (mlx_serving/worker/engine/sampling/reference.py); this is the same without a sort.
//
// One algorithm for three dialects: a prelude (cuda.h, metal.h, or host.h for the CPU) defines
// the MLXS_* names. One group of threads works on one row. Whatever order threads run in, the
// result is the same to the bit: sums are taken by a tree over fixed shares, never by atomics
// on floats, so a row's token does not depend on its batch-mates or on the run.
//
// Values are compared as `order keys`, unsigned integers in the order of the floats. What top-k
// and top-p keep is everything above one key, the floor; it is found by narrowing an interval of
// keys, three pivots a pass over the row, until a single value is left in it.
#pragma once

#include "adjustments.h"
#include "filters.h"

namespace mlx_serving_sampler {

template <typename Share>
MLXS_FUNCTION word draw(const MLXS_THREAD Share& share, word floor, Weights by, float log_min_p,
                        NoiseKey noise, Group group) {
  Partial mine = nothing();
  for (word at = 0; at < share.count; ++at) {
    const float value = share.value(at);
    if (order_key(value) <= floor) continue;
    const float scaled = (value - by.top) / by.temperature;
    if (scaled < log_min_p) continue;
    const word score = order_key(scaled - negative_gumbel(noise, share.id(at)));
    if (score > mine.best_key) {
      mine.best_key = score;
      mine.best_id = share.id(at);
    }
  }
  return reduce(mine, group).best_id;
}

// The token of a row whose logits are final.
template <typename Values>
MLXS_FUNCTION int pick(Values values, word size, const MLXS_DEVICE int* columns, int step,
                       Group group) {
  const RowShare<Values> share = share_of(values, size, group);
  const Partial range = extremes(share, group);
  if (!usable(range)) return kInvalidToken;
  if ((columns[kFlags] & kGreedy) != 0) return int(range.best_id);
  Weights by;
  by.top = key_value(range.best_key);
  by.temperature = number(columns, kTemperature);
  Aside aside;
  bool is_aside = false;
  Interval interval;
  interval.low = range.least_key - 1;
  interval.high = range.best_key;
  interval.above = size;
  Kept kept;
  kept.count = word(columns[kTopK]);
  kept.mass = 0.0f;
  if (kept.count < size) {
    interval = settle<false>(share, aside, is_aside, interval, kept, by, group);
  }
  const float top_p = number(columns, kTopP);
  if (top_p < 1.0f) {
    const float total = is_aside ? mass_above(aside, interval.low, by, group)
                                 : mass_above(share, interval.low, by, group);
    kept.mass = top_p * total;
    interval.high = range.best_key;
    interval = settle<true>(share, aside, is_aside, interval, kept, by, group);
  }
  const NoiseKey noise = noise_key(columns, step);
  const float log_min_p = number(columns, kLogMinP);
  return int(is_aside ? draw(aside, interval.low, by, log_min_p, noise, group)
                      : draw(share, interval.low, by, log_min_p, noise, group));
}

// Of the model's own distribution: the chosen token's and the `kLogprobs` likeliest ones'.
template <typename T>
MLXS_FUNCTION void report_logprobs(Row<T> row, int token, Result result, Group group) {
  const RowShare<const MLXS_DEVICE T*> share = share_of(row.logits, row.size, group);
  Partial best = extremes(share, group);
  Weights by;
  by.top = key_value(best.best_key);
  by.temperature = 1.0f;
  const float log_total = MLXS_LOG(mass_above(share, 0u, by, group));
  if (group.index == 0u) *result.logprob = float(row.logits[token]) - by.top - log_total;
  for (int at = 0; at < row.columns[kLogprobs]; ++at) {
    if (at > 0) best = next_best(share, best.best_key, best.best_id, group);
    if (group.index == 0u) {
      result.top_tokens[at] = int(best.best_id);
      result.top_logprobs[at] = key_value(best.best_key) - by.top - log_total;
    }
  }
}

template <typename T>
MLXS_FUNCTION void sample_row(Row<T> row, Result result, Group group) {
  int token;
  if (row.columns[kScratchRow] < 0) {
    token = pick(row.logits, row.size, row.columns, row.state[0], group);
  } else {
    // A mask may hide what is broken; the row is broken all the same.
    const RowShare<const MLXS_DEVICE T*> share = share_of(row.logits, row.size, group);
    const bool sound = usable(extremes(share, group));
    if (sound) adjust(row, group);
    const MLXS_DEVICE float* scratch = row.scratch;
    token = sound ? pick(scratch, row.size, row.columns, row.state[0], group) : kInvalidToken;
  }
  if (group.index == 0u) *result.token = token;
  if (row.columns[kLogprobs] >= 0 && token >= 0) report_logprobs(row, token, result, group);
}

}  // namespace mlx_serving_sampler
