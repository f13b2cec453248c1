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
    CPU.                                                                                                  */

#ifndef TENSOR_CORE_H
#define TENSOR_CORE_H

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
#endif
