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
constexpr MLXS_CONSTANT word kInfinityKey = 0xff800000u;       // order_key(+inf)
constexpr MLXS_CONSTANT word kMinusInfinityKey = 0x007fffffu;  // order_key(-inf)
constexpr MLXS_CONSTANT word kSeen = 0x40000000u;              // in the prompt or the completion
constexpr MLXS_CONSTANT word kMultiplier1 = 0x7feb352du;       // lowbias32
constexpr MLXS_CONSTANT word kMultiplier2 = 0x846ca68bu;       // lowbias32
constexpr MLXS_CONSTANT word kWeyl1 = 0x9e3779b9u;
constexpr MLXS_CONSTANT word kWeyl2 = 0x85ebca6bu;
constexpr MLXS_CONSTANT float kUniformScale = 1.0f / 4294967296.0f;  // 2**-32
constexpr MLXS_CONSTANT float kLargestUniform = 0.99999994f;         // 1 - 2**-24
constexpr MLXS_CONSTANT word kSlots = 16;       // values that a thread can keep aside
constexpr MLXS_CONSTANT word kUsualSlots = 4;   // and how many it has of a full set, on average

// What one pass over a row finds; every thread has one, `reduce` merges them.
struct Partial {
  word best_key;   // the largest key and the lowest id that has it
  word best_id;
  word least_key;
  word counts[3];  // elements above each pivot, and their mass
  float masses[3];
};

struct Group {
  word index;  // of this thread
  word size;   // threads, a power of two
  MLXS_SHARED Partial* partials;
  MLXS_BARRIER_TYPE barrier;
};

// A row's parameters, and where its inputs and outputs are.
template <typename T>
struct Row {
  const MLXS_DEVICE T* logits;
  word size;
  const MLXS_DEVICE int* columns;
  const MLXS_DEVICE int* lists;  // of all rows: histories, biased tokens, biases by their bits
  const MLXS_DEVICE int* mask;   // a bit a token, set where it is allowed
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

MLXS_FUNCTION NoiseKey noise_key(const MLXS_DEVICE int* columns, int step) {
  const word position = word(columns[kPosition] + step);
  NoiseKey key;
  key.first = mix(word(columns[kStreamFirst]) + position * kWeyl1);
  key.second = mix(word(columns[kStreamSecond]) + position * kWeyl2);
  return key;
}

// log(-log(1 - u)) of the hash of (key, token id): negated standard Gumbel noise.
MLXS_FUNCTION float negative_gumbel(NoiseKey key, word id) {
  word bits = mix(id * kWeyl1 + kWeyl2) ^ key.first;
  bits = (bits ^ (bits >> 16)) * kMultiplier1 + key.second;
  bits = (bits ^ (bits >> 15)) * kMultiplier2;
  bits = bits ^ (bits >> 16);
  const float chance = float(bits) * kUniformScale + kUniformScale / 2.0f;
  return MLXS_LOG(-MLXS_LOG1P(-(chance < kLargestUniform ? chance : kLargestUniform)));
}

// -- a thread's share of the values --------------------------------------------------------

// Every kThreads-th value of the row.
template <typename Values>
struct RowShare {
  Values values;
  word first;
  word stride;
  word count;
  MLXS_FUNCTION word id(word at) const MLXS_THREAD { return first + at * stride; }
  MLXS_FUNCTION float value(word at) const MLXS_THREAD { return float(values[first + at * stride]); }
};

template <typename Values>
MLXS_FUNCTION RowShare<Values> share_of(Values values, word size, Group group) {
  RowShare<Values> share;
  share.values = values;
  share.first = group.index;
  share.stride = group.size;
  share.count = (size + group.size - 1 - group.index) / group.size;
  return share;
}

// Those of a share that are above some key, in the same order: sums over them are the same too.
struct Aside {
  float values[kSlots];
  word ids[kSlots];
  word count;
  MLXS_FUNCTION word id(word at) const MLXS_THREAD { return ids[at]; }
  MLXS_FUNCTION float value(word at) const MLXS_THREAD { return values[at]; }
};

// -- one pass -----------------------------------------------------------------------------

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
  group.partials[group.index] = mine;
  MLXS_BARRIER(group);
  for (word distance = group.size / 2; distance > 0; distance /= 2) {
    if (group.index < distance) {
      const Partial one = group.partials[group.index];
      const Partial other = group.partials[group.index + distance];
      group.partials[group.index] = merge(one, other);
    }
    MLXS_BARRIER(group);
  }
  const Partial all = group.partials[0];
  MLXS_BARRIER(group);
  return all;
}

