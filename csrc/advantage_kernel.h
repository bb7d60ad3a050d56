// The body of group_advantage's kernel, in one launch. tiles.h explains tiles, large groups and chunks.
//
//   1  count the groups that begin in the tile; check the ids' order and the rewards; sum the chunks of large groups
//   2  groups of at most CHUNK samples whose first lies in the tile: mean, spread, statistics, advantages;
//      large groups: add the chunks' sums
//   3  large groups: sum the chunks' squares about the mean
//   4  large groups: add them
//   5  large groups: advantages
//
// The grid synchronises between the steps. Without large groups and global scale it is done after step 2. A chunk
// belongs to the warp in whose tile it begins. With scale "global", all samples together are one more large group, and
// advantages wait for step 5.
#pragma once

#include "tiles.h"

namespace ldo {

template <class D, class T>
class AdvantageKernel {
 public:
  LDO_DEVICE AdvantageKernel(const D& device, const Advantage& arguments, const Workspace& workspace, Shared& shared)
      : d(device),
        a(arguments),
        w(workspace),
        s(shared),
        rewards(static_cast<const T*>(a.rewards)),
        n(a.samples),
        kinds(a.kinds),
        warp(int64_t(d.block()) * WARPS + d.warp()),
        global(a.scale == GLOBAL),
        t(tile()) {}

  LDO_DEVICE void run() {
    load_weights();
    inspect_tile();  // 1
    d.sync_grid();
    collect(d, s, w);  // 2
    write_info();
    // the same for every thread of the grid, so no block is left waiting
    if (s.any_unordered || s.first_bad != INT64_MAX) return;
    const bool any_large = s.any_large;
    const int64_t before = group_before_tile();
    begin_groups(before);
    if (global) mean_of_all();
    if (!any_large && !global) return;
    d.sync_grid();
    if (any_large) square_large_groups();  // 3
    if (global) square_all();
    d.sync_grid();
    if (any_large) finish_large_groups(before);  // 4
    if (global) deviation_of_all();
    d.sync_grid();
    write_advantages();  // 5
  }

 private:
  // This warp's positions: the same number for every warp of the grid, a multiple of LANES.
  LDO_DEVICE Tile tile() const {
    const int64_t warps = int64_t(d.blocks()) * WARPS, width = (n + LANES * warps - 1) / (LANES * warps) * LANES;
    return {smaller(warp * width, n), smaller((warp + 1) * width, n), 0, 0, 0};
  }

  // Puts the rewards' weights where the whole block reads them.
  LDO_DEVICE void load_weights() {
    if (d.warp() == 0 && d.lane() < kinds) s.weight[d.lane()] = a.weights ? load(a.weights, a.weights_type, d.lane()) : 1.0;
  }

  // 1: checks each sample of the tile, sums the chunks that begin in it, and publishes the results to the grid.
  LDO_DEVICE void inspect_tile() {
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
    bad = warp_min(d, bad);
    if (t.low < t.high) {
      t.first = group_begin(d, a.ids, t.low);
      t.last = group_end(d, a.ids, t.high - 1, n);
      t.heads = static_cast<int>(heads - (t.first == t.low));
      has_large = sum_large_groups();
      if (global) sum_all();
    }
    publish(d, s, w, heads, has_large, bad, unordered);
  }

  // 1: sums of the large groups' chunks that begin in the tile. Returns whether there is a large group.
  LDO_DEVICE bool sum_large_groups() {
    bool has_large = false;
    each_group(d, a.ids, t, [&](int64_t begin, int64_t end) {
      if (end - begin <= CHUNK) return;
      has_large = true;
      each_chunk(t, begin, end, [&](int64_t from, int64_t to, int64_t slot) { sum_chunk(from, to, w.sums + slot * kinds); });
    });
    return has_large;
  }

  // 1: sums of the chunks of all samples that begin in the tile.
  LDO_DEVICE void sum_all() {
    each_chunk(t, 0, n, [&](int64_t from, int64_t to, int64_t) { sum_chunk(from, to, w.all_sums + from / CHUNK * kinds); });
  }

  LDO_DEVICE void sum_chunk(int64_t from, int64_t to, Sums* out) {
    for (int64_t j = 0; j < kinds; ++j) {
      const Sums sums = sum_range(d, rewards, kinds, j, from, to);
      if (d.lane() == 0) out[j] = sums;
    }
  }

  // 2: writes what the host reads; one thread of the grid does.
  LDO_DEVICE void write_info() {
    if (warp || d.lane()) return;
    a.info[GROUPS] = s.groups;
    a.info[UNORDERED] = s.any_unordered;
    a.info[BAD] = s.first_bad == INT64_MAX ? -1 : s.first_bad;
  }

  // The number of the group before this tile's first head.
  LDO_DEVICE int64_t group_before_tile() const {
    int64_t group = s.before - 1;
    for (int k = 0; k < d.warp(); ++k) group += s.heads[k];
    return group;
  }

  // 2: finishes small groups that begin in the tile, and computes the means of large ones.
  LDO_DEVICE void begin_groups(int64_t group) {
    each_group(d, a.ids, t, [&](int64_t begin, int64_t end) {
      if (begin < t.low) return;
      ++group;
      if (end - begin <= CHUNK)
        small_group(begin, end, group, true);
      else
        mean_of_large_group(begin, end);
    });
  }

