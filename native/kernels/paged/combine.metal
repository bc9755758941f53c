// Joins the parts that attention.metal made of each row; as combine.cu.

const int head = threadgroup_position_in_grid.y;
const int heads = threadgroups_per_grid.y;
const int row = threadgroup_position_in_grid.z;
const int first = firsts[row];
const int last = firsts[row + 1];
float highest = -1e30f;
for (int item = first; item < last; ++item) {
  highest = metal::max(highest, stats[(item * heads + head) * 2]);
}
const int d = thread_position_in_threadgroup.x;
float total = 0.0f;
float result = 0.0f;
for (int item = first; item < last; ++item) {
  const float part = metal::exp2(stats[(item * heads + head) * 2] - highest);
  total += stats[(item * heads + head) * 2 + 1] * part;
  result += parts[(size_t(item) * heads + head) * D + d] * part;
}
out[(size_t(row) * heads + head) * D + d] = T(result / total);
