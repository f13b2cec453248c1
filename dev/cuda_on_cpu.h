/*  cuda_on_cpu.h: CUDA source, run by the CPU, thread by thread.

    A .cu file that includes this where nvcc is not (`#ifndef __CUDACC__`) compiles as plain C++17:

        g++ -std=c++17 -g -fopenmp -x c++ train.cu …

    and each kernel runs as it is written: the blocks of a grid one after the other, the threads of a block in turns.
    It takes 5 to 10 ns a thread, and 20 to 40 more at a barrier. What a GPU leaves to chance is made to show here:
      - CUDA_ORDER=forward|reverse|random:SEED in the environment is the order in which threads and blocks take their
        turns. A kernel that lacks a barrier gives other results in another order.
      - Shared memory before every block, and fresh device memory, hold 0xff bytes: NaN in every floating-point type.
      - A barrier or shuffle that only some of its threads reach ends the program and says who waits where.
      - Built with -fsanitize=address,undefined, a kernel that reads beside its array is reported, with block and thread.

    To walk through a kernel, build with -O0 -g; its threads are functions on stacks of their own, the indices variables:

        gdb --args ./train_emu …
        (gdb) break rmsnorm_kernel if blockIdx.x == 2 && threadIdx.x == 5      # a template: break 'add_kernel<float>' if …
        (gdb) run
        (gdb) next                    # over a __syncthreads, too: it stops again in this thread, not in another
        (gdb) print threadIdx         # a shared array prints as the threads before this one have left it

      1  the language        2  a block and its threads    3  barriers and shuffles    4  shared memory
      5  launch              6  numbers of 16 bits         7  the runtime              8  cuBLAS

    Only what train.cu calls is here. A kernel that needs more (another shuffle, a stream, a copy of another kind) adds it,
    and its test to dev/test_cuda_on_cpu.cpp.                                                                               */

#ifndef CUDA_ON_CPU_H
#define CUDA_ON_CPU_H
#include <deque>
#include <elf.h>
#include <fcntl.h>
#include <functional>
#include <limits.h>
#include <map>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <type_traits>
#include <unistd.h>
#include <utility>
#include <vector>

#if defined __has_feature                                   // clang++; g++ says __SANITIZE_ADDRESS__
#if __has_feature(address_sanitizer)
#define __SANITIZE_ADDRESS__ 1
#endif
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined __x86_64__ && !defined CUDA_UCONTEXT
#define CUDA_UCONTEXT 1                                     // no switch of our own for this processor
#endif
#ifdef CUDA_UCONTEXT
#include <ucontext.h>
#endif

/* ---- 1  the language ----------------------------------------------------------------------------------------- */

