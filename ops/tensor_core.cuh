/*  ops/tensor_core.cuh: what a GPU's warp does with matrices, for attention in train.cu. The 32 lanes of a
    warp hold a matrix together. Each has a few pairs of its numbers, two neighbours of a row, or of a column
    of b. With g = lane / 4 and t = lane % 4 a lane holds

        of c (16, 8):   c[0] row g, columns 2t, 2t+1;     c[1] row g+8, the same columns
        of a (16, 16):  a[0], a[1] likewise;              a[2], a[3] the same rows, columns 2t+8, 2t+9
        of b (16, 8):   b[0] rows 2t, 2t+1 of column g;   b[1] rows 2t+8, 2t+9

           columns      0 1   2 3   4 5   6 7                  so a quarter of a row lies in each of
           row 0 of c  lane 0,lane 1,lane 2,lane 3             four neighbouring lanes, and two c beside
           row 1       lane 4,lane 5,lane 6,lane 7             each other are an a: what one product
           …                                                   has made, the next takes from registers

        mma(c, a, b)              c += a b
        load_tiles(p, row)        four 8 x 8 matrices from shared memory. Lane 8i + j gives the address of row
                                  j of matrix i; p[i] becomes row g, columns 2t, 2t+1, of matrix i
        load_transposed(p, row)   the same of the transposed matrices: p[i] is column g, rows 2t, 2t+1

    For bf16 they are one instruction each (PTX ISA, mma.m16n8k16 and ldmatrix). Float and double, which check
    the same code in more digits, exchange their numbers by shuffles. dev/cuda_on_cpu.h has all of it for the
    CPU.

    A Hopper (H100, H200) has a faster way: four warps multiply 64 rows of a together (wgmma). The product is
    only begun then, by

        by_warpgroup(c, a, b)     c = a bᵀ, both in shared memory, or c += a b, a in registers; or false
        finished<n>(c)            waits for all products but the last n, and for c

    Each warp's lanes hold its 16 rows of c and a as above.                                                 */

#ifndef TENSOR_CORE_H
#define TENSOR_CORE_H

// ---- a tile in shared memory ------------------------------------------------------------------------------
//
// A tile of ROWS rows lies in panels of 64 columns, a panel row after row. The eight groups of 8 numbers that
// a row of a panel has change places with the row:
//
//     row 0   0 1 2 3 4 5 6 7         so that what lies one below the other, and is read together, is in
//     row 1   1 0 3 2 5 4 7 6         different banks of memory. In bf16 this is the pattern that Hopper's
//     row 2   2 3 0 1 6 7 4 5  …      tensor cores know as "128-byte swizzle".
template <int ROWS> __device__ static inline int in_tile(int row, int col)
{
    return col / 64 * ROWS * 64 + row * 64 + ((col / 8 ^ row) % 8) * 8 + col % 8;
}

// So many numbers long.
template <int ROWS, int D> __host__ __device__ constexpr int tile_size()
{
    return ROWS * ((D + 63) / 64 * 64);
}

#ifdef __CUDACC__

template <class T> struct alignas(2 * sizeof(T)) pair_of { T x, y; };
typedef pair_of<__nv_bfloat16> bf16_pair;

// Two numbers, rounded to what is stored.
template <class T, class W> __device__ static inline pair_of<T> pair_up(W x, W y) { return {(T)x, (T)y}; }

// ---- bf16 -------------------------------------------------------------------------------------------------

__device__ static inline uint32_t bits_of(bf16_pair p)
{
    uint32_t u;
    memcpy(&u, &p, sizeof u);
    return u;
}

template <> __device__ inline bf16_pair pair_up(float x, float y)
{
    __nv_bfloat162 both = __floats2bfloat162_rn(x, y);
    return {both.x, both.y};
}

__device__ static inline void mma(pair_of<float> c[2], const bf16_pair a[4], const bf16_pair b[2])
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0].x), "+f"(c[0].y), "+f"(c[1].x), "+f"(c[1].y)
        : "r"(bits_of(a[0])), "r"(bits_of(a[1])), "r"(bits_of(a[2])), "r"(bits_of(a[3])),
          "r"(bits_of(b[0])), "r"(bits_of(b[1])));
}

// Volatile, with "memory": what is read has been written by other threads in front of a barrier.
#define LDMATRIX(name, variant) \
    __device__ static inline void name(bf16_pair p[4], const __nv_bfloat16 *row) \
    { \
        uint32_t u[4]; \
        asm volatile("ldmatrix.sync.aligned.m8n8.x4" variant ".shared.b16 {%0, %1, %2, %3}, [%4];" \
            : "=r"(u[0]), "=r"(u[1]), "=r"(u[2]), "=r"(u[3]) \
            : "r"((uint32_t)__cvta_generic_to_shared(row)) : "memory"); \
        memcpy(p, u, sizeof u); \
    }
