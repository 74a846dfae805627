// Tucker: the clips' view meets the core, then the frames' view that matrix, through CP's kernel.
#include "hadamard.cuh"

namespace polyfusion {
namespace {

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

size_t tucker_forward_bytes(const Tucker& t) {
  return static_cast<size_t>(t.clips) * t.ranks[0] * t.ranks[1] * size_of(t.type);
}

Error tucker_forward(const Tucker& t, const void* noise, void* y, void* workspace, Stream stream) {
  // (B, k_1 k_2) = q core', q (B, k_3)
  Hadamard contraction{};
  contraction.type = t.type, contraction.form = Form::cp;
  contraction.clips = 1, contraction.frames = t.clips;
  contraction.sizes[0] = t.sizes[1], contraction.rank = t.ranks[2];
  contraction.outputs = t.ranks[0] * t.ranks[1];
  contraction.views[0] = t.views[1], contraction.first[0] = t.factors[1];
  contraction.out = t.core;
  const Error error = hadamard_forward(contraction, nullptr, workspace, stream);
  if (error != cudaSuccess) return error;

  Hadamard g{};
  g.type = t.type, g.form = Form::cp;
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
