// The oracle itself: closed forms that need no computer, and the formula written once more.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>

#include "case_problem.h"
#include "cpu/cpu.h"

namespace anyflash {
namespace {

void set_all(Strided& t, double value) {
  for (int64_t i = 0; i < t.elements(); ++i) t.set(i, value);
}

TEST(Reference, OneKeyGivesItsValue) {
  CaseProblem c(make_case("reference", 16, 5, 1), DType::float64);
  cpu::reference(c.problem());
  for (int64_t i = 0; i < 5; ++i)
    for (int64_t e = 0; e < 16; ++e)
      EXPECT_DOUBLE_EQ(c.o.get(c.o.at(0, i, 0, e)), c.v.get(c.v.at(0, 0, 0, e)));
}

TEST(Reference, EqualKeysGiveTheMeanValueAndTheLogOfTheirNumber) {
  Case shape = make_case("reference", 8, 6, 6);
  shape.causal = true;
  CaseProblem c(shape, DType::float64);
  set_all(c.k, 0.0);
  cpu::reference(c.problem());
  for (int64_t i = 0; i < 6; ++i) {
    EXPECT_FLOAT_EQ(c.lse[i], std::log(static_cast<float>(i + 1)));
    for (int64_t e = 0; e < 8; ++e) {
      double mean = 0;
      for (int64_t j = 0; j <= i; ++j)
        mean += c.v.get(c.v.at(0, j, 0, e)) / static_cast<double>(i + 1);
      EXPECT_NEAR(c.o.get(c.o.at(0, i, 0, e)), mean, 1e-15);
    }
  }
}

TEST(Reference, TwoKeysGiveTheLogisticFunction) {
  // Scores s and 0, values 1 and 0: O = 1 / (1 + e^-s), L = log(1 + e^s).
  CaseProblem c(make_case("reference", 1, 1, 2), DType::float64);
  c.q.set(0, 1);
  c.k.set(0, 0.7);
  c.k.set(1, 0);
  c.v.set(0, 1);
  c.v.set(1, 0);
  Problem p = c.problem();
  const auto logistic = [](double s) { return 1 / (1 + std::exp(-s)); };

  p.scale = 2;
  cpu::reference(p);
  EXPECT_DOUBLE_EQ(c.o.get(0), logistic(1.4));
  EXPECT_FLOAT_EQ(c.lse[0], static_cast<float>(std::log1p(std::exp(1.4))));

  p.softcap = 0.5;
  cpu::reference(p);
  EXPECT_DOUBLE_EQ(c.o.get(0), logistic(0.5 * std::tanh(1.4 / 0.5)));

  const float slope = 0.25; // the query is aligned with key 1: key 0 is one away
  p.alibi = true;
  p.alibi_slopes = &slope;
  cpu::reference(p);
  EXPECT_DOUBLE_EQ(c.o.get(0), logistic(0.5 * std::tanh(1.4 / 0.5) - 0.25));
}

TEST(Reference, RowsThatSeeNoKeyAreZero) {
  Case shape = make_case("reference", 4, 5, 2); // bottom-right: queries 0, 1, 2 see nothing
  shape.causal = true;
  CaseProblem c(shape, DType::float32);
  cpu::reference(c.problem());
  for (int64_t i = 0; i < 5; ++i) {
    EXPECT_EQ(std::isinf(c.lse[i]) && c.lse[i] < 0, i < 3);
    for (int64_t e = 0; e < 4; ++e) EXPECT_EQ(c.o.get(c.o.at(0, i, 0, e)) == 0, i < 3);
  }
}

/// The formula of anyflash.h over whole matrices, with visibility decided pair by pair.
double brute_force(CaseProblem& c, const Problem& p, int64_t b, int64_t h, int64_t i, int64_t e) {
  const int64_t n = p.seqlen_q, m = p.seqlen_k, h_k = h * p.heads_k / p.heads;
  double l = 0, o = 0;
  for (int64_t j = 0; j < m; ++j) {
    if (j < i + m - n - p.mask.left || j > i + m - n + p.mask.right) continue;
    double s = 0;
    for (int64_t x = 0; x < p.d; ++x)
      s += c.q.get(c.q.at(b, i, h, x)) * c.k.get(c.k.at(b, j, h_k, x));
    s *= p.scale;
    if (p.softcap > 0) s = p.softcap * std::tanh(s / p.softcap);
    if (p.alibi)
      s -= p.alibi_slopes[b * p.alibi_batch + h] * std::abs(static_cast<double>(i + m - n - j));
    l += std::exp(s);
    o += std::exp(s) * c.v.get(c.v.at(b, j, h_k, e));
  }
  return l == 0 ? 0 : o / l;
}

TEST(Reference, AgreesWithBruteForceOnSmallDenseCases) {
  int compared = 0;
  for (const Case& shape : cases()) {
    if (!shape.packed.empty() || shape.values != "normal" || shape.q * shape.k > 10000) continue;
    CaseProblem c(shape, DType::float64);
    const Problem p = c.problem();
    cpu::reference(p);
    for (int64_t b = 0; b < shape.batch; ++b)
      for (int64_t h = 0; h < shape.heads; ++h)
        for (int64_t i = 0; i < shape.q; i += 7)
          for (int64_t e = 0; e < shape.dv; e += 5)
            ASSERT_NEAR(c.o.get(c.o.at(b, i, h, e)), brute_force(c, p, b, h, i, e), 1e-12)
                << shape.name;
    ++compared;
  }
  EXPECT_GT(compared, 10);
}

TEST(Reference, PackedSequencesAreTheirOwnProblems) {
  Case shape = case_of({{"name", "packed"},
                        {"d", 8},
                        {"heads", 2},
                        {"packed", {{5, 9}, {0, 3}, {7, 4}}},
                        {"seqused_q", {5, 0, 6}},
                        {"seqused_k", {8, 3, 4}},
                        {"causal", true}});
  CaseProblem packed(shape, DType::float64);
  cpu::reference(packed.problem());
  int64_t first_q = 0, first_k = 0;
  for (size_t b = 0; b < shape.packed.size(); ++b) {
    const int n = shape.seqused_q[b], m = shape.seqused_k[b];
    Case alone = make_case("alone", 8, n, m, 2);
    alone.causal = true;
    CaseProblem dense(alone, DType::float64);
    const auto copy = [](const Strided& from, int64_t first, Strided& to) {
      for (int64_t row = 0; row < to.rows; ++row)
        for (int64_t h = 0; h < to.heads; ++h)
          for (int64_t e = 0; e < to.d; ++e)
            to.set(to.at(0, row, h, e), from.get(from.at(0, first + row, h, e)));
    };
    copy(packed.q, first_q, dense.q);
    copy(packed.k, first_k, dense.k);
    copy(packed.v, first_k, dense.v);
    cpu::reference(dense.problem());
    for (int64_t i = 0; i < shape.packed[b].q; ++i)
      for (int64_t h = 0; h < 2; ++h) {
        const float lse = packed.lse[h * packed.o.rows + first_q + i];
        EXPECT_EQ(lse, i < n ? dense.lse[h * n + i] : -std::numeric_limits<float>::infinity());
        for (int64_t e = 0; e < 8; ++e)
          EXPECT_EQ(packed.o.get(packed.o.at(0, first_q + i, h, e)),
                    i < n ? dense.o.get(dense.o.at(0, i, h, e)) : 0.0);
      }
    first_q += shape.packed[b].q;
    first_k += shape.packed[b].k;
  }
  EXPECT_FALSE(packed.overwritten());
}

// Gradients

/// A direction in the space of q, k, v: their values move along it.
struct Direction {
  std::vector<double> q, k, v;