  // A small group. The first call, with stats, writes its statistics, and its advantages too unless the scale is
  // global. Then the second call writes the advantages.
  LDO_DEVICE void small_group(int64_t begin, int64_t end, int64_t group, bool stats) {
    double *mean = s.mean[d.warp()], *divisors = s.divisors[d.warp()];
    for (int64_t j = 0; j < kinds; ++j) {
      const Sums sums = sum_range(d, rewards, kinds, j, begin, end);
      const double m = sums.sum / static_cast<double>(end - begin);
      const double own = stats || a.scale == GROUP ? deviation(square_range(d, rewards, kinds, j, begin, end, m), end - begin) : 0.0;
      const bool zero = sums.low == sums.high;
      if (stats) write_stats(d, a, group, j, m, own, zero);
      if (d.lane() == 0) {
        mean[j] = m;
        divisors[j] = divisor(a.scale, zero, own, stats ? 0.0 : w.all_deviation[j], a.eps);
      }
    }
    d.sync_warp();
    if (stats != global) write_range<D, T>(d, a, begin, end, mean, divisors, s.weight);
    d.sync_warp();
  }

  // 2: a large group's means, from its chunks' sums.
  LDO_DEVICE void mean_of_large_group(int64_t begin, int64_t end) {
    const int64_t own_slot = slot_of(begin, true);
    for (int64_t j = 0; j < kinds; ++j) {
      const Sums sums =
          reduce_chunks<Sums>(d, chunks_of(end - begin), [&](int64_t k) { return w.sums[slot_of(begin + k * CHUNK, k == 0) * kinds + j]; });
      if (d.lane()) continue;
      w.mean[own_slot * kinds + j] = sums.sum / static_cast<double>(end - begin);
      w.zero[own_slot * kinds + j] = sums.low == sums.high;
    }
  }

  // 2: the means of all samples; one warp of the grid.
  LDO_DEVICE void mean_of_all() {
    if (warp) return;
    for (int64_t j = 0; j < kinds; ++j) {
      const Sums sums = reduce_chunks<Sums>(d, chunks_of(n), [&](int64_t k) { return w.all_sums[k * kinds + j]; });
      if (d.lane() == 0) w.all_mean[j] = sums.sum / static_cast<double>(n);
    }
  }

  // 3: squares about the mean of the large groups' chunks that begin in the tile.
  LDO_DEVICE void square_large_groups() {
    each_group(d, a.ids, t, [&](int64_t begin, int64_t end) {
      if (end - begin <= CHUNK) return;
      each_chunk(t, begin, end, [&](int64_t from, int64_t to, int64_t slot) {
        square_chunk(from, to, w.mean + slot_of(begin, true) * kinds, w.squares + slot * kinds);
      });
    });
  }

  // 3: squares about the mean of the chunks of all samples that begin in the tile.
  LDO_DEVICE void square_all() {
    each_chunk(t, 0, n, [&](int64_t from, int64_t to, int64_t) { square_chunk(from, to, w.all_mean, w.all_squares + from / CHUNK * kinds); });
  }

  LDO_DEVICE void square_chunk(int64_t from, int64_t to, const double* mean, double* out) {
    for (int64_t j = 0; j < kinds; ++j) {
      const double squares = square_range(d, rewards, kinds, j, from, to, mean[j]);
      if (d.lane() == 0) out[j] = squares;
    }
  }

  // 4: the spread and statistics of large groups that begin in the tile, from their chunks' squares.
  LDO_DEVICE void finish_large_groups(int64_t group) {
    each_group(d, a.ids, t, [&](int64_t begin, int64_t end) {
      if (begin < t.low) return;
      ++group;
      if (end - begin <= CHUNK) return;
      for (int64_t j = 0; j < kinds; ++j) {
        const int64_t at = slot_of(begin, true) * kinds + j;
        const double squares =
            reduce_chunks<double>(d, chunks_of(end - begin), [&](int64_t k) { return w.squares[slot_of(begin + k * CHUNK, k == 0) * kinds + j]; });
        const double own = deviation(squares, end - begin);
        write_stats(d, a, group, j, w.mean[at], own, w.zero[at]);
        if (d.lane() == 0) w.spread[at] = own;
      }
    });
  }

  // 4: the spread of all samples; one warp of the grid.
  LDO_DEVICE void deviation_of_all() {
    if (warp) return;
    for (int64_t j = 0; j < kinds; ++j) {
      const double squares = reduce_chunks<double>(d, chunks_of(n), [&](int64_t k) { return w.all_squares[k * kinds + j]; });
      if (d.lane() == 0) w.all_deviation[j] = deviation(squares, n);
    }
  }

  // 5: advantages of the tile's samples of large groups, and with global scale of small groups that begin in it.
  LDO_DEVICE void write_advantages() {
    double *mean = s.mean[d.warp()], *divisors = s.divisors[d.warp()];
    each_group(d, a.ids, t, [&](int64_t begin, int64_t end) {
      if (end - begin <= CHUNK) {
        if (begin >= t.low && global) small_group(begin, end, 0, false);
        return;
      }
      for (int64_t j = d.lane(); j < kinds; j += LANES) {
        const int64_t at = slot_of(begin, true) * kinds + j;
        mean[j] = w.mean[at];
        divisors[j] = divisor(a.scale, w.zero[at], w.spread[at], global ? w.all_deviation[j] : 0.0, a.eps);
      }
      d.sync_warp();
      write_range<D, T>(d, a, larger(begin, t.low), smaller(end, t.high), mean, divisors, s.weight);
      d.sync_warp();
    });
  }

  const D d;
  const Advantage& a;
  const Workspace& w;
  Shared& s;
  const T* const rewards;
  const int64_t n, kinds;
  const int64_t warp;  // of the grid
  const bool global;
  Tile t;
};

}  // namespace ldo
