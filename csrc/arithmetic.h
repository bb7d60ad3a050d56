// What the CPU form and the GPU form share: types, arguments, the order of sums and the arithmetic of one value.
//
// Everything is computed in fp64 and in one fixed order, so both forms give the same bits, on any number of cores or
// blocks. A range of values is cut into chunks of CHUNK. In a chunk, lane l of 32 adds values l, l + 32, ... Lanes are
// added in pairs (l, l + 16), then (l, l + 8), ... The chunks' sums are added in the same way. Neither compiler may
// fuse a multiplication with an addition (-ffp-contract=off, --fmad=false).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#ifdef __CUDACC__
#define LDO_BOTH __host__ __device__ __forceinline__
#define LDO_DEVICE __device__ __forceinline__
#else
#define LDO_BOTH inline
#define LDO_DEVICE inline
#endif

namespace ldo {

constexpr int LANES = 32;
constexpr int64_t CHUNK = 1024;
constexpr int MAX_REWARDS = 32;  // of one sample; a warp keeps that many means
constexpr double INFINITE = std::numeric_limits<double>::infinity();

enum Dtype : int { FLOAT32 = 0, FLOAT64 = 1, BFLOAT16 = 2 };
enum Scale : int { GROUP = 0, GLOBAL = 1, NONE = 2 };
// BAD: the flat index of the first reward that is not finite, or -1.
enum Info : int { GROUPS = 0, UNORDERED = 1, BAD = 2, INFO_SIZE = 3 };

struct bfloat16 {
  uint16_t bits;
};

// Group advantages of samples whose ids never decrease; see ldo/ops/advantage.py for the formula.
// If they decrease somewhere, or a reward is not finite, only info is written.
struct Advantage {
  const void* rewards;  // [samples, kinds]
  Dtype rewards_type;
  const int64_t* ids;  // [samples]
  const void* weights;  // [kinds] or null
  Dtype weights_type;
  int64_t samples;
  int64_t kinds;
  Scale scale;
  double clip;
  double eps;
  Dtype out_type;  // of the next three
  void* advantage = nullptr;  // [samples]
  void* mean = nullptr;  // [samples, kinds], of which the first info[GROUPS] rows are written, groups in ascending id
  void* deviation = nullptr;  // like mean
  uint8_t* zero = nullptr;  // like mean: all rewards of the group are equal
  int64_t* info = nullptr;  // [INFO_SIZE]
};

// The clipped surrogate; see ldo/ops/surrogate.py for the formula.
struct Surrogate {
  Dtype type;  // of every array; FLOAT32 or FLOAT64
  const void* logp;  // [samples, steps]
  const void* logp_old;  // [samples, steps] or null: 0
  const void* advantage;  // [samples]
  const void* divergence;  // [samples, steps] or null
  const void* weights;  // [steps] or null
  int64_t samples;
  int64_t steps;
  double clip;
  double weight;  // of the policy part
  double kl;
  void* scalars = nullptr;  // [4]: total, policy, divergence, share clipped
  void* ratio = nullptr;  // [samples, steps]
  void* slope = nullptr;  // [samples, steps] or null: d max(..) / d logp of each element
};

void advantage_cpu(const Advantage& a);
void surrogate_cpu(const Surrogate& s);

LDO_BOTH double load(const float* p, int64_t i) { return p[i]; }
LDO_BOTH double load(const double* p, int64_t i) { return p[i]; }
LDO_BOTH double load(const bfloat16* p, int64_t i) {
  const uint32_t bits = static_cast<uint32_t>(p[i].bits) << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
LDO_BOTH double load(const void* p, Dtype type, int64_t i) {
  if (type == FLOAT64) return load(static_cast<const double*>(p), i);
  if (type == FLOAT32) return load(static_cast<const float*>(p), i);
  return load(static_cast<const bfloat16*>(p), i);
}
LDO_BOTH void store(void* p, Dtype type, int64_t i, double value) {
  if (type == FLOAT64)
    static_cast<double*>(p)[i] = value;
  else
    static_cast<float*>(p)[i] = static_cast<float>(value);
}

LDO_BOTH bool is_finite(double x) { return x - x == 0; }
LDO_BOTH int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
LDO_BOTH int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
LDO_BOTH int64_t chunks_of(int64_t count) { return (count + CHUNK - 1) / CHUNK; }

// Sum, smallest and largest of some values.
struct Sums {
  double sum = 0;
  double low = INFINITE;
  double high = -INFINITE;
  LDO_BOTH void add(double x) {
    sum += x;
    low = x < low ? x : low;
    high = x > high ? x : high;
  }
  LDO_BOTH void add(const Sums& other) {
    sum += other.sum;
    low = other.low < low ? other.low : low;
    high = other.high > high ? other.high : high;
  }
};

LDO_BOTH double deviation(double squares, int64_t count) { return sqrt(squares / static_cast<double>(count)); }

// What a centred reward is divided by. A group without variance is divided by infinity: its advantage is 0.
LDO_BOTH double divisor(Scale scale, bool zero, double own, double overall, double eps) {
  if (zero) return INFINITE;
  return scale == GROUP ? own + eps : scale == GLOBAL ? overall + eps : 1.0;
}

LDO_BOTH double clamp(double x, double low, double high) { return x < low ? low : x > high ? high : x; }

// One element of the surrogate. Like torch.maximum, a NaN goes through.
struct Element {
  double ratio, value, slope;
  bool clipped;
};
LDO_BOTH Element element(double logp, double logp_old, double advantage, double clip) {
  Element e;
  e.ratio = exp(logp - logp_old);
  const double unclipped = -advantage * e.ratio, at_bound = -advantage * clamp(e.ratio, 1 - clip, 1 + clip);
  e.clipped = at_bound > unclipped;
  e.value = e.clipped ? at_bound : unclipped;
  e.slope = e.clipped ? 0.0 : unclipped;
  return e;
}

}  // namespace ldo
