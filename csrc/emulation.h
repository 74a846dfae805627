// Runs the CUDA kernels of this directory on the host, so that they can be checked without a GPU.
//
// The blocks of a launch run one after the other; each CUDA thread is a fiber, and a barrier switches
// to the next one. Shared memory is filled with NaN before each block. Under -fsanitize=thread only
// barriers order the fibers of a block, and nothing orders the blocks of a launch, so a missing
// barrier or two blocks writing one address is reported, whatever order things ran in. The first lane
// of a warp does the work of its wmma calls, so a missing __syncwarp after a store is reported too.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#else
inline void __tsan_acquire(void*) {}
inline void __tsan_release(void*) {}
inline void* __tsan_create_fiber(unsigned) { return nullptr; }
inline void* __tsan_get_current_fiber() { return nullptr; }
inline void __tsan_switch_to_fiber(void*, unsigned) {}
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define DYNAMIC_SHARED(name) unsigned char* name = emulation::machine().shared()
#define threadIdx (emulation::machine().thread_index())
#define blockIdx (emulation::machine().block_index())
#define gridDim (emulation::machine().grid_size())
#define UNCHECKED __attribute__((no_sanitize("thread"), noinline))

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;

constexpr int multiprocessors = 2;  // few, so that the loops over more work than blocks run

namespace emulation {

constexpr int warp_size = 32, most_threads = 1024;
constexpr size_t most_shared_bytes = 163 * 1024;  // of compute capability 8.0
constexpr size_t stack_bytes = 256 * 1024;

[[noreturn]] inline void fail(const char* why) {
  std::fprintf(stderr, "emulation: %s\n", why);
  std::abort();
}

class Machine {
  struct Fiber {
    ucontext_t context;
    char* stack;
    void* sanitizer;
    bool done;
  };
  // Consecutive generations use different sync objects, else a thread that is late would see what
  // a thread already waiting at the next barrier has done since.
  struct Barrier {
    int arrived, generation;
    char sync[2];
  };

  // Plain arrays: containers' code would be checked too.
  Fiber fibers_[most_threads];
  Barrier barriers_[1 + most_threads / warp_size];  // the block's, then one for each warp
  uint64_t lanes_[most_threads];                    // what the threads of each warp exchange
  std::vector<std::unique_ptr<unsigned char[]>> memories_;
  ucontext_t main_{};
  void* main_sanitizer_ = nullptr;
  void (*call_)(void*) = nullptr;
  void* kernel_ = nullptr;
  unsigned char* shared_ = nullptr;
  dim3 block_, grid_;
  int made_ = 0, threads_ = 0, current_ = 0, idle_ = 0;
  char start_, end_;

  UNCHECKED int next() const {
    for (int i = 1; i <= threads_; ++i) {
      const int candidate = (current_ + i) % threads_;
      if (!fibers_[candidate].done) return candidate;
    }
    return -1;
  }

  UNCHECKED void switch_to_next() {
    Fiber& from = fibers_[current_];
    const int to = next();
    if (to == current_) return;
    current_ = to;
    __tsan_switch_to_fiber(to < 0 ? main_sanitizer_ : fibers_[to].sanitizer, 1);
    swapcontext(&from.context, to < 0 ? &main_ : &fibers_[to].context);
  }

  UNCHECKED static void body() {
    Machine& m = machine_();
    for (;;) {
      __tsan_acquire(&m.start_);
      m.call_(m.kernel_);
      __tsan_release(&m.end_);
      m.fibers_[m.current_].done = true;
      m.idle_ = 0;
      m.switch_to_next();
    }
  }

  UNCHECKED void wait(Barrier& barrier, int size, bool memory) {
    const int generation = barrier.generation;
    void* sync = &barrier.sync[generation % 2];
    if (memory) __tsan_release(sync);
    if (++barrier.arrived == size) {
      barrier.arrived = 0;
      ++barrier.generation;
      idle_ = 0;
    }
    while (barrier.generation == generation) {
      if (++idle_ > 2 * threads_) fail("a barrier is not reached by every thread");
      switch_to_next();
    }
    if (memory) __tsan_acquire(sync);
  }

