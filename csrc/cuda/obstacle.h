// Whether the operators on CUDA can run here, for bindings.cpp.

#pragma once

#include <string>

namespace cldf_fast {

// Why not, as part of a sentence; empty if they can. The first use of the GPU: call it when it is about to be used.
std::string cuda_obstacle();

}  // namespace cldf_fast
