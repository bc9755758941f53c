// Attention of one decode step over a paged KV cache: the body of a CUDA kernel, to which
// mx.fast.cuda_kernel adds the signature. attention.metal is the same algorithm.
//
// Flash-decoding (Dao et al., 2023) over a block table (Kwon et al., 2023): a thread block takes
// one work item, that is tokens [start, stop) of one row, for GROUP query heads of one KV head. A
// team of LANES threads holds one token's head, TEAMS teams take tokens in turn, each with its own
// running maximum and sum (Milakov and Gimelshein, 2018); they are merged at the end. Products
// and sums are float32.
//
// Inputs: q [B, H, 1, D], k and v [B, KVH, 1, D] of the step's own token, key_pool and value_pool
// [blocks, KVH, BLOCK, D], table int32 [B, table width], lengths int32 [B] (tokens before this
// one), work int32 [W, 3] (row or -1, start, stop), scale float32 [1], after (unread: comes first).
// Constants: T, D, GROUP, TILES (tiles of GROUP heads in a KV head), BLOCK, LANES, SPLIT, STORE, OUT
// (the type of out).
// Outputs: SPLIT false: out T [B, H, 1, D]; every row has one item. SPLIT true: out float32
// [W, H, D], not yet divided, and stats float32 [W, H, 2] (maximum, sum), for the second kernel.
//
// STORE: the step's own k and v are written to the pools here: MLX knows the pools as inputs
// only. That is safe because no other read in the step touches that place, and because each layer of
// the next step depends on this one's output.

constexpr int THREADS = 128;
constexpr int TEAMS = THREADS / LANES;
constexpr int WARPS = THREADS / 32;
constexpr int PART = D / LANES;  // elements of a head that a thread holds
constexpr int UNROLL = 4;        // tokens a team has in flight
constexpr float NONE = -1e30f;   // below every score; finite, so that NONE - NONE is 0

__shared__ float warp_max[WARPS][GROUP];
__shared__ float warp_sum[WARPS][GROUP];
__shared__ float warp_acc[WARPS][GROUP][D];

const int item = blockIdx.z;
const int row = work[3 * item];
if (row < 0) {
  return;
}
const int heads_kv = gridDim.y / TILES;
const int head_kv = blockIdx.y / TILES;
const int head = blockIdx.y * GROUP;  // the first of this thread block's query heads
const int heads = gridDim.y * GROUP;
const int thread = threadIdx.x;
const int lane = thread % LANES;
const int team = thread / LANES;
const int length = lengths[row];
const int start = work[3 * item + 1];
const int stop = min(work[3 * item + 2], length + 1);
const int* blocks = table + row * table_shape[1];

const T* own_key = k + (row * heads_kv + head_kv) * D;
const T* own_value = v + (row * heads_kv + head_kv) * D;
if (STORE && stop == length + 1 && start < stop && blockIdx.y % TILES == 0) {
  const size_t place =
      ((size_t(blocks[length / BLOCK]) * heads_kv + head_kv) * BLOCK + length % BLOCK) * D;
  for (int d = thread; d < D; d += THREADS) {
    const_cast<T*>(key_pool)[place + d] = own_key[d];
    const_cast<T*>(value_pool)[place + d] = own_value[d];
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
  const T* q_head = q + (size_t(row) * heads + head + g) * D + lane * PART;
  for (int e = 0; e < PART; ++e) {
    query[g][e] = float(q_head[e]) * factor;
    acc[g][e] = 0.0f;
  }
}

for (int base = start; base < stop; base += TEAMS * UNROLL) {
  const T* values[UNROLL];
  float score[UNROLL][GROUP];
#pragma unroll
  for (int u = 0; u < UNROLL; ++u) {
    const int token = min(base + u * TEAMS + team, stop - 1);
    const T* key = own_key;
    values[u] = own_value;
    if (token != length) {
      const size_t place =
          ((size_t(blocks[token / BLOCK]) * heads_kv + head_kv) * BLOCK + token % BLOCK) * D;
      key = key_pool + place;
      values[u] = value_pool + place;
    }
    Part<T, PART> part = load_part<T, PART>(key + lane * PART);
    for (int g = 0; g < GROUP; ++g) {
      score[u][g] = 0.0f;
      for (int e = 0; e < PART; ++e) {
        score[u][g] += query[g][e] * float(part.value[e]);
      }
    }
  }
#pragma unroll
  for (int u = 0; u < UNROLL; ++u) {
    const bool present = base + u * TEAMS + team < stop;
    for (int g = 0; g < GROUP; ++g) {
      for (int offset = LANES / 2; offset > 0; offset /= 2) {
        score[u][g] += __shfl_xor_sync(0xffffffffu, score[u][g], offset);
      }
      score[u][g] = present ? score[u][g] : NONE;
    }
  }
  for (int g = 0; g < GROUP; ++g) {
    float highest = top[g];
    for (int u = 0; u < UNROLL; ++u) {
      highest = fmaxf(highest, score[u][g]);
    }
    const float shrink = exp2f(top[g] - highest);
    top[g] = highest;
    sum[g] *= shrink;
    for (int e = 0; e < PART; ++e) {
      acc[g][e] *= shrink;
    }
  }
#pragma unroll
  for (int u = 0; u < UNROLL; ++u) {
    const bool present = base + u * TEAMS + team < stop;
    Part<T, PART> part = load_part<T, PART>(values[u] + lane * PART);
    for (int g = 0; g < GROUP; ++g) {
      const float weight = present ? exp2f(score[u][g] - top[g]) : 0.0f;
      sum[g] += weight;
      for (int e = 0; e < PART; ++e) {
        acc[g][e] += weight * float(part.value[e]);
      }
    }
  }
}

// Teams of one warp, then warps.
for (int g = 0; g < GROUP; ++g) {
  for (int offset = LANES; offset < 32; offset *= 2) {
    const float other = __shfl_xor_sync(0xffffffffu, top[g], offset);
    const float highest = fmaxf(top[g], other);
    const float mine = exp2f(top[g] - highest);
    const float theirs = exp2f(other - highest);
    sum[g] = sum[g] * mine + __shfl_xor_sync(0xffffffffu, sum[g], offset) * theirs;
    for (int e = 0; e < PART; ++e) {
      acc[g][e] = acc[g][e] * mine + __shfl_xor_sync(0xffffffffu, acc[g][e], offset) * theirs;
    }
    top[g] = highest;
  }
  if (thread % 32 < LANES) {
    for (int e = 0; e < PART; ++e) {
      warp_acc[thread / 32][g][lane * PART + e] = acc[g][e];
    }
    if (lane == 0) {
      warp_max[thread / 32][g] = top[g];
      warp_sum[thread / 32][g] = sum[g];
    }
  }
}
__syncthreads();
for (int index = thread; index < GROUP * D; index += THREADS) {
  const int g = index / D;
  const int d = index % D;
  float highest = NONE;
  for (int w = 0; w < WARPS; ++w) {
    highest = fmaxf(highest, warp_max[w][g]);
  }
  float total = 0.0f;
  float result = 0.0f;
  for (int w = 0; w < WARPS; ++w) {
    const float part = exp2f(warp_max[w][g] - highest);
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
