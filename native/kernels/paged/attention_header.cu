// PART elements that a thread loads at once, as wide as their size allows.
template <int SIZE>
constexpr int widest_load = SIZE % 16 == 0 ? 16 : SIZE % 8 == 0 ? 8 : SIZE % 4 == 0 ? 4 : 2;

template <typename T, int N>
struct alignas(widest_load<N * sizeof(T)>) Part {
  T value[N];
};

template <typename T, int N>
__device__ inline Part<T, N> load_part(const T* from) {
  return *reinterpret_cast<const Part<T, N>*>(from);
}
