// What the positives add to "supcon": logits are linear in the features of either side, so that sums over classes do,
// where the denominator takes every pair.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace cldf_fast {

// Features that are sorted by class.
struct Features {
  int64_t count;
  const float* values;
  int64_t stride;        // from one row to the next
  const int64_t* order;  // the row of each, or null: as they come
  const int32_t* classes;

  const float* operator[](int64_t i) const { return values + (order ? order[i] : i) * stride; }
};

// own: [anchors], the candidate that each anchor is, or -1; num_positives: [anchors], 0 for anchors that do not count.
struct PositivePairs {
  Features anchors, candidates;
  int64_t dim;
  const int64_t *own, *num_positives;
  float temperature;

  // Calls f(anchor, mean of the logits of its positives).
  template <class F>
  void each_mean(F f) const {
    each_class([&](Range of_anchors, Range of_candidates) {
      const std::vector<double> sum = sum_of(candidates, of_candidates, [](int64_t) { return 1.0; });
      for (int64_t i = of_anchors.begin; i < of_anchors.end; ++i) {
        if (!num_positives[i]) continue;
        const float *anchor = anchors[i], *self = own_positive(i, of_candidates);
        // Several sums at a time, as vectors hold them.
        double parts[8] = {};
        for (int64_t d = 0; d < dim; ++d) parts[d % 8] += anchor[d] * (sum[d] - (self ? double(self[d]) : 0.0));
        double total = 0.0;
        for (const double part : parts) total += part;
        f(i, total / double(temperature) / double(num_positives[i]));
      }
    });
  }

  // Takes the gradient of grad [anchors] times these means from the gradients of both sides, each given as a pointer to
  // a row, or null where it is not wanted. The parts of a gradient that nearly vanishes are rounded apart.
  template <class AnchorGradient, class CandidateGradient>
  void pull(const float* grad, AnchorGradient of_anchor, CandidateGradient of_candidate) const {
    const auto share = [&](int64_t i) {
      return num_positives[i] ? double(grad[i]) / double(num_positives[i]) / double(temperature) : 0.0;
    };
    each_class([&](Range of_anchors, Range of_candidates) {
      const std::vector<double> sum = sum_of(candidates, of_candidates, [](int64_t) { return 1.0; });
      for (int64_t i = of_anchors.begin; i < of_anchors.end; ++i) {
        const float* self = own_positive(i, of_candidates);
        float* gradient = of_anchor(i);
        for (int64_t d = 0; gradient && d < dim; ++d)
          gradient[d] -= float(share(i) * (sum[d] - (self ? double(self[d]) : 0.0)));
      }
      const std::vector<double> weighted = sum_of(anchors, of_anchors, share);
      const std::vector<int64_t> selves = by_own(of_anchors, of_candidates);
      auto self = selves.begin();
      std::vector<double> others(dim);
      for (int64_t j = of_candidates.begin; j < of_candidates.end; ++j) {
        others = weighted;
        for (; self != selves.end() && own[*self] == j; ++self)
          for (int64_t d = 0; d < dim; ++d) others[d] -= share(*self) * anchors[*self][d];
        float* gradient = of_candidate(j);
        for (int64_t d = 0; gradient && d < dim; ++d) gradient[d] -= float(others[d]);
      }
    });
  }

 private:
  struct Range {
    int64_t begin, end;
  };

  static Range of_class(const Features& features, int32_t label) {
    const auto [begin, end] = std::equal_range(features.classes, features.classes + features.count, label);
    return {begin - features.classes, end - features.classes};
  }

  // Calls f(anchors, candidates) for every class of the anchors.
  template <class F>
  void each_class(F f) const {
    for (Range range{0, 0}; range.end < anchors.count;) {
      const int32_t label = anchors.classes[range.end];
      range = of_class(anchors, label);
      f(range, of_class(candidates, label));
    }
  }

  template <class F>
  std::vector<double> sum_of(const Features& features, Range range, F factor) const {
    std::vector<double> sum(dim, 0.0);
    for (int64_t i = range.begin; i < range.end; ++i) {
      const double weight = factor(i);
      const float* row = features[i];
      for (int64_t d = 0; d < dim; ++d) sum[d] += weight * row[d];
    }
    return sum;
  }

  // Those anchors that are among their own positives, by which of them they are.
  std::vector<int64_t> by_own(Range of_anchors, Range positives) const {
    std::vector<int64_t> selves;
    for (int64_t i = of_anchors.begin; i < of_anchors.end; ++i)
      if (own_positive(i, positives)) selves.push_back(i);
    const auto before = [&](int64_t i, int64_t j) { return own[i] < own[j]; };
    if (!std::is_sorted(selves.begin(), selves.end(), before)) std::stable_sort(selves.begin(), selves.end(), before);
    return selves;
  }

  // The anchor as one of its own positives, or null.
  const float* own_positive(int64_t i, Range positives) const {
    return own[i] >= positives.begin && own[i] < positives.end ? candidates[own[i]] : nullptr;
  }
};

}  // namespace cldf_fast
