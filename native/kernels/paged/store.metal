// Copies prefilled keys and values into the blocks of a paged KV cache; as store.cu.

const int entry = threadgroup_position_in_grid.z;
const int head = threadgroup_position_in_grid.y;
const int heads = threadgroups_per_grid.y;
const int block = entries[4 * entry];
const int prompt = entries[4 * entry + 1];
const int first = entries[4 * entry + 2];
const int count = entries[4 * entry + 3];
const int thread_index = thread_position_in_threadgroup.x;
const size_t from = ((size_t(prompt) * heads + head) * keys_shape[2] + first) * D;
const size_t to = (size_t(block) * heads + head) * BLOCK * D;
for (int i = thread_index; i < count * D; i += threads_per_threadgroup.x) {
  ((device T*)key_pool)[to + i] = keys[from + i];
  ((device T*)value_pool)[to + i] = values[from + i];
}
if (entry == 0 && head == 0 && thread_index == 0) {
  done[0] = after[0];
}