  Machine() = default;
  ~Machine() {
    for (int i = 0; i < made_; ++i) delete[] fibers_[i].stack;
  }

  static Machine& machine_() {
    static thread_local Machine machine;
    return machine;
  }
  friend Machine& machine();

 public:
  UNCHECKED dim3 thread_index() const { return dim3(current_, 0, 0); }
  UNCHECKED dim3 block_index() const { return block_; }
  UNCHECKED dim3 grid_size() const { return grid_; }
  UNCHECKED unsigned char* shared() const { return shared_; }
  UNCHECKED int lane() const { return current_ % warp_size; }
  UNCHECKED void sync_block() { wait(barriers_[0], threads_, true); }
  UNCHECKED void sync_warp(bool memory) {
    wait(barriers_[1 + current_ / warp_size], warp_size, memory);
  }

  UNCHECKED uint64_t exchange(uint64_t value, int source) {
    const int first = current_ - lane();
    lanes_[current_] = value;
    sync_warp(false);
    const uint64_t received = lanes_[first + source % warp_size];
    sync_warp(false);
    return received;
  }

  UNCHECKED void run(dim3 grid, int threads, size_t bytes, void (*call)(void*), void* kernel) {
    if (bytes > most_shared_bytes) fail("a block asks for more shared memory than a device has");
    if (grid.y > 65535 || grid.z > 65535) fail("a grid is too high or deep");
    if (threads % warp_size || threads > most_threads) fail("a block has an odd number of threads");
    for (; made_ < threads; ++made_) {
      Fiber& fiber = fibers_[made_];
      fiber.stack = new char[stack_bytes];
      fiber.sanitizer = __tsan_create_fiber(0);
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack;
      fiber.context.uc_stack.ss_size = stack_bytes;
      makecontext(&fiber.context, &Machine::body, 0);
    }
    main_sanitizer_ = __tsan_get_current_fiber();
    for (Barrier& barrier : barriers_) barrier.arrived = barrier.generation = 0;
    threads_ = threads, call_ = call, kernel_ = kernel, grid_ = grid;
    for (block_.z = 0; block_.z < grid.z; ++block_.z)
      for (block_.y = 0; block_.y < grid.y; ++block_.y)
        for (block_.x = 0; block_.x < grid.x; ++block_.x) run_block(bytes);
    __tsan_acquire(&end_);
    memories_.clear();
  }

  UNCHECKED void run_block(size_t bytes) {
#if !defined(__SANITIZE_THREAD__)
    memories_.clear();  // kept until the end of the launch there: nothing orders the blocks
#endif
    memories_.emplace_back(new unsigned char[bytes + 128]);
    shared_ = memories_.back().get();
    shared_ += -reinterpret_cast<uintptr_t>(shared_) % 128;
    std::memset(shared_, 0xff, bytes);
    for (int i = 0; i < threads_; ++i) fibers_[i].done = false;
    __tsan_release(&start_);
    current_ = 0, idle_ = 0;
    __tsan_switch_to_fiber(fibers_[0].sanitizer, 1);
    swapcontext(&main_, &fibers_[0].context);
  }
};

inline Machine& machine() { return Machine::machine_(); }

}  // namespace emulation

inline void __syncthreads() { emulation::machine().sync_block(); }
inline void __syncwarp() { emulation::machine().sync_warp(true); }

inline float __shfl_xor_sync(unsigned, float value, int mask) {
  auto& machine = emulation::machine();
  const auto bits = machine.exchange(std::bit_cast<uint32_t>(value), machine.lane() ^ mask);
  return std::bit_cast<float>(static_cast<uint32_t>(bits));
}

