// The kernels' bodies, written against a small device interface D, so that the GPU (launch.cu) and a host emulation
// (tests/csrc/emulate.h) run the same source. D gives lane(), warp() in the block, block(), blocks(); ballot() and
// swap() (xor shuffle) over a warp; sync_warp(), sync_block() and sync_grid(). Every block is resident, or alone.
//
// group_advantage in one launch. Each warp owns a tile of positions; ids do not fall, so a group is a range of them.
//
//   1  count the groups that begin in the tile; check the ids' order and the rewards; sum the chunks of large groups
//   2  groups of at most CHUNK samples whose first lies in the tile: mean, spread, statistics, advantages;
//      large groups: add the chunks' sums
//   3  large groups: sum the chunks' squares about the mean
//   4  large groups: add them
//   5  large groups: advantages
//
// The grid waits between them. Without large groups and global scale it is done after 2. A chunk belongs to the warp in
// whose tile it begins. With scale "global" all samples together are one more large group, and advantages wait for 5.
#pragma once

#include <type_traits>

#include "arithmetic.h"

namespace ldo {

constexpr int BLOCK = 256;
constexpr int WARPS = BLOCK / LANES;
constexpr int MAX_BLOCKS = 1024;

struct Shared {
  int64_t heads[WARPS], large[WARPS], bad[WARPS], unordered[WARPS];  // of each warp's tile
  int64_t before, any_large, groups, first_bad, any_unordered;  // of the whole grid
  double mean[WARPS][MAX_REWARDS], by[WARPS][MAX_REWARDS], weight[MAX_REWARDS];
};

// Scratch memory in global memory; nothing in it needs to be set before a launch.
struct Workspace {
  int64_t *heads, *large, *bad, *unordered;  // [MAX_BLOCKS]
  Sums* sums;  // [slots, kinds]: of a chunk of a large group; see slot_of
  double* squares;  // [slots, kinds]
  double *mean, *by;  // [slots, kinds]: of a large group, at its first chunk's slot
  uint8_t* zero;
  Sums* all_sums;  // [chunks, kinds]: of a chunk of all samples
  double* all_squares;
  double *all_mean, *all_deviation;  // [kinds]

