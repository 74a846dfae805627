// CP and both forms of CMF: project, gate, project.
//
// A block works on 32 frames of one clip, so what is constant over the clip is one row for the block:
// it is projected once per block and never repeated over the frames.
#include "hadamard.cuh"

namespace polyfusion {
namespace {

struct Backward {
  Hadamard g;
  const void* dy;
  void* hidden;       // (B, T, k), as are the gradients of p and r
  void* d[2];         // of the projections by first; d[1] only if framed
  void* e[2];         // by second
  float* clip_d;      // (B, tiles, k), sums over the frames of a tile, if not framed
  float* clip_e;
};

// The 32 frames of a clip a block works on.
struct Frames {
  int clip, tile, row0;
  __device__ explicit Frames(const Hadamard& g) {
    const int tiles = divide_up(g.frames, tile_rows);
    clip = blockIdx.x / tiles;
    tile = blockIdx.x % tiles;
    row0 = tile * tile_rows;
  }
};

template <class Math>
__host__ __device__ constexpr int resident_stride(int rank) {
  return round_up(rank, tile_columns) + vector_size<typename Math::Element>;
}

// Columns [k0, k0 + 64) of one view's projection, with its row of biases if `affine`.
template <class Math>
__device__ void project(const Hadamard& g, int view, const void* weights, bool affine,
                        const Frames& at, int k0, unsigned char* shared,
                        float (&value)[tile_values]) {
  using T = typename Math::Element;
  const int d = g.sizes[view];
  const T* weight = static_cast<const T*>(weights);
  float* tile = reinterpret_cast<float*>(shared);
  if (view == 0 || g.framed) {
    const int64_t first = static_cast<int64_t>(at.clip) * g.frames * d;
    const Matrix z = matrix(offset(g.views[view], first, sizeof(T)), d, g.frames, d, sizeof(T));
    const Matrix w = matrix(weight, g.rank, d, g.rank, sizeof(T));
    Sums<Math> sums;
    multiply<Math, false, false>(sums, Left<Math, false>(z, at.row0), Right<Math, false>(w, k0), 0,
                                 d, shared);
    spread<Math>(sums, tile, value);
  } else {
    const T* z = static_cast<const T*>(g.views[view]) + static_cast<int64_t>(at.clip) * d;
    const int column = k0 + threadIdx.x % tile_columns;
    float sum = 0;  // of every other term
    if (column < g.rank)
#pragma unroll 8
      for (int i = threadIdx.x / tile_columns; i < d; i += 2)
        sum += to_float(z[i]) * to_float(weight[static_cast<int64_t>(i) * g.rank + column]);
    tile[threadIdx.x] = sum;
    __syncthreads();
#pragma unroll
    for (int j = 0; j < tile_values; ++j) {
      const int c = value_column(j);
      value[j] = tile[c] + tile[tile_columns + c];
    }
    __syncthreads();
  }
  if (!affine) return;
#pragma unroll
  for (int j = 0; j < tile_values; ++j) {
    const int column = k0 + value_column(j);
    if (column < g.rank) value[j] += to_float(weight[static_cast<int64_t>(d) * g.rank + column]);
  }
}

// Projections of both views for columns [k0, k0 + 64).
template <class Math>
struct Projections {
  float p[tile_values], q[tile_values], r[tile_values], s[tile_values];
  Form form;

  __device__ Projections(const Hadamard& g, const Frames& at, int k0, unsigned char* shared)
      : form(g.form) {
    const bool affine = form == Form::cp;
    project<Math>(g, 0, g.first[0], affine, at, k0, shared, p);
    if (g.views[1] != nullptr) {
      project<Math>(g, 1, g.first[1], affine, at, k0, shared, q);
    } else {
#pragma unroll
      for (int j = 0; j < tile_values; ++j) q[j] = 1;
    }
    if (form == Form::cmf) {
      project<Math>(g, 0, g.second[0], false, at, k0, shared, r);
      project<Math>(g, 1, g.second[1], false, at, k0, shared, s);
    }
  }

