// Clusters of blocks for cuda_runtime.h beside it.

#pragma once

#include "cuda_runtime.h"

// What csrc/cuda asks before it uses clusters. Only here, since torch's headers, which come before, ask too.
#define __CUDA_ARCH__ (EMULATED_CAPABILITY * 100)

namespace cooperative_groups {

struct Cluster {
  unsigned num_blocks() const { return unsigned(emulator::blocks->cluster.landmarks.size()); }
  unsigned block_rank() const { return emulator::blocks->rank; }
  void sync() const { emulator::blocks->wait_for_cluster(); }
  template <class T>
  T* map_shared_rank(T* variable, unsigned rank) const {
    const ptrdiff_t distance = reinterpret_cast<const char*>(variable) - &emulator::landmark;
    return reinterpret_cast<T*>(const_cast<char*>(emulator::blocks->cluster.landmarks[rank]) + distance);
  }
};

inline Cluster this_cluster() { return {}; }

}  // namespace cooperative_groups
