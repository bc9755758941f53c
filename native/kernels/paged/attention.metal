// Attention of one decode step over a paged KV cache: the body of a Metal kernel, to which
// mx.fast.metal_kernel adds the signature. The same algorithm, inputs and outputs as in
// attention.cu, which describes them.
//
// A warp there is a SIMD group here, of 32 threads on every Apple GPU.

constexpr int THREADS = 128;
constexpr int TEAMS = THREADS / LANES;
constexpr int WARPS = THREADS / 32;
constexpr int PART = D / LANES;  // elements of a head that a thread holds
constexpr int UNROLL = 4;        // tokens a team has in flight
constexpr float NONE = -1e30f;   // below every score; finite, so that NONE - NONE is 0

threadgroup float warp_max[WARPS][GROUP];
threadgroup float warp_sum[WARPS][GROUP];
threadgroup float warp_acc[WARPS][GROUP][D];

const int item = threadgroup_position_in_grid.z;
const int row = work[3 * item];
if (row < 0) {
  return;
}
const int tiles = threadgroups_per_grid.y;
const int tile = threadgroup_position_in_grid.y;
const int heads_kv = tiles / TILES;
const int head_kv = tile / TILES;
const int head = tile * GROUP;  // the first of this threadgroup's query heads
const int heads = tiles * GROUP;
const int thread_index = thread_position_in_threadgroup.x;
const int lane = thread_index % LANES;
const int team = thread_index / LANES;
const int length = lengths[row];
const int start = work[3 * item + 1];
const int stop = metal::min(work[3 * item + 2], length + 1);
const int first_block = row * table_shape[1];

const device T* own_key = k + (row * heads_kv + head_kv) * D;
const device T* own_value = v + (row * heads_kv + head_kv) * D;
if (STORE && stop == length + 1 && start < stop && tile % TILES == 0) {
  const size_t place =
      ((size_t(table[first_block + length / BLOCK]) * heads_kv + head_kv) * BLOCK +
       length % BLOCK) * D;
  for (int d = thread_index; d < D; d += THREADS) {
    ((device T*)key_pool)[place + d] = own_key[d];
    ((device T*)value_pool)[place + d] = own_value[d];
  }
}

float query[GROUP][PART];
float acc[GROUP][PART];
float top[GROUP];
float sum[GROUP];
const float factor = scale[0] * 1.4426950408889634f;  // log2(e): scores are powers of two
for (int g = 0; g < GROUP; ++g) {
  top[g] = NONE;
  sum[g] = 0.0f;
  const device T* q_head = q + (size_t(row) * heads + head + g) * D + lane * PART;
  for (int e = 0; e < PART; ++e) {
    query[g][e] = float(q_head[e]) * factor;
    acc[g][e] = 0.0f;
  }
}

for (int base = start; base < stop; base += TEAMS * UNROLL) {
  const device T* values[UNROLL];
  float score[UNROLL][GROUP];
  for (int u = 0; u < UNROLL; ++u) {
    const int token = metal::min(base + u * TEAMS + team, stop - 1);
    const device T* key = own_key;
    values[u] = own_value;
    if (token != length) {
      const size_t place =
          ((size_t(table[first_block + token / BLOCK]) * heads_kv + head_kv) * BLOCK +
           token % BLOCK) * D;
      key = key_pool + place;
      values[u] = value_pool + place;
    }
    for (int g = 0; g < GROUP; ++g) {
      score[u][g] = 0.0f;
      for (int e = 0; e < PART; ++e) {
        score[u][g] += query[g][e] * float(key[lane * PART + e]);
      }
    }
  }
  for (int u = 0; u < UNROLL; ++u) {
    const bool present = base + u * TEAMS + team < stop;
    for (int g = 0; g < GROUP; ++g) {
      for (int offset = LANES / 2; offset > 0; offset /= 2) {
        score[u][g] += metal::simd_shuffle_xor(score[u][g], offset);
      }
      score[u][g] = present ? score[u][g] : NONE;
    }
  }
  for (int g = 0; g < GROUP; ++g) {
    float highest = top[g];
    for (int u = 0; u < UNROLL; ++u) {
      highest = metal::max(highest, score[u][g]);
    }
    const float shrink = metal::exp2(top[g] - highest);
    top[g] = highest;
    sum[g] *= shrink;
    for (int e = 0; e < PART; ++e) {
      acc[g][e] *= shrink;
    }
  }
  for (int u = 0; u < UNROLL; ++u) {
    const bool present = base + u * TEAMS + team < stop;
    for (int g = 0; g < GROUP; ++g) {
      const float weight = present ? metal::exp2(score[u][g] - top[g]) : 0.0f;
      sum[g] += weight;
      for (int e = 0; e < PART; ++e) {
        acc[g][e] += weight * float(values[u][lane * PART + e]);
      }
    }
  }
}

// Teams of one warp, then warps.
for (int g = 0; g < GROUP; ++g) {
  for (int offset = LANES; offset < 32; offset *= 2) {
    const float other = metal::simd_shuffle_xor(top[g], offset);
    const float highest = metal::max(top[g], other);
    const float mine = metal::exp2(top[g] - highest);
    const float theirs = metal::exp2(other - highest);
    sum[g] = sum[g] * mine + metal::simd_shuffle_xor(sum[g], offset) * theirs;
    for (int e = 0; e < PART; ++e) {
      acc[g][e] = acc[g][e] * mine + metal::simd_shuffle_xor(acc[g][e], offset) * theirs;
    }
    top[g] = highest;
  }
  if (thread_index % 32 < LANES) {
    for (int e = 0; e < PART; ++e) {
      warp_acc[thread_index / 32][g][lane * PART + e] = acc[g][e];
    }
    if (lane == 0) {
      warp_max[thread_index / 32][g] = top[g];
      warp_sum[thread_index / 32][g] = sum[g];
    }
  }
}
threadgroup_barrier(metal::mem_flags::mem_threadgroup);
for (int index = thread_index; index < GROUP * D; index += THREADS) {
  const int g = index / D;
  const int d = index % D;
  float highest = NONE;
  for (int w = 0; w < WARPS; ++w) {
    highest = metal::max(highest, warp_max[w][g]);
  }
  float total = 0.0f;
  float result = 0.0f;
  for (int w = 0; w < WARPS; ++w) {
    const float part = metal::exp2(warp_max[w][g] - highest);
    total += warp_sum[w][g] * part;
    result += warp_acc[w][g][d] * part;
  }
  if (SPLIT) {
    out[(size_t(item) * heads + head + g) * D + d] = OUT(result);
    if (d == 0) {
      stats[(item * heads + head + g) * 2] = highest;
      stats[(item * heads + head + g) * 2 + 1] = total;
    }
  } else {
    out[(size_t(row) * heads + head + g) * D + d] = OUT(result / total);
  }
}
