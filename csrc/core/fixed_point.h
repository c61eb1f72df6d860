// Energies as integers, so that their sums are exact in any order.
#pragma once

#include "lane.h"

CTLD_NAMESPACE_BEGIN

constexpr int32_t kSaturated = 1 << 29;

// trunc(min(e, 2^29)) for e >= 0 already scaled by 2^s; NaN saturates
template <class Real>
CTLD_HD int32_t quanta(Real e) {
  return static_cast<int32_t>(e < static_cast<Real>(kSaturated) ? e : static_cast<Real>(kSaturated));
}

template <class Real>
CTLD_HD bool is_finite(Real x) {
  return x - x == 0;
}

CTLD_NAMESPACE_END
