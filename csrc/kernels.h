// What the kernels offer: plain structs of sizes and pointers, and the functions that launch.
//
// Nothing here allocates or synchronises. Tensors are contiguous; letters as in the Python package:
// B clips, T frames, k rank, m outputs, n noise columns.
#pragma once

#include <cstddef>
#include <cstdint>

namespace polyfusion {

using Stream = void*;  // cudaStream_t
using Error = int;     // cudaError_t

// Element type, and for fp32 whether products may round their operands to tf32.
enum class Type { float32, tensor_float32, float16, bfloat16 };
constexpr size_t size_of(Type type) {
  return type == Type::float32 || type == Type::tensor_float32 ? 4 : 2;
}

// How the projections p = V1' z1 (+ bias), q = V2' z2 (+ bias) of two views become the hidden h of
// y = out h + bias; r and s are the projections by the second pair of weights.
enum class Form {
  cp,     // h = p q; Tucker contracts a clip's view with the core by it too (q = 1)
  cmf,    // h = p + q + r s
  cmf_sr  // h = p + q + p q, the shared row space
};

struct Hadamard {
  Type type;
  Form form;
  int clips, frames;
  bool framed;        // whether view 1 is (B, T, d_1), else (B, d_1); view 0 is (B, T, d_0)
  int sizes[2];       // d_0, d_1
  int rank, outputs;  // k, m
  int noise_columns;  // n
  const void* views[2];   // views[1] may be null: q = 1
  const void* first[2];   // CMF's (d_v, k), or CP's factors (d_v + 1, k)
  const void* second[2];  // (d_v, k), of CMF only
  const void* out;        // (m, k)
  const void* bias;       // (m,) or null
};

// y (B, T, m + n), one launch.
Error hadamard_forward(const Hadamard& g, const void* noise, void* y, Stream stream);

// Gradients; those of `first` have its row of biases. Four launches.
struct HadamardGradients {
  void* views[2];
  void* first[2];
  void* second[2];
  void* out;
  void* bias;
};
size_t hadamard_backward_bytes(const Hadamard& g);
Error hadamard_backward(const Hadamard& g, const void* dy, const HadamardGradients& d,
                        void* workspace, Stream stream);

// Tucker: y = out (core x2 p x3 q), with view 0 (B, T, d_0), p (B, T, k_2), view 1 (B, d_1), q (B, k_3).
struct Tucker {
  Type type;
  int clips, frames;
  int sizes[2];
  int ranks[3];  // k_1, k_2, k_3
  int outputs, noise_columns;
  const void* views[2];
  const void* core;        // (k_1, k_2, k_3)
  const void* factors[2];  // (d_v + 1, k_{v+2})
  const void* out;         // (m, k_1)
};
struct TuckerGradients {
  void* views[2];
  void* core;
  void* factors[2];
  void* out;
};
size_t tucker_forward_bytes(const Tucker& t);
Error tucker_forward(const Tucker& t, const void* noise, void* y, void* workspace, Stream stream);
size_t tucker_backward_bytes(const Tucker& t);
Error tucker_backward(const Tucker& t, const void* dy, const TuckerGradients& d, void* workspace,
                      Stream stream);

// Batch normalisation of u + s and a leaky ReLU. u is (N, C, H, W), s is (N / per_clip, C, H, W) or
// null; both are dense, in NCHW or channels_last. Everything per channel is fp32.
struct Norm {
  Type type;
  bool channels_last;
  int frames, per_clip, channels, pixels;  // N, T, C, H W
  const void* u;
  const void* s;
  const float* weight;
  const float* bias;
  const float* mean;
  const float* var;  // biased
  float eps, slope;
};

// Mean and biased variance of u + s. Two launches.
size_t norm_statistics_bytes(const Norm& x);
Error norm_statistics(const Norm& x, float* mean, float* var, void* workspace, Stream stream);
Error norm_apply(const Norm& x, void* y, Stream stream);

// sums (2, C): of the gradient g before the activation, and of g times the normalised input; they
// are the gradients of bias and weight. Two launches.
size_t norm_sums_bytes(const Norm& x);
Error norm_sums(const Norm& x, const void* dy, float* sums, void* workspace, Stream stream);
// du and ds (if s). With sums over `count` elements per channel, mean and variance are those of the
// input; without, they are constants.
Error norm_backward(const Norm& x, const void* dy, const float* sums, float count, void* du,
                    void* ds, Stream stream);

// tanh of a transposed convolution, 4 x 4 with stride 2 and padding 1, to at most 4 channels.
// x (N, C, H, W) and y (N, out, 2 H, 2 W) in channels_last, weight (C, out, 4, 4).
struct Final {
  Type type;
  int frames, channels, outputs, height, width;
  const void* x;
  const void* weight;
};
size_t final_shared_bytes(const Final& f);  // of one block
Error final_forward(const Final& f, void* y, Stream stream);
size_t final_backward_bytes(const Final& f);
// Two launches.
Error final_backward(const Final& f, const void* dy, const void* y, void* dx, void* dweight,
                     void* workspace, Stream stream);

// A CUDA error in words.
const char* describe(Error error);

}  // namespace polyfusion
