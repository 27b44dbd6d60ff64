#include "random_case.h"

#include <random>
#include <string>
#include <vector>

namespace anyflash {
namespace {

class Draw {
public:
  explicit Draw(unsigned seed) : engine_(seed) {}

  bool once_in(int n) { return between(1, n) == 1; }
  int between(int least, int most) {
    return std::uniform_int_distribution<int>(least, most)(engine_);
  }
  template <class T>
  T one_of(const std::vector<T>& all) {
    return all[static_cast<size_t>(between(0, static_cast<int>(all.size()) - 1))];
  }

  int head_dim() {
    return once_in(3) ? between(1, 256) : one_of(std::vector{32, 64, 96, 128, 192, 256});
  }
  /// Few rows, or about as many as a block of keys or queries has, or some blocks.
  int length() {
    if (once_in(4)) return between(0, 3);
    return once_in(2) ? 64 * between(1, 4) + between(-1, 1) : between(4, 420);
  }
  nlohmann::json side() { return once_in(3) ? nlohmann::json() : nlohmann::json(between(0, 200)); }

private:
  std::mt19937 engine_;
};

void draw_packed(Draw& draw, nlohmann::json& line) {
  const bool short_q = draw.once_in(3), short_k = draw.once_in(3);
  for (int left = draw.between(1, 5); left > 0; --left) {
    const int q = draw.length() / 2, k = draw.length() / 2;
    line["packed"].push_back({q, k});
    if (short_q) line["seqused_q"].push_back(draw.between(0, q));
    if (short_k) line["seqused_k"].push_back(draw.between(0, k));
  }
}

} // namespace

nlohmann::json random_case(unsigned seed) {
  Draw draw(seed);
  const int d = draw.head_dim(), heads_k = draw.between(1, 3);
  nlohmann::json line{{"name", "random"}, {"d", d}, {"heads_k", heads_k}};
  line["heads"] = heads_k * draw.between(1, 3);
  if (draw.once_in(5)) line["dv"] = draw.head_dim();
  if (draw.once_in(3)) {
    draw_packed(draw, line);
  } else {
    line["batch"] = draw.between(1, 3);
    line["q"] = draw.length();
    line["k"] = draw.once_in(2) ? line["q"] : nlohmann::json(draw.length());
  }
  if (draw.once_in(2))
    line["causal"] = true;
  else if (draw.once_in(2))
    line["window"] = {draw.side(), draw.side()};
  if (draw.once_in(6)) line["softcap"] = 5.0f;
  if (draw.once_in(6)) line["alibi"] = draw.one_of(std::vector<std::string>{"h", "bh"});
  if (draw.once_in(10)) line["scale"] = draw.one_of(std::vector{-0.2f, 0.0f, 0.5f});
  line["layout"] = draw.one_of(
      std::vector<std::string>{"contiguous", "contiguous", "transposed", "gaps", "odd"});
  return line;
}

} // namespace anyflash
