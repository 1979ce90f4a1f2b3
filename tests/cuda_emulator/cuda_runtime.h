// As much of CUDA as csrc/cuda uses, on the CPU, so that its kernels run in tests where there is no GPU. It shows what
// their code does, not what a GPU does: memory has one order here, and time tells nothing.
//
// The threads of a block are fibers of one thread of the machine. A fiber runs until it waits for others, in the order
// that CLDF_EMULATOR_ORDER gives, "forward" or "backward": a barrier that is missing shows in one of the two. Blocks run
// one after the other, those of a cluster side by side, each on a thread of the machine: shared memory is thread_local.

#pragma once

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <barrier>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ thread_local

using std::max;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1) : x(x) {}
};

struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};

namespace emulator {

constexpr unsigned kLanes = 32;
constexpr size_t kStack = 64 * 1024;

// Where all of a number of fibers wait for each other.
struct Barrier {
  unsigned expected, arrived = 0;
  uint64_t generation = 0;
};

struct Cluster {
  explicit Cluster(unsigned size) : barrier(size), landmarks(size) {}
  std::barrier<> barrier;
  // The same thread_local variable of each block's thread: from one thread to the other, all lie equally far from it.
  std::vector<const char*> landmarks;
};

// Made by makecontext; once it runs it is left and entered by jumps, which unlike swapcontext ask nothing of the kernel.
struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStack]};
  std::jmp_buf place;
  bool started = false, finished = false;
};

// The blocks that one thread of the machine runs, one after the other.
class Blocks {
 public:
  Blocks(unsigned threads, Cluster& cluster, unsigned rank, const std::function<void()>& kernel)
      : cluster(cluster), rank(rank), kernel_(kernel), fibers_(threads), barrier_{threads}, lanes_(threads) {
    for (unsigned first = 0; first < threads; first += kLanes) warps_.push_back({std::min(kLanes, threads - first)});
  }

  void run(unsigned index);
  void wait(Barrier& barrier);
  void wait_for_block() { wait(barrier_); }
  void wait_for_cluster();

  // Of each lane of the current fiber's warp, the value that it hands in.
  template <class T>
  std::array<T, kLanes> exchange(T value) {
    Barrier& warp = warps_[current_ / kLanes];
    std::memcpy(&lanes_[current_], &value, sizeof(T));
    wait(warp);
    std::array<T, kLanes> values{};
    for (unsigned lane = 0; lane < warp.expected; ++lane)
      std::memcpy(&values[lane], &lanes_[current_ / kLanes * kLanes + lane], sizeof(T));
    wait(warp);
    return values;
  }
  unsigned lane() const { return current_ % kLanes; }

  Cluster& cluster;
  const unsigned rank;

 private:
  void enter(unsigned index);
  void leave();
  static void body();

  const std::function<void()>& kernel_;
  std::vector<Fiber> fibers_;
  Barrier barrier_;
  std::vector<Barrier> warps_;
  std::vector<uint64_t> lanes_;
  std::jmp_buf scheduler_;
  unsigned current_ = 0;
  bool progress_ = false;
};

inline thread_local Blocks* blocks = nullptr;
inline thread_local char landmark = 0;

}  // namespace emulator

inline thread_local dim3 blockIdx, threadIdx;

