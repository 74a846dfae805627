// The kernels as torch operators, on the LibTorch stable ABI: one binary serves torch 2.11 and later.
//
// Compiled with -DPOLYFUSION_EMULATED the same operators run the kernels on CPU tensors.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "kernels.h"

namespace {

using polyfusion::Error;
using polyfusion::Form;
using polyfusion::Type;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

constexpr size_t most_shared_bytes = 160 * 1024;  // of a block, on every supported device

void check(Error error) {
  STD_TORCH_CHECK(error == 0, "polyfusion: CUDA error: ", polyfusion::describe(error));
}

// The device of a tensor made current, and its current stream.
struct Device {
#ifdef POLYFUSION_EMULATED
  explicit Device(const Tensor& x) { STD_TORCH_CHECK(x.is_cpu(), "expected a CPU tensor"); }
  polyfusion::Stream stream = nullptr;
#else
  torch::stable::accelerator::DeviceGuard guard;
  polyfusion::Stream stream = nullptr;
  explicit Device(const Tensor& x) : guard(x.get_device_index()) {
    STD_TORCH_CHECK(x.is_cuda(), "expected a CUDA tensor");
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  }
#endif
};

Type type_of(const Tensor& x, bool tf32) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return tf32 ? Type::tensor_float32 : Type::float32;
    case ScalarType::Half: return Type::float16;
    case ScalarType::BFloat16: return Type::bfloat16;
    default: STD_TORCH_CHECK(false, "expected float32, float16 or bfloat16");
  }
  return Type::float32;
}

int size(int64_t x) {
  STD_TORCH_CHECK(x >= 0 && x < (int64_t{1} << 31), "a size of ", x, " is beyond 31 bits");
  return static_cast<int>(x);
}

Tensor empty(const Tensor& like, const std::vector<int64_t>& shape) {
  return torch::stable::new_empty(like, {shape.data(), shape.size()});
}

Tensor empty_bytes(const Tensor& like, size_t bytes) {
  const int64_t shape = static_cast<int64_t>(bytes > 0 ? bytes : 1);
  return torch::stable::new_empty(like, {&shape, 1}, ScalarType::Byte);
}

Tensor empty_floats(const Tensor& like, const std::vector<int64_t>& shape) {
  return torch::stable::new_empty(like, {shape.data(), shape.size()}, ScalarType::Float);
}

// Every tensor of one operator: of one dtype, on one device, made contiguous.
class Operands {
  const Tensor& first_;

 public:
  explicit Operands(const Tensor& first) : first_(first) {}
  Tensor operator()(const Tensor& x) const {
    STD_TORCH_CHECK(x.scalar_type() == first_.scalar_type(), "expected tensors of one dtype");
    STD_TORCH_CHECK(x.device() == first_.device(), "expected tensors on one device");
    return x.is_contiguous() ? x : torch::stable::contiguous(x);
  }
  std::optional<Tensor> operator()(const std::optional<Tensor>& x) const {
    return x ? std::optional<Tensor>((*this)(*x)) : std::nullopt;
  }
  Tensors operator()(Tensors list) const {
    for (Tensor& x : list) x = (*this)(x);
    return list;
  }
};

void check_shape(const char* name, const Tensor& x, const std::vector<int64_t>& shape) {
  bool same = x.dim() == static_cast<int64_t>(shape.size());
  for (size_t i = 0; same && i < shape.size(); ++i) same = x.size(i) == shape[i];
  STD_TORCH_CHECK(same, name, " has an unexpected shape");
}

const void* data(const std::optional<Tensor>& x) { return x ? x->const_data_ptr() : nullptr; }

// The two views: B clips of T frames, or B T clips of one frame, and the leading sizes of the result.
struct Views {
  Tensors views;
  std::vector<int64_t> leading;
  int clips, frames;
  bool framed[2];

