// Products of float32 rows with a weight matrix.
//
// Few rows: the matrix is read where PyTorch keeps it, row after row, as dot products along the inputs. Nothing is
// packed or copied, and one row at a time runs at the speed of memory. Many rows (a prompt): 32 outputs are first
// turned into a panel, inputs × 32, which stays in the cache; then one broadcast number of x meets 32 outputs, and no
// sums across lanes are left. Turning costs one pass over the weights and pays from about 32 rows on.
#pragma once

#include "kernels.h"
#include "vector.h"

namespace {

using lathe::kPanel;
using lathe::Linear;

// Accumulators live in registers: 32 of them with AVX-512, 16 with AVX2.
#if defined(__AVX512F__)
constexpr int kDotRows = 6, kPackedRows = 12;
#elif defined(__AVX2__)
constexpr int kDotRows = 2, kPackedRows = 3;
#else
constexpr int kDotRows = 4, kPackedRows = 2;
#endif
constexpr int kPanelVectors = kPanel / L;

// out[m * out_stride + n] = x_m · w_n over `width` numbers, for M rows of x and N (a multiple of 4) of w.
template <int M, int N>
INLINE void dots(float* out, long out_stride, const float* x, long x_stride, const float* w, long w_stride, int width) {
    vf sums[M][N];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) sums[m][n] = vf{};
    int i = 0;
    for (; i + L <= width; i += L) {
        vf column[N];
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) column[n] = load(w + n * w_stride + i);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
            const vf row = load(x + m * x_stride + i);
#pragma GCC unroll 16
            for (int n = 0; n < N; ++n) sums[m][n] += row * column[n];
        }
    }
    if (i < width) {
        const int rest = width - i;
        vf column[N];
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) column[n] = load_some(w + n * w_stride + i, rest);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
            const vf row = load_some(x + m * x_stride + i, rest);
#pragma GCC unroll 16
            for (int n = 0; n < N; ++n) sums[m][n] += row * column[n];
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
        for (int n = 0; n < N; n += 4)
            store_sums(out + m * out_stride + n, sums[m][n], sums[m][n + 1], sums[m][n + 2], sums[m][n + 3]);
}

// One row of x and one of w.
INLINE float dot(const float* x, const float* w, int width) {
    vf total{};
    int i = 0;
    for (; i + L <= width; i += L) total += load(x + i) * load(w + i);
    if (i < width) total += load_some(x + i, width - i) * load_some(w + i, width - i);
    return sum(total);
}

template <int M>
INLINE void dot_rows(float* out, long out_stride, const float* x, long x_stride, const float* w, long w_stride,
                     int columns, int width) {
    int n = 0;
    if (M == 1)
        for (; n + 8 <= columns; n += 8) dots<M, 8>(out + n, out_stride, x, x_stride, w + n * w_stride, w_stride, width);
    for (; n + 4 <= columns; n += 4) dots<M, 4>(out + n, out_stride, x, x_stride, w + n * w_stride, w_stride, width);
    for (; n < columns; ++n)
        for (int m = 0; m < M; ++m) out[m * out_stride + n] = dot(x + m * x_stride, w + n * w_stride, width);
}

// out[m × n] = x · wᵀ for any number of rows of both; both lie row after row.
void dot_product(float* out, long out_stride, const float* x, long x_stride, int rows, const float* w, long w_stride,
                 int columns, int width) {
    const int blocks = (rows + kDotRows - 1) / kDotRows;
    for (int block = 0, m = 0; block < blocks; ++block) {
        const int count = (rows - m + blocks - block - 1) / (blocks - block);
        float* o = out + m * out_stride;
        const float* from = x + m * x_stride;
        switch (count) {
            case 1: dot_rows<1>(o, out_stride, from, x_stride, w, w_stride, columns, width); break;
            case 2: dot_rows<2>(o, out_stride, from, x_stride, w, w_stride, columns, width); break;
#if !defined(__AVX2__) || defined(__AVX512F__)
            case 3: dot_rows<3>(o, out_stride, from, x_stride, w, w_stride, columns, width); break;
            case 4: dot_rows<4>(o, out_stride, from, x_stride, w, w_stride, columns, width); break;
#endif
#if defined(__AVX512F__)
            case 5: dot_rows<5>(o, out_stride, from, x_stride, w, w_stride, columns, width); break;
            case 6: dot_rows<6>(o, out_stride, from, x_stride, w, w_stride, columns, width); break;
#endif
        }
        m += count;
    }
}

void multiply_float(float* tile, const float* x, long stride, int rows, const Linear& w, int first, int columns) {
    const float* weight = (const float*)w.weight;
    // Four outputs at a time, so that the second block of rows finds their weights in the first-level cache.
    const int step = rows > kDotRows ? 4 : columns;
    for (int n = 0; n < columns; n += step) {
        const int count = columns - n < step ? columns - n : step;
        dot_product(tile + n, kPanel, x, stride, rows, weight + (long)(first + n) * w.inputs, w.inputs, count, w.inputs);
    }
}

