// Several matrix products in one launch, split over their depth where that fills the device, and the
// fixed-order sums that follow: no atomics, so results do not change from run to run.
#pragma once

#include "matmul.cuh"

namespace polyfusion {

// result (rows, columns) = sum over terms of a b, for each of a batch. a is (rows, depth), or (depth,
// rows) if transposed_a; b is (depth, columns), or (columns, depth) if transposed_b; not both.
struct Product {
  Matrix a[2], b[2];
  bool transposed_a, transposed_b;
  int terms;
  int rows, columns, depth;
  void* result;  // contiguous
  int batches = 1;
  int64_t batch_a = 0, batch_b = 0;  // elements from one matrix of a batch to the next
  int splits = 1;
  float* partial = nullptr;  // (splits, batches, rows, columns) if splits > 1
};

// result (outer, inner) = sum over the middle of partial (outer, count, inner).
struct Sum {
  const float* partial;
  void* result;
  int64_t outer, inner;
  int count;
};

constexpr int most_products = 10;

// Hands out parts of one buffer; with a null buffer it only counts.
class Workspace {
  unsigned char* data_;
  size_t used_ = 0;

 public:
  explicit Workspace(void* data) : data_(static_cast<unsigned char*>(data)) {}
  void* take(int64_t elements, size_t size) {
    void* part = data_ ? data_ + used_ : nullptr;
    used_ += (elements * size + 255) / 256 * 256;
    return part;
  }
  size_t used() const { return used_; }
  bool counting() const { return data_ == nullptr; }
};

struct ProductList {
  Product item[most_products];
  int count = 0;
};
struct SumList {
  Sum item[most_products];
  int count = 0;
};

// Products that do not depend on each other.
class Batch {
  Type type_;
  Workspace& workspace_;
  ProductList products_;
  SumList sums_;

 public:
  Batch(Type type, Workspace& workspace) : type_(type), workspace_(workspace) {}
  void add(Product product);
  void add(const Sum& sum) { sums_.item[sums_.count++] = sum; }
  Error run(Stream stream) const;
};

// a b of one term, into `result`.
inline Product product(const Matrix& a, bool transposed_a, const Matrix& b, bool transposed_b,
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

}  // namespace polyfusion
