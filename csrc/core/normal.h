// Standard normals from random words by Box and Muller's transform; ctld_cuda/reference.py explains it.
// Logarithm, sine and cosine are float32 polynomials of multiplies and adds: the same bits everywhere.
#pragma once

#include "philox.h"

CTLD_NAMESPACE_BEGIN

// -2 ln u, u = magnitude * 2^-31 * (1 - 2^-23), magnitude in (0, 2^31]; at least 2^-22
template <class Lane>
CTLD_HD typename Lane::Float minus_two_log(typename Lane::Float magnitude) {
  using Float = typename Lane::Float;
  using Word = typename Lane::Word;
  const Word bits = Lane::bits(magnitude);
  const Word exponent = (bits - (0x3F3504F3u + (31u << 23))) & 0xFF800000u;
  const Float f = Lane::from_bits(bits - exponent - (31u << 23)) - 0x1.000002p+0f;
  Float p = Lane::broadcast(-0x1.e743acp-3f);
  p = p * f + 0x1.7e5150p-2f;
  p = p * f + -0x1.a3c3ccp-2f;
  p = p * f + 0x1.fe26ccp-2f;
  p = p * f + -0x1.5523fcp-1f;
  p = p * f + 0x1.000176p+0f;
  p = p * f + -0x1.000010p+1f;
  return p * f + Lane::signed_to_float(exponent) * -0x1.62e430p-23f;
}

// two independent normals; the first word is radius and sign, the second the angle in half turns
template <class Lane>
CTLD_HD void box_muller(typename Lane::Word radius_word, typename Lane::Word angle_word,
                        typename Lane::Float& first, typename Lane::Float& second) {
  using Float = typename Lane::Float;
  const Float x = Lane::signed_to_float(radius_word);
  const Float magnitude = Lane::from_bits(Lane::bits(x) & 0x7FFFFFFFu) + 0.5f;
  Float radius = Lane::square_root(minus_two_log<Lane>(magnitude));
  radius = Lane::from_bits(Lane::bits(radius) | (Lane::bits(x) & 0x80000000u));
  const Float h = Lane::signed_to_float(angle_word) * 0x1p-32f;
  const Float z = h * h;
  Float sine = Lane::broadcast(-0x1.1de616p-1f);
  sine = sine * z + 0x1.4594d8p+1f;
  sine = sine * z + -0x1.4ab628p+2f;
  sine = sine * z + 0x1.921f9cp+1f;
  Float cosine = Lane::broadcast(0x1.c1f066p-3f);
  cosine = cosine * z + -0x1.54f61ap+0f;
  cosine = cosine * z + 0x1.03bd06p+2f;
  cosine = cosine * z + -0x1.3bd3a6p+2f;
  cosine = cosine * z + 0x1.fffffep-1f;
  first = radius * cosine;
  second = radius * h * sine;
}

// the four normals of one noise group: elements 4 group ... 4 group + 3
CTLD_HD void normal_group(uint32_t group, Counter counter, const RoundKeys& keys, float xi[4]) {
  uint32_t words[4];
  random_words(group, counter, keys, words);
  box_muller<ScalarLane>(words[0], words[1], xi[0], xi[1]);
  box_muller<ScalarLane>(words[2], words[3], xi[2], xi[3]);
}

CTLD_NAMESPACE_END
