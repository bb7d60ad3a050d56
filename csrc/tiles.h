// How group_advantage divides samples. Each warp owns a tile of positions. Ids never decrease, so a group is a range of
// positions; a large group, of more than CHUNK samples, is cut into chunks. Here are the memory that the warps share,
// and the functions that find, sum and write one group or chunk.
#pragma once

#include "warp.h"

namespace ldo {

// Of one block.
struct Shared {
  int64_t heads[WARPS], large[WARPS], bad[WARPS], unordered[WARPS];  // of each warp's tile
  int64_t before, any_large, groups, first_bad, any_unordered;  // of the whole grid
  double mean[WARPS][MAX_REWARDS], divisors[WARPS][MAX_REWARDS], weight[MAX_REWARDS];
};

// The most blocks that a launch for so many samples has: one thread for each sample.
LDO_BOTH int64_t most_blocks(int64_t samples) { return larger(1, smaller((samples + BLOCK - 1) / BLOCK, MAX_BLOCKS)); }

// Scratch memory in global memory; it needs no initialisation.
struct Workspace {
  int64_t *heads, *large, *bad, *unordered;  // [blocks]
  Sums* sums;  // [slots, kinds]: of a chunk of a large group; see slot_of
  double* squares;  // [slots, kinds]
  double *mean, *spread;  // [slots, kinds]: of a large group, at its first chunk's slot
  uint8_t* zero;
  Sums* all_sums;  // [chunks, kinds]: of a chunk of all samples
  double* all_squares;
  double *all_mean, *all_deviation;  // [kinds]

