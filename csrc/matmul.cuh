// Block-wide matrix products: 32 x 64 results for 4 warps, operands staged through shared memory.
//
// Math says how: on tensor cores (__half, __nv_bfloat16, TensorFloat32) or in plain fp32 (Ieee). Sums
// are fp32 always.
#pragma once

#include "common.cuh"
#include "kernels.h"

namespace polyfusion {

// A row-major matrix; one column of ones is appended if `ones`. `aligned`: rows start at multiples of
// 16 bytes.
struct Matrix {
  const void* data;
  int64_t stride;
  int rows, columns;
  bool ones, aligned;
};

__host__ __device__ inline Matrix matrix(const void* data, int64_t stride, int rows, int columns,
                                         size_t size, bool ones = false) {
  const bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * size % 16 == 0;
  return {data, stride, rows, columns, ones, aligned};
}

// Offset by a number of elements, 64 bits wide.
__host__ __device__ inline const void* offset(const void* data, int64_t elements, size_t size) {
  return static_cast<const unsigned char*>(data) + elements * static_cast<int64_t>(size);
}

constexpr int threads = 128;
constexpr int tile_rows = 32, tile_columns = 64;
constexpr int tile_stride = tile_columns + 4;                    // of a tile of fp32 results
constexpr int tile_values = tile_rows * tile_columns / threads;  // results for each thread

template <class T>
struct TensorCores {
  using Element = T;
  using Operand = T;
  static constexpr int depth = 16;  // of one instruction
  static __device__ T staged(T x) { return x; }
};
struct TensorFloat32 {
  using Element = float;
  using Operand = nvcuda::wmma::precision::tf32;
  static constexpr int depth = 8;
  static __device__ float staged(float x) { return nvcuda::wmma::__float_to_tf32(x); }
};
struct Ieee {
  using Element = float;
  static __device__ float staged(float x) { return x; }
};

template <bool yes, class A, class B>
struct Choose {
  using type = A;
};
template <class A, class B>
struct Choose<false, A, B> {
  using type = B;
};

// 16 x (16 N) sums of one warp.
template <class Math, int N>
class WarpTile {
  using T = typename Math::Element;
  nvcuda::wmma::fragment<nvcuda::wmma::accumulator, 16, 16, Math::depth, float> sum_[N];

 public:
  __device__ WarpTile() {
#pragma unroll
    for (int n = 0; n < N; ++n) nvcuda::wmma::fill_fragment(sum_[n], 0.0f);
  }

  // Add A B over 16 terms, with A(i, k) at a[i * lda + k], or a[k * lda + i] if transposed, and B
  // (k, j) at b[k * ldb + j], or b[j * ldb + k] if transposed.
  template <bool transposed_a, bool transposed_b>
  __device__ void multiply(const T* a, int lda, const T* b, int ldb) {
    using namespace nvcuda::wmma;
    using Operand = typename Math::Operand;
    using LayoutA = typename Choose<transposed_a, col_major, row_major>::type;
    using LayoutB = typename Choose<transposed_b, col_major, row_major>::type;
#pragma unroll
    for (int k = 0; k < 16; k += Math::depth) {
      fragment<matrix_a, 16, 16, Math::depth, Operand, LayoutA> left;
      load_matrix_sync(left, a + (transposed_a ? k * lda : k), lda);
#pragma unroll
      for (int n = 0; n < N; ++n) {
        fragment<matrix_b, 16, 16, Math::depth, Operand, LayoutB> right;
        load_matrix_sync(right, b + (transposed_b ? n * 16 * ldb + k : k * ldb + n * 16), ldb);
        mma_sync(sum_[n], left, right, sum_[n]);
      }
    }
  }

  __device__ void store(float* c, int ldc) const {
#pragma unroll
    for (int n = 0; n < N; ++n)
      nvcuda::wmma::store_matrix_sync(c + n * 16, sum_[n], ldc, nvcuda::wmma::mem_row_major);
  }
};

// The same in plain fp32: each lane has 2 x 4 of every 16 x 16 sums.
template <int N>
class WarpTile<Ieee, N> {
  float sum_[N][2][4] = {};

  static __device__ int row() { return threadIdx.x % 32 / 4 * 2; }
  static __device__ int column() { return threadIdx.x % 4 * 4; }

