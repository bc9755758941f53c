// Joins the parts that attention.cu made of each row: the body of a CUDA kernel.
//
// Inputs: parts float32 [W, H, D], stats float32 [W, H, 2], firsts int32 [B + 1]: row r has the
// items [firsts[r], firsts[r + 1]). Constants: T, D. Output: out T [B, H, 1, D].

const int head = blockIdx.y;
const int heads = gridDim.y;
const int row = blockIdx.z;
const int first = firsts[row];
const int last = firsts[row + 1];
float highest = -1e30f;
for (int item = first; item < last; ++item) {
  highest = fmaxf(highest, stats[(item * heads + head) * 2]);
}
const int d = threadIdx.x;
float total = 0.0f;
float result = 0.0f;
for (int item = first; item < last; ++item) {
  const float part = exp2f(stats[(item * heads + head) * 2] - highest);
  total += stats[(item * heads + head) * 2 + 1] * part;
  result += parts[(size_t(item) * heads + head) * D + d] * part;
}
out[(size_t(row) * heads + head) * D + d] = T(result / total);
