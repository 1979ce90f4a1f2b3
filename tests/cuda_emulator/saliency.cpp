// The operators of csrc/cuda/saliency.cu for tensors on the CPU, in place of those of csrc/cpu/saliency.cpp.

#include "../../csrc/cuda/common.cuh"

#include <cooperative_groups.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#define CUDA CPU
#include "../../csrc/cuda/saliency.cu"
