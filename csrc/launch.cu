// Kernels around the bodies of advantage_kernel.h and surrogate_kernel.h, and their launches. No torch headers: they
// take only pointers, sizes and a stream.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <atomic>

#include "advantage_kernel.h"
#include "launch.h"
#include "surrogate_kernel.h"

namespace ldo {
namespace {

constexpr unsigned FULL = 0xffffffffu;

struct Device {
  __device__ int lane() const { return threadIdx.x % LANES; }
  __device__ int warp() const { return threadIdx.x / LANES; }
  __device__ int block() const { return blockIdx.x; }
  __device__ int blocks() const { return gridDim.x; }
  __device__ uint32_t ballot(bool x) const { return __ballot_sync(FULL, x); }
  __device__ double shuffle_xor(double x, int mask) const { return __shfl_xor_sync(FULL, x, mask); }
  __device__ int64_t shuffle_xor(int64_t x, int mask) const { return __shfl_xor_sync(FULL, static_cast<long long>(x), mask); }
  __device__ void sync_warp() const { __syncwarp(); }
  __device__ void sync_block() const { __syncthreads(); }
  __device__ void sync_grid() const {
    if (gridDim.x == 1)
      __syncthreads();
    else
      cooperative_groups::this_grid().sync();
  }
};

template <class T>
__global__ void __launch_bounds__(BLOCK, 2) advantage_kernel(Advantage a, Workspace w) {
  __shared__ Shared shared;
  AdvantageKernel<Device, T>(Device(), a, w, shared).run();
}

template <class T>
__global__ void __launch_bounds__(BLOCK) surrogate_kernel(Surrogate s, double* workspace) {
  __shared__ double shared[WARPS * PARTS];
  SurrogateKernel<Device, T>(Device(), s, shared, workspace).run();
}

// Makes a device current for its lifetime.
class Current {
 public:
  explicit Current(int device) {
    error = cudaGetDevice(&before_);
    if (error || before_ == device) return;
    error = cudaSetDevice(device);
    changed_ = !error;
  }
  ~Current() {
    if (changed_) cudaSetDevice(before_);
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

  cudaError_t error;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// As many blocks as the work can use and the device can hold at once: a cooperative launch needs them all resident.
template <class... P>
int launch(void (*kernel)(P...), int64_t warps, int device, void* stream, std::atomic<int>* resident, P... parameters) {
  const Current current(device);
  cudaError_t error = current.error;
  if (error) return error;
  int most = device < 64 ? resident[device].load(std::memory_order_relaxed) : 0;
  if (!most) {
    int per_sm = 0, sms = 0;
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kernel, BLOCK, 0);
    if (!error) error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
    if (error) return error;
    most = static_cast<int>(smaller(int64_t(per_sm) * sms, MAX_BLOCKS));
    if (device < 64) resident[device].store(most, std::memory_order_relaxed);
  }
  const int blocks = static_cast<int>(larger(1, smaller((warps + WARPS - 1) / WARPS, most)));
  void* pointers[] = {&parameters...};
  const void* function = reinterpret_cast<const void*>(kernel);
  error = blocks == 1 ? cudaLaunchKernel(function, 1, BLOCK, pointers, 0, static_cast<cudaStream_t>(stream))
                      : cudaLaunchCooperativeKernel(function, blocks, BLOCK, pointers, 0, static_cast<cudaStream_t>(stream));
  // reported here, so it must not be left for the next caller
  if (error) cudaGetLastError();
  return error;
}

template <class T>
int start(const Advantage& a, void* workspace, int device, void* stream) {
  static std::atomic<int> resident[64] = {};
  Workspace w;
  w.layout(static_cast<char*>(workspace), a.samples, a.kinds, most_blocks(a.samples));
  return launch(advantage_kernel<T>, (a.samples + LANES - 1) / LANES, device, stream, resident, a, w);
}

template <class T>
int start(const Surrogate& s, void* workspace, int device, void* stream) {
  static std::atomic<int> resident[64] = {};
  return launch(surrogate_kernel<T>, chunks_of(s.samples * s.steps), device, stream, resident, s, static_cast<double*>(workspace));
}

}  // namespace

int64_t advantage_workspace(int64_t samples, int64_t kinds) { return Workspace().layout(nullptr, samples, kinds, most_blocks(samples)); }
int64_t surrogate_workspace(int64_t samples, int64_t steps) {
  return parts_in_workspace(chunks_of(samples * steps)) * static_cast<int64_t>(sizeof(double));
}

int advantage_cuda(const Advantage& a, void* workspace, int device, void* stream) {
  if (a.rewards_type == FLOAT32) return start<float>(a, workspace, device, stream);
  if (a.rewards_type == BFLOAT16) return start<bfloat16>(a, workspace, device, stream);
  return start<double>(a, workspace, device, stream);
}

int surrogate_cuda(const Surrogate& s, void* workspace, int device, void* stream) {
  if (s.type == FLOAT32) return start<float>(s, workspace, device, stream);
  return start<double>(s, workspace, device, stream);
}

int read_info(const int64_t* info, int64_t (&out)[INFO_SIZE], int device, void* stream) {
  const Current current(device);
  cudaError_t error = current.error;
  if (!error) error = cudaMemcpyAsync(out, info, sizeof out, cudaMemcpyDeviceToHost, static_cast<cudaStream_t>(stream));
  if (!error) error = cudaStreamSynchronize(static_cast<cudaStream_t>(stream));
  if (error) cudaGetLastError();
  return error;
}

int device_count(int* count) {
  const cudaError_t error = cudaGetDeviceCount(count);
  if (error) cudaGetLastError();
  return error;
}
const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace ldo