LDMATRIX(load_tiles, "")
LDMATRIX(load_transposed, ".trans")
#undef LDMATRIX

// ---- float and double -------------------------------------------------------------------------------------

template <class T> __device__ static inline pair_of<T> from_lane(pair_of<T> p, int lane)
{
    return {__shfl_sync(0xffffffffu, p.x, lane), __shfl_sync(0xffffffffu, p.y, lane)};
}

// Four rounds: in round i the lanes 4g + i give their part of rows g and g+8 of a, and lanes 4·2t + i and
// 4·(2t+1) + i theirs of columns 2t and 2t+1 of b.
template <class T> __device__ static inline
void mma(pair_of<T> c[2], const pair_of<T> a[4], const pair_of<T> b[2])
{
    int lane = threadIdx.x % 32;
    for (int i = 0; i < 4; i++)
        for (int half = 0; half < 2; half++) {
            pair_of<T> above = from_lane(a[2 * half], lane / 4 * 4 + i);
            pair_of<T> below = from_lane(a[2 * half + 1], lane / 4 * 4 + i);
            pair_of<T> left = from_lane(b[half], lane % 4 * 8 + i);
            pair_of<T> right = from_lane(b[half], lane % 4 * 8 + 4 + i);
            c[0].x += above.x * left.x + above.y * left.y;
            c[0].y += above.x * right.x + above.y * right.y;
            c[1].x += below.x * left.x + below.y * left.y;
            c[1].y += below.x * right.x + below.y * right.y;
        }
}

template <class T> __device__ static inline const T *row_of_lane(const T *row, int lane)
{
    return (const T *)__shfl_sync(0xffffffffu, (unsigned long long)row, lane);
}

template <class T> __device__ static inline void load_tiles(pair_of<T> p[4], const T *row)
{
    int lane = threadIdx.x % 32;
    for (int i = 0; i < 4; i++)
        p[i] = *(const pair_of<T> *)(row_of_lane(row, 8 * i + lane / 4) + lane % 4 * 2);
}

template <class T> __device__ static inline void load_transposed(pair_of<T> p[4], const T *row)
{
    int lane = threadIdx.x % 32;
    for (int i = 0; i < 4; i++) {
        p[i].x = row_of_lane(row, 8 * i + lane % 4 * 2)[lane / 4];
        p[i].y = row_of_lane(row, 8 * i + lane % 4 * 2 + 1)[lane / 4];
    }
}

// 2^x, in float to two units in the last place, and 0 where the result would be smaller than 2⁻¹²⁶.
__device__ static inline float fast_exp2(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ static inline double fast_exp2(double x) { return exp2(x); }

// Begins to copy 16 bytes into shared memory: zeros where nothing is there.
__device__ static inline void begin_copy(void *to, const void *from, bool there)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 ::"r"((uint32_t)__cvta_generic_to_shared(to)), "l"(from), "r"(there ? 16 : 0) : "memory");
}

// All threads of a block wait for each other. Two groups of warps may do so at different places of the
// program, which __syncthreads() forbids and the instruction allows.
template <int THREADS> __device__ static inline void meet()
{
    asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory");
}

