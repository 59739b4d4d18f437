// Vectors of floats as wide as the instruction set has them, and the few functions on them that kernels need.
//
// This file is compiled once for each instruction set (kernels_*.cpp), with that set's flags. Everything in it is in
// an anonymous namespace and nothing of the C++ library is used: a template of std:: that two such files share would
// be linked once, from whichever file, and then run where its instructions do not exist.
//
// The vector types are GCC's and Clang's own (`vector_size`); plain arithmetic on them becomes whatever the target
// has, NEON and SSE included. Intrinsics stand only where the plain form is slow.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int L = 16;  // lanes
#elif defined(__AVX2__)
constexpr int L = 8;
#else
constexpr int L = 4;
#endif

#define INLINE inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(L * 4), may_alias));
typedef float vf_anywhere __attribute__((vector_size(L * 4), may_alias, aligned(4)));
typedef int32_t vi __attribute__((vector_size(L * 4), may_alias));

INLINE vf load(const float* p) { return *(const vf_anywhere*)p; }
INLINE void store(float* p, vf x) { *(vf_anywhere*)p = x; }
INLINE vf all(float x) {
#if defined(__AVX512F__)
    return (vf)_mm512_set1_ps(x);
#elif defined(__AVX2__)
    return (vf)_mm256_set1_ps(x);
#else
    return vf{x, x, x, x};  // not vf{} + x, which really adds: x may be -0
#endif
}

// The first n of the lanes, 0 < n < L; the others are zero, and memory past the n is not touched.
INLINE vf load_some(const float* p, int n) {
#if defined(__AVX512F__)
    return (vf)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
#else
    float lanes[L] = {};
    for (int i = 0; i < n; ++i) lanes[i] = p[i];
    return load(lanes);
#endif
}

INLINE void store_some(float* p, vf x, int n) {
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)x);
#else
    float lanes[L];
    store(lanes, x);
    for (int i = 0; i < n; ++i) p[i] = lanes[i];
#endif
}

INLINE vf larger(vf a, vf b) {
#if defined(__AVX512F__)
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return a > b ? a : b;
#endif
}

INLINE vf smaller(vf a, vf b) {
#if defined(__AVX512F__)
    return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#else
    return a < b ? a : b;
#endif
}

INLINE vf magnitude(vf x) { return larger(x, -x); }

// The larger of two magnitudes as bits. Bits of floats without a sign are in the order of the floats, and NaN is the
// largest of all, so a NaN that is met stays.
INLINE vi larger_magnitude(vi most, vf x) {
    const vi bits = (vi)x & 0x7FFFFFFF;
#if defined(__AVX512F__)
    return (vi)_mm512_max_epi32((__m512i)most, (__m512i)bits);
#elif defined(__AVX2__)
    return (vi)_mm256_max_epi32((__m256i)most, (__m256i)bits);
#else
    return most > bits ? most : bits;
#endif
}

INLINE float sum(vf x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)x);
#else
    float lanes[L], total = 0;
    store(lanes, x);
    for (int i = 0; i < L; ++i) total += lanes[i];
    return total;
#endif
}

INLINE float largest(vf x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)x);
#else
    float lanes[L];
    store(lanes, x);
    float best = lanes[0];
    for (int i = 1; i < L; ++i) best = lanes[i] > best ? lanes[i] : best;
    return best;
#endif
}

// The sums of four vectors, to four places side by side: half the work of four sums.
INLINE void store_sums(float* to, vf a, vf b, vf c, vf d) {
#if defined(__AVX512F__)
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps((__m512)a, (__m512)b), _mm512_unpackhi_ps((__m512)a, (__m512)b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps((__m512)c, (__m512)d), _mm512_unpackhi_ps((__m512)c, (__m512)d));
    const __m512 low = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd)));
    const __m512 high = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd)));
    const __m512 quarters = _mm512_add_ps(low, high);
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(quarters),
                                      _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(quarters), 1)));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#elif defined(__AVX2__)
    const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps((__m256)a, (__m256)b), _mm256_hadd_ps((__m256)c, (__m256)d));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
#else
    to[0] = sum(a), to[1] = sum(b), to[2] = sum(c), to[3] = sum(d);
#endif
}

INLINE float largest_magnitude(const float* x, int width) {
    vi most{};
    int i = 0;
    for (; i + L <= width; i += L) most = larger_magnitude(most, load(x + i));
    if (i < width) most = larger_magnitude(most, load_some(x + i, width - i));
    int32_t best = most[0];
    for (int lane = 1; lane < L; ++lane) best = most[lane] > best ? most[lane] : best;
    float out;
    memcpy(&out, &best, sizeof out);
    return out;
}

// e^x to about two units in the last place: x = n ln 2 + r, a polynomial in r (Cephes, Moshier 1989), and n added to
// the exponent's bits. Below -87 it gives 1e-38, above 88 3e38.
INLINE vf exponential(vf x) {
    const vf rounder = all(12582912.0f);  // 1.5 · 2^23: adding it leaves the nearest whole number in the low bits
    x = larger(all(-87.0f), smaller(all(88.0f), x));  // in this order a NaN stays one
    const vf shifted = x * all(1.44269504f) + rounder;
    const vf n = shifted - rounder;
    const vf r = (x - n * all(0.693359375f)) + n * all(2.12194440e-4f);
    vf p = all(1.9875691500e-4f);
    p = p * r + all(1.3981999507e-3f);
    p = p * r + all(8.3334519073e-3f);
    p = p * r + all(4.1665795894e-2f);
    p = p * r + all(1.6666665459e-1f);
    p = p * r + all(5.0000001201e-1f);
    const vf y = p * (r * r) + r + all(1.0f);
    return (vf)((vi)y + (((vi)shifted - (vi)rounder) << 23));
}

INLINE vf hyperbolic_tangent(vf x) {
    const vf e = exponential(magnitude(x) * all(-2.0f));
    const vf far = (all(1.0f) - e) / (all(1.0f) + e);
    // Near 0 the difference above loses digits; there the series is exact to float32.
    const vf s = x * x;
    const vf near = x * (all(1.0f) + s * (all(-0.33333333f) + s * (all(0.13333333f) + s * all(-0.05396825f))));
    const vf signed_far = x < all(0.0f) ? -far : far;
    return s < all(0.01f) ? near : signed_far;
}

// x · Φ(x), with Φ from Abramowitz & Stegun 7.1.26: an absolute error of Φ below 1e-7, and no cancellation in its tail.
INLINE vf gelu(vf x) {
    const vf z = magnitude(x) * all(0.70710678f);
    const vf t = all(1.0f) / (all(1.0f) + all(0.3275911f) * z);
    vf p = all(1.061405429f);
    p = p * t + all(-1.453152027f);
    p = p * t + all(1.421413741f);
    p = p * t + all(-0.284496736f);
    p = p * t + all(0.254829592f);
    const vf tail = all(0.5f) * p * t * exponential(-z * z);  // 1 - Φ(|x|)
    return x * (x < all(0.0f) ? tail : all(1.0f) - tail);
}

INLINE vf logistic(vf x) { return all(1.0f) / (all(1.0f) + exponential(-x)); }

}  // namespace
