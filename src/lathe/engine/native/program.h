// A stack of a model as a list of operations on rows, and what runs it.
//
// Python walks the modules once and writes the list (`engine/program.py`); nothing here knows an architecture. A call
// gives the tokens, the caches and where results go. All threads go through the list together and meet after each
// operation; inside one they take pieces as they come, so that a thread whose core is busy elsewhere holds up little.
//
// The structs are shared with Python, field by field (`engine/layout.py`).
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "kernels.h"

namespace lathe {

enum Code : int32_t {
    kEmbed = 0,   // dst = token vectors, with types and positions added
    kNormalise,   // dst = norm(src)
    kMultiply,    // dst = W norm(src): parts side by side, added to dst, or gated
    kSelfAttend,  // dst = attention of src, which holds q, k and v side by side
    kCrossAttend, // dst = attention of src to the memory
    kKeep,        // dst = the rows of src whose logits are wanted
    kHidden,      // the caller's hidden states = src
    kMemory,      // dst = the encoder's output, pads left out
    kRemember,    // the memory's keys and values of a layer = src
    kChoose,      // the caller's tokens = the likeliest of the logits
};

enum Mode : int32_t { kSideBySide = 0, kAdd = 1, kGated = 2 };
enum Rows : int32_t { kTokens = 0, kKept = 1, kMemoryTokens = 2 };

struct Op {
    int32_t code;
    int32_t rows;       // which rows it works on
    int32_t src, dst;   // buffers; -1: the caller's logits
    int32_t norm;       // -1: none
    int32_t parts[3];   // -1: none
    int32_t mode;
    int32_t activation;
    int32_t layer;      // whose cache
    float scale;
};

struct Embed {
    const float* table;       // vocabulary × width; null where it is in codes
    const uint8_t* codes;     // of 8 bits: vocabulary × width signed bytes; of 4: two to a byte, code + 8
    int64_t codes_row;        // bytes
    const float* scales;      // vocabulary × groups
    const int8_t* zeros;      // the same, or null
    int32_t bits, groups;
    const float* types;       // token types × width, or null
    const float* positions;   // from position 0 on, or null
    int32_t width;
    float scale;
};

struct AttentionShape {
    int32_t heads, groups, d_head;
    int32_t causal, window, rotary;
    float scale;
};

// One pass. Rows are the batch's, columns its longest; what is not a token has no row anywhere below.
struct Call {
    int32_t batch, columns;
    const int64_t* ids;        // batch × columns
    const int64_t* mask;       // the same, 1 for a token; null: all are
    const int64_t* positions;  // the same; null: counted on from `lengths`, or the column
    const int64_t* types;      // the same; null: all 0
    const int64_t* lengths;    // batch: tokens that the cache holds; null without a cache
    float* const* cache_k;     // a pointer for each layer; batch × groups × slots × d_head
    float* const* cache_v;
    int64_t cache_row, cache_head;  // strides
    float* const* first_k;     // what all rows begin with: 1 × groups × n_first × d_head for each layer
    float* const* first_v;
    int64_t first_head;
    int32_t n_first;
    float* const* memory_k;    // memory rows × groups × source × d_head, in any order but the last
    float* const* memory_v;
    int64_t memory_row, memory_head, memory_token;  // strides
    const int32_t* memory_first;   // of each memory row: the first token and how many
    const int32_t* memory_count;
    int32_t memory_rows, memory_columns;
    const float* memory;       // kMemory: memory rows × memory columns × width
    int64_t memory_hidden_row;
    const float* cos;          // position × d_head / 2
    const float* sin;
    const float* bias;         // head × bias_length; distance 0 at bias_zero
    int64_t bias_length, bias_zero;
    int32_t keep;              // how many of the last columns get logits
    int32_t threads;
    float* logits;             // kept tokens × vocabulary; null: not wanted
    int64_t* chosen;           // kept tokens: the likeliest token each; null: not wanted
    float* log_probabilities;  // of these
    float* hidden;             // tokens × width; null: not wanted
};

// Several steps of one token a row: each reads what the one before chose.
struct Steps {
    int32_t most;              // how many at most
    int32_t n_ends;
    int64_t nanoseconds;       // no new step begins after so long
    const int64_t* ends;       // tokens that end a row
    int64_t filler;            // what a row that has ended goes on with
    uint8_t* ended;            // batch: rows that ended before; then (step + 1) × batch: after each step
    int64_t* tokens;           // batch: the first ones to read; then what each step chose; -1: a logit is no number
    float* log_probabilities;  // steps × batch
    int32_t done;              // steps that were taken, the one that met a -1 counted
};

struct Spec {
    const Op* ops;
    int32_t n_ops;             // up to where results begin
    int32_t n_hidden_ops;      // then those for hidden states
    int32_t n_logit_ops;       // then those for logits
    int32_t n_memory_ops;      // then those that read the encoder's output
    const Linear* linears;
    int32_t n_linears;
    const Norm* norms;
    int32_t n_norms;
    const int32_t* widths;     // of the buffers
    int32_t n_widths;
    int32_t vocabulary;
    Embed embed;
    AttentionShape attention;
};

class Program {
public:
    Program(const Spec& spec, const Kernels* kernels);
    ~Program();
    void run(const Call& call, bool reads_memory);
    // `call` is for the first step, with a place for the chosen of one; whatever it holds of tokens and lengths is
    // the caller's and stays.
    void go_on(Call call, Steps& steps);

private:
    struct Workspace;
    struct Row { int first, count, place; };  // tokens of a row, and the place of its first one

    void lay_out(const Call& call, bool reads_memory);
    void work(int thread);
    void run_op(const Op& op, int number, int thread);

    void embed(const Op& op, int thread);
    void decode_row(float* row, int64_t token) const;
    void normalise(const Op& op, int thread);
    void multiply(const Op& op, int number, int thread);
    void self_attend(const Op& op, int number, int thread);
    void cross_attend(const Op& op, int number, int thread);
    void keep(const Op& op, int thread);
    void hidden(const Op& op, int thread);
    void memory(const Op& op, int thread);
    void remember(const Op& op, int thread);
    void choose(int thread);

    int rows_of(const Op& op) const;
    float* buffer(int number) const;
    long stride(int number) const;
    bool claim(int number, int total, int& from, int& to);

    std::vector<Op> ops_;
    std::vector<Linear> linears_;
    std::vector<Norm> norms_;
    std::vector<int> widths_;
    int n_body_, n_hidden_, n_logits_, n_memory_, vocabulary_;
    Embed embed_;
    AttentionShape attention_;
    const Kernels* kernels_;
    int widest_ = 0, most_sums_ = 1;
    bool unpacks_ = false;

    // Of the call that runs.
    const Call* call_ = nullptr;
    bool reads_memory_ = false;
    int threads_ = 1, tokens_ = 0, most_rows_ = 0;
    std::vector<Row> rows_;
    std::vector<int> kept_;
    std::vector<int64_t> ids_, types_, positions_;
    std::unique_ptr<Workspace> space_;
};

}  // namespace lathe
