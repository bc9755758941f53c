// The CUDA dialect of sampler.h, for mx.fast.cuda_kernel.
#pragma once

#define MLXS_FUNCTION __device__ inline
#define MLXS_CONSTANT
#define MLXS_THREAD
#define MLXS_DEVICE
#define MLXS_SHARED

#define MLXS_BARRIER_TYPE int  // the hardware's own needs no handle
#define MLXS_BARRIER(group) __syncthreads()

#define MLXS_FLOAT_BITS(value) __float_as_uint(value)
#define MLXS_BITS_FLOAT(bits) __uint_as_float(bits)
#define MLXS_EXP(x) expf(x)
#define MLXS_LOG(x) logf(x)
#define MLXS_LOG1P(x) log1pf(x)
#define MLXS_MULTIPLY(x, y) __fmul_rn(x, y)  // never fused with an addition: the reference isn't

#define MLXS_ATOMIC_ADD(pointer, value) atomicAdd(pointer, value)
#define MLXS_ATOMIC_OR(pointer, value) atomicOr(pointer, value)
#define MLXS_LOAD(pointer) (*(pointer))
#define MLXS_STORE(pointer, value) (*(pointer) = (value))
