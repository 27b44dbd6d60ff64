// make_plan(), its cache, the counts of explain(), and the C interface around them.
#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <thread>

#include "core/error.h"
#include "core/plan.h"
#include "core/plan_cache.h"
#include "core/row.h"
#include "core/work.h"
#include "problems.h"
#include "scoped_env.h"

namespace anyflash {
namespace {

anyflash_device gpu(int compute_capability) { return describe_gpu(compute_capability); }

anyflash_device cpu_device() {
  anyflash_device device{};
  device.struct_size = sizeof device;
  device.type = ANYFLASH_CPU;
  return device;
}

anyflash_plan plan_on(int compute_capability, const Shape& shape,
                      void (*change)(anyflash_problem&) = nullptr) {
  anyflash_problem p = dense(shape, ANYFLASH_BFLOAT16, ANYFLASH_CUDA);
  if (change) change(p);
  return make_plan(validate(p), gpu(compute_capability));
}

const Row& row_of(const anyflash_plan& plan) {
  return rows()[static_cast<size_t>(plan.launches[0].row)];
}

/// Every GPU generation that the table names, and a few that it does not.
std::vector<int> generations() { return {80, 86, 87, 89, 90, 100, 103, 110, 120, 121, 130}; }

TEST(Plan, HopperHasKernelsOfItsOwn) {
  const anyflash_plan plan = plan_on(90, {4, 4096, 4096, 16, 16, 128, 128});
  EXPECT_EQ(row_of(plan).family, "sm90");
  EXPECT_EQ(plan.launches[0].grid[0], 132u) << "thread blocks that stay";
  EXPECT_EQ(plan_on(90, {1, 64, 64, 2, 2, 128, 128}).launches[0].grid[0], 2u);
  EXPECT_EQ(row_of(plan_on(80, {4, 4096, 4096, 16, 16, 128, 128})).family, "sm80");
}

TEST(Plan, WhatHoppersCopyEngineCannotAddressRunsAsOnAmpere) {
  const Shape shape{2, 300, 300, 4, 4, 64, 64};
  anyflash_problem p = dense(shape, ANYFLASH_BFLOAT16, ANYFLASH_CUDA);
  p.k.strides[2] = 0; // one head for all
  const Problem broadcast = validate(p);
  const anyflash_plan plan = make_plan(broadcast, gpu(90));
  EXPECT_EQ(row_of(plan).family, "sm80");
  EXPECT_NE(explain(broadcast, plan).find("a stride that is not positive"), std::string::npos);
  p = dense(shape, ANYFLASH_BFLOAT16, ANYFLASH_CUDA);
  const Problem plain = validate(p);
  EXPECT_EQ(explain(plain, make_plan(plain, gpu(90))).find("family"), std::string::npos);
  EXPECT_EQ(row_of(plan_on(90, {2, 300, 300, 4, 4, 99, 99})).family, "sm80") << "odd rows";
}

TEST(Plan, AForcedImageBringsItsFamily) {
  const ScopedEnv image("ANYFLASH_IMAGE", "sm_90");
  EXPECT_EQ(row_of(plan_on(90, {2, 301, 300, 4, 4, 64, 64})).family, "sm80");
}

/// The plan for one head dim on a Hopper.
anyflash_plan plan_of_lengths(int64_t d, int64_t seqlen_q, int64_t seqlen_k, int causal) {
  anyflash_problem p = dense({2, seqlen_q, seqlen_k, 4, 4, d, d}, ANYFLASH_BFLOAT16, ANYFLASH_CUDA);
  p.causal = causal;
  return make_plan(validate(p), gpu(90));
}

TEST(Plan, FewQueriesServeCausalProblemsOfMiddleLength) {
  const auto Br = [](int64_t length, int causal) {
    return plan_of_lengths(64, length, length, causal).Br;
  };
  for (const int64_t length : {513, 1024}) EXPECT_EQ(Br(length, 1), 128) << length;
  for (const int64_t length : {512, 1025, 2048}) EXPECT_EQ(Br(length, 1), 192) << length;
  EXPECT_EQ(Br(1024, 0), 192) << "full";
}

TEST(Plan, FewKeysServeQueriesThatSeeFew) {
  const auto Bc = [](int64_t seqlen_q, int64_t seqlen_k, int causal) {
    return plan_of_lengths(128, seqlen_q, seqlen_k, causal).Bc;
  };
  for (const int64_t length : {512, 1024}) EXPECT_EQ(Bc(length, length, 1), 64) << length;
  for (const int64_t length : {384, 1025, 4096}) EXPECT_EQ(Bc(length, length, 1), 128) << length;
  for (const int64_t length : {257, 512}) EXPECT_EQ(Bc(length, length, 0), 64) << length;
  for (const int64_t length : {256, 513, 4096}) EXPECT_EQ(Bc(length, length, 0), 128) << length;
  EXPECT_EQ(Bc(1, 4096, 1), 128) << "one query that sees all";
  EXPECT_EQ(Bc(4096, 1, 1), 128) << "queries that see nothing";
}

TEST(Plan, ThreadBlocksThatStayChangeTheirPlaceFromHeadToHead) {
  const auto blocks = [](int64_t batch, int64_t length, int64_t heads, int64_t d) {
    return plan_on(90, {batch, length, length, heads, heads, d, d}).launches[0].grid[0];
  };
  EXPECT_EQ(blocks(4, 4096, 32, 64), 131u) << "22 tiles a head divide 132";
  EXPECT_EQ(blocks(2, 8192, 32, 64), 132u) << "43 do not";
  EXPECT_EQ(blocks(8, 2048, 16, 128), 132u) << "16 do not";
  EXPECT_EQ(blocks(2, 2048, 12, 64), 132u) << "two rounds of 132, or three of 131";
  EXPECT_EQ(blocks(300, 192, 1, 64), 132u) << "one tile a head has no place";
  EXPECT_EQ(blocks(1, 2048, 12, 64), 132u) << "as many as tiles";
  EXPECT_EQ(blocks(1, 2048, 2, 64), 22u) << "as many as tiles";
}

TEST(Plan, EveryRowIsChosenForItsOwnHeadDims) {
  std::set<int> chosen;
  for (const Row& row : rows())
    for (const int capability : generations()) {
      if (!row.in_image(image_for(capability, row.family))) continue;
      anyflash_problem p =
          dense({1, 1024, 1024, 2, 2, row.d, row.dv}, static_cast<int>(row.dtype), ANYFLASH_CUDA);
      if (row.variant == "general") p.softcap = 30;
      if (row.op == "backward") p = backward_of(p);
      if (row.shared_bytes() > gpu(capability).shared_bytes) continue;
      for (const int causal : {0, 1}) { // some tiles are for masks of this length
        p.causal = causal;
        chosen.insert(make_plan(validate(p), gpu(capability)).launches[0].row);
      }
      p.k.strides[2] = 0; // heads that share a key: not for a copy engine
      chosen.insert(make_plan(validate(p), gpu(capability)).launches[0].row);
    }
  for (const Row& row : rows()) EXPECT_TRUE(chosen.count(row.id)) << row.name() << " serves no GPU";
}

TEST(Plan, ARowHoldsTheProblemAndFitsTheGpu) {
  for (const int capability : generations())
    for (int64_t d : {1, 32, 33, 64, 80, 96, 128, 129, 192, 255, 256})
      for (int64_t dv : {1, 64, 128, 256}) {
        anyflash_plan plan;
        try {
          plan = plan_on(capability, {1, 300, 300, 2, 2, d, dv});
        } catch (const NotSupported&) {
          continue; // the table has no such row
        }
        const Row& row = row_of(plan);
        EXPECT_LE(d, row.d);
        EXPECT_LE(dv, row.dv);
        EXPECT_EQ(row.dtype, DType::bfloat16);
        EXPECT_LE(plan.launches[0].shared_bytes,
                  static_cast<uint32_t>(gpu(capability).shared_bytes));
        // No smaller bucket of the same family and variant would do.
        for (const Row& other : rows())
          if (other.op == row.op && other.family == row.family && other.variant == row.variant &&
              other.dtype == row.dtype && other.in_image(image_for(capability, other.family)) &&
              other.shared_bytes() <= gpu(capability).shared_bytes && other.d >= d &&
              other.dv >= dv) {
            EXPECT_GE(other.d, row.d);
          }
      }
}

TEST(Plan, PlainServesWhatItCanAndGeneralTheRest) {
  const auto variant = [](void (*change)(anyflash_problem&)) {
    return std::string(row_of(plan_on(90, {1, 300, 300, 2, 2, 128, 128}, change)).variant);
  };
  EXPECT_EQ(variant(nullptr), "plain");
  EXPECT_EQ(variant([](anyflash_problem& p) { p.causal = 1; }), "plain");
  EXPECT_EQ(variant([](anyflash_problem& p) { p.window_right = 0; }), "plain");
  EXPECT_EQ(variant([](anyflash_problem& p) { p.window_left = 299; }), "plain"); // hides nothing
  EXPECT_EQ(variant([](anyflash_problem& p) { p.window_left = 100; }), "plain");
  EXPECT_EQ(variant([](anyflash_problem& p) { p.window_right = 3; }), "plain");
  EXPECT_EQ(variant([](anyflash_problem& p) { p.scale = -1; }), "general");
  EXPECT_EQ(variant([](anyflash_problem& p) { p.scale = 0; }), "general");
  EXPECT_EQ(variant([](anyflash_problem& p) { p.softcap = 10; }), "general");
  EXPECT_EQ(variant([](anyflash_problem& p) { p.q.strides[1] += 1; }), "general");
  EXPECT_EQ(variant([](anyflash_problem& p) {
              p.alibi_slopes = tensor({2}, ANYFLASH_FLOAT32, ANYFLASH_CUDA);
            }),
            "general");
}

TEST(Plan, GridCoversEveryQuery) {
  const anyflash_plan plan = plan_on(90, {3, 1000, 77, 4, 2, 128, 128});
  ASSERT_EQ(plan.launch_count, 1);
  const auto blocks = static_cast<uint32_t>((1000 + plan.Br - 1) / plan.Br);
  EXPECT_EQ(plan.launches[0].grid[0], blocks * 4 * 3);
  EXPECT_EQ(plan.launches[0].grid[1], 1u);
  EXPECT_EQ(plan.launches[0].threads, static_cast<uint32_t>(row_of(plan).threads()));
  EXPECT_EQ(plan.workspace_bytes, 0u);
}

TEST(Plan, NothingToWriteIsNoLaunch) {
  for (const Shape& shape : {Shape{0, 5, 5}, Shape{1, 0, 5}, Shape{1, 5, 5, 0, 2}}) {
    EXPECT_EQ(plan_on(90, shape).launch_count, 0);
    EXPECT_EQ(make_plan(validate(dense(shape)), cpu_device()).launch_count, 0);
  }
  EXPECT_EQ(plan_on(90, {1, 5, 0}).launch_count, 1); // no key: O = 0 is written
}

anyflash_plan backward_on(int compute_capability, const Shape& shape) {
  return make_plan(validate(backward_of(dense(shape, ANYFLASH_BFLOAT16, ANYFLASH_CUDA))),
                   gpu(compute_capability));
}

TEST(Plan, TheBackwardIsThreeLaunchesOfOneRow) {
  const anyflash_plan plan = backward_on(90, {2, 1000, 7777, 2, 1, 128, 128});
  ASSERT_EQ(plan.launch_count, 3);
  const auto query_blocks = static_cast<uint32_t>((1000 + plan.Br - 1) / plan.Br);
  const int cluster = row_of(plan).cluster(), keys = plan.Bc * cluster; // all or none of a cluster
  const auto key_blocks = static_cast<uint32_t>((7777 + keys - 1) / keys * cluster);
  const anyflash_entry order[] = {ANYFLASH_KERNEL_PRE, ANYFLASH_KERNEL, ANYFLASH_KERNEL_POST};
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(plan.launches[i].row, plan.launches[0].row);
    EXPECT_EQ(plan.launches[i].entry, order[i]);
    EXPECT_EQ(plan.launches[i].grid[0], i == 1 ? key_blocks * 2 : query_blocks * 2 * 2);
  }
  EXPECT_EQ(row_of(plan).op, "backward");
}

TEST(Plan, OfShortSequencesWhoAddsLastFinishesDq) {
  EXPECT_EQ(backward_on(90, {3, 1000, 777, 8, 2, 128, 128}).launch_count, 2);
  EXPECT_EQ(backward_on(80, {3, 1000, 777, 8, 2, 128, 128}).launch_count, 3);
  Problem causal = validate(
      backward_of(dense({1, 3000, 3000, 8, 2, 128, 128}, ANYFLASH_BFLOAT16, ANYFLASH_CUDA)));
  EXPECT_EQ(make_plan(causal, gpu(90)).launch_count, 3);
  causal.mask.right = 0;
  EXPECT_EQ(make_plan(causal, gpu(90)).launch_count, 2);
  const ScopedEnv any_order("ANYFLASH_FREE_ORDER", "1");
  EXPECT_EQ(make_plan(causal, gpu(90)).launch_count, 3);
  EXPECT_EQ(backward_on(90, {1, 100, 0}).launch_count, 3); // no keys: fewer than any bound
  causal.deterministic = true;
  EXPECT_EQ(make_plan(causal, gpu(90)).launch_count, 2);
}

TEST(Plan, TheWorkspaceOfTheBackwardIsLinearInTheSequence) {
  const auto on_256 = [](int64_t bytes) {
    return static_cast<uint64_t>((bytes + 255) / 256 * 256);
  };
  // The sums, the statistics, the turns; in the sm90 family a counter, and one for each key head.
  const auto bytes = [&](const anyflash_plan& plan, int64_t rows, int64_t key_heads) {
    const bool hopper = row_of(plan).family == "sm90";
    return on_256(rows * row_of(plan).d * 4) + on_256(rows * 2 * 4) + on_256(rows / plan.Br * 4) +
           (hopper ? on_256(4) + on_256(key_heads * 4) : 0);
  };
  for (const int64_t d : {40, 64, 128, 256})
    for (const int64_t n : {1, 64, 1000, 100000}) {
      const anyflash_plan plan = backward_on(90, {2, n, 333, 6, 2, d, d});
      const int64_t rows = 6 * 2 * ((n + plan.Br - 1) / plan.Br * plan.Br); // whole blocks
      EXPECT_EQ(plan.workspace_bytes, bytes(plan, rows, 2 * 2));
    }
  int32_t lengths[] = {0, 10, 10, 500};
  const anyflash_problem p = backward_of(packed({3, 490, 490, 4, 2, 64, 64}, 520, 530, lengths,
                                                lengths, ANYFLASH_FLOAT16, ANYFLASH_CUDA));
  const anyflash_plan plan = make_plan(validate(p), gpu(90));
  const int64_t rows = 4 * (520 / plan.Br + 3) * plan.Br; // no block is shared by two sequences
  EXPECT_EQ(plan.workspace_bytes, bytes(plan, rows, 2 * 3));
}

TEST(Plan, TheBackwardWritesGradientsOfWhatSeesNothing) {
  const anyflash_plan no_keys = backward_on(90, {1, 100, 0});
  ASSERT_EQ(no_keys.launch_count, 2); // dQ = 0
  EXPECT_EQ(no_keys.launches[1].grid[0], 0u);
  for (const int capability : {80, 90}) {
    const anyflash_plan no_queries = backward_on(capability, {1, 0, 100});
    ASSERT_EQ(no_queries.launch_count, capability == 90 ? 2 : 3); // dK = dV = 0
    EXPECT_EQ(no_queries.launches[0].grid[0], capability == 90 ? 1u : 0u) << "the counter of 9.0";
    EXPECT_GT(no_queries.launches[1].grid[0], 0u);
  }
  EXPECT_EQ(backward_on(90, {1, 0, 0}).launch_count, 0);
  EXPECT_THROW(backward_on(90, {1, 5, 5, 0, 2}), NotSupported); // no head has nothing to share
}

TEST(Plan, AGridThatDoesNotFitIsRefused) {
  EXPECT_THROW(plan_on(90, {2000000, 64, 64, 2000, 1}), NotSupported);
  EXPECT_THROW(plan_on(90, {(int64_t{1} << 31) - 1, (int64_t{1} << 30) - 1, 64, 1, 1}),
               NotSupported);
}

TEST(Plan, DtypesThatNoRowServesAreRefused) {
  const auto on_gpu = [](int32_t dtype) {
    return make_plan(validate(dense({}, dtype, ANYFLASH_CUDA)), gpu(90));
  };
  EXPECT_THROW(on_gpu(ANYFLASH_FLOAT32), NotSupported);
  EXPECT_THROW(on_gpu(ANYFLASH_FLOAT64), NotSupported);
  EXPECT_THROW(make_plan(validate(dense({}, ANYFLASH_FLOAT64)), cpu_device()), NotSupported);
  EXPECT_NO_THROW(make_plan(validate(dense({}, ANYFLASH_BFLOAT16)), cpu_device()));
}

TEST(Plan, DescribesGpus) {
  EXPECT_EQ(gpu(80).shared_bytes, 163 * 1024);
  EXPECT_EQ(gpu(86).shared_bytes, 99 * 1024);
  EXPECT_EQ(gpu(87).shared_bytes, 163 * 1024);
  EXPECT_EQ(gpu(90).shared_bytes, 227 * 1024);
  EXPECT_EQ(gpu(120).shared_bytes, 99 * 1024);
  EXPECT_EQ(gpu(130).shared_bytes, 99 * 1024); // unknown: careful
  EXPECT_EQ(gpu(90).multiprocessors, 132);
  EXPECT_THROW(gpu(70), NotSupported);
  EXPECT_THROW(gpu(0), NotSupported);
}

// The cache

bool equal(const anyflash_plan& a, const anyflash_plan& b) {
  return std::memcmp(&a, &b, sizeof a) == 0;
}

TEST(PlanCache, SameProblemSamePlanAcrossThreads) {
  const anyflash_plan first = plan_on(90, {2, 777, 777, 2, 2, 128, 128});
  const size_t before = plan_cache_size();
  EXPECT_TRUE(equal(plan_on(90, {2, 777, 777, 2, 2, 128, 128}), first));
  std::thread([&] {
    EXPECT_TRUE(equal(plan_on(90, {2, 777, 777, 2, 2, 128, 128}), first));
  }).join();
  EXPECT_EQ(plan_cache_size(), before);
  EXPECT_FALSE(equal(plan_on(80, {2, 777, 777, 2, 2, 128, 128}), first));
}

TEST(PlanCache, StaysBounded) {
  for (int64_t n = 1; n < 2 * static_cast<int64_t>(plan_cache_limit); ++n)
    plan_on(90, {1, n, 64, 2, 2, 128, 128});
  EXPECT_LE(plan_cache_size(), plan_cache_limit);
}

TEST(PlanCache, ServesManyThreads) {
  std::vector<std::thread> threads;
  std::atomic<int> wrong = 0;
  for (int t = 0; t < 4; ++t)
    threads.emplace_back([&, t] {
      for (int64_t i = 0; i < 2000; ++i) {
        const int64_t n = 1 + (i * 7 + t) % 300;
        const anyflash_plan plan = plan_on(90, {1, n, 64, 2, 2, 128, 128});
        wrong += plan.launches[0].grid[0] != static_cast<uint32_t>((n + plan.Br - 1) / plan.Br * 2);
      }
    });
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
}

// Counting

TEST(Work, VisiblePairsAgreeWithBruteForce) {
  for (int64_t n : {0, 1, 2, 5, 9})
    for (int64_t m : {0, 1, 3, 8})
      for (int64_t left : {int64_t{0}, int64_t{1}, int64_t{4}, Mask::unbounded})
        for (int64_t right : {int64_t{0}, int64_t{2}, int64_t{11}, Mask::unbounded}) {
          int64_t pairs = 0;
          for (int64_t i = 0; i < n; ++i)
            for (int64_t j = 0; j < m; ++j)
              pairs += j >= i + m - n - left && j <= i + m - n + right;
          ASSERT_EQ(visible_pairs(n, m, {left, right}), static_cast<double>(pairs))
              << n << " " << m << " " << left << " " << right;
        }
}

TEST(Work, CountsFlopsAndBytes) {
  anyflash_problem raw = dense({2, 10, 10, 4, 2, 64, 32}, ANYFLASH_BFLOAT16, ANYFLASH_CUDA);
  raw.causal = 1;
  const Work work = work_of(validate(raw));
  EXPECT_EQ(work.pairs, 2 * 4 * 55);
  EXPECT_EQ(work.flops, 2 * 4 * 55 * 2 * (64 + 32));
  EXPECT_EQ(work.bytes, (20 * 4 + 20 * 2) * (64 + 32) * 2);
}

TEST(Explain, SaysWhatMatters) {
  anyflash_problem raw = dense({1, 1024, 1024, 2, 2, 128, 128}, ANYFLASH_BFLOAT16, ANYFLASH_CUDA);
  raw.softcap = 30;
  const Problem problem = validate(raw);
  const anyflash_plan plan = make_plan(problem, gpu(90));
  const std::string text = explain(problem, plan);
  for (const std::string& part :
       {row_of(plan).name(), std::string("general rather than plain: softcap"), std::string("H100"),
        std::string("sm_90"),
        std::to_string(plan.launches[0].shared_bytes) + " bytes of shared memory"})
    EXPECT_NE(text.find(part), std::string::npos) << part << "\n" << text;
}

// The case list: everything that the CPU serves; every GPU answers without crashing

TEST(Plan, TheCaseListPlansOnTheCpu) {
  std::ifstream file(ANYFLASH_CASES);
  for (const auto& line : nlohmann::json::parse(file)) {
    if (line.contains("packed")) continue;
    Shape s;
    s.batch = line.value("batch", 1);
    s.seqlen_q = line["q"];
    s.seqlen_k = line["k"];
    s.heads = line.value("heads", 1);
    s.heads_k = line.value("heads_k", s.heads);
    s.d = line["d"];
    s.dv = line.value("dv", s.d);
    for (const int32_t dtype : {ANYFLASH_FLOAT32, ANYFLASH_FLOAT16, ANYFLASH_BFLOAT16})
      EXPECT_NO_THROW(make_plan(validate(dense(s, dtype)), cpu_device())) << line["name"];
  }
}

// The C interface

TEST(Api, SizesOfStructsAreChecked) {
  anyflash_problem p = dense({});
  anyflash_plan plan{};
  EXPECT_EQ(anyflash_make_plan(&p, nullptr, &plan), ANYFLASH_INVALID_VALUE);
  EXPECT_NE(std::string(anyflash_last_error()).find("plan->struct_size is 0"), std::string::npos);
  plan.struct_size = sizeof plan;
  EXPECT_EQ(anyflash_make_plan(&p, nullptr, &plan), ANYFLASH_OK);
  p.struct_size = 12;
  EXPECT_EQ(anyflash_make_plan(&p, nullptr, &plan), ANYFLASH_INVALID_VALUE);
  EXPECT_EQ(anyflash_make_plan(nullptr, nullptr, &plan), ANYFLASH_INVALID_VALUE);
  EXPECT_EQ(anyflash_run(nullptr, &p, nullptr, nullptr), ANYFLASH_INVALID_VALUE);
}

struct NewerProblem {
  anyflash_problem problem;
  int64_t of_the_future;
};

TEST(Api, NewerCallersWorkAsLongAsTheyAskForNothingNew) {
  NewerProblem p{dense({}), 0};
  p.problem.struct_size = sizeof p;
  anyflash_plan plan{};
  plan.struct_size = sizeof plan;
  EXPECT_EQ(anyflash_make_plan(&p.problem, nullptr, &plan), ANYFLASH_OK);
  p.of_the_future = 1;
  EXPECT_EQ(anyflash_make_plan(&p.problem, nullptr, &plan), ANYFLASH_NOT_SUPPORTED);
}

TEST(Api, RunsWhatItPlanned) {
  std::vector<float> q(64 * 2 * 64, 1.f), k = q, v = q, o(q.size(), NAN);
  anyflash_problem p = dense({});
  p.q.data = q.data();
  p.k.data = k.data();
  p.v.data = v.data();
  p.o.data = o.data();
  anyflash_plan plan{};
  plan.struct_size = sizeof plan;
  ASSERT_EQ(anyflash_make_plan(&p, nullptr, &plan), ANYFLASH_OK);
  ASSERT_EQ(anyflash_run(&plan, &p, nullptr, nullptr), ANYFLASH_OK) << anyflash_last_error();
  for (const float x : o) ASSERT_NEAR(x, 1.f, 1e-5f);
  EXPECT_EQ(anyflash_warm_up(&plan), ANYFLASH_OK);

  anyflash_problem other = dense({1, 64, 64, 1, 1});
  other.q.data = q.data();
  other.k.data = k.data();
  other.v.data = v.data();
  other.o.data = o.data();
  EXPECT_EQ(anyflash_run(&plan, &other, nullptr, nullptr), ANYFLASH_INVALID_VALUE);
  p.v.data = nullptr;
  EXPECT_EQ(anyflash_run(&plan, &p, nullptr, nullptr), ANYFLASH_INVALID_VALUE);
}

/// run trusts make_plan's validation of the same bytes, but not where that read memory.
TEST(Api, LengthsChangedSinceThePlanAreSeen) {
  std::vector<float> q(8 * 64), o(q.size());
  std::vector<int32_t> lengths = {0, 3, 8};
  anyflash_problem p = packed({2, 5, 5, 1, 1}, 8, 8, lengths.data(), lengths.data());
  p.q.data = p.k.data = p.v.data = q.data();
  p.o.data = o.data();
  anyflash_plan plan{};
  plan.struct_size = sizeof plan;
  ASSERT_EQ(anyflash_make_plan(&p, nullptr, &plan), ANYFLASH_OK) << anyflash_last_error();
  ASSERT_EQ(anyflash_run(&plan, &p, nullptr, nullptr), ANYFLASH_OK) << anyflash_last_error();
  lengths[2] = 9;
  EXPECT_EQ(anyflash_run(&plan, &p, nullptr, nullptr), ANYFLASH_INVALID_VALUE);
  lengths[2] = 8;
  p.o.data = q.data();
  EXPECT_EQ(anyflash_run(&plan, &p, nullptr, nullptr), ANYFLASH_INVALID_VALUE);
}

TEST(Api, TextsSayHowLongTheyAre) {
  size_t needed = 0;
  ASSERT_EQ(anyflash_rows(nullptr, 0, &needed), ANYFLASH_OK);
  std::vector<char> text(needed);
  ASSERT_EQ(anyflash_rows(text.data(), text.size(), &needed), ANYFLASH_OK);
  EXPECT_EQ(std::strlen(text.data()) + 1, needed);
  EXPECT_EQ(nlohmann::json::parse(text.data()).size(), rows().size());
  std::vector<char> short_text(5, 'x');
  ASSERT_EQ(anyflash_rows(short_text.data(), short_text.size(), &needed), ANYFLASH_OK);
  EXPECT_EQ(std::strlen(short_text.data()), 4u);
}

TEST(Api, DevicesOfTheWrongKindAreRefused) {
  anyflash_device device{};
  device.struct_size = sizeof device;
  ASSERT_EQ(anyflash_describe_gpu(90, &device), ANYFLASH_OK);
  const anyflash_problem p = dense({});
  anyflash_plan plan{};
  plan.struct_size = sizeof plan;
  EXPECT_EQ(anyflash_make_plan(&p, &device, &plan), ANYFLASH_INVALID_TYPE);
  EXPECT_EQ(anyflash_get_device(ANYFLASH_CPU, 0, &device), ANYFLASH_OK);
  EXPECT_EQ(device.type, ANYFLASH_CPU);
  EXPECT_EQ(anyflash_get_device(77, 0, &device), ANYFLASH_NOT_SUPPORTED);
}

} // namespace
} // namespace anyflash
