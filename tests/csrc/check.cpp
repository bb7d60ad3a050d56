// The CPU form and the kernels' bodies (emulated) on random input: the same bits, whatever the grid and the order of threads.
//   check [CASES] [SEED]     built by tests/test_csrc.py under AddressSanitizer and UBSan
#include <algorithm>
#include <cstdio>

#include "emulate.h"

using namespace ldo;

namespace {

std::mt19937_64 rng;
int failures = 0;

int64_t integer(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(rng); }
double normal() { return std::normal_distribution<double>(2, 3)(rng); }

void expect(bool ok, const char* what, int number) {
  if (ok) return;
  ++failures;
  std::printf("case %d: %s\n", number, what);
}

template <class T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
  return std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

template <class T>
std::vector<T> draw(int64_t count) {
  std::vector<T> out(count);
  for (auto& x : out) {
    const double value = normal();
    if constexpr (std::is_same_v<T, bfloat16>) {
      const float f = static_cast<float>(value);
      uint32_t bits;
      std::memcpy(&bits, &f, sizeof bits);
      x = {static_cast<uint16_t>(bits >> 16)};
    } else {
      x = static_cast<T>(value);
    }
  }
  return out;
}

template <class T>
constexpr Dtype type_of = std::is_same_v<T, float> ? FLOAT32 : std::is_same_v<T, double> ? FLOAT64 : BFLOAT16;

template <class O>
struct Outputs {
  std::vector<O> advantage, mean, deviation;
  std::vector<uint8_t> zero;
  std::vector<int64_t> info = std::vector<int64_t>(INFO_SIZE, -7);
  Outputs(int64_t n, int64_t kinds) : advantage(n, O(-99)), mean(n * kinds, O(-99)), deviation(n * kinds, O(-99)), zero(n * kinds, 9) {}
  void into(Advantage& a) {
    a.advantage = advantage.data(), a.mean = mean.data(), a.deviation = deviation.data(), a.zero = zero.data(), a.info = info.data();
  }
  bool operator==(const Outputs& o) const {
    return same(advantage, o.advantage) && same(mean, o.mean) && same(deviation, o.deviation) && zero == o.zero && info == o.info;
  }
};

// Groups whose sizes lie around what changes the kernel's path: 1, a warp, a chunk, several chunks.
std::vector<int64_t> draw_ids() {
  const int64_t sizes[] = {1, integer(2, 16), 32, 33, integer(60, 70), CHUNK - 1, CHUNK, CHUNK + 1, integer(2 * CHUNK, 4 * CHUNK)};
  std::vector<int64_t> ids;
  int64_t id = integer(-1000, 1000);
  const int64_t groups = integer(1, 12);
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t most = integer(0, 3) ? 4 : 8;  // large groups are costly to emulate
    ids.insert(ids.end(), sizes[integer(0, most)], id);
    id += integer(1, int64_t(1) << 40);
  }
  return ids;
}

template <class T, class O>
void check_advantage(int number) {
  auto ids = draw_ids();
  const int64_t n = ids.size(), kinds = integer(1, 3);
  auto rewards = draw<T>(n * kinds);
  const int64_t flat = integer(0, n - 1);  // the group of this sample earns the same for its first reward
  for (int64_t i = 0; i < n; ++i)
    if (ids[i] == ids[flat]) rewards[i * kinds] = rewards[0];
  const int trouble = integer(0, 9);
  int64_t bad = -1;
  if constexpr (!std::is_same_v<T, bfloat16>)
    if (trouble == 0)
      for (int k = 0; k < 3; ++k) rewards[integer(0, n * kinds - 1)] = k ? std::numeric_limits<T>::infinity() : std::numeric_limits<T>::quiet_NaN();
  for (int64_t i = n * kinds - 1; i >= 0; --i)
    if (!is_finite(load(rewards.data(), i))) bad = i;
  if (trouble == 1) std::shuffle(ids.begin(), ids.end(), rng);
  const bool ordered = std::is_sorted(ids.begin(), ids.end());
  auto weights = draw<double>(kinds);
  Advantage a{rewards.data(), type_of<T>, ids.data(), integer(0, 1) ? weights.data() : nullptr, FLOAT64, n, kinds, Scale(integer(0, 2)),
              2.5, 1e-4, type_of<O>};

  Outputs<O> cpu(n, kinds);
  cpu.into(a);
  advantage_cpu(a);
  expect(cpu.info[BAD] == bad && cpu.info[UNORDERED] == !ordered, "the CPU form reports something else", number);
  if (ordered && bad < 0) {
    auto distinct = ids;
    distinct.erase(std::unique(distinct.begin(), distinct.end()), distinct.end());
    expect(cpu.info[GROUPS] == int64_t(distinct.size()), "the groups are not counted right", number);
  }
  const int blocks = integer(1, 3);
  Outputs<O> gpu(n, kinds);
  gpu.into(a);
  emulate::advantage<T>(a, blocks, number);
  expect(gpu == cpu, "the kernel's advantages differ from the CPU form's", number);
}

template <class T>
void check_surrogate(int number) {
  const int64_t n = integer(1, integer(0, 2) ? 900 : 4000), steps = integer(1, 5);  // up to more chunks than a block has warps
  auto logp = draw<T>(n * steps), old = logp, advantage = draw<T>(n), divergence = draw<T>(n * steps), weights = draw<T>(steps);
  for (auto& x : old) x += static_cast<T>(0.05 * normal());
  const bool has_old = integer(0, 3), has_slope = integer(0, 3);
  Surrogate s{type_of<T>, logp.data(), has_old ? old.data() : nullptr, advantage.data(), integer(0, 1) ? divergence.data() : nullptr,
              integer(0, 1) ? weights.data() : nullptr, n, steps, 0.1, 1.5, 0.5};
  std::vector<T> out[2][3];
  for (int form = 0; form < 2; ++form) {
    out[form][0].assign(4, T(-99)), out[form][1].assign(n * steps, T(-99)), out[form][2].assign(n * steps, T(-99));
    s.scalars = out[form][0].data(), s.ratio = out[form][1].data(), s.slope = has_slope ? out[form][2].data() : nullptr;
    if (form)
      emulate::surrogate<T>(s, integer(1, 2), number);
    else
      surrogate_cpu(s);
  }
  for (int k = 0; k < 3; ++k) expect(same(out[0][k], out[1][k]), "the kernel's surrogate differs from the CPU form's", number);
}

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 40;
  rng.seed(argc > 2 ? std::atoi(argv[2]) : 0);
  for (int number = 0; number < cases; ++number) {
    switch (number % 6) {
      case 0: check_advantage<float, float>(number); break;
      case 1: check_advantage<bfloat16, float>(number); break;
      case 2: check_advantage<double, float>(number); break;
      case 3: check_advantage<double, double>(number); break;
      case 4: check_surrogate<float>(number); break;
      case 5: check_surrogate<double>(number); break;
    }
  }
  std::printf("%d cases, %d failures\n", cases, failures);
  return failures != 0;
}