 public:
  template <bool transposed_a, bool transposed_b>
  __device__ void multiply(const float* a, int lda, const float* b, int ldb) {
#pragma unroll 4
    for (int k = 0; k < 16; ++k) {
      float left[2];
#pragma unroll
      for (int i = 0; i < 2; ++i)
        left[i] = transposed_a ? a[k * lda + row() + i] : a[(row() + i) * lda + k];
#pragma unroll
      for (int n = 0; n < N; ++n)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int c = n * 16 + column() + j;
          const float right = transposed_b ? b[c * ldb + k] : b[k * ldb + c];
#pragma unroll
          for (int i = 0; i < 2; ++i) sum_[n][i][j] += left[i] * right;
        }
    }
  }

  __device__ void store(float* c, int ldc) const {
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) c[(row() + i) * ldc + n * 16 + column() + j] = sum_[n][i][j];
  }
};

template <class T>
constexpr int vector_size = 16 / sizeof(T);
template <class T>
constexpr int tile_depth = 128 / sizeof(T);  // terms staged at a time

// One thread's share of a rows x columns tile of a matrix, on its way to shared memory.
template <class Math, int rows, int columns>
class Staged {
  using T = typename Math::Element;
  static constexpr int n = vector_size<T>;
  static constexpr int count = rows * columns / n / threads;
  union Vector {
    uint4 raw;
    T item[n];
    __device__ Vector() {}
  } vector_[count];

 public:
  static constexpr int stride = columns + n;
  static constexpr int size = rows * stride;

  // Elements outside the matrix are 0, those of its appended column are 1.
  __device__ void load(const Matrix& m, int row0, int column0, int end_row, int end_column) {
    const T* data = static_cast<const T*>(m.data);
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const int index = i * threads + threadIdx.x;
      const int row = row0 + index / (columns / n), column = column0 + index % (columns / n) * n;
      const T* from = data + row * m.stride + column;
      if (m.aligned && row < end_row && column + n <= min(m.columns, end_column)) {
        vector_[i].raw = *reinterpret_cast<const uint4*>(from);
        continue;
      }
#pragma unroll
      for (int j = 0; j < n; ++j) {
        const bool inside = row < end_row && column + j < end_column;
        T value = from_float<T>(0.0f);
        if (inside) value = column + j < m.columns ? from[j] : from_float<T>(1.0f);
        vector_[i].item[j] = value;
      }
    }
  }

  __device__ void store(T* tile) {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const int index = i * threads + threadIdx.x;
#pragma unroll
      for (int j = 0; j < n; ++j) vector_[i].item[j] = Math::staged(vector_[i].item[j]);
      T* to = tile + index / (columns / n) * stride + index % (columns / n) * n;
      *reinterpret_cast<uint4*>(to) = vector_[i].raw;
    }
  }
};

// The left operand, 32 rows of a matrix, or 32 columns of it if transposed.
template <class Math, bool transposed>
class Left {
  using T = typename Math::Element;
  static constexpr int depth = tile_depth<T>;
  Staged<Math, transposed ? depth : tile_rows, transposed ? tile_rows : depth> staged_;
  const Matrix& matrix_;
  int first_;

 public:
  static constexpr int size = decltype(staged_)::size;
  static constexpr int stride = decltype(staged_)::stride;
  __device__ Left(const Matrix& matrix, int first) : matrix_(matrix), first_(first) {}
  __device__ void load(int k, int end) {
    if constexpr (transposed)
      staged_.load(matrix_, k, first_, end, matrix_.columns + matrix_.ones);
    else
      staged_.load(matrix_, first_, k, matrix_.rows, end);
  }
  __device__ void store(T* tile) { staged_.store(tile); }
  static __device__ const T* at(const T* tile, int, int row, int k) {
    return tile + (transposed ? k * stride + row : row * stride + k);
  }
};

// The left operand in shared memory already, zero beyond its depth.
template <class Math>
class Resident {
  using T = typename Math::Element;
  const T* tile_;

 public:
  static constexpr int size = 0;
  const int stride;
  __device__ Resident(const T* tile, int stride) : tile_(tile), stride(stride) {}
  __device__ void load(int, int) {}
  __device__ void store(T*) {}
  __device__ const T* at(const T*, int k0, int row, int k) const {
    return tile_ + row * stride + k0 + k;
  }
};

