// 3 x 3 convolutions of stride 1 by Winograd's algorithm F(4 x 4, 3 x 3), which needs a quarter of the products.
//
// Results of 4 x 4 pixels are made from a tile of 6 x 6. Tiles and weights are transformed to 36 points each; at every
// point a matrix product over the channels follows; the products are transformed back. There are four times as many
// transformed values as weights, and more than twice as many as pixels: the smaller of the two is held, the other is
// made when it is needed, in each thread's own memory.
//
// Results do not depend on the number of threads, nor on what else is in the batch.
//
// What is to come out is in cldf_fast/ops/reference.py.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>

#include "common.h"
#include "convolution_kernels.h"

namespace {

using namespace cldf_fast;
using torch::stable::Tensor;

const ConvolutionKernels& kernels() {
  static const ConvolutionKernels& chosen = CLDF_BEST(convolution_kernels);
  return chosen;
}

// Tiles that are processed together, a multiple of a product's rows in registers. Fewer read the weights more often,
// more leave the fast caches.
constexpr int64_t kBlock = 24;

inline int64_t padded(int64_t channels) { return ceil_div(channels, kAlignment) * kAlignment; }


class Convolution {
 public:
  Convolution(const Images& images, int64_t batch, const Weights& weights, const Results& results)
      : images_(images),
        weights_(weights),
        results_(results),
        rows_(ceil_div(images.height, kSide)),
        columns_(ceil_div(images.width, kSide)),
        tiles_(batch * rows_ * columns_),
        blocks_(ceil_div(tiles_, kBlock)),
        lanes_(padded(weights.out_channels)),
        panels_(ceil_div(lanes_, kernels().panel)) {}

  void run() const {
    if (tiles_ < lanes_)
      hold_tiles();
    else
      hold_weights();
  }

 private:
  void hold_weights() const {
    Buffer<float> weights(panels_ * panel_size());
    share(panels_, 1, [&](int64_t panel) { transform_weights(panel, weights.data() + panel * panel_size()); });
    share_with(blocks_, 1, [&] {
      return [&, values = Buffer<float>(block_size()),
              products = Buffer<float>(products_size())](int64_t block) mutable {
        transform_tiles(block, values.data());
        for (int64_t panel = 0; panel < panels_; ++panel)
          multiply(block, values.data(), panel, weights.data() + panel * panel_size(), products.data());
      };
    });
  }

  void hold_tiles() const {
    Buffer<float> values(blocks_ * block_size());
    share(blocks_, 1, [&](int64_t block) { transform_tiles(block, values.data() + block * block_size()); });
    share_with(panels_, 1, [&] {
      return [&, weights = Buffer<float>(panel_size()),
              products = Buffer<float>(products_size())](int64_t panel) mutable {
        transform_weights(panel, weights.data());
        for (int64_t block = 0; block < blocks_; ++block)
          multiply(block, values.data() + block * block_size(), panel, weights.data(), products.data());
      };
    });
  }

  int64_t panel_size() const { return kPoints * point_stride(images_.channels, kernels().panel); }
  int64_t block_size() const { return kPoints * point_stride(kBlock, padded(images_.channels)); }
  int64_t products_size() const { return kPoints * point_stride(kBlock, kernels().panel); }
  int64_t lanes_of(int64_t panel) const { return std::min(kernels().panel, lanes_ - panel * kernels().panel); }

  struct Block {
    Tile tiles[kBlock];
    int64_t count;
  };

  Block at(int64_t block) const {
    Block found;
    found.count = std::min(kBlock, tiles_ - block * kBlock);
    for (int64_t t = 0; t < found.count; ++t) {
      const int64_t i = block * kBlock + t;
      found.tiles[t] = {i / (rows_ * columns_), i / columns_ % rows_ * kSide, i % columns_ * kSide};
    }
    return found;
  }

  void transform_weights(int64_t panel, float* weights) const {
    kernels().transform_weights(weights_, panel * kernels().panel, lanes_of(panel), weights);
  }

  void transform_tiles(int64_t block, float* values) const {
    const Block tiles = at(block);
    kernels().transform_tiles(images_, tiles.tiles, tiles.count, padded(images_.channels), values);
  }

  void multiply(int64_t block, const float* values, int64_t panel, const float* weights, float* products) const {
    const Block tiles = at(block);
    const int64_t lanes = lanes_of(panel);
    kernels().multiply(values, tiles.count, padded(images_.channels), weights, images_.channels, lanes, products);
    kernels().transform_back(products, tiles.tiles, tiles.count, lanes, panel * kernels().panel, results_);
  }

  Images images_;
  Weights weights_;
  Results results_;
  int64_t rows_, columns_, tiles_, blocks_, lanes_, panels_;
};

void conv3x3(Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> residual, bool transposed,
             Tensor out) {
  const Images images{data<float>(x), x.size(1), x.size(2), x.size(3)};
  const int64_t kernel = kTaps * kTaps, kernels_of_one = weight.size(1) * kernel;
  const Weights weights{data<float>(weight),
                        images.channels,
                        out.size(3),
                        transposed ? kernels_of_one : kernel,
                        transposed ? kernel : kernels_of_one,
                        transposed};
  const Results results{data<float>(out),  images.height,     images.width, out.size(3),
                        data<float>(bias), data<float>(residual)};
  Convolution(images, x.size(0), weights, results).run();
}

}  // namespace

// All float32 and contiguous. x [B, H, W, C], weight [C', C, 3, 3], bias [C'], residual [B, H, W, C'], added to the
// result; out [B, H, W, C'] is written.
// transposed: back from C' to C, x [B, H, W, C'] and out [B, H, W, C], as the gradient goes.
STABLE_TORCH_LIBRARY_FRAGMENT(cldf_fast, m) {
  m.def("conv3x3_out(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, bool transposed, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(cldf_fast, CPU, m) { m.impl("conv3x3_out", TORCH_BOX(&conv3x3)); }
