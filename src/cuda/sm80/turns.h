// Deterministic dQ: key blocks add to it in turns.
#pragma once

#include "cuda/attn/key_block.h"
#include "cuda/ptx/atomic.h"
#include "cuda/sm80/query_stream.h"

namespace anyflash::sm80 {

/// What a block knows of its work.
template <class Row>
struct BlockFacts {
  KeyBlock<Row> keys;
  KeyBlocks queries;
  int64_t first_row; // of the workspace: of the first query head of the group

  DEVICE BlockFacts(const BackwardParams& p, uint32_t index)
      : keys(p, index), queries(keys.queries(p)),
        first_row(workspace_row<Row>(p, keys.sequence, keys.head_k * p.group.divisor)) {}

  DEVICE int64_t row_of(const BackwardParams& p, Position at) const {
    return first_row + at.g * p.padded_rows + at.i * Row::Br;
  }
};

/// Key blocks add to the dQ of a query block in the order of their index, each when the block
/// before it is done, so that dQ is the same from run to run. Blocks of lower index are launched
/// before those of higher, so that nobody waits for a block that cannot run. Where a step is short,
/// two neighbouring query blocks share a turn: the fence of each costs the same.
/// The turn is passed on half a step late, when the additions are done and the fence waits for
/// little, and looked for half a step early; both beside barriers that are there anyway.
template <class Row>
class Turns {
  static constexpr int shared_by = Row::d <= 64 ? 2 : 1; // query blocks

public:
  DEVICE Turns(const BackwardParams& p, const BlockFacts<Row>& facts,
               const QueryStream<Row>& stream)
      : p_(p), facts_(facts), stream_(stream) {}

  DEVICE void look() {
    if (p_.turns && threadIdx.x == 0) seen_ = load_relaxed(turn(stream_.position()));
  }

  /// Before the barrier that precedes the additions. No fence: none of them starts before this
  /// branch is decided.
  DEVICE void await() const {
    if (!p_.turns || threadIdx.x != 0 || !is_new()) return;
    const Position at = stream_.position();
    const int query = at.i / shared_by * shared_by * Row::Br;
    const int first_seen = max(0, query + facts_.keys.diagonal() - p_.window_left);
    const int before = facts_.keys.first_key / Row::Bc - first_seen / Row::Bc;
    int seen = seen_;
    while (seen != before) seen = load_relaxed(turn(at));
  }

  /// After a barrier that follows the additions to the query block before this one.
  DEVICE void pass_on() const {
    if (p_.turns && threadIdx.x == warp_size && stream_.has_previous() && is_new())
      add_release(turn(stream_.previous()));
  }

private:
  /// The turn of this query block is not the one before's.
  DEVICE bool is_new() const {
    if (shared_by == 1 || !stream_.has_previous()) return true;
    const Position at = stream_.position(), before = stream_.previous();
    return at.g != before.g || at.i / shared_by != before.i / shared_by;
  }
  DEVICE int32_t* turn(Position at) const {
    return p_.turns + facts_.row_of(p_, {at.g, at.i / shared_by * shared_by}) / Row::Br;
  }

  const BackwardParams& p_;
  const BlockFacts<Row>& facts_;
  const QueryStream<Row>& stream_;
  int seen_;
};

} // namespace anyflash::sm80
