// What is done to single rows between the products: norms, activations, rotation; and attention.
#pragma once

#include "kernels.h"
#include "kernels_float.h"
#include "vector.h"

namespace {

// Queries whose scores are computed together, and how many of them read the values together.
constexpr int kQueries = 12;
#if defined(__AVX512F__)
constexpr int kGathered = 6;
#else
constexpr int kGathered = 2;
#endif

using lathe::Attend;
using lathe::Norm;

float lanes_and_rest(const float* x, int width, float shift, bool squares) {
    vf total{};
    int i = 0;
    for (; i + L <= width; i += L) {
        const vf v = load(x + i) - all(shift);
        total += squares ? v * v : v;
    }
    float out = sum(total);
    for (; i < width; ++i) out += squares ? (x[i] - shift) * (x[i] - shift) : x[i] - shift;
    return out;
}

void normalise(float* to, const float* x, const Norm& norm) {
    const int width = norm.width;
    const float mean = norm.rms ? 0.0f : lanes_and_rest(x, width, 0.0f, false) / (float)width;
    const float variance = lanes_and_rest(x, width, mean, true) / (float)width;
    const float by = 1.0f / __builtin_sqrtf(variance + norm.eps);
    for (int i = 0; i < width; i += L) {
        const int count = width - i < L ? width - i : L;
        const bool whole = count == L;
        vf v = ((whole ? load(x + i) : load_some(x + i, count)) - all(mean)) * all(by);
        v *= whole ? load(norm.weight + i) : load_some(norm.weight + i, count);
        if (norm.bias) v += whole ? load(norm.bias + i) : load_some(norm.bias + i, count);
        if (whole)
            store(to + i, v);
        else
            store_some(to + i, v, count);
    }
}

INLINE vf activate(vf x, int activation) {
    switch (activation) {
        case lathe::kRelu: return larger(vf{}, x);  // in this order a NaN stays one
        case lathe::kGelu: return gelu(x);
        case lathe::kGeluTanh:
            return all(0.5f) * x * (all(1.0f) + hyperbolic_tangent(all(0.79788456f) * (x + all(0.044715f) * x * x * x)));
        case lathe::kQuickGelu: return x * logistic(all(1.702f) * x);
        case lathe::kSilu: return x * logistic(x);
        case lathe::kTanh: return hyperbolic_tangent(x);
        default: return x;
    }
}

template <int ACTIVATION, bool GATE, bool ADD>
void finish_rows(float* to, long stride, const float* tile, const float* gate, int rows, int columns, const float* bias,
                 const float* gate_bias, float scale) {
    for (int i = 0; i < columns; i += L) {
        const int count = columns - i < L ? columns - i : L;
        const bool whole = count == L;
        const vf by = all(scale);
        const vf more = !bias ? vf{} : whole ? load(bias + i) : load_some(bias + i, count);
        const vf gate_more = !gate_bias ? vf{} : whole ? load(gate_bias + i) : load_some(gate_bias + i, count);
        for (int m = 0; m < rows; ++m) {
            float* out = to + m * stride + i;
            vf x = load(tile + m * kPanel + i) * by + more;
            if (GATE)
                x *= activate(load(gate + m * kPanel + i) * by + gate_more, ACTIVATION);
            else
                x = activate(x, ACTIVATION);
            if (ADD) x += whole ? load(out) : load_some(out, count);
            if (whole)
                store(out, x);
            else
                store_some(out, x, count);
        }
    }
}

void finish(float* to, long stride, const float* tile, const float* gate, int rows, int columns, const float* bias,
            const float* gate_bias, float scale, int activation, int add) {
    using Finish = void (*)(float*, long, const float*, const float*, int, int, const float*, const float*, float);
    static constexpr Finish plain[] = {finish_rows<-1, false, false>, finish_rows<0, false, false>,
                                       finish_rows<1, false, false>,  finish_rows<2, false, false>,
                                       finish_rows<3, false, false>,  finish_rows<4, false, false>,
                                       finish_rows<5, false, false>};
    static constexpr Finish gated[] = {finish_rows<-1, true, false>, finish_rows<0, true, false>,
                                       finish_rows<1, true, false>,  finish_rows<2, true, false>,
                                       finish_rows<3, true, false>,  finish_rows<4, true, false>,
                                       finish_rows<5, true, false>};
    const Finish chosen = add ? finish_rows<-1, false, true> : gate ? gated[activation + 1] : plain[activation + 1];
    chosen(to, stride, tile, gate, rows, columns, bias, gate_bias, scale);
}

// Channel i and channel i + d_head / 2 of each head turn by one angle.
void rotate(float* x, int heads, int d_head, const float* cos, const float* sin) {
    const int half = d_head / 2;
    for (int head = 0; head < heads; ++head, x += d_head)
        for (int i = 0; i < half; i += L) {
            const int count = half - i < L ? half - i : L;
            if (count == L) {
                const vf a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i);
                store(x + i, a * c - b * s);
                store(x + half + i, b * c + a * s);
            } else {
                const vf a = load_some(x + i, count), b = load_some(x + half + i, count);
                const vf c = load_some(cos + i, count), s = load_some(sin + i, count);
                store_some(x + i, a * c - b * s, count);
                store_some(x + half + i, b * c + a * s, count);
            }
        }
}

