// Batch normalisation of u + s and a leaky ReLU, with s constant over the frames of a clip.
//
// Threads work on chunks of 8 elements that are consecutive in memory: pixels of one channel (NCHW), or
// channels of one pixel (channels_last). Sums over a channel are per block, then merged in fixed order.
#include <type_traits>

#include "common.cuh"
#include "kernels.h"

namespace polyfusion {
namespace {

constexpr int threads = 256;
constexpr int chunk = 8;
constexpr int chunk_columns = 8;  // chunks across a block in channels_last
constexpr int block_channels = chunk * chunk_columns;

template <class T>
__device__ bool aligned(const T* data, int bytes) {
  return reinterpret_cast<uintptr_t>(data) % bytes == 0;
}

// Copies 4 elements at a time where they are aligned and exist, all 8 if they make 16 bytes.
template <class T>
__device__ void copy_chunk(T* to, const T* from, const T* memory, int count) {
  using Half = typename std::conditional<sizeof(T) == 4, uint4, uint2>::type;
  if (sizeof(T) == 2 && count == chunk && aligned(memory, 16)) {
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
    return;
  }
#pragma unroll
  for (int i = 0; i < chunk; i += 4) {
    if (i + 4 <= count && aligned(memory, 4 * sizeof(T))) {
      *reinterpret_cast<Half*>(to + i) = *reinterpret_cast<const Half*>(from + i);
    } else {
#pragma unroll
      for (int j = i; j < i + 4; ++j)
        if (j < count) to[j] = from[j];
    }
  }
}

template <class T>
__device__ void load(const T* from, int count, float (&x)[chunk]) {
  alignas(16) T item[chunk];
  copy_chunk(item, from, from, count);
#pragma unroll
  for (int i = 0; i < chunk; ++i) x[i] = i < count ? to_float(item[i]) : 0.0f;
}

template <class T>
__device__ void store(T* to, int count, const float (&x)[chunk]) {
  alignas(16) T item[chunk];
#pragma unroll
  for (int i = 0; i < chunk; ++i) item[i] = from_float<T>(x[i]);
  copy_chunk(to, item, to, count);
}

// The chunks of one frame.
template <bool channels_last>
struct Layout {
  int channels, pixels;
  __host__ __device__ explicit Layout(const Norm& x) : channels(x.channels), pixels(x.pixels) {}
  __host__ __device__ int across() const { return divide_up(channels_last ? channels : pixels, chunk); }
  __host__ __device__ int per_frame() const { return (channels_last ? pixels : channels) * across(); }
  __device__ int64_t frame_size() const { return static_cast<int64_t>(channels) * pixels; }
};

struct Chunk {
  int64_t at;   // offset in the frame
  int channel;  // of the first element
  int count;    // of the elements that exist

