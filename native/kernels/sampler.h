// One decode step's sampling for one row of logits: penalties, bias, mask, temperature, top-k,
// top-p, min-p, Gumbel-max, log probabilities. The Python reference states what each of them
// means (mlx_serving/worker/engine/sampling/reference.py); this is the same without a sort.
//
// One algorithm for three dialects: a prelude (cuda.h, metal.h, or host.h for the tests) defines
// the MLXS_* names. One group of threads works on one row. Whatever order threads run in, the
// result is the same to the bit: sums are taken by a tree over fixed shares, never by atomics
// on floats, so a row's token does not depend on its batch-mates or on the run.
//
// Values are compared as `order keys`, unsigned integers in the order of the floats. What top-k
// and top-p keep is everything above one key, the floor; it is found by narrowing an interval of
// keys, three pivots a pass over the row, until a single value is left in it.
#pragma once

namespace mlx_serving_sampler {

typedef unsigned int word;

// Columns of the two arrays that hold a row's parameters (sampling/parameters.py writes them).
enum FloatColumn { kTemperature, kTopP, kLogMinP, kRepetition, kPresence, kFrequency, kFloatColumns = 8 };
enum IntColumn {
  kFlags, kTopK, kLogprobs, kStreamFirst, kStreamSecond, kPosition, kScratchRow,
  kHistoryBegin, kPromptEnd, kHistoryEnd, kBiasBegin, kBiasEnd, kIntColumns
};
enum Flag { kGreedy = 1, kPenalised = 2, kMasked = 4 };

constexpr MLXS_CONSTANT int kInvalidToken = -1;
constexpr MLXS_CONSTANT word kNoId = 0xffffffffu;
constexpr MLXS_CONSTANT word kInfinityKey = 0xff800000u;          // order_key(+inf)
constexpr MLXS_CONSTANT word kMinusInfinityKey = 0x007fffffu;     // order_key(-inf)
constexpr MLXS_CONSTANT word kSeen = 0x40000000u;                 // in the prompt or the completion
constexpr MLXS_CONSTANT word kMultiplier1 = 0x7feb352du;          // lowbias32
constexpr MLXS_CONSTANT word kMultiplier2 = 0x846ca68bu;          // lowbias32
constexpr MLXS_CONSTANT word kWeyl1 = 0x9e3779b9u;
constexpr MLXS_CONSTANT word kWeyl2 = 0x85ebca6bu;
constexpr MLXS_CONSTANT float kUniformScale = 1.0f / 4294967296.0f;  // 2**-32
constexpr MLXS_CONSTANT float kLargestUniform = 0.99999994f;         // 1 - 2**-24

// What one pass over a row finds; every thread has one, `reduce` merges them.
struct Partial {
  word best_key;   // the largest key and the lowest id that has it
  word best_id;
  word least_key;
  word counts[3];  // elements above each pivot, and their mass
  float masses[3];
};

struct Group {
  word thread;
  word threads;  // a power of two
  MLXS_SHARED Partial* partials;
  MLXS_BARRIER_TYPE barrier;
};

// The row's parameters, and where its inputs and outputs are.
template <typename T>
struct Row {
  const MLXS_DEVICE T* logits;
  word size;
  const MLXS_DEVICE float* floats;
  const MLXS_DEVICE int* ints;
  const MLXS_DEVICE int* mask;     // a bit a token, set where it is allowed
  const MLXS_DEVICE int* history;  // of all rows; this one's is [kHistoryBegin, kHistoryEnd)
  const MLXS_DEVICE int* bias_tokens;
  const MLXS_DEVICE float* bias_values;
  const MLXS_DEVICE int* recent;  // this row's inputs of the `step` calls before this one
  int input;                      // and of this one
  int step;
  MLXS_DEVICE float* scratch;  // [size], of rows with penalties, bias or a mask
};

// The token, and the log probabilities of rows that ask for them.
struct Result {
  MLXS_DEVICE int* token;
  MLXS_DEVICE float* logprob;
  MLXS_DEVICE int* top_tokens;
  MLXS_DEVICE float* top_logprobs;
};

// -- order keys and noise -----------------------------------------------------------------

MLXS_FUNCTION word order_key(float value) {
  const word raw = MLXS_FLOAT_BITS(value);
  const word bits = raw == 0x80000000u ? 0u : raw;  // -0 ties with 0
  return (bits & 0x80000000u) != 0u ? ~bits : (bits | 0x80000000u);
}

MLXS_FUNCTION float key_value(word key) {
  return MLXS_BITS_FLOAT((key & 0x80000000u) != 0u ? (key & 0x7fffffffu) : ~key);
}

MLXS_FUNCTION word mix(word bits) {
  bits = (bits ^ (bits >> 16)) * kMultiplier1;
  bits = (bits ^ (bits >> 15)) * kMultiplier2;
  return bits ^ (bits >> 16);
}

struct NoiseKey {
  word first;
  word second;
};

MLXS_FUNCTION NoiseKey noise_key(const MLXS_DEVICE int* ints, int step) {
  const word position = word(ints[kPosition] + step);
  NoiseKey key;
  key.first = mix(word(ints[kStreamFirst]) + position * kWeyl1);
  key.second = mix(word(ints[kStreamSecond]) + position * kWeyl2);
  return key;
}

// log(-log(1 - u)) of the hash of (key, token id): negated standard Gumbel noise.
MLXS_FUNCTION float negative_gumbel(NoiseKey key, word id) {
  word bits = mix(id * kWeyl1 + kWeyl2) ^ key.first;
  bits = (bits ^ (bits >> 16)) * kMultiplier1 + key.second;
  bits = (bits ^ (bits >> 15)) * kMultiplier2;
  bits = bits ^ (bits >> 16);
  const float uniform = float(bits) * kUniformScale + kUniformScale / 2.0f;
  return MLXS_LOG(-MLXS_LOG1P(-(uniform < kLargestUniform ? uniform : kLargestUniform)));
}

// -- one pass over a row ------------------------------------------------------------------

MLXS_FUNCTION Partial nothing() {
  Partial partial;
  partial.best_key = 0u;
  partial.best_id = kNoId;
  partial.least_key = 0xffffffffu;
  for (int at = 0; at < 3; ++at) {
    partial.counts[at] = 0u;
    partial.masses[at] = 0.0f;
  }
  return partial;
}

MLXS_FUNCTION bool before(word key, word id, word other_key, word other_id) {
  return key > other_key || (key == other_key && id < other_id);
}

MLXS_FUNCTION Partial merge(Partial one, Partial other) {
  if (before(other.best_key, other.best_id, one.best_key, one.best_id)) {
    one.best_key = other.best_key;
    one.best_id = other.best_id;
  }
  if (other.least_key < one.least_key) one.least_key = other.least_key;
  for (int at = 0; at < 3; ++at) {
    one.counts[at] += other.counts[at];
    one.masses[at] += other.masses[at];
  }
  return one;
}

// Every thread gets the same answer; the order of the sums is fixed by the tree.
MLXS_FUNCTION Partial reduce(Partial mine, Group group) {
  group.partials[group.thread] = mine;
  MLXS_BARRIER(group);
  for (word half = group.threads / 2; half > 0; half /= 2) {
    if (group.thread < half) {
      const Partial one = group.partials[group.thread];
      const Partial other = group.partials[group.thread + half];
      group.partials[group.thread] = merge(one, other);
    }
    MLXS_BARRIER(group);
  }
  const Partial all = group.partials[0];
  MLXS_BARRIER(group);
  return all;
}

// Largest and smallest value.
template <typename Values>
MLXS_FUNCTION Partial extremes(Values values, word size, Group group) {
  Partial mine = nothing();
  for (word id = group.thread; id < size; id += group.threads) {
    const word key = order_key(float(values[id]));
    if (key > mine.best_key) {  // ids ascend, so the first of equals stays
      mine.best_key = key;
      mine.best_id = id;
    }
    if (key < mine.least_key) mine.least_key = key;
  }
  return reduce(mine, group);
}

// NaN sorts beyond the infinities, at either end.
MLXS_FUNCTION bool usable(Partial range) {
  return range.best_key < kInfinityKey && range.best_key > kMinusInfinityKey &&
         range.least_key >= kMinusInfinityKey;
}

// The largest value after (key, id) in the order of `before`.
template <typename Values>
MLXS_FUNCTION Partial next_best(Values values, word size, word key, word id, Group group) {
  Partial mine = nothing();
  for (word at = group.thread; at < size; at += group.threads) {
    const word candidate = order_key(float(values[at]));
    if (before(key, id, candidate, at) && candidate > mine.best_key) {
      mine.best_key = candidate;
      mine.best_id = at;
    }
  }
  return reduce(mine, group);
}

// Sum of exp((value - top) / temperature) over values with keys above `floor`.
template <typename Values>
MLXS_FUNCTION float mass_above(Values values, word size, word floor, float top, float temperature,
                               Group group) {
  Partial mine = nothing();
  for (word id = group.thread; id < size; id += group.threads) {
    const float value = float(values[id]);
    if (order_key(value) > floor) mine.masses[0] += MLXS_EXP((value - top) / temperature);
  }
  return reduce(mine, group).masses[0];
}

// -- top-k and top-p ----------------------------------------------------------------------

// A value is kept where fewer than `count` values are above it (top-k; by mass = false), or where
// their mass is below `mass` (top-p). What is kept is above one floor; returns that key.
// On entry `low` is not kept (or below all) and `high` is.
template <bool by_mass, typename Values>
MLXS_FUNCTION word narrow(Values values, word size, word low, word high, word count, float mass,
                          float top, float temperature, Group group) {
  while (high - low > 1) {
    const word span = high - low;
    const word quarter = span < 4 ? 1u : span / 4;
    const word pivots[3] = {low + quarter, low + span / 2, high - quarter};
    Partial mine = nothing();
    for (word id = group.thread; id < size; id += group.threads) {
      const float value = float(values[id]);
      const word key = order_key(value);
      if (key <= low) continue;
      if (key <= high) {
        if (key > mine.best_key) mine.best_key = key;
        if (key < mine.least_key) mine.least_key = key;
      }
      const float weight = by_mass && key > pivots[0] ? MLXS_EXP((value - top) / temperature) : 0.0f;
      for (int at = 0; at < 3; ++at) {
        if (key > pivots[at]) {
          mine.counts[at] += 1u;
          mine.masses[at] += weight;
        }
      }
    }
    const Partial all = reduce(mine, group);
    const word best = all.best_key;   // within (low, high]
    const word least = all.least_key;
    for (int at = 0; at < 3; ++at) {  // pivots ascend, and so does what is kept
      if (by_mass ? all.masses[at] < mass : all.counts[at] < count) {
        high = pivots[at];
        break;
      }
      low = pivots[at];
    }
    // No value lies outside [least, best]: where they meet, the interval holds one value.
    if (best < high) high = best;
    if (least - 1 > low) low = least - 1;
  }
  return low;
}

template <typename Values>
MLXS_FUNCTION word find_floor(Values values, word size, Partial range, const MLXS_DEVICE float* floats,
                              const MLXS_DEVICE int* ints, float top, Group group) {
  word floor = range.least_key - 1;
  const word top_k = word(ints[kTopK]);
  const float temperature = floats[kTemperature];
  if (top_k < size) {
    floor = narrow<false>(values, size, floor, range.best_key, top_k, 0.0f, top, temperature, group);
  }
  const float top_p = floats[kTopP];
  if (top_p < 1.0f) {
    const float total = mass_above(values, size, floor, top, temperature, group);
    floor = narrow<true>(values, size, floor, range.best_key, 0u, top_p * total, top, temperature,
                         group);
  }
  return floor;
}

// -- the draw -----------------------------------------------------------------------------

template <typename Values>
MLXS_FUNCTION word draw(Values values, word size, word floor, float top,
                        const MLXS_DEVICE float* floats, NoiseKey noise, Group group) {
  const float temperature = floats[kTemperature];
  const float log_min_p = floats[kLogMinP];
  Partial mine = nothing();
  for (word id = group.thread; id < size; id += group.threads) {
    const float value = float(values[id]);
    if (order_key(value) <= floor) continue;
    const float scaled = (value - top) / temperature;
    if (scaled < log_min_p) continue;
    const word score = order_key(scaled - negative_gumbel(noise, id));
    if (score > mine.best_key) {
      mine.best_key = score;
      mine.best_id = id;
    }
  }
  return reduce(mine, group).best_id;
}

// The token of a row whose logits are final.
template <typename Values>
MLXS_FUNCTION int pick(Values values, word size, const MLXS_DEVICE float* floats,
                       const MLXS_DEVICE int* ints, int step, Group group) {
  const Partial range = extremes(values, size, group);
  if (!usable(range)) return kInvalidToken;
  if ((ints[kFlags] & kGreedy) != 0) return int(range.best_id);
  const float top = key_value(range.best_key);
  const word floor = find_floor(values, size, range, floats, ints, top, group);
  return int(draw(values, size, floor, top, floats, noise_key(ints, step), group));
}

// -- penalties, bias, mask ----------------------------------------------------------------

// Counts the row's history into its scratch: kSeen + how often the completion holds the token.
template <typename T>
MLXS_FUNCTION void count_history(Row<T> row, Group group) {
  MLXS_DEVICE word* counts = (MLXS_DEVICE word*)row.scratch;
  for (word id = group.thread; id < row.size; id += group.threads) MLXS_STORE(counts + id, 0u);
  MLXS_BARRIER(group);
  const int prompt_end = row.ints[kPromptEnd];
  const int end = row.ints[kHistoryEnd];
  for (int at = row.ints[kHistoryBegin] + int(group.thread); at < end; at += int(group.threads)) {
    MLXS_DEVICE word* count = counts + row.history[at];
    MLXS_ATOMIC_OR(count, kSeen);
    if (at >= prompt_end) MLXS_ATOMIC_ADD(count, 1u);
  }
  // The input at position 0 is the last token of the prompt, every later one a sampled token.
  for (int at = int(group.thread); at <= row.step; at += int(group.threads)) {
    const int token = at < row.step ? row.recent[at] : row.input;
    if (token < 0) continue;  // a broken row's
    MLXS_DEVICE word* count = counts + token;
    MLXS_ATOMIC_OR(count, kSeen);
    if (row.ints[kPosition] + at > 0) MLXS_ATOMIC_ADD(count, 1u);
  }
  MLXS_BARRIER(group);
}

MLXS_FUNCTION float penalised(float value, word counted, const MLXS_DEVICE float* floats) {
  const float repetition = floats[kRepetition];
  if (counted != 0u) value = value > 0.0f ? value / repetition : MLXS_MULTIPLY(value, repetition);
  const word count = counted & (kSeen - 1u);
  if (count == 0u) return value;
  return value - (floats[kPresence] + MLXS_MULTIPLY(floats[kFrequency], float(count)));
}

// Writes the row's final logits into its scratch.
template <typename T>
MLXS_FUNCTION void adjust(Row<T> row, Group group) {
  const int flags = row.ints[kFlags];
  const bool masked = (flags & kMasked) != 0;
  const bool counted = (flags & kPenalised) != 0;
  if (counted) count_history(row, group);
  MLXS_DEVICE word* counts = (MLXS_DEVICE word*)row.scratch;
  for (word id = group.thread; id < row.size; id += group.threads) {
    float value = float(row.logits[id]);
    if (counted) value = penalised(value, MLXS_LOAD(counts + id), row.floats);
    if (masked && ((word(row.mask[id / 32]) >> (id % 32)) & 1u) == 0u) {
      value = key_value(kMinusInfinityKey);
    }
    row.scratch[id] = value;
  }
  MLXS_BARRIER(group);
  // A row names each biased token once.
  const int end = row.ints[kBiasEnd];
  for (int at = row.ints[kBiasBegin] + int(group.thread); at < end; at += int(group.threads)) {
    row.scratch[row.bias_tokens[at]] += row.bias_values[at];
  }
  MLXS_BARRIER(group);
}

// -- log probabilities --------------------------------------------------------------------

// Of the model's own distribution: the chosen token's and the `kLogprobs` likeliest ones'.
template <typename T>
MLXS_FUNCTION void report_logprobs(Row<T> row, int token, Result result, Group group) {
  const Partial range = extremes(row.logits, row.size, group);
  const float top = key_value(range.best_key);
  const float log_total = MLXS_LOG(mass_above(row.logits, row.size, 0u, top, 1.0f, group));
  if (group.thread == 0u) *result.logprob = float(row.logits[token]) - top - log_total;
  Partial best = range;
  for (int at = 0; at < row.ints[kLogprobs]; ++at) {
    if (at > 0) best = next_best(row.logits, row.size, best.best_key, best.best_id, group);
    if (group.thread == 0u) {
      result.top_tokens[at] = best.best_id == kNoId ? kInvalidToken : int(best.best_id);
      result.top_logprobs[at] = key_value(best.best_key) - top - log_total;
    }
  }
}

template <typename T>
MLXS_FUNCTION void sample_row(Row<T> row, Result result, Group group) {
  int token;
  if (row.ints[kScratchRow] < 0) {
    token = pick(row.logits, row.size, row.floats, row.ints, row.step, group);
  } else {
    // A mask may hide what is broken; the row is broken all the same.
    const bool sound = usable(extremes(row.logits, row.size, group));
    if (sound) adjust(row, group);
    const MLXS_DEVICE float* scratch = row.scratch;
    token = sound ? pick(scratch, row.size, row.floats, row.ints, row.step, group) : kInvalidToken;
  }
  if (group.thread == 0u) *result.token = token;
  if (row.ints[kLogprobs] >= 0 && token >= 0) report_logprobs(row, token, result, group);
}

}  // namespace mlx_serving_sampler
