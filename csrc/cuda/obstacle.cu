#include "obstacle.h"

#include "common.cuh"

namespace cldf_fast {
namespace {

// Is there for this GPU if the operators' kernels are.
__global__ void nothing() {}

std::string version(int number) { return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10); }

}  // namespace

std::string cuda_obstacle() {
  int driver = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) return "no NVIDIA driver";
  // A driver serves what was built with any toolkit of its own major version, and of earlier ones.
  if (driver / 1000 < CUDART_VERSION / 1000)
    return "the NVIDIA driver serves CUDA " + version(driver) + " and the extension was built with CUDA " +
           version(CUDART_VERSION) + ": update the driver, or build with an earlier toolkit";
  cudaFuncAttributes attributes;
  const cudaError_t status = cudaFuncGetAttributes(&attributes, nothing);
  if (status != cudaSuccess) {
    cudaGetLastError();  // so that nobody meets this error again
    return std::string("the extension was not built for this GPU, or can't use it: ") + cudaGetErrorString(status);
  }
  if (!aoti_torch_get_current_cuda_stream) return "this torch has no CUDA";
  return "";
}

}  // namespace cldf_fast