  template <bool channels_last>
  __device__ Chunk(const Layout<channels_last>& layout, int row, int column) {
    const int width = channels_last ? layout.channels : layout.pixels;
    at = static_cast<int64_t>(row) * width + column * chunk;
    channel = channels_last ? column * chunk : row;
    count = min(chunk, width - column * chunk);
  }
};

template <class T>
__device__ void load_input(const Norm& x, int frame, const Chunk& c, int64_t frame_size,
                           float (&value)[chunk]) {
  load(static_cast<const T*>(x.u) + frame * frame_size + c.at, c.count, value);
  if (x.s == nullptr) return;
  float skip[chunk];
  load(static_cast<const T*>(x.s) + frame / x.per_clip * frame_size + c.at, c.count, skip);
#pragma unroll
  for (int i = 0; i < chunk; ++i) value[i] += skip[i];
}

// What normalises one channel.
struct Channel {
  float mean, scale, weight, bias, slope;
  __device__ Channel(const Norm& x, int c)
      : mean(x.mean[c]),
        scale(rsqrtf(x.var[c] + x.eps)),
        weight(x.weight[c]),
        bias(x.bias[c]),
        slope(x.slope) {}
  __device__ float normal(float value) const { return (value - mean) * scale; }
  __device__ float before(float value) const { return normal(value) * weight + bias; }
  __device__ float apply(float value) const {
    const float y = before(value);
    return y > 0 ? y : slope * y;
  }
  __device__ float gradient(float value, float dy) const { return before(value) > 0 ? dy : slope * dy; }
};

// One block: the frames [begin, end) of one channel, or of 64 channels in channels_last. Statistics
// are sums of x - shift and its square, with shift the channel's first element: exact where the mean
// is large. Then (mean - shift, M2) of the block is stored, and shift; else (sum g, sum g normal).
template <class T, bool channels_last, bool statistics>
__global__ void __launch_bounds__(threads, 3)
    channel_sums_kernel(const Norm x, const void* dy, int frames_each, float* partial) {
  DYNAMIC_SHARED(shared);
  constexpr int lanes = channels_last ? chunk_columns : 1;  // threads that share no channel
  constexpr int sums = channels_last ? chunk : 1;
  const Layout<channels_last> layout(x);
  const int64_t frame_size = layout.frame_size();
  const int begin = blockIdx.y * frames_each, end = min(begin + frames_each, x.frames);
  const int lane = threadIdx.x % lanes, worker = threadIdx.x / lanes;
  const int first_column = channels_last ? blockIdx.x * chunk_columns + lane : 0;
  // Within a frame a channel is a row of chunks (NCHW) or a column of chunks (channels_last).
  const int length = channels_last ? x.pixels : layout.across();
  const bool inside = !channels_last || first_column < layout.across();

  float first[sums] = {}, second[sums] = {}, shift[sums] = {};
  if (statistics && inside && length > 0) {
    const Chunk c(layout, channels_last ? 0 : blockIdx.x, first_column);
    float value[chunk];
    load_input<T>(x, 0, c, frame_size, value);
#pragma unroll
    for (int i = 0; i < sums; ++i) shift[i] = value[i];
  }
  const int64_t chunks = inside ? static_cast<int64_t>(end - begin) * length : 0;
  for (int64_t i = worker; i < chunks; i += threads / lanes) {
    const int frame = begin + static_cast<int>(i / length), place = static_cast<int>(i % length);
    const Chunk c = channels_last ? Chunk(layout, place, first_column)
                                  : Chunk(layout, blockIdx.x, place);
    float value[chunk], gradient[chunk];
    load_input<T>(x, frame, c, frame_size, value);
    if (!statistics) load(static_cast<const T*>(dy) + frame * frame_size + c.at, c.count, gradient);
#pragma unroll
    for (int j = 0; j < chunk; ++j) {
      if (j >= c.count) continue;
      const int k = channels_last ? j : 0;
      if (statistics) {
        const float d = value[j] - shift[k];
        first[k] += d;
        second[k] += d * d;
      } else {
        const Channel channel(x, c.channel + k);
        const float g = channel.gradient(value[j], gradient[j]);
        first[k] += g;
        second[k] += g * channel.normal(value[j]);
      }
    }
  }

  float* sum = reinterpret_cast<float*>(shared);  // (2, workers, lanes * sums)
  constexpr int width = lanes * sums, workers = threads / lanes;
#pragma unroll
  for (int k = 0; k < sums; ++k) {
    sum[worker * width + lane * sums + k] = first[k];
    sum[(workers + worker) * width + lane * sums + k] = second[k];
  }
  for (int half = workers / 2; half > 0; half /= 2) {
    __syncthreads();
    for (int i = threadIdx.x; i < 2 * half * width; i += threads) {
      const int at = i / (half * width) * workers * width + i % (half * width);
      sum[at] += sum[at + half * width];
    }
  }
  __syncthreads();
  if (worker != 0) return;
#pragma unroll
  for (int k = 0; k < sums; ++k) {
    const int channel = channels_last ? first_column * chunk + k : blockIdx.x;
    if (channel >= x.channels) continue;
    const float a = sum[lane * sums + k], b = sum[workers * width + lane * sums + k];
    const float count = static_cast<float>(end - begin) * x.pixels;
    float* to = partial + static_cast<int64_t>(blockIdx.y) * 2 * x.channels + channel;
    to[0] = statistics ? a / count : a;
    to[x.channels] = statistics ? b - a * (a / count) : b;
    if (statistics && blockIdx.y == 0)
      partial[static_cast<int64_t>(gridDim.y) * 2 * x.channels + channel] = shift[k];
  }
}

// Merges the blocks' results in order.
template <bool statistics>
__global__ void __launch_bounds__(threads, 3)
    merge_kernel(const Norm x, const float* partial, int frames_each, int blocks, float* first_out,
                 float* second_out) {
  const int channel = blockIdx.x * threads + threadIdx.x;
  if (channel >= x.channels) return;
  float total = 0, first = 0, second = 0;
  for (int i = 0; i < blocks; ++i) {
    const float* from = partial + static_cast<int64_t>(i) * 2 * x.channels + channel;
    const float a = from[0], b = from[x.channels];
    if (statistics) {
      const int frames = min(frames_each, x.frames - i * frames_each);
      const float count = static_cast<float>(frames) * x.pixels;
      const float delta = a - first, all = total + count;
      first += delta * (count / all);
      second += b + delta * delta * (total * (count / all));
      total = all;
    } else {
      first += a;
      second += b;
    }
  }
  const float shift = statistics ? partial[static_cast<int64_t>(blocks) * 2 * x.channels + channel] : 0;
  first_out[channel] = first + shift;
  second_out[channel] = statistics ? second / total : second;
}

template <class T, bool channels_last>
__global__ void __launch_bounds__(threads, 3) norm_apply_kernel(const Norm x, void* y) {
  const Layout<channels_last> layout(x);
  const int across = divide_up(layout.per_frame(), threads), frame = blockIdx.x / across;
  const int index = blockIdx.x % across * threads + threadIdx.x;
  if (index >= layout.per_frame()) return;
  const int64_t frame_size = layout.frame_size();
  const Chunk c(layout, index / layout.across(), index % layout.across());
  float value[chunk];
  load_input<T>(x, frame, c, frame_size, value);
#pragma unroll
  for (int j = 0; j < chunk; ++j)
    if (j < c.count) value[j] = Channel(x, c.channel + (channels_last ? j : 0)).apply(value[j]);
  store(static_cast<T*>(y) + frame * frame_size + c.at, c.count, value);
}

// A thread goes through the frames of its clip, so that ds needs no second pass.
template <class T, bool channels_last>
__global__ void __launch_bounds__(threads, 3)
    norm_backward_kernel(const Norm x, const void* dy, const float* sums, float count, void* du,
                         void* ds) {
  const Layout<channels_last> layout(x);
  const int across = divide_up(layout.per_frame(), threads), clip = blockIdx.x / across;
  const int index = blockIdx.x % across * threads + threadIdx.x;
  if (index >= layout.per_frame()) return;
  const int64_t frame_size = layout.frame_size();
  const Chunk c(layout, index / layout.across(), index % layout.across());
  float total[chunk] = {};
  for (int frame = clip * x.per_clip; frame < (clip + 1) * x.per_clip; ++frame) {
    float value[chunk], gradient[chunk];
    load_input<T>(x, frame, c, frame_size, value);
    load(static_cast<const T*>(dy) + frame * frame_size + c.at, c.count, gradient);
#pragma unroll
    for (int j = 0; j < chunk; ++j) {
      if (j >= c.count) continue;
      const int k = c.channel + (channels_last ? j : 0);
      const Channel channel(x, k);
      float g = channel.gradient(value[j], gradient[j]);
      if (sums != nullptr) g -= (sums[k] + channel.normal(value[j]) * sums[x.channels + k]) / count;
      gradient[j] = g * channel.weight * channel.scale;
      total[j] += gradient[j];
    }
    store(static_cast<T*>(du) + frame * frame_size + c.at, c.count, gradient);
  }
  if (ds != nullptr) store(static_cast<T*>(ds) + clip * frame_size + c.at, c.count, total);
}

// Call f with a null pointer to the element type, and with the memory format.
template <class F>
Error dispatch(const Norm& x, F f) {
  const auto layout = [&](auto* type) -> Error {
    return x.channels_last ? f(type, std::true_type{}) : f(type, std::false_type{});
  };
  if (x.type == Type::float16) return layout(static_cast<__half*>(nullptr));
  if (x.type == Type::bfloat16) return layout(static_cast<__nv_bfloat16*>(nullptr));
  return layout(static_cast<float*>(nullptr));
}

bool empty(const Norm& x) { return x.frames == 0 || x.channels == 0 || x.pixels == 0; }

// Frames for each block of the sums, so that the blocks fill the device.
struct Split {
  int channel_blocks, frames_each, blocks;
  explicit Split(const Norm& x) {
    channel_blocks = x.channels_last ? divide_up(x.channels, block_channels) : x.channels;
    const int wanted = max(1, min(x.frames, 8 * multiprocessors / max(1, channel_blocks)));
    frames_each = max(1, divide_up(x.frames, wanted));
    blocks = divide_up(x.frames, frames_each);
  }
};

template <bool statistics>
Error channel_sums(const Norm& x, const void* dy, float* first, float* second, void* workspace,
                   Stream stream) {
  if (empty(x)) return cudaSuccess;
  const Split split(x);
  const auto queue = static_cast<cudaStream_t>(stream);
  float* partial = static_cast<float*>(workspace);
  const Error error = dispatch(x, [&](auto* type, auto channels_last) -> Error {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr bool last = decltype(channels_last)::value;
    constexpr size_t bytes = 2 * threads * (last ? chunk : 1) * sizeof(float);
    return launch(channel_sums_kernel<T, last, statistics>, dim3(split.channel_blocks, split.blocks),
                  threads, bytes, queue, x, dy, split.frames_each, partial);
  });
  if (error != cudaSuccess) return error;
  return launch(merge_kernel<statistics>, dim3(divide_up(x.channels, threads)), threads, 0, queue, x,
                static_cast<const float*>(partial), split.frames_each, split.blocks, first, second);
}

size_t partial_bytes(const Norm& x) {
  return (static_cast<size_t>(Split(x).blocks) * 2 + 1) * x.channels * sizeof(float);
}

template <bool last>
dim3 chunk_grid(const Norm& x, int rows) {
  return dim3(static_cast<unsigned>(divide_up(Layout<last>(x).per_frame(), threads)) * rows);
}

}  // namespace

size_t norm_statistics_bytes(const Norm& x) { return partial_bytes(x); }

Error norm_statistics(const Norm& x, float* mean, float* var, void* workspace, Stream stream) {
  return channel_sums<true>(x, nullptr, mean, var, workspace, stream);
}

Error norm_apply(const Norm& x, void* y, Stream stream) {
  if (empty(x)) return cudaSuccess;
  return dispatch(x, [&](auto* type, auto channels_last) -> Error {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr bool last = decltype(channels_last)::value;
    return launch(norm_apply_kernel<T, last>, chunk_grid<last>(x, x.frames), threads, 0,
                  static_cast<cudaStream_t>(stream), x, y);
  });
}

size_t norm_sums_bytes(const Norm& x) { return partial_bytes(x); }

Error norm_sums(const Norm& x, const void* dy, float* sums, void* workspace, Stream stream) {
  return channel_sums<false>(x, dy, sums, sums + x.channels, workspace, stream);
}

Error norm_backward(const Norm& x, const void* dy, const float* sums, float count, void* du,
                    void* ds, Stream stream) {
  if (empty(x)) return cudaSuccess;
  return dispatch(x, [&](auto* type, auto channels_last) -> Error {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr bool last = decltype(channels_last)::value;
    return launch(norm_backward_kernel<T, last>, chunk_grid<last>(x, x.frames / x.per_clip), threads,
                  0, static_cast<cudaStream_t>(stream), x, dy, sums, count, du, ds);
  });
}

const char* describe(Error error) {
#ifdef POLYFUSION_EMULATED
  return error == cudaSuccess ? "no error" : "emulation error";
#else
  return cudaGetErrorString(static_cast<cudaError_t>(error));
#endif
}

}  // namespace polyfusion
