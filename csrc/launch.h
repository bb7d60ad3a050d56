// The CUDA side as the module sees it. All functions return a cudaError_t as int; 0 is success.
#pragma once

#include "arithmetic.h"

namespace ldo {

int64_t advantage_workspace(int64_t samples, int64_t kinds);  // bytes
int64_t surrogate_workspace(int64_t samples, int64_t steps);
int advantage_cuda(const Advantage& a, void* workspace, int device, void* stream);
int surrogate_cuda(const Surrogate& s, void* workspace, int device, void* stream);
int device_count(int* count);
const char* error_text(int error);

}  // namespace ldo
