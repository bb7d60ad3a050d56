// The Python module ldo._C. It takes raw pointers, sizes, types and a stream, and knows nothing of torch.
// ldo/ops/native.py checks the tensors behind the pointers; whatever can be checked without them is checked again here.
// All arguments are passed by name.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "arithmetic.h"
#ifdef LDO_WITH_CUDA
#include "launch.h"
#endif

namespace py = pybind11;
using namespace ldo;

namespace {

constexpr int INTERFACE = 2;  // raise it with every change of a signature; ldo/ops/extension.py refuses any other
constexpr int CPU = -1;  // the device that is no GPU

using Address = uintptr_t;  // 0 is null

void require(bool ok, const char* message) {
  if (!ok) throw std::invalid_argument(std::string("ldo._C: ") + message);
}

template <class T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

Dtype real(int code) {
  require(code == FLOAT32 || code == FLOAT64, "only float32 and float64 are known here");
  return static_cast<Dtype>(code);
}

Dtype dtype(int code) { return code == BFLOAT16 ? BFLOAT16 : real(code); }

// Whether this call is for a GPU. Checks what it needs there.
bool on_gpu(int device, Address workspace, int64_t workspace_bytes) {
  if (device == CPU) return false;
#ifdef LDO_WITH_CUDA
  require(device >= 0, "the device is negative");
  require(workspace || !workspace_bytes, "a pointer is null");
  return true;
#else
  (void)workspace, (void)workspace_bytes;
  throw std::invalid_argument("ldo._C: built without CUDA");
#endif
}

#ifdef LDO_WITH_CUDA
void succeed(int error, const char* what) {
  if (error) throw std::runtime_error(std::string(what) + ": CUDA error " + std::to_string(error) + ", " + error_text(error));
}
#else
int64_t advantage_workspace(int64_t, int64_t) { return 0; }
int64_t surrogate_workspace(int64_t, int64_t) { return 0; }
#endif

// Returns info if it waits, which it always does on the CPU; there the info pointer may be null.
py::object group_advantage(Address rewards, int rewards_type, Address ids, Address weights, int weights_type, int64_t samples, int64_t kinds,
                           int scale, double clip, double eps, int out_type, Address advantage, Address mean, Address deviation, Address zero,
                           Address info, Address workspace, int device, Address stream, bool wait) {
  require(samples > 0 && kinds > 0 && kinds <= MAX_REWARDS, "at least one sample and 1 to 32 rewards are needed");
  require(rewards && ids && advantage && mean && deviation && zero && (info || device == CPU), "a pointer is null");
  require(scale >= GROUP && scale <= NONE, "unknown scale");
  require(rewards_type == FLOAT64 || out_type == FLOAT32, "only float64 rewards have float64 advantages");
  int64_t found[INFO_SIZE];
  Advantage a;
  a.rewards = pointer(rewards);
  a.rewards_type = dtype(rewards_type);
  a.ids = pointer<int64_t>(ids);
  a.weights = pointer(weights);
  a.weights_type = dtype(weights_type);
  a.samples = samples;
  a.kinds = kinds;
  a.scale = static_cast<Scale>(scale);
  a.clip = clip;
  a.eps = eps;
  a.out_type = real(out_type);
  a.advantage = pointer(advantage);
  a.mean = pointer(mean);
  a.deviation = pointer(deviation);
  a.zero = pointer<uint8_t>(zero);
  a.info = info ? pointer<int64_t>(info) : found;
  if (on_gpu(device, workspace, advantage_workspace(samples, kinds))) {
#ifdef LDO_WITH_CUDA
    succeed(advantage_cuda(a, pointer(workspace), device, pointer(stream)), "group_advantage");
    if (!wait) return py::none();
    int error;
    {
      py::gil_scoped_release release;
      error = read_info(a.info, found, device, pointer(stream));
    }
    succeed(error, "group_advantage");
#else
    (void)stream, (void)wait;
#endif
  } else {
    py::gil_scoped_release release;
    advantage_cpu(a);
    if (info) std::copy(a.info, a.info + INFO_SIZE, found);
  }
  return py::make_tuple(found[GROUPS], found[UNORDERED], found[BAD]);
}

void grpo_surrogate(int type, Address logp, Address logp_old, Address advantage, Address divergence, Address weights, int64_t samples, int64_t steps,
                    double clip, double weight, double kl, Address scalars, Address ratio, Address slope, Address workspace, int device,
                    Address stream) {
  require(samples > 0 && steps > 0, "at least one sample and one step are needed");
  require(logp && advantage && scalars && ratio, "a pointer is null");
  Surrogate s;
  s.type = real(type);
  s.logp = pointer(logp);
  s.logp_old = pointer(logp_old);
  s.advantage = pointer(advantage);
  s.divergence = pointer(divergence);
  s.weights = pointer(weights);
  s.samples = samples;
  s.steps = steps;
  s.clip = clip;
  s.weight = weight;
  s.kl = kl;
  s.scalars = pointer(scalars);
  s.ratio = pointer(ratio);
  s.slope = pointer(slope);
  if (on_gpu(device, workspace, surrogate_workspace(samples, steps))) {
#ifdef LDO_WITH_CUDA
    succeed(surrogate_cuda(s, pointer(workspace), device, pointer(stream)), "grpo_surrogate");
#else
    (void)stream;
#endif
  } else {
    py::gil_scoped_release release;
    surrogate_cpu(s);
  }
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("INTERFACE") = INTERFACE;
  m.attr("MAX_REWARDS") = MAX_REWARDS;
  m.attr("CPU") = CPU;

  m.def("group_advantage", &group_advantage, py::kw_only(), py::arg("rewards"), py::arg("rewards_type"), py::arg("ids"), py::arg("weights") = 0,
        py::arg("weights_type") = 0, py::arg("samples"), py::arg("kinds"), py::arg("scale"), py::arg("clip"), py::arg("eps"), py::arg("out_type"),
        py::arg("advantage"), py::arg("mean"), py::arg("deviation"), py::arg("zero"), py::arg("info") = 0, py::arg("workspace") = 0,
        py::arg("device") = CPU, py::arg("stream") = 0, py::arg("wait") = true);
  m.def("grpo_surrogate", &grpo_surrogate, py::kw_only(), py::arg("type"), py::arg("logp"), py::arg("logp_old") = 0, py::arg("advantage"),
        py::arg("divergence") = 0, py::arg("weights") = 0, py::arg("samples"), py::arg("steps"), py::arg("clip"), py::arg("weight"), py::arg("kl"),
        py::arg("scalars"), py::arg("ratio"), py::arg("slope") = 0, py::arg("workspace") = 0, py::arg("device") = CPU, py::arg("stream") = 0);
  // bytes of scratch memory that a call on a GPU needs
  m.def("advantage_workspace", &advantage_workspace);
  m.def("surrogate_workspace", &surrogate_workspace);

#ifdef LDO_WITH_CUDA
  m.attr("CUDA") = true;
  m.def("devices", [] {
    int count = 0;
    succeed(device_count(&count), "no CUDA device");
    return count;
  });
#else
  m.attr("CUDA") = false;
#endif
}