  explicit Views(Tensors given) : views(std::move(given)) {
    STD_TORCH_CHECK(views.size() == 2, "the CUDA kernels fuse 2 views, got ", views.size(),
                    "; use kernels='triton' or 'eager'");
    for (int v = 0; v < 2; ++v) {
      STD_TORCH_CHECK(views[v].dim() == 2 || views[v].dim() == 3, "a view is (B, T, d) or (B, d)");
      framed[v] = views[v].dim() == 3;
    }
    const Tensor& most = views[framed[1] ? 1 : 0];
    leading.assign(most.sizes().begin(), most.sizes().end() - 1);
    for (int v = 0; v < 2; ++v) {
      STD_TORCH_CHECK(views[v].size(0) == leading[0] && (!framed[v] || views[v].size(1) == leading[1]),
                      "the views disagree in B or T");
    }
    clips = size(leading[0]);
    frames = leading.size() == 2 ? size(leading[1]) : 1;
    size(static_cast<int64_t>(clips) * frames);
  }
  std::vector<int64_t> with(int64_t last) const {
    std::vector<int64_t> shape = leading;
    shape.push_back(last);
    return shape;
  }
};

int noise_columns(const std::optional<Tensor>& noise, const Views& views) {
  if (!noise) return 0;
  const int64_t n = noise->size(noise->dim() - 1);
  check_shape("noise", *noise, views.with(n));
  return size(n);
}

void check_rank(Type type, int64_t rank) {
  const size_t operands = 56 * 1024, tile = 32 * (rank + 256) * polyfusion::size_of(type);
  STD_TORCH_CHECK(operands + tile <= most_shared_bytes, "rank ", rank,
                  " needs more shared memory than a block has; use kernels='triton' or 'eager'");
}

// Arguments of cp_* and cmf_*, in the kernels' order: the framed view first.
struct HadamardArguments {
  Views views;
  Tensors first, second;
  Tensor out;
  std::optional<Tensor> bias;
  int order[2] = {0, 1};
  polyfusion::Hadamard g{};

  HadamardArguments(Form form, Tensors given, Tensors first_given, Tensors second_given,
                    const Tensor& out_given, const std::optional<Tensor>& bias_given, bool tf32)
      : views([&] {
          STD_TORCH_CHECK(!given.empty(), "expected 2 views");
          return Operands(given[0])(given);
        }()) {
    const Operands operand(views.views[0]);
    first = operand(first_given), second = operand(second_given);
    out = operand(out_given), bias = operand(bias_given);
    g.type = type_of(out, tf32);
    g.form = form;
    const bool cmf = g.form == Form::cmf;
    STD_TORCH_CHECK(first.size() == 2 && second.size() == (cmf ? 2u : 0u),
                    "expected a pair of weights for each projection");
    if (views.framed[1] && !views.framed[0]) order[0] = 1, order[1] = 0;
    STD_TORCH_CHECK(out.dim() == 2, "out is not a matrix");
    g.outputs = size(out.size(0)), g.rank = size(out.size(1));
    check_rank(g.type, g.rank);
    g.framed = views.framed[0] == views.framed[1];
    g.clips = g.framed ? 1 : views.clips;
    g.frames = g.framed ? views.clips * views.frames : views.frames;
    for (int i = 0; i < 2; ++i) {
      const int v = order[i];
      const int64_t d = views.views[v].size(views.views[v].dim() - 1);
      g.sizes[i] = size(d);
      g.views[i] = views.views[v].const_data_ptr();
      check_shape("a weight", first[v], {d + (g.form == Form::cp ? 1 : 0), g.rank});
      g.first[i] = first[v].const_data_ptr();
      if (!cmf) continue;
      check_shape("a weight", second[v], {d, g.rank});
      g.second[i] = second[v].const_data_ptr();
    }
    g.out = out.const_data_ptr();
    if (bias) check_shape("bias", *bias, {g.outputs});
    g.bias = data(bias);
  }
};