  // Lays the arrays out from base; returns the bytes they take. base may be null to learn only that.
  int64_t lay(char* base, int64_t samples, int64_t kinds) {
    const int64_t chunks = samples / CHUNK + 1, slots = 2 * chunks;
    char* p = base;
    auto take = [&p](auto*& array, int64_t count) {
      array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(p);
      p += (count * sizeof(*array) + 15) / 16 * 16;
    };
    take(heads, MAX_BLOCKS), take(large, MAX_BLOCKS), take(bad, MAX_BLOCKS), take(unordered, MAX_BLOCKS);
    take(sums, slots * kinds), take(squares, slots * kinds), take(mean, slots * kinds), take(by, slots * kinds), take(zero, slots * kinds);
    take(all_sums, chunks * kinds), take(all_squares, chunks * kinds), take(all_mean, kinds), take(all_deviation, kinds);
    return p - base;
  }
};

// Distinct for all chunks of groups larger than CHUNK: two first chunks begin more than CHUNK apart, and so do two later ones.
LDO_BOTH int64_t slot_of(int64_t chunk_begin, bool first) { return 2 * (chunk_begin / CHUNK) + !first; }

template <class D>
LDO_DEVICE double add_lanes(const D& d, double v) {
  for (int half = LANES / 2; half; half /= 2) v += d.swap(v, half);
  return v;
}
template <class D>
LDO_DEVICE Sums add_lanes(const D& d, Sums v) {
  for (int half = LANES / 2; half; half /= 2) v.add(Sums{d.swap(v.sum, half), d.swap(v.low, half), d.swap(v.high, half)});
  return v;
}
LDO_DEVICE int first_bit(uint32_t mask) {
#ifdef __CUDA_ARCH__
  return __ffs(mask) - 1;
#else
  return __builtin_ctz(mask);
#endif
}
LDO_DEVICE int count_bits(uint32_t mask) {
#ifdef __CUDA_ARCH__
  return __popc(mask);
#else
  return __builtin_popcount(mask);
#endif
}

// The first position in [low, high] at which test holds, if it holds from there on; high counts as holding. 32 probes at a time.
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

// A warp's positions [low, high) and the groups that overlap them, of which the first begins at `first` and the last ends at `last`.
struct Tile {
  int64_t low, high, first, last;
  int heads;  // groups that begin in it
};

template <class D>
LDO_DEVICE int64_t group_begin(const D& d, const int64_t* ids, int64_t at) {
  const int64_t id = ids[at], near = at - LANES;
  auto same = [=](int64_t i) { return i >= 0 && ids[i] == id; };
  const uint32_t other = d.ballot(!same(at - 1 - d.lane()));  // most groups are small: look next door first
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
  return add_lanes(d, s);
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
  return add_lanes(d, s);
}

// Adds one number of each chunk of a large group (get(k) of chunk k), lanes striding over chunks.
template <class V, class D, class F>
LDO_DEVICE V over_chunks(const D& d, int64_t chunks, F get) {
  V v{};
  for (int64_t k = d.lane(); k < chunks; k += LANES) {
    const V x = get(k);
    if constexpr (std::is_same_v<V, double>)
      v += x;
    else
      v.add(x);
  }
  return add_lanes(d, v);
}

// Calls visit(begin, end, slot) for each chunk of the group [begin, end) that begins in the tile.
template <class F>
LDO_DEVICE void each_chunk(const Tile& t, int64_t begin, int64_t end, F visit) {
  const int64_t skipped = begin < t.low ? chunks_of(t.low - begin) : 0;
  for (int64_t c = begin + skipped * CHUNK; c < smaller(end, t.high); c += CHUNK) visit(c, smaller(c + CHUNK, end), slot_of(c, c == begin));
}

// Advantages of samples [begin, end) of one group with these means and divisors.
template <class D, class T>
LDO_DEVICE void write_range(const D& d, const Advantage& a, int64_t begin, int64_t end, const double* mean, const double* by, const double* weight) {
  const T* rewards = static_cast<const T*>(a.rewards);
  for (int64_t i = begin + d.lane(); i < end; i += LANES) {
    double total = 0;
    for (int64_t j = 0; j < a.kinds; ++j) total += weight[j] * ((load(rewards, i * a.kinds + j) - mean[j]) / by[j]);
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

// What block and grid need to know of each warp's tile; after the second sync_grid every block holds the grid's figures.
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
      before += d.swap(before, half);
      groups += d.swap(groups, half);
      bad = smaller(bad, d.swap(bad, half));
    }
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

template <class D, class T>
LDO_DEVICE void advantage_body(const D& d, const Advantage& a, const Workspace& w, Shared& s) {
  const T* rewards = static_cast<const T*>(a.rewards);
  const int64_t n = a.samples, kinds = a.kinds, warps = int64_t(d.blocks()) * WARPS, warp = int64_t(d.block()) * WARPS + d.warp();
  const int64_t width = (n + LANES * warps - 1) / (LANES * warps) * LANES, chunks = chunks_of(n);
  const bool global = a.scale == GLOBAL;
  if (d.warp() == 0 && d.lane() < kinds) s.weight[d.lane()] = a.weights ? load(a.weights, a.weights_type, d.lane()) : 1.0;

  // 1
  Tile t{smaller(warp * width, n), smaller((warp + 1) * width, n), 0, 0, 0};
  const Tile all = t;  // the same positions, for the group of all samples
  int64_t bad = INT64_MAX, heads = 0;
  bool unordered = false, has_large = false;
  for (int64_t base = t.low; base < t.high; base += LANES) {
    const int64_t i = base + d.lane();
    const bool in = i < t.high, inner = in && i > 0;
    heads += count_bits(d.ballot(in && (i == 0 || a.ids[i] != a.ids[i - 1])));
    unordered |= d.ballot(inner && a.ids[i] < a.ids[i - 1]) != 0;
    for (int64_t j = 0; in && j < kinds; ++j)
      if (!is_finite(load(rewards, i * kinds + j))) bad = smaller(bad, i * kinds + j);
  }
  for (int half = LANES / 2; half; half /= 2) bad = smaller(bad, d.swap(bad, half));
  if (t.low < t.high) {
    t.first = group_begin(d, a.ids, t.low);
    t.last = group_end(d, a.ids, t.high - 1, n);
    t.heads = static_cast<int>(heads - (t.first == t.low));
    each_group(d, a.ids, t, [&](int64_t begin, int64_t end) {
      if (end - begin <= CHUNK) return;
      has_large = true;
      each_chunk(t, begin, end, [&](int64_t from, int64_t to, int64_t slot) {
        for (int64_t j = 0; j < kinds; ++j) {
          const Sums sums = sum_range(d, rewards, kinds, j, from, to);
          if (d.lane() == 0) w.sums[slot * kinds + j] = sums;
        }
      });
    });
    if (global)
      each_chunk(all, 0, n, [&](int64_t from, int64_t to, int64_t) {
        for (int64_t j = 0; j < kinds; ++j) {
          const Sums sums = sum_range(d, rewards, kinds, j, from, to);
          if (d.lane() == 0) w.all_sums[from / CHUNK * kinds + j] = sums;
        }
      });
  }
  publish(d, s, w, heads, has_large, bad, unordered);
  d.sync_grid();

  // 2
  collect(d, s, w);
  if (warp == 0 && d.lane() == 0) {
    a.info[GROUPS] = s.groups;
    a.info[UNORDERED] = s.any_unordered;
    a.info[BAD] = s.first_bad == INT64_MAX ? -1 : s.first_bad;
  }
  if (s.any_unordered || s.first_bad != INT64_MAX) return;  // the same for every thread of the grid
  const bool any_large = s.any_large;
  int64_t group = s.before - 1;
  for (int k = 0; k < d.warp(); ++k) group += s.heads[k];  // the group before this tile's first head
  const int64_t group_before = group;
  double *mean = s.mean[d.warp()], *by = s.by[d.warp()];

  auto small = [&](int64_t begin, int64_t end, bool stats) {
    for (int64_t j = 0; j < kinds; ++j) {
      const Sums sums = sum_range(d, rewards, kinds, j, begin, end);
      const double m = sums.sum / static_cast<double>(end - begin);
      const double own = stats || a.scale == GROUP ? deviation(square_range(d, rewards, kinds, j, begin, end, m), end - begin) : 0.0;
      const bool zero = sums.low == sums.high;
      if (stats) write_stats(d, a, group, j, m, own, zero);
      if (d.lane() == 0) {
        mean[j] = m;
        by[j] = divisor(a.scale, zero, own, stats ? 0.0 : w.all_deviation[j], a.eps);
      }
    }
    d.sync_warp();
    if (stats != global) write_range<D, T>(d, a, begin, end, mean, by, s.weight);
    d.sync_warp();
  };
  each_group(d, a.ids, t, [&](int64_t begin, int64_t end) {
    if (begin < t.low) return;
    ++group;
    if (end - begin <= CHUNK) return small(begin, end, true);
    const int64_t own_slot = slot_of(begin, true);
    for (int64_t j = 0; j < kinds; ++j) {
      const Sums sums = over_chunks<Sums>(d, chunks_of(end - begin), [&](int64_t k) { return w.sums[slot_of(begin + k * CHUNK, k == 0) * kinds + j]; });
      if (d.lane()) continue;
      w.mean[own_slot * kinds + j] = sums.sum / static_cast<double>(end - begin);
      w.zero[own_slot * kinds + j] = sums.low == sums.high;
    }
  });
  if (global && warp == 0)
    for (int64_t j = 0; j < kinds; ++j) {
      const Sums sums = over_chunks<Sums>(d, chunks, [&](int64_t k) { return w.all_sums[k * kinds + j]; });
      if (d.lane() == 0) w.all_mean[j] = sums.sum / static_cast<double>(n);
    }
  if (!any_large && !global) return;
  d.sync_grid();

  // 3
  if (any_large)
    each_group(d, a.ids, t, [&](int64_t begin, int64_t end) {
      if (end - begin <= CHUNK) return;
      each_chunk(t, begin, end, [&](int64_t from, int64_t to, int64_t slot) {
        for (int64_t j = 0; j < kinds; ++j) {
          const double squares = square_range(d, rewards, kinds, j, from, to, w.mean[slot_of(begin, true) * kinds + j]);
          if (d.lane() == 0) w.squares[slot * kinds + j] = squares;
        }
      });
    });
  if (global)
    each_chunk(all, 0, n, [&](int64_t from, int64_t to, int64_t) {
      for (int64_t j = 0; j < kinds; ++j) {
        const double squares = square_range(d, rewards, kinds, j, from, to, w.all_mean[j]);
        if (d.lane() == 0) w.all_squares[from / CHUNK * kinds + j] = squares;
      }
    });
  d.sync_grid();

  // 4
  group = group_before;
  if (any_large)
    each_group(d, a.ids, t, [&](int64_t begin, int64_t end) {
      if (begin < t.low) return;
      ++group;
      if (end - begin <= CHUNK) return;
      for (int64_t j = 0; j < kinds; ++j) {
        const int64_t at = slot_of(begin, true) * kinds + j;
        const double squares =
            over_chunks<double>(d, chunks_of(end - begin), [&](int64_t k) { return w.squares[slot_of(begin + k * CHUNK, k == 0) * kinds + j]; });
        const double own = deviation(squares, end - begin);
        write_stats(d, a, group, j, w.mean[at], own, w.zero[at]);
        if (d.lane() == 0) w.by[at] = own;
      }
    });
  if (global && warp == 0)
    for (int64_t j = 0; j < kinds; ++j) {
      const double squares = over_chunks<double>(d, chunks, [&](int64_t k) { return w.all_squares[k * kinds + j]; });
      if (d.lane() == 0) w.all_deviation[j] = deviation(squares, n);
    }
  d.sync_grid();

  // 5
  each_group(d, a.ids, t, [&](int64_t begin, int64_t end) {
    if (end - begin <= CHUNK) {
      if (begin >= t.low && global) small(begin, end, false);
      return;
    }
    for (int64_t j = d.lane(); j < kinds; j += LANES) {
      const int64_t at = slot_of(begin, true) * kinds + j;
      mean[j] = w.mean[at];
      by[j] = divisor(a.scale, w.zero[at], w.by[at], global ? w.all_deviation[j] : 0.0, a.eps);
    }
    d.sync_warp();
    write_range<D, T>(d, a, larger(begin, t.low), smaller(end, t.high), mean, by, s.weight);
    d.sync_warp();
  });
}

// The surrogate: a warp takes every warps-th chunk of elements; the first warp adds the chunks' sums. parts: [chunks, 4].
template <class D, class T>
LDO_DEVICE void surrogate_body(const D& d, const Surrogate& s, double* parts) {
  const T *logp = static_cast<const T*>(s.logp), *old = static_cast<const T*>(s.logp_old), *advantage = static_cast<const T*>(s.advantage);
  const T *divergence = static_cast<const T*>(s.divergence), *weights = static_cast<const T*>(s.weights);
  T *scalars = static_cast<T*>(s.scalars), *ratio = static_cast<T*>(s.ratio), *slope = static_cast<T*>(s.slope);
  const int64_t count = s.samples * s.steps, chunks = chunks_of(count);
  for (int64_t chunk = int64_t(d.block()) * WARPS + d.warp(); chunk < chunks; chunk += int64_t(d.blocks()) * WARPS) {
    double weighted = 0, policy = 0, away = 0, clipped = 0;
    for (int64_t i = chunk * CHUNK + d.lane(); i < smaller((chunk + 1) * CHUNK, count); i += LANES) {
      const Element e = element(logp[i], old[i], advantage[i / s.steps], s.clip);
      ratio[i] = static_cast<T>(e.ratio);
      slope[i] = static_cast<T>(e.slope);
      policy += e.value;
      clipped += e.clipped ? 1.0 : 0.0;
      if (weights) weighted += weights[i % s.steps] * e.value;
      if (divergence) away += divergence[i];
    }
    const double sums[4] = {add_lanes(d, weighted), add_lanes(d, policy), add_lanes(d, away), add_lanes(d, clipped)};
    for (int q = 0; q < 4; ++q)
      if (d.lane() == 0) parts[chunk * 4 + q] = sums[q];
  }
  d.sync_grid();
  if (d.block() || d.warp()) return;
  double mean[4];
  for (int q = 0; q < 4; ++q) mean[q] = over_chunks<double>(d, chunks, [&](int64_t k) { return parts[k * 4 + q]; }) / static_cast<double>(count);
  if (d.lane()) return;
  scalars[0] = static_cast<T>(s.weight * (weights ? mean[0] : mean[1]) + (divergence ? s.kl * mean[2] : 0.0));
  scalars[1] = static_cast<T>(mean[1]);
  scalars[2] = static_cast<T>(mean[2]);
  scalars[3] = static_cast<T>(mean[3]);
}

}  // namespace ldo
