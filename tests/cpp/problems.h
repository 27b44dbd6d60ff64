// Problems for tests: shapes in, anyflash_problem out.
#pragma once

#include <algorithm>
#include <cstring>
#include <initializer_list>

#include "anyflash/anyflash.h"

namespace anyflash {

/// A contiguous tensor without memory.
inline anyflash_tensor tensor(std::initializer_list<int64_t> shape, int32_t dtype,
                              int32_t device_type = ANYFLASH_CPU, void* data = nullptr) {
  anyflash_tensor t{};
  t.data = data;
  t.dtype = dtype;
  t.device_type = device_type;
  t.ndim = static_cast<int32_t>(shape.size());
  std::copy(shape.begin(), shape.end(), t.shape);
  uint64_t stride = 1; // unsigned: the outermost product of absurd shapes may overflow
  for (int dim = t.ndim - 1; dim >= 0; --dim) {
    t.strides[dim] = static_cast<int64_t>(stride);
    stride *= static_cast<uint64_t>(t.shape[dim]);
  }
  return t;
}

struct Shape {
  int64_t batch = 1, seqlen_q = 64, seqlen_k = 64, heads = 2, heads_k = 2, d = 64, dv = 64;
};

inline anyflash_problem dense(const Shape& s, int32_t dtype = ANYFLASH_FLOAT32,
                              int32_t device_type = ANYFLASH_CPU) {
  anyflash_problem p{};
  p.struct_size = sizeof p;
  p.op = ANYFLASH_FORWARD;
  p.q = tensor({s.batch, s.seqlen_q, s.heads, s.d}, dtype, device_type);
  p.k = tensor({s.batch, s.seqlen_k, s.heads_k, s.d}, dtype, device_type);
  p.v = tensor({s.batch, s.seqlen_k, s.heads_k, s.dv}, dtype, device_type);
  p.o = tensor({s.batch, s.seqlen_q, s.heads, s.dv}, dtype, device_type);
  p.window_left = p.window_right = -1;
  p.scale = 0.125f;
  return p;
}

/// The same problem's backward, with every gradient.
inline anyflash_problem backward_of(anyflash_problem p) {
  const int heads_at = p.q.ndim - 2;
  const int32_t device = p.q.device_type;
  p.op = ANYFLASH_BACKWARD;
  p.lse = p.q.ndim == 4
              ? tensor({p.q.shape[0], p.q.shape[2], p.q.shape[1]}, ANYFLASH_FLOAT32, device)
              : tensor({p.q.shape[heads_at], p.q.shape[0]}, ANYFLASH_FLOAT32, device);
  p.dout = p.o;
  p.dq = p.q;
  p.dk = p.k;
  p.dv = p.v;
  return p;
}

/// Packed sequences; cu_seqlens point into the caller's arrays, which may be null.
inline anyflash_problem packed(const Shape& s, int64_t total_q, int64_t total_k, int32_t* cu_q,
                               int32_t* cu_k, int32_t dtype = ANYFLASH_FLOAT32,
                               int32_t device_type = ANYFLASH_CPU) {
  anyflash_problem p = dense(s, dtype, device_type);
  p.q = tensor({total_q, s.heads, s.d}, dtype, device_type);
  p.k = tensor({total_k, s.heads_k, s.d}, dtype, device_type);
  p.v = tensor({total_k, s.heads_k, s.dv}, dtype, device_type);
  p.o = tensor({total_q, s.heads, s.dv}, dtype, device_type);
  p.cu_seqlens_q = tensor({s.batch + 1}, ANYFLASH_INT32, device_type, cu_q);
  p.cu_seqlens_k = tensor({s.batch + 1}, ANYFLASH_INT32, device_type, cu_k);
  p.max_seqlen_q = s.seqlen_q;
  p.max_seqlen_k = s.seqlen_k;
  return p;
}

} // namespace anyflash