#define __global__ __attribute__((noinline))                // a function of its own, for breakpoints
#define __device__
#define __host__
// One copy is enough, since one block runs at a time; section 4 finds it by its tag.
#define __shared__ static __attribute__((abi_tag("shared")))
#define __launch_bounds__(...)
#define LAUNCH(kernel, blocks, threads, ...) \
    cuda_on_cpu::launch(#kernel, [&](auto &...kernel_arguments) { kernel(kernel_arguments...); }, blocks, threads, ##__VA_ARGS__)
// With so many bytes of shared memory, whose size the launch decides; in the kernel SHARED_MEMORY(T, name) is a T *.
#define LAUNCH_SHARED(kernel, blocks, threads, bytes, ...) \
    (cuda_on_cpu::use_shared((const void *)kernel, bytes), LAUNCH(kernel, blocks, threads, ##__VA_ARGS__))
#define SHARED_MEMORY(T, name) T *name = (T *)cuda_on_cpu::shared_memory

#define UNROLL                                              // which of nvcc's pragmas g++ would warn about

struct uint3 { unsigned x, y, z; };
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// Of the thread that runs. Plain variables, so that a debugger can read them and a condition can name them.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

// One thread runs at a time and none is interrupted: whatever it does is atomic, and every other thread sees it.
template <class T> T atomicAdd(T *p, std::common_type_t<T> x)
{
    T old = *p;
    *p += x;
    return old;
}

/* ---- 2  a block and its threads --------------------------------------------------------------------------------
   A thread runs until it waits or returns; then the next one has its turn. Where a thread has to wait its stack must
   be kept, so it stays behind on its fiber and the next thread goes on with another. Threads that never wait run
   one after the other on a single fiber, with no switch at all.                                                     */

namespace cuda_on_cpu {

enum { MAX_THREADS = 1024, STACK = 256 << 10, GUARD = 4096 };   // a fiber's stack, and the page below it that faults
enum state : unsigned char { FRESH, READY, AT_BARRIER, AT_WARP, RETURNED };

struct fiber {
    int thread;                 // whose turn it carries
    const void *stack;
    size_t size;
    void *fake;                 // AddressSanitizer's
#ifdef CUDA_UCONTEXT
    ucontext_t context;
#else
    void *sp;                   // where its registers lie while it rests
#endif
};

struct thread {
    uint3 index;
    fiber *on;
    const char *what, *file;    // what it waits for, and where
    int line, lane;             // shuffle: the lane to read from
    unsigned mask, arrived;     // shuffle: the lanes that take part; in the lowest of them, how many have come
    uint64_t value;             // shuffle: what it gives, then what it gets
};

// Of the block that runs.
inline state   states[MAX_THREADS];
inline thread  threads[MAX_THREADS];
inline int     turns[MAX_THREADS], turn;        // the order of turns, and whose comes next
inline int     count, waiting, returned, me;    // threads; at the barrier; done; the one that runs
inline bool    moved;                           // has anyone had a turn in this round?
inline const char *kernel_name;                 // NULL outside kernels
inline void  (*body)(void *), *arguments;       // the kernel, its arguments bound
inline fiber   launcher, fibers[MAX_THREADS], *here = &launcher, *came_from = &launcher, *resting[MAX_THREADS];
inline int     made, rest;                      // fibers made so far, and without a thread

// CUDA_ORDER, read at every launch. A random order is a new one every round, and the same ones in every run.
struct order {
    enum { FORWARD, REVERSE, RANDOM } kind;
    uint64_t seed;
    uint64_t random(uint64_t below)             // splitmix64
    {
        uint64_t z = seed += 0x9e3779b97f4a7c15u;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
        z = (z ^ z >> 27) * 0x94d049bb133111ebu;
        return (z ^ z >> 31) % below;
    }
    template <class T> void arrange(T *list, size_t n)
    {
        for (size_t i = 0; i < n; i++) list[i] = (T)(kind == REVERSE ? n - 1 - i : i);
        for (size_t i = n; kind == RANDOM && i > 1; i--) std::swap(list[i - 1], list[random(i)]);
    }
};
inline order rule;

inline order read_order()
{
    static uint64_t launches;
    const char *s = getenv("CUDA_ORDER");
    char *end = NULL;
    launches++;
    if (!s || !*s || !strcmp(s, "forward")) return {order::FORWARD, 0};
    if (!strcmp(s, "reverse")) return {order::REVERSE, 0};
    uint64_t seed = strncmp(s, "random:", 7) ? 0 : strtoull(s + 7, &end, 10);
    if (end && end > s + 7 && !*end) return {order::RANDOM, (seed << 32) + launches};
    fprintf(stderr, "error: CUDA_ORDER=%s: expected forward, reverse or random:SEED\n", s);
    exit(1);
}

inline void say_where()
{
    fprintf(stderr, "cuda_on_cpu: kernel %s, block (%u,%u,%u) of (%u,%u,%u)",
            kernel_name, blockIdx.x, blockIdx.y, blockIdx.z, gridDim.x, gridDim.y, gridDim.z);
}

// No thread can move. Say who waits where, a line for each place, and end.
[[noreturn]] inline void stuck(const char *why)
{
    auto together = [](int i, int j) {
        const thread &a = threads[i], &b = threads[j];
        return states[i] == states[j] && (states[i] == RETURNED || (a.line == b.line && a.mask == b.mask));
    };
    say_where();
    fprintf(stderr, ": %s\n", why);
    for (int i = 0; i < count; i++) {
        const thread &t = threads[i];
        int first = 0, n = 0;
        while (!together(first, i)) first++;
        if (first < i) continue;
        for (int j = i; j < count; j++) n += together(i, j);
        fprintf(stderr, "    %4d of %d threads, the first is (%u,%u,%u): ", n, count, t.index.x, t.index.y, t.index.z);
        if (states[i] == RETURNED) fprintf(stderr, "returned\n");
        else if (states[i] <= READY) fprintf(stderr, "on the way\n");
        else fprintf(stderr, "%s:%d: wait in %s, mask %08x\n", t.file, t.line, t.what, t.mask);
    }
    fflush(NULL);
    abort();
}

// The threads in turn; a round ends when all have run or wait. Then the barrier opens, if everyone is there.
// -1: all have returned.
inline int next_thread()
{
    for (;;) {
        while (turn < count) {
            int t = turns[turn++];
            if (states[t] > READY) continue;
            moved = true;
            return t;
        }
        if (returned == count) return -1;
        if (waiting == count) {
            for (int t = 1; t < count; t++)
                if (threads[t].line != threads[0].line) stuck("threads of one block wait at different barriers");
            memset(states, READY, count);
            waiting = 0;
        } else if (!moved) stuck("only a part of the threads reaches a barrier");
        if (rule.kind == order::RANDOM) rule.arrange(turns, count);
        turn = 0;
        moved = false;
    }
}

/* A switch puts this fiber's registers on its stack, takes the other's stack, and fetches its registers. To the compiler
   it is a call of an unknown function, so it keeps no shared variable in a register meanwhile.                           */
#ifndef CUDA_UCONTEXT
extern "C" void cuda_on_cpu_switch(void **save_sp, void *load_sp);
asm(".text; .weak cuda_on_cpu_switch; .type cuda_on_cpu_switch, @function; cuda_on_cpu_switch:\n"
    "push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15; mov %rsp, (%rdi)\n"
    "mov %rsi, %rsp; pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp; ret\n"
    ".size cuda_on_cpu_switch, . - cuda_on_cpu_switch");
#endif

inline void arrive([[maybe_unused]] fiber *self)
{
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(self->fake, &came_from->stack, &came_from->size);
#endif
    me = here->thread;
    threadIdx = threads[me].index;
}

inline void switch_to(fiber *to)
{
    fiber *from = here;
    came_from = from;
    here = to;
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(&from->fake, to->stack, to->size);
#endif
#ifdef CUDA_UCONTEXT
    swapcontext(&from->context, &to->context);
#else
    cuda_on_cpu_switch(&from->sp, to->sp);
#endif
    arrive(from);
}

inline fiber *new_fiber();

// The next thread has its turn, on the fiber where it waits or, if it is new, on one that rests; after the last, the
// launcher.
inline void give_turn()
{
    int t = next_thread();
    fiber *to = t < 0 ? &launcher : states[t] != FRESH ? threads[t].on : rest ? resting[--rest] : new_fiber();
    if (t >= 0) {
        to->thread = t;
        threads[t].on = to;
    }
    if (to != here) {
        switch_to(to);
        return;
    }
    me = t;
    threadIdx = threads[t].index;
}

inline void fiber_main()
{
    for (arrive(here);;) {
        body(arguments);
        states[me] = RETURNED;
        returned++;
        resting[rest++] = here;         // the last to rest is the first to go on: a new thread stays on this fiber
        give_turn();
    }
}

inline fiber *new_fiber()
{
    const size_t each = STACK + GUARD;
    static char *stacks = (char *)mmap(NULL, MAX_THREADS * each, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    char *stack = stacks + made * each + GUARD;
    if (stacks == MAP_FAILED || mprotect(stack, STACK, PROT_READ | PROT_WRITE)) {
        perror("error: no memory for the stacks of threads");
        exit(1);
    }
    fiber *f = &fibers[made++];
    f->stack = stack;
    f->size = STACK;
#ifdef CUDA_UCONTEXT
    getcontext(&f->context);
    f->context.uc_stack.ss_sp = stack;
    f->context.uc_stack.ss_size = STACK;
    makecontext(&f->context, fiber_main, 0);
#else
    // The first switch pops six registers and returns into fiber_main. The tops differ by a few cache lines: at the same
    // place in every page they would compete for the same few lines of the cache.
    void **top = (void **)(stack + STACK - made % 16 * 256) - 2;
    top[0] = (void *)fiber_main;
    top[1] = NULL;                                              // no caller: here a backtrace ends
    f->sp = top - 6;
#endif
    return f;
}

/* ---- 3  barriers and shuffles ----------------------------------------------------------------------------------- */

inline void wait_at(state s, const char *what, unsigned mask, const char *file, int line)
{
    thread &t = threads[me];
    states[me] = s;
    t.what = what;
    t.mask = mask;
    t.file = file;
    t.line = line;
}

// The lanes of `mask` meet; each brings a value. The last to come hands out what each of them gets, while all others
// wait: hand_out(what the 32 lanes have brought, the warp's first thread).
template <class F>
uint64_t meet(const char *what, unsigned mask, uint64_t value, int source, const char *file, int line, F hand_out)
{
    int self = me;
    int first = me & ~31;
    int lanes = count - first < 32 ? count - first : 32;
    mask &= ~0u >> (32 - lanes);                                // the last warp of a block may be short
    threads[me].value = value;
    threads[me].lane = source;
    wait_at(AT_WARP, what, mask, file, line);
    if (!(mask >> (me - first) & 1)) stuck("a thread is not in its own mask");
    unsigned &arrived = threads[first + __builtin_ctz(mask)].arrived;
    if (++arrived < (unsigned)__builtin_popcount(mask)) {
        give_turn();
        return threads[self].value;
    }
    arrived = 0;
    uint64_t given[32] = {};
    for (int i = 0; i < lanes; i++) {
        const thread &t = threads[first + i];
        bool here_too = states[first + i] == AT_WARP && t.mask == mask && t.line == line;
        given[i] = t.value;
        if (mask >> i & 1 && !here_too) stuck("the lanes of a mask do not meet in one place");
    }
    hand_out(given, first, mask);
    for (int i = 0; i < lanes; i++)
        if (mask >> i & 1) states[first + i] = READY;
    // A warp goes on as far as it can before the next has its turn, or, in a random order, only sometimes: if all took
    // one step a round, a warp that no barrier holds back would never be seen to run ahead.
    if (rule.kind != order::RANDOM || rule.random(2)) turn = 0;
    return threads[self].value;
}

// Each lane gets the value of its source lane.
inline void from_source(const uint64_t *given, int first, unsigned mask)
{
    for (int i = 0; i < 32; i++) {
        if (!(mask >> i & 1)) continue;
        thread &t = threads[first + i];
        if (!(mask >> t.lane & 1)) stuck("a shuffle reads a lane that does not take part");
        t.value = given[t.lane];
    }
}

}

#define CUDA_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()      // of the caller

inline void __syncthreads(CUDA_HERE)
{
    cuda_on_cpu::wait_at(cuda_on_cpu::AT_BARRIER, "__syncthreads", ~0u, file, line);
    cuda_on_cpu::waiting++;
    cuda_on_cpu::give_turn();
}
template <int THREADS> void meet(CUDA_HERE)             // ops/tensor_core.cuh
{
    if (THREADS != blockDim.x * blockDim.y * blockDim.z) cuda_on_cpu::stuck("meet<…> of another number of threads");
    __syncthreads(file, line);
}

namespace cuda_on_cpu {
template <class T> T shuffle(const char *what, unsigned mask, T x, int source, const char *file, int line)
{
    static_assert(sizeof(T) <= sizeof(uint64_t), "a shuffle carries 8 bytes");
    uint64_t value = 0;
    memcpy(&value, &x, sizeof x);
    value = meet(what, mask, value, source & 31, file, line, from_source);
    memcpy(&x, &value, sizeof x);
    return x;
}
}

template <class T> T __shfl_xor_sync(unsigned mask, T x, int bits, CUDA_HERE)
{
    return cuda_on_cpu::shuffle("__shfl_xor_sync", mask, x, cuda_on_cpu::me ^ bits, file, line);
}

template <class T> T __shfl_sync(unsigned mask, T x, int lane, CUDA_HERE)
{
    return cuda_on_cpu::shuffle("__shfl_sync", mask, x, lane, file, line);
}

inline bool __any_sync(unsigned mask, bool yes, CUDA_HERE)
{
    return cuda_on_cpu::meet("__any_sync", mask, yes, 0, file, line, [](const uint64_t *given, int first, unsigned there) {
        bool any = false;
        for (int i = 0; i < 32; i++) any |= (there >> i & 1) && given[i];
        for (int i = 0; i < 32; i++) if (there >> i & 1) cuda_on_cpu::threads[first + i].value = any;
    });
}

/* What ops/tensor_core.cuh has for a card: how a warp's lanes hold a matrix is drawn there. The last lane to come computes for
   all, in double, and rounds once.                                                                                      */

template <class T> struct alignas(2 * sizeof(T)) pair_of { T x, y; };
template <class T, class W> pair_of<T> pair_up(W x, W y) { return {(T)x, (T)y}; }
template <class W> W fast_exp2(W x) { return exp2(x); }

namespace cuda_on_cpu {
template <class T, class W> struct mma_parts { pair_of<W> *c; const pair_of<T> *a, *b; };

template <class T, class W> void multiply(const uint64_t *given, int, unsigned)
{
    double a[16][16], b[16][8];
    for (int lane = 0; lane < 32; lane++) {
        auto *part = (const mma_parts<T, W> *)given[lane];
        int g = lane / 4;
        int t = lane % 4;
        for (int i = 0; i < 4; i++) {
            a[g + i % 2 * 8][2 * t + i / 2 * 8] = part->a[i].x;
            a[g + i % 2 * 8][2 * t + i / 2 * 8 + 1] = part->a[i].y;
        }
        for (int i = 0; i < 2; i++) {
            b[2 * t + i * 8][g] = part->b[i].x;
            b[2 * t + i * 8 + 1][g] = part->b[i].y;
        }
    }
    double sum[16][8] = {};
    for (int row = 0; row < 16; row++)
        for (int k = 0; k < 16; k++)
            for (int col = 0; col < 8; col++) sum[row][col] += a[row][k] * b[k][col];
    for (int lane = 0; lane < 32; lane++) {
        pair_of<W> *c = ((const mma_parts<T, W> *)given[lane])->c;
        for (int i = 0; i < 2; i++) {
            const double *two = &sum[lane / 4 + i * 8][lane % 4 * 2];
            c[i] = {(W)(c[i].x + two[0]), (W)(c[i].y + two[1])};
        }
    }
}

// p[i] of lane l: of matrix i, whose rows are given by lanes 8i … 8i+7, row l/4, columns 2(l%4) and 2(l%4)+1, or, transposed,
// these two of the rows, and of the columns l/4.
template <class T> struct tile_parts { pair_of<T> *p; const T *row; };
template <class T, bool transposed> void gather(const uint64_t *given, int, unsigned)
{
    auto row = [&](int i, int j) { return ((const tile_parts<T> *)given[8 * i + j])->row; };
    for (int lane = 0; lane < 32; lane++) {
        pair_of<T> *p = ((const tile_parts<T> *)given[lane])->p;
        int g = lane / 4;
        int t = 2 * (lane % 4);
        for (int i = 0; i < 4; i++)
            if (transposed) p[i] = {row(i, t)[g], row(i, t + 1)[g]};
            else p[i] = {row(i, g)[t], row(i, g)[t + 1]};
    }
}
}

template <class T, class W> void mma(pair_of<W> *c, const pair_of<T> *a, const pair_of<T> *b, CUDA_HERE)
{
    cuda_on_cpu::mma_parts<T, W> mine = {c, a, b};
    cuda_on_cpu::meet("mma", ~0u, (uint64_t)&mine, 0, file, line, cuda_on_cpu::multiply<T, W>);
}

template <class T> void load_tiles(pair_of<T> *p, const T *row, CUDA_HERE)
{
    cuda_on_cpu::tile_parts<T> mine = {p, row};
    cuda_on_cpu::meet("load_tiles", ~0u, (uint64_t)&mine, 0, file, line, cuda_on_cpu::gather<T, false>);
}

template <class T> void load_transposed(pair_of<T> *p, const T *row, CUDA_HERE)
{
    cuda_on_cpu::tile_parts<T> mine = {p, row};
    cuda_on_cpu::meet("load_transposed", ~0u, (uint64_t)&mine, 0, file, line, cuda_on_cpu::gather<T, true>);
}

/* Four warps of a Hopper that multiply together (ops/tensor_core.cuh). A product that they begin is made when they wait for it,
   so that who does not wait finds what was there before, and who overwrites a factor too early spoils it. In reverse order they
   multiply warp by warp, as on other cards: the same bits, since 16 products are summed in double and rounded once there, too. */
template <int ROWS> static inline int in_tile(int row, int col);
namespace cuda_on_cpu {
inline std::deque<std::function<void()>> begun[MAX_THREADS];
inline int row_of_pair(int i) { return me % 32 / 4 + 8 * i; }       // in a warp's 16
inline int col_of_pair(int n) { return 8 * n + me % 4 * 2; }
template <class W, class A, class B> void add_16(pair_of<W> *c, A a, B b)
{
    double x = 0, y = 0;
    for (int j = 0; j < 16; j++) x += a(j) * b(j, 0), y += a(j) * b(j, 1);
    *c = {(W)(c->x + x), (W)(c->y + y)};
}
}
template <int ROWS, int N, int D, class W, class T, class = std::enable_if_t<sizeof(T) == 2>>      // bf16
bool by_warpgroup(pair_of<W> (&c)[N / 8][2], const T *a, const T *b)
{
    using namespace cuda_on_cpu;
    if (rule.kind == order::REVERSE) return false;
    begun[me].push_back([&c, a, b] {
        for (int n = 0; n < N / 8; n++)
            for (int i = 0; i < 2; i++) {
                int row = me / 32 * 16 + row_of_pair(i), col = col_of_pair(n);
                c[n][i] = {0, 0};
                for (int k = 0; k < D; k += 16)
                    add_16(&c[n][i], [&](int j) { return (double)a[in_tile<ROWS>(row, k + j)]; },
                           [&](int j, int next) { return (double)b[in_tile<N>(col + next, k + j)]; });
            }
    });
    return true;
}
template <int N, int D, class W, class T, class = std::enable_if_t<sizeof(T) == 2>>
bool by_warpgroup(pair_of<W> (&c)[D / 8][2], const pair_of<T> (&a)[N / 16][4], const T *b, CUDA_HERE)
{
    using namespace cuda_on_cpu;
    if (rule.kind == order::REVERSE) return false;
    std::vector<W> rows(2 * N);                         // the two of a that this lane's sums are made of
    for (int k = 0; k < N; k += 2)
        for (int i = 0; i < 2; i++) {
            auto p = shuffle("wgmma", ~0u, a[k / 16][i + k / 8 % 2 * 2], me / 4 * 4 + k / 2 % 4, file, line);
            rows[i * N + k] = (W)p.x, rows[i * N + k + 1] = (W)p.y;
        }
    begun[me].push_back([&c, rows, b] {
        for (int n = 0; n < D / 8; n++)
            for (int i = 0; i < 2; i++)
                for (int k = 0; k < N; k += 16)
                    add_16(&c[n][i], [&](int j) { return (double)rows[i * N + k + j]; },
                           [&](int j, int next) { return (double)b[in_tile<N>(k + j, col_of_pair(n) + next)]; });
    });
    return true;
}
/* Copies that go on by themselves. Each is made as late as it may be, when its thread waits for it, so that who does not
   wait finds what was there before; or, in reverse order, at once, so that who is not yet done with what was there is robbed. */
namespace cuda_on_cpu {
struct copy_on_the_way { void *to; const void *from; size_t bytes, zeros; int group; };
inline std::vector<copy_on_the_way> on_the_way[MAX_THREADS];
inline int groups[MAX_THREADS];                 // commits so far
inline void make(const copy_on_the_way &c)
{
    memcpy(c.to, c.from, c.bytes - c.zeros);
    memset((char *)c.to + c.bytes - c.zeros, 0, c.zeros);
}
}
inline void __pipeline_memcpy_async(void *to, const void *from, size_t bytes, size_t zeros = 0)     // of bytes the last zeros
{
    using namespace cuda_on_cpu;
    if ((bytes != 4 && bytes != 8 && bytes != 16) || ((uintptr_t)to | (uintptr_t)from) % bytes)
        stuck("a copy of 4, 8 or 16 bytes that is not aligned to them");
    copy_on_the_way c = {to, from, bytes, zeros, groups[me]};
    if (rule.kind == order::REVERSE) make(c);
    else on_the_way[me].push_back(c);
}
inline void begin_copy(void *to, const void *from, bool there) { __pipeline_memcpy_async(to, from, 16, there ? 0 : 16); }
inline void __pipeline_commit() { cuda_on_cpu::groups[cuda_on_cpu::me]++; }
inline void __pipeline_wait_prior(int n)        // all but the last n commits
{
    using namespace cuda_on_cpu;
    std::vector<copy_on_the_way> later;
    for (const copy_on_the_way &c : on_the_way[me])
        if (c.group < groups[me] - n) make(c);
        else later.push_back(c);
    on_the_way[me].swap(later);
}

inline void __syncwarp(unsigned mask = ~0u, CUDA_HERE)
{
    cuda_on_cpu::meet("__syncwarp", mask, 0, 0, file, line, [](const uint64_t *, int, unsigned) {});
}

// A warp's lanes wait together.
template <int LATER, class W, size_t N> void finished(pair_of<W> (&)[N][2], CUDA_HERE)
{
    for (auto &products = cuda_on_cpu::begun[cuda_on_cpu::me]; products.size() > LATER; products.pop_front()) products.front()();
    __syncwarp(~0u, file, line);
}

/* ---- 4  shared memory ------------------------------------------------------------------------------------------
   A __shared__ array is a static one. Its tag becomes a part of its symbol, _ZZ…E4sumsB6shared, so the program's own
   symbol table says where all of them lie. (A named section would be simpler. But g++ puts no variable of a template
   there, and AddressSanitizer no red zone.)                                                                         */

namespace cuda_on_cpu {

enum { MOST_SHARED = 227 << 10, PLAIN_SHARED = 48 << 10 };      // bytes; beyond the second a kernel must say so before
alignas(256) inline char shared_memory[MOST_SHARED];            // its size the launch decides
inline size_t shared_bytes;
inline std::map<const void *, size_t> allowed;                  // by cudaFuncSetAttribute
inline bool shared_fits = true;
inline void use_shared(const void *kernel, size_t bytes)
{
    shared_bytes = bytes;
    shared_fits = bytes <= PLAIN_SHARED || (allowed.count(kernel) && bytes <= allowed[kernel]);
}

struct range { uintptr_t at; size_t size; };
inline char anchor;                             // a symbol whose address is known, to learn where the program was loaded

inline std::vector<range> find_shared()
{
    std::vector<range> found;
    int fd = open("/proc/self/exe", O_RDONLY);
    off_t size = lseek(fd, 0, SEEK_END);
    char *elf = (char *)mmap(NULL, size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (fd < 0 || elf == MAP_FAILED) {
        perror("error: cannot read /proc/self/exe");
        exit(1);
    }
    close(fd);
    auto *head = (Elf64_Ehdr *)elf;
    auto *sections = (Elf64_Shdr *)(elf + head->e_shoff);
    uintptr_t loaded_at = 0;
    bool known = false;
    for (int s = 0; s < head->e_shnum; s++) {
        if (sections[s].sh_type != SHT_SYMTAB) continue;
        auto *symbols = (Elf64_Sym *)(elf + sections[s].sh_offset);
        const char *names = elf + sections[sections[s].sh_link].sh_offset;
        for (size_t i = 0; i < sections[s].sh_size / sizeof *symbols; i++) {
            const char *name = names + symbols[i].st_name;
            bool shared = !strncmp(name, "_ZZ", 3) && strstr(name, "B6shared");
            if (shared) found.push_back({symbols[i].st_value, symbols[i].st_size});
            if (strcmp(name, "_ZN11cuda_on_cpu6anchorE")) continue;
            known = true;
            loaded_at = (uintptr_t)&anchor - symbols[i].st_value;
        }
    }
    munmap(elf, size);
    if (!known) {
        fputs("error: cuda_on_cpu needs the program's symbols: do not strip it\n", stderr);
        exit(1);
    }
    for (range &r : found) {
        r.at += loaded_at;
#ifdef __SANITIZE_ADDRESS__
        // clang counts the red zone into the symbol's size
        uintptr_t red_zone = (uintptr_t)__asan_region_is_poisoned((void *)r.at, r.size);
        if (red_zone) r.size = red_zone - r.at;
#endif
    }
    return found;
}
}

/* ---- 5  launch ------------------------------------------------------------------------------------------------- */

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorMemoryAllocation, cudaErrorInvalidConfiguration = 9 };

namespace cuda_on_cpu {

inline cudaError_t last_error;                  // what cudaGetLastError will say
inline cudaError_t fail(cudaError_t e)
{
    last_error = e;
    return e;
}

#ifdef __SANITIZE_ADDRESS__
inline void say_which(const char *)             // AddressSanitizer calls it with its report
{
    if (!kernel_name) return;
    say_where();
    fprintf(stderr, ", thread (%u,%u,%u)\n", threadIdx.x, threadIdx.y, threadIdx.z);
}
#endif

inline void run_grid(const char *name, void (*bound)(void *), void *args, dim3 grid, dim3 block)
{
    static const std::vector<range> shared = find_shared();
    size_t n = (size_t)block.x * block.y * block.z;
    bool block_fits = n >= 1 && n <= MAX_THREADS && block.z <= 64;
    bool grid_fits = grid.x && grid.y && grid.z && grid.x <= INT_MAX && grid.y <= 65535 && grid.z <= 65535;
    size_t dynamic = shared_bytes;
    bool memory_fits = shared_fits;
    shared_bytes = 0;
    shared_fits = true;
    if (!block_fits || !grid_fits || !memory_fits) {
        fail(memory_fits ? cudaErrorInvalidConfiguration : cudaErrorInvalidValue);
        return;
    }
#ifdef __SANITIZE_ADDRESS__
    __asan_set_error_report_callback(say_which);
    ASAN_UNPOISON_MEMORY_REGION(shared_memory, MOST_SHARED);
    ASAN_POISON_MEMORY_REGION(shared_memory + (dynamic + 7) / 8 * 8, MOST_SHARED - (dynamic + 7) / 8 * 8);
#endif
    kernel_name = name;
    body = bound;
    arguments = args;
    gridDim = grid;
    blockDim = block;
    count = (int)n;
    rule = read_order();
    for (unsigned i = 0; i < n; i++) {
        threads[i] = {};
        threads[i].index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
    }
    std::vector<size_t> order((size_t)grid.x * grid.y * grid.z);
    rule.arrange(order.data(), order.size());
    for (size_t b : order) {
        blockIdx = {(unsigned)(b % grid.x), (unsigned)(b / grid.x % grid.y), (unsigned)(b / grid.x / grid.y)};
        for (const range &r : shared) memset((void *)r.at, 0xff, r.size);
        memset(shared_memory, 0xff, dynamic);
        memset(states, FRESH, n);
        waiting = returned = turn = 0;
        rule.arrange(turns, n);
        give_turn();                            // comes back when all have returned
    }
    kernel_name = NULL;
    for (unsigned i = 0; i < n; i++)
        if (!on_the_way[i].empty()) stuck("a thread returned without waiting for its copies");
}

template <class F, class... A> void launch(const char *name, F kernel, dim3 grid, dim3 block, A... args)
{
    auto bound = [&] { kernel(args...); };
    run_grid(name, [](void *b) { (*(decltype(bound) *)b)(); }, &bound, grid, block);
}
}

/* ---- 6  numbers of 16 bits -------------------------------------------------------------------------------------- */

namespace cuda_on_cpu {
inline uint32_t bits_of(float x)
{
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}
inline float float_of(uint32_t u)
{
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}

// bf16 is the upper half of a float. To nearest, ties to even: add just less than a half, and one more if the last bit
// kept is odd.
inline uint16_t to_bf16(float x)
{
    uint32_t u = bits_of(x);
    return x != x ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16;
}
inline float from_bf16(uint16_t h) { return float_of((uint32_t)h << 16); }

// half: 5 bits of exponent, biased by 15 (a float's by 127), 10 of mantissa; below 2^-14 a multiple of 2^-24.
inline uint16_t to_half(float x)
{
    uint32_t u = bits_of(x);
    uint32_t sign = u >> 16 & 0x8000;
    uint32_t size = u & 0x7fffffff;
    if (x != x) return 0x7fff;
    if (size >= bits_of(65520)) return sign | 0x7c00;                       // rounds to infinity
    if (size < bits_of(0x1p-14f)) return sign | (uint16_t)lrintf(float_of(size) * 0x1p24f);
    return sign | (size - (112u << 23) + 0xfff + (size >> 13 & 1)) >> 13;
}
inline float from_half(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000) << 16;
    uint32_t size = h & 0x7fff;
    float x = size < 0x400 ? size * 0x1p-24f : float_of((size << 13) + ((size < 0x7c00 ? 112u : 224u) << 23));
    return float_of(sign | bits_of(x));
}
}

struct __nv_bfloat16 {
    uint16_t bits;
    __nv_bfloat16() = default;
    __nv_bfloat16(float x) : bits(cuda_on_cpu::to_bf16(x)) {}
    operator float() const { return cuda_on_cpu::from_bf16(bits); }
};
struct __half {
    uint16_t bits;
    __half() = default;
    __half(float x) : bits(cuda_on_cpu::to_half(x)) {}
    operator float() const { return cuda_on_cpu::from_half(bits); }
};

// The fast quotient of floats. A card's is off by up to 2 units in the last place.
inline float __fdividef(float x, float y) { return x / y; }

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

// The shared memory that a block of this device can have. CUDA_ON_CPU_SHARED=99 makes it a device of 99 KB, as many are.
inline int most_shared()
{
    const char *kb = getenv("CUDA_ON_CPU_SHARED");
    return kb ? atoi(kb) << 10 : cuda_on_cpu::MOST_SHARED;
}

template <class F> cudaError_t cudaFuncSetAttribute(F *kernel, cudaFuncAttribute, int bytes)
{
    using namespace cuda_on_cpu;
    if (bytes < 0 || bytes > most_shared()) return fail(cudaErrorInvalidValue);
    allowed[(const void *)kernel] = bytes;
    return cudaSuccess;
}

/* ---- 7  the runtime ---------------------------------------------------------------------------------------------
   Everything has happened when a call returns. Device memory is the program's own; a copy in the wrong direction fails
   all the same, as it would with a card.                                                                             */

enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };
struct cudaDeviceProp { char name[256]; };

namespace cuda_on_cpu {
inline std::map<const char *, size_t> blocks;   // of device memory: begin and size
inline size_t allocated;
inline long mallocs;                            // calls of cudaMalloc so far

inline size_t memory() { return (size_t)sysconf(_SC_PHYS_PAGES) * (size_t)sysconf(_SC_PAGESIZE); }
inline bool on_device(const void *p)
{
    auto after = blocks.upper_bound((const char *)p);
    return after != blocks.begin() && (--after)->first + after->second > p;
}
}

template <class T> cudaError_t cudaMalloc(T **p, size_t bytes)
{
    using namespace cuda_on_cpu;
    *p = NULL;
    mallocs++;
    if (!bytes) return cudaSuccess;
    if (bytes > memory() - allocated || posix_memalign((void **)p, 256, bytes)) return fail(cudaErrorMemoryAllocation);
    memset((void *)*p, 0xff, bytes);
    blocks[(const char *)*p] = bytes;
    allocated += bytes;
    return cudaSuccess;
}
// For programs in C.
extern "C" __attribute__((used)) inline long cuda_on_cpu_mallocs() { return cuda_on_cpu::mallocs; }

inline cudaError_t cudaFree(void *p)
{
    using namespace cuda_on_cpu;
    if (!p) return cudaSuccess;
    auto block = blocks.find((const char *)p);
    if (block == blocks.end()) return fail(cudaErrorInvalidValue);
    allocated -= block->second;
    blocks.erase(block);
    free(p);
    return cudaSuccess;
}

inline cudaError_t cudaMemGetInfo(size_t *unused, size_t *total)
{
    *total = cuda_on_cpu::memory();
    *unused = *total - cuda_on_cpu::allocated;
    return cudaSuccess;
}

inline cudaError_t cudaMemcpy(void *to, const void *from, size_t n, cudaMemcpyKind kind)
{
    using namespace cuda_on_cpu;
    if (!n) return cudaSuccess;
    bool right_way = on_device(to) == (kind != cudaMemcpyDeviceToHost) && on_device(from) == (kind != cudaMemcpyHostToDevice);
    if (!right_way) return fail(cudaErrorInvalidValue);
    memcpy(to, from, n);
    return cudaSuccess;
}

inline cudaError_t cudaMemset(void *p, int byte, size_t n)
{
    if (!n) return cudaSuccess;
    if (!cuda_on_cpu::on_device(p)) return cuda_on_cpu::fail(cudaErrorInvalidValue);
    memset(p, byte, n);
    return cudaSuccess;
}

// In the order of their calls, like everything here.
inline cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t n, cudaMemcpyKind kind)
{
    return cudaMemcpy(to, from, n, kind);
}
inline cudaError_t cudaMemsetAsync(void *p, int byte, size_t n) { return cudaMemset(p, byte, n); }

inline cudaError_t cudaGetLastError() { return std::exchange(cuda_on_cpu::last_error, cudaSuccess); }
inline const char *cudaGetErrorString(cudaError_t e)
{
    return e == cudaSuccess ? "no error"
         : e == cudaErrorInvalidValue ? "invalid argument"
         : e == cudaErrorMemoryAllocation ? "out of memory" : "invalid configuration argument";
}

inline cudaError_t cudaGetDeviceCount(int *n)
{
    *n = 1;
    return cudaSuccess;
}

inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int)
{
    *p = {"CPU, emulating CUDA"};
    return cudaSuccess;
}

