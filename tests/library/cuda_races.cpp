// Runs every CUDA kernel under emulation, to be built with -fsanitize=thread or =address.
//
// Values are compared elsewhere (test_cuda_values.py); here every output must be written.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <vector>

#include "kernels.h"

using namespace polyfusion;

namespace {

// A buffer of exactly its size, so that an access beyond it shows.
class Buffer {
  size_t bytes_;
  std::unique_ptr<unsigned char[]> data_;
  Type type_;

 public:
  Buffer(Type type, long elements)
      : bytes_(elements * size_of(type)), data_(new unsigned char[bytes_]), type_(type) {
    std::memset(data_.get(), 0xff, bytes_);
  }
  // Small values of either sign.
  Buffer& fill() {
    const bool single = size_of(type_) == 4;
    for (size_t i = 0; i < bytes_ / size_of(type_); ++i) {
      const float x = static_cast<float>(std::rand() % 1000) / 2000.0f - 0.2f;
      unsigned bits;
      std::memcpy(&bits, &x, 4);
      // bfloat16 is the upper half of a float; as float16 the same bits are small numbers too
      if (single) std::memcpy(data_.get() + 4 * i, &bits, 4);
      else std::memcpy(data_.get() + 2 * i, reinterpret_cast<unsigned char*>(&bits) + 2, 2);
    }
    return *this;
  }
  void* get() { return data_.get(); }
  operator void*() { return data_.get(); }
  bool written() const {
    for (size_t i = 0; i < bytes_; i += size_of(type_)) {
      bool all = true;
      for (size_t j = 0; j < size_of(type_); ++j) all &= data_[i + j] == 0xff;
      if (all) return false;
    }
    return true;
  }
};

void expect(const char* what, Error error, std::initializer_list<const Buffer*> outputs) {
  bool written = true;
  for (const Buffer* output : outputs) written &= output->written();
  if (error == 0 && written) return;
  std::fprintf(stderr, "%s: error %d, outputs %s\n", what, error, written ? "whole" : "with gaps");
  std::exit(1);
}

void hadamard(Type type, Form form, bool framed) {
  const int B = framed ? 1 : 2, T = 35, d0 = 70, d1 = 9, k = 66, m = 67, n = 3;
  const int affine = form == Form::cp, rows1 = framed ? B * T : B;
  Buffer z0(type, B * T * d0), z1(type, rows1 * d1), a0(type, (d0 + affine) * k);
  Buffer a1(type, (d1 + affine) * k), b0(type, d0 * k), b1(type, d1 * k), out(type, m * k);
  Buffer bias(type, m), noise(type, B * T * n), y(type, B * T * (m + n)), dy(type, B * T * (m + n));
  for (Buffer* x : {&z0, &z1, &a0, &a1, &b0, &b1, &out, &bias, &noise, &dy}) x->fill();
  Hadamard g{};
  g.type = type, g.form = form, g.clips = B, g.frames = T, g.framed = framed;
  g.sizes[0] = d0, g.sizes[1] = d1, g.rank = k, g.outputs = m, g.noise_columns = n;
  g.views[0] = z0, g.views[1] = z1, g.first[0] = a0, g.first[1] = a1, g.out = out;
  if (form == Form::cmf) g.second[0] = b0, g.second[1] = b1;
  if (!affine) g.bias = bias;
  expect("hadamard_forward", hadamard_forward(g, noise, y, nullptr), {&y});

  Buffer dz0(type, B * T * d0), dz1(type, rows1 * d1), da0(type, (d0 + affine) * k);
  Buffer da1(type, (d1 + affine) * k), db0(type, d0 * k), db1(type, d1 * k), dout(type, m * k);
  Buffer dbias(type, m);
  Buffer workspace(Type::float32, hadamard_backward_bytes(g) / 4 + 1);
  const HadamardGradients d{{dz0, dz1}, {da0, da1}, {db0, db1}, dout, dbias};
  const Error error = hadamard_backward(g, dy, d, workspace, nullptr);
  expect("hadamard_backward", error, {&dz0, &dz1, &da0, &da1, &dout});
  if (form == Form::cmf) expect("hadamard_backward", error, {&db0, &db1});
  if (!affine) expect("hadamard_backward", error, {&dbias});
}

void tucker(Type type) {
  const int B = 2, T = 35, d0 = 20, d1 = 9, k1 = 34, k2 = 18, k3 = 5, m = 66, n = 1;
  Buffer z0(type, B * T * d0), z1(type, B * d1), u2(type, (d0 + 1) * k2), u3(type, (d1 + 1) * k3);
  Buffer core(type, k1 * k2 * k3), out(type, m * k1), noise(type, B * T * n);
  Buffer y(type, B * T * (m + n)), dy(type, B * T * (m + n));
  for (Buffer* x : {&z0, &z1, &u2, &u3, &core, &out, &noise, &dy}) x->fill();
  Tucker t{};
  t.type = type, t.clips = B, t.frames = T, t.sizes[0] = d0, t.sizes[1] = d1;
  t.ranks[0] = k1, t.ranks[1] = k2, t.ranks[2] = k3, t.outputs = m, t.noise_columns = n;
  t.views[0] = z0, t.views[1] = z1, t.core = core, t.factors[0] = u2, t.factors[1] = u3, t.out = out;
  Buffer forward(Type::float32, tucker_forward_bytes(t) / 4 + 1);
  expect("tucker_forward", tucker_forward(t, noise, y, forward, nullptr), {&y});
  Buffer dz0(type, B * T * d0), dz1(type, B * d1), du2(type, (d0 + 1) * k2);
  Buffer du3(type, (d1 + 1) * k3), dcore(type, k1 * k2 * k3), dout(type, m * k1);
  Buffer workspace(Type::float32, tucker_backward_bytes(t) / 4 + 1);
  const TuckerGradients d{{dz0, dz1}, dcore, {du2, du3}, dout};
  expect("tucker_backward", tucker_backward(t, dy, d, workspace, nullptr),
         {&dz0, &dz1, &dcore, &du2, &du3, &dout});
}

void norm(Type type, bool channels_last) {
  const int B = 2, T = 2, C = 11, P = 12;
  const Type single = Type::float32;
  Buffer u(type, B * T * C * P), s(type, B * C * P), dy(type, B * T * C * P), y(type, B * T * C * P);
  Buffer weight(single, C), bias(single, C), mean(single, C), var(single, C);
  for (Buffer* x : {&u, &s, &dy, &weight, &bias}) x->fill();
  Norm x{};
  x.type = type, x.channels_last = channels_last, x.frames = B * T, x.per_clip = T;
  x.channels = C, x.pixels = P, x.u = u, x.s = s, x.eps = 1e-5f, x.slope = 0.2f;
  Buffer workspace(single, norm_statistics_bytes(x) / 4 + norm_sums_bytes(x) / 4);
  const auto channel = [](Buffer& b) { return static_cast<float*>(b.get()); };
  expect("norm_statistics",
         norm_statistics(x, channel(mean), channel(var), workspace, nullptr), {&mean, &var});
  x.mean = channel(mean), x.var = channel(var);
  x.weight = channel(weight), x.bias = channel(bias);
  expect("norm_apply", norm_apply(x, y, nullptr), {&y});
  Buffer sums(single, 2 * C), du(type, B * T * C * P), ds(type, B * C * P);
  expect("norm_sums", norm_sums(x, dy, channel(sums), workspace, nullptr), {&sums});
  expect("norm_backward", norm_backward(x, dy, channel(sums), B * T * P, du, ds, nullptr), {&du, &ds});
}

void final_block(Type type) {
  const int N = 3, C = 70, O = 3, H = 5, W = 17;  // 12 tiles
  Buffer x(type, N * C * H * W), weight(type, C * O * 16), y(type, N * O * 4 * H * W);
  Buffer dy(type, N * O * 4 * H * W), dx(type, N * C * H * W), dweight(type, C * O * 16);
  for (Buffer* b : {&x, &weight, &dy}) b->fill();
  const Final f{type, N, C, O, H, W, x, weight};
  expect("final_forward", final_forward(f, y, nullptr), {&y});
  Buffer workspace(Type::float32, final_backward_bytes(f) / 4);
  expect("final_backward", final_backward(f, dy, y, dx, dweight, workspace, nullptr), {&dx, &dweight});
}

}  // namespace

int main() {
  for (const Type type : {Type::float32, Type::tensor_float32, Type::float16, Type::bfloat16}) {
    hadamard(type, Form::cp, false);
    hadamard(type, Form::cmf_sr, true);
    hadamard(type, Form::cmf, false);
    tucker(type);
    final_block(type);
  }
  for (const Type type : {Type::float32, Type::bfloat16})
    for (const bool channels_last : {false, true}) norm(type, channels_last);
  std::puts("every kernel ran");
}
