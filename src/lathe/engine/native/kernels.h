// What an instruction set offers to the program: the inner loops, as a table of functions.
//
// kernels_*.cpp fill the table, one for each instruction set; `best_kernels` picks one at run time.
#pragma once

#include <stdint.h>

namespace lathe {

// Columns of a weight matrix that are computed together, and the width of a packed panel.
constexpr int kPanel = 32;

// How the weights of a matrix are stored. Numbers are shared with Python (`engine/layout.py`).
enum Storage : int32_t {
    kFloat = 0,  // N × K float32, row after row, as PyTorch has it; read where it is
    kByte = 1,   // panels of 32 outputs: K/4 × 32 × 4 bytes, code + 128
    kNibble = 2, // panels of 32 outputs: K/8 × 32 × 4 bytes of two codes, code + 8
};

enum Activation : int32_t { kNone = -1, kRelu = 0, kGelu = 1, kGeluTanh = 2, kQuickGelu = 3, kSilu = 4, kTanh = 5 };

// y = W x + b, W is outputs × inputs.
struct Linear {
    int32_t storage;
    int32_t outputs;
    int32_t inputs;
    int32_t group;        // inputs that share a scale; as many as there are, or for nibbles a multiple of 8
    int32_t exact;        // of codes: 1 where x is taken as it is, 0 where it is rounded to int8
    const void* weight;
    const float* scales;  // of codes: panels × groups × 32, so that they are read in order
    const float* zeros;   // the same: what is taken from the stored codes; null where x is rounded: 128, of nibbles 8
    const float* bias;    // outputs, or null
    const uint16_t* short_scales;  // of nibbles that were packed here: scales as bfloat16; null where `scales` has them
};

struct Norm {
    int32_t rms;  // 1: root mean square; 0: mean and standard deviation
    int32_t width;
    float eps;
    const float* weight;
    const float* bias;  // or null
};

// Rows of numbers rounded to whole ones in -128 … 127, each row with its own scale.
struct Rounded {
    int8_t* values;     // rows × stride
    long stride;        // a multiple of 8; zeros fill up
    float* scales;      // rows
    int32_t* sums;      // rows × groups: of the rounded numbers of a group, or of all in one
};

// Several queries of one row against the keys of one key-value head.
struct Attend {
    const float* q;      // token t, head h: q + t * q_token + h * d_head
    long q_token;
    const float* k;      // key s: k + s * key
    const float* v;
    long key;
    float* out;          // token t, head h: out + t * out_token + h * d_head
    long out_token;
    int tokens, heads, d_head;
    int first;           // the place of token 0 among the keys; read where `causal`
    int keys;            // how many there are
    int causal;          // token t sees keys up to first + t
    int window;          // and of these the last so many; 0 for all
    const float* first_k;  // keys and values that stand before all these, `n_first` of them; null for none
    const float* first_v;
    long first_key;
    int n_first;           // `first` and `keys` count them
    const float* bias;   // head h, key s, place p: bias[h * bias_head + s - p]; null for none
    long bias_head;
    float scale;
    float* scratch;      // `scratch_size` numbers
};

// From so many tokens on, turning the keys pays.
constexpr int kManyTokens = 8;

// What `Attend` needs beside it, for any number of tokens.
inline long scratch_size(long keys, long d_head, bool many) {
    const long padded = (keys + kPanel - 1) / kPanel * kPanel;
    return many ? padded * (d_head + 12) : 4 * (keys + 16);
}

struct Kernels {
    const char* name;

    // tile[row × kPanel + column] = x · W[first + column], for `columns` of them. x: rows × stride.
    void (*multiply_float)(float* tile, const float* x, long stride, int rows, const Linear& w, int first, int columns);

    // The same from a panel that `pack_float` has turned, for many rows.
    void (*pack_float)(float* panel, const Linear& w, int first, int columns);
    void (*multiply_packed)(float* tile, const float* x, long stride, int rows, const float* panel, int inputs);

    // The same from rounded rows and packed weights; `panel` counts whole panels.
    void (*multiply_byte)(float* tile, const Rounded& x, int row, int rows, const Linear& w, int panel);
    void (*multiply_nibble)(float* tile, const Rounded& x, int row, int rows, const Linear& w, int panel);

    // The 32 columns of a packed panel as numbers, inputs × 32, for `multiply_packed`.
    void (*unpack)(float* panel, const Linear& w, int index);

    // to = activation(scale · tile + bias), or to += without an activation; with `gate` to = activation(gate) · tile.
    void (*finish)(float* to, long stride, const float* tile, const float* gate, int rows, int columns,
                   const float* bias, const float* gate_bias, float scale, int activation, int add);

    void (*normalise)(float* to, const float* x, const Norm& norm);
    void (*round_row)(const Rounded& to, int row, const float* x, int width, int group);
    void (*rotate)(float* x, int heads, int d_head, const float* cos, const float* sin);
    void (*attend)(const Attend& what);
    // The place of the largest of `count` numbers, the first if several are; and the logarithm of its softmax. -1 where
    // one is no number.
    void (*choose)(const float* x, int count, int64_t* place, float* log_probability);
    void (*scale_add)(float* to, const float* x, float scale, int width, int add);

    // For packing: one panel of weights, rounded by their largest magnitude; scales: kPanel of them.
    void (*pack_byte)(uint8_t* panel, float* scales, const float* w, long stride, int columns, int inputs);
    // The same to four bits, by groups of 32 inputs; in each the number of largest magnitude becomes -8.
    void (*pack_nibble)(uint8_t* panel, uint16_t* scales, const float* w, long stride, int columns, int inputs);
};

const Kernels* best_kernels(const char* name);  // null: the best that this machine runs; else that one, or null

}  // namespace lathe
