// The forward of CP and CMF, which Tucker goes through as well.
#pragma once

#include "products.cuh"

namespace polyfusion {

struct Forward {
  Hadamard g;
  const void* clip_matrices;  // Tucker: (B, k_1, k), applied to the hidden before out (m, k_1)
  int clip_rank;              // k_1
  const void* noise;
  void* y;
};

Error run_forward(const Forward& f, Stream stream);

}  // namespace polyfusion
