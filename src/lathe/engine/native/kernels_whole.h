// Products of rows and weights that are both rounded to whole numbers: int8 and int4.
//
// A panel holds 32 outputs. Four inputs of an output stand side by side in 32 bits, as unsigned codes; the same four
// numbers of a row are broadcast, and one instruction (VNNI's vpdpbusd) multiplies and adds all four in each lane.
// Codes are unsigned because that instruction wants one side so: code = weight + 128 for int8. What the offset adds
// is the same for every output, 128 times the sum of the row, and is taken off at the end.
//
// Sums are exact 32-bit whole numbers, so every instruction set gives the same ones.
#pragma once

#include "kernels.h"
#include "kernels_float.h"
#include "vector.h"

namespace {

using lathe::Rounded;

INLINE vi four_bytes(const void* p) {
    int32_t four;
    memcpy(&four, p, 4);
    return vi{} + four;
}

INLINE vi load_whole(const void* p) {
    vi x;
    memcpy(&x, p, sizeof x);
    return x;
}

// Each lane plus the sum of its four products of unsigned `codes` and signed `numbers`.
INLINE vi add_products(vi total, vi codes, vi numbers) {
#if defined(__AVX512VNNI__)
    return (vi)_mm512_dpbusd_epi32((__m512i)total, (__m512i)codes, (__m512i)numbers);
#elif defined(__AVXVNNI__)
    return (vi)_mm256_dpbusd_avx_epi32((__m256i)total, (__m256i)codes, (__m256i)numbers);
#elif defined(__AVX512BW__)
    // Two products at a time in 16 bits: the even and the odd bytes, widened with and without a sign.
    const __m512i c = (__m512i)codes, x = (__m512i)numbers;
    const __m512i even = _mm512_madd_epi16(_mm512_and_si512(c, _mm512_set1_epi16(255)),
                                           _mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8));
    const __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16(c, 8), _mm512_srai_epi16(x, 8));
    return (vi)_mm512_add_epi32((__m512i)total, _mm512_add_epi32(even, odd));
#elif defined(__AVX2__)
    const __m256i c = (__m256i)codes, x = (__m256i)numbers;
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256(c, _mm256_set1_epi16(255)),
                                           _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(c, 8), _mm256_srai_epi16(x, 8));
    return (vi)_mm256_add_epi32((__m256i)total, _mm256_add_epi32(even, odd));
#else
    return total + (codes & 255) * ((numbers << 24) >> 24) + ((codes >> 8) & 255) * ((numbers << 16) >> 24) +
           ((codes >> 16) & 255) * ((numbers << 8) >> 24) + ((codes >> 24) & 255) * (numbers >> 24);
#endif
}

INLINE vf as_float(vi x) { return __builtin_convertvector(x, vf); }

// U sets of sums take turns, so that with few rows no sum waits for the one before.
//
// Memory answers late, so what is wanted next is asked for ahead: the panels lie one after the other. With few rows
// that is some 2 KB from here, into the first-level cache. With more, this panel takes long enough to ask for all of
// the next one, into the second (AHEAD, of the first rows alone).
template <int M, int U, bool AHEAD>
INLINE void byte_rows(float* tile, const Rounded& x, int row, const uint8_t* panel, const float* scales, int inputs) {
    vi sums[U][M][kPanelVectors];
#pragma GCC unroll 16
    for (int u = 0; u < U; ++u)
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
            for (int n = 0; n < kPanelVectors; ++n) sums[u][m][n] = vi{};
    const int8_t* values = x.values + row * x.stride;
    const int steps = (inputs + 3) / 4;
    const long ahead = (long)steps * (kPanel * 4);
    auto step = [&](int k, int u) __attribute__((always_inline)) {
        const uint8_t* codes = panel + (long)k * (kPanel * 4);
        if (M <= 2) __builtin_prefetch(codes + 2048), __builtin_prefetch(codes + 2048 + 64);
        if (M > 2 && AHEAD) __builtin_prefetch(codes + ahead, 0, 2), __builtin_prefetch(codes + ahead + 64, 0, 2);
        vi column[kPanelVectors];
#pragma GCC unroll 16
        for (int n = 0; n < kPanelVectors; ++n) column[n] = load_whole(codes + n * L * 4);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
            const vi numbers = four_bytes(values + m * x.stride + k * 4);
#pragma GCC unroll 16
            for (int n = 0; n < kPanelVectors; ++n) sums[u][m][n] = add_products(sums[u][m][n], column[n], numbers);
        }
    };
    int k = 0;
    for (; k + U <= steps; k += U) {
#pragma GCC unroll 16
        for (int u = 0; u < U; ++u) step(k + u, u);
    }
    for (; k < steps; ++k) step(k, 0);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
        const vi offset = vi{} + 128 * x.sums[row + m];
