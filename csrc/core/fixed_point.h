// Energies as integers, so that their sums are exact in any order.
#pragma once

#include "lane.h"

CTLD_NAMESPACE_BEGIN

constexpr int32_t kSaturated = 1 << 29;

// trunc(min(e, 2^29)) for e >= 0 already scaled by 2^s; NaN saturates
template <class Real>
CTLD_HD int32_t quanta(Real e) {
  constexpr Real largest = static_cast<Real>(kSaturated);
#ifdef __CUDA_ARCH__
  // one instruction less: the smaller of NaN and x is x
  if (sizeof(Real) == sizeof(float)) return static_cast<int32_t>(fminf(e, largest));
#endif
  return static_cast<int32_t>(e < largest ? e : largest);
}

template <class Real>
CTLD_HD bool is_finite(Real x) {
  return x - x == 0;
}

CTLD_NAMESPACE_END