// The right operand, 64 columns of a matrix, or 64 rows of it if transposed.
template <class Math, bool transposed>
class Right {
  using T = typename Math::Element;
  static constexpr int depth = tile_depth<T>;
  Staged<Math, transposed ? tile_columns : depth, transposed ? depth : tile_columns> staged_;
  const Matrix& matrix_;
  int first_;

 public:
  static constexpr int size = decltype(staged_)::size;
  static constexpr int stride = decltype(staged_)::stride;
  __device__ Right(const Matrix& matrix, int first) : matrix_(matrix), first_(first) {}
  __device__ void load(int k, int end) {
    if constexpr (transposed)
      staged_.load(matrix_, first_, k, matrix_.rows, end);
    else
      staged_.load(matrix_, k, first_, end, matrix_.columns + matrix_.ones);
  }
  __device__ void store(T* tile) { staged_.store(tile); }
  static __device__ const T* at(const T* tile, int column, int k) {
    return tile + (transposed ? column * stride + k : k * stride + column);
  }
};

// Shared memory for the operands of a product in any layout, and for its results as fp32.
template <class Math>
__host__ __device__ constexpr size_t operand_bytes() {
  using T = typename Math::Element;
  constexpr int left = Left<Math, false>::size > Left<Math, true>::size ? Left<Math, false>::size
                                                                       : Left<Math, true>::size;
  constexpr int right = Right<Math, false>::size > Right<Math, true>::size
                            ? Right<Math, false>::size
                            : Right<Math, true>::size;
  return 2 * (left + right) * sizeof(T);
}

template <class Math>
using Sums = WarpTile<Math, 2>;

// Call f with the Math for a type.
template <class F>
Error dispatch(Type type, F f) {
  switch (type) {
    case Type::float32: return f(Ieee{});
    case Type::tensor_float32: return f(TensorFloat32{});
    case Type::float16: return f(TensorCores<__half>{});
    case Type::bfloat16: return f(TensorCores<__nv_bfloat16>{});
  }
  return f(Ieee{});
}

__device__ inline int warp_row() { return threadIdx.x / 64 * 16; }
__device__ inline int warp_column() { return threadIdx.x / 32 % 2 * 32; }

// Add the terms [begin, end) of left x right. Tiles are double-buffered: while one is multiplied the
// next is on its way. `shared` is free for other use before and after.
template <class Math, bool transposed_a, bool transposed_b, class LeftOperand>
__device__ void multiply(Sums<Math>& sums, LeftOperand left, Right<Math, transposed_b> right,
                         int begin, int end, unsigned char* shared) {
  using T = typename Math::Element;
  constexpr int depth = tile_depth<T>;
  constexpr int size = LeftOperand::size + Right<Math, transposed_b>::size;
  T* tile = reinterpret_cast<T*>(shared);
  if (begin >= end) return;
  left.load(begin, end);
  right.load(begin, end);
  left.store(tile);
  right.store(tile + LeftOperand::size);
  __syncthreads();
  for (int k0 = begin, parity = 0; k0 < end; k0 += depth, parity ^= 1) {
    const T* now = tile + parity * size;
    T* next = tile + (parity ^ 1) * size;
    const bool more = k0 + depth < end;
    if (more) {
      left.load(k0 + depth, end);
      right.load(k0 + depth, end);
    }
#pragma unroll 1
    for (int k = 0; k < depth; k += 16)
      sums.template multiply<transposed_a, transposed_b>(
          left.at(now, k0, warp_row(), k), left.stride,
          right.at(now + LeftOperand::size, warp_column(), k), right.stride);
    if (more) {
      left.store(next);
      right.store(next + LeftOperand::size);
    }
    __syncthreads();
  }
}

// Thread by thread, the results: value j is at (value_row(j), value_column(j)) of the tile.
__device__ inline int value_row(int j) { return (j * threads + threadIdx.x) / tile_columns; }
__device__ inline int value_column(int j) { return (j * threads + threadIdx.x) % tile_columns; }

template <class Math>
__device__ void spread(const Sums<Math>& sums, float* tile, float (&value)[tile_values]) {
  sums.store(tile + warp_row() * tile_stride + warp_column(), tile_stride);
  __syncthreads();
#pragma unroll
  for (int j = 0; j < tile_values; ++j)
    value[j] = tile[value_row(j) * tile_stride + value_column(j)];
  __syncthreads();
}

}  // namespace polyfusion
