// Copies prefilled keys and values into the blocks of a paged KV cache: the body of a CUDA kernel.
//
// Inputs: keys and values T [P, KVH, S, D] of P prompts, key_pool and value_pool
// [blocks, KVH, BLOCK, D], entries int32 [E, 4]: (block, prompt, first token, number of tokens),
// after int32 [1], 0: made by what must come first.
// Constants: T, D, BLOCK. Output: done int32 [1], 0: what must come after waits for it.
//
// Writes to its inputs, the pools, as attention.cu does, and to free blocks only.

const int entry = blockIdx.z;
const int head = blockIdx.y;
const int heads = gridDim.y;
const int block = entries[4 * entry];
const int prompt = entries[4 * entry + 1];
const int first = entries[4 * entry + 2];
const int count = entries[4 * entry + 3];
const size_t from = ((size_t(prompt) * heads + head) * keys_shape[2] + first) * D;
const size_t to = (size_t(block) * heads + head) * BLOCK * D;
for (int i = threadIdx.x; i < count * D; i += blockDim.x) {
  const_cast<T*>(key_pool)[to + i] = keys[from + i];
  const_cast<T*>(value_pool)[to + i] = values[from + i];
}
if (entry == 0 && head == 0 && threadIdx.x == 0) {
  done[0] = after[0];
}
