// The kernel's source as a shared library, for the contract tests in tests/unit.
#include "sampler_host.h"

namespace {

using sampler_host::BFloat16;
using sampler_host::Inputs;
using sampler_host::Outputs;
using sampler_host::Shape;

template <typename T>
void run_with(int threads, const void* logits, Shape shape, Inputs in, Shape state, Shape mask,
              Outputs out) {
  const auto* values = static_cast<const T*>(logits);
  switch (threads) {
    case 1: return sampler_host::run<T, 1>(values, shape, in, state, mask, out);
    case 2: return sampler_host::run<T, 2>(values, shape, in, state, mask, out);
    default: return sampler_host::run<T, 8>(values, shape, in, state, mask, out);
  }
}

}  // namespace

// `shapes`: rows and vocabulary, columns of `state`, words of a mask's row.
extern "C" void sampler_host_run(int threads, int is_bfloat16, const void* logits,
                                 const std::size_t* shapes, Inputs in, Outputs out) {
  const Shape shape{{shapes[0], shapes[1]}};
  const Shape state{{shapes[0], shapes[2]}};
  const Shape mask{{shapes[0], shapes[3]}};
  if (is_bfloat16 != 0) {
    run_with<BFloat16>(threads, logits, shape, in, state, mask, out);
  } else {
    run_with<float>(threads, logits, shape, in, state, mask, out);
  }
}
