// Stores the keys and values of a step's own tokens in a paged KV cache: the body of a CUDA kernel.
// attention.cu stores them itself, unless rows attend to what other rows of the step store.
//
// Inputs: keys and values T [B, KVH, 1, D], key_pool and value_pool [blocks, KVH, BLOCK, D], table
// int32 [B, table width], lengths int32 [B]: each row's place.
// Constants: T, D, BLOCK. Output: done int32 [1], 0: what must come after waits for it.
//
// Writes to its inputs, the pools, as attention.cu does.

const int row = blockIdx.z;
const int head = blockIdx.y;
const int heads = gridDim.y;
const int length = lengths[row];
const int block = table[row * table_shape[1] + length / BLOCK];
const size_t from = (size_t(row) * heads + head) * D;
const size_t to = ((size_t(block) * heads + head) * BLOCK + length % BLOCK) * D;
for (int d = threadIdx.x; d < D; d += blockDim.x) {
  const_cast<T*>(key_pool)[to + d] = keys[from + d];
  const_cast<T*>(value_pool)[to + d] = values[from + d];
}
if (row == 0 && head == 0 && threadIdx.x == 0) {
  done[0] = 0;
}