/* ---- 8  cuBLAS --------------------------------------------------------------------------------------------------
   C (m,n) = alpha op(A) (m,k) op(B) (k,n) + beta C, all column-major. Every element is one sum in order of k, in float
   (double for CUBLAS_COMPUTE_64F), rounded once at the end: the same bits for any number of threads.                */

enum cublasStatus_t {
    CUBLAS_STATUS_SUCCESS = 0,
    CUBLAS_STATUS_NOT_INITIALIZED = 1,
    CUBLAS_STATUS_INVALID_VALUE = 7,
    CUBLAS_STATUS_NOT_SUPPORTED = 15
};
enum cublasOperation_t { CUBLAS_OP_N, CUBLAS_OP_T };
enum cublasMath_t { CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION = 16 };
enum cublasComputeType_t { CUBLAS_COMPUTE_32F = 68, CUBLAS_COMPUTE_64F = 70, CUBLAS_COMPUTE_32F_FAST_TF32 = 77 };
enum cublasGemmAlgo_t { CUBLAS_GEMM_DEFAULT = -1 };
enum cudaDataType_t { CUDA_R_32F = 0, CUDA_R_64F = 1, CUDA_R_16F = 2, CUDA_R_16BF = 14 };
typedef struct cublasContext {} *cublasHandle_t;