Tensor forward(HadamardArguments x, const std::optional<Tensor>& noise) {
  const Device device(x.out);
  const auto dense_noise = Operands(x.out)(noise);
  x.g.noise_columns = noise_columns(dense_noise, x.views);
  Tensor y = empty(x.out, x.views.with(x.g.outputs + x.g.noise_columns));
  check(polyfusion::hadamard_forward(x.g, data(dense_noise), y.mutable_data_ptr(), device.stream));
  return y;
}

Tensor cp_forward(Tensors views, Tensors factors, Tensor out, std::optional<Tensor> noise,
                  bool tf32) {
  return forward({Form::cp, views, factors, {}, out, std::nullopt, tf32}, noise);
}

// Without `second` the row space is shared.
Tensor cmf_forward(Tensors views, Tensors first, Tensors second, Tensor out, Tensor bias,
                   std::optional<Tensor> noise, bool tf32) {
  const Form form = second.empty() ? Form::cmf_sr : Form::cmf;
  return forward({form, views, first, second, out, bias, tf32}, noise);
}

// Hands out gradients in the order of the operator's arguments; an empty tensor where not needed.
class Gradients {
  int64_t needs_;

 public:
  Tensors all;
  explicit Gradients(int64_t needs) : needs_(needs) {}
  void* add(const Tensor& like, const std::vector<int64_t>& shape) {
    const bool needed = needs_ >> all.size() & 1;
    all.push_back(empty(like, needed ? shape : std::vector<int64_t>{0}));
    return needed ? all.back().mutable_data_ptr() : nullptr;
  }
  void* add(const Tensor& x) { return add(x, {x.sizes().begin(), x.sizes().end()}); }
};

// `needs` has bit i set if gradient i of (views, first, second, out, bias) is wanted.
Tensors backward(const Tensor& grad, HadamardArguments x, int64_t needs) {
  const Device device(x.out);
  const Tensor dy = Operands(x.out)(grad);
  const int64_t width = dy.size(dy.dim() - 1);
  check_shape("the gradient", dy, x.views.with(width));
  x.g.noise_columns = size(width - x.g.outputs);
  Gradients gradients(needs);
  polyfusion::HadamardGradients to{};
  const auto place = [&](void* (&into)[2], const Tensors& list) {
    for (size_t v = 0; v < list.size(); ++v) into[x.order[v]] = gradients.add(list[v]);
  };
  place(to.views, x.views.views);
  place(to.first, x.first);
  place(to.second, x.second);
  to.out = gradients.add(x.out);
  if (x.bias) to.bias = gradients.add(*x.bias);
  Tensor workspace = empty_bytes(x.out, polyfusion::hadamard_backward_bytes(x.g));
  check(polyfusion::hadamard_backward(x.g, dy.const_data_ptr(), to, workspace.mutable_data_ptr(),
                                      device.stream));
  return gradients.all;
}

Tensors cp_backward(Tensor grad, Tensors views, Tensors factors, Tensor out, int64_t needs,
                    bool tf32) {
  return backward(grad, {Form::cp, views, factors, {}, out, std::nullopt, tf32}, needs);
}

Tensors cmf_backward(Tensor grad, Tensors views, Tensors first, Tensors second, Tensor out,
                     Tensor bias, int64_t needs, bool tf32) {
  const Form form = second.empty() ? Form::cmf_sr : Form::cmf;
  return backward(grad, {form, views, first, second, out, bias, tf32}, needs);
}

// Arguments of tucker_*: view 0 has frames or both views have, then every frame is its own clip.
struct TuckerArguments {
  Views views;
  Tensor core, out;
  Tensors factors;
  polyfusion::Tucker t{};

