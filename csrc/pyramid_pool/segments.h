// The segments of an axis (see bins.h), worked out on the host once a call.
#pragma once

#include <algorithm>
#include <vector>

#include "bins.h"

class Segments {
 public:
  Segments(int64_t size, const std::vector<int64_t>& scales) {
    for (int64_t s : scales)
      for (int64_t i = 0; i < s; ++i) {
        cuts_.push_back(static_cast<int>(bin_begin(i, size, s)));
        cuts_.push_back(static_cast<int>(bin_end(i, size, s)));
      }
    std::sort(cuts_.begin(), cuts_.end());
    cuts_.erase(std::unique(cuts_.begin(), cuts_.end()), cuts_.end());

    const int count = static_cast<int>(cuts_.size()) - 1;
    low_.assign(scales.size() * count, MAX_SCALE);
    high_.assign(scales.size() * count, 0);
    for (size_t scale = 0; scale < scales.size(); ++scale) {
      const int64_t s = scales[scale];
      int* low = low_.data() + scale * count;
      int* high = high_.data() + scale * count;
      for (int i = 0; i < s; ++i) {
        first_.push_back(find(bin_begin<int64_t>(i, size, s)));
        last_.push_back(find(bin_end<int64_t>(i, size, s)));
        for (int k = first_.back(); k < last_.back(); ++k) low[k] = std::min(low[k], i), high[k] = i + 1;
      }
    }
  }

  const std::vector<int>& cuts() const { return cuts_; }

  SegmentsView view() const {
    return {static_cast<int>(cuts_.size()) - 1, cuts_.data(), first_.data(), last_.data(), low_.data(), high_.data()};
  }

 private:
  int find(int64_t position) const {
    return static_cast<int>(std::lower_bound(cuts_.begin(), cuts_.end(), position) - cuts_.begin());
  }

  std::vector<int> cuts_, first_, last_, low_, high_;
};
