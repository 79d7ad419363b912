// A CUDA driver without a GPU: it loads nothing, launches nothing, and writes down what it was to
// launch. These are the functions that Triton's launcher calls.
#include <stdint.h>
#include <string.h>

#include "cuda.h"
#undef cuCtxGetLimit

struct {
    uint32_t grid[3], threads, shared, launches, early;
    uint64_t function, stream, values[96];
} launched;
int count; // of the parameters of the kernel that is launched next

static uint64_t next = 4096; // handles

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *v) { *v = CUDA_VERSION; return CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult e, const char **text) { *text = "?"; return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int i) { *device = i; return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice d) { *c = (CUcontext)1; return CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *c) { *c = (CUcontext)1; return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext c) { return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit l) { *value = 0; return CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit l, size_t value) { return CUDA_SUCCESS; }
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute a, int v) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache c) { return CUDA_SUCCESS; }

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute a, CUdevice d) {
    *value = 232448; // shared memory of a block on sm_90; of other attributes anything large will do
    return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute a, CUfunction f) {
    *value = 1024; // threads that a block may have
    return CUDA_SUCCESS;
}
CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    *module = (CUmodule)(next += 16);
    return CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction *f, CUmodule module, const char *name) {
    *f = (CUfunction)(next += 16);
    return CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void *data, CUpointer_attribute a, CUdeviceptr pointer) {
    memcpy(data, &pointer, sizeof pointer);
    return CUDA_SUCCESS;
}
CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **params, void **extra) {
    uint32_t launches = launched.launches + 1;
    memset(&launched, 0, sizeof launched);
    launched.grid[0] = c->gridDimX, launched.grid[1] = c->gridDimY, launched.grid[2] = c->gridDimZ;
    launched.threads = c->blockDimX, launched.shared = c->sharedMemBytes;
    launched.launches = launches;
    for (unsigned i = 0; i < c->numAttrs; i++) // may it begin before the kernel before it has ended?
        if (c->attrs[i].id == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION)
            launched.early = c->attrs[i].value.programmaticStreamSerializationAllowed;
    launched.function = (uint64_t)f, launched.stream = (uint64_t)c->hStream;
    for (int i = 0; i < count; i++) // four bytes are a number, and the half of an address that varies
        memcpy(&launched.values[i], params[i], 4);
    return CUDA_SUCCESS;
}
