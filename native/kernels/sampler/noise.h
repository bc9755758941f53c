// Order keys, and counter-based Gumbel noise (sampling/noise.py).
#pragma once

#include "row.h"

namespace mlx_serving_sampler {

constexpr MLXS_CONSTANT word kInfinityKey = 0xff800000u;  // order_key(+inf)
constexpr MLXS_CONSTANT word kMinusInfinityKey = 0x007fffffu;  // order_key(-inf)
constexpr MLXS_CONSTANT word kMultiplier1 = 0x7feb352du;  // lowbias32
constexpr MLXS_CONSTANT word kMultiplier2 = 0x846ca68bu;  // lowbias32
constexpr MLXS_CONSTANT word kWeyl1 = 0x9e3779b9u;
constexpr MLXS_CONSTANT word kWeyl2 = 0x85ebca6bu;
constexpr MLXS_CONSTANT float kUniformScale = 1.0f / 4294967296.0f;  // 2**-32
constexpr MLXS_CONSTANT float kLargestUniform = 0.99999994f;  // 1 - 2**-24

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

}  // namespace mlx_serving_sampler
