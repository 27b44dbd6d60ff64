// validate(): the normal form, and what it refuses. The words of every refusal are held by
// tests/python/test_errors.py.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "core/error.h"
#include "core/problem.h"
#include "problems.h"

namespace anyflash {
namespace {

TEST(Validate, ReadsShapes) {
  const Problem p = validate(dense({2, 17, 19, 6, 3, 40, 24}));
  EXPECT_FALSE(p.packed);
  EXPECT_EQ(p.batch, 2);
  EXPECT_EQ(p.seqlen_q, 17);
  EXPECT_EQ(p.seqlen_k, 19);
  EXPECT_EQ(p.total_q, 34);
  EXPECT_EQ(p.total_k, 38);
  EXPECT_EQ(p.heads, 6);
  EXPECT_EQ(p.heads_k, 3);
  EXPECT_EQ(p.group(), 2);
  EXPECT_EQ(p.d, 40);
  EXPECT_EQ(p.dv, 24);
  EXPECT_FALSE(p.want_lse);
  EXPECT_EQ(p.k.batch, 19 * 3 * 40);
  EXPECT_EQ(p.k.row, 3 * 40);
  EXPECT_EQ(p.k.head, 40);
}

TEST(Validate, ReadsPackedShapes) {
  std::array<int32_t, 3> cu_q = {0, 5, 12}, cu_k = {0, 0, 7};
  anyflash_problem raw = packed({2, 7, 7}, 15, 9, cu_q.data(), cu_k.data());
  const Problem p = validate(raw);
  EXPECT_TRUE(p.packed);
  EXPECT_EQ(p.batch, 2);
  EXPECT_EQ(p.total_q, 15);
  EXPECT_EQ(p.total_k, 9);
  EXPECT_EQ(p.q.batch, 0);
  EXPECT_EQ(p.q.row, 2 * 64);
  raw.max_seqlen_q = 1000; // no sequence is longer than the tensor
  EXPECT_EQ(validate(raw).seqlen_q, 15);
}

TEST(Validate, EmptyProblemsAreLegal) {
  for (const Shape& shape :
       {Shape{0, 5, 5}, Shape{1, 0, 5}, Shape{1, 5, 0}, Shape{1, 5, 5, 0, 2}, Shape{1, 5, 5, 0, 0}})
    EXPECT_NO_THROW(validate(dense(shape)));
  EXPECT_EQ(validate(dense({1, 5, 5, 0, 0})).group(), 0); // no division by zero
  std::array<int32_t, 1> cu = {0};
  EXPECT_NO_THROW(validate(packed({0, 0, 0}, 0, 0, cu.data(), cu.data())));
}

// Masks

Mask mask_of(int64_t seqlen_q, int64_t seqlen_k, int64_t left, int64_t right, bool causal) {
  anyflash_problem p = dense({1, seqlen_q, seqlen_k});
  p.window_left = left;
  p.window_right = right;
  p.causal = causal;
  return validate(p).mask;
}

TEST(Validate, MasksHaveOneNormalForm) {
  constexpr int64_t all = Mask::unbounded;
  EXPECT_EQ(mask_of(64, 64, -1, -1, false), (Mask{all, all}));
  EXPECT_EQ(mask_of(64, 64, -1, -1, true), (Mask{all, 0}));
  EXPECT_EQ(mask_of(64, 64, -1, 5, true), (Mask{all, 0}));
  EXPECT_EQ(mask_of(64, 64, 5, 7, false), (Mask{5, 7}));
  EXPECT_EQ(mask_of(64, 100, 99, 63, false), (Mask{all, all}));
  EXPECT_EQ(mask_of(64, 100, 98, 62, false), (Mask{98, 62}));
  EXPECT_EQ(mask_of(1, 100, -1, -1, true), (Mask{all, all})); // one query sees every key
  EXPECT_EQ(mask_of(64, 64, INT64_MAX, INT64_MAX, false), (Mask{all, all}));
}

/// A normal form that shows or hides other pairs than the raw windows would be wrong.
TEST(Validate, NormalFormShowsTheSamePairs) {
  for (int64_t n = 1; n < 7; ++n)
    for (int64_t m = 1; m < 7; ++m)
      for (int64_t left = -1; left < 8; ++left)
        for (int64_t right = -1; right < 8; ++right) {
          const Mask mask = mask_of(n, m, left, right, false);
          for (int64_t i = 0; i < n; ++i)
            for (int64_t j = 0; j < m; ++j) {
              const int64_t distance = j - (i + m - n);
              const bool wanted =
                  (left == -1 || distance >= -left) && (right == -1 || distance <= right);
              const bool seen = distance >= -mask.left && distance <= mask.right;
              ASSERT_EQ(seen, wanted) << n << " " << m << " " << left << " " << right;
            }
        }
}

// Alignment

TEST(Validate, AlignmentLooksAtPointersStridesAndHeadDims) {
  alignas(16) static unsigned char memory[1 << 20];
  const auto aligned = [](auto change) {
    anyflash_problem p = dense({2, 8, 8}, ANYFLASH_BFLOAT16);
    p.q.data = memory;
    p.k.data = memory + (1 << 16);
    p.v.data = memory + (2 << 16);
    p.o.data = memory + (3 << 16);
    change(p);
    return validate(p).aligned;
  };
  EXPECT_TRUE(aligned([](anyflash_problem&) {}));
  EXPECT_FALSE(aligned([](anyflash_problem& p) { p.k.data = memory + (1 << 16) + 2; }));
  EXPECT_FALSE(aligned([](anyflash_problem& p) { p.v.strides[1] += 1; }));
  EXPECT_FALSE(aligned([](anyflash_problem& p) { p.o.data = memory + (3 << 16) + 8; }));
  EXPECT_TRUE(aligned([](anyflash_problem& p) { p.v.strides[1] += 8; }));
  EXPECT_FALSE(validate(dense({1, 8, 8, 2, 2, 36, 64}, ANYFLASH_FLOAT16)).aligned);
  EXPECT_FALSE(validate(dense({1, 8, 8, 2, 2, 64, 36}, ANYFLASH_FLOAT16)).aligned);
  // The stride of a dimension of size 1 is never used.
  anyflash_problem single = dense({1, 8, 8, 1, 1}, ANYFLASH_FLOAT16);
  single.q.strides[0] = single.q.strides[2] = 3;
  EXPECT_TRUE(validate(single).aligned);
}

// Shared memory

struct Buffer {
  std::vector<float> memory = std::vector<float>(1 << 16);
  /// [B, N, H, d] at an offset, with the strides of [B, N, rows of `row`, d].
  anyflash_tensor slice(int64_t offset, int64_t batch, int64_t n, int64_t heads, int64_t row) {
    anyflash_tensor t = tensor({batch, n, heads, 64}, ANYFLASH_FLOAT32);
    t.data = memory.data() + offset;
    t.strides[0] = n * row;
    t.strides[1] = row;
    return t;
  }
};

TEST(Validate, SlicesOfOneBufferDoNotOverlap) {
  Buffer buffer;
  const int64_t heads = 2, row = 4 * heads * 64; // q, k, v, o side by side in each row
  anyflash_problem p = dense({2, 8, 8});
  p.q = buffer.slice(0, 2, 8, heads, row);
  p.k = buffer.slice(heads * 64, 2, 8, heads, row);
  p.v = buffer.slice(2 * heads * 64, 2, 8, heads, row);
  p.o = buffer.slice(3 * heads * 64, 2, 8, heads, row);
  EXPECT_NO_THROW(validate(p));
  p.o = buffer.slice(3 * heads * 64 - 1, 2, 8, heads, row); // one element of v
  EXPECT_THROW(validate(p), InvalidValue);
}

TEST(Validate, OverlapAgreesWithBruteForce) {
  // o against q over many offsets and strides, byte by byte.
  Buffer buffer;
  int overlaps = 0, refused = 0;
  for (int64_t offset = 0; offset < 700; offset += 32)
    for (int64_t row : {128, 192, 256, 320})
      for (int64_t o_row : {128, 192, 256, 320}) {
        anyflash_problem p = dense({1, 4, 4});
        p.q = buffer.slice(256, 1, 4, 2, row);
        p.o = buffer.slice(offset, 1, 4, 2, o_row);
        std::vector<char> used(buffer.memory.size());
        const auto each = [](int64_t start, int64_t stride, auto visit) {
          for (int64_t i = 0; i < 4; ++i)
            for (int64_t e = 0; e < 128; ++e) visit(static_cast<size_t>(start + i * stride + e));
        };
        bool overlap = false;
        each(256, row, [&](size_t at) { used[at] = 1; });
        each(offset, o_row, [&](size_t at) { overlap |= used[at] != 0; });
        bool refusal = false;
        try {
          validate(p);
        } catch (const InvalidValue&) {
          refusal = true;
        }
        ASSERT_TRUE(refusal || !overlap) << offset << " " << row << " " << o_row;
        if (row == o_row) {
          ASSERT_EQ(refusal, overlap) << offset << " " << row;
        }
        overlaps += overlap;
        refused += refusal;
      }
  EXPECT_GT(overlaps, 0);
  EXPECT_LE(refused, overlaps * 11 / 10); // careful, not timid
}

TEST(Validate, OutputsHoldEachElementOnce) {
  anyflash_problem p = dense({2, 8, 8});
  p.o.strides[0] = 0;
  EXPECT_THROW(validate(p), InvalidValue);
  p = dense({2, 8, 8});
  p.o.strides[1] = 64; // rows run into each other's heads
  EXPECT_THROW(validate(p), InvalidValue);
  p = dense({2, 8, 8});
  p.q.strides[0] = p.k.strides[0] = p.v.strides[0] = 0; // inputs may repeat
  EXPECT_NO_THROW(validate(p));
  p = dense({2, 8, 8});
  p.o.data = reinterpret_cast<void*>(uintptr_t{1} << 40); // backwards in memory
  for (int dim = 0; dim < 3; ++dim) p.o.strides[dim] = -p.o.strides[dim];
  EXPECT_NO_THROW(validate(p));
}

std::string refusal(const anyflash_problem& p) {
  try {
    validate(p);
  } catch (const InvalidValue& error) {
    return error.what();
  }
  return "";
}

TEST(Validate, AnOutputIsApartFromInputsAndFromOtherOutputs) {
  Buffer buffer;
  anyflash_problem p = backward_of(dense({1, 8, 8}));
  p.dq.data = buffer.memory.data();
  p.dk.data = buffer.memory.data() + 8 * 2 * 64; // right behind dq
  EXPECT_EQ(refusal(p), "");
  p.dk.data = buffer.memory.data() + 8 * 2 * 64 - 1;
  EXPECT_EQ(refusal(p), "dk shares memory with dq; outputs must not overlap one another: give it "
                        "memory of its own");
  p.dout.data = p.dk.data; // an input is named before an output
  EXPECT_EQ(refusal(p), "dq shares memory with dout; outputs must not overlap inputs: give it "
                        "memory of its own");
}

TEST(Validate, HugeStridesDoNotOverflow) {
  anyflash_problem p = dense({2, 8, 8});
  p.q.data = p.o.data = reinterpret_cast<void*>(uintptr_t{1} << 40);
  p.q.strides[0] = INT64_MAX;
  p.o.strides[0] = INT64_MIN;
  EXPECT_THROW(validate(p), InvalidValue); // they share the first element
}

// Refusals, by kind

template <class Exception>
void expect_refused(void (*change)(anyflash_problem&), int line) {
  anyflash_problem p = dense({2, 8, 8, 4, 2});
  change(p);
  EXPECT_THROW(validate(p), Exception) << "line " << line;
}

#define REFUSED(Exception, ...)                                                                    \
  expect_refused<Exception>([](anyflash_problem& p) { __VA_ARGS__; }, __LINE__)

TEST(Validate, RefusesWhatMakesNoSense) {
  constexpr float nan = std::numeric_limits<float>::quiet_NaN();
  constexpr float infinity = std::numeric_limits<float>::infinity();
  REFUSED(NotSupported, p.op = 7);
  REFUSED(InvalidValue, p.q = {});
  REFUSED(InvalidValue, p.q.ndim = 9);
  REFUSED(InvalidValue, p.q.ndim = -1);
  REFUSED(InvalidValue, p.v.ndim = 3);
  REFUSED(InvalidType, p.q.dtype = ANYFLASH_INT32);
  REFUSED(InvalidType, p.q.dtype = 77);
  REFUSED(InvalidType, p.v.dtype = ANYFLASH_FLOAT16);
  REFUSED(InvalidType, p.o.dtype = ANYFLASH_FLOAT16);
  REFUSED(InvalidType, p.k.device_type = ANYFLASH_CUDA);
  REFUSED(NotSupported, p.q.device_type = 4);
  REFUSED(InvalidValue, p.k.shape[0] = 3);
  REFUSED(InvalidValue, p.v.shape[1] = 7);
  REFUSED(InvalidValue, p.k.shape[2] = p.v.shape[2] = 3);
  REFUSED(InvalidValue, p.k.shape[2] = p.v.shape[2] = 0);
  REFUSED(InvalidValue, p.v.shape[2] = 1);
  REFUSED(InvalidValue, p.k.shape[3] = 32);
  REFUSED(InvalidValue, p.q.shape[1] = -1);
  REFUSED(NotSupported, p.q.shape[3] = p.k.shape[3] = 257);
  REFUSED(NotSupported, p.q.shape[3] = p.k.shape[3] = 0);
  REFUSED(NotSupported, p.v.shape[3] = 300);
  REFUSED(NotSupported, p.q.shape[1] = int64_t{1} << 30);
  REFUSED(NotSupported, p.q.shape[0] = p.k.shape[0] = p.v.shape[0] = INT64_MAX);
  REFUSED(InvalidValue, p.q.strides[3] = 2);
  REFUSED(InvalidValue, p.v.strides[3] = 0);
  REFUSED(InvalidValue, p.scale = nan);
  REFUSED(InvalidValue, p.scale = infinity);
  REFUSED(InvalidValue, p.softcap = -1);
  REFUSED(InvalidValue, p.softcap = nan);
  REFUSED(InvalidValue, p.softcap = infinity);
  REFUSED(InvalidValue, p.softcap = 1e-30f);
  REFUSED(InvalidValue, p.window_left = -2);
  REFUSED(InvalidValue, p.window_right = INT64_MIN);
  REFUSED(InvalidValue, p.o.shape[3] = 63);
  REFUSED(InvalidValue, p.o.strides[3] = 2);
  REFUSED(InvalidValue, p.lse = tensor({2, 8, 4}, ANYFLASH_FLOAT32));
  REFUSED(InvalidType, p.lse = tensor({2, 4, 8}, ANYFLASH_FLOAT16));
  REFUSED(InvalidValue, p.lse = tensor({2, 4, 8}, ANYFLASH_FLOAT32); p.lse.strides[1] = 9);
  REFUSED(InvalidValue, p.alibi_slopes = tensor({3}, ANYFLASH_FLOAT32));
  REFUSED(InvalidValue, p.alibi_slopes = tensor({2, 2, 2}, ANYFLASH_FLOAT32));
  REFUSED(InvalidType, p.alibi_slopes = tensor({4}, ANYFLASH_FLOAT16));
  REFUSED(InvalidValue, p.cu_seqlens_q = tensor({3}, ANYFLASH_INT32));
  REFUSED(InvalidValue, p.seqused_k = tensor({2}, ANYFLASH_INT32));
}

TEST(Validate, RefusesPackedMistakes) {
  const auto check = [](std::array<int32_t, 3> cu_q, std::array<int32_t, 3> cu_k, auto change) {
    anyflash_problem p = packed({2, 7, 7}, 12, 9, cu_q.data(), cu_k.data());
    change(p);
    validate(p);
  };
  const auto nothing = [](anyflash_problem&) {};
  EXPECT_NO_THROW(check({0, 5, 12}, {0, 2, 9}, nothing));
  EXPECT_NO_THROW(check({2, 5, 10}, {0, 0, 0}, nothing));
  EXPECT_THROW(check({0, 5, 4}, {0, 2, 9}, nothing), InvalidValue);
  EXPECT_THROW(check({-1, 5, 7}, {0, 2, 9}, nothing), InvalidValue);
  EXPECT_THROW(check({0, 5, 12}, {0, 5, 10}, nothing), InvalidValue); // past the end
  EXPECT_THROW(check({0, 5, 12}, {0, 8, 9}, nothing), InvalidValue);  // longer than stated
  EXPECT_THROW(check({INT32_MIN, 0, INT32_MAX}, {0, 2, 9}, nothing), InvalidValue);
  EXPECT_THROW(check({0, 5, 12}, {0, 2, 9}, [](anyflash_problem& p) { p.max_seqlen_q = -1; }),
               InvalidValue);
  EXPECT_THROW(check({0, 5, 12}, {0, 2, 9}, [](anyflash_problem& p) { p.max_seqlen_k = 1; }),
               InvalidValue);
  EXPECT_THROW(check({0, 5, 12}, {0, 2, 9}, [](anyflash_problem& p) { p.cu_seqlens_q.dtype = 1; }),
               InvalidType);
  EXPECT_THROW(
      check({0, 5, 12}, {0, 2, 9}, [](anyflash_problem& p) { p.cu_seqlens_k.shape[0] = 2; }),
      InvalidValue);
  EXPECT_THROW(
      check({0, 5, 12}, {0, 2, 9}, [](anyflash_problem& p) { p.cu_seqlens_k.shape[0] = 0; }),
      InvalidValue);
  EXPECT_THROW(
      check({0, 5, 12}, {0, 2, 9}, [](anyflash_problem& p) { p.cu_seqlens_k.strides[0] = 2; }),
      InvalidValue);
  std::array<int32_t, 2> used = {5, 8};
  EXPECT_THROW(check({0, 5, 12}, {0, 2, 9},
                     [&](anyflash_problem& p) {
                       p.seqused_q = tensor({2}, ANYFLASH_INT32, ANYFLASH_CPU, used.data());
                     }),
               InvalidValue);
  used = {5, 7};
  EXPECT_NO_THROW(check({0, 5, 12}, {0, 2, 9}, [&](anyflash_problem& p) {
    p.seqused_q = tensor({2}, ANYFLASH_INT32, ANYFLASH_CPU, used.data());
  }));
}

/// Numbers of every size in every field: a refusal or a normal form, without undefined behaviour
/// (which the sanitizers would show).
TEST(Validate, SurvivesAnyNumbers) {
  std::mt19937_64 random(11);
  const auto pick = [&](auto... choices) {
    const std::array all = {static_cast<int64_t>(choices)...};
    return all[random() % all.size()];
  };
  const auto number = [&] {
    return pick(0, 1, 2, 3, 8, 64, 256, 257, -1, INT64_MAX, INT64_MIN, int64_t{1} << 30,
                int64_t{1} << 31, int64_t{1} << 62);
  };
  int valid = 0;
  for (int trial = 0; trial < 20000; ++trial) {
    anyflash_problem p =
        trial % 2 ? dense({2, 8, 9, 4, 2}) : packed({2, 7, 7, 4, 2}, 12, 9, nullptr, nullptr);
    p.lse = tensor({2, 4, 8}, ANYFLASH_FLOAT32);
    anyflash_tensor* tensors[] = {&p.q,         &p.k,           &p.v, &p.o, &p.lse, &p.alibi_slopes,
                                  &p.seqused_q, &p.cu_seqlens_k};
    for (int change = 0; change < 3; ++change) {
      anyflash_tensor& t = *tensors[random() % 8];
      const int dim = static_cast<int>(random() % 4);
      switch (random() % 8) {
      case 0:
        t.shape[dim] = number();
        break;
      case 1:
        t.strides[dim] = number();
        break;
      case 2:
        t.ndim = static_cast<int32_t>(pick(0, 1, 2, 3, 4, 5, -1, INT32_MAX));
        break;
      case 3:
        t.dtype = static_cast<int32_t>(pick(0, 1, 2, 3, 4, 5, 6, -1));
        break;
      case 4:
        t.data = reinterpret_cast<void*>(static_cast<uintptr_t>(pick(0, 1 << 20, -1)));
        break;
      case 5:
        p.window_left = number();
        break;
      case 6:
        p.max_seqlen_k = number();
        break;
      case 7:
        p.lse = {};
        break;
      }
      // On the CPU lengths would be read.
      if (t.data)
        for (anyflash_tensor* each : {&p.q, &p.k, &p.v, &p.o, &p.lse, &p.alibi_slopes,
                                      &p.cu_seqlens_q, &p.cu_seqlens_k, &p.seqused_q, &p.seqused_k})
          each->device_type = ANYFLASH_CUDA;
    }
    try {
      validate(p);
      ++valid;
    } catch (const Error&) {
    }
  }
  EXPECT_GT(valid, 100);
  EXPECT_LT(valid, 19000);
}

TEST(Validate, DoesNotReadValuesOnTheGpu) {
  // Pointers that would crash if read.
  auto* nowhere = reinterpret_cast<int32_t*>(uintptr_t{4096});
  EXPECT_NO_THROW(
      validate(packed({2, 7, 7}, 12, 9, nowhere, nowhere, ANYFLASH_FLOAT16, ANYFLASH_CUDA)));
}

} // namespace
} // namespace anyflash