using std::min;
using std::max;

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __half2float(__half x) { return static_cast<float>(std::bit_cast<_Float16>(x.bits)); }
inline __half __float2half(float x) {
  return {std::bit_cast<uint16_t>(static_cast<_Float16>(x))};
}
inline float __bfloat162float(__nv_bfloat16 x) {
  return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16);
}
inline __nv_bfloat16 __float2bfloat16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};  // nearest, ties to even
}

namespace nvcuda::wmma {

struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
struct col_major {};
enum layout_t { mem_row_major, mem_col_major };
namespace precision {
struct tf32 {};
}  // namespace precision

inline float __float_to_tf32(float x) {  // to nearest, ties away from zero
  return std::bit_cast<float>((std::bit_cast<uint32_t>(x) + 0x1000u) & 0xffffe000u);
}

template <class Use, int M, int N, int K, class T, class Layout = void>
struct fragment;
template <int M, int N, int K, class T, class Layout>
struct fragment<matrix_a, M, N, K, T, Layout> {
  float value[M][K];
};
template <int M, int N, int K, class T, class Layout>
struct fragment<matrix_b, M, N, K, T, Layout> {
  float value[K][N];
};
template <int M, int N, int K>
struct fragment<accumulator, M, N, K, float> {
  float value[M][N];
};

inline float load(const __half& x) { return __half2float(x); }
inline float load(const __nv_bfloat16& x) { return __bfloat162float(x); }
// The tensor cores ignore the low bits of a tf32 operand.
inline float load(const float& x) {
  return std::bit_cast<float>(std::bit_cast<uint32_t>(x) & 0xffffe000u);
}

inline void check_aligned(const void* data, unsigned stride, size_t size) {
  if (reinterpret_cast<uintptr_t>(data) % 32 || stride * size % 16)
    emulation::fail("a wmma tile is not aligned");
}

template <class Use, int M, int N, int K, class F, class Layout, class T>
void load_matrix_sync(fragment<Use, M, N, K, F, Layout>& f, const T* data, unsigned stride) {
  check_aligned(data, stride, sizeof(T));
  if (emulation::machine().lane()) return;
  constexpr bool by_row = std::is_same_v<Layout, row_major>;
  for (int i = 0; i < static_cast<int>(std::size(f.value)); ++i)
    for (int j = 0; j < static_cast<int>(std::size(f.value[0])); ++j)
      f.value[i][j] = load(by_row ? data[i * stride + j] : data[j * stride + i]);
}

template <int M, int N, int K, class T>
void fill_fragment(fragment<accumulator, M, N, K, T>& f, float value) {
  for (auto& row : f.value)
    for (float& x : row) x = value;
}

template <int M, int N, int K, class T, class A, class B>
void mma_sync(fragment<accumulator, M, N, K, float>& d, const fragment<matrix_a, M, N, K, T, A>& a,
              const fragment<matrix_b, M, N, K, T, B>& b,
              const fragment<accumulator, M, N, K, float>& c) {
  if (emulation::machine().lane()) return;
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < N; ++j) d.value[i][j] = c.value[i][j];
  for (int i = 0; i < M; ++i)
    for (int k = 0; k < K; ++k)
      for (int j = 0; j < N; ++j) d.value[i][j] += a.value[i][k] * b.value[k][j];
}

template <int M, int N, int K>
void store_matrix_sync(float* data, const fragment<accumulator, M, N, K, float>& f, unsigned stride,
                       layout_t layout) {
  check_aligned(data, stride, sizeof(float));
  if (emulation::machine().lane()) return;
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < N; ++j)
      data[layout == mem_row_major ? i * stride + j : j * stride + i] = f.value[i][j];
}

}  // namespace nvcuda::wmma

template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, int threads, size_t bytes, cudaStream_t,
                   const A&... arguments) {
  auto call = [&] { kernel(arguments...); };
  using Call = decltype(call);
  emulation::machine().run(
      grid, threads, bytes, [](void* data) { (*static_cast<Call*>(data))(); }, &call);
  return cudaSuccess;
}