inline cublasStatus_t cublasCreate(cublasHandle_t *h)
{
    *h = new cublasContext();
    return CUBLAS_STATUS_SUCCESS;
}

inline cublasStatus_t cublasSetMathMode(cublasHandle_t, cublasMath_t) { return CUBLAS_STATUS_SUCCESS; }
inline const char *cublasGetStatusString(cublasStatus_t s)
{
    return s == CUBLAS_STATUS_SUCCESS ? "success"
         : s == CUBLAS_STATUS_NOT_INITIALIZED ? "the library was not initialized"
         : s == CUBLAS_STATUS_INVALID_VALUE ? "an unsupported value or parameter was passed to the function"
         : "the functionality requested is not supported";
}

#ifdef _OPENMP
#define CUDA_OMP(what) _Pragma(#what)
#else
#define CUDA_OMP(what)
#endif
namespace cuda_on_cpu {

#ifdef __AVX512F__
enum { VECTOR = 64 };
#else
enum { VECTOR = 32 };
#endif
enum { STRIP = 6 };                             // columns of a tile of C; its rows are two vectors: 12 sums in registers

struct operand {                                // element (i, k) is p[i·step + k·k_step]
    const void *p;
    cudaDataType_t type;
    long step, k_step;
    bool tf32;
};

inline double load(const void *p, cudaDataType_t type, long i)
{
    return type == CUDA_R_32F ? ((float *)p)[i] : type == CUDA_R_64F ? ((double *)p)[i]
         : type == CUDA_R_16F ? from_half(((uint16_t *)p)[i]) : from_bf16(((uint16_t *)p)[i]);
}
inline void store(void *p, cudaDataType_t type, long i, double x)
{
    if (type == CUDA_R_32F) ((float *)p)[i] = x;
    else if (type == CUDA_R_64F) ((double *)p)[i] = x;
    else ((uint16_t *)p)[i] = type == CUDA_R_16F ? to_half(x) : to_bf16(x);
}

// Rows first … first+width-1 of an operand, k by k: out[k][i]. Rows that are not there are zero.
inline void pack(double *out, int width, operand x, int first, int rows, int k)
{
    for (int l = 0; l < k; l++)
        for (int i = 0; i < width; i++) {
            double v = first + i < rows ? load(x.p, x.type, (first + i) * x.step + l * x.k_step) : 0;
            if (x.tf32) v = float_of((bits_of(v) + 0x1000) & 0xffffe000);       // a TF32 keeps 10 bits of the mantissa
            out[(size_t)l * width + i] = v;
        }
}

// Memory for op(A) in panels of ROWS rows, or op(B) in strips of STRIP columns, so that the sums read both in order.
inline double *packed(int parts, int width, int k)
{
    double *p;
    if (posix_memalign((void **)&p, 64, (size_t)parts * width * k * sizeof *p)) {
        fputs("error: no memory for the operands of a product\n", stderr);
        exit(1);
    }
    return p;
}

// cuBLAS does not say in which order it adds. Here every product adds in double and rounds once, which is as near to
// all orders as can be: what differs from the CPU beyond that is the kernels' doing. Where beta is 0, C is not read.
inline void gemm(int m, int n, int k, double alpha, operand a, operand b, double beta, void *c, cudaDataType_t type, long ldc)
{
    typedef double vec __attribute__((vector_size(VECTOR)));
    constexpr int W = VECTOR / sizeof(double);
    constexpr int ROWS = 2 * W;
    int panels = (m + ROWS - 1) / ROWS;
    int strips = (n + STRIP - 1) / STRIP;
    double *pa = packed(panels, ROWS, k);
    double *pb = packed(strips, STRIP, k);
    CUDA_OMP(omp parallel)
    {
        CUDA_OMP(omp for)
        for (int p = 0; p < panels; p++) pack(pa + (size_t)p * ROWS * k, ROWS, a, p * ROWS, m, k);
        CUDA_OMP(omp for)
        for (int s = 0; s < strips; s++) pack(pb + (size_t)s * STRIP * k, STRIP, b, s * STRIP, n, k);
        CUDA_OMP(omp for collapse(2))
        for (int p = 0; p < panels; p++)
            for (int s = 0; s < strips; s++) {
                const vec *x = (vec *)(pa + (size_t)p * ROWS * k);
                const double *y = pb + (size_t)s * STRIP * k;
                vec sum[STRIP][2] = {};
                for (int l = 0; l < k; l++)
                    for (int j = 0; j < STRIP; j++) {
                        sum[j][0] += x[2 * l] * y[l * STRIP + j];
                        sum[j][1] += x[2 * l + 1] * y[l * STRIP + j];
                    }
                for (int j = 0; j < STRIP && s * STRIP + j < n; j++)
                    for (int i = 0; i < ROWS && p * ROWS + i < m; i++) {
                        long at = p * ROWS + i + (s * STRIP + j) * ldc;
                        double v = alpha * sum[j][i / W][i % W];
                        if (beta) v += beta * load(c, type, at);
                        store(c, type, at, v);
                    }
            }
    }
    free(pa);
    free(pb);
}
}