// ---- four warps together ----------------------------------------------------------------------------------

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// How a matrix is described to wgmma: where it begins, in units of 16 bytes, that eight rows of a panel are
// 1024 bytes, and the pattern of in_tile (PTX ISA, "matrix descriptor format").
__device__ static inline uint64_t described(const __nv_bfloat16 *p)
{
    return (uint64_t)((uint32_t)__cvta_generic_to_shared(p) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

#define PAIRS(c) "+f"((c)[0].x), "+f"((c)[0].y), "+f"((c)[1].x), "+f"((c)[1].y)
#define PAIRS_4(c) PAIRS((c)[0]), PAIRS((c)[1]), PAIRS((c)[2]), PAIRS((c)[3])
#define NAMES_16 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define NAMES_32 NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA(columns) "wgmma.mma_async.sync.aligned.m64n" columns "k16.f32.bf16.bf16 "

// c (64, 64 or 32) = or += a (64, 16) bᵀ,  b (64 or 32, 16).
typedef pair_of<float> float_pair;
__device__ static inline void begin_64(float_pair (*c)[2], uint64_t a, uint64_t b, int add)
{
    asm volatile("{.reg .pred add; setp.ne.b32 add, %34, 0; "
                 WGMMA("64") NAMES_32 "}, %32, %33, add, 1, 1, 0, 0;}"
                 : PAIRS_4(c), PAIRS_4(c + 4) : "l"(a), "l"(b), "r"(add));
}
__device__ static inline void begin_32(float_pair (*c)[2], uint64_t a, uint64_t b, int add)
{
    asm volatile("{.reg .pred add; setp.ne.b32 add, %18, 0; "
                 WGMMA("32") NAMES_16 "}, %16, %17, add, 1, 1, 0, 0;}"
                 : PAIRS_4(c) : "l"(a), "l"(b), "r"(add));
}

// c (64, 64 or 32) += a (64, 16) b,  b (16, 64 or 32): the last 1 says that b lies transposed.
#define OF_A(a) "r"(bits_of((a)[0])), "r"(bits_of((a)[1])), "r"(bits_of((a)[2])), "r"(bits_of((a)[3]))
__device__ static inline void begin_64(float_pair (*c)[2], const bf16_pair *a, uint64_t b)
{
    asm volatile("{.reg .pred add; setp.eq.u32 add, 0, 0; "
                 WGMMA("64") NAMES_32 "}, {%32, %33, %34, %35}, %36, add, 1, 1, 1;}"
                 : PAIRS_4(c), PAIRS_4(c + 4) : OF_A(a), "l"(b));
}
__device__ static inline void begin_32(float_pair (*c)[2], const bf16_pair *a, uint64_t b)
{
    asm volatile("{.reg .pred add; setp.eq.u32 add, 0, 0; "
                 WGMMA("32") NAMES_16 "}, {%16, %17, %18, %19}, %20, add, 1, 1, 1;}"
                 : PAIRS_4(c) : OF_A(a), "l"(b));
}

// Between them stand the parts of one product.
#define BEGIN_PRODUCT asm volatile("wgmma.fence.sync.aligned;" ::: "memory")
#define END_PRODUCT asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory")

// c = a bᵀ,  a (ROWS, D) of which four warps have 64 rows,  b (N, D).
template <int ROWS, int N, int D, class = std::enable_if_t<N % 32 == 0>> __device__ static inline
bool by_warpgroup(float_pair (&c)[N / 8][2], const __nv_bfloat16 *a, const __nv_bfloat16 *b)
{
    a += __shfl_sync(0xffffffffu, threadIdx.x / 128, 0) * 64 * 64;
    const uint64_t of_a = described(a), of_b = described(b);
    BEGIN_PRODUCT;
    _Pragma("unroll") for (int k = 0; k < D; k += 16)
        _Pragma("unroll") for (int n = 0; n < N; n += 64) {
            const int in_a = (k / 64 * ROWS * 64 + k % 64) / 8;
            const int in_b = (k / 64 * N * 64 + n * 64 + k % 64) / 8;
            if (n + 64 <= N) begin_64(c + n / 8, of_a + in_a, of_b + in_b, k > 0);
            else begin_32(c + n / 8, of_a + in_a, of_b + in_b, k > 0);
        }
    END_PRODUCT;
    return true;
}

// c += a b,  a (64 rows of four warps, N) in registers,  b (N, D).
template <int N, int D, class = std::enable_if_t<N % 32 == 0>> __device__ static inline
bool by_warpgroup(float_pair (&c)[D / 8][2], const bf16_pair (&a)[N / 16][4], const __nv_bfloat16 *b)
{
    const uint64_t of_b = described(b);
    BEGIN_PRODUCT;
    _Pragma("unroll") for (int n = 0; n < N; n += 16)
        _Pragma("unroll") for (int k = 0; k < D; k += 64) {
            const int in_b = (k / 64 * N * 64 + n * 64) / 8;
            if (k + 64 <= D) begin_64(c + k / 8, a[n / 16], of_b + in_b);
            else begin_32(c + k / 8, a[n / 16], of_b + in_b);
        }
    END_PRODUCT;
    return true;
}

// Waits for c: until no more than the last LATER products that were begun are on their way.
template <int LATER, int N> __device__ static inline void finished(float_pair (&c)[N][2])
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LATER) : "memory");
    _Pragma("unroll") for (int n = 0; n < N; n++) asm volatile("" : PAIRS(c[n])::"memory");
}

// What this thread has written into shared memory is there for wgmma, too.
__device__ static inline void show_to_tensor_cores()
{
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
#endif
#endif

// Who has no such instruction multiplies warp by warp, and waits for nothing.
#ifndef __CUDA_ARCH_FEAT_SM90_ALL
__device__ static inline void show_to_tensor_cores() {}
#endif
#if defined __CUDACC__ && !defined __CUDA_ARCH_FEAT_SM90_ALL
constexpr bool TAKES_TURNS = false;
#else
constexpr bool TAKES_TURNS = true;                      // on the emulator, too
#endif
template <int, int, int, class... T> __device__ inline bool by_warpgroup(const T &...) { return false; }
template <int, int, class... T> __device__ inline bool by_warpgroup(const T &...) { return false; }
template <int, class... T> __device__ inline void finished(const T &...) {}
#endif
