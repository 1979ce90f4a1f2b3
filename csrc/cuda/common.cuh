// What the operators on CUDA share: launches on a tensor's device and current stream, loads and stores of four values,
// sums over a warp and a block. The grid is one line of blocks; kernels share it out among images themselves.

#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

// In torch's CUDA half. Weak, so that this binary loads where torch has none; torch 2.13 has a successor for it.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace cldf_fast {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// --- Launches --------------------------------------------------------------------------------------------------------

inline void check_cuda(cudaError_t status) {
  STD_TORCH_CHECK(status == cudaSuccess, "CUDA: ", cudaGetErrorString(status));
}

// Makes a tensor's device the current one, launches on its current stream, and goes back. The runtime library that
// launches is a copy of this binary's own, so the device is set through it, not through torch.
class Launcher {
 public:
  explicit Launcher(const torch::stable::Tensor& tensor) : device_(tensor.get_device_index()) {
    void* stream = nullptr;
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream && aoti_torch_get_current_cuda_stream(device_, &stream) == 0,
                    "CUDA: torch did not give its current stream");
    stream_ = static_cast<cudaStream_t>(stream);
    check_cuda(cudaGetDevice(&previous_));
    if (device_ != previous_) check_cuda(cudaSetDevice(device_));
  }
  ~Launcher() {
    if (device_ != previous_) cudaSetDevice(previous_);
  }
  Launcher(const Launcher&) = delete;
  Launcher& operator=(const Launcher&) = delete;

  // No blocks, no launch. cluster: blocks that work together; more than one needs compute capability 9.0.
  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), int64_t blocks, int threads, int cluster,
                  Arguments... arguments) const {
    if (blocks == 0) return;
    STD_TORCH_CHECK(blocks <= std::numeric_limits<int32_t>::max(), "CUDA: too large for one launch: ", blocks,
                    " blocks");
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(unsigned(blocks));
    config.blockDim = dim3(threads);
    config.stream = stream_;
    config.attrs = &attribute;
    config.numAttrs = cluster > 1;
    check_cuda(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
  }

  // How many blocks of a kernel a cluster may have here: one where it was compiled without clusters, whatever the device.
  template <class... Parameters>
  int largest_cluster(void (*kernel)(Parameters...)) const {
    cudaFuncAttributes attributes{};
    check_cuda(cudaFuncGetAttributes(&attributes, kernel));
    return attributes.ptxVersion >= 90 ? 8 : 1;
  }

 private:
  int device_, previous_ = 0;
  cudaStream_t stream_;
};

// --- Access ----------------------------------------------------------------------------------------------------------

// Calls f with a pointer to the data of a tensor of float32, float16 or bfloat16.
template <class F>
void with_values(const torch::stable::Tensor& tensor, F f) {
  const void* data = tensor.const_data_ptr();
  switch (tensor.scalar_type()) {
    case torch::headeronly::ScalarType::Float:
      return f(static_cast<const float*>(data));
    case torch::headeronly::ScalarType::Half:
      return f(static_cast<const torch::headeronly::Half*>(data));
    case torch::headeronly::ScalarType::BFloat16:
      return f(static_cast<const torch::headeronly::BFloat16*>(data));
    default:
      STD_TORCH_CHECK(false, "CUDA: expected float32, float16 or bfloat16");
  }
}

template <class T>
struct alignas(4 * sizeof(T)) Four {
  T at[4];
};

// Four values at once, as bits: a compiler that sees values, or a plain store, takes them one by one, to share code
// with the last few.
template <class T>
__device__ __forceinline__ Four<T> load_whole(const T* from) {
  using Bits = std::conditional_t<sizeof(Four<T>) == 16, int4, int2>;
  const Bits bits = *reinterpret_cast<const Bits*>(from);
  Four<T> four;
  memcpy(&four, &bits, sizeof(four));
  return four;
}

template <class T>
__device__ __forceinline__ void store_whole(T* to, const Four<T>& four) {
  using Bits = std::conditional_t<sizeof(four) >= 16, int4, std::conditional_t<sizeof(four) == 8, int2, int>>;
  constexpr int kPieces = sizeof(four) / sizeof(Bits);
  Bits bits[kPieces];
  memcpy(bits, &four, sizeof(four));
#pragma unroll
  for (int i = 0; i < kPieces; ++i) __stwb(reinterpret_cast<Bits*>(to) + i, bits[i]);
}

// Whether every fourth value from the first on may be taken with the three that follow.
template <class T>
bool aligned_for_four(const T* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % sizeof(Four<T>) == 0;
}

// Up to four values from `from` on, `count` of them at least one; the rest is zero. whole: all four may be taken at
// once, since they are contiguous, aligned and there.
template <class T>
__device__ __forceinline__ Four<float> load_four(const T* from, int64_t stride, int64_t count, bool whole) {
  Four<float> values{};
  if (whole) {
    const Four<T> loaded = load_whole(from);
#pragma unroll
    for (int i = 0; i < 4; ++i) values.at[i] = float(loaded.at[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (i < count) values.at[i] = float(from[i * stride]);
  }
  return values;
}

template <class T, class From>
__device__ __forceinline__ void store_four(T* to, const Four<From>& values, int64_t count, bool whole) {
  Four<T> converted;
#pragma unroll
  for (int i = 0; i < 4; ++i) converted.at[i] = T(values.at[i]);
  if (whole) {
    store_whole(to, converted);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (i < count) to[i] = converted.at[i];
  }
}

// --- Sums ------------------------------------------------------------------------------------------------------------

// In an order that is always the same; every lane gets the sum.
template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(kAllLanes, value, distance);
  return value;
}

// For thread 0; all kThreads threads of the block must call it, once in a kernel.
template <int kThreads, class T>
__device__ __forceinline__ T block_sum(T value) {
  static_assert(kThreads % kWarp == 0 && kThreads <= kWarp * kWarp);
  __shared__ T warps[kThreads / kWarp];
  value = warp_sum(value);
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = value;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int warp = 1; warp < kThreads / kWarp; ++warp) value += warps[warp];
  return value;
}

}  // namespace cldf_fast