// Largest and smallest value.
template <typename Share>
MLXS_FUNCTION Partial extremes(const MLXS_THREAD Share& share, Group group) {
  Partial mine = nothing();
  for (word at = 0; at < share.count; ++at) {
    const word key = order_key(share.value(at));
    if (key > mine.best_key) {  // ids ascend, so the first of equals stays
      mine.best_key = key;
      mine.best_id = share.id(at);
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
template <typename Share>
MLXS_FUNCTION Partial next_best(const MLXS_THREAD Share& share, word key, word id, Group group) {
  Partial mine = nothing();
  for (word at = 0; at < share.count; ++at) {
    const word candidate = order_key(share.value(at));
    if (before(key, id, candidate, share.id(at)) && candidate > mine.best_key) {
      mine.best_key = candidate;
      mine.best_id = share.id(at);
    }
  }
  return reduce(mine, group);
}

// exp((value - top) / temperature), a value's unnormalised probability.
struct Weights {
  float top;
  float temperature;
};

MLXS_FUNCTION float weight(float value, Weights by) {
  return MLXS_EXP((value - by.top) / by.temperature);
}

// The mass of what is above `floor`.
template <typename Share>
MLXS_FUNCTION float mass_above(const MLXS_THREAD Share& share, word floor, Weights by, Group group) {
  Partial mine = nothing();
  for (word at = 0; at < share.count; ++at) {
    const float value = share.value(at);
    if (order_key(value) > floor) mine.masses[0] += weight(value, by);
  }
  return reduce(mine, group).masses[0];
}

// -- top-k and top-p ----------------------------------------------------------------------

// Where the floor is: `low` is not kept (or below all), `high` is; `above` values beat `low`.
struct Interval {
  word low;
  word high;
  word above;
};

// A value is kept where fewer than `count` values beat it (top-k), or where their mass is below
// `mass` (top-p, by_mass).
struct Kept {
  word count;
  float mass;
};

MLXS_FUNCTION word within(word key, Interval interval) {
  if (key <= interval.low) return interval.low + 1;
  return key < interval.high ? key : interval.high - 1;
}

// Two pivots by value, since logits spread by value, and the middle key, which halves any interval.
MLXS_FUNCTION void choose_pivots(Interval interval, MLXS_THREAD word* pivots) {
  const bool unbounded = interval.low < kMinusInfinityKey;
  const float from = unbounded ? 0.0f : key_value(interval.low);
  const float to = key_value(interval.high);
  const word center = unbounded ? kMinusInfinityKey : order_key(0.5f * from + 0.5f * to);
  const word upper = unbounded ? kMinusInfinityKey : order_key(0.25f * from + 0.75f * to);
  const word middle = interval.low + (interval.high - interval.low) / 2;
  pivots[0] = within(middle < center ? middle : center, interval);
  pivots[1] = within(middle < center ? center : (middle < upper ? middle : upper), interval);
  pivots[2] = within(middle < upper ? upper : middle, interval);
}

// Narrows the interval to the floor, or until at most `enough` values are above it.
template <bool by_mass, typename Share>
MLXS_FUNCTION Interval narrow(const MLXS_THREAD Share& share, Interval interval, Kept kept, word enough,
                              Weights by, Group group) {
  while (interval.high - interval.low > 1 && interval.above > enough) {
    word pivots[3];
    choose_pivots(interval, pivots);
    Partial mine = nothing();
    for (word at = 0; at < share.count; ++at) {
      const float value = share.value(at);
      const word key = order_key(value);
      if (key <= interval.low) continue;
      if (key <= interval.high) {
        if (key > mine.best_key) mine.best_key = key;
        if (key < mine.least_key) mine.least_key = key;
      }
      if (key <= pivots[0]) continue;
      const float mass = by_mass ? weight(value, by) : 0.0f;
      for (int pivot = 0; pivot < 3; ++pivot) {
        if (key > pivots[pivot]) {
          mine.counts[pivot] += 1u;
          mine.masses[pivot] += mass;
        }
      }
    }
    const Partial all = reduce(mine, group);
    for (int pivot = 0; pivot < 3; ++pivot) {  // pivots ascend, and so does what is kept
      if (by_mass ? all.masses[pivot] < kept.mass : all.counts[pivot] < kept.count) {
        interval.high = pivots[pivot];
        break;
      }
      interval.low = pivots[pivot];
      interval.above = all.counts[pivot];
    }
    // No value of the interval lies outside [least, best]: where they meet, it holds one value.
    if (all.best_key < interval.high) interval.high = all.best_key;
    if (all.least_key - 1 > interval.low) interval.low = all.least_key - 1;
  }
  return interval;
}

// Puts what is above `floor` aside; false where some thread has too many.
template <typename Share>
MLXS_FUNCTION bool put_aside(const MLXS_THREAD Share& share, word floor, MLXS_THREAD Aside& aside,
                             Group group) {
  aside.count = 0;
  Partial mine = nothing();
  for (word at = 0; at < share.count; ++at) {
    const float value = share.value(at);
    if (order_key(value) <= floor) continue;
    if (aside.count == kSlots) {
      mine.counts[0] = 1u;
      break;
    }
    aside.values[aside.count] = value;
    aside.ids[aside.count] = share.id(at);
    ++aside.count;
  }
  return reduce(mine, group).counts[0] == 0u;
}

// Narrows to the floor, over few values as soon as few are left.
template <bool by_mass, typename Share>
MLXS_FUNCTION Interval settle(const MLXS_THREAD Share& share, MLXS_THREAD Aside& aside,
                              MLXS_THREAD bool& is_aside, Interval interval, Kept kept, Weights by,
                              Group group) {
  if (!is_aside) {
    interval = narrow<by_mass>(share, interval, kept, kUsualSlots * group.size, by, group);
    is_aside = put_aside(share, interval.low, aside, group);
  }
  if (is_aside) return narrow<by_mass>(aside, interval, kept, 0u, by, group);
  return narrow<by_mass>(share, interval, kept, 0u, by, group);
}

// -- the draw -----------------------------------------------------------------------------

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

// -- penalties, bias, mask ----------------------------------------------------------------

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

// -- log probabilities --------------------------------------------------------------------

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
