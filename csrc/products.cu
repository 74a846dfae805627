#include "products.cuh"

namespace polyfusion {
namespace {

constexpr int sum_threads = 256;

template <class Math>
__global__ void __launch_bounds__(threads, 2) products_kernel(const __grid_constant__ ProductList list) {
  using T = typename Math::Element;
  DYNAMIC_SHARED(shared);
  int block = blockIdx.x, i = 0;
  for (;; ++i) {
    const Product& p = list.item[i];
    const int blocks = divide_up(p.rows, tile_rows) * divide_up(p.columns, tile_columns) *
                       p.splits * p.batches;
    if (block < blocks) break;
    block -= blocks;
  }
  const Product& p = list.item[i];
  const int across = divide_up(p.columns, tile_columns), down = divide_up(p.rows, tile_rows);
  const int column0 = block % across * tile_columns;
  const int row0 = block / across % down * tile_rows;
  const int split = block / (across * down) % p.splits;
  const int batch = block / (across * down * p.splits);
  const int step = round_up(divide_up(p.depth, p.splits), tile_depth<T>);
  const int begin = split * step, end = min(begin + step, p.depth);

  Sums<Math> sums;
  for (int t = 0; t < p.terms; ++t) {
    const Matrix &x = p.a[t], &y = p.b[t];
    const Matrix a = matrix(offset(x.data, batch * p.batch_a, sizeof(T)), x.stride, x.rows,
                            x.columns, sizeof(T), x.ones);
    const Matrix b = matrix(offset(y.data, batch * p.batch_b, sizeof(T)), y.stride, y.rows,
                            y.columns, sizeof(T), y.ones);
    const Left<Math, false> rows(a, row0);
    const Right<Math, false> columns(b, column0);
    if (p.transposed_a)
      multiply<Math, true, false>(sums, Left<Math, true>(a, row0), columns, begin, end, shared);
    else if (p.transposed_b)
      multiply<Math, false, true>(sums, rows, Right<Math, true>(b, column0), begin, end, shared);
    else
      multiply<Math, false, false>(sums, rows, columns, begin, end, shared);
  }
  float value[tile_values];
  spread<Math>(sums, reinterpret_cast<float*>(shared), value);
  const int64_t size = static_cast<int64_t>(p.rows) * p.columns;
#pragma unroll
  for (int j = 0; j < tile_values; ++j) {
    const int row = row0 + value_row(j), column = column0 + value_column(j);
    if (row >= p.rows || column >= p.columns) continue;
    const int64_t at = batch * size + static_cast<int64_t>(row) * p.columns + column;
    if (p.splits > 1)
      p.partial[split * p.batches * size + at] = value[j];
    else
      static_cast<T*>(p.result)[at] = from_float<T>(value[j]);
  }
}

__host__ __device__ inline int64_t sum_blocks(const Sum& s) {
  return (s.outer * s.inner + sum_threads - 1) / sum_threads;
}

template <class T>
__global__ void __launch_bounds__(sum_threads) sums_kernel(const __grid_constant__ SumList list) {
  int64_t block = blockIdx.x;
  int i = 0;
  for (; block >= sum_blocks(list.item[i]); ++i) block -= sum_blocks(list.item[i]);
  const Sum& s = list.item[i];
  const int64_t at = block * sum_threads + threadIdx.x;
  if (at >= s.outer * s.inner) return;
  const float* from = s.partial + at / s.inner * s.count * s.inner + at % s.inner;
  float sum = 0;
  for (int k = 0; k < s.count; ++k) sum += from[k * s.inner];
  static_cast<T*>(s.result)[at] = from_float<T>(sum);
}

}  // namespace

void Batch::add(Product p) {
  if (p.rows == 0 || p.columns == 0 || p.batches == 0 || p.result == nullptr) {
    if (!workspace_.counting()) return;
  }
  const int depth = 128 / static_cast<int>(size_of(type_));
  const int64_t tiles = static_cast<int64_t>(divide_up(p.rows, tile_rows)) *
                        divide_up(p.columns, tile_columns) * p.batches;
  const int64_t fill = tiles > 0 ? 4 * multiprocessors / tiles : 0;
  const int64_t wanted = fill < 1 ? 1 : fill;
  const int steps = divide_up(p.depth, 4 * depth);
  p.splits = steps < 1 ? 1 : steps < wanted ? steps : static_cast<int>(wanted);
  if (p.splits > 1) {
    const int64_t size = static_cast<int64_t>(p.batches) * p.rows * p.columns;
    p.partial = static_cast<float*>(workspace_.take(p.splits * size, sizeof(float)));
    add(Sum{p.partial, p.result, 1, size, p.splits});
  }
  products_.item[products_.count++] = p;
}

Error Batch::run(Stream stream) const {
  if (workspace_.counting()) return cudaSuccess;
  const auto queue = static_cast<cudaStream_t>(stream);
  int64_t blocks = 0;
  for (int i = 0; i < products_.count; ++i) {
    const Product& p = products_.item[i];
    blocks += static_cast<int64_t>(divide_up(p.rows, tile_rows)) *
              divide_up(p.columns, tile_columns) * p.splits * p.batches;
  }
  if (blocks > 0) {
    const Error error = dispatch(type_, [&](auto math) -> Error {
      using Math = decltype(math);
      return launch(products_kernel<Math>, dim3(static_cast<unsigned>(blocks)), threads,
                    operand_bytes<Math>(), queue, products_);
    });
    if (error != cudaSuccess) return error;
  }
  blocks = 0;
  for (int i = 0; i < sums_.count; ++i) blocks += sum_blocks(sums_.item[i]);
  if (blocks == 0) return cudaSuccess;
  return dispatch(type_, [&](auto math) -> Error {
    using T = typename decltype(math)::Element;
    return launch(sums_kernel<T>, dim3(static_cast<unsigned>(blocks)), sum_threads, 0, queue, sums_);
  });
}

}  // namespace polyfusion