  TuckerArguments(Tensors given, const Tensor& core_given, Tensors factors_given,
                  const Tensor& out_given, bool tf32)
      : views([&] {
          STD_TORCH_CHECK(!given.empty(), "expected 2 views");
          return Operands(given[0])(given);
        }()) {
    const Operands operand(views.views[0]);
    core = operand(core_given), out = operand(out_given), factors = operand(factors_given);
    STD_TORCH_CHECK(views.framed[0] || !views.framed[1], "view 0 is constant, but view 1 is not");
    STD_TORCH_CHECK(core.dim() == 3 && out.dim() == 2 && factors.size() == 2,
                    "expected a core (k_1, k_2, k_3), out (m, k_1) and 2 factors");
    t.type = type_of(out, tf32);
    const bool same = views.framed[0] == views.framed[1];
    t.clips = same ? views.clips * views.frames : views.clips;
    t.frames = same ? 1 : views.frames;
    t.outputs = size(out.size(0));
    check_shape("out", out, {t.outputs, core.size(0)});
    for (int i = 0; i < 3; ++i) t.ranks[i] = size(core.size(i));
    size(static_cast<int64_t>(t.ranks[0]) * t.ranks[1]);
    check_rank(t.type, static_cast<int64_t>(t.ranks[0]) + t.ranks[1]);
    check_rank(t.type, t.ranks[2]);
    for (int v = 0; v < 2; ++v) {
      t.sizes[v] = size(views.views[v].size(views.views[v].dim() - 1));
      check_shape("a factor", factors[v], {int64_t{t.sizes[v]} + 1, t.ranks[v + 1]});
      t.views[v] = views.views[v].const_data_ptr();
      t.factors[v] = factors[v].const_data_ptr();
    }
    t.core = core.const_data_ptr(), t.out = out.const_data_ptr();
  }
};

Tensor tucker_forward(Tensors views, Tensor core, Tensors factors, Tensor out,
                      std::optional<Tensor> noise, bool tf32) {
  const Device device(out);
  TuckerArguments x(views, core, factors, out, tf32);
  const auto dense_noise = Operands(x.out)(noise);
  x.t.noise_columns = noise_columns(dense_noise, x.views);
  Tensor y = empty(x.out, x.views.with(x.t.outputs + x.t.noise_columns));
  Tensor workspace = empty_bytes(x.out, polyfusion::tucker_forward_bytes(x.t));
  check(polyfusion::tucker_forward(x.t, data(dense_noise), y.mutable_data_ptr(),
                                   workspace.mutable_data_ptr(), device.stream));
  return y;
}

// `needs` as above, of (views, core, factors, out).
Tensors tucker_backward(Tensor grad, Tensors views, Tensor core, Tensors factors, Tensor out,
                        int64_t needs, bool tf32) {
  const Device device(out);
  TuckerArguments x(views, core, factors, out, tf32);
  const Tensor dy = Operands(x.out)(grad);
  const int64_t width = dy.size(dy.dim() - 1);
  check_shape("the gradient", dy, x.views.with(width));
  x.t.noise_columns = size(width - x.t.outputs);
  Gradients gradients(needs);
  polyfusion::TuckerGradients to{};
  for (int v = 0; v < 2; ++v) to.views[v] = gradients.add(x.views.views[v]);
  to.core = gradients.add(x.core);
  for (int v = 0; v < 2; ++v) to.factors[v] = gradients.add(x.factors[v]);
  to.out = gradients.add(x.out);
  Tensor workspace = empty_bytes(x.out, polyfusion::tucker_backward_bytes(x.t));
  check(polyfusion::tucker_backward(x.t, dy.const_data_ptr(), to, workspace.mutable_data_ptr(),
                                    device.stream));
  return gradients.all;
}

// Sizes of 1 do not count: their strides are arbitrary.
void check_format(const Tensor& x, bool channels_last) {
  STD_TORCH_CHECK(x.dim() == 4, "expected (N, C, H, W)");
  const int64_t orders[2][4] = {{3, 2, 1, 0}, {1, 3, 2, 0}};
  int64_t stride = 1;
  for (const int64_t i : orders[channels_last]) {
    STD_TORCH_CHECK(x.numel() == 0 || x.size(i) == 1 || x.stride(i) == stride,
                    "expected dense tensors in one memory format");
    stride *= x.size(i);
  }
}