void scale_add(float* to, const float* x, float scale, int width, int add) {
    for (int i = 0; i < width; ++i) to[i] = add ? to[i] + scale * x[i] : scale * x[i];
}

void choose(const float* x, int count, int64_t* place, float* log_probability) {
    vf best = all(-3.4e38f), broken{};
    int i = 0;
    for (; i + L <= count; i += L) {
        const vf v = load(x + i);
        best = larger(best, v);
        broken += v - v;  // 0, but NaN of what is no number or has no end
    }
    float most = largest(best), wrong = sum(broken);
    for (; i < count; ++i) {
        most = x[i] > most ? x[i] : most;
        wrong += x[i] - x[i];
    }
    if (!(wrong == 0.0f)) {
        *place = -1;
        return;
    }
    vf total{};
    for (i = 0; i + L <= count; i += L) total += exponential(load(x + i) - all(most));
    float whole = sum(total);
    for (; i < count; ++i) whole += exponential(all(x[i] - most))[0];
    for (i = 0; x[i] != most; ++i) {}
    *place = i;
    *log_probability = -__builtin_logf(whole);
}

// Σ_s p[m][s] · v[s] for M queries and N vectors of channels.
template <int M, int N>
INLINE void gather(float* out, long out_stride, const float* p, long p_stride, const float* v, long key, int keys,
                   int tail, bool add) {
    vf sums[M][N];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) sums[m][n] = vf{};
    for (int s = 0; s < keys; ++s) {
        vf value[N];
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n)
            value[n] = tail && n == N - 1 ? load_some(v + s * key + n * L, tail) : load(v + s * key + n * L);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
            const vf weight = all(p[m * p_stride + s]);
#pragma GCC unroll 16
            for (int n = 0; n < N; ++n) sums[m][n] += weight * value[n];
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) {
            float* to = out + m * out_stride + n * L;
            if (tail && n == N - 1)
                store_some(to, add ? sums[m][n] + load_some(to, tail) : sums[m][n], tail);
            else
                store(to, add ? sums[m][n] + load(to) : sums[m][n]);
        }
}

template <int M>
INLINE void gather_rows(float* out, long out_stride, const float* p, long p_stride, const float* v, long key, int keys,
                        int d_head, bool add) {
    int i = 0;
    for (; i + 4 * L <= d_head; i += 4 * L) gather<M, 4>(out + i, out_stride, p, p_stride, v + i, key, keys, 0, add);
    for (; i + L <= d_head; i += L) gather<M, 1>(out + i, out_stride, p, p_stride, v + i, key, keys, 0, add);
    if (i < d_head) gather<M, 1>(out + i, out_stride, p, p_stride, v + i, key, keys, d_head - i, add);
}

// p becomes softmax(scale · p + bias) over `count` keys; what is left of the sum is divided out of the weights here.
INLINE void soften(float* p, int count, float scale, const float* bias) {
    vf best = all(-3.4e38f);
    int i = 0;
    for (; i + L <= count; i += L) {
        vf x = load(p + i) * all(scale);
        if (bias) x += load(bias + i);
        store(p + i, x);
        best = larger(best, x);
    }
    float most = largest(best);
    for (; i < count; ++i) {
        p[i] = p[i] * scale + (bias ? bias[i] : 0.0f);
        most = p[i] > most ? p[i] : most;
    }
    vf total{};
    for (i = 0; i + L <= count; i += L) {
        const vf e = exponential(load(p + i) - all(most));
        store(p + i, e);
        total += e;
    }
    float whole = sum(total);
    if (i < count) {
        const vf e = exponential(load_some(p + i, count - i) - all(most));
        store_some(p + i, e, count - i);
        for (int j = i; j < count; ++j) whole += p[j];
    }
    const vf by = all(1.0f / whole);
    for (i = 0; i + L <= count; i += L) store(p + i, load(p + i) * by);
    for (; i < count; ++i) p[i] *= by[0];
}

// M queries that stand `q_stride` apart; query m sees keys `low[m]` … `high[m]` and stands at `place[m]`.
template <int M>
INLINE void attend_block(const Attend& a, const float* q, long q_stride, float* out, long out_stride, const int* low,
                         const int* high, const int* place, const float* const* bias) {
    int first = low[0], last = high[0];
    for (int m = 1; m < M; ++m) {
        first = low[m] < first ? low[m] : first;
        last = high[m] > last ? high[m] : last;
    }
    const int count = last - first;
    const long width = a.keys + 16;
    float* p = a.scratch;
    // Those before all others, and the row's own.
    const int before = a.n_first > first ? a.n_first - first : 0, own = count - before;
    const long from = first + before - a.n_first;
    if (before > 0) dot_rows<M>(p, width, q, q_stride, a.first_k + first * a.first_key, a.first_key, before, a.d_head);
    dot_rows<M>(p + before, width, q, q_stride, a.k + from * a.key, a.key, own, a.d_head);
    for (int m = 0; m < M; ++m) {
        float* row = p + m * width;
        for (int s = 0; s < low[m] - first; ++s) row[s] = 0;
        soften(row + (low[m] - first), high[m] - low[m], a.scale, bias[m] ? bias[m] + (low[m] - place[m]) : nullptr);
        for (int s = high[m] - first; s < count; ++s) row[s] = 0;
    }
    gather_rows<M>(out, out_stride, p + before, width, a.v + from * a.key, a.key, own, a.d_head, false);
    if (before > 0)
        gather_rows<M>(out, out_stride, p, width, a.first_v + first * a.first_key, a.first_key, before, a.d_head, true);
}