inline cublasStatus_t cublasGemmStridedBatchedEx(
    cublasHandle_t h, cublasOperation_t op_a, cublasOperation_t op_b, int m, int n, int k, const void *alpha,
    const void *a, cudaDataType_t type_a, int lda, long long stride_a,
    const void *b, cudaDataType_t type_b, int ldb, long long stride_b, const void *beta,
    void *c, cudaDataType_t type_c, int ldc, long long stride_c, int batch, cublasComputeType_t compute, cublasGemmAlgo_t)
{
    using namespace cuda_on_cpu;
    auto at_least = [](int ld, int rows) { return ld >= (rows > 1 ? rows : 1); };
    auto bytes = [](cudaDataType_t t) { return t == CUDA_R_64F ? 8 : t == CUDA_R_32F ? 4 : 2; };
    bool a_plain = op_a == CUBLAS_OP_N;
    bool b_plain = op_b == CUBLAS_OP_N;
    bool ops_known = (a_plain || op_a == CUBLAS_OP_T) && (b_plain || op_b == CUBLAS_OP_T);
    bool sizes_fit = m >= 0 && n >= 0 && k >= 0 && batch >= 0;
    bool lds_fit = at_least(lda, a_plain ? m : k) && at_least(ldb, b_plain ? k : n) && at_least(ldc, m);
    if (!h) return CUBLAS_STATUS_NOT_INITIALIZED;
    if (!alpha || !beta || !ops_known || !sizes_fit || !lds_fit) return CUBLAS_STATUS_INVALID_VALUE;
    bool f64 = compute == CUBLAS_COMPUTE_64F;
    bool tf32 = compute == CUBLAS_COMPUTE_32F_FAST_TF32;
    bool factors_fit = type_a == type_b && f64 == (type_a == CUDA_R_64F) && (!tf32 || type_a == CUDA_R_32F);
    bool result_fits = type_c == type_a || (!f64 && type_c == CUDA_R_32F);
    if (!factors_fit || !result_fits) return CUBLAS_STATUS_NOT_SUPPORTED;
    auto number = [&](const void *p) { return f64 ? *(const double *)p : *(const float *)p; };
    for (long long i = 0; i < batch; i++) {
        operand x = {(const char *)a + i * stride_a * bytes(type_a), type_a, a_plain ? 1 : lda, a_plain ? lda : 1, tf32};
        operand y = {(const char *)b + i * stride_b * bytes(type_b), type_b, b_plain ? ldb : 1, b_plain ? 1 : ldb, tf32};
        void *z = (char *)c + i * stride_c * bytes(type_c);
        gemm(m, n, k, number(alpha), x, y, number(beta), z, type_c, ldc);
    }
    return CUBLAS_STATUS_SUCCESS;
}

