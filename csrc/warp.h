// What the kernels share: the shape of a block and operations of one warp. They are written against a small device
// interface D, so that the GPU (launch.cu) and a host emulation (tests/csrc/emulate.h) run the same source. D has
// lane(), warp() in the block, block() and blocks(); ballot() and shuffle_xor() over a warp; sync_warp(), sync_block()
// and sync_grid(). All blocks are resident at once.
#pragma once

#include <type_traits>

#include "arithmetic.h"

namespace ldo {

constexpr int BLOCK = 256;
constexpr int WARPS = BLOCK / LANES;
constexpr int MAX_BLOCKS = 1024;

template <class D>
LDO_DEVICE double warp_sum(const D& d, double v) {
  for (int half = LANES / 2; half; half /= 2) v += d.shuffle_xor(v, half);
  return v;
}
template <class D>
LDO_DEVICE Sums warp_sum(const D& d, Sums v) {
  for (int half = LANES / 2; half; half /= 2) v.add(Sums{d.shuffle_xor(v.sum, half), d.shuffle_xor(v.low, half), d.shuffle_xor(v.high, half)});
  return v;
}
template <class D>
LDO_DEVICE int64_t warp_min(const D& d, int64_t v) {
  for (int half = LANES / 2; half; half /= 2) v = smaller(v, d.shuffle_xor(v, half));
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

// Adds one number of each chunk (get(k) of chunk k), lanes striding over chunks.
template <class V, class D, class F>
LDO_DEVICE V reduce_chunks(const D& d, int64_t chunks, F get) {
  V v{};
  for (int64_t k = d.lane(); k < chunks; k += LANES) {
    const V x = get(k);
    if constexpr (std::is_same_v<V, double>)
      v += x;
    else
      v.add(x);
  }
  return warp_sum(d, v);
}

}  // namespace ldo
