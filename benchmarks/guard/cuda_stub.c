/* A CUDA driver whose calls succeed at once and do nothing, for timing what a launch costs the host on a machine without a GPU. */
#include <stddef.h>
#include <stdint.h>

#define SUCCESS { return 0; }
#define RETURNS(pointer, value) { *(pointer) = (value); return 0; }

long launches = 0; /* read by call_time.py, which refuses to time a call that launched nothing */

int cuInit(unsigned flags) SUCCESS
int cuDriverGetVersion(int *version) RETURNS(version, 13000)
int cuGetErrorString(int error, const char **text) RETURNS(text, "the stub driver reports no errors")

int cuDeviceGet(int *device, int ordinal) RETURNS(device, 0)
int cuDeviceGetCount(int *count) RETURNS(count, 1)
int cuDeviceGetAttribute(int *value, int attribute, int device) RETURNS(value, 232448) /* shared memory of an H100 */
int cuDevicePrimaryCtxRetain(void **context, int device) RETURNS(context, (void *)1)
int cuCtxGetCurrent(void **context) RETURNS(context, (void *)1)
int cuCtxSetCurrent(void *context) SUCCESS
int cuCtxGetDevice(int *device) RETURNS(device, 0)
int cuCtxGetLimit(size_t *value, int limit) RETURNS(value, 1 << 20)
int cuCtxSetLimit(int limit, size_t value) SUCCESS

int cuModuleLoadData(void **module, const void *image) RETURNS(module, (void *)1)
int cuModuleUnload(void *module) SUCCESS
int cuModuleGetFunction(void **function, void *module, const char *name) RETURNS(function, (void *)1)
int cuFuncGetAttribute(int *value, int attribute, void *function) RETURNS(value, attribute == 0 ? 1024 : 0) /* 0: threads */
int cuFuncSetAttribute(void *function, int attribute, int value) SUCCESS
int cuFuncSetCacheConfig(void *function, int config) SUCCESS
int cuOccupancyMaxActiveClusters(int *count, void *function, void *config) RETURNS(count, 1)

int cuPointerGetAttribute(void *data, int attribute, uint64_t pointer) RETURNS((uint64_t *)data, pointer)
int cuStreamIsCapturing(void *stream, int *status) RETURNS(status, 0)
int cuTensorMapEncodeTiled(void) SUCCESS
int cuTensorMapEncodeIm2col(void) SUCCESS

int cuLaunchKernelEx(const void *config, void *function, void **arguments, void **extra) { launches++; return 0; }
int cuLaunchKernel(void *function, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                   void *stream, void **arguments, void **extra) { launches++; return 0; }