/* cublasLt: the same product, described first, by one of several kernels, which have the same bits. Here two are offered
   for each product that fits, and only to that one; of the descriptions only what train.cu says is known.              */
struct cublasLtContext {};
typedef cublasLtContext *cublasLtHandle_t;
struct cublasLtMatmulDescOpaque_t { int64_t op_a, op_b; };
struct cublasLtMatrixLayoutOpaque_t { int64_t rows, cols, ld, type; };
struct cublasLtMatmulPreferenceOpaque_t { size_t work_space; };
struct cublasLtMatmulAlgo_t {
    int tile, split;
    size_t work_space;
    cublasLtMatmulDescOpaque_t of;
    cublasLtMatrixLayoutOpaque_t a, b, c;
};
struct cublasLtMatmulHeuristicResult_t { cublasLtMatmulAlgo_t algo; cublasStatus_t state; float wavesCount; };
enum cublasLtMatmulDescAttributes_t { CUBLASLT_MATMUL_DESC_TRANSA = 3, CUBLASLT_MATMUL_DESC_TRANSB = 4 };
enum cublasLtMatmulPreferenceAttributes_t { CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES = 1 };
enum cublasLtMatmulAlgoConfigAttributes_t { CUBLASLT_ALGO_CONFIG_TILE_ID = 1, CUBLASLT_ALGO_CONFIG_SPLITK_NUM = 3 };
enum { CUBLASLT_MATMUL_TILE_128x128 = 20, CUBLASLT_MATMUL_TILE_256x128 = 24 };