  // Assigns the arrays' addresses from base on; returns the bytes they take. base may be null to learn only that.
  int64_t layout(char* base, int64_t samples, int64_t kinds, int64_t blocks) {
    const int64_t chunks = samples / CHUNK + 1, slots = 2 * chunks;
    char* p = base;
    auto take = [&p](auto*& array, int64_t count) {
      array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(p);
      p += (count * sizeof(*array) + 15) / 16 * 16;
    };
    take(heads, blocks), take(large, blocks), take(bad, blocks), take(unordered, blocks);
    take(sums, slots * kinds), take(squares, slots * kinds), take(mean, slots * kinds), take(spread, slots * kinds), take(zero, slots * kinds);
    take(all_sums, chunks * kinds), take(all_squares, chunks * kinds), take(all_mean, kinds), take(all_deviation, kinds);
    return p - base;
  }
};

// Distinct for all chunks of groups larger than CHUNK: two first chunks begin more than CHUNK apart, and two later ones
// at least CHUNK apart.
LDO_BOTH int64_t slot_of(int64_t chunk_begin, bool first) { return 2 * (chunk_begin / CHUNK) + !first; }

// The first position in [low, high] at which test holds, given that it holds from there on; high counts as holding.
// The warp tries 32 positions at a time.
template <class D, class F>
LDO_DEVICE int64_t first_where(const D& d, int64_t low, int64_t high, F test) {
  while (low < high) {
    const int64_t span = high - low;
    auto probe = [=](int lane) { return low + (span <= LANES ? smaller(lane, span - 1) : span * lane / LANES); };
    const uint32_t mask = d.ballot(test(probe(d.lane())));
    const int64_t old_low = low;
    if (!mask) {
      low = probe(LANES - 1) + 1;
      continue;
    }
    const int f = first_bit(mask);
    high = probe(f);
    low = f ? probe(f - 1) + 1 : old_low;
  }
  return low;
}

// A warp's positions [low, high). The first of the groups that overlap them begins at `first`, the last ends at `last`.
struct Tile {
  int64_t low, high, first, last;
  int heads;  // groups that begin in it
};

template <class D>
LDO_DEVICE int64_t group_begin(const D& d, const int64_t* ids, int64_t at) {
  const int64_t id = ids[at], near = at - LANES;
  auto same = [=](int64_t i) { return i >= 0 && ids[i] == id; };
  // most groups are small, so look at the nearest positions first
  const uint32_t other = d.ballot(!same(at - 1 - d.lane()));
  if (other) return at - first_bit(other);
  return first_where(d, 0, near, same);
}

template <class D>
LDO_DEVICE int64_t group_end(const D& d, const int64_t* ids, int64_t at, int64_t samples) {
  const int64_t id = ids[at];
  auto other = [=](int64_t i) { return i >= samples || ids[i] != id; };
  const uint32_t mask = d.ballot(other(at + 1 + d.lane()));
  if (mask) return at + 1 + first_bit(mask);
  return first_where(d, at + 1 + LANES, samples, other);
}

// Calls visit(begin, end) for each group that overlaps the tile, in order. The whole warp takes part.
template <class D, class F>
LDO_DEVICE void each_group(const D& d, const int64_t* ids, const Tile& t, F visit) {
  int64_t begin = t.first, at = t.low;
  while (at < t.high) {
    int64_t end = t.last;
    if (t.heads)
      for (int64_t base = at + 1; base < t.high; base += LANES) {
        const int64_t i = base + d.lane();
        const uint32_t mask = d.ballot(i < t.high && ids[i] != ids[i - 1]);
        if (!mask) continue;
        end = base + first_bit(mask);
        break;
      }
    visit(begin, end);
    begin = at = end;
  }
}

// One warp's sums over [begin, end) of reward j: a chunk or a small group.
template <class D, class T>
LDO_DEVICE Sums sum_range(const D& d, const T* rewards, int64_t kinds, int64_t j, int64_t begin, int64_t end) {
  Sums s;
#ifdef __CUDA_ARCH__
#pragma unroll 4
#endif
  for (int64_t i = begin + d.lane(); i < end; i += LANES) s.add(load(rewards, i * kinds + j));
  return warp_sum(d, s);
}
template <class D, class T>
LDO_DEVICE double square_range(const D& d, const T* rewards, int64_t kinds, int64_t j, int64_t begin, int64_t end, double mean) {
  double s = 0;
#ifdef __CUDA_ARCH__
#pragma unroll 4
#endif
  for (int64_t i = begin + d.lane(); i < end; i += LANES) {
    const double c = load(rewards, i * kinds + j) - mean;
    s += c * c;
  }
  return warp_sum(d, s);
}

// Calls visit(begin, end, slot) for each chunk of the group [begin, end) that begins in the tile.
template <class F>
LDO_DEVICE void each_chunk(const Tile& t, int64_t begin, int64_t end, F visit) {
  const int64_t skipped = begin < t.low ? chunks_of(t.low - begin) : 0;
  for (int64_t c = begin + skipped * CHUNK; c < smaller(end, t.high); c += CHUNK) visit(c, smaller(c + CHUNK, end), slot_of(c, c == begin));
}

// Advantages of samples [begin, end) of one group with these means and divisors.
template <class D, class T>
LDO_DEVICE void write_range(const D& d, const Advantage& a, int64_t begin, int64_t end, const double* mean, const double* divisors,
                            const double* weight) {
  const T* rewards = static_cast<const T*>(a.rewards);
  for (int64_t i = begin + d.lane(); i < end; i += LANES) {
    double total = 0;
    for (int64_t j = 0; j < a.kinds; ++j) total += weight[j] * ((load(rewards, i * a.kinds + j) - mean[j]) / divisors[j]);
    store(a.advantage, a.out_type, i, clamp(total, -a.clip, a.clip));
  }
}

template <class D>
LDO_DEVICE void write_stats(const D& d, const Advantage& a, int64_t group, int64_t j, double mean, double own, bool zero) {
  if (d.lane()) return;
  store(a.mean, a.out_type, group * a.kinds + j, mean);
  store(a.deviation, a.out_type, group * a.kinds + j, own);
  a.zero[group * a.kinds + j] = zero;
}

// What the block and the grid need to know of each warp's tile. After the grid has synchronised, collect reads it.
template <class D>
LDO_DEVICE void publish(const D& d, Shared& s, const Workspace& w, int64_t heads, bool large, int64_t bad, bool unordered) {
  if (d.lane() == 0) {
    s.heads[d.warp()] = heads;
    s.large[d.warp()] = large;
    s.bad[d.warp()] = bad;
    s.unordered[d.warp()] = unordered;
  }
  d.sync_block();
  if (d.warp() || d.lane()) return;
  int64_t total = 0, any = 0, first = INT64_MAX, mixed = 0;
  for (int k = 0; k < WARPS; ++k) {
    total += s.heads[k];
    any |= s.large[k];
    first = smaller(first, s.bad[k]);
    mixed |= s.unordered[k];
  }
  w.heads[d.block()] = total;
  w.large[d.block()] = any;
  w.bad[d.block()] = first;
  w.unordered[d.block()] = mixed;
}

// The second half of publish, after the grid has synchronised: every block collects the totals of the grid.
template <class D>
LDO_DEVICE void collect(const D& d, Shared& s, const Workspace& w) {
  if (d.warp() == 0) {
    int64_t before = 0, groups = 0, bad = INT64_MAX;
    bool large = false, unordered = false;
    for (int b = d.lane(); b < d.blocks(); b += LANES) {
      before += b < d.block() ? w.heads[b] : 0;
      groups += w.heads[b];
      bad = smaller(bad, w.bad[b]);
      large |= w.large[b] != 0;
      unordered |= w.unordered[b] != 0;
    }
    for (int half = LANES / 2; half; half /= 2) {
      before += d.shuffle_xor(before, half);
      groups += d.shuffle_xor(groups, half);
    }
    bad = warp_min(d, bad);
    const uint32_t any_large = d.ballot(large), any_unordered = d.ballot(unordered);
    if (d.lane() == 0) {
      s.before = before;
      s.groups = groups;
      s.first_bad = bad;
      s.any_large = any_large != 0;
      s.any_unordered = any_unordered != 0;
    }
  }
  d.sync_block();
}

}  // namespace ldo
