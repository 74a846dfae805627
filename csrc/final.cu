// tanh of a transposed convolution, 4 x 4 with stride 2 and padding 1, from many channels to few.
//
// A warp works on 16 neighbouring input pixels. Output pixel (2 y + i, 2 x + j) depends on the inputs
// at (y + dy, x + dx), dy and dx in {-1, 0, 1}, so the forward is 9 matrix products over channels, for
// pixels shifted by (dy, dx), with 4 outputs per channel as columns. Backward uses the 4 x 4 patches
// of the gradient, 16 columns per channel, for both the input's and the weight's gradient.
#include "products.cuh"

namespace polyfusion {
namespace {

constexpr int warps = threads / 32;  // rows of pixels in a tile
constexpr int tile_pixels = 16;      // in a row of a tile
constexpr int taps = 16, most_outputs = 4;
constexpr int channel_step = 32;                                      // staged at a time, forward
constexpr int halo_width = tile_pixels + 2, halo_height = warps + 2;  // pixels staged, forward
constexpr int channel_block = 16 * warps;                             // of a block, backward
constexpr int result_stride = 2 * tile_pixels + 4;

template <class Math>
constexpr int pad = vector_size<typename Math::Element>;

// Where a tile of 4 x 16 input pixels lies.
struct Tile {
  int frame, y0, x0;
  __device__ Tile(const Final& f, int index) {
    const int across = divide_up(f.width, tile_pixels), down = divide_up(f.height, warps);
    x0 = index % across * tile_pixels;
    y0 = index / across % down * warps;
    frame = index / (across * down);
  }
};
__host__ inline int64_t tile_count(const Final& f) {
  return static_cast<int64_t>(divide_up(f.width, tile_pixels)) * divide_up(f.height, warps) * f.frames;
}

// Offset of a pixel's first channel in a map (N, height, width, channels).
__device__ inline int64_t place(int channels, int height, int width, int frame, int y, int x) {
  return ((static_cast<int64_t>(frame) * height + y) * width + x) * channels;
}

// Copies input pixels (rows x columns from (y0, x0)) by channels [c0, c0 + count) to tile (pixel,
// channel), 0 outside the image.
template <class Math, int count, int stride>
__device__ void stage_input(const Final& f, int frame, int y0, int x0, int rows, int columns, int c0,
                            typename Math::Element* tile) {
  using T = typename Math::Element;
  const T* from = static_cast<const T*>(f.x);
  for (int i = threadIdx.x; i < rows * columns * count; i += threads) {
    const int pixel = i / count, channel = i % count, c = c0 + channel;
    const int y = y0 + pixel / columns, x = x0 + pixel % columns;
    T value = from_float<T>(0.0f);
    if (y >= 0 && y < f.height && x >= 0 && x < f.width && c < f.channels)
      value = from[place(f.channels, f.height, f.width, frame, y, x) + c];
    tile[pixel * stride + channel] = Math::staged(value);
  }
}

template <class Math>
__global__ void __launch_bounds__(threads, 2) final_forward_kernel(const Final f, int tiles, void* y) {
  using T = typename Math::Element;
  DYNAMIC_SHARED(shared);
  // Any pixel may begin a wmma tile, which must be aligned to 32 bytes.
  constexpr int input_stride = channel_step + 2 * pad<Math>, weight_stride = 16 + pad<Math>;
  const int padded = round_up(f.channels, channel_step);
  T* weight = reinterpret_cast<T*>(shared);                // (9, padded, 16)
  T* input = weight + 9 * padded * weight_stride;          // (6 * 18, channel_step)
  float* result = reinterpret_cast<float*>(input + halo_height * halo_width * input_stride);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  result += warp * tile_pixels * result_stride;

  const T* from = static_cast<const T*>(f.weight);
  for (int i = threadIdx.x; i < 9 * padded * 16; i += threads) {
    const int column = i % 16, c = i / 16 % padded, shift = i / (16 * padded);
    const int output = column / 4, ky = column / 2 % 2 + 3 - 2 * (shift / 3);
    const int kx = column % 2 + 3 - 2 * (shift % 3);
    T value = from_float<T>(0.0f);
    if (output < f.outputs && c < f.channels && ky >= 0 && ky < 4 && kx >= 0 && kx < 4)
      value = from[((static_cast<int64_t>(c) * f.outputs + output) * 4 + ky) * 4 + kx];
    weight[(shift * padded + c) * weight_stride + column] = Math::staged(value);
  }
  for (int index = blockIdx.x; index < tiles; index += gridDim.x) {
    const Tile at(f, index);
    WarpTile<Math, 1> sums;
    for (int c0 = 0; c0 < f.channels; c0 += channel_step) {
      __syncthreads();
      stage_input<Math, channel_step, input_stride>(f, at.frame, at.y0 - 1, at.x0 - 1, halo_height,
                                                    halo_width, c0, input);
      __syncthreads();
#pragma unroll 1
      for (int shift = 0; shift < 9; ++shift) {
        const T* pixels = input + ((warp + shift / 3) * halo_width + shift % 3) * input_stride;
        const T* w = weight + (shift * padded + c0) * weight_stride;
#pragma unroll
        for (int k = 0; k < channel_step; k += 16)
          sums.template multiply<false, false>(pixels + k, input_stride, w + k * weight_stride,
                                               weight_stride);
      }
    }
    sums.store(result, result_stride);
    __syncwarp();
    const int row = at.y0 + warp, x = at.x0 + lane / 2;
    if (row < f.height && x < f.width)
      for (int i = 0; i < 2 * f.outputs; ++i) {
        const float sum = result[lane / 2 * result_stride + 2 * i + lane % 2];
        const int64_t to = place(f.outputs, 2 * f.height, 2 * f.width, at.frame, 2 * row + i % 2,
                                 2 * at.x0 + lane);
        static_cast<T*>(y)[to + i / 2] = from_float<T>(tanhf(sum));
      }
  }
}

// A block has 64 of the input's channels, and goes through the tiles from its own on.
template <class Math>
__global__ void __launch_bounds__(threads, 2)
    final_backward_kernel(const Final f, int tiles, const void* y, const void* dy, void* dx,
                          float* partial) {
  using T = typename Math::Element;
  DYNAMIC_SHARED(shared);
  constexpr int columns = most_outputs * taps, stride = columns + pad<Math>;
  constexpr int input_stride = channel_block + pad<Math>, pixels = warps * tile_pixels;
  T* weight = reinterpret_cast<T*>(shared);    // (64 channels, 64 taps)
  T* patches = weight + channel_block * stride;  // (64 pixels, 64 taps)
  T* input = patches + pixels * stride;          // (64 pixels, 64 channels)
  float* result = reinterpret_cast<float*>(input + pixels * input_stride);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  result += warp * tile_pixels * result_stride;
  const int c0 = blockIdx.y * channel_block, used = f.outputs * taps;

  const T* from = static_cast<const T*>(f.weight);
  for (int i = threadIdx.x; i < channel_block * columns; i += threads) {
    const int c = c0 + i / columns, tap = i % columns;
    T value = from_float<T>(0.0f);
    if (c < f.channels && tap < used) value = from[static_cast<int64_t>(c) * used + tap];
    weight[i / columns * stride + tap] = Math::staged(value);
  }
  WarpTile<Math, most_outputs> weight_sums;  // 16 channels of this warp by all taps
  for (int index = blockIdx.x; index < tiles; index += gridDim.x) {
    const Tile at(f, index);
    __syncthreads();
    for (int i = threadIdx.x; i < pixels * columns; i += threads) {
      const int pixel = i / columns, tap = i % columns;
      const int row = at.y0 + pixel / tile_pixels, column = at.x0 + pixel % tile_pixels;
      const int oy = 2 * row - 1 + tap / 4 % 4, ox = 2 * column - 1 + tap % 4;
      float value = 0;
      if (tap < used && row < f.height && column < f.width && oy >= 0 && oy < 2 * f.height &&
          ox >= 0 && ox < 2 * f.width) {
        const int64_t o =
            place(f.outputs, 2 * f.height, 2 * f.width, at.frame, oy, ox) + tap / taps;
        const float image = to_float(static_cast<const T*>(y)[o]);
        value = to_float(static_cast<const T*>(dy)[o]) * (1 - image * image);
      }
      patches[pixel * stride + tap] = Math::staged(from_float<T>(value));
    }
    stage_input<Math, channel_block, input_stride>(f, at.frame, at.y0, at.x0, warps, tile_pixels, c0,
                                                   input);
    __syncthreads();
    for (int k = 0; k < pixels; k += 16)
      weight_sums.template multiply<true, false>(input + k * input_stride + 16 * warp, input_stride,
                                                 patches + k * stride, stride);
    const int row = at.y0 + warp;
    for (int c = 0; c < channel_block; c += 32) {
      WarpTile<Math, 2> sums;
      for (int k = 0; k < columns; k += 16)
        sums.template multiply<false, true>(patches + warp * tile_pixels * stride + k, stride,
                                            weight + c * stride + k, stride);
      sums.store(result, result_stride);
      __syncwarp();
      for (int pixel = 0; pixel < tile_pixels; ++pixel) {
        const int x = at.x0 + pixel, k = c0 + c + lane;
        if (row >= f.height || x >= f.width || k >= f.channels) continue;
        const int64_t to = place(f.channels, f.height, f.width, at.frame, row, x) + k;
        static_cast<T*>(dx)[to] = from_float<T>(result[pixel * result_stride + lane]);
      }
      __syncwarp();
    }
  }
  __syncthreads();
  float* sums = reinterpret_cast<float*>(shared);  // (64 channels, 64 taps)
  weight_sums.store(sums + 16 * warp * columns, columns);
  __syncthreads();
  float* to = partial + static_cast<int64_t>(blockIdx.x) * f.channels * used;
  for (int i = threadIdx.x; i < channel_block * used; i += threads) {
    const int c = c0 + i / used;
    if (c < f.channels)
      to[static_cast<int64_t>(c) * used + i % used] = sums[i / used * columns + i % used];
  }
}

// The forward's blocks are small, the backward's leave a partial sum each.
int blocks_for(const Final& f, int wanted) {
  const int64_t tiles = tile_count(f);
  return tiles < wanted ? static_cast<int>(tiles) : wanted;
}
int forward_blocks(const Final& f) { return blocks_for(f, 8 * multiprocessors); }
int backward_blocks(const Final& f) { return blocks_for(f, 2 * multiprocessors); }

}  // namespace

size_t final_shared_bytes(const Final& f) {
  const int size = static_cast<int>(size_of(f.type)), padding = 16 / size;
  const int elements = 9 * round_up(f.channels, channel_step) * (16 + padding) +
                       halo_height * halo_width * (channel_step + 2 * padding);
  return elements * size + warps * tile_pixels * result_stride * sizeof(float);
}

Error final_forward(const Final& f, void* y, Stream stream) {
  const int blocks = forward_blocks(f);
  if (blocks == 0) return cudaSuccess;
  return dispatch(f.type, [&](auto math) -> Error {
    return launch(final_forward_kernel<decltype(math)>, dim3(blocks), threads, final_shared_bytes(f),
                  static_cast<cudaStream_t>(stream), f, static_cast<int>(tile_count(f)), y);
  });
}

size_t final_backward_bytes(const Final& f) {
  return static_cast<size_t>(backward_blocks(f)) * f.channels * f.outputs * taps * sizeof(float);
}

Error final_backward(const Final& f, const void* dy, const void* y, void* dx, void* dweight,
                     void* workspace, Stream stream) {
  const int blocks = backward_blocks(f);
  float* partial = static_cast<float*>(workspace);
  if (blocks > 0) {
    const Error error = dispatch(f.type, [&](auto math) -> Error {
      using Math = decltype(math);
      constexpr size_t columns = most_outputs * taps + pad<Math>, rows = channel_block;
      constexpr size_t bytes = 3 * rows * columns * sizeof(typename Math::Element) +
                               warps * tile_pixels * result_stride * sizeof(float);
      const dim3 grid(blocks, divide_up(f.channels, channel_block));
      return launch(final_backward_kernel<Math>, grid, threads, bytes,
                    static_cast<cudaStream_t>(stream), f, static_cast<int>(tile_count(f)), y, dy, dx,
                    partial);
    });
    if (error != cudaSuccess) return error;
  }
  Workspace none(workspace);
  Batch batch(f.type, none);
  batch.add(Sum{partial, dweight, 1, static_cast<int64_t>(f.channels) * f.outputs * taps, blocks});
  return batch.run(stream);
}

}  // namespace polyfusion