inline cublasStatus_t cublasLtCreate(cublasLtHandle_t *h)
{
    *h = new cublasLtContext();
    return CUBLAS_STATUS_SUCCESS;
}

inline cublasStatus_t cublasLtMatmulDescInit(cublasLtMatmulDescOpaque_t *d, cublasComputeType_t compute, cudaDataType_t scale)
{
    *d = {CUBLAS_OP_N, CUBLAS_OP_N};
    return compute == CUBLAS_COMPUTE_32F && scale == CUDA_R_32F ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_NOT_SUPPORTED;
}

inline cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDescOpaque_t *d, cublasLtMatmulDescAttributes_t which,
                                                     const void *op, size_t size)
{
    if (size != sizeof(cublasOperation_t)) return CUBLAS_STATUS_INVALID_VALUE;
    (which == CUBLASLT_MATMUL_DESC_TRANSA ? d->op_a : d->op_b) = *(const cublasOperation_t *)op;
    return CUBLAS_STATUS_SUCCESS;
}

inline cublasStatus_t cublasLtMatrixLayoutInit(cublasLtMatrixLayoutOpaque_t *m, cudaDataType_t type, uint64_t rows,
                                               uint64_t cols, int64_t ld)
{
    *m = {(int64_t)rows, (int64_t)cols, ld, type};
    return CUBLAS_STATUS_SUCCESS;
}