void attend_few(const Attend& a) {
    // One token: its heads are a block. Several: each head's tokens are, four at a time, for they share the keys.
    const bool by_heads = a.tokens == 1;
    const int outer = by_heads ? 1 : a.heads, inner = by_heads ? a.heads : a.tokens;
    const long q_stride = by_heads ? a.d_head : a.q_token, out_stride = by_heads ? a.d_head : a.out_token;
    for (int o = 0; o < outer; ++o)
        for (int i = 0; i < inner;) {
            const int count = inner - i >= 4 ? 4 : inner - i >= 2 ? 2 : 1;
            int low[4], high[4], place[4];
            const float* bias[4];
            for (int m = 0; m < count; ++m) {
                const int token = by_heads ? 0 : i + m, head = by_heads ? i + m : o;
                place[m] = a.first + token;
                high[m] = a.causal ? place[m] + 1 : a.keys;
                low[m] = a.causal && a.window > 0 && high[m] > a.window ? high[m] - a.window : 0;
                bias[m] = a.bias ? a.bias + head * a.bias_head : nullptr;
            }
            const long offset = by_heads ? 0 : (long)o * a.d_head;
            const float* q = a.q + offset + i * q_stride;
            float* out = a.out + offset + i * out_stride;
            if (count == 4)
                attend_block<4>(a, q, q_stride, out, out_stride, low, high, place, bias);
            else if (count == 2)
                attend_block<2>(a, q, q_stride, out, out_stride, low, high, place, bias);
            else
                attend_block<1>(a, q, q_stride, out, out_stride, low, high, place, bias);
            i += count;
        }
}

// Several tokens: the keys are turned into panels once, and twelve queries of a head at a time meet 32 keys without
// a sum across lanes.
void attend_many(const Attend& a) {
    const int panels = (a.keys + kPanel - 1) / kPanel;
    const long width = (long)panels * kPanel;
    float* turned = a.scratch;
    float* p = turned + width * a.d_head;
    for (int panel = 0; panel < panels; ++panel) {
        const int count = a.keys - panel * kPanel < kPanel ? a.keys - panel * kPanel : kPanel;
        turn(turned + (long)panel * kPanel * a.d_head, a.k + (long)panel * kPanel * a.key, a.key, count, a.d_head);
    }
    for (int head = 0; head < a.heads; ++head)
        for (int t = 0; t < a.tokens; t += kQueries) {
            const int count = a.tokens - t < kQueries ? a.tokens - t : kQueries;
            const int last = a.causal ? a.first + t + count : a.keys;
            const int seen = a.causal && a.window > 0 && a.first + t + 1 > a.window ? a.first + t + 1 - a.window : 0;
            const int start = seen / kPanel * kPanel;  // the first panel that any of them sees
            const float* q = a.q + t * a.q_token + (long)head * a.d_head;
            for (int key = start; key < last; key += kPanel)
                packed_product(p + key, width, q, a.q_token, count, turned + (long)key * a.d_head, a.d_head);
            for (int m = 0; m < count; ++m) {
                const int place = a.first + t + m, high = a.causal ? place + 1 : a.keys;
                const int low = a.causal && a.window > 0 && high > a.window ? high - a.window : 0;
                float* row = p + m * width;
                for (int s = start; s < low; ++s) row[s] = 0;
                for (int s = high; s < last; ++s) row[s] = 0;
                soften(row + low, high - low, a.scale, a.bias ? a.bias + head * a.bias_head + low - place : nullptr);
            }
            float* out = a.out + t * a.out_token + (long)head * a.d_head;
            for (int m = 0; m < count;) {
                float* to = out + m * a.out_token;
                const float* from = p + m * width + start;
                const float* v = a.v + start * a.key;
                if (count - m >= kGathered) {
                    gather_rows<kGathered>(to, a.out_token, from, width, v, a.key, last - start, a.d_head, false);
                    m += kGathered;
                } else {
                    gather_rows<1>(to, a.out_token, from, width, v, a.key, last - start, a.d_head, false);
                    m += 1;
                }
            }
        }
}

void attend(const Attend& a) {
    if (a.tokens >= lathe::kManyTokens && a.n_first == 0)
        attend_many(a);
    else
        attend_few(a);
}

}  // namespace