  __device__ float hidden(int j) const {
    if (form == Form::cp) return p[j] * q[j];
    return p[j] + q[j] + (form == Form::cmf ? r[j] * s[j] : p[j] * q[j]);
  }
  // d hidden / d p and d hidden / d q
  __device__ float slope_p(int j) const {
    return form == Form::cp ? q[j] : form == Form::cmf_sr ? 1 + q[j] : 1;
  }
  __device__ float slope_q(int j) const {
    return form == Form::cp ? p[j] : form == Form::cmf_sr ? 1 + p[j] : 1;
  }
};

template <class Math>
__host__ __device__ constexpr size_t shared_bytes() {
  constexpr size_t results = tile_rows * tile_stride * sizeof(float);
  return operand_bytes<Math>() > results ? operand_bytes<Math>() : results;
}

template <class Math>
__global__ void __launch_bounds__(threads, 2)
    hadamard_forward_kernel(const __grid_constant__ Forward f) {
  using T = typename Math::Element;
  DYNAMIC_SHARED(shared);
  const Hadamard& g = f.g;
  const Frames at(g);
  float* tile = reinterpret_cast<float*>(shared);
  T* hidden = reinterpret_cast<T*>(shared + shared_bytes<Math>());
  int rank = g.rank, stride = resident_stride<Math>(g.rank);
  // Written by all, then read by a product, which has a barrier before it reads.
  for (int k0 = 0; k0 < rank; k0 += tile_columns) {
    const Projections<Math> x(g, at, k0, shared);
#pragma unroll
    for (int j = 0; j < tile_values; ++j)
      hidden[value_row(j) * stride + k0 + value_column(j)] = Math::staged(from_float<T>(x.hidden(j)));
  }
  float value[tile_values];
  if (f.clip_matrices != nullptr) {
    T* contracted = hidden + tile_rows * stride;
    const int contracted_stride = resident_stride<Math>(f.clip_rank);
    const int64_t first = static_cast<int64_t>(at.clip) * f.clip_rank * rank;
    const Matrix m = matrix(offset(f.clip_matrices, first, sizeof(T)), rank, f.clip_rank, rank,
                            sizeof(T));
    for (int k0 = 0; k0 < f.clip_rank; k0 += tile_columns) {
      Sums<Math> sums;
      multiply<Math, false, true>(sums, Resident<Math>(hidden, stride), Right<Math, true>(m, k0), 0,
                                  rank, shared);
      spread<Math>(sums, tile, value);
#pragma unroll
      for (int j = 0; j < tile_values; ++j)
        contracted[value_row(j) * contracted_stride + k0 + value_column(j)] =
            Math::staged(from_float<T>(value[j]));
    }
    hidden = contracted, stride = contracted_stride, rank = f.clip_rank;
  }

  const int width = g.outputs + g.noise_columns;
  T* y = static_cast<T*>(f.y) + static_cast<int64_t>(at.clip) * g.frames * width;
  const T* bias = static_cast<const T*>(g.bias);
  const Matrix out = matrix(g.out, rank, g.outputs, rank, sizeof(T));
  for (int c0 = blockIdx.z * tile_columns; c0 < g.outputs; c0 += gridDim.z * tile_columns) {
    Sums<Math> sums;
    multiply<Math, false, true>(sums, Resident<Math>(hidden, stride), Right<Math, true>(out, c0), 0,
                                rank, shared);
    spread<Math>(sums, tile, value);
#pragma unroll
    for (int j = 0; j < tile_values; ++j) {
      const int row = at.row0 + value_row(j), column = c0 + value_column(j);
      if (row >= g.frames || column >= g.outputs) continue;
      const float b = bias != nullptr ? to_float(bias[column]) : 0.0f;
      y[static_cast<int64_t>(row) * width + column] = from_float<T>(value[j] + b);
    }
  }
  if (blockIdx.z != 0) return;
  const int rows = min(tile_rows, g.frames - at.row0), n = g.noise_columns;
  for (int i = threadIdx.x; i < rows * n; i += threads) {
    const int64_t row = at.row0 + i / n;
    const T* noise = static_cast<const T*>(f.noise) + static_cast<int64_t>(at.clip) * g.frames * n;
    y[row * width + g.outputs + i % n] = noise[row * n + i % n];
  }
}

// Recomputes the projections of 64 columns; from dy out it has the gradient of the hidden.
template <class Math>
__global__ void __launch_bounds__(threads, 2)
    hadamard_backward_kernel(const __grid_constant__ Backward b) {
  using T = typename Math::Element;
  DYNAMIC_SHARED(shared);
  const Hadamard& g = b.g;
  const Frames at(g);
  float* tile = reinterpret_cast<float*>(shared);
  const int k0 = blockIdx.z * tile_columns, width = g.outputs + g.noise_columns;
  const Projections<Math> x(g, at, k0, shared);
  float gradient[tile_values];
  {
    const int64_t first = static_cast<int64_t>(at.clip) * g.frames * width;
    const Matrix dy = matrix(offset(b.dy, first, sizeof(T)), width, g.frames, g.outputs, sizeof(T));
    const Matrix out = matrix(g.out, g.rank, g.outputs, g.rank, sizeof(T));
    Sums<Math> sums;
    multiply<Math, false, false>(sums, Left<Math, false>(dy, at.row0), Right<Math, false>(out, k0),
                                 0, g.outputs, shared);
    spread<Math>(sums, tile, gradient);
  }
  const auto store = [&](void* to, auto value) {
    T* rows = static_cast<T*>(to) + static_cast<int64_t>(at.clip) * g.frames * g.rank;
#pragma unroll
    for (int j = 0; j < tile_values; ++j) {
      const int row = at.row0 + value_row(j), column = k0 + value_column(j);
      if (row < g.frames && column < g.rank)
        rows[static_cast<int64_t>(row) * g.rank + column] = from_float<T>(value(j));
    }
  };
  // Rows beyond the clip's frames have gradient 0.
  const auto sum_frames = [&](float* to, auto value) {
#pragma unroll
    for (int j = 0; j < tile_values; ++j)
      tile[value_row(j) * tile_stride + value_column(j)] = value(j);
    __syncthreads();
    const int column = threadIdx.x;
    if (column < tile_columns && k0 + column < g.rank) {
      float sum = 0;
      for (int row = 0; row < tile_rows; ++row) sum += tile[row * tile_stride + column];
      to[static_cast<int64_t>(blockIdx.x) * g.rank + k0 + column] = sum;
    }
    __syncthreads();
  };
  const bool cmf = g.form == Form::cmf;
  store(b.hidden, [&](int j) { return x.hidden(j); });
  store(b.d[0], [&](int j) { return gradient[j] * x.slope_p(j); });
  if (cmf) store(b.e[0], [&](int j) { return gradient[j] * x.s[j]; });
  if (g.framed) {
    if (!cmf) store(b.d[1], [&](int j) { return gradient[j] * x.slope_q(j); });
    if (cmf) store(b.e[1], [&](int j) { return gradient[j] * x.r[j]; });
  } else if (g.views[1] != nullptr) {
    sum_frames(b.clip_d, [&](int j) { return gradient[j] * x.slope_q(j); });
    if (cmf) sum_frames(b.clip_e, [&](int j) { return gradient[j] * x.r[j]; });
  }
}

// Gradients of one view and its weights from those of its projections, d and e (rows, k).
void add_view(Batch& batch, const Hadamard& g, int view, int rows, const void* d, const void* e,
              const HadamardGradients& to) {
  const size_t size = size_of(g.type);
  const int n = g.sizes[view], k = g.rank;
  const bool affine = g.form == Form::cp;
  const Matrix z = matrix(g.views[view], n, rows, n, size);
  const Matrix z1 = matrix(g.views[view], n, rows, n, size, affine);
  const Matrix md = matrix(d, k, rows, k, size), me = matrix(e, k, rows, k, size);
  batch.add(product(z1, true, md, false, to.first[view]));
  Product back = product(md, false, matrix(g.first[view], k, n, k, size), true, to.views[view]);
  if (g.form == Form::cmf) {
    batch.add(product(z, true, me, false, to.second[view]));
    back.a[1] = me, back.b[1] = matrix(g.second[view], k, n, k, size), back.terms = 2;
  }
  batch.add(back);
}

Error backward(const Hadamard& g, const void* dy, const HadamardGradients& to, Workspace& workspace,
               Stream stream) {
  const size_t size = size_of(g.type);
  const bool cmf = g.form == Form::cmf, per_clip = !g.framed;
  const int frames = g.clips * g.frames, tiles = divide_up(g.frames, tile_rows);
  const int64_t elements = static_cast<int64_t>(frames) * g.rank;
  const int64_t clip_sums = static_cast<int64_t>(g.clips) * tiles * g.rank;
  const int64_t clip_elements = static_cast<int64_t>(g.clips) * g.rank;

  Backward b{g, dy, {}, {}, {}, nullptr, nullptr};
  b.hidden = workspace.take(elements, size);
  b.d[0] = workspace.take(elements, size);
  b.d[1] = b.d[0];  // CMF: both are the hidden's gradient
  if (cmf) b.e[0] = workspace.take(elements, size);
  if (g.framed && !cmf) b.d[1] = workspace.take(elements, size);
  if (g.framed && cmf) b.e[1] = workspace.take(elements, size);
  if (per_clip) {
    b.clip_d = static_cast<float*>(workspace.take(clip_sums, sizeof(float)));
    b.d[1] = workspace.take(clip_elements, size);
  }
  if (per_clip && cmf) {
    b.clip_e = static_cast<float*>(workspace.take(clip_sums, sizeof(float)));
    b.e[1] = workspace.take(clip_elements, size);
  }
  if (!workspace.counting() && elements > 0) {
    const dim3 grid(static_cast<unsigned>(g.clips * tiles), 1, divide_up(g.rank, tile_columns));
    const Error error = dispatch(g.type, [&](auto math) -> Error {
      using Math = decltype(math);
      return launch(hadamard_backward_kernel<Math>, grid, threads, shared_bytes<Math>(),
                    static_cast<cudaStream_t>(stream), b);
    });
    if (error != cudaSuccess) return error;
  }

  const Matrix gradient = matrix(dy, g.outputs + g.noise_columns, frames, g.outputs, size);
  Batch batch(g.type, workspace);
  batch.add(product(gradient, true, matrix(b.hidden, g.rank, frames, g.rank, size), false, to.out));
  if (g.form != Form::cp)
    batch.add(product(matrix(nullptr, 0, frames, 0, size, true), true, gradient, false, to.bias));
  add_view(batch, g, 0, frames, b.d[0], b.e[0], to);
  if (g.framed) add_view(batch, g, 1, frames, b.d[1], b.e[1], to);
  if (per_clip) batch.add(Sum{b.clip_d, b.d[1], g.clips, g.rank, tiles});
  if (per_clip && cmf) batch.add(Sum{b.clip_e, b.e[1], g.clips, g.rank, tiles});
  const Error error = batch.run(stream);
  if (error != cudaSuccess || g.framed) return error;
  Batch per_clip_batch(g.type, workspace);
  add_view(per_clip_batch, g, 1, g.clips, b.d[1], b.e[1], to);
  return per_clip_batch.run(stream);
}

}  // namespace

Error run_forward(const Forward& f, Stream stream) {
  const Hadamard& g = f.g;
  const int64_t tiles = static_cast<int64_t>(g.clips) * divide_up(g.frames, tile_rows);
  if (tiles == 0 || g.outputs + g.noise_columns == 0) return cudaSuccess;
  // Blocks that share frames repeat their projections, so no more of them than fill the device.
  const int across = divide_up(g.outputs, tile_columns);
  const int64_t fill = 2 * multiprocessors / tiles;
  const int groups = fill < 1 || across < 1 ? 1 : fill < across ? static_cast<int>(fill) : across;
  const dim3 grid(static_cast<unsigned>(tiles), 1, groups);
  return dispatch(g.type, [&](auto math) -> Error {
    using Math = decltype(math);
    int strides = resident_stride<Math>(g.rank);
    if (f.clip_matrices != nullptr) strides += resident_stride<Math>(f.clip_rank);
    const size_t bytes = shared_bytes<Math>() + tile_rows * strides * size_of(g.type);
    return launch(hadamard_forward_kernel<Math>, grid, threads, bytes,
                  static_cast<cudaStream_t>(stream), f);
  });
}

Error hadamard_forward(const Hadamard& g, const void* noise, void* y, Stream stream) {
  return run_forward(Forward{g, nullptr, 0, noise, y}, stream);
}

size_t hadamard_backward_bytes(const Hadamard& g) {
  Workspace counter(nullptr);
  backward(g, nullptr, HadamardGradients{}, counter, nullptr);
  return counter.used();
}

Error hadamard_backward(const Hadamard& g, const void* dy, const HadamardGradients& d,
                        void* workspace, Stream stream) {
  Workspace parts(workspace);
  return backward(g, dy, d, parts, stream);
}

}  // namespace polyfusion
