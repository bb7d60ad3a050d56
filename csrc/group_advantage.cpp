// Group advantages on the CPU: one group after the other, two passes over each for mean and spread.
#include <type_traits>
#include <vector>

#include "arithmetic.h"

namespace ldo {
namespace {

// Adds lanes in pairs, as a warp's butterfly does.
template <class V>
V pairwise(V (&lane)[LANES]) {
  for (int half = LANES / 2; half; half /= 2)
    for (int l = 0; l < half; ++l) {
      if constexpr (std::is_same_v<V, double>)
        lane[l] += lane[l + half];
      else
        lane[l].add(lane[l + half]);
    }
  return lane[0];
}

// Adds up value(i) for i in [begin, end), in the order that arithmetic.h states. V is double or Sums.
template <class V, class F>
V fold(int64_t begin, int64_t end, F value) {
  auto add = [](V& to, const auto& x) {
    if constexpr (std::is_same_v<V, double>)
      to += x;
    else
      to.add(x);
  };
  auto chunk = [&](int64_t from, int64_t to) {
    V lane[LANES] = {};
    int64_t i = from;
    for (; i + LANES <= to; i += LANES)
      for (int l = 0; l < LANES; ++l) add(lane[l], value(i + l));
    for (int l = 0; i < to; ++i, ++l) add(lane[l], value(i));
    return pairwise(lane);
  };
  if (end - begin <= CHUNK) return chunk(begin, end);
  V lane[LANES] = {};
  for (int64_t k = 0; k < chunks_of(end - begin); ++k) add(lane[k % LANES], chunk(begin + k * CHUNK, smaller(begin + (k + 1) * CHUNK, end)));
  return pairwise(lane);
}

// Writes info: the number of groups, whether ids decrease somewhere, and the first reward that is not finite.
template <class T>
void inspect(const Advantage& a, const T* rewards) {
  a.info[GROUPS] = 0;
  a.info[UNORDERED] = 0;
  a.info[BAD] = -1;
  for (int64_t i = 0; i < a.samples; ++i) {
    a.info[GROUPS] += i == 0 || a.ids[i] != a.ids[i - 1];
    if (i && a.ids[i] < a.ids[i - 1]) a.info[UNORDERED] = 1;
  }
  for (int64_t i = 0; i < a.samples * a.kinds; ++i)
    if (!is_finite(load(rewards, i))) {
      a.info[BAD] = i;
      return;
    }
}

template <class T>
void run(const Advantage& a) {
  const T* rewards = static_cast<const T*>(a.rewards);
  const int64_t n = a.samples, kinds = a.kinds;
  inspect(a, rewards);
  if (a.info[UNORDERED] || a.info[BAD] >= 0) return;

  auto squares = [&](int64_t begin, int64_t end, int64_t j, double mean) {
    return fold<double>(begin, end, [=](int64_t i) {
      const double c = load(rewards, i * kinds + j) - mean;
      return c * c;
    });
  };
  auto plain = [&](int64_t j) { return [=](int64_t i) { return load(rewards, i * kinds + j); }; };
  double mean[MAX_REWARDS], divisors[MAX_REWARDS], overall[MAX_REWARDS] = {}, weight[MAX_REWARDS];
  for (int64_t j = 0; j < kinds; ++j) {
    weight[j] = a.weights ? load(a.weights, a.weights_type, j) : 1.0;
    if (a.scale != GLOBAL) continue;
    const double centre = fold<double>(0, n, plain(j)) / static_cast<double>(n);
    overall[j] = deviation(squares(0, n, j, centre), n);
  }
  int64_t group = 0;
  for (int64_t begin = 0, end; begin < n; begin = end, ++group) {
    for (end = begin + 1; end < n && a.ids[end] == a.ids[begin];) ++end;
    for (int64_t j = 0; j < kinds; ++j) {
      const Sums sums = fold<Sums>(begin, end, plain(j));
      mean[j] = sums.sum / static_cast<double>(end - begin);
      const double own = deviation(squares(begin, end, j, mean[j]), end - begin);
      const bool zero = sums.low == sums.high;
      divisors[j] = divisor(a.scale, zero, own, overall[j], a.eps);
      store(a.mean, a.out_type, group * kinds + j, mean[j]);
      store(a.deviation, a.out_type, group * kinds + j, own);
      a.zero[group * kinds + j] = zero;
    }
    for (int64_t i = begin; i < end; ++i) {
      double total = 0;
      for (int64_t j = 0; j < kinds; ++j) total += weight[j] * ((load(rewards, i * kinds + j) - mean[j]) / divisors[j]);
      store(a.advantage, a.out_type, i, clamp(total, -a.clip, a.clip));
    }
  }
}

template <class T>
void run(const Surrogate& s) {
  const T *logp = static_cast<const T*>(s.logp), *old = static_cast<const T*>(s.logp_old), *advantage = static_cast<const T*>(s.advantage);
  const T *divergence = static_cast<const T*>(s.divergence), *weights = static_cast<const T*>(s.weights);
  T *scalars = static_cast<T*>(s.scalars), *ratio = static_cast<T*>(s.ratio), *slope = static_cast<T*>(s.slope);
  const int64_t count = s.samples * s.steps;
  auto at = [&](int64_t i) { return element(logp[i], old ? old[i] : T(0), advantage[i / s.steps], s.clip); };
  for (int64_t i = 0; i < count; ++i) {
    const Element e = at(i);
    ratio[i] = static_cast<T>(e.ratio);
    if (slope) slope[i] = static_cast<T>(e.slope);
  }
  const double c = static_cast<double>(count);
  const double policy = fold<double>(0, count, [&](int64_t i) { return at(i).value; }) / c;
  const double clipped = fold<double>(0, count, [&](int64_t i) { return at(i).clipped ? 1.0 : 0.0; }) / c;
  const double weighted =
      weights ? fold<double>(0, count, [&](int64_t i) { return weights[i % s.steps] * at(i).value; }) / c : policy;
  const double away = divergence ? fold<double>(0, count, [&](int64_t i) { return static_cast<double>(divergence[i]); }) / c : 0.0;
  scalars[0] = static_cast<T>(s.weight * weighted + (divergence ? s.kl * away : 0.0));
  scalars[1] = static_cast<T>(policy);
  scalars[2] = static_cast<T>(away);
  scalars[3] = static_cast<T>(clipped);
}

}  // namespace

void advantage_cpu(const Advantage& a) {
  if (a.rewards_type == FLOAT32) return run<float>(a);
  if (a.rewards_type == BFLOAT16) return run<bfloat16>(a);
  run<double>(a);
}

void surrogate_cpu(const Surrogate& s) {
  if (s.type == FLOAT32) return run<float>(s);
  run<double>(s);
}

}  // namespace ldo