struct NormArguments {
  polyfusion::Norm x{};

  NormArguments(const Tensor& u, const std::optional<Tensor>& s, const Tensor* weight,
                const Tensor* bias, const Tensor* mean, const Tensor* var, double eps,
                double slope) {
    x.type = type_of(u, false);
    x.channels_last = !u.is_contiguous();
    check_format(u, x.channels_last);
    x.frames = size(u.size(0)), x.channels = size(u.size(1));
    x.pixels = size(u.size(2) * u.size(3));
    size(static_cast<int64_t>(x.channels) * x.pixels);
    x.per_clip = 1;
    x.u = u.const_data_ptr();
    if (s) {
      const int64_t clips = s->size(0);
      check_shape("s", *s, {clips, u.size(1), u.size(2), u.size(3)});
      STD_TORCH_CHECK(clips > 0 && x.frames % clips == 0, "s has ", clips, " clips for ", x.frames,
                      " frames");
      same(*s, u);
      x.per_clip = static_cast<int>(x.frames / clips);
      x.s = s->const_data_ptr();
    }
    const auto channel = [&](const Tensor* v) -> const float* {
      if (v == nullptr) return nullptr;
      STD_TORCH_CHECK(v->scalar_type() == ScalarType::Float && v->device() == u.device() &&
                          v->is_contiguous(),
                      "expected contiguous float32 per channel, on one device");
      check_shape("a tensor per channel", *v, {u.size(1)});
      return static_cast<const float*>(v->const_data_ptr());
    };
    x.weight = channel(weight), x.bias = channel(bias);
    x.mean = channel(mean), x.var = channel(var);
    x.eps = static_cast<float>(eps), x.slope = static_cast<float>(slope);
  }
  void same(const Tensor& a, const Tensor& u) const {
    STD_TORCH_CHECK(a.scalar_type() == u.scalar_type() && a.device() == u.device(),
                    "expected tensors of one dtype on one device");
    check_format(a, x.channels_last);
  }
  void same_shape(const Tensor& a, const Tensor& u) const {
    same(a, u);
    check_shape("a tensor like u", a, {u.size(0), u.size(1), u.size(2), u.size(3)});
  }
};

float* floats(const Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }

std::tuple<Tensor, Tensor> norm_statistics(Tensor u, std::optional<Tensor> s) {
  const Device device(u);
  const NormArguments a(u, s, nullptr, nullptr, nullptr, nullptr, 0, 0);
  Tensor mean = empty_floats(u, {u.size(1)}), var = empty_floats(u, {u.size(1)});
  Tensor workspace = empty_bytes(u, polyfusion::norm_statistics_bytes(a.x));
  check(polyfusion::norm_statistics(a.x, floats(mean), floats(var), workspace.mutable_data_ptr(),
                                    device.stream));
  return {mean, var};
}

Tensor norm_apply(Tensor u, std::optional<Tensor> s, Tensor weight, Tensor bias, Tensor mean,
                  Tensor var, double eps, double slope) {
  const Device device(u);
  const NormArguments a(u, s, &weight, &bias, &mean, &var, eps, slope);
  Tensor y = torch::stable::empty_like(u);
  check(polyfusion::norm_apply(a.x, y.mutable_data_ptr(), device.stream));
  return y;
}

Tensor norm_sums(Tensor grad, Tensor u, std::optional<Tensor> s, Tensor weight, Tensor bias,
                 Tensor mean, Tensor var, double eps, double slope) {
  const Device device(u);
  const NormArguments a(u, s, &weight, &bias, &mean, &var, eps, slope);
  a.same_shape(grad, u);
  Tensor sums = empty_floats(u, {2, u.size(1)});
  Tensor workspace = empty_bytes(u, polyfusion::norm_sums_bytes(a.x));
  check(polyfusion::norm_sums(a.x, grad.const_data_ptr(), floats(sums), workspace.mutable_data_ptr(),
                              device.stream));
  return sums;
}

