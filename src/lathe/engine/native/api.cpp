// What Python calls, through ctypes: plain functions on plain structs.

#include <new>
#include <cstring>

#include "pool.h"
#include "program.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#define LATHE_API extern "C" __attribute__((visibility("default")))

namespace lathe {

extern const Kernels kernels_portable;
#if defined(LATHE_X86)
extern const Kernels kernels_avx512vnni, kernels_avx512, kernels_avx2;
#if defined(LATHE_AVXVNNI)
extern const Kernels kernels_avxvnni;
#endif
#endif

const Kernels* best_kernels(const char* name) {
    const auto wanted = [&](const Kernels& set) { return name == nullptr || std::strcmp(name, set.name) == 0; };
#if defined(LATHE_X86)
    __builtin_cpu_init();
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const bool middle = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (wide && __builtin_cpu_supports("avx512vnni") && wanted(kernels_avx512vnni)) return &kernels_avx512vnni;
    if (wide && wanted(kernels_avx512)) return &kernels_avx512;
#if defined(LATHE_AVXVNNI)
    if (middle && __builtin_cpu_supports("avxvnni") && wanted(kernels_avxvnni)) return &kernels_avxvnni;
#endif
    if (middle && wanted(kernels_avx2)) return &kernels_avx2;
#endif
    return wanted(kernels_portable) ? &kernels_portable : nullptr;
}

}  // namespace lathe

using namespace lathe;

// What the library was made of; Python compares it with the sources and the structs that it has.
LATHE_API const char* lathe_fingerprint() { return LATHE_FINGERPRINT; }
LATHE_API int lathe_sizes(int which) {
    const int sizes[] = {sizeof(Op), sizeof(Linear), sizeof(Norm), sizeof(Spec), sizeof(Call), sizeof(Steps)};
    return sizes[which];
}

// The name of the instruction set that `name` (null: the best) stands for on this machine; null where there is none.
LATHE_API const char* lathe_instructions(const char* name) {
    const Kernels* set = best_kernels(name);
    return set == nullptr ? nullptr : set->name;
}

LATHE_API void* lathe_new(const Spec* spec, const char* instructions) {
    const Kernels* set = best_kernels(instructions);
    return set == nullptr ? nullptr : new (std::nothrow) Program(*spec, set);
}

LATHE_API void lathe_free(void* program) { delete static_cast<Program*>(program); }

// 0: done; 1: out of memory.
LATHE_API int lathe_run(void* program, const Call* call, int reads_memory) {
    try {
        static_cast<Program*>(program)->run(*call, reads_memory != 0);
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

// The same of several steps.
LATHE_API int lathe_go_on(void* program, const Call* call, Steps* steps) {
    try {
        static_cast<Program*>(program)->go_on(*call, *steps);
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

// Large pages for memory that was just taken: a step touches every page of the weights once.
LATHE_API void lathe_advise(void* start, int64_t bytes) {
#if defined(__linux__)
    const uintptr_t page = 2 << 20, from = ((uintptr_t)start + page - 1) / page * page, to = ((uintptr_t)start + bytes) / page * page;
    if (to > from) madvise((void*)from, to - from, MADV_HUGEPAGE);
#else
    (void)start, (void)bytes;
#endif
}

namespace {
struct Packing {
    const Kernels* set;
    const float* from;
    int64_t stride;
    int outputs, inputs, threads;
    uint8_t* to;
    void* scales;
};

void bytes_of(const Packing& job, int panel, int columns) {
    const int64_t bytes = (int64_t)((job.inputs + 3) / 4) * kPanel * 4;
    job.set->pack_byte(job.to + panel * bytes, (float*)job.scales + panel * kPanel,
                       job.from + (int64_t)panel * kPanel * job.stride, job.stride, columns, job.inputs);
}

void nibbles_of(const Packing& job, int panel, int columns) {
    const int64_t bytes = (int64_t)((job.inputs + 7) / 8) * kPanel * 4, groups = (job.inputs + 31) / 32;
    job.set->pack_nibble(job.to + panel * bytes, (uint16_t*)job.scales + panel * groups * kPanel,
                         job.from + (int64_t)panel * kPanel * job.stride, job.stride, columns, job.inputs);
}

// Panels of a matrix, shared out among threads.
template <void (*PACK)(const Packing&, int, int)>
void pack_panels(Packing& job) {
    Pool::shared().run(
        job.threads,
        [](void* argument, int thread) {
            const Packing& job = *static_cast<Packing*>(argument);
            for (int panel = thread; panel * kPanel < job.outputs; panel += job.threads)
                PACK(job, panel, job.outputs - panel * kPanel < kPanel ? job.outputs - panel * kPanel : kPanel);
        },
        &job);
}
}  // namespace

// A float matrix (rows `stride` apart) to panels of bytes; `scales` has whole panels.
LATHE_API void lathe_pack_bytes(const float* from, int64_t stride, int outputs, int inputs, uint8_t* to, float* scales,
                                int threads) {
    Packing job{best_kernels(nullptr), from, stride, outputs, inputs, threads, to, scales};
    pack_panels<bytes_of>(job);
}

// The same to nibbles in groups of 32 inputs; `scales` are bfloat16, for each panel groups × 32.
LATHE_API void lathe_pack_nibbles(const float* from, int64_t stride, int outputs, int inputs, uint8_t* to,
                                  uint16_t* scales, int threads) {
    Packing job{best_kernels(nullptr), from, stride, outputs, inputs, threads, to, scales};
    pack_panels<nibbles_of>(job);
}
