/* A libnvidia-ml.so.1 with two GPUs, for tests of what reads NVML through the real pynvml. Layouts are nvml.h's.
 *
 * GPU 0 has NVLinks to GPU 1 and counters that rise with each reading; its 32-bit PCIe counter for what it sends is
 * about to wrap around. GPU 1 has neither NVLink nor power. */
#include <stdio.h>
#include <string.h>

enum { SUCCESS = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6 };

typedef struct {
  unsigned fieldId, scopeId;
  long long timestamp, latencyUsec;
  int valueType, nvmlReturn;
  union { unsigned ui; unsigned long long ull; } value;
} FieldValue;

typedef struct {
  char busIdLegacy[16];
  unsigned domain, bus, device, pciDeviceId, pciSubSystemId;
  char busId[32];
} PciInfo;

static int gpus[2] = {0, 1};
static int index_of(void *device) { return *(int *)device; }

int nvmlInitWithFlags(unsigned flags) { return SUCCESS; }
int nvmlShutdown(void) { return SUCCESS; }
const char *nvmlErrorString(int code) { return code == NOT_SUPPORTED ? "Not Supported" : "Other"; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return SUCCESS; }

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

int nvmlDeviceGetName(void *device, char *name, unsigned length) {
  snprintf(name, length, "Stub %d", index_of(device));
  return SUCCESS;
}

int nvmlDeviceGetFieldValues(void *device, int count, FieldValue *values) {
  static unsigned reading = 0;
  for (int i = 0; i < count; i++) {
    FieldValue *v = &values[i];
    v->nvmlReturn = NOT_SUPPORTED;
    v->value.ull = 0xdeadbeefdeadbeefULL; /* undefined where the return code is not success */
    if (index_of(device) == 1) continue;
    /* NVLink, KiB, all links: 2000 KiB a reading and more for each further field; 140 is missing. */
    if (v->fieldId >= 138 && v->fieldId <= 141 && v->fieldId != 140 && v->scopeId == 0xFFFFFFFFu) {
      v->nvmlReturn = SUCCESS;
      v->valueType = 3;
      v->value.ull = (1ULL << 40) + reading * (2000 + v->fieldId - 138);
    }
    if (v->fieldId == 197) {
      v->nvmlReturn = SUCCESS;
      v->valueType = 1;
      v->value.ui = 0xFFFFFFF0u + reading * 100;
    }
    if (v->fieldId == 198) { /* a type that no counter has */
      v->nvmlReturn = SUCCESS;
      v->valueType = 0;
    }
  }
  reading++;
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

int nvmlDeviceGetPciInfo_v3(void *device, PciInfo *pci) {
  memset(pci, 0, sizeof *pci);
  snprintf(pci->busId, sizeof pci->busId, "00000000:%02X:00.0", 7 + index_of(device));
  return SUCCESS;
}

int nvmlDeviceGetCurrPcieLinkGeneration(void *device, unsigned *generation) { *generation = 5; return SUCCESS; }
int nvmlDeviceGetCurrPcieLinkWidth(void *device, unsigned *width) { *width = 16; return SUCCESS; }

int nvmlDeviceGetNvLinkState(void *device, unsigned link, unsigned *active) {
  if (index_of(device) == 1 || link >= 4) return NOT_SUPPORTED;
  *active = link != 3; /* one of the four is down */
  return SUCCESS;
}

int nvmlDeviceGetNvLinkRemoteDeviceType(void *device, unsigned link, int *type) {
  *type = link == 2 ? 2 : 0;
  return SUCCESS;
}

int nvmlDeviceGetNvLinkRemotePciInfo_v2(void *device, unsigned link, PciInfo *pci) {
  return nvmlDeviceGetPciInfo_v3(&gpus[1], pci);
}

int nvmlDeviceGetNumaNodeId(void *device, int *node) {
  if (index_of(device) == 1) return NOT_SUPPORTED;
  *node = 0;
  return SUCCESS;
}

int nvmlDeviceGetTopologyCommonAncestor(void *a, void *b, int *level) { *level = 50; return SUCCESS; }
/* nvmlDeviceGetTotalEnergyConsumption is missing, as from a driver that is too old. */
