// LeakyRule on binary32 with AVX-512, whose directed rounding replaces error-free transformations.
//
// Results equal LeakyRule's bit by bit. Products of binary32 numbers are exact in binary64, so one
// fused operation rounded upward is what a product and add_up give; the narrowing is rounded upward
// by the instruction itself. max and min return their second operand when one is NaN, as greater
// and lesser do.
#pragma once

#include "../ops/activation_coefficients.h"
#include "vector_jobs.h"

#ifdef PREPARED_X86
#include <immintrin.h>

namespace torch_prepared {

constexpr int64_t kAtOnce = 16;               // neurons whose outputs fill a cache line
constexpr int64_t kStreamedBytes = 32 << 20;  // of outputs that no cache keeps for their reader

#define PREPARED_512 __attribute__((target("avx512f,avx512dq,avx512vl")))
#define PREPARED_512_INLINE PREPARED_512 __attribute__((always_inline)) inline

struct EightLines {
  __m256 lower_slope, upper_slope, upper_offset;
  int invalid;
};

// Eight neurons; `alpha` counts where has_alpha is set.
PREPARED_512_INLINE EightLines lines_of_eight(__m512d l, __m512d u, __m512d alpha, __m512d p,
                                              bool has_alpha) {
  constexpr int kUp = _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC;
  const __m512d zero = _mm512_setzero_pd(), one = _mm512_set1_pd(1.0);
  const __m512d infinity = _mm512_set1_pd(kInf), minus = _mm512_set1_pd(-kInf);
  const __m512d bent = _mm512_mul_pd(p, l);
  const __mmask8 endless_l = _mm512_cmp_pd_mask(l, minus, _CMP_EQ_OQ);
  const __mmask8 endless_u = _mm512_cmp_pd_mask(u, infinity, _CMP_EQ_OQ);
  __m512d chord = _mm512_div_pd(_mm512_sub_pd(u, bent), _mm512_sub_pd(u, l));
  chord = _mm512_min_pd(_mm512_max_pd(chord, p), one);
  chord = _mm512_mask_mov_pd(_mm512_mask_mov_pd(chord, endless_u, one), endless_l, p);
  const __m256 upper = _mm512_cvtpd_ps(chord);
  const __m512d s = _mm512_cvtps_pd(upper);
  __m512d at_l = _mm512_fnmadd_round_pd(s, l, bent, kUp);
  __m512d at_u = _mm512_fnmadd_round_pd(s, u, u, kUp);
  const __mmask8 below_one = _mm512_cmp_pd_mask(s, one, _CMP_LT_OQ);
  at_l = _mm512_mask_mov_pd(at_l, endless_l, zero);
  at_u = _mm512_mask_mov_pd(at_u, endless_u, _mm512_maskz_mov_pd(below_one, infinity));
  const __m256 offset = _mm512_cvt_roundpd_ps(_mm512_max_pd(at_l, at_u), kUp);
  const __m512d threshold = _mm512_mul_pd(_mm512_set1_pd(-kOffTie), l);
  const __mmask8 steep = _mm512_cmp_pd_mask(u, threshold, _CMP_GT_OQ);
  const __m512d usual = _mm512_mask_mov_pd(p, steep, one);
  const __m512d free = _mm512_min_pd(_mm512_max_pd(alpha, p), one);
  const __mmask8 active = _mm512_cmp_pd_mask(l, zero, _CMP_GE_OQ);
  const __mmask8 fixed = active | _mm512_cmp_pd_mask(u, zero, _CMP_LE_OQ);
  const __m256 stable = _mm512_cvtpd_ps(_mm512_mask_mov_pd(p, active, one));
  __mmask8 valid = _mm512_cmp_pd_mask(l, u, _CMP_LE_OQ);
  if (has_alpha) valid &= _mm512_cmp_pd_mask(alpha, alpha, _CMP_EQ_OQ);
  const __m256 nan = _mm256_set1_ps(__builtin_nanf(""));
  const __m256 lower = _mm512_cvtpd_ps(has_alpha ? free : usual);
  return {_mm256_mask_mov_ps(nan, valid, _mm256_mask_mov_ps(lower, fixed, stable)),
          _mm256_mask_mov_ps(nan, valid, _mm256_mask_mov_ps(upper, fixed, stable)),
          _mm256_mask_mov_ps(nan, valid, _mm256_maskz_mov_ps(~fixed, offset)),
          static_cast<uint8_t>(~valid)};
}

PREPARED_512_INLINE __m512 joined(__m256 first, __m256 second) {
  return _mm512_insertf32x8(_mm512_castps256_ps512(first), second, 1);
}

template <bool kStream>
PREPARED_512_INLINE void put(float* to, __m512 value) {
  if (kStream) {
    _mm512_stream_ps(to, value);
  } else {
    _mm512_storeu_ps(to, value);
  }
}

// Whole blocks of kAtOnce neurons from `begin`; with kStream, outputs there are aligned to lines.
template <bool kStream, bool kAlpha>
PREPARED_512 int64_t write_blocks_512(double parameter, const CoefficientArgs<float>& args,
                                      int64_t begin, int64_t end) {
  const float *const lower = args.lower, *const upper = args.upper, *const alpha = args.alpha;
  float *const out0 = args.out[0], *const out1 = args.out[1];
  float *const out2 = args.out[2], *const out3 = args.out[3];
  const __m512d p = _mm512_set1_pd(parameter);
  const __m512 nan = _mm512_set1_ps(__builtin_nanf(""));
  int64_t errors = 0;
  for (int64_t i = begin; i < end; i += kAtOnce) {
    EightLines half[2];
    for (int k = 0; k < 2; ++k) {
      const int64_t at = i + 8 * k;
      const __m512d l = _mm512_cvtps_pd(_mm256_loadu_ps(lower + at));
      const __m512d u = _mm512_cvtps_pd(_mm256_loadu_ps(upper + at));
      const __m512d a = kAlpha ? _mm512_cvtps_pd(_mm256_loadu_ps(alpha + at)) : l;
      half[k] = lines_of_eight(l, u, a, p, kAlpha);
    }
    const int invalid = half[0].invalid | half[1].invalid << 8;
    put<kStream>(out0 + i, joined(half[0].lower_slope, half[1].lower_slope));
    put<kStream>(out1 + i, _mm512_maskz_mov_ps(static_cast<__mmask16>(invalid), nan));
    put<kStream>(out2 + i, joined(half[0].upper_slope, half[1].upper_slope));
    put<kStream>(out3 + i, joined(half[0].upper_offset, half[1].upper_offset));
    errors += __builtin_popcount(invalid);
  }
  if (kStream) _mm_sfence();
  return errors;
}

inline bool has_512() {
  return __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

// How many neurons from `begin` on until every output is aligned to cache lines; negative if never.
inline int64_t until_aligned(const CoefficientArgs<float>& args, int64_t begin) {
  const auto phase = [&](int k) {
    return reinterpret_cast<uintptr_t>(args.out[k] + begin) / sizeof(float) % kAtOnce;
  };
  for (int k = 1; k < 4; ++k) {
    if (phase(k) != phase(0)) return -1;
  }
  return static_cast<int64_t>((kAtOnce - phase(0)) % kAtOnce);
}

template <bool kStream>
int64_t write_blocks(double parameter, const CoefficientArgs<float>& args, int64_t begin,
                     int64_t end) {
  return args.alpha == nullptr ? write_blocks_512<kStream, false>(parameter, args, begin, end)
                               : write_blocks_512<kStream, true>(parameter, args, begin, end);
}

}  // namespace torch_prepared
#endif
