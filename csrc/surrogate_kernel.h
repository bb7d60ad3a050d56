// The body of the surrogate's kernel. The chunks of elements are dealt out to the warps in turn; the first warp adds up
// the chunks' sums.
#pragma once

#include "warp.h"

namespace ldo {

constexpr int PARTS = 4;  // sums of a chunk: weighted losses, losses, divergences, clipped elements

// Up to WARPS chunks take one block, whose shared memory holds their sums.
LDO_BOTH int64_t parts_in_workspace(int64_t chunks) { return chunks <= WARPS ? 0 : chunks * PARTS; }

template <class D, class T>
class SurrogateKernel {
 public:
  // shared: [WARPS, PARTS]; workspace: [parts_in_workspace(chunks)]
  LDO_DEVICE SurrogateKernel(const D& device, const Surrogate& arguments, double* shared, double* workspace)
      : d(device),
        s(arguments),
        count(s.samples * s.steps),
        chunks(chunks_of(count)),
        parts(parts_in_workspace(chunks) ? workspace : shared),
        weights(static_cast<const T*>(s.weights)),
        divergence(static_cast<const T*>(s.divergence)) {}

  LDO_DEVICE void run() {
    for (int64_t chunk = int64_t(d.block()) * WARPS + d.warp(); chunk < chunks; chunk += int64_t(d.blocks()) * WARPS) elements_of(chunk);
    d.sync_grid();
    if (d.block() == 0 && d.warp() == 0) write_scalars();
  }

 private:
  // Writes the ratio and the slope of each element of a chunk, and the chunk's sums.
  LDO_DEVICE void elements_of(int64_t chunk) {
    const T *logp = static_cast<const T*>(s.logp), *old = static_cast<const T*>(s.logp_old), *advantage = static_cast<const T*>(s.advantage);
    T *ratio = static_cast<T*>(s.ratio), *slope = static_cast<T*>(s.slope);
    double weighted = 0, policy = 0, away = 0, clipped = 0;
    for (int64_t i = chunk * CHUNK + d.lane(); i < smaller((chunk + 1) * CHUNK, count); i += LANES) {
      const Element e = element(logp[i], old ? old[i] : T(0), advantage[i / s.steps], s.clip);
      ratio[i] = static_cast<T>(e.ratio);
      if (slope) slope[i] = static_cast<T>(e.slope);
      policy += e.value;
      clipped += e.clipped ? 1.0 : 0.0;
      if (weights) weighted += weights[i % s.steps] * e.value;
      if (divergence) away += divergence[i];
    }
    const double sums[PARTS] = {warp_sum(d, weighted), warp_sum(d, policy), warp_sum(d, away), warp_sum(d, clipped)};
    for (int q = 0; q < PARTS; ++q)
      if (d.lane() == 0) parts[chunk * PARTS + q] = sums[q];
  }

  // Adds the chunks' sums and writes the four means; one warp does.
  LDO_DEVICE void write_scalars() {
    T* scalars = static_cast<T*>(s.scalars);
    double mean[PARTS];
    for (int q = 0; q < PARTS; ++q)
      mean[q] = reduce_chunks<double>(d, chunks, [&](int64_t k) { return parts[k * PARTS + q]; }) / static_cast<double>(count);
    if (d.lane()) return;
    scalars[0] = static_cast<T>(s.weight * (weights ? mean[0] : mean[1]) + (divergence ? s.kl * mean[2] : 0.0));
    scalars[1] = static_cast<T>(mean[1]);
    scalars[2] = static_cast<T>(mean[2]);
    scalars[3] = static_cast<T>(mean[3]);
  }

  const D d;
  const Surrogate& s;
  const int64_t count, chunks;
  double* const parts;  // [chunks, PARTS]
  const T *const weights, *const divergence;
};

}  // namespace ldo
