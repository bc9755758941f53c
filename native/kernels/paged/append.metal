// Stores the keys and values of a step's own tokens in a paged KV cache; as append.cu.

const int row = threadgroup_position_in_grid.z;
const int head = threadgroup_position_in_grid.y;
const int heads = threadgroups_per_grid.y;
const int length = lengths[row];
const int block = table[row * table_shape[1] + length / BLOCK];
const int thread_index = thread_position_in_threadgroup.x;
const size_t from = (size_t(row) * heads + head) * D;
const size_t to = ((size_t(block) * heads + head) * BLOCK + length % BLOCK) * D;
for (int d = thread_index; d < D; d += threads_per_threadgroup.x) {
  ((device T*)key_pool)[to + d] = keys[from + d];
  ((device T*)value_pool)[to + d] = values[from + d];
}
if (row == 0 && head == 0 && thread_index == 0) {
  done[0] = 0;
}
