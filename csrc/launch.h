// The CUDA side as the module sees it. Functions that return int return a cudaError_t; 0 is success.
#pragma once

#include "arithmetic.h"

namespace ldo {

int64_t advantage_workspace(int64_t samples, int64_t kinds);  // bytes
int64_t surrogate_workspace(int64_t samples, int64_t steps);
int advantage_cuda(const Advantage& a, void* workspace, int device, void* stream);
// After a launch: waits for the stream and copies info to the host.
int read_info(const int64_t* info, int64_t (&out)[INFO_SIZE], int device, void* stream);
int surrogate_cuda(const Surrogate& s, void* workspace, int device, void* stream);
int device_count(int* count);
const char* error_text(int error);

}  // namespace ldo
