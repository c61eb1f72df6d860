// Work is cut into chunks: each tensor into pieces of at most chunk_size elements.
#pragma once

#include "lane.h"

CTLD_NAMESPACE_BEGIN

// The tensor that chunk `chunk` belongs to: the last whose first chunk is not after it.
CTLD_HD uint32_t find_tensor(const uint32_t* first_chunk, uint32_t tensors, uint32_t chunk) {
  uint32_t low = 0, high = tensors;
  while (high - low > 1) {
    const uint32_t middle = (low + high) / 2;
    if (first_chunk[middle] <= chunk) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

CTLD_NAMESPACE_END