namespace emulator {

inline void Blocks::body() {
  for (;;) {
    blocks->kernel_();
    blocks->fibers_[blocks->current_].finished = true;
    blocks->leave();
  }
}

inline void Blocks::enter(unsigned index) {
  current_ = threadIdx.x = index;
  Fiber& fiber = fibers_[index];
  if (_setjmp(scheduler_)) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack.get();
  context.uc_stack.ss_size = kStack;
  makecontext(&context, &Blocks::body, 0);
  setcontext(&context);
}

inline void Blocks::leave() {
  if (!_setjmp(fibers_[current_].place)) _longjmp(scheduler_, 1);
}

inline void Blocks::run(unsigned index) {
  blocks = this;
  blockIdx.x = index;
  cluster.landmarks[rank] = &landmark;
  for (Fiber& fiber : fibers_) fiber.finished = false;
  const char* order = std::getenv("CLDF_EMULATOR_ORDER");
  const bool backward = order && std::string(order) == "backward";
  const unsigned count = unsigned(fibers_.size());
  for (unsigned finished = 0; finished < count;) {
    progress_ = false;
    for (unsigned i = 0; i < count; ++i) {
      const unsigned next = backward ? count - 1 - i : i;
      if (fibers_[next].finished) continue;
      enter(next);
      if (fibers_[next].finished) ++finished, progress_ = true;
    }
    if (!progress_) {
      std::fprintf(stderr, "emulator: threads wait for others that never come\n");
      std::abort();
    }
  }
}

inline void Blocks::wait(Barrier& barrier) {
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    progress_ = true;
    return;
  }
  for (const uint64_t generation = barrier.generation; barrier.generation == generation;) leave();
}

inline void Blocks::wait_for_cluster() {
  wait_for_block();
  if (current_ == 0) cluster.barrier.arrive_and_wait();
  wait_for_block();
}

inline void launch(unsigned grid, unsigned threads, unsigned cluster_size, const std::function<void()>& kernel) {
  Cluster cluster(cluster_size);
  const auto run = [&](unsigned rank) {
    Blocks of_rank(threads, cluster, rank, kernel);
    for (unsigned first = 0; first < grid; first += cluster_size) of_rank.run(first + rank);
  };
  std::vector<std::thread> others;
  for (unsigned rank = 1; rank < cluster_size; ++rank) others.emplace_back(run, rank);
  run(0);
  for (std::thread& other : others) other.join();
}

}  // namespace emulator

// --- In kernels -------------------------------------------------------------------------------------------------------

inline void __syncthreads() { emulator::blocks->wait_for_block(); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  const unsigned lane = emulator::blocks->lane();
  return emulator::blocks->exchange(value)[lane ^ unsigned(mask)];
}

template <class T>
T __shfl_up_sync(unsigned, T value, unsigned distance) {
  const unsigned lane = emulator::blocks->lane();
  return emulator::blocks->exchange(value)[lane < distance ? lane : lane - distance];
}

inline unsigned __ballot_sync(unsigned, bool predicate) {
  unsigned bits = 0, lane = 0;
  for (const char set : emulator::blocks->exchange(char(predicate))) bits |= unsigned(set) << lane++;
  return bits;
}

inline bool __any_sync(unsigned lanes, bool predicate) { return __ballot_sync(lanes, predicate) != 0; }

inline int __ffs(int bits) { return __builtin_ffs(bits); }

template <class T>
void __stwb(T* to, T value) {
  *to = value;
}

inline void atomicAdd(uint32_t* to, uint32_t value) { *to += value; }

// --- On the host ------------------------------------------------------------------------------------------------------

typedef int cudaError_t;
typedef void* cudaStream_t;
constexpr cudaError_t cudaSuccess = 0;
enum { cudaLaunchAttributeClusterDimension };

struct cudaLaunchAttribute {
  int id;
  struct {
    dim3 clusterDim;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline const char* cudaGetErrorString(cudaError_t) { return "failed"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = -1, cudaSuccess; }  // as torch numbers the CPU
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }

struct cudaFuncAttributes {
  int ptxVersion;
};

template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
  return attributes->ptxVersion = 10 * EMULATED_CAPABILITY, cudaSuccess;
}
extern "C" inline int32_t aoti_torch_get_current_cuda_stream(int32_t, void**) { return 0; }

template <class... Parameters>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Parameters... arguments) {
  const unsigned cluster = config->numAttrs ? config->attrs->val.clusterDim.x : 1;
  if (config->gridDim.x % cluster || cluster > 8 || config->blockDim.x > 1024) return 1;
  emulator::launch(config->gridDim.x, config->blockDim.x, cluster, [&] { kernel(arguments...); });
  return cudaSuccess;
}
