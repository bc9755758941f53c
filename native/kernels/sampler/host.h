// The host dialect of sampler.h: the kernel's own source on the CPU. A group of one thread is how
// the CPU backend samples; larger groups let tests run the algorithm as a GPU does.
#pragma once

#include <atomic>
#include <barrier>
#include <bit>
#include <cmath>
#include <cstddef>

#define MLXS_FUNCTION inline
#define MLXS_CONSTANT
#define MLXS_THREAD
#define MLXS_DEVICE
#define MLXS_SHARED

#define MLXS_BARRIER_TYPE std::barrier<>*  // none for a group of one
#define MLXS_BARRIER(group) \
  if ((group).barrier != nullptr) (group).barrier->arrive_and_wait()

#define MLXS_FLOAT_BITS(value) std::bit_cast<unsigned int>(value)
#define MLXS_BITS_FLOAT(bits) std::bit_cast<float>(static_cast<unsigned int>(bits))
#define MLXS_EXP(x) std::exp(x)
#define MLXS_LOG(x) std::log(x)
#define MLXS_LOG1P(x) std::log1p(x)
#define MLXS_MULTIPLY(x, y) ((x) * (y))  // compiled with -ffp-contract=off

#define MLXS_ATOMIC_ADD(pointer, value) std::atomic_ref(*(pointer)).fetch_add(value)
#define MLXS_ATOMIC_OR(pointer, value) std::atomic_ref(*(pointer)).fetch_or(value)
#define MLXS_LOAD(pointer) (*(pointer))
#define MLXS_STORE(pointer, value) (*(pointer) = (value))

#include "sampler.h"
