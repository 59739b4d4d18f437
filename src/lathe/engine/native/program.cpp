#include "program.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "pool.h"

namespace lathe {

namespace {

constexpr int kTileRows = 96;      // of a product that are held before they are finished
constexpr int kPackFrom = 32;      // rows from which turning a float matrix pays
constexpr size_t kLargePage = 2 << 20;
constexpr int kSlack = 16;         // beside each row, so that rows do not fall on the same cache sets

long rounded_up(long number, long to) { return (number + to - 1) / to * to; }

// A block of memory that starts on a cache line, grows when it must, and is not initialised.
class Block {
public:
    ~Block() { std::free(start_); }
    template <typename T>
    T* at_least(size_t count) {
        const size_t bytes = (size_t)rounded_up((long)(count * sizeof(T)) + 64, 64);
        if (bytes > size_) {
            std::free(start_);
            start_ = nullptr, size_ = 0;
            // Rows of a prompt lie pages apart, more of them than the processor remembers: large blocks take large pages.
            const size_t page = bytes >= kLargePage ? kLargePage : 64;
            start_ = std::aligned_alloc(page, (size_t)rounded_up((long)bytes, (long)page));
            if (start_ == nullptr) throw std::bad_alloc();
#if defined(__linux__)
            if (page == kLargePage) madvise(start_, bytes, MADV_HUGEPAGE);
#endif
            std::memset(start_, 0, bytes);
            size_ = bytes;
        }
        return static_cast<T*>(start_);
    }

private:
    void* start_ = nullptr;
    size_t size_ = 0;
};

}  // namespace

struct Program::Workspace {
    struct alignas(64) Counter { std::atomic<int> next{0}; };
    struct Own {  // of one thread
        Block tiles, panel, scores, row, codes, sums;
        float scale = 0;
    };
    Block buffers, rows, codes, scales, sums;
    long capacity = 0;  // rows of each buffer
    std::vector<Counter> counters;
    std::vector<std::unique_ptr<Own>> own;
};

Program::Program(const Spec& spec, const Kernels* kernels)
    : linears_(spec.linears, spec.linears + spec.n_linears), norms_(spec.norms, spec.norms + spec.n_norms),
      widths_(spec.widths, spec.widths + spec.n_widths), n_body_(spec.n_ops), n_hidden_(spec.n_hidden_ops),
      n_logits_(spec.n_logit_ops), n_memory_(spec.n_memory_ops), vocabulary_(spec.vocabulary), embed_(spec.embed),
      attention_(spec.attention), kernels_(kernels), space_(new Workspace) {
    const int total = n_body_ + n_hidden_ + n_logits_ + n_memory_;
    ops_.assign(spec.ops, spec.ops + total);
    space_->counters = std::vector<Workspace::Counter>((size_t)total);
    for (const Linear& each : linears_) {
        widest_ = std::max(widest_, each.inputs);
        unpacks_ = unpacks_ || each.exact != 0;
        if (each.storage != kFloat) most_sums_ = std::max(most_sums_, (each.inputs + each.group - 1) / each.group);
    }
    for (int width : widths_) widest_ = std::max(widest_, width);
}

Program::~Program() = default;

long Program::stride(int number) const { return number < 0 ? vocabulary_ : rounded_up(widths_[(size_t)number], 16) + kSlack; }

float* Program::buffer(int number) const {
    if (number < 0) return call_->logits;
    long before = 0;
    for (int i = 0; i < number; ++i) before += stride(i);
    return space_->buffers.at_least<float>(0) + before * space_->capacity;
}

int Program::rows_of(const Op& op) const {
    return op.rows == kTokens ? tokens_ : op.rows == kKept ? (int)kept_.size() : most_rows_;
}

// The next pieces of an operation, from … to; fewer at a time as it nears its end.
bool Program::claim(int number, int total, int& from, int& to) {
    std::atomic<int>& next = space_->counters[(size_t)number].next;
    int at = next.load(std::memory_order_relaxed);
    for (;;) {
        if (at >= total) return false;
        const int size = threads_ == 1 ? total : std::max(1, (total - at) / (2 * threads_));
        if (next.compare_exchange_weak(at, at + size, std::memory_order_relaxed)) {
            from = at, to = std::min(total, at + size);
            return true;
        }
    }
}

void Program::lay_out(const Call& call, bool reads_memory) {
    call_ = &call;
    reads_memory_ = reads_memory;
    rows_.clear(), kept_.clear(), ids_.clear(), types_.clear(), positions_.clear();
    int longest = 0;  // keys of any row
    bool many = false;
    for (int b = 0; b < call.batch; ++b) {
        Row row{(int)ids_.size(), 0, call.lengths ? call.n_first + (int)call.lengths[b] : 0};
        for (int t = 0; t < call.columns; ++t) {
            const long at = (long)b * call.columns + t;
            if (call.mask && call.mask[at] == 0) continue;
            if (row.count == 0 && !call.lengths) row.place = t;
            const int place = row.place + row.count;
            if (t >= call.columns - call.keep) kept_.push_back((int)ids_.size());
            ids_.push_back(call.ids[at]);
            types_.push_back(call.types ? call.types[at] : 0);
            positions_.push_back(call.positions ? call.positions[at] : place);
            ++row.count;
        }
        longest = std::max(longest, (call.lengths ? row.place : 0) + row.count);
        many = many || row.count >= kManyTokens;
        rows_.push_back(row);
    }
    tokens_ = (int)ids_.size();
    most_rows_ = 0;
    for (int b = 0; b < call.memory_rows; ++b) {
        most_rows_ += call.memory_count[b];
        longest = std::max(longest, call.memory_count[b]);
    }
    const long rows = std::max(tokens_, reads_memory ? most_rows_ : 0);
    Workspace& space = *space_;
    if (rows > space.capacity) {
        space.capacity = rows;
        long all = 0;
        for (size_t i = 0; i < widths_.size(); ++i) all += stride((int)i);
        space.buffers.at_least<float>((size_t)(all * rows));
        space.rows.at_least<float>((size_t)(rows * (rounded_up(widest_, 16) + kSlack)));
        space.codes.at_least<int8_t>((size_t)(rows * (rounded_up(widest_, 64) + 64)));
        space.scales.at_least<float>((size_t)rows);
        space.sums.at_least<int32_t>((size_t)(rows * most_sums_));
    }
    threads_ = std::max(1, call.threads);
    while ((int)space.own.size() < threads_) space.own.emplace_back(new Workspace::Own);
    for (auto& own : space.own) {
        own->tiles.at_least<float>(2 * kTileRows * kPanel);
        own->scores.at_least<float>((size_t)std::max(scratch_size(longest, attention_.d_head, false), many ? scratch_size(longest, attention_.d_head, true) : 0));
        own->row.at_least<float>((size_t)widest_ + 16);
        own->codes.at_least<int8_t>((size_t)widest_ + 64);
        own->sums.at_least<int32_t>((size_t)most_sums_);
        if (rows >= kPackFrom || unpacks_) own->panel.at_least<float>((size_t)widest_ * kPanel);
    }
    for (auto& counter : space.counters) counter.next.store(0, std::memory_order_relaxed);
}

void Program::run(const Call& call, bool reads_memory) {
    lay_out(call, reads_memory);
    Pool::shared().run(
        threads_, [](void* self, int thread) { static_cast<Program*>(self)->work(thread); }, this);
}

void Program::go_on(Call call, Steps& steps) {
    const auto begun = std::chrono::steady_clock::now();
    const std::chrono::nanoseconds budget(steps.nanoseconds);
    const size_t batch = (size_t)call.batch;
    std::vector<int64_t> lengths(call.lengths, call.lengths + batch);
    call.lengths = lengths.data();
    steps.done = 0;
    for (bool more = true; more;) {
        const size_t at = (size_t)steps.done * batch;
        call.ids = steps.tokens + at;
        call.chosen = steps.tokens + at + batch;
        call.log_probabilities = steps.log_probabilities + at;
        run(call, false);
        bool all_ended = true, broken = false;
        for (size_t b = 0; b < batch; ++b) {
            int64_t& token = call.chosen[b];
            broken = broken || token < 0;
            bool ended = steps.ended[at + b] != 0;
            if (ended) token = steps.filler, call.log_probabilities[b] = 0;
            ended = ended || std::find(steps.ends, steps.ends + steps.n_ends, token) != steps.ends + steps.n_ends;
            steps.ended[at + batch + b] = ended;
            all_ended = all_ended && ended;
            ++lengths[b];
        }
        if (broken) call.chosen[0] = -1;
        more = ++steps.done < steps.most && !all_ended && !broken && std::chrono::steady_clock::now() - begun < budget;
    }
}

void Program::work(int thread) {
    const int memory_at = n_body_ + n_hidden_ + n_logits_;
    const auto section = [&](int from, int count) {
        for (int i = from; i < from + count; ++i) {
            run_op(ops_[(size_t)i], i, thread);
            Pool::shared().barrier();
        }
    };
    if (reads_memory_) {
        section(memory_at, n_memory_);
        return;
    }
    section(0, n_body_);
    if (call_->hidden) section(n_body_, n_hidden_);
    // The last of these chooses.
    if (call_->logits) section(n_body_ + n_hidden_, call_->chosen ? n_logits_ : n_logits_ - 1);
}

void Program::run_op(const Op& op, int number, int thread) {
    switch (op.code) {
        case kEmbed: embed(op, thread); break;
        case kNormalise: normalise(op, thread); break;
        case kMultiply: multiply(op, number, thread); break;
        case kSelfAttend: self_attend(op, number, thread); break;
        case kCrossAttend: cross_attend(op, number, thread); break;
        case kKeep: keep(op, thread); break;
        case kHidden: hidden(op, thread); break;
        case kMemory: memory(op, thread); break;
        case kRemember: remember(op, thread); break;
        case kChoose: choose(thread); break;
    }
}

void Program::embed(const Op& op, int thread) {
    float* to = buffer(op.dst);
    const long step = stride(op.dst);
    for (int m = thread; m < tokens_; m += threads_) {
        float* row = to + m * step;
        const long width = embed_.width;
        if (embed_.table)
            kernels_->scale_add(row, embed_.table + ids_[(size_t)m] * width, embed_.scale, embed_.width, 0);
        else
            decode_row(row, ids_[(size_t)m]);
        if (embed_.types) kernels_->scale_add(row, embed_.types + types_[(size_t)m] * width, 1.0f, embed_.width, 1);
        if (embed_.positions)
            kernels_->scale_add(row, embed_.positions + positions_[(size_t)m] * width, 1.0f, embed_.width, 1);
    }
}

// A row of the token table that its codes stand for.
void Program::decode_row(float* row, int64_t token) const {
    const uint8_t* codes = embed_.codes + token * embed_.codes_row;
    const int each = embed_.width / embed_.groups;
    for (int i = 0; i < embed_.width; ++i) {
        const long group = token * embed_.groups + i / each;
        const int code = embed_.bits == 8 ? (int8_t)codes[i] : ((codes[i / 2] >> (4 * (i % 2))) & 15) - 8;
        const int zero = embed_.zeros ? embed_.zeros[group] : 0;
        row[i] = embed_.scale * ((float)(code - zero) * embed_.scales[group]);
    }
}

void Program::choose(int thread) {
    for (int i = thread; i < (int)kept_.size(); i += threads_)
        kernels_->choose(call_->logits + (long)i * vocabulary_, vocabulary_, call_->chosen + i, call_->log_probabilities + i);
}

void Program::normalise(const Op& op, int thread) {
    const int rows = rows_of(op);
    for (int m = thread; m < rows; m += threads_)
        kernels_->normalise(buffer(op.dst) + m * stride(op.dst), buffer(op.src) + m * stride(op.src), norms_[(size_t)op.norm]);
}

void Program::multiply(const Op& op, int number, int thread) {
    Workspace& space = *space_;
    Workspace::Own& own = *space.own[(size_t)thread];
    const int rows = rows_of(op);
    const Linear& first = linears_[(size_t)op.parts[0]];
    const int inputs = first.inputs;
    int n_parts = 0, group = 0;
    bool whole = false;
    while (n_parts < 3 && op.parts[n_parts] >= 0) {
        const Linear& part = linears_[(size_t)op.parts[n_parts++]];
        if (part.storage == kFloat || part.exact) continue;
        whole = true, group = part.group;
    }

    // What the products read: rows that are normed, and rounded where weights are. One row is prepared by every
    // thread for itself, which is quicker than waiting for another.
    const bool alone = rows == 1 || threads_ == 1;
    const bool own_row = rows == 1;
    const float* x = buffer(op.src);
    long x_step = stride(op.src);
    Rounded codes{own_row ? own.codes.at_least<int8_t>(0) : space.codes.at_least<int8_t>(0), rounded_up(inputs, 64) + (own_row ? 0 : 64),
                  own_row ? &own.scale : space.scales.at_least<float>(0),
                  own_row ? own.sums.at_least<int32_t>(0) : space.sums.at_least<int32_t>(0)};
    if (op.norm >= 0 || whole) {
        const float* from = x;
        const long from_step = x_step;
        if (op.norm >= 0) {
            x_step = rounded_up(inputs, 16) + kSlack;
            x = own_row ? own.row.at_least<float>(0) : space.rows.at_least<float>(0);
        }
        for (int m = alone ? 0 : thread; m < rows; m += alone ? 1 : threads_) {
            const float* row = from + m * from_step;
            if (op.norm >= 0) {
                float* normed = const_cast<float*>(x) + m * x_step;
                kernels_->normalise(normed, row, norms_[(size_t)op.norm]);
                row = normed;
            }
            if (whole) kernels_->round_row(codes, m, row, inputs, group);
        }
        if (!alone) Pool::shared().barrier();
    }

    // One part after the other, each in panels; gated parts go together and count once.
    int panels = 0, ends[3];
    const bool gated = op.mode == kGated;
    for (int i = 0; i < (gated ? 1 : n_parts); ++i)
        ends[i] = panels += (linears_[(size_t)op.parts[i]].outputs + kPanel - 1) / kPanel;
    float* tile = own.tiles.at_least<float>(0);
    float* gate_tile = tile + kTileRows * kPanel;
    float* panel_space = own.panel.at_least<float>(0);
    float* to = buffer(op.dst);
    const long to_step = stride(op.dst);

    const auto product = [&](float* out, const Linear& w, int panel, int columns, int row, int count) {
        if (w.exact)
            kernels_->multiply_packed(out, x + row * x_step, x_step, count, panel_space, inputs);
        else if (w.storage == kByte)
            kernels_->multiply_byte(out, codes, row, count, w, panel);
        else if (w.storage == kNibble)
            kernels_->multiply_nibble(out, codes, row, count, w, panel);
        else if (rows >= kPackFrom)
            kernels_->multiply_packed(out, x + row * x_step, x_step, count, panel_space, inputs);
        else
            kernels_->multiply_float(out, x + row * x_step, x_step, count, w, panel * kPanel, columns);
    };
    int from, until;
    while (claim(number, panels, from, until))
        for (int each = from; each < until; ++each) {
            int part = 0, column = 0, panel = each;
            while (each >= ends[part]) {
                column += linears_[(size_t)op.parts[part]].outputs;
                panel = each - ends[part++];
            }
            const Linear& w = linears_[(size_t)op.parts[gated ? 1 : part]];
            const Linear* gate = gated ? &first : nullptr;
            const int columns = std::min(kPanel, w.outputs - panel * kPanel), at = panel * kPanel;
            // A float panel that is turned, or that codes stand for; of gated parts each in its turn.
            const auto turn = [&](const Linear& of) {
                if (of.exact)
                    kernels_->unpack(panel_space, of, panel);
                else if (of.storage == kFloat && rows >= kPackFrom)
                    kernels_->pack_float(panel_space, of, at, columns);
            };
            if (!gate) turn(w);
            for (int row = 0; row < rows; row += kTileRows) {
                const int count = std::min(kTileRows, rows - row);
                if (gate) {
                    turn(*gate);
                    product(gate_tile, *gate, panel, columns, row, count);
                    turn(w);
                }
                product(tile, w, panel, columns, row, count);
                kernels_->finish(to + row * to_step + column + at, to_step, tile, gate ? gate_tile : nullptr, count, columns,
                                 w.bias ? w.bias + at : nullptr, gate && gate->bias ? gate->bias + at : nullptr,
                                 op.scale, op.activation, op.mode == kAdd);
            }
        }
}

void Program::self_attend(const Op& op, int number, int thread) {
    const AttentionShape& a = attention_;
    const Call& call = *call_;
    const int shared = a.heads / a.groups, d_q = a.heads * a.d_head, d_kv = a.groups * a.d_head;
    float* qkv = buffer(op.src);
    const long step = stride(op.src);
    int from, until;
    while (claim(number, (int)rows_.size() * a.groups, from, until))
        for (int task = from; task < until; ++task) {
            const int b = task / a.groups, group = task % a.groups;
            const Row& row = rows_[(size_t)b];
            if (row.count == 0) continue;
            float* q = qkv + row.first * step + (long)group * shared * a.d_head;
            float* k = qkv + row.first * step + d_q + (long)group * a.d_head;
            float* v = k + d_kv;
            if (a.rotary)
                for (int t = 0; t < row.count; ++t) {
                    const long turn = positions_[(size_t)(row.first + t)] * (a.d_head / 2);
                    kernels_->rotate(q + t * step, shared, a.d_head, call.cos + turn, call.sin + turn);
                    kernels_->rotate(k + t * step, 1, a.d_head, call.cos + turn, call.sin + turn);
                }
            Attend what{};
            what.key = step, what.k = k, what.v = v;
            what.keys = row.count, what.first = 0;
            if (call.lengths) {
                const long head = b * call.cache_row + group * call.cache_head;
                float* to_k = call.cache_k[op.layer] + head;
                float* to_v = call.cache_v[op.layer] + head;
                for (int t = 0; t < row.count; ++t) {
                    const long slot = (long)(row.place - call.n_first + t) * a.d_head;
                    std::memcpy(to_k + slot, k + t * step, (size_t)a.d_head * sizeof(float));
                    std::memcpy(to_v + slot, v + t * step, (size_t)a.d_head * sizeof(float));
                }
                what.key = a.d_head, what.k = to_k, what.v = to_v;
                what.keys = row.place + row.count, what.first = row.place;
                if (call.n_first > 0) {
                    what.first_k = call.first_k[op.layer] + group * call.first_head;
                    what.first_v = call.first_v[op.layer] + group * call.first_head;
                    what.first_key = a.d_head, what.n_first = call.n_first;
                }
            }
            what.q = q, what.q_token = step;
            what.out = buffer(op.dst) + row.first * stride(op.dst) + (long)group * shared * a.d_head;
            what.out_token = stride(op.dst);
            what.tokens = row.count, what.heads = shared, what.d_head = a.d_head;
            what.causal = a.causal, what.window = a.window, what.scale = a.scale;
            if (call.bias)
                what.bias = call.bias + (long)group * shared * call.bias_length + call.bias_zero,
                what.bias_head = call.bias_length;
            what.scratch = space_->own[(size_t)thread]->scores.at_least<float>(0);
            kernels_->attend(what);
        }
}

void Program::cross_attend(const Op& op, int number, int thread) {
    const AttentionShape& a = attention_;
    const Call& call = *call_;
    const int shared = a.heads / a.groups, sharing = call.batch / call.memory_rows;
    int from, until;
    while (claim(number, (int)rows_.size() * a.groups, from, until))
        for (int task = from; task < until; ++task) {
            const int b = task / a.groups, group = task % a.groups, source = b / sharing;
            const Row& row = rows_[(size_t)b];
            if (row.count == 0) continue;
            const long head = source * call.memory_row + group * call.memory_head +
                              call.memory_first[source] * call.memory_token;
            Attend what{};
            what.q = buffer(op.src) + row.first * stride(op.src) + (long)group * shared * a.d_head;
            what.q_token = stride(op.src);
            what.k = call.memory_k[op.layer] + head, what.v = call.memory_v[op.layer] + head, what.key = call.memory_token;
            what.out = buffer(op.dst) + row.first * stride(op.dst) + (long)group * shared * a.d_head;
            what.out_token = stride(op.dst);
            what.tokens = row.count, what.heads = shared, what.d_head = a.d_head;
            what.keys = call.memory_count[source], what.scale = a.scale;
            what.scratch = space_->own[(size_t)thread]->scores.at_least<float>(0);
            kernels_->attend(what);
        }
}

void Program::keep(const Op& op, int thread) {
    const size_t bytes = (size_t)widths_[(size_t)op.src] * sizeof(float);
    for (int i = thread; i < (int)kept_.size(); i += threads_)
        std::memcpy(buffer(op.dst) + i * stride(op.dst), buffer(op.src) + kept_[(size_t)i] * stride(op.src), bytes);
}

void Program::hidden(const Op& op, int thread) {
    const long width = widths_[(size_t)op.src];
    for (int m = thread; m < tokens_; m += threads_)
        std::memcpy(call_->hidden + m * width, buffer(op.src) + m * stride(op.src), (size_t)width * sizeof(float));
}

void Program::memory(const Op& op, int thread) {
    const Call& call = *call_;
    const long width = widths_[(size_t)op.dst];
    int m = 0;
    for (int b = 0; b < call.memory_rows; ++b)
        for (int s = 0; s < call.memory_count[b]; ++s, ++m) {
            if (m % threads_ != thread) continue;
            const float* from = call.memory + b * call.memory_hidden_row + (call.memory_first[b] + s) * width;
            std::memcpy(buffer(op.dst) + m * stride(op.dst), from, (size_t)width * sizeof(float));
        }
}

void Program::remember(const Op& op, int thread) {
    const Call& call = *call_;
    const AttentionShape& a = attention_;
    const long d_kv = (long)a.groups * a.d_head;
    int m = 0;
    for (int b = 0; b < call.memory_rows; ++b)
        for (int s = 0; s < call.memory_count[b]; ++s, ++m) {
            if (m % threads_ != thread) continue;
            const float* from = buffer(op.src) + m * stride(op.src);
            for (int group = 0; group < a.groups; ++group) {
                const long to = b * call.memory_row + group * call.memory_head + (call.memory_first[b] + s) * call.memory_token;
                const size_t bytes = (size_t)a.d_head * sizeof(float);
                std::memcpy(call.memory_k[op.layer] + to, from + (long)group * a.d_head, bytes);
                std::memcpy(call.memory_v[op.layer] + to, from + d_kv + (long)group * a.d_head, bytes);
            }
        }
}

}  // namespace lathe