// du and ds; ds is empty without s.
std::tuple<Tensor, Tensor> norm_backward(Tensor grad, Tensor u, std::optional<Tensor> s,
                                         Tensor weight, Tensor bias, Tensor mean, Tensor var,
                                         std::optional<Tensor> sums, double count, double eps,
                                         double slope) {
  const Device device(u);
  const NormArguments a(u, s, &weight, &bias, &mean, &var, eps, slope);
  a.same_shape(grad, u);
  if (sums) {
    check_shape("sums", *sums, {2, u.size(1)});
    STD_TORCH_CHECK(sums->scalar_type() == ScalarType::Float && sums->is_contiguous() &&
                        sums->device() == u.device(),
                    "sums: expected contiguous float32 on one device");
  }
  Tensor du = torch::stable::empty_like(u);
  Tensor ds = s ? torch::stable::empty_like(*s) : empty(u, {0});
  check(polyfusion::norm_backward(a.x, grad.const_data_ptr(),
                                  static_cast<const float*>(data(sums)), static_cast<float>(count),
                                  du.mutable_data_ptr(), s ? ds.mutable_data_ptr() : nullptr,
                                  device.stream));
  return {du, ds};
}

struct FinalArguments {
  Tensor weight;
  polyfusion::Final f{};

  FinalArguments(const Tensor& x, const Tensor& given, bool tf32) : weight(Operands(x)(given)) {
    f.type = type_of(x, tf32);
    check_format(x, true);
    f.frames = size(x.size(0)), f.channels = size(x.size(1));
    f.height = size(x.size(2)), f.width = size(x.size(3));
    size(x.size(0) * x.size(2) * x.size(3));
    STD_TORCH_CHECK(weight.dim() == 4, "expected a weight (C, out, 4, 4)");
    f.outputs = size(weight.size(1));
    check_shape("weight", weight, {x.size(1), f.outputs, 4, 4});
    STD_TORCH_CHECK(f.outputs >= 1 && f.outputs <= 4, "the CUDA kernel makes 1 to 4 channels, not ",
                    f.outputs, "; use kernels='triton' or 'eager'");
    STD_TORCH_CHECK(f.channels >= 1, "x has no channels");
    STD_TORCH_CHECK(polyfusion::final_shared_bytes(f) <= most_shared_bytes, f.channels,
                    " channels need more shared memory than a block has; use kernels='triton' or "
                    "'eager'");
    f.x = x.const_data_ptr(), f.weight = weight.const_data_ptr();
  }
  std::vector<int64_t> image_shape() const {
    return {f.frames, f.outputs, 2 * int64_t{f.height}, 2 * int64_t{f.width}};
  }
};

Tensor final_forward(Tensor x, Tensor weight, bool tf32) {
  const Device device(x);
  const FinalArguments a(x, weight, tf32);
  const auto shape = a.image_shape();
  const Tensor y = empty(x, {shape[0], shape[2], shape[3], shape[1]});
  check(polyfusion::final_forward(a.f, y.mutable_data_ptr(), device.stream));
  return torch::stable::transpose(torch::stable::transpose(y, 2, 3), 1, 2);
}

std::tuple<Tensor, Tensor> final_backward(Tensor grad, Tensor x, Tensor weight, Tensor y,
                                          bool tf32) {
  const Device device(x);
  const FinalArguments a(x, weight, tf32);
  for (const Tensor* image : {&grad, &y}) {
    check_shape("an image", *image, a.image_shape());
    STD_TORCH_CHECK(image->scalar_type() == x.scalar_type() && image->device() == x.device(),
                    "expected tensors of one dtype on one device");
    check_format(*image, true);
  }
  Tensor dx = torch::stable::empty_like(x), dweight = torch::stable::empty_like(a.weight);
  Tensor workspace = empty_bytes(x, polyfusion::final_backward_bytes(a.f));
  check(polyfusion::final_backward(a.f, grad.const_data_ptr(), y.const_data_ptr(),
                                   dx.mutable_data_ptr(), dweight.mutable_data_ptr(),
                                   workspace.mutable_data_ptr(), device.stream));
  return {dx, dweight};
}

}  // namespace