#pragma GCC unroll 16
        for (int n = 0; n < kPanelVectors; ++n) {
            vi total = sums[0][m][n];
#pragma GCC unroll 16
            for (int u = 1; u < U; ++u) total += sums[u][m][n];
            store(tile + m * kPanel + n * L, as_float(total - offset) * (all(x.scales[row + m]) * load(scales + n * L)));
        }
    }
}

template <bool AHEAD>
INLINE void byte_block(float* tile, const Rounded& x, int row, int rows, const uint8_t* codes, const float* scales,
                       int inputs) {
    switch (rows) {
        case 1: byte_rows<1, 4, AHEAD>(tile, x, row, codes, scales, inputs); break;
        case 2: byte_rows<2, 2, AHEAD>(tile, x, row, codes, scales, inputs); break;
#if defined(__AVX2__)
        case 3: byte_rows<3, 1, AHEAD>(tile, x, row, codes, scales, inputs); break;
#endif
#if defined(__AVX512F__)
        case 4: byte_rows<4, 2, AHEAD>(tile, x, row, codes, scales, inputs); break;
        case 5: byte_rows<5, 1, AHEAD>(tile, x, row, codes, scales, inputs); break;
        case 6: byte_rows<6, 1, AHEAD>(tile, x, row, codes, scales, inputs); break;
        case 7: byte_rows<7, 1, AHEAD>(tile, x, row, codes, scales, inputs); break;
        case 8: byte_rows<8, 1, AHEAD>(tile, x, row, codes, scales, inputs); break;
        case 9: byte_rows<9, 1, AHEAD>(tile, x, row, codes, scales, inputs); break;
        case 10: byte_rows<10, 1, AHEAD>(tile, x, row, codes, scales, inputs); break;
        case 11: byte_rows<11, 1, AHEAD>(tile, x, row, codes, scales, inputs); break;
        case 12: byte_rows<12, 1, AHEAD>(tile, x, row, codes, scales, inputs); break;
#endif
    }
}

void multiply_byte(float* tile, const Rounded& x, int row, int rows, const Linear& w, int panel) {
    const long steps = (w.inputs + 3) / 4;
    const uint8_t* codes = (const uint8_t*)w.weight + panel * steps * (kPanel * 4);
    const float* scales = w.scales + (long)panel * kPanel;
    const int blocks = (rows + kPackedRows - 1) / kPackedRows;
    for (int block = 0, m = 0; block < blocks; ++block) {
        const int count = (rows - m + blocks - block - 1) / (blocks - block);
        if (m == 0)
            byte_block<true>(tile, x, row, count, codes, scales, w.inputs);
        else
            byte_block<false>(tile + m * kPanel, x, row + m, count, codes, scales, w.inputs);
        m += count;
    }
}

// Sixteen (or eight, or four) bfloat16 numbers: the upper halves of float32.
INLINE vf load_short(const uint16_t* p) {
#if defined(__AVX512F__)
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(__AVX2__)
    return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
    vi wide{};
    for (int lane = 0; lane < L; ++lane) wide[lane] = (int32_t)((uint32_t)p[lane] << 16);
    return (vf)wide;
#endif
}

