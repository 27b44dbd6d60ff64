// The caller's problem -> normal form. Every refusal names the values and what to do about them.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <span>
#include <string>

#include "core/error.h"
#include "core/overlap.h"
#include "core/problem.h"
#include "core/tensor_checks.h"

namespace anyflash {
namespace {

using std::to_string;

constexpr int64_t longest_sequence = (int64_t{1} << 30) - 1;
constexpr int64_t largest_count = (int64_t{1} << 31) - 1; // of heads, and of sequences
constexpr int64_t largest_head_dim = 256;
// Below this a kernel's scale / softcap could overflow.
constexpr float smallest_softcap = 1e-20f;

std::string number(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%g", value);
  return text;
}

// The problem, part by part

struct Inputs {
  Named q, k, v, o, lse, alibi_slopes, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k;
  Named dout, dlse, dq, dk, dv;

  explicit Inputs(const anyflash_problem& p)
      : q{p.q, "q"}, k{p.k, "k"}, v{p.v, "v"}, o{p.o, "out"}, lse{p.lse, "lse"},
        alibi_slopes{p.alibi_slopes, "alibi_slopes"}, cu_seqlens_q{p.cu_seqlens_q, "cu_seqlens_q"},
        cu_seqlens_k{p.cu_seqlens_k, "cu_seqlens_k"}, seqused_q{p.seqused_q, "seqused_q"},
        seqused_k{p.seqused_k, "seqused_k"}, dout{p.dout, "dout"}, dlse{p.dlse, "dlse"},
        dq{p.dq, "dq"}, dk{p.dk, "dk"}, dv{p.dv, "dv"} {}
};

void check_kinds(const Inputs& in, bool packed) {
  const int rank = packed ? 3 : 4;
  const char* q_shape =
      packed ? "[total_q, heads, d] (packed)" : "[batch, seqlen_q, heads, d] (dense)";
  const char* k_shape =
      packed ? "[total_k, heads_k, d] (packed)" : "[batch, seqlen_k, heads_k, d] (dense)";
  const char* v_shape =
      packed ? "[total_k, heads_k, dv] (packed)" : "[batch, seqlen_k, heads_k, dv] (dense)";
  check_present(in.q, q_shape);
  check_present(in.k, k_shape);
  check_present(in.v, v_shape);
  check_rank(in.q, rank, q_shape);
  check_rank(in.k, rank, k_shape);
  check_rank(in.v, rank, v_shape);

  const int32_t dtype = in.q.tensor.dtype;
  if (dtype < ANYFLASH_FLOAT16 || dtype > ANYFLASH_FLOAT64)
    throw InvalidType("q has dtype " + dtype_name(dtype) +
                      "; it must be float16, bfloat16 or float32 (on the CPU; float64 for the "
                      "reference)");
  check_same_dtype(in.k, in.q);
  check_same_dtype(in.v, in.q);

  const int32_t device = in.q.tensor.device_type;
  if (device != ANYFLASH_CPU && device != ANYFLASH_CUDA)
    throw NotSupported("asked: attention on " + device_name(in.q.tensor) +
                       "; available: cpu (1) and cuda (2) of DLPack; missing: a backend for it");
  for (const Named* named :
       {&in.k, &in.v, &in.o, &in.lse, &in.alibi_slopes, &in.cu_seqlens_q, &in.cu_seqlens_k,
        &in.seqused_q, &in.seqused_k, &in.dout, &in.dlse, &in.dq, &in.dk, &in.dv})
    if (named->present()) check_same_device(*named, in.q);
}

/// Batch, lengths, heads and head dims of q, k, v, which have the right rank.
void read_shapes(const Inputs& in, Problem& problem) {
  const int first = problem.packed ? 0 : 1; // the dimension of rows
  const Named &q = in.q, &k = in.k, &v = in.v;
  if (!problem.packed) {
    if (k.size(0) != q.size(0))
      throw InvalidValue("q has batch " + to_string(q.size(0)) + " but k has batch " +
                         to_string(k.size(0)) + "; they must be equal");
    if (v.size(0) != q.size(0))
      throw InvalidValue("q has batch " + to_string(q.size(0)) + " but v has batch " +
                         to_string(v.size(0)) + "; they must be equal");
  }
  if (v.size(first) != k.size(first))
    throw InvalidValue("k has " + to_string(k.size(first)) + " rows but v has " +
                       to_string(v.size(first)) + "; they must be equal");
  problem.heads = q.size(first + 1);
  problem.heads_k = k.size(first + 1);
  problem.d = q.size(first + 2);
  problem.dv = v.size(first + 2);
  if (v.size(first + 1) != problem.heads_k)
    throw InvalidValue("k has " + to_string(problem.heads_k) + " heads but v has " +
                       to_string(v.size(first + 1)) + "; they must be equal");
  if (problem.heads_k == 0 ? problem.heads != 0 : problem.heads % problem.heads_k != 0)
    throw InvalidValue("q has " + to_string(problem.heads) + " heads and k has " +
                       to_string(problem.heads_k) +
                       "; the heads of q must be a multiple of the heads of k");
  if (k.size(first + 2) != problem.d)
    throw InvalidValue("q has head dim " + to_string(problem.d) + " but k has head dim " +
                       to_string(k.size(first + 2)) + "; they must be equal");
  problem.heads_k = std::max<int64_t>(problem.heads_k, 1); // no division by 0 when there is no head

  for (const auto& [size, name] : {std::pair(problem.d, "q and k"), std::pair(problem.dv, "v")})
    if (size < 1 || size > largest_head_dim)
      throw NotSupported("asked: head dim " + to_string(size) + " of " + name +
                         "; available: 1 to " + to_string(largest_head_dim) +
                         "; missing: kernels for it");
}

void check_length(int64_t length, const char* name) {
  if (length > longest_sequence)
    throw NotSupported("asked: " + std::string(name) + " " + to_string(length) +
                       "; available: sequences shorter than 2^30 = 1073741824; missing: wider "
                       "positions in the kernels");
}

void check_counts(const Problem& problem) {
  if (problem.batch > largest_count || problem.heads > largest_count)
    throw NotSupported("asked: batch " + to_string(problem.batch) + " and " +
                       to_string(problem.heads) +
                       " heads; available: fewer than 2^31 of each; missing: wider block indices "
                       "in the kernels");
}

void read_dense_lengths(const Inputs& in, Problem& problem) {
  problem.batch = in.q.size(0);
  problem.seqlen_q = in.q.size(1);
  problem.seqlen_k = in.k.size(1);
  check_length(problem.seqlen_q, "seqlen_q");
  check_length(problem.seqlen_k, "seqlen_k");
  check_counts(problem);
  problem.total_q = problem.batch * problem.seqlen_q;
  problem.total_k = problem.batch * problem.seqlen_k;
}

// Packed sequences

/// The values of an int32 vector on the CPU; empty when they are not readable here (on a GPU, or
/// planning without data).
std::span<const int32_t> readable(const Named& named) {
  if (named.tensor.device_type != ANYFLASH_CPU || !named.tensor.data) return {};
  return {static_cast<const int32_t*>(named.tensor.data), static_cast<size_t>(named.size(0))};
}

void check_cu_seqlens(const Named& cu_seqlens, int64_t total, int64_t stated_max,
                      const char* max_name, const char* rows_name) {
  const auto values = readable(cu_seqlens);
  if (values.empty()) return;
  const std::string name = cu_seqlens.name;
  if (values.front() < 0)
    throw InvalidValue(name + "[0] is " + to_string(values.front()) + "; it must be 0 or more");
  for (size_t b = 0; b + 1 < values.size(); ++b) {
    if (values[b + 1] < values[b])
      throw InvalidValue(name + " decreases: [" + to_string(b) + "] is " + to_string(values[b]) +
                         ", [" + to_string(b + 1) + "] is " + to_string(values[b + 1]) +
                         "; it must be a running sum of the lengths, starting with 0");
    const int64_t length = int64_t{values[b + 1]} - values[b];
    if (length > stated_max)
      throw InvalidValue(std::string(max_name) + " is " + to_string(stated_max) + " but sequence " +
                         to_string(b) + " of " + name + " has length " + to_string(length) +
                         "; it must be at least the longest length");
  }
  if (values.back() > total)
    throw InvalidValue(name + " ends with " + to_string(values.back()) + " but " + rows_name +
                       " has " + to_string(total) + " rows; its last entry must not be larger");
}

void check_seqused(const Named& seqused, const Named& cu_seqlens, int64_t batch) {
  if (!seqused.present()) return;
  check_dtype(seqused, ANYFLASH_INT32);
  check_rank(seqused, 1, "[batch]");
  check_shape(seqused, std::array{batch}, "[batch]");
  check_contiguous(seqused);
  const auto used = readable(seqused);
  const auto offsets = readable(cu_seqlens);
  if (offsets.empty()) return;
  for (size_t b = 0; b < used.size(); ++b) {
    const int64_t length = int64_t{offsets[b + 1]} - offsets[b];
    if (used[b] < 0 || used[b] > length)
      throw InvalidValue(std::string(seqused.name) + "[" + to_string(b) + "] is " +
                         to_string(used[b]) + " but sequence " + to_string(b) + " of " +
                         cu_seqlens.name + " has length " + to_string(length) +
                         "; it must be between 0 and the length");
  }
}

void read_packed_lengths(const anyflash_problem& raw, const Inputs& in, Problem& problem) {
  for (const Named* cu_seqlens : {&in.cu_seqlens_q, &in.cu_seqlens_k}) {
    check_dtype(*cu_seqlens, ANYFLASH_INT32);
    check_rank(*cu_seqlens, 1, "[batch + 1]");
    if (cu_seqlens->size(0) < 1)
      throw InvalidValue(std::string(cu_seqlens->name) +
                         " is empty; it must have batch + 1 entries, starting with 0");
    check_contiguous(*cu_seqlens);
  }
  if (in.cu_seqlens_q.size(0) != in.cu_seqlens_k.size(0))
    throw InvalidValue("cu_seqlens_q has " + to_string(in.cu_seqlens_q.size(0)) +
                       " entries but cu_seqlens_k has " + to_string(in.cu_seqlens_k.size(0)) +
                       "; both must have batch + 1");
  problem.batch = in.cu_seqlens_q.size(0) - 1;
  check_counts(problem);
  problem.total_q = in.q.size(0);
  problem.total_k = in.k.size(0);
  for (const auto& [length, name] :
       {std::pair(raw.max_seqlen_q, "max_seqlen_q"), std::pair(raw.max_seqlen_k, "max_seqlen_k")}) {
    if (length < 0)
      throw InvalidValue(std::string(name) + " is " + to_string(length) +
                         "; it must be at least the longest length, and 0 or more");
    check_length(length, name);
  }
  check_cu_seqlens(in.cu_seqlens_q, problem.total_q, raw.max_seqlen_q, "max_seqlen_q", "q");
  check_cu_seqlens(in.cu_seqlens_k, problem.total_k, raw.max_seqlen_k, "max_seqlen_k", "k");
  check_seqused(in.seqused_q, in.cu_seqlens_q, problem.batch);
  check_seqused(in.seqused_k, in.cu_seqlens_k, problem.batch);
  // No sequence is longer than the tensor: a generous maximum costs no blocks.
  problem.seqlen_q = std::min(raw.max_seqlen_q, problem.total_q);
  problem.seqlen_k = std::min(raw.max_seqlen_k, problem.total_k);

  problem.cu_seqlens_q = static_cast<const int32_t*>(in.cu_seqlens_q.tensor.data);
  problem.cu_seqlens_k = static_cast<const int32_t*>(in.cu_seqlens_k.tensor.data);
  problem.seqused_q = static_cast<const int32_t*>(in.seqused_q.tensor.data);
  problem.seqused_k = static_cast<const int32_t*>(in.seqused_k.tensor.data);
}

/// True for packed problems; both cu_seqlens or neither.
bool is_packed(const Inputs& in) {
  const bool q = in.cu_seqlens_q.present(), k = in.cu_seqlens_k.present();
  if (q != k)
    throw InvalidValue(std::string(q ? "cu_seqlens_q" : "cu_seqlens_k") + " is given but " +
                       (q ? "cu_seqlens_k" : "cu_seqlens_q") +
                       " is missing; packed problems need both, dense ones neither");
  for (const Named* seqused : {&in.seqused_q, &in.seqused_k})
    if (!q && seqused->present())
      throw InvalidValue(std::string(seqused->name) +
                         " is given without cu_seqlens_q and cu_seqlens_k; it belongs to packed "
                         "problems only");
  return q;
}

// Score and mask

void read_score(const anyflash_problem& raw, const Inputs& in, Problem& problem) {
  if (!std::isfinite(raw.scale))
    throw InvalidValue("scale is " + number(raw.scale) + "; it must be finite in float32");
  if (!std::isfinite(raw.softcap) || raw.softcap < 0 ||
      (raw.softcap > 0 && raw.softcap < smallest_softcap))
    throw InvalidValue("softcap is " + number(raw.softcap) +
                       "; it must be 0 (off) or a finite positive number, at least 1e-20");
  problem.scale = raw.scale;
  problem.softcap = raw.softcap;

  const Named& slopes = in.alibi_slopes;
  if (!slopes.present()) return;
  check_dtype(slopes, ANYFLASH_FLOAT32);
  if (slopes.tensor.ndim == 1) {
    check_shape(slopes, std::array{problem.heads}, "[heads]");
  } else {
    check_rank(slopes, 2, "[batch, heads], or rank 1: [heads]");
    check_shape(slopes, std::array{problem.batch, problem.heads}, "[batch, heads]");
  }
  check_last_dim_contiguous(slopes);
  problem.alibi = true;
  problem.alibi_slopes = static_cast<const float*>(slopes.tensor.data);
  problem.alibi_batch = slopes.tensor.ndim == 2 ? slopes.tensor.strides[0] : 0;
}

void check_window(int64_t window, const char* name) {
  if (window < -1)
    throw InvalidValue(std::string(name) + " is " + to_string(window) +
                       "; it must be 0 or more, or -1 for unbounded");
}

/// Windows that hide nothing become unbounded, so that equal problems have equal plans. With the
/// lengths at hand: the last query sees key 0 from left = seqlen_k - 1 on, the first query sees the
/// last key from right = seqlen_q - 1 on.
Mask normal_form(int64_t left, int64_t right, bool causal, int64_t seqlen_q, int64_t seqlen_k) {
  if (left == -1) left = Mask::unbounded;
  if (right == -1) right = Mask::unbounded;
  if (causal) right = 0;
  if (left >= seqlen_k - 1) left = Mask::unbounded;
  if (right >= seqlen_q - 1) right = Mask::unbounded;
  return {left, right};
}

// What is read and written beside q, k, v

/// A tensor of q's dtype with the given rows, heads and columns, if it is there.
void check_rows(const Named& named, const Inputs& in, const Problem& problem, int64_t rows,
                int64_t heads, int64_t columns, const char* words) {
  if (!named.present()) return;
  check_same_dtype(named, in.q);
  check_rank(named, problem.packed ? 3 : 4, words);
  if (problem.packed)
    check_shape(named, std::array{rows, heads, columns}, words);
  else
    check_shape(named, std::array{problem.batch, rows, heads, columns}, words);
  check_last_dim_contiguous(named);
}

/// lse or dlse, if it is there.
void check_row_numbers(const Named& named, const Problem& problem) {
  if (!named.present()) return;
  const char* words = problem.packed ? "[heads, total_q]" : "[batch, heads, seqlen_q]";
  check_dtype(named, ANYFLASH_FLOAT32);
  check_rank(named, problem.packed ? 2 : 3, words);
  if (problem.packed)
    check_shape(named, std::array{problem.heads, problem.total_q}, words);
  else
    check_shape(named, std::array{problem.batch, problem.heads, problem.seqlen_q}, words);
  check_contiguous(named);
}

/// Every element of an output has its own memory, which no input and no other output shares.
void check_outputs(std::span<const Named* const> outputs, std::span<const Named* const> inputs) {
  const auto range = [](const Named& named) {
    return named.present() ? byte_range(named.tensor, bytes_of_element(named.tensor)) : ByteRange{};
  };
  for (size_t i = 0; i < outputs.size(); ++i) {
    const Named& output = *outputs[i];
    if (!output.present()) continue;
    check_written_once(output);
    const ByteRange written = range(output);
    // Most tensors lie far apart: that is quickly seen.
    const auto check = [&](const Named& other, const char* others) {
      if (written.meets(range(other))) check_apart(output, other, others);
    };
    for (const Named* input : inputs) check(*input, "inputs");
    for (const Named* earlier : outputs.first(i)) check(*earlier, "one another");
  }
}

void read_o_and_lse(const Inputs& in, Problem& problem) {
  const char* words = problem.packed ? "[total_q, heads, dv]" : "[batch, seqlen_q, heads, dv]";
  const int64_t rows = problem.packed ? problem.total_q : problem.seqlen_q;
  check_rows(in.o, in, problem, rows, problem.heads, problem.dv, words);
  check_row_numbers(in.lse, problem);
  problem.want_lse = in.lse.present();
  problem.lse = static_cast<float*>(in.lse.tensor.data);
}

void read_gradients(const Inputs& in, Problem& problem) {
  const bool packed = problem.packed;
  const int64_t rows_q = packed ? problem.total_q : problem.seqlen_q;
  const int64_t rows_k = packed ? problem.total_k : problem.seqlen_k;
  const char* of_o = packed ? "[total_q, heads, dv]" : "[batch, seqlen_q, heads, dv]";
  const char* of_q = packed ? "[total_q, heads, d]" : "[batch, seqlen_q, heads, d]";
  const char* of_k = packed ? "[total_k, heads_k, d]" : "[batch, seqlen_k, heads_k, d]";
  const char* of_v = packed ? "[total_k, heads_k, dv]" : "[batch, seqlen_k, heads_k, dv]";
  check_rows(in.dout, in, problem, rows_q, problem.heads, problem.dv, of_o);
  check_rows(in.dq, in, problem, rows_q, problem.heads, problem.d, of_q);
  check_rows(in.dk, in, problem, rows_k, problem.heads_k, problem.d, of_k);
  check_rows(in.dv, in, problem, rows_k, problem.heads_k, problem.dv, of_v);
  check_row_numbers(in.dlse, problem);
  problem.has_dlse = in.dlse.present();
  problem.dlse = static_cast<const float*>(in.dlse.tensor.data);
}

// Views

View view_of(const anyflash_tensor& tensor, bool packed) {
  if (packed) return {tensor.data, 0, tensor.strides[0], tensor.strides[1]};
  return {tensor.data, tensor.strides[0], tensor.strides[1], tensor.strides[2]};
}

/// True when every row [., d] starts on 16 bytes and is a whole number of 16 bytes long.
bool rows_on_16_bytes(const anyflash_tensor& tensor) {
  const int64_t bytes = bytes_of_element(tensor);
  const int last = tensor.ndim - 1;
  bool aligned = reinterpret_cast<uintptr_t>(tensor.data) % 16 == 0;
  aligned &= tensor.shape[last] * bytes % 16 == 0;
  for (int dim = 0; dim < last; ++dim)
    aligned &= tensor.shape[dim] <= 1 || tensor.strides[dim] % 16 * bytes % 16 == 0;
  return aligned;
}

} // namespace

Problem validate(const anyflash_problem& raw) {
  if (raw.op != ANYFLASH_FORWARD && raw.op != ANYFLASH_BACKWARD)
    throw NotSupported("asked: operation " + to_string(raw.op) +
                       "; available: forward (1), backward (2); missing: this operation");
  const Inputs in(raw);
  Problem problem;
  problem.packed = is_packed(in);
  check_kinds(in, problem.packed);
  problem.op = static_cast<anyflash_op>(raw.op);
  problem.dtype = static_cast<DType>(raw.q.dtype);
  problem.device_type = raw.q.device_type;
  problem.device_index = raw.q.device_index;
  problem.deterministic = raw.deterministic != 0;

  read_shapes(in, problem);
  for (const Named* named : {&in.q, &in.k, &in.v}) check_last_dim_contiguous(*named);
  if (problem.packed)
    read_packed_lengths(raw, in, problem);
  else
    read_dense_lengths(in, problem);
  read_score(raw, in, problem);
  check_window(raw.window_left, "window_left");
  check_window(raw.window_right, "window_right");
  problem.mask = normal_form(raw.window_left, raw.window_right, raw.causal != 0, problem.seqlen_q,
                             problem.seqlen_k);

  read_o_and_lse(in, problem);
  // Of both operations first, then of the backward alone.
  const std::array inputs = {
      &in.q,         &in.k,         &in.v, &in.alibi_slopes, &in.cu_seqlens_q, &in.cu_seqlens_k,
      &in.seqused_q, &in.seqused_k, &in.o, &in.lse,          &in.dout,         &in.dlse};
  if (problem.op == ANYFLASH_FORWARD) {
    check_outputs(std::array{&in.o, &in.lse}, std::span(inputs).first(8));
  } else {
    read_gradients(in, problem);
    check_outputs(std::array{&in.dq, &in.dk, &in.dv}, inputs);
  }

  problem.aligned = true;
  const auto view = [&](const Named& named) {
    if (!named.present()) return View{};
    problem.aligned = problem.aligned && rows_on_16_bytes(named.tensor);
    return view_of(named.tensor, problem.packed);
  };
  problem.q = view(in.q);
  problem.k = view(in.k);
  problem.v = view(in.v);
  problem.o = view(in.o);
  if (problem.op == ANYFLASH_BACKWARD) {
    problem.dout = view(in.dout);
    problem.dq = view(in.dq);
    problem.dk = view(in.dk);
    problem.dv_out = view(in.dv);
  }
  return problem;
}

} // namespace anyflash