#if defined(__AVX512F__)
// A square of 16 × 16 numbers, turned: pairs, then fours, then quarters of vectors change places.
INLINE void turn_16(float* to, const float* from, long stride) {
    __m512 a[16], b[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(from + i * stride);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 4) {
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
            const __m512d low = _mm512_castps_pd(b[i + j]), high = _mm512_castps_pd(b[i + j + 2]);
            a[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
            a[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
        }
    }
    // a[4 g + r] holds, in its quarter q, column 4 q + r of rows 4 g … 4 g + 3.
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
        const __m512 low01 = _mm512_shuffle_f32x4(a[r], a[4 + r], 0x44), high01 = _mm512_shuffle_f32x4(a[r], a[4 + r], 0xEE);
        const __m512 low23 = _mm512_shuffle_f32x4(a[8 + r], a[12 + r], 0x44);
        const __m512 high23 = _mm512_shuffle_f32x4(a[8 + r], a[12 + r], 0xEE);
        _mm512_storeu_ps(to + (0 + r) * kPanel, _mm512_shuffle_f32x4(low01, low23, 0x88));
        _mm512_storeu_ps(to + (4 + r) * kPanel, _mm512_shuffle_f32x4(low01, low23, 0xDD));
        _mm512_storeu_ps(to + (8 + r) * kPanel, _mm512_shuffle_f32x4(high01, high23, 0x88));
        _mm512_storeu_ps(to + (12 + r) * kPanel, _mm512_shuffle_f32x4(high01, high23, 0xDD));
    }
}
#endif

// `columns` rows of w to a panel, inputs × 32; what is left of the 32 is zero.
void turn(float* panel, const float* w, long w_stride, int columns, int inputs) {
    int i = 0;
#if defined(__AVX512F__)
    for (; columns == kPanel && i + 16 <= inputs; i += 16)
        for (int half = 0; half < kPanel; half += 16) turn_16(panel + (long)i * kPanel + half, w + half * w_stride + i, w_stride);
#endif
    // Sixteen inputs at a time: a cache line of each output is read once, and the written lines stay close.
    for (; i < inputs; i += 16) {
        const int end = i + 16 < inputs ? i + 16 : inputs;
        for (int n = 0; n < columns; ++n)
            for (int k = i; k < end; ++k) panel[(long)k * kPanel + n] = w[n * w_stride + k];
        for (int n = columns; n < kPanel; ++n)
            for (int k = i; k < end; ++k) panel[(long)k * kPanel + n] = 0;
    }
}

void pack_float(float* panel, const Linear& w, int first, int columns) {
    turn(panel, (const float*)w.weight + (long)first * w.inputs, w.inputs, columns, w.inputs);
}

template <int M>
INLINE void packed_rows(float* tile, long tile_stride, const float* x, long stride, const float* panel, int inputs) {
    vf sums[M][kPanelVectors];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
        for (int n = 0; n < kPanelVectors; ++n) sums[m][n] = vf{};
    for (int k = 0; k < inputs; ++k) {
        vf column[kPanelVectors];
#pragma GCC unroll 16
        for (int n = 0; n < kPanelVectors; ++n) column[n] = load(panel + (long)k * kPanel + n * L);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
            const vf number = all(x[m * stride + k]);
#pragma GCC unroll 16
            for (int n = 0; n < kPanelVectors; ++n) sums[m][n] += number * column[n];
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
        for (int n = 0; n < kPanelVectors; ++n) store(tile + m * tile_stride + n * L, sums[m][n]);
}

// tile[m × n] = x · panel for any number of rows and the 32 outputs of a panel.
void packed_product(float* tile, long tile_stride, const float* x, long stride, int rows, const float* panel, int inputs) {
    const int blocks = (rows + kPackedRows - 1) / kPackedRows;
    for (int block = 0, m = 0; block < blocks; ++block) {
        const int count = (rows - m + blocks - block - 1) / (blocks - block);
        float* to = tile + m * tile_stride;
        const float* from = x + m * stride;
        switch (count) {
            case 1: packed_rows<1>(to, tile_stride, from, stride, panel, inputs); break;
            case 2: packed_rows<2>(to, tile_stride, from, stride, panel, inputs); break;
#if defined(__AVX2__)
            case 3: packed_rows<3>(to, tile_stride, from, stride, panel, inputs); break;
#endif
#if defined(__AVX512F__)
            case 4: packed_rows<4>(to, tile_stride, from, stride, panel, inputs); break;
            case 5: packed_rows<5>(to, tile_stride, from, stride, panel, inputs); break;
            case 6: packed_rows<6>(to, tile_stride, from, stride, panel, inputs); break;
            case 7: packed_rows<7>(to, tile_stride, from, stride, panel, inputs); break;
            case 8: packed_rows<8>(to, tile_stride, from, stride, panel, inputs); break;
            case 9: packed_rows<9>(to, tile_stride, from, stride, panel, inputs); break;
            case 10: packed_rows<10>(to, tile_stride, from, stride, panel, inputs); break;
            case 11: packed_rows<11>(to, tile_stride, from, stride, panel, inputs); break;
            case 12: packed_rows<12>(to, tile_stride, from, stride, panel, inputs); break;
#endif
        }
        m += count;
    }
}

void multiply_packed(float* tile, const float* x, long stride, int rows, const float* panel, int inputs) {
    packed_product(tile, kPanel, x, stride, rows, panel, inputs);
}

}  // namespace
