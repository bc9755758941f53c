// The Metal dialect of sampler.h, for mx.fast.metal_kernel. Never run by its authors: the
// self-check at start decides whether a Mac uses it.
#pragma once

#define MLXS_FUNCTION inline
#define MLXS_CONSTANT constant
#define MLXS_THREAD thread
#define MLXS_DEVICE device
#define MLXS_SHARED threadgroup

#define MLXS_BARRIER_TYPE int  // the hardware's own needs no handle
#define MLXS_BARRIER(group) \
  metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup | metal::mem_flags::mem_device)

#define MLXS_FLOAT_BITS(value) as_type<unsigned int>(value)
#define MLXS_BITS_FLOAT(bits) as_type<float>((unsigned int)(bits))
#define MLXS_EXP(x) metal::precise::exp(x)
#define MLXS_LOG(x) metal::precise::log(x)
#define MLXS_LOG1P(x) mlx_serving_sampler::log1p_of(x)
#define MLXS_MULTIPLY(x, y) ((x) * (y))

#define MLXS_ATOMIC(pointer) ((volatile device metal::atomic_uint*)(pointer))
#define MLXS_ATOMIC_ADD(pointer, value) \
  metal::atomic_fetch_add_explicit(MLXS_ATOMIC(pointer), value, metal::memory_order_relaxed)
#define MLXS_ATOMIC_OR(pointer, value) \
  metal::atomic_fetch_or_explicit(MLXS_ATOMIC(pointer), value, metal::memory_order_relaxed)
#define MLXS_LOAD(pointer) \
  metal::atomic_load_explicit(MLXS_ATOMIC(pointer), metal::memory_order_relaxed)
#define MLXS_STORE(pointer, value) \
  metal::atomic_store_explicit(MLXS_ATOMIC(pointer), value, metal::memory_order_relaxed)

namespace mlx_serving_sampler {

// log(1 + x), which Metal lacks. Source: Goldberg, "What every computer scientist should know
// about floating-point arithmetic" (1991), theorem 4.
inline float log1p_of(float x) {
  const float sum = 1.0f + x;
  return sum == 1.0f ? x : x * metal::precise::log(sum) / (sum - 1.0f);
}

}  // namespace mlx_serving_sampler