  explicit Direction(const CaseProblem& c, uint32_t seed) {
    std::mt19937 random(seed);
    std::normal_distribution<double> normal;
    const std::pair<const Strided*, std::vector<double>*> parts[] = {
        {&c.q, &q}, {&c.k, &k}, {&c.v, &v}};
    for (const auto& [tensor, values] : parts) {
      values->resize(static_cast<size_t>(tensor->elements()));
      for (double& x : *values) x = normal(random);
    }
  }

  /// c's inputs plus t of this direction.
  void move(CaseProblem& c, double t) const {
    const std::pair<Strided*, const std::vector<double>*> parts[] = {
        {&c.q, &q}, {&c.k, &k}, {&c.v, &v}};
    for (const auto& [tensor, values] : parts)
      for (int64_t i = 0; i < tensor->elements(); ++i)
        tensor->set(i, tensor->get(i) + t * (*values)[i]);
  }
};

/// sum of x y over the elements of a tensor.
double dot(const Strided& x, const std::vector<double>& y) {
  double sum = 0;
  for (int64_t b = 0; b < x.batch; ++b)
    for (int64_t row = 0; row < x.rows; ++row)
      for (int64_t head = 0; head < x.heads; ++head)
        for (int64_t e = 0; e < x.d; ++e) {
          const int64_t at = x.at(b, row, head, e);
          if (!std::isnan(x.get(at))) sum += x.get(at) * y[at]; // rows after the packed ones
        }
  return sum;
}

/// The loss whose gradients are dout and dlse: of O, and of L.
struct Loss {
  double of_o = 0, of_lse = 0;
};

Loss loss_at(CaseProblem c, const Direction& direction, double t) {
  direction.move(c, t);
  cpu::reference(c.problem());
  Loss loss;
  for (int64_t b = 0; b < c.o.batch; ++b)
    for (int64_t row = 0; row < c.o.rows; ++row)
      for (int64_t head = 0; head < c.o.heads; ++head)
        for (int64_t e = 0; e < c.o.d; ++e) {
          const double weight = c.dout.get(c.dout.at(b, row, head, e));
          if (!std::isnan(weight)) loss.of_o += weight * c.o.get(c.o.at(b, row, head, e));
        }
  for (size_t i = 0; i < c.lse.size(); ++i)
    if (std::isfinite(c.lse[i])) loss.of_lse += c.dlse[i] * static_cast<double>(c.lse[i]);
  return loss;
}

/// The derivative along the direction by a central difference of fourth order.
Loss difference(const CaseProblem& c, const Direction& direction, double step) {
  const auto at = [&](double t) { return loss_at(c, direction, t); };
  const Loss far_left = at(-2 * step), left = at(-step), right = at(step), far_right = at(2 * step);
  const auto quotient = [&](double Loss::* part) {
    return (8 * (right.*part - left.*part) - (far_right.*part - far_left.*part)) / (12 * step);
  };
  return {quotient(&Loss::of_o), quotient(&Loss::of_lse)};
}

Problem without_gradient_of_lse(Problem p) {
  p.dlse = nullptr;
  return p;
}

double derivative_along(CaseProblem& c, const Direction& direction, const Problem& p) {
  cpu::reference_backward(p);
  return dot(c.dq, direction.q) + dot(c.dk, direction.k) + dot(c.dv, direction.v);
}

/// Cases that a finite difference can judge: every option and layout, small.
std::vector<Case> smooth_cases() {
  std::vector<Case> chosen;
  for (const Case& shape : cases()) {
    const int64_t pairs = int64_t{shape.q} * shape.k * shape.heads * shape.batch;
    if (shape.values == "normal" && pairs <= 20000 && shape.layout != "broadcast")
      chosen.push_back(shape);
  }
  return chosen;
}

TEST(ReferenceBackward, AgreesWithFiniteDifferences) {
  const std::vector<Case> shapes = smooth_cases();
  ASSERT_GT(shapes.size(), 20u);
  for (const Case& shape : shapes) {
    CaseProblem c(shape, DType::float64);
    const Problem p = c.backward_problem();
    for (uint32_t seed = 1; seed <= 2; ++seed) {
      const Direction direction(c, seed);
      const double of_o = derivative_along(c, direction, without_gradient_of_lse(p));
      const double of_lse = derivative_along(c, direction, p) - of_o;
      // O is computed in double; L is stored as a float, so that its difference needs a wide step.
      const double fine = difference(c, direction, 1e-4).of_o;
      const double coarse = difference(c, direction, 0.02).of_lse;
      EXPECT_NEAR(of_o, fine, 1e-6 * (1 + std::abs(fine))) << shape.name;
      EXPECT_NEAR(of_lse, coarse, 3e-3 * (1 + std::abs(coarse))) << shape.name;
    }
    EXPECT_FALSE(c.overwritten()) << shape.name;
  }
}

TEST(ReferenceBackward, EveryOptionIsAmongTheCasesThatAreDifferentiated) {
  bool softcap = false, alibi = false, window = false, causal = false, gqa = false, packed = false,
       used = false, dv = false, no_key = false;
  for (const Case& c : smooth_cases()) {
    softcap |= c.softcap > 0;
    alibi |= !c.alibi.empty();
    window |= c.window_left.has_value();
    causal |= c.causal;
    gqa |= c.heads != c.heads_k;
    packed |= !c.packed.empty();
    used |= !c.seqused_k.empty();
    dv |= c.d != c.dv;
    no_key |= c.causal && c.q > c.k;
  }
  EXPECT_TRUE(softcap && alibi && window && causal && gqa && packed && used && dv && no_key)
      << softcap << alibi << window << causal << gqa << packed << used << dv << no_key;
}

TEST(ReferenceBackward, WhatSeesNothingHasGradientZero) {
  Case shape = make_case("reference", 4, 5, 2); // bottom-right: queries 0, 1, 2 see nothing
  shape.causal = true;
  CaseProblem c(shape, DType::float32);
  cpu::reference_backward(c.backward_problem());
  for (int64_t i = 0; i < 5; ++i)
    for (int64_t e = 0; e < 4; ++e) {
      const double dq = c.dq.get(c.dq.at(0, i, 0, e));
      EXPECT_TRUE(i < 3 ? dq == 0 : std::isfinite(dq)) << i;
    }
}

} // namespace
} // namespace anyflash