#ifdef POLYFUSION_EMULATED
#define NAMESPACE polyfusion_emulated
#define BACKEND CPU
#else
#define NAMESPACE polyfusion_cuda
#define BACKEND CUDA
#endif
#define DEFINE(space, m) STABLE_TORCH_LIBRARY(space, m)
#define IMPLEMENT(space, backend, m) STABLE_TORCH_LIBRARY_IMPL(space, backend, m)

DEFINE(NAMESPACE, m) {
  m.def(
      "cp_forward(Tensor[] views, Tensor[] factors, Tensor out, Tensor? noise, bool tf32) -> Tensor");
  m.def(
      "cp_backward(Tensor grad, Tensor[] views, Tensor[] factors, Tensor out, int needs, bool tf32) "
      "-> Tensor[]");
  m.def(
      "cmf_forward(Tensor[] views, Tensor[] first, Tensor[] second, Tensor out, Tensor bias, "
      "Tensor? noise, bool tf32) -> Tensor");
  m.def(
      "cmf_backward(Tensor grad, Tensor[] views, Tensor[] first, Tensor[] second, Tensor out, "
      "Tensor bias, int needs, bool tf32) -> Tensor[]");
  m.def(
      "tucker_forward(Tensor[] views, Tensor core, Tensor[] factors, Tensor out, Tensor? noise, "
      "bool tf32) -> Tensor");
  m.def(
      "tucker_backward(Tensor grad, Tensor[] views, Tensor core, Tensor[] factors, Tensor out, "
      "int needs, bool tf32) -> Tensor[]");
  m.def("norm_statistics(Tensor u, Tensor? s) -> (Tensor, Tensor)");
  m.def(
      "norm_apply(Tensor u, Tensor? s, Tensor weight, Tensor bias, Tensor mean, Tensor var, "
      "float eps, float slope) -> Tensor");
  m.def(
      "norm_sums(Tensor grad, Tensor u, Tensor? s, Tensor weight, Tensor bias, Tensor mean, "
      "Tensor var, float eps, float slope) -> Tensor");
  m.def(
      "norm_backward(Tensor grad, Tensor u, Tensor? s, Tensor weight, Tensor bias, Tensor mean, "
      "Tensor var, Tensor? sums, float count, float eps, float slope) -> (Tensor, Tensor)");
  m.def("final_forward(Tensor x, Tensor weight, bool tf32) -> Tensor");
  m.def(
      "final_backward(Tensor grad, Tensor x, Tensor weight, Tensor y, bool tf32) -> (Tensor, Tensor)");
}

IMPLEMENT(NAMESPACE, BACKEND, m) {
  m.impl("cp_forward", TORCH_BOX(&cp_forward));
  m.impl("cp_backward", TORCH_BOX(&cp_backward));
  m.impl("cmf_forward", TORCH_BOX(&cmf_forward));
  m.impl("cmf_backward", TORCH_BOX(&cmf_backward));
  m.impl("tucker_forward", TORCH_BOX(&tucker_forward));
  m.impl("tucker_backward", TORCH_BOX(&tucker_backward));
  m.impl("norm_statistics", TORCH_BOX(&norm_statistics));
  m.impl("norm_apply", TORCH_BOX(&norm_apply));
  m.impl("norm_sums", TORCH_BOX(&norm_sums));
  m.impl("norm_backward", TORCH_BOX(&norm_backward));
  m.impl("final_forward", TORCH_BOX(&final_forward));
  m.impl("final_backward", TORCH_BOX(&final_backward));
}
