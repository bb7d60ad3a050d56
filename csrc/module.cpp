// The Python module ldo._C: raw pointers, sizes, types and a stream in, nothing of torch. ldo/ops/native.py checks the
// tensors behind the pointers; what can be checked without them is checked again here.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "arithmetic.h"
#ifdef LDO_WITH_CUDA
#include "launch.h"
#endif

namespace py = pybind11;
using namespace ldo;

namespace {

constexpr int INTERFACE = 1;  // raised with every change of a signature; ldo/ops/extension.py refuses another

void require(bool ok, const char* message) {
  if (!ok) throw std::invalid_argument(std::string("ldo._C: ") + message);
}

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

Dtype real(int code) {
  require(code == FLOAT32 || code == FLOAT64, "only float32 and float64 are known here");
  return static_cast<Dtype>(code);
}

Dtype dtype(int code) { return code == BFLOAT16 ? BFLOAT16 : real(code); }

Advantage advantage(uintptr_t rewards, int rewards_type, uintptr_t ids, uintptr_t weights, int weights_type, int64_t samples, int64_t kinds, int scale,
                    double clip, double eps, int out_type, uintptr_t out, uintptr_t mean, uintptr_t deviation, uintptr_t zero, uintptr_t info) {
  require(samples > 0 && kinds > 0 && kinds <= MAX_REWARDS, "at least one sample and 1 to 32 rewards are needed");
  require(rewards && ids && out && mean && deviation && zero && info, "a pointer is null");
  require(scale >= GROUP && scale <= NONE, "unknown scale");
  require(rewards_type == FLOAT64 || out_type == FLOAT32, "only float64 rewards have float64 advantages");
  return {pointer<void>(rewards), dtype(rewards_type), pointer<int64_t>(ids), pointer<void>(weights), dtype(weights_type), samples, kinds,
          static_cast<Scale>(scale), clip, eps, real(out_type), pointer<void>(out), pointer<void>(mean), pointer<void>(deviation),
          pointer<uint8_t>(zero), pointer<int64_t>(info)};
}

Surrogate surrogate(int type, uintptr_t logp, uintptr_t logp_old, uintptr_t advantage, uintptr_t divergence, uintptr_t weights, int64_t samples,
                    int64_t steps, double clip, double weight, double kl, uintptr_t scalars, uintptr_t ratio, uintptr_t slope) {
  require(samples > 0 && steps > 0, "at least one sample and one step are needed");
  require(logp && logp_old && advantage && scalars && ratio && slope, "a pointer is null");
  return {real(type), pointer<void>(logp), pointer<void>(logp_old), pointer<void>(advantage), pointer<void>(divergence), pointer<void>(weights),
          samples, steps, clip, weight, kl, pointer<void>(scalars), pointer<void>(ratio), pointer<void>(slope)};
}

#ifdef LDO_WITH_CUDA
void succeed(int error, const char* what) {
  if (error) throw std::runtime_error(std::string(what) + ": CUDA error " + std::to_string(error) + ", " + error_text(error));
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("INTERFACE") = INTERFACE;
  m.attr("MAX_REWARDS") = MAX_REWARDS;

  m.def("advantage_cpu", [](uintptr_t rewards, int rewards_type, uintptr_t ids, uintptr_t weights, int weights_type, int64_t samples, int64_t kinds,
                            int scale, double clip, double eps, int out_type, uintptr_t out, uintptr_t mean, uintptr_t deviation, uintptr_t zero,
                            uintptr_t info) {
    const auto a = advantage(rewards, rewards_type, ids, weights, weights_type, samples, kinds, scale, clip, eps, out_type, out, mean, deviation, zero, info);
    py::gil_scoped_release release;
    advantage_cpu(a);
  });
  m.def("surrogate_cpu", [](int type, uintptr_t logp, uintptr_t logp_old, uintptr_t advantage, uintptr_t divergence, uintptr_t weights, int64_t samples,
                            int64_t steps, double clip, double weight, double kl, uintptr_t scalars, uintptr_t ratio, uintptr_t slope) {
    const auto s = surrogate(type, logp, logp_old, advantage, divergence, weights, samples, steps, clip, weight, kl, scalars, ratio, slope);
    py::gil_scoped_release release;
    surrogate_cpu(s);
  });

#ifdef LDO_WITH_CUDA
  m.attr("CUDA") = true;
  m.def("advantage_workspace", &advantage_workspace);
  m.def("surrogate_workspace", &surrogate_workspace);
  m.def("devices", [] {
    int count = 0;
    succeed(device_count(&count), "no CUDA device");
    return count;
  });
  m.def("advantage_cuda", [](uintptr_t rewards, int rewards_type, uintptr_t ids, uintptr_t weights, int weights_type, int64_t samples, int64_t kinds,
                             int scale, double clip, double eps, int out_type, uintptr_t out, uintptr_t mean, uintptr_t deviation, uintptr_t zero,
                             uintptr_t info, uintptr_t workspace, int device, uintptr_t stream) {
    const auto a = advantage(rewards, rewards_type, ids, weights, weights_type, samples, kinds, scale, clip, eps, out_type, out, mean, deviation, zero, info);
    require(workspace && device >= 0, "a pointer is null or the device is negative");
    succeed(advantage_cuda(a, pointer<void>(workspace), device, pointer<void>(stream)), "group_advantage");
  });
  m.def("surrogate_cuda", [](int type, uintptr_t logp, uintptr_t logp_old, uintptr_t advantage, uintptr_t divergence, uintptr_t weights, int64_t samples,
                             int64_t steps, double clip, double weight, double kl, uintptr_t scalars, uintptr_t ratio, uintptr_t slope, uintptr_t workspace, int device,
                             uintptr_t stream) {
    const auto s = surrogate(type, logp, logp_old, advantage, divergence, weights, samples, steps, clip, weight, kl, scalars, ratio, slope);
    require(workspace && device >= 0, "a pointer is null or the device is negative");
    succeed(surrogate_cuda(s, pointer<void>(workspace), device, pointer<void>(stream)), "grpo_surrogate");
  });
#else
  m.attr("CUDA") = false;
#endif
}
