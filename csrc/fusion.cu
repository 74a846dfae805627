// CP, CMF and CMF with a shared row space: project, gate, project; and Tucker through the same kernel.
//
// A block works on 32 frames of one clip, so what is constant over the clip is one row for the block:
// it is projected once per block and never repeated over the frames.
#include "products.cuh"

namespace polyfusion {
namespace {

struct Forward {
  Gated g;
  const void* clip_matrices;  // Tucker: (B, k_1, k), applied to the hidden before out (m, k_1)
  int clip_rank;              // k_1
  const void* noise;
  void* y;
};

struct Backward {
  Gated g;
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
  __device__ explicit Frames(const Gated& g) {
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
__device__ void project(const Gated& g, int view, const void* weights, bool affine,
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

  __device__ Projections(const Gated& g, const Frames& at, int k0, unsigned char* shared)
      : form(g.form) {
    const bool affine = form == Form::product;
    project<Math>(g, 0, g.first[0], affine, at, k0, shared, p);
    if (g.views[1] != nullptr) {
      project<Math>(g, 1, g.first[1], affine, at, k0, shared, q);
    } else {
#pragma unroll
      for (int j = 0; j < tile_values; ++j) q[j] = 1;
    }
    if (form == Form::coupled) {
      project<Math>(g, 0, g.second[0], false, at, k0, shared, r);
      project<Math>(g, 1, g.second[1], false, at, k0, shared, s);
    }
  }

  __device__ float hidden(int j) const {
    if (form == Form::product) return p[j] * q[j];
    return p[j] + q[j] + (form == Form::coupled ? r[j] * s[j] : p[j] * q[j]);
  }
  // d hidden / d p and d hidden / d q
  __device__ float slope_p(int j) const {
    return form == Form::product ? q[j] : form == Form::shared ? 1 + q[j] : 1;
  }
  __device__ float slope_q(int j) const {
    return form == Form::product ? p[j] : form == Form::shared ? 1 + p[j] : 1;
  }
};

template <class Math>
__host__ __device__ constexpr size_t shared_bytes() {
  constexpr size_t results = tile_rows * tile_stride * sizeof(float);
  return operand_bytes<Math>() > results ? operand_bytes<Math>() : results;
}

template <class Math>
__global__ void __launch_bounds__(threads, 2) fusion_forward_kernel(const __grid_constant__ Forward f) {
  using T = typename Math::Element;
  DYNAMIC_SHARED(shared);
  const Gated& g = f.g;
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
    fusion_backward_kernel(const __grid_constant__ Backward b) {
  using T = typename Math::Element;
  DYNAMIC_SHARED(shared);
  const Gated& g = b.g;
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
  const bool coupled = g.form == Form::coupled;
  store(b.hidden, [&](int j) { return x.hidden(j); });
  store(b.d[0], [&](int j) { return gradient[j] * x.slope_p(j); });
  if (coupled) store(b.e[0], [&](int j) { return gradient[j] * x.s[j]; });
  if (g.framed) {
    if (!coupled) store(b.d[1], [&](int j) { return gradient[j] * x.slope_q(j); });
    if (coupled) store(b.e[1], [&](int j) { return gradient[j] * x.r[j]; });
  } else if (g.views[1] != nullptr) {
    sum_frames(b.clip_d, [&](int j) { return gradient[j] * x.slope_q(j); });
    if (coupled) sum_frames(b.clip_e, [&](int j) { return gradient[j] * x.r[j]; });
  }
}

Error run_forward(const Forward& f, Stream stream) {
  const Gated& g = f.g;
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
    return launch(fusion_forward_kernel<Math>, grid, threads, bytes,
                  static_cast<cudaStream_t>(stream), f);
  });
}

Product product(const Matrix& a, bool transposed_a, const Matrix& b, bool transposed_b,
                void* result) {
  Product p{};
  p.a[0] = a, p.b[0] = b;
  p.transposed_a = transposed_a, p.transposed_b = transposed_b;
  p.terms = 1, p.batches = 1, p.splits = 1;
  p.rows = transposed_a ? a.columns + a.ones : a.rows;
  p.depth = transposed_a ? a.rows : a.columns + a.ones;
  p.columns = transposed_b ? b.rows : b.columns + b.ones;
  p.result = result;
  return p;
}

// Gradients of one view and its weights from those of its projections, d and e (rows, k).
void add_view(Batch& batch, const Gated& g, int view, int rows, const void* d, const void* e,
              const GatedGradients& to) {
  const size_t size = size_of(g.type);
  const int n = g.sizes[view], k = g.rank;
  const bool affine = g.form == Form::product;
  const Matrix z = matrix(g.views[view], n, rows, n, size);
  const Matrix z1 = matrix(g.views[view], n, rows, n, size, affine);
  const Matrix md = matrix(d, k, rows, k, size), me = matrix(e, k, rows, k, size);
  batch.add(product(z1, true, md, false, to.first[view]));
  Product back = product(md, false, matrix(g.first[view], k, n, k, size), true, to.views[view]);
  if (g.form == Form::coupled) {
    batch.add(product(z, true, me, false, to.second[view]));
    back.a[1] = me, back.b[1] = matrix(g.second[view], k, n, k, size), back.terms = 2;
  }
  batch.add(back);
}

Error backward(const Gated& g, const void* dy, const GatedGradients& to, Workspace& workspace,
               Stream stream) {
  const size_t size = size_of(g.type);
  const bool coupled = g.form == Form::coupled, per_clip = !g.framed;
  const int frames = g.clips * g.frames, tiles = divide_up(g.frames, tile_rows);
  const int64_t elements = static_cast<int64_t>(frames) * g.rank;
  const int64_t clip_sums = static_cast<int64_t>(g.clips) * tiles * g.rank;
  const int64_t clip_elements = static_cast<int64_t>(g.clips) * g.rank;

  Backward b{g, dy, {}, {}, {}, nullptr, nullptr};
  b.hidden = workspace.take(elements, size);
  b.d[0] = workspace.take(elements, size);
  b.d[1] = b.d[0];  // CMF: both are the hidden's gradient
  if (coupled) b.e[0] = workspace.take(elements, size);
  if (g.framed && !coupled) b.d[1] = workspace.take(elements, size);
  if (g.framed && coupled) b.e[1] = workspace.take(elements, size);
  if (per_clip) {
    b.clip_d = static_cast<float*>(workspace.take(clip_sums, sizeof(float)));
    b.d[1] = workspace.take(clip_elements, size);
  }
  if (per_clip && coupled) {
    b.clip_e = static_cast<float*>(workspace.take(clip_sums, sizeof(float)));
    b.e[1] = workspace.take(clip_elements, size);
  }
  if (!workspace.counting() && elements > 0) {
    const dim3 grid(static_cast<unsigned>(g.clips * tiles), 1, divide_up(g.rank, tile_columns));
    const Error error = dispatch(g.type, [&](auto math) -> Error {
      using Math = decltype(math);
      return launch(fusion_backward_kernel<Math>, grid, threads, shared_bytes<Math>(),
                    static_cast<cudaStream_t>(stream), b);
    });
    if (error != cudaSuccess) return error;
  }

  const Matrix gradient = matrix(dy, g.outputs + g.noise_columns, frames, g.outputs, size);
  Batch batch(g.type, workspace);
  batch.add(product(gradient, true, matrix(b.hidden, g.rank, frames, g.rank, size), false, to.out));
  if (g.form != Form::product)
    batch.add(product(matrix(nullptr, 0, frames, 0, size, true), true, gradient, false, to.bias));
  add_view(batch, g, 0, frames, b.d[0], b.e[0], to);
  if (g.framed) add_view(batch, g, 1, frames, b.d[1], b.e[1], to);
  if (per_clip) batch.add(Sum{b.clip_d, b.d[1], g.clips, g.rank, tiles});
  if (per_clip && coupled) batch.add(Sum{b.clip_e, b.e[1], g.clips, g.rank, tiles});
  const Error error = batch.run(stream);
  if (error != cudaSuccess || g.framed) return error;
  Batch per_clip_batch(g.type, workspace);
  add_view(per_clip_batch, g, 1, g.clips, b.d[1], b.e[1], to);
  return per_clip_batch.run(stream);
}

Error backward(const Tucker& t, const void* dy, const TuckerGradients& to, Workspace& workspace,
               Stream stream) {
  const size_t size = size_of(t.type);
  const int clips = t.clips, frames = clips * t.frames;
  const int k1 = t.ranks[0], k2 = t.ranks[1], k3 = t.ranks[2], entries = k1 * k2;
  const auto rows = [&](int64_t count, int columns) {
    return matrix(workspace.take(count * columns, size), columns, static_cast<int>(count), columns,
                  size);
  };
  const auto data = [](const Matrix& m) { return const_cast<void*>(m.data); };
  const Matrix z0 = matrix(t.views[0], t.sizes[0], frames, t.sizes[0], size, true);
  const Matrix z1 = matrix(t.views[1], t.sizes[1], clips, t.sizes[1], size, true);
  const Matrix u2 = matrix(t.factors[0], k2, t.sizes[0] + 1, k2, size);
  const Matrix u3 = matrix(t.factors[1], k3, t.sizes[1] + 1, k3, size);
  const Matrix core = matrix(t.core, k3, entries, k3, size);
  const Matrix out = matrix(t.out, k1, t.outputs, k1, size);
  const Matrix gradient = matrix(dy, t.outputs + t.noise_columns, frames, t.outputs, size);
  const Matrix q = rows(clips, k3), p = rows(frames, k2), inner = rows(frames, k1);
  const Matrix m = rows(clips, entries), dm = rows(clips, entries);
  const Matrix h = rows(frames, k1), dp = rows(frames, k2), dq = rows(clips, k3);

  Batch project(t.type, workspace);
  project.add(product(z1, false, u3, false, data(q)));
  project.add(product(z0, false, u2, false, data(p)));
  project.add(product(gradient, false, out, false, data(inner)));

  // One clip of a batch.
  const Matrix clip_p = matrix(p.data, k2, t.frames, k2, size);
  const Matrix clip_inner = matrix(inner.data, k1, t.frames, k1, size);
  const Matrix clip_m = matrix(m.data, k2, k1, k2, size);
  const auto per_clip = [&](Product x, int64_t batch_a, int64_t batch_b) {
    x.batches = clips, x.batch_a = batch_a, x.batch_b = batch_b;
    return x;
  };
  const int64_t p_size = static_cast<int64_t>(t.frames) * k2;
  const int64_t inner_size = static_cast<int64_t>(t.frames) * k1;
  Batch contract(t.type, workspace);
  contract.add(product(q, false, core, true, data(m)));
  contract.add(per_clip(product(clip_inner, true, clip_p, false, data(dm)), inner_size, p_size));

  Batch apply(t.type, workspace);
  apply.add(per_clip(product(clip_p, false, clip_m, true, data(h)), p_size, entries));
  apply.add(per_clip(product(clip_inner, false, clip_m, false, data(dp)), inner_size, entries));
  apply.add(product(dm, false, core, false, data(dq)));
  apply.add(product(dm, true, q, false, to.core));

  Batch weights(t.type, workspace);
  weights.add(product(gradient, true, h, false, to.out));
  weights.add(product(z0, true, dp, false, to.factors[0]));
  weights.add(product(z1, true, dq, false, to.factors[1]));
  weights.add(product(dp, false, matrix(u2.data, k2, t.sizes[0], k2, size), true, to.views[0]));
  weights.add(product(dq, false, matrix(u3.data, k3, t.sizes[1], k3, size), true, to.views[1]));

  for (const Batch* batch : {&project, &contract, &apply, &weights})
    if (const Error error = batch->run(stream); error != cudaSuccess) return error;
  return cudaSuccess;
}

}  // namespace

Error gated_forward(const Gated& g, const void* noise, void* y, Stream stream) {
  return run_forward(Forward{g, nullptr, 0, noise, y}, stream);
}

size_t gated_backward_bytes(const Gated& g) {
  Workspace counter(nullptr);
  backward(g, nullptr, GatedGradients{}, counter, nullptr);
  return counter.used();
}

Error gated_backward(const Gated& g, const void* dy, const GatedGradients& d, void* workspace,
                     Stream stream) {
  Workspace parts(workspace);
  return backward(g, dy, d, parts, stream);
}

size_t tucker_forward_bytes(const Tucker& t) {
  return static_cast<size_t>(t.clips) * t.ranks[0] * t.ranks[1] * size_of(t.type);
}

Error tucker_forward(const Tucker& t, const void* noise, void* y, void* workspace, Stream stream) {
  // (B, k_1 k_2) = q core', q (B, k_3)
  Gated contraction{};
  contraction.type = t.type, contraction.form = Form::product;
  contraction.clips = 1, contraction.frames = t.clips;
  contraction.sizes[0] = t.sizes[1], contraction.rank = t.ranks[2];
  contraction.outputs = t.ranks[0] * t.ranks[1];
  contraction.views[0] = t.views[1], contraction.first[0] = t.factors[1];
  contraction.out = t.core;
  const Error error = gated_forward(contraction, nullptr, workspace, stream);
  if (error != cudaSuccess) return error;

  Gated g{};
  g.type = t.type, g.form = Form::product;
  g.clips = t.clips, g.frames = t.frames;
  g.sizes[0] = t.sizes[0], g.rank = t.ranks[1];
  g.outputs = t.outputs, g.noise_columns = t.noise_columns;
  g.views[0] = t.views[0], g.first[0] = t.factors[0];
  g.out = t.out;
  return run_forward(Forward{g, workspace, t.ranks[0], noise, y}, stream);
}

size_t tucker_backward_bytes(const Tucker& t) {
  Workspace counter(nullptr);
  backward(t, nullptr, TuckerGradients{}, counter, nullptr);
  return counter.used();
}

Error tucker_backward(const Tucker& t, const void* dy, const TuckerGradients& d, void* workspace,
                      Stream stream) {
  Workspace parts(workspace);
  return backward(t, dy, d, parts, stream);
}

}  // namespace polyfusion
