// Passes over a row: every thread reads its share, a tree merges what they found.
#pragma once

#include "noise.h"

namespace mlx_serving_sampler {

constexpr MLXS_CONSTANT word kSlots = 16;  // values that a thread can keep aside
constexpr MLXS_CONSTANT word kUsualSlots = 4;  // and how many it has of a full set, on average

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

// Every kThreads-th value of the row.
template <typename Values>
struct RowShare {
  Values values;
  word first;
  word stride;
  word count;
  MLXS_FUNCTION word id(word at) const MLXS_THREAD { return first + at * stride; }
  MLXS_FUNCTION float value(word at) const MLXS_THREAD {
    return float(values[first + at * stride]);
  }
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
MLXS_FUNCTION float mass_above(const MLXS_THREAD Share& share, word floor, Weights by,
                               Group group) {
  Partial mine = nothing();
  for (word at = 0; at < share.count; ++at) {
    const float value = share.value(at);
    if (order_key(value) > floor) mine.masses[0] += weight(value, by);
  }
  return reduce(mine, group).masses[0];
}

}  // namespace mlx_serving_sampler
