/* A libnvidia-ml.so.1 with two GPUs, for tests of what reads NVML through the real pynvml. GPU 1 has no power. */

#include <string.h>

enum { SUCCESS = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6 };

static int gpus[2] = {0, 1};
static int index_of(void *device) { return *(int *)device; }

int nvmlInitWithFlags(unsigned flags) { return SUCCESS; }
int nvmlShutdown(void) { return SUCCESS; }
const char *nvmlErrorString(int code) { return code == NOT_SUPPORTED ? "Not Supported" : "Other"; }

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) {
  if (index > 1) return INVALID_ARGUMENT;
  *device = &gpus[index];
  return SUCCESS;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) {
  if (strcmp(uuid, "GPU-stub-1")) return NOT_FOUND;
  *device = &gpus[1];
  return SUCCESS;
}

int nvmlDeviceGetPowerUsage(void *device, unsigned *milliwatts) {
  if (index_of(device) == 1) return NOT_SUPPORTED;
  *milliwatts = 700000;
  return SUCCESS;
}

int nvmlDeviceGetClockInfo(void *device, int type, unsigned *mhz) {
  *mhz = type == 1 ? 1980 : 2619;
  return SUCCESS;
}

int nvmlDeviceGetCurrentClocksEventReasons(void *device, unsigned long long *reasons) {
  *reasons = index_of(device) == 0 ? 0x4 | 0x1 : 0x1;
  return SUCCESS;
}
