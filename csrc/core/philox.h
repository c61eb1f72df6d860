// Philox4x32-10 (Salmon et al. 2011): random words as a function of counter and key.
#pragma once

#include "lane.h"

CTLD_NAMESPACE_BEGIN

enum Stream : uint32_t { kParameterNoise = 0, kRounding = 1, kAlphaNoise = 2 };

// The ten round keys, made once per launch.
struct RoundKeys {
  uint32_t words[20];
};

CTLD_HD RoundKeys round_keys(uint64_t seed) {
  RoundKeys keys;
  uint32_t low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    keys.words[2 * round] = low;
    keys.words[2 * round + 1] = high;
    low += 0x9E3779B9u;
    high += 0xBB67AE85u;
  }
  return keys;
}

// The part of the counter that is common to all elements of a parameter in one step.
struct Counter {
  uint32_t index, step_low, step_high_and_stream;
};

CTLD_HD Counter make_counter(uint64_t step, uint32_t stream, uint32_t index) {
  return {index, static_cast<uint32_t>(step), stream << 24 | (static_cast<uint32_t>(step >> 32) & 0xFFFFFFu)};
}

template <class Lane>
CTLD_HD void philox_round(typename Lane::Wide q[4], const RoundKeys& keys, int round) {
  const typename Lane::Wide a = Lane::multiply(q[0], 0xD2511F53u);
  const typename Lane::Wide b = Lane::multiply(q[2], 0xCD9E8D57u);
  q[0] = Lane::high(b) ^ q[1] ^ Lane::widen(keys.words[2 * round]);
  q[1] = b;
  q[2] = Lane::high(a) ^ q[3] ^ Lane::widen(keys.words[2 * round + 1]);
  q[3] = a;
}

// On return the low 32 bits of q[0..3] are the four words of noise group `group`.
template <class Lane>
CTLD_HD void philox(typename Lane::Wide group, Counter counter, const RoundKeys& keys,
                    typename Lane::Wide q[4]) {
  q[0] = group;
  q[1] = Lane::widen(counter.index);
  q[2] = Lane::widen(counter.step_low);
  q[3] = Lane::widen(counter.step_high_and_stream);
#if defined(__CUDACC__)
#pragma unroll
#else
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) philox_round<Lane>(q, keys, round);
}

CTLD_HD void random_words(uint32_t group, Counter counter, const RoundKeys& keys, uint32_t words[4]) {
  uint64_t q[4];
  philox<ScalarLane>(group, counter, keys, q);
  for (int i = 0; i < 4; ++i) words[i] = static_cast<uint32_t>(q[i]);
}

CTLD_NAMESPACE_END