// Eight inputs of an output stand in 32 bits: input j in the low half of byte j, input 4 + j in its high half.
// Each group has its own scale and zero: Σ_groups scale · (Σ code · x − zero · Σ x).
template <int M, typename Scale>
INLINE void nibble_rows(float* tile, const Rounded& x, int row, const uint8_t* panel, const Scale* scales,
                        const float* zeros, int inputs, int group) {
    constexpr bool is_short = sizeof(Scale) == 2;
    const auto scale_at = [](const Scale* p) __attribute__((always_inline)) {
        if constexpr (is_short)
            return load_short(p);
        else
            return load(p);
    };
    vf totals[M][kPanelVectors];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
        for (int n = 0; n < kPanelVectors; ++n) totals[m][n] = vf{};
    const int8_t* values = x.values + row * x.stride;
    const int groups = (inputs + group - 1) / group;
    for (int g = 0; g < groups; ++g) {
        const int start = g * group, end = start + group < inputs ? start + group : inputs;
        vi sums[M][kPanelVectors];
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
            for (int n = 0; n < kPanelVectors; ++n) sums[m][n] = vi{};
        for (int k = start; k < end; k += 8) {
            const uint8_t* codes = panel + (long)(k / 8) * (kPanel * 4);
            if (M <= 2) __builtin_prefetch(codes + 2048), __builtin_prefetch(codes + 2048 + 64);
            vi low[kPanelVectors], high[kPanelVectors];
#pragma GCC unroll 16
            for (int n = 0; n < kPanelVectors; ++n) {
                const vi both = load_whole(codes + n * L * 4);
                low[n] = both & 0x0F0F0F0F;
                high[n] = (both >> 4) & 0x0F0F0F0F;
            }
#pragma GCC unroll 16
            for (int m = 0; m < M; ++m) {
                const vi first = four_bytes(values + m * x.stride + k), second = four_bytes(values + m * x.stride + k + 4);
#pragma GCC unroll 16
                for (int n = 0; n < kPanelVectors; ++n)
                    // With few rows the second product does not wait for the first.
                    sums[m][n] = M < 4 ? add_products(sums[m][n], low[n], first) + add_products(vi{}, high[n], second)
                                       : add_products(add_products(sums[m][n], low[n], first), high[n], second);
            }
        }
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
            const vf of_x = all((float)x.sums[(long)(row + m) * groups + g]);
#pragma GCC unroll 16
            for (int n = 0; n < kPanelVectors; ++n)
                totals[m][n] += scale_at(scales + g * kPanel + n * L) *
                                (as_float(sums[m][n]) - (zeros ? load(zeros + g * kPanel + n * L) : all(8.0f)) * of_x);
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
        for (int n = 0; n < kPanelVectors; ++n)
            store(tile + m * kPanel + n * L, totals[m][n] * all(x.scales[row + m]));
}

template <typename Scale>
INLINE void nibble_block(float* tile, const Rounded& x, int row, int rows, const uint8_t* codes, const Scale* scales,
                         const float* zeros, const Linear& w) {
    // Sums and totals share the registers, so a block is half as many rows as elsewhere.
    constexpr int most = kPackedRows / 2 > 0 ? kPackedRows / 2 : 1;
    for (int m = 0; m < rows;) {
        float* to = tile + m * kPanel;
        const int count = rows - m < most ? rows - m : most;
        switch (count) {
            case 1: nibble_rows<1>(to, x, row + m, codes, scales, zeros, w.inputs, w.group); break;
#if defined(__AVX512F__)
            case 2: nibble_rows<2>(to, x, row + m, codes, scales, zeros, w.inputs, w.group); break;
            case 3: nibble_rows<3>(to, x, row + m, codes, scales, zeros, w.inputs, w.group); break;
            case 4: nibble_rows<4>(to, x, row + m, codes, scales, zeros, w.inputs, w.group); break;
            case 5: nibble_rows<5>(to, x, row + m, codes, scales, zeros, w.inputs, w.group); break;
            case 6: nibble_rows<6>(to, x, row + m, codes, scales, zeros, w.inputs, w.group); break;
#endif
        }
        m += count;
    }
}

void multiply_nibble(float* tile, const Rounded& x, int row, int rows, const Linear& w, int panel) {
    const long steps = (w.inputs + 7) / 8, groups = (w.inputs + w.group - 1) / w.group;
    const uint8_t* codes = (const uint8_t*)w.weight + panel * steps * (kPanel * 4);
    const long first = panel * groups * kPanel;
    const float* zeros = w.zeros ? w.zeros + first : nullptr;
    if (w.short_scales)
        nibble_block(tile, x, row, rows, codes, w.short_scales + first, zeros, w);
    else
        nibble_block(tile, x, row, rows, codes, w.scales + first, zeros, w);
}

// A row to whole numbers in -128 … 127 by its largest magnitude, which is 127.5 of them, as `QuantizedLinear` rounds;
// and the sums of its groups.
void round_row(const Rounded& to, int row, const float* x, int width, int group) {
    const float peak = largest_magnitude(x, width);  // NaN where there is one, and then so is the scale
    const float scale = peak == 0 ? 1.1920929e-7f : peak / 127.5f;  // of a row of zeros any
    to.scales[row] = scale;
    int8_t* out = to.values + row * to.stride;
    const vf rounder = all(12582912.0f), by = all(scale);  // as in `exponential`: the nearest, ties to even
    int i = 0;
    for (; i + L <= width; i += L) {
        const vi whole = (vi)(smaller(all(127.0f), load(x + i) / by) + rounder) - (vi)rounder;
#if defined(__AVX512F__)
        _mm_storeu_si128((__m128i*)(out + i), _mm512_cvtepi32_epi8((__m512i)whole));
#else
        for (int lane = 0; lane < L; ++lane) out[i + lane] = (int8_t)whole[lane];
#endif
    }
    for (; i < width; ++i) {
        const vi whole = (vi)(smaller(all(127.0f), all(x[i]) / by) + rounder) - (vi)rounder;
        out[i] = (int8_t)whole[0];
    }
    for (; i < to.stride; ++i) out[i] = 0;
    const int each = group, groups = (width + each - 1) / each;
    for (int g = 0; g < groups; ++g) {
        const int end = (g + 1) * each < width ? (g + 1) * each : width;
        int k = g * each;
        int32_t total = 0;
#if defined(__AVX512VNNI__)
        __m512i fours = _mm512_setzero_si512();
        for (; k + 64 <= end; k += 64) fours = _mm512_dpbusd_epi32(fours, _mm512_set1_epi8(1), _mm512_loadu_si512(out + k));
        total = _mm512_reduce_add_epi32(fours);
#endif
        for (; k < end; ++k) total += out[k];
        to.sums[(long)row * groups + g] = total;
    }
}

void unpack(float* panel, const Linear& w, int index) {
    const int group = w.group, per = w.storage == lathe::kNibble ? 8 : 4;
    const long first = (long)index * ((w.inputs + group - 1) / group);  // of this panel's groups
    const uint8_t* codes = (const uint8_t*)w.weight + (long)index * ((w.inputs + per - 1) / per) * (kPanel * 4);
    for (int k = 0; k < w.inputs; k += per, codes += kPanel * 4)
#pragma GCC unroll 16
        for (int n = 0; n < kPanelVectors; ++n) {
            const vi four = load_whole(codes + n * L * 4);
            const long at = (first + k / group) * kPanel + n * L;
            const vf scale = load(w.scales + at), zero = load(w.zeros + at);
            const auto put = [&](int input, vi code) __attribute__((always_inline)) {
                if (input < w.inputs) store(panel + (long)input * kPanel + n * L, (as_float(code) - zero) * scale);
            };
#pragma GCC unroll 4
            for (int byte = 0; byte < 4; ++byte) {
                const vi code = (four >> (8 * byte)) & 255;
                if (per == 4) {
                    put(k + byte, code);
                } else {
                    put(k + byte, code & 15);
                    put(k + 4 + byte, code >> 4);
                }
            }
        }
}

void pack_byte(uint8_t* panel, float* scales, const float* w, long stride, int columns, int inputs) {
    const int padded = (inputs + 3) / 4 * 4;
    for (int n = 0; n < kPanel; ++n) {
        uint8_t* out = panel + n * 4;
        if (n >= columns) {
            scales[n] = 0;
            for (int k = 0; k < padded; ++k) out[(long)(k / 4) * (kPanel * 4) + k % 4] = 128;
            continue;
        }
        const float* from = w + n * stride;
        const float peak = largest_magnitude(from, inputs);
        const vf by = all(peak > 0 ? 127.0f / peak : 0.0f), rounder = all(12582912.0f);
        scales[n] = peak / 127.0f;
        for (int i = 0; i < inputs; i += L) {
            const int count = inputs - i < L ? inputs - i : L;
            const vf x = count == L ? load(from + i) : load_some(from + i, count);
            const vi whole = (vi)(x * by + rounder) - (vi)rounder + 128;
            for (int lane = 0; lane < count; ++lane)
                out[(long)((i + lane) / 4) * (kPanel * 4) + (i + lane) % 4] = (uint8_t)whole[lane];
        }
        for (int k = inputs; k < padded; ++k) out[(long)(k / 4) * (kPanel * 4) + k % 4] = 128;
    }
}


constexpr int kNibbleGroup = 32;

void pack_nibble(uint8_t* panel, uint16_t* scales, const float* w, long stride, int columns, int inputs) {
    const int groups = (inputs + kNibbleGroup - 1) / kNibbleGroup, padded = (inputs + 7) / 8 * 8;
    for (int n = 0; n < kPanel; ++n)
        for (int g = 0; g < groups; ++g) {
            const int start = g * kNibbleGroup, count = inputs - start < kNibbleGroup ? inputs - start : kNibbleGroup;
            float x[kNibbleGroup] = {}, low = 0, high = 0, broken = 0;
            if (n < columns) memcpy(x, w + n * stride + start, (size_t)count * sizeof(float));
            for (int i = 0; i < kNibbleGroup; ++i) {
                low = x[i] < low ? x[i] : low;
                high = x[i] > high ? x[i] : high;
                broken += x[i] - x[i];  // 0, but NaN of what is no number or has no end
            }
            float scale = (-low > high ? low : high) / -8.0f + broken;
            int32_t bits;
            memcpy(&bits, &scale, sizeof bits);
            // To the nearest number of 16 bits; the codes are of that scale.
            const uint16_t kept = scale == scale ? (uint16_t)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) : 0x7FC0;
            bits = (int32_t)((uint32_t)kept << 16);
            memcpy(&scale, &bits, sizeof bits);
            scales[(long)g * kPanel + n] = kept;
            const vf by = all(scale == 0 ? 0.0f : 1.0f / scale), rounder = all(12582912.0f);
            uint8_t codes[kNibbleGroup];
            for (int i = 0; i < kNibbleGroup; i += L) {
                const vf near = larger(all(-8.0f), smaller(all(7.0f), load(x + i) * by));
                const vi whole = (vi)(near + rounder) - (vi)rounder + 8;
                for (int lane = 0; lane < L; ++lane) codes[i + lane] = (uint8_t)whole[lane];
            }
            for (int i = 0; i < kNibbleGroup && start + i < padded; i += 8) {
                uint32_t first, second;
                memcpy(&first, codes + i, 4), memcpy(&second, codes + i + 4, 4);
                const uint32_t both = first | second << 4;
                memcpy(panel + (long)((start + i) / 8) * (kPanel * 4) + n * 4, &both, 4);
            }
        }
}

}  // namespace