inline cublasStatus_t cublasLtMatmulPreferenceInit(cublasLtMatmulPreferenceOpaque_t *p)
{
    *p = {};
    return CUBLAS_STATUS_SUCCESS;
}

inline cublasStatus_t cublasLtMatmulPreferenceSetAttribute(
    cublasLtMatmulPreferenceOpaque_t *p, cublasLtMatmulPreferenceAttributes_t, const void *space, size_t size)
{
    if (size != sizeof p->work_space) return CUBLAS_STATUS_INVALID_VALUE;
    memcpy(&p->work_space, space, size);
    return CUBLAS_STATUS_SUCCESS;
}

// C (m,n) = op(A) (m,k) op(B) (k,n). The first kernel would split the sum in two.
inline cublasStatus_t cublasLtMatmulAlgoGetHeuristic(
    cublasLtHandle_t h, cublasLtMatmulDescOpaque_t *d, cublasLtMatrixLayoutOpaque_t *a, cublasLtMatrixLayoutOpaque_t *b,
    cublasLtMatrixLayoutOpaque_t *c, cublasLtMatrixLayoutOpaque_t *, cublasLtMatmulPreferenceOpaque_t *wish, int most,
    cublasLtMatmulHeuristicResult_t offers[], int *count)
{
    enum { MULTIPROCESSORS = 33 };                      // a quarter of a Hopper's, for the tests' sake
    bool a_plain = d->op_a == CUBLAS_OP_N, b_plain = d->op_b == CUBLAS_OP_N;
    bool fits = (a_plain ? a->rows : a->cols) == c->rows && (b_plain ? b->cols : b->rows) == c->cols &&
                (a_plain ? a->cols : a->rows) == (b_plain ? b->rows : b->cols) &&
                a->ld >= a->rows && b->ld >= b->rows && c->ld >= c->rows;
    *count = 0;
    if (!h) return CUBLAS_STATUS_NOT_INITIALIZED;
    if (!fits) return CUBLAS_STATUS_NOT_SUPPORTED;
    for (int tile : {CUBLASLT_MATMUL_TILE_128x128, CUBLASLT_MATMUL_TILE_256x128}) {
        int64_t tall = tile == CUBLASLT_MATMUL_TILE_128x128 ? 128 : 256;
        int64_t tiles = (c->rows + tall - 1) / tall * ((c->cols + 127) / 128);
        cublasLtMatmulAlgo_t kernel = {tile, *count ? 1 : 2, wish->work_space, *d, *a, *b, *c};
        if (*count < most) offers[(*count)++] = {kernel, CUBLAS_STATUS_SUCCESS, (float)tiles / MULTIPROCESSORS};
    }
    return CUBLAS_STATUS_SUCCESS;
}

inline cublasStatus_t cublasLtMatmulAlgoConfigGetAttribute(
    const cublasLtMatmulAlgo_t *algo, cublasLtMatmulAlgoConfigAttributes_t which, void *x, size_t size, size_t *written)
{
    if (size != sizeof(int)) return CUBLAS_STATUS_INVALID_VALUE;
    memcpy(x, which == CUBLASLT_ALGO_CONFIG_TILE_ID ? &algo->tile : &algo->split, *written = size);
    return CUBLAS_STATUS_SUCCESS;
}

// Refuses a kernel that was offered for another product, memory that does not begin at 256 bytes, and too little work space.
inline cublasStatus_t cublasLtMatmul(
    cublasLtHandle_t h, cublasLtMatmulDescOpaque_t *d, const void *alpha, const void *a, cublasLtMatrixLayoutOpaque_t *A,
    const void *b, cublasLtMatrixLayoutOpaque_t *B, const void *beta, const void *c, cublasLtMatrixLayoutOpaque_t *C, void *out,
    cublasLtMatrixLayoutOpaque_t *D, const cublasLtMatmulAlgo_t *algo, void *space, size_t size, void *)
{
    auto same = [](auto &x, auto &y) { return !memcmp(&x, &y, sizeof x); };
    bool offered = same(algo->of, *d) && same(algo->a, *A) && same(algo->b, *B) && same(algo->c, *C);
    bool aligned = ((uintptr_t)a | (uintptr_t)b | (uintptr_t)c) % 256 == 0;
    bool in_place = c == out && same(*C, *D), has_space = size >= algo->work_space && (space || !algo->work_space);
    if (!h) return CUBLAS_STATUS_NOT_INITIALIZED;
    if (!offered || !aligned || !in_place || !has_space) return CUBLAS_STATUS_INVALID_VALUE;
    cublasContext context;
    auto type = [](cublasLtMatrixLayoutOpaque_t *m) { return (cudaDataType_t)m->type; };
    int k = (int)(d->op_a == CUBLAS_OP_N ? A->cols : A->rows);
    return cublasGemmStridedBatchedEx(
        &context, (cublasOperation_t)d->op_a, (cublasOperation_t)d->op_b, (int)C->rows, (int)C->cols, k, alpha,
        a, type(A), (int)A->ld, 0, b, type(B), (int)B->ld, 0, beta, out, type(C), (int)C->ld, 0, 1,
        CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
}
#endif
