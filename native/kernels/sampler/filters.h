// Top-k and top-p: what they keep is above one key, the floor.
#pragma once

#include "passes.h"

namespace mlx_serving_sampler {

// The interval that holds the floor: `low` is not kept (or below all), `high` is; `above` values beat `low`.
struct Interval {
  word low;
  word high;
  word above;
};

// A value is kept if fewer than `count` values beat it (top-k), or if their mass is below `mass`
// (top-p, by_mass).
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
MLXS_FUNCTION Interval narrow(const MLXS_THREAD Share& share, Interval interval, Kept kept,
                              word enough, Weights by, Group group) {
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
    // No value of the interval lies outside [least, best]: if they meet, it holds one value.
    if (all.best_key < interval.high) interval.high = all.best_key;
    if (all.least_key - 1 > interval.low) interval.low = all.least_key - 1;
  }
  return interval;
}

// Puts what is above `floor` aside; false if some thread has too many.
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

}  // namespace mlx_serving_sampler
