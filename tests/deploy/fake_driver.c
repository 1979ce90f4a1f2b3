// What cldf_fast/deploy/cuda.py calls of the CUDA driver, on the host: memory is memory, and a graph is a list of calls
// that the test makes again.

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef void (*Replay)(void);
static Replay replay;
static int capturing, live, launches, uploaded, graphs;

void fake_set_replay(Replay function) { replay = function; }
int fake_live(void) { return live; }
int fake_graphs(void) { return graphs; }
int fake_launches(void) { return launches; }
int fake_uploaded(void) { return uploaded; }

int cuInit(unsigned flags) { return (int)flags; }
int cuDeviceGet(int* device, int ordinal) { return *device = ordinal, ordinal > 0 ? 101 : 0; }
int cuDeviceGetName(char* name, int length, int device) { return strncpy(name, "Fake GPU", (size_t)length), device; }
int cuDeviceGetAttribute(int* value, int attribute, int device) { return *value = attribute == 75 ? 8 : 6, device; }
int cuGetErrorString(int error, const char** text) { return *text = error == 2 ? "out of memory" : "invalid device", 0; }
int cuDevicePrimaryCtxRetain(void** context, int device) { return *context = &live, device; }
int cuCtxSetCurrent(void* context) { return context == &live ? 0 : 201; }
int cuStreamCreate(void** stream, unsigned flags) { return *stream = &capturing, flags != 1; }
int cuStreamSynchronize(void* stream) { return stream != &capturing || capturing; }

static int take(void** memory, size_t bytes) {
  if (bytes > (1u << 30)) return 2;
  *memory = malloc(bytes);
  memset(*memory, 0xff, bytes);
  return ++live, 0;
}
int cuMemAlloc_v2(void** memory, size_t bytes) { return take(memory, bytes); }
int cuMemAllocHost_v2(void** memory, size_t bytes) { return take(memory, bytes); }
int cuMemFree_v2(void* memory) { return free(memory), --live, 0; }
int cuMemFreeHost(void* memory) { return free(memory), --live, 0; }

int cuMemcpyHtoDAsync_v2(void* to, const void* from, size_t bytes, void* stream) {
  if (!capturing) memcpy(to, from, bytes), uploaded += (int)bytes;
  return stream != &capturing;
}
int cuMemcpyDtoHAsync_v2(void* to, const void* from, size_t bytes, void* stream) {
  if (!capturing) memcpy(to, from, bytes);
  return stream != &capturing;
}
int cuStreamBeginCapture_v2(void* stream, int mode) { return capturing = 1, stream != &capturing || mode != 2; }
int cuStreamEndCapture(void* stream, void** graph) { return capturing = 0, *graph = &launches, stream != &capturing; }
int cuGraphInstantiateWithFlags(void** executable, void* graph, uint64_t flags) {
  return ++graphs, *executable = graph, flags != 0;
}
int cuGraphExecDestroy(void* executable) { return --graphs, executable != &launches; }
int cuGraphDestroy(void* graph) { return graph != &launches; }
int cuGraphLaunch(void* executable, void* stream) { return ++launches, replay(), stream != &capturing || !executable; }
