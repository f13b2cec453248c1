/*  train.cu: the ops of ops/ops.h, defined for a GPU: kernels and cuBLAS, nothing else. Model, adapters and
    loop run on the CPU and call them by the names and signatures of ops/ops.h, as they would call ops/cpu.c.

    Read in this order:
      1  numbers                        real is stored, wide is computed with
      2  memory
      3  the matrix product             cuBLAS, told about rows instead of columns
      4  Llama2                         each forward with its backward
      5  RWKV6
      6  adapters
      7  training
      8  the work space of a run

    A kernel's comment says what one block does. Kernels are limited by memory, not by arithmetic, so a thread
    takes 16 bytes at a time (a pack, section 1), neighbouring threads take neighbouring packs, and a row that
    must be summed belongs to one block or one warp, which reads it once where its registers have room. Every
    sum is a tree of fixed shape, and no atomic operation adds floating-point numbers: the same input gives
    the same bits on every run.

    What a pass over memory costs: in bf16 x (16384, 4096) of Llama2-7B is read in 28 µs on a card of 4.8
    TB/s, and 32 layers read and write the like some 2000 times in a step of 822 ms (doc/gpu-speed.md has the
    profile). So RMSNorm copies the residual stream in the kernel that reads it, and who first writes a
    gradient sets it.

    Without a GPU this file compiles as C++ against dev/cuda_on_cpu.h, which runs every block and thread.   */

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#ifdef __CUDACC__
#include <cublasLt.h>
#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>
#define LAUNCH(kernel, blocks, threads, ...) kernel<<<blocks, threads>>>(__VA_ARGS__)
#define LAUNCH_SHARED(kernel, blocks, threads, bytes, ...) kernel<<<blocks, threads, bytes>>>(__VA_ARGS__)
#define SHARED_MEMORY(T, name) extern __shared__ __align__(1024) T name[]
#define UNROLL _Pragma("unroll")
#else
#include "dev/cuda_on_cpu.h"
#endif
#include "ops/tensor_core.cuh"
// RUN(kernel, blocks, threads, arguments …)
#define RUN(kernel, ...) (LAUNCH(kernel, __VA_ARGS__), check(cudaGetLastError(), #kernel))
#include "ops/ops.h"

extern "C" int errors_to;               // ops/host.h: the descriptor of standard error, as a rule

static void fail(const char *what, const char *why)
{
    fflush(stdout);
    dprintf(errors_to, "error: GPU: %s: %s\n", what, why);
    exit(1);
}

static void check(cudaError_t e, const char *what)
{
    if (e != cudaSuccess) fail(what, cudaGetErrorString(e));
}

static void check(cublasStatus_t s, const char *what)
{
    if (s != CUBLAS_STATUS_SUCCESS) fail(what, cublasGetStatusString(s));
}

// ---- 1  numbers -------------------------------------------------------------------------------------------

// Activations are stored as `real` (float, double, bf16), weights in the dtype of their file, and what trains
// as `wide` (float, double), in which every kernel computes.
__device__ static inline wide up(float x) { return (wide)x; }
__device__ static inline wide up(double x) { return (wide)x; }
__device__ static inline wide up(__nv_bfloat16 x) { return (wide)(float)x; }
__device__ static inline wide up(__half x) { return (wide)(float)x; }
__device__ static inline void down(float *p, wide x) { *p = (float)x; }
__device__ static inline void down(double *p, wide x) { *p = (double)x; }
__device__ static inline void down(__nv_bfloat16 *p, wide x) { *p = (__nv_bfloat16)(float)x; }
__device__ static inline void down(__half *p, wide x) { *p = (__half)(float)x; }

static const size_t size_of[DTYPES] = {4, 8, 2, 2};

// Element i of memory of any dtype.
__device__ static inline wide load(const void *p, enum dtype type, size_t i)
{
    if (type == F32) return up(((const float *)p)[i]);
    if (type == F64) return up(((const double *)p)[i]);
    if (type == BF16) return up(((const __nv_bfloat16 *)p)[i]);
    return up(((const __half *)p)[i]);
}

// Where element (row, col) of matrix b of a batch lies, counted from m.p.
__device__ static inline size_t index_of(const mat &m, int b, int row, int col)
{
    return (m.batch > 1 ? b * m.stride : 0) + row * m.ld + col;
}

__device__ static inline real *row_of(const mat &m, int row) { return (real *)m.p + row * m.ld; }

enum { THREADS = 256, WARP = 32, WARPS = THREADS / WARP };
enum { MOST_BLOCKS = 65535 };                           // along the y of a grid

// A pack: neighbouring elements of a row, as many as 16 bytes of `real` hold. A thread takes one at a time,
// since memory is fastest when every access is 16 bytes. Where a row does not begin at a multiple of that, or
// ends within a pack, that pack is read and written element by element.
enum { PACK = 16 / sizeof(real) };
struct pack { wide x[PACK]; };

// How it lies in memory: its elements, and the same bytes as words. A load of words need not wait for the
// bytes before the next load begins, one that takes elements apart must.
template <class T> union packed {
    static constexpr size_t bytes = PACK * sizeof(T);
    struct alignas(bytes < 16 ? bytes : 16) { unsigned word[bytes / 4]; } words;
    T x[PACK];
};

template <class T> __device__ static inline bool in_one_piece(const T *p, int n)
{
    return n >= PACK && (uintptr_t)p % alignof(packed<T>) == 0;
}

// The pack at p, from where the row has n more elements, maybe none. Beyond them it is 0. As it lies in
// memory it is not waited for before it is used.
template <class T> __device__ static inline void load_packed(packed<T> *memory, const T *p, int n)
{
    *memory = {};
    if (in_one_piece(p, n)) memory->words = ((const packed<T> *)p)->words;
    else
        for (int i = 0; i < PACK; i++)
            if (i < n) memory->x[i] = p[i];
}

template <class T> __device__ static inline pack load_pack(const T *p, int n)
{
    packed<T> memory;
    pack a;
    load_packed(&memory, p, n);
    for (int i = 0; i < PACK; i++) a.x[i] = up(memory.x[i]);
    return a;
}

template <class T> __device__ static inline void store_pack(T *p, const pack &a, int n)
{
    if (in_one_piece(p, n)) {
        packed<T> memory;
        for (int i = 0; i < PACK; i++) down(&memory.x[i], a.x[i]);
        ((packed<T> *)p)->words = memory.words;
    } else
        for (int i = 0; i < PACK; i++)
            if (i < n) down(&p[i], a.x[i]);
}

// The same in a matrix of any dtype, in the block's own of a batch. n: fewer columns than the row still has.
__device__ static inline pack load_pack(const mat &m, int row, int col, int n)
{
    size_t i = index_of(m, blockIdx.z, row, col);
    if (m.type == F32) return load_pack((const float *)m.p + i, n);
    if (m.type == F64) return load_pack((const double *)m.p + i, n);
    if (m.type == BF16) return load_pack((const __nv_bfloat16 *)m.p + i, n);
    return load_pack((const __half *)m.p + i, n);
}

__device__ static inline void store_pack(const mat &m, int row, int col, const pack &a, int n)
{
    size_t i = index_of(m, blockIdx.z, row, col);
    if (m.type == F32) store_pack((float *)m.p + i, a, n);
    else if (m.type == F64) store_pack((double *)m.p + i, a, n);
    else if (m.type == BF16) store_pack((__nv_bfloat16 *)m.p + i, a, n);
    else store_pack((__half *)m.p + i, a, n);
}

__device__ static inline pack load_pack(const mat &m, int row, int col)
{
    return load_pack(m, row, col, m.cols - col);
}

__device__ static inline void store_pack(const mat &m, int row, int col, const pack &a)
{
    store_pack(m, row, col, a, m.cols - col);
}

// And in a matrix of reals, whose dtype need not be asked for.
__device__ static inline pack load_reals(const mat &m, int row, int col)
{
    return load_pack(row_of(m, row) + col, m.cols - col);
}

__device__ static inline void store_reals(const mat &m, int row, int col, const pack &a)
{
    store_pack(row_of(m, row) + col, a, m.cols - col);
}

// The number of columns that whole packs fill.
__host__ __device__ static inline int filled(int cols) { return (cols + PACK - 1) / PACK * PACK; }

// The grid of the kernels that give each pack a thread. One block takes 8 rows, a warp each, and of each row
// 32 packs, a lane each. blockIdx.x counts columns, y rows, z matrices of the batch. Where a grid has too few
// blocks for all rows, each takes further rows.
static dim3 pack_grid(int rows, int cols, int batch)
{
    int groups = (rows + WARPS - 1) / WARPS;
    return dim3((cols + WARP * PACK - 1) / (WARP * PACK), groups < MOST_BLOCKS ? groups : MOST_BLOCKS, batch);
}
static dim3 pack_grid(const mat &m) { return pack_grid(m.rows, m.cols, m.batch); }
#define FOR_EACH_PACK(rows, cols, row, col) \
    for (int col = (blockIdx.x * WARP + threadIdx.x % WARP) * PACK, \
             row = blockIdx.y * WARPS + threadIdx.x / WARP; \
         col < (cols) && row < (rows); row += gridDim.y * WARPS)

struct plus { template <class T> __device__ T operator()(T a, T b) const { return a + b; } };
struct larger { template <class T> __device__ T operator()(T a, T b) const { return a > b ? a : b; } };
struct smaller { template <class T> __device__ T operator()(T a, T b) const { return a < b ? a : b; } };

// The sum (or the largest, or the smallest) of x over the lanes of a warp; every lane gets it.
template <class T, class Op> __device__ static inline T warp_reduce(T x, Op op)
{
    for (int d = WARP / 2; d; d /= 2) x = op(x, __shfl_xor_sync(0xffffffffu, x, d));
    return x;
}

// The same over the threads of a block. Each warp combines its own by shuffles, then every thread combines
// the results of the warps.
template <class T, class Op> __device__ static inline T block_reduce(T x, Op op)
{
    __shared__ T of_warp[WARPS];
    x = warp_reduce(x, op);
    __syncthreads();                                    // a reduction before this one may still be read
    if (threadIdx.x % WARP == 0) of_warp[threadIdx.x / WARP] = x;
    __syncthreads();
    x = of_warp[0];
    for (int w = 1; w < WARPS; w++) x = op(x, of_warp[w]);
    return x;
}

template <class T> __device__ static inline T block_sum(T x) { return block_reduce(x, plus()); }

// The sum over rows of term(row), for one column a lane. A block has WARP columns; each of its eight warps
// adds up every eighth row, then the eight sums are added in order. Every lane of every warp gets its
// column's sum.
template <class Term> __device__ static inline wide column_sum(int rows, bool there, Term term)
{
    __shared__ wide of_warp[WARPS][WARP];
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    wide sum = 0;
    for (int n = warp; n < rows && there; n += WARPS) sum += term(n);
    of_warp[warp][lane] = sum;
    __syncthreads();
    sum = 0;
    for (int w = 0; w < WARPS; w++) sum += of_warp[w][lane];
    return sum;
}

// ---- 2  memory --------------------------------------------------------------------------------------------

extern "C" const char *dev_name(void)
{
    static cudaDeviceProp p;
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess || !count)
        fail("no device", "there is no GPU that CUDA can use; ./train runs on the CPU");
    check(cudaGetDeviceProperties(&p, 0), "reading the device's name");
    return p.name;
}

extern "C" void dev_memory(double *used, double *all)
{
    size_t left, total;
    check(cudaMemGetInfo(&left, &total), "asking for the memory in use");
    *used = (double)(total - left);
    *all = (double)total;
}

// Zeroed memory, or NULL where the device has too little left.
extern "C" dev dev_alloc(size_t bytes)
{
    dev p = NULL;
    cudaError_t e = cudaMalloc(&p, bytes ? bytes : 1);
    if (e == cudaErrorMemoryAllocation) {
        cudaGetLastError();                             // forgets the error: the caller says what did not fit
        return NULL;
    }
    check(e, "allocating memory (./train runs on the CPU)");
    check(cudaMemset(p, 0, bytes), "clearing memory");
    return p;
}

extern "C" void dev_free(dev p) { check(cudaFree(p), "freeing memory"); }

// Work space of the ops. A run reserves what its steps need (section 8); an op called outside of a run
// enlarges the buffer where it is too small.
enum { FACTOR_A, FACTOR_B, SPACE, HOST, BLOCKS, DELTA, SUMS_OF_ROWS, LINKS, TEXTS, RECURRENT, BUFFERS };
static struct { void *p; size_t bytes; } buffers[BUFFERS];

static void resize(int which, size_t bytes)
{
    check(cudaFree(buffers[which].p), "freeing work space");
    buffers[which].p = NULL;
    buffers[which].bytes = bytes;
    if (!bytes) return;
    check(cudaMalloc(&buffers[which].p, bytes),
          "allocating work space; a smaller --batch, --seq or --rank needs less");
}

static void *scratch(int which, size_t bytes)
{
    if (buffers[which].bytes < bytes) resize(which, bytes);
    return buffers[which].p;
}

// A matrix of m's shape whose elements lie at p, row after row without gaps.
static mat contiguous(mat m, void *p, enum dtype type)
{
    m.p = p;
    m.type = type;
    m.ld = m.cols;
    m.stride = (size_t)m.rows * m.cols;
    m.spare = 0;
    return m;
}

static size_t elements_of(const mat &m) { return (size_t)m.batch * m.rows * m.cols; }
static size_t bytes_of(const mat &m) { return elements_of(m) * size_of[m.type]; }

// m has this dtype and no gaps between rows or matrices, like data on the host: its memory can be copied, or
// set to zero, as it is.
static bool without_gaps(const mat &m, enum dtype type)
{
    bool rows_touch = m.ld == (size_t)m.cols;
    bool matrices_touch = m.batch == 1 || m.stride == (size_t)m.rows * m.cols;
    return m.type == type && rows_touch && matrices_touch;
}

// y = x, and 0 where y is larger than x.  One block: 32 packs of 8 rows.
__global__ static void copy_kernel(mat y, mat x)
{
    FOR_EACH_PACK(y.rows, y.cols, row, col)
        store_pack(y, row, col, row < x.rows ? load_pack(x, row, col) : pack());
}

extern "C" void copy(mat y, mat x)
{
    if (y.rows != x.rows || y.cols != x.cols || y.batch != x.batch) fail("copy", "the shapes differ");
    if (!y.p) return;
    if (without_gaps(y, x.type) && without_gaps(x, x.type))
        check(cudaMemcpyAsync(y.p, x.p, bytes_of(x), cudaMemcpyDeviceToDevice), "copying");
    else RUN(copy_kernel, pack_grid(y), THREADS, y, x);
}

// dst = host data of this dtype. Where dst has another dtype, or gaps, the data is copied to the device as it
// is and converted there. That copy is as large as a weight and freed at once; no training step calls put, so
// the reserved work space has no room for it.
extern "C" void put(mat dst, const void *src, enum dtype type)
{
    mat raw = without_gaps(dst, type) ? dst : contiguous(dst, NULL, type);
    if (!raw.p) check(cudaMalloc(&raw.p, bytes_of(raw)), "copying to the device");
    check(cudaMemcpy(raw.p, src, bytes_of(raw), cudaMemcpyHostToDevice), "copying to the device");
    if (raw.p == dst.p) return;
    copy(dst, raw);
    check(cudaFree(raw.p), "freeing memory");
}

extern "C" void get(wide *dst, mat src)
{
    mat raw = without_gaps(src, TYPE_OF(wide)) ? src : contiguous(src, NULL, TYPE_OF(wide));
    if (!raw.p) {
        raw.p = scratch(HOST, bytes_of(raw));
        copy(raw, src);
    }
    check(cudaMemcpy(dst, raw.p, bytes_of(raw), cudaMemcpyDeviceToHost), "copying to the host");
}

extern "C" void put_ints(dev_ints dst, const int *src, size_t n)
{
    check(cudaMemcpy(dst, src, n * sizeof(int), cudaMemcpyHostToDevice), "copying to the device");
}

// Whole tiles of a product, which have 128 rows, and many: each chunk reads the head once more.
extern "C" int dev_chunk(int vocab)
{
    int rows = (1 << 26) / vocab;                       // 128 MB in bf16
    return rows < 128 ? rows : rows / 128 * 128;
}

// A weight keeps the dtype of its file. Where real is bf16 it is rounded to bf16 here, once, so that no
// product has to convert it.
extern "C" mat dev_weight(mat host)
{
    enum dtype type = sizeof(real) == 2 ? TYPE_OF(real) : host.type;
    mat w = contiguous(host, NULL, type);
    w.p = dev_alloc(bytes_of(w));
    if (!w.p) fail("allocating a base weight", "the base model does not fit into the device's memory");
    if (type != host.type) put(w, host.p, host.type);
    else check(cudaMemcpy(w.p, host.p, bytes_of(w), cudaMemcpyHostToDevice), "copying a base weight");
    return w;
}

extern "C" void dev_weight_free(mat w) { dev_free(w.p); }

// x = 0.  One block: 32 packs of 8 rows.
__global__ static void zero_kernel(mat x)
{
    FOR_EACH_PACK(x.rows, x.cols, row, col) store_pack(x, row, col, pack());
}

extern "C" void zero(mat x)
{
    if (without_gaps(x, x.type)) check(cudaMemsetAsync(x.p, 0, bytes_of(x)), "clearing memory");
    else RUN(zero_kernel, pack_grid(x), THREADS, x);
}

// y += scale x.  One block: 32 packs of 8 rows.
__global__ static void add_kernel(mat y, mat x, wide scale)
{
    FOR_EACH_PACK(y.rows, y.cols, row, col) {
        pack sum = load_pack(y, row, col), term = load_pack(x, row, col);
        for (int i = 0; i < PACK; i++) sum.x[i] += scale * term.x[i];
        store_pack(y, row, col, sum);
    }
}

extern "C" void add(mat y, mat x, double scale)
{
    if (y.p) RUN(add_kernel, pack_grid(y), THREADS, y, x, (wide)scale);
}

// ---- 3  the matrix product --------------------------------------------------------------------------------
//
//  cuBLAS stores by columns: our y (M, N) is its yᵀ, an N × M matrix with the same ld. So y = a b is asked
//  for as yᵀ = bᵀ aᵀ. CUBLAS_OP_N takes a factor that lies in memory by rows as the product has it,
//  CUBLAS_OP_T one that lies there transposed.

static int tf32;                        // products of floats may round their factors to 10 bits
extern "C" int dev_tf32(void) { return tf32 = sizeof(real) == 4; }
extern "C" int dev_bf16(int on) { (void)on; return sizeof(real) == 2; }      // it always does

static cublasHandle_t cublas(void)
{
    static cublasHandle_t handle;
    if (!handle) {
        check(cublasCreate(&handle), "starting cuBLAS");
        // products of 16-bit factors are summed in fp32
        check(cublasSetMathMode(handle, CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION), "setting cuBLAS");
    }
    return handle;
}

// A factor in the dtype that the product runs in: m itself, or its copy in work space. In 16 bits the copy is
// filled up with zeros to multiples of 8 rows and columns.
static mat factor(mat m, enum dtype type, int slot)
{
    if (m.type == type) return m;
    mat f = m;
    if (size_of[type] == 2) {
        f.rows = filled(m.rows);
        f.cols = filled(m.cols);
    }
    f = contiguous(f, NULL, type);
    f.p = scratch(slot, bytes_of(f));
    RUN(copy_kernel, pack_grid(f), THREADS, f, m);
    return f;
}

static cudaDataType_t cuda_type(enum dtype t)
{
    return t == F32 ? CUDA_R_32F : t == F64 ? CUDA_R_64F : t == BF16 ? CUDA_R_16BF : CUDA_R_16F;
}

// Products of double are summed in double, all others in fp32; --tf32 rounds floats to 10 bits before that.
static cublasComputeType_t compute_type(void)
{
    if (sizeof(wide) == 8) return CUBLAS_COMPUTE_64F;
    return tf32 ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F;
}

// ---- large products ----
//
// They draw all the power that a card may, and its clock falls. Then the kernel that needs the least energy
// is the fastest. cuBLAS takes the one that is fastest on a cool card. Of those that cublasLt offers for the
// same product, one with tiles of 256 × 128 makes a step on an H200 2 to 3 % shorter (doc/gpu-speed.md). It
// sums in the order of K as cuBLAS's does, and so has its bits.

// What cublasLt wants to know of y = a b, told about columns as above.
struct large_product {
    cublasLtMatmulDescOpaque_t op;
    cublasLtMatrixLayoutOpaque_t b, a, y;
};

enum : size_t { LARGE_SPACE = 4096 };                   // bytes that its kernel may need

static cublasLtHandle_t cublas_lt(void)
{
    static cublasLtHandle_t handle;
    if (!handle) check(cublasLtCreate(&handle), "starting cublasLt");
    return handle;
}

static int setting(const cublasLtMatmulAlgo_t &kernel, cublasLtMatmulAlgoConfigAttributes_t which)
{
    int x = 0;
    size_t size;
    check(cublasLtMatmulAlgoConfigGetAttribute(&kernel, which, &x, sizeof x, &size), "asking for tiles");
    return x;
}

// The kernel with tiles of 256 × 128 that does not split the sum, or NULL where none is offered, or where the
// last round of tiles would leave much of the card idle. The answers are remembered.
static const cublasLtMatmulAlgo_t *tiles_of_256(large_product *p)
{
    enum { OFFERS = 8, REMEMBERED = 32 };
    static struct { large_product of; bool offered; cublasLtMatmulAlgo_t kernel; } known[REMEMBERED];
    static int asked;
    for (auto &k : known)
        if (!memcmp(&k.of, p, sizeof *p)) return k.offered ? &k.kernel : NULL;
    auto &k = known[asked++ % REMEMBERED];
    cublasLtMatmulPreferenceOpaque_t wish = {};
    cublasLtMatmulHeuristicResult_t offers[OFFERS];
    size_t space = LARGE_SPACE;
    int count = 0;
    const auto most_space = CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
    check(cublasLtMatmulPreferenceInit(&wish), "asking for tiles");
    check(cublasLtMatmulPreferenceSetAttribute(&wish, most_space, &space, sizeof space), "asking for tiles");
    cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(cublas_lt(), &p->op, &p->b, &p->a, &p->y, &p->y,
                                                           &wish, OFFERS, offers, &count);
    if (status != CUBLAS_STATUS_SUCCESS) count = 0;     // there is none
    k = {*p, false, {}};
    for (int i = 0; i < count && !k.offered; i++) {
        float rounds = offers[i].wavesCount;            // in which its tiles go through the card
        if (offers[i].state != CUBLAS_STATUS_SUCCESS) continue;
        k.kernel = offers[i].algo;
        k.offered = setting(k.kernel, CUBLASLT_ALGO_CONFIG_TILE_ID) == CUBLASLT_MATMUL_TILE_256x128 &&
                    setting(k.kernel, CUBLASLT_ALGO_CONFIG_SPLITK_NUM) <= 1 && rounds > 0.94f * ceilf(rounds);
    }
    return k.offered ? &k.kernel : NULL;
}

// y = alpha a b + beta y by that kernel, or false. Where K is smaller, memory sets the pace. cublasLt takes
// for granted that matrices begin at 256 bytes.
static bool multiply_large(const mat &y, const mat &a, cublasOperation_t op_a,
                           const mat &b, cublasOperation_t op_b, int K, wide alpha, wide beta)
{
    enum { LARGE = 1 << 20, DEEP = 1024 };
    const char *what = "a large product";
    bool large = (size_t)y.rows * y.cols >= LARGE && K >= DEEP && y.batch == 1;
    bool aligned = ((uintptr_t)y.p | (uintptr_t)a.p | (uintptr_t)b.p) % 256 == 0;
    if (!large || !aligned || y.type != BF16 || a.type != BF16) return false;
    large_product p = {};
    bool b_lies = op_b == CUBLAS_OP_N, a_lies = op_a == CUBLAS_OP_N;        // as the product has it
    check(cublasLtMatmulDescInit(&p.op, CUBLAS_COMPUTE_32F, CUDA_R_32F), what);
    check(cublasLtMatmulDescSetAttribute(&p.op, CUBLASLT_MATMUL_DESC_TRANSA, &op_b, sizeof op_b), what);
    check(cublasLtMatmulDescSetAttribute(&p.op, CUBLASLT_MATMUL_DESC_TRANSB, &op_a, sizeof op_a), what);
    check(cublasLtMatrixLayoutInit(&p.b, CUDA_R_16BF, b_lies ? y.cols : K, b_lies ? K : y.cols, b.ld), what);
    check(cublasLtMatrixLayoutInit(&p.a, CUDA_R_16BF, a_lies ? K : y.rows, a_lies ? y.rows : K, a.ld), what);
    check(cublasLtMatrixLayoutInit(&p.y, CUDA_R_16BF, y.cols, y.rows, y.ld), what);
    const cublasLtMatmulAlgo_t *kernel = tiles_of_256(&p);
    if (!kernel) return false;
    void *space = scratch(SPACE, LARGE_SPACE);
    check(cublasLtMatmul(cublas_lt(), &p.op, &alpha, b.p, &p.b, a.p, &p.a, &beta, y.p, &p.y, y.p, &p.y,
                         kernel, space, LARGE_SPACE, 0), what);
    return true;
}

// y (M, N) = or += scale a (M, K) b (K, N).  a_across: a lies in memory as (K, M), else as (M, K); b_across:
// b lies as (K, N), else as (N, K). If y is real, both factors are converted to real; if y is wide (a
// gradient), both get the dtype of a, so bf16 activations are multiplied as bf16 and summed in fp32.
//
// cuBLAS is slow where a side is no multiple of 8, as a rank of 36 is. So N and K become what the converted
// factor is filled up to, where the other two matrices have room behind their columns: y gets zeros there, or
// zeros added; what lies there in a factor is finite, as all memory is from the start, and meets zeros.
static void gemm(mat y, mat a, int a_across, mat b, int b_across, double scale, enum mode mode)
{
    enum dtype type = y.type == TYPE_OF(real) ? y.type : a.type;
    wide alpha = (wide)scale, beta = mode == ADD ? 1 : 0;
    bool converted = a.type != type || b.type != type;
    int K = a_across ? a.rows : a.cols;
    a = factor(a, type, FACTOR_A);
    b = factor(b, type, FACTOR_B);
    int K_of_a = a_across ? a.rows : a.spare ? filled(a.cols) : a.cols;
    int K_of_b = b_across ? b.rows : b.spare ? filled(b.cols) : b.cols;
    if (converted) K = K_of_a < K_of_b ? K_of_a : K_of_b;
    if (y.spare) y.cols = b_across ? b.cols : b.rows;
    cublasOperation_t op_b = b_across ? CUBLAS_OP_N : CUBLAS_OP_T;
    cublasOperation_t op_a = a_across ? CUBLAS_OP_T : CUBLAS_OP_N;
    if (multiply_large(y, a, op_a, b, op_b, K, alpha, beta)) return;
    cublasStatus_t status = cublasGemmStridedBatchedEx(cublas(), op_b, op_a, y.cols, y.rows, K, &alpha,
        b.p, cuda_type(type), (int)b.ld, b.batch > 1 ? (long long)b.stride : 0,
        a.p, cuda_type(type), (int)a.ld, a.batch > 1 ? (long long)a.stride : 0, &beta,
        y.p, cuda_type(y.type), (int)y.ld, (long long)y.stride, y.batch, compute_type(), CUBLAS_GEMM_DEFAULT);
    check(status, "a product");
}

static void check_shapes(int ok, const char *op)
{
    if (!ok) fail(op, "the shapes do not fit");
}

extern "C" void matmul_nt(mat y, mat x, mat w, double scale, enum mode mode)
{
    if (!y.p) return;
    check_shapes(y.rows == x.rows && y.cols == w.rows && x.cols == w.cols, "matmul_nt");
    gemm(y, x, 0, w, 0, scale, mode);
}

extern "C" void matmul_nn(mat y, mat x, mat w, double scale, enum mode mode)
{
    if (!y.p) return;
    check_shapes(y.rows == x.rows && y.cols == w.cols && x.cols == w.rows, "matmul_nn");
    gemm(y, x, 0, w, 1, scale, mode);
}

extern "C" void matmul_tn(mat y, mat x, mat w, double scale, enum mode mode)
{
    if (!y.p) return;
    check_shapes(y.rows == x.cols && y.cols == w.cols && x.rows == w.rows, "matmul_tn");
    gemm(y, x, 1, w, 1, scale, mode);
}

// ---- 4  Llama2 --------------------------------------------------------------------------------------------

// y[n] += b.  One block: 32 packs of 8 rows.
__global__ static void bias_kernel(mat y, mat b)
{
    FOR_EACH_PACK(y.rows, y.cols, row, col) {
        pack sum = load_reals(y, row, col), term = load_pack(b, 0, col);
        for (int i = 0; i < PACK; i++) sum.x[i] += term.x[i];
        store_reals(y, row, col, sum);
    }
}

extern "C" void bias_forward(mat y, mat b)
{
    if (b.p) RUN(bias_kernel, pack_grid(y), THREADS, y, b);
}

//  db += Σ_n dy[n].  One block: 32 columns, of which each of the 8 warps adds up every eighth row.
__global__ static void bias_backward_kernel(mat db, mat dy)
{
    int c = blockIdx.x * WARP + threadIdx.x % WARP;
    wide sum = column_sum(dy.rows, c < dy.cols, [&](int n) { return up(row_of(dy, n)[c]); });
    if (c < dy.cols && threadIdx.x < WARP) ((wide *)db.p)[c] += sum;
}

extern "C" void bias_backward(mat db, mat dy)
{
    if (db.p) RUN(bias_backward_kernel, (dy.cols + WARP - 1) / WARP, THREADS, db, dy);
}

// out[n] = table[ids[n]].  One block: 32 packs of 8 tokens' rows.
__global__ static void embedding_kernel(mat out, mat table, const int *ids)
{
    FOR_EACH_PACK(out.rows, out.cols, n, col) store_pack(out, n, col, load_pack(table, ids[n], col));
}

extern "C" void embedding_forward(mat out, mat table, dev_ints ids)
{
    RUN(embedding_kernel, pack_grid(out), THREADS, out, table, ids);
}

// Tokens with the same id are linked, in their order. next: N after the last.
struct same_id { int is_first, next; };

// links[n], for each token n.  One block: 8 tokens, a warp each, whose lanes compare every 32nd id.
__global__ static void link_kernel(same_id *links, const int *ids, int N)
{
    int n = blockIdx.x * WARPS + threadIdx.x / WARP, first = N, next = N;
    if (n >= N) return;
    for (int i = threadIdx.x % WARP; i < N; i += WARP) {
        bool same = ids[i] == ids[n];
        if (same && i < first) first = i;
        if (same && i > n && i < next) next = i;
    }
    first = warp_reduce(first, smaller());
    next = warp_reduce(next, smaller());
    if (threadIdx.x % WARP == 0) links[n] = {first == n, next};
}

// dtable[id] += Σ dout[n] over the n with that id.  One block: 256 packs of a token's row. The block of the
// first token with an id adds up the rows of all tokens with that id, in their order; the blocks of the later
// ones return. So no two blocks write the same row.
__global__ static void embedding_backward_kernel(mat dtable, mat dout, const int *ids, const same_id *links)
{
    int first = blockIdx.x, col = (blockIdx.y * THREADS + threadIdx.x) * PACK;
    if (!links[first].is_first) return;
    pack sum = load_pack(dtable, ids[first], col);
    for (int n = first; n < dout.rows; n = links[n].next) {
        pack term = load_reals(dout, n, col);
        for (int i = 0; i < PACK; i++) sum.x[i] += term.x[i];
    }
    store_pack(dtable, ids[first], col, sum);
}

extern "C" void embedding_backward(mat dtable, mat dout, dev_ints ids)
{
    if (!dtable.p) return;
    int N = dout.rows;
    same_id *links = (same_id *)scratch(LINKS, N * sizeof(same_id));
    RUN(link_kernel, (N + WARPS - 1) / WARPS, THREADS, links, ids, N);
    dim3 blocks(N, (dout.cols + THREADS * PACK - 1) / (THREADS * PACK));
    RUN(embedding_backward_kernel, blocks, THREADS, dtable, dout, ids, links);
}

// A row that one block sums up and then writes is read once: between the two passes its packs stay in the
// registers of the threads, KEPT a thread, which are PART columns. A longer row is read in parts, and the
// second pass begins with the last part, which is still there, and reads the others again.
enum { PART = 4096, KEPT = PART / THREADS / PACK };
#define FOR_EACH_KEPT(first, k, col) \
    UNROLL for (int k = 0, col = (first) + threadIdx.x * PACK; k < KEPT; k++, col += THREADS * PACK)

__device__ static inline int last_part(int cols) { return (cols - 1) / PART * PART; }

// ρ = 1 / √(mean(x²) + ε) of a row, from what this thread has of Σ x².
__device__ static inline wide inverse_rms(wide squares, int C, wide eps)
{
    return 1 / sqrt(block_sum(squares) / C + eps);
}

// out = w x ρ.  One block a row: a pass for ρ, and one that writes out and, if it is wanted, the copy of x.
__global__ static void rmsnorm_kernel(mat out, mat residual, mat x, mat w, wide eps)
{
    int n = blockIdx.x, C = x.cols;
    pack kept[KEPT];
    wide squares = 0;
    for (int first = 0; first < C; first += PART)
        FOR_EACH_KEPT(first, k, c) {
            kept[k] = load_reals(x, n, c);
            for (int i = 0; i < PACK; i++) squares += kept[k].x[i] * kept[k].x[i];
        }
    wide rho = inverse_rms(squares, C, eps);
    for (int first = last_part(C); first >= 0; first -= PART)
        FOR_EACH_KEPT(first, k, c) {
            if (first < last_part(C)) kept[k] = load_reals(x, n, c);
            pack y = load_pack(w, 0, c);
            for (int i = 0; i < PACK; i++) y.x[i] *= kept[k].x[i] * rho;
            store_reals(out, n, c, y);
            if (residual.p) store_reals(residual, n, c, kept[k]);
        }
}

extern "C" void rmsnorm_forward(mat out, mat residual, mat x, mat w, double eps)
{
    RUN(rmsnorm_kernel, x.rows, THREADS, out, residual, x, w, (wide)eps);
}

// What one thread has of rows of x and of w dout.
struct rmsnorm_rows {
    pack x[KEPT], g[KEPT];
    __device__ void load(const mat &rows, const mat &dout, const mat &w, int n, int first)
    {
        FOR_EACH_KEPT(first, k, c) {
            x[k] = load_reals(rows, n, c);
            g[k] = load_reals(dout, n, c);
            pack factor = load_pack(w, 0, c);
            for (int i = 0; i < PACK; i++) g[k].x[i] *= factor.x[i];
        }
    }
};

//  dx += ρ (w dout − x ρ² mean(w dout x)),  since dρ/dx_c = −ρ³ x_c / C.
// One block a row: a pass for both sums, and one that adds to dx. Where rhos has memory, it also writes the
// row's ρ there, which rmsnorm_weight_kernel reads.
__global__ static void rmsnorm_backward_kernel(mat dx, wide *rhos, mat dout, mat x, mat w, wide eps)
{
    int n = blockIdx.x, C = x.cols;
    rmsnorm_rows kept;
    wide squares = 0, products = 0;
    for (int first = 0; first < C; first += PART) {
        kept.load(x, dout, w, n, first);
        UNROLL for (int k = 0; k < KEPT; k++)
            for (int i = 0; i < PACK; i++) {
                squares += kept.x[k].x[i] * kept.x[k].x[i];
                products += kept.g[k].x[i] * kept.x[k].x[i];
            }
    }
    wide rho = inverse_rms(squares, C, eps);
    if (rhos && threadIdx.x == 0) rhos[n] = rho;
    if (!dx.p) return;
    wide factor = block_sum(products) / C * rho * rho;
    for (int first = last_part(C); first >= 0; first -= PART) {
        if (first < last_part(C)) kept.load(x, dout, w, n, first);
        FOR_EACH_KEPT(first, k, c) {
            pack sum = load_reals(dx, n, c);
            for (int i = 0; i < PACK; i++) sum.x[i] += rho * (kept.g[k].x[i] - factor * kept.x[k].x[i]);
            store_reals(dx, n, c, sum);
        }
    }
}

//  dw += Σ_n dout x ρ.  One block: 32 columns, of which each of the 8 warps adds up every eighth row.
__global__ static void rmsnorm_weight_kernel(mat dw, const wide *rhos, mat dout, mat x)
{
    int c = blockIdx.x * WARP + threadIdx.x % WARP;
    wide sum = column_sum(x.rows, c < x.cols,
                          [&](int n) { return up(row_of(dout, n)[c]) * up(row_of(x, n)[c]) * rhos[n]; });
    if (c < x.cols && threadIdx.x < WARP) ((wide *)dw.p)[c] += sum;
}

extern "C" void rmsnorm_backward(mat dx, mat dw, mat dout, mat x, mat w, double eps)
{
    if (!dx.p && !dw.p) return;
    wide *rhos = dw.p ? (wide *)scratch(SUMS_OF_ROWS, x.rows * sizeof(wide)) : NULL;
    RUN(rmsnorm_backward_kernel, x.rows, THREADS, dx, rhos, dout, x, w, (wide)eps);
    if (dw.p) RUN(rmsnorm_weight_kernel, (x.cols + WARP - 1) / WARP, THREADS, dw, rhos, dout, x);
}

// Elements i and i + half of a head are a pair (a, b), rotated by the angle of the row's position:
// (a cos − b sin, b cos + a sin). The backward rotates by −angle.
// One block: 8 rows, of each 32 packs of pairs, counted as if each half were filled up to whole packs.
__global__ static void rope_kernel(mat x, const int *pos, mat table, wide sign)
{
    int half = table.cols / 2;
    FOR_EACH_PACK(x.rows, x.cols / (2 * half) * filled(half), n, p) {
        int head = p / filled(half), i = p % filled(half);
        real *a = row_of(x, n) + head * 2 * half + i, *b = a + half;
        const real *cosine = row_of(table, pos[n]) + i, *sine = cosine + half;
        pack u = load_pack(a, half - i), v = load_pack(b, half - i), turned_u, turned_v;
        pack c = load_pack(cosine, half - i), s = load_pack(sine, half - i);
        for (int k = 0; k < PACK; k++) {
            turned_u.x[k] = u.x[k] * c.x[k] - sign * v.x[k] * s.x[k];
            turned_v.x[k] = v.x[k] * c.x[k] + sign * u.x[k] * s.x[k];
        }
        store_pack(a, turned_u, half - i);
        store_pack(b, turned_v, half - i);
    }
}

extern "C" void rope(mat x, dev_ints pos, mat table, int sign)
{
    int half = table.cols / 2;
    dim3 grid = pack_grid(x.rows, x.cols / (2 * half) * filled(half), 1);
    RUN(rope_kernel, grid, THREADS, x, pos, table, (wide)sign);
}

// ---- attention ----
//
//  S = q kᵀ/√d,   P = softmax(S) over the keys that a query sees,   out = P v
//
// P has a row a query and a column a key: at 4096 of each it would be 32 MB a head, so it is never in memory.
// A block keeps QUERIES queries of one head in shared memory. Keys and values stream past, a tile of them at
// a time, the next on its way while this one is used (here as if a tile were as long as a block):
//
//                   keys →  tile 0  tile 1  tile 2  tile 3          ■  all of it is seen
//     block 0 of queries   │   ◣   │       │       │       │        ◣  the diagonal: some are seen
//     block 1              │   ■   │   ◣   │       │       │           the rest is not even read
//     block 2              │   ■   │   ■   │   ◣   │       │
//
// Each warp has 16 of the queries: their rows of S for this tile, and of out, are in the registers of its
// lanes. Tiles lie in shared memory as ops/tensor_core.cuh says.
//
// A softmax of which a part is known is put right when the next part is
// (Milakov and Gimelshein, arXiv 1805.02867; FlashAttention, arXiv 2205.14135, 2307.08691):
//
//     m' = max(m, max S),   P = exp(S − m'),   l = l exp(m − m') + Σ P,   o = o exp(m − m') + P v;
//     behind the last tile   out = o / l,   lse = m + log l
//
// So lse, a number a row, is all that the backward pass has to be left: P = exp(S − lse).
//
// 16 bits are rounded to where a product takes them: P, and dS below. The rest is wide.

// The rows that a block keeps, 16 a warp; four warps are a group, which a Hopper lets multiply together.
enum { KEPT_ROWS = sizeof(real) == 2 ? 128 : 64, QUERIES = KEPT_ROWS, KEYS = KEPT_ROWS };
enum { ATTENTION_THREADS = KEPT_ROWS / 16 * WARP, GROUPS = KEPT_ROWS / 64, MOST_HEAD_DIM = 128 };
// The rows of a tile that streams past, and of how many tiles there is room: one on its way, and one for each
// group. SHORT_TILE is for bf16's heads beyond 64 where a block has 99 KB of shared memory.
enum { TILE = sizeof(real) == 2 ? 64 : 16, SHORT_TILE = 16, SLOTS = GROUPS + 1 };
typedef pair_of<real> real_pair;
typedef pair_of<wide> wide_pair;

// The block of queries that begins at number `first` of this span, or of keys.
struct span_rows { span s; int first; };

// Query i of a span has its own key. It sees that one and those before it, `window` keys at most.
__device__ static inline int own_key(const span &s, int i) { return s.nk - s.nq + i; }

// So it sees a key that is 0 … window − 1 keys behind its own. (What is negative is large without a sign.)
__device__ static inline bool sees(int behind, int window) { return (unsigned)behind < (unsigned)window; }

// Of so many queries, the first of which has the key `own`, and so many keys: do all see all?
__device__ static inline bool all_seen(int own, int queries, int key, int keys, int window)
{
    return key + keys - 1 <= own && key > own + queries - 1 - window;
}

// What a block of queries has: n of them, from row `row` of q on. The first one's own key is in row `own` of
// k, and the keys that some of them see are the rows from … to − 1.
struct query_block {
    int row, n, own, from, to;
    __device__ query_block(const span_rows &b, int window)
    {
        int before = own_key(b.s, b.first);             // so many keys of the span
        row = b.s.q + b.first;
        n = b.s.nq - b.first < QUERIES ? b.s.nq - b.first : QUERIES;
        own = b.s.k + before;
        from = before >= window ? own - window + 1 : b.s.k;
        to = own + n;
    }
};

// Begins to copy `cols` columns of `rows` rows into a tile; what the tile has beyond them is zero.
// Neighbouring threads take neighbouring packs of 16 bytes of a row; where rows do not begin at 16 bytes, a
// thread copies its numbers one by one.
template <int N, int D> __device__ static inline
void fetch(real *to, const mat &m, int row, int rows, int col, int cols)
{
    constexpr int PACKS = D / PACK;
    constexpr int ACROSS = PACKS <= 4 ? 4 : PACKS <= 8 ? 8 : PACKS <= 16 ? 16 : PACKS <= 32 ? 32 : 64;
    constexpr int DOWN = ATTENTION_THREADS / ACROSS;                    // ACROSS packs of DOWN rows at a time
    const int c = threadIdx.x % ACROSS * PACK, first = threadIdx.x / ACROSS;
    const real *from = (const real *)m.p + (row + first) * m.ld + col + c;
    const bool aligned = ((uintptr_t)m.p | (m.ld | (size_t)(col | cols)) * sizeof(real)) % 16 == 0;
    if (c >= D) return;
    if (aligned) {
        real *at = to + in_tile<N>(first, c);           // 8 rows on, a pack is at the same place of its row
        UNROLL for (int r = 0; r < N; r += DOWN)
            if (N % DOWN == 0 || first + r < N)
                begin_copy(DOWN % 8 ? to + in_tile<N>(first + r, c) : at + r * 64, from + r * m.ld,
                           first + r < rows && c < cols);
        return;
    }
    for (int r = 0; first + r < N; r += DOWN)
        for (int e = 0; e < PACK; e++)
            to[in_tile<N>(first + r, c + e)] =
                first + r < rows && c + e < cols ? from[r * m.ld + e] : (real)0;
}

// Waits until all but the last LATER that this block has begun to fetch is there, and all its warps are done
// with the tile before.
template <int LATER = 0> __device__ static inline void arrived()
{
    __pipeline_wait_prior(LATER);
    show_to_tensor_cores();
    meet<ATTENTION_THREADS>();
}

// Begins c (N columns) = a bᵀ,  a (KEPT_ROWS, D), of which a warp has its 16 rows,  b (N, D), both in tiles.
template <int N, int D> __device__ static inline
void rows_by_rows(wide_pair (&c)[N / 8][2], const real *a, const real *b)
{
    if (by_warpgroup<KEPT_ROWS, N, D>(c, a, b)) return;
    int lane = threadIdx.x % WARP, warp_row = threadIdx.x / WARP * 16;
    for (int n = 0; n < N / 8; n++) c[n][0] = c[n][1] = {0, 0};
    UNROLL for (int k = 0; k < D; k += 16) {
        real_pair x[4], y[4];
        load_tiles(x, a + in_tile<KEPT_ROWS>(warp_row + lane % 16, k + lane / 16 * 8));
        UNROLL for (int n = 0; n < N; n += 16) {
            load_tiles(y, b + in_tile<N>(n + lane % 8 + lane / 16 * 8, k + lane / 8 % 2 * 8));
            mma(c[n / 8], x, y);
            mma(c[n / 8 + 1], x, y + 2);
        }
    }
}

// Begins c (D columns) += a b,  a (16 rows a warp, N) in registers, rounded here,  b (N, D) in a tile.
template <int N, int D> __device__ static inline
void add_product(wide_pair (&c)[D / 8][2], wide_pair (&a)[N / 8][2], const real *b)
{
    int lane = threadIdx.x % WARP;
    real_pair x[N / 16][4];
    UNROLL for (int i = 0; i < N / 4; i++)
        x[i / 4][i % 4] = pair_up<real>(a[i / 2][i % 2].x, a[i / 2][i % 2].y);
    if (by_warpgroup<N, D>(c, x, b)) return;
    UNROLL for (int n = 0; n < N; n += 16)
        UNROLL for (int k = 0; k < D; k += 16) {
            real_pair y[4];
            load_transposed(y, b + in_tile<N>(n + lane % 16, k + lane / 16 * 8));
            mma(c[k / 8], x[n / 16], y);
            mma(c[k / 8 + 1], x[n / 16], y + 2);
        }
}

// Where in a warp's part of a product a lane's pair (n, i) is: its row, and the first of its columns.
struct place { int row, col; };
__device__ static inline place place_of(int n, int i)
{
    int lane = threadIdx.x % WARP;
    return {lane / 4 + 8 * i, 8 * n + lane % 4 * 2};
}

// The warp's rows, from `row` on, become scale c, each with its own scale: `rows` of them, in `cols` columns.
template <int D> __device__ static inline
void write_rows(const mat &out, int row, int rows, int first, int cols,
                wide_pair (&c)[D / 8][2], const wide (&scale)[2])
{
    UNROLL for (int i = 0; i < 2; i++) {
        const int r = place_of(0, i).row;
        real *to = row_of(out, row + r) + first;
        bool paired = (uintptr_t)to % sizeof(real_pair) == 0;
        UNROLL for (int n = 0; n < D / 8; n++) {
            int col = place_of(n, i).col;
            real_pair p = pair_up<real>(scale[i] * c[n][i].x, scale[i] * c[n][i].y);
            if (r >= rows) continue;
            if (paired && col + 1 < cols) *(real_pair *)(to + col) = p;
            else {
                if (col < cols) to[col] = p.x;
                if (col + 1 < cols) to[col + 1] = p.y;
            }
        }
    }
}

// a += b
template <int N> __device__ static inline void add_pairs(wide_pair (&a)[N][2], const wide_pair (&b)[N][2])
{
    UNROLL for (int n = 0; n < N; n++)
        UNROLL for (int i = 0; i < 2; i++) a[n][i] = {a[n][i].x + b[n][i].x, a[n][i].y + b[n][i].y};
}

// What the four lanes of a row have, combined.
template <class Op> __device__ static inline wide over_row(wide x, Op op)
{
    x = op(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return op(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

constexpr wide LOG2E = (wide)1.4426950408889634;        // exp(x) = exp2(x log₂e)

// Scores of keys that a query does not see become −∞. The first query has the key `own`, the first key is
// `key`; queries lie down and keys across, or `transposed`.
template <int N> __device__ static inline
void hide_unseen(wide_pair (&S)[N / 8][2], int own, int key, int window, bool transposed)
{
    UNROLL for (int j = 0; j < N / 4; j++) {
        const int n = j / 2, i = j % 2;
        place p = place_of(n, i);
        int down = transposed ? -1 : 1, behind = own - key + down * (p.row - p.col);    // how far the key is
        if (!sees(behind, window)) S[n][i].x = -INFINITY;
        if (!sees(behind - down, window)) S[n][i].y = -INFINITY;
    }
}

// The two groups of warps take turns: while one computes exp, the tensor cores multiply for the other. So the
// second is half a round behind: what it begins in a round, it goes on with in the next.
//
//     round i, first group    begins S(i) = q kᵀ       P(i) = exp(S − m)     o += P v
//     round i, second group   P(i−1) = exp(S − m)      o += P v              begins S(i) = q kᵀ
//
// Where nothing is gained by that, every group is a first one.
__device__ static inline bool is_first_group()
{
    return GROUPS == 1 || !TAKES_TURNS || __shfl_sync(0xffffffffu, threadIdx.x / 128, 0) == 0;
}

// One block: QUERIES queries of a span, in one query head, against all keys that they see.
template <int D, int N = TILE> __global__ static void __launch_bounds__(ATTENTION_THREADS, 1)
attention_kernel(mat out, mat lse, mat q, mat k, mat v, int d, int window, wide scale,
                 const span_rows *blocks)
{
    SHARED_MEMORY(real, memory);
    constexpr int SIZE = tile_size<N, D>();
    real *Q = memory, *K = Q + tile_size<QUERIES, D>(), *V = K + SLOTS * SIZE;
    const query_block b(blocks[blockIdx.x], window);
    const int head = blockIdx.y, kv = head / (q.cols / k.cols), tiles = (b.to - b.from + N - 1) / N;
    const int warp_row = threadIdx.x / WARP * 16;
    const int row = b.row + warp_row, rows = b.n - warp_row, own = b.own + warp_row;
    const wide log2_scale = scale * LOG2E;                              // exp(scale x) = exp2(log2_scale x)

    wide_pair o[D / 8][2] = {}, S[N / 8][2];
    wide most[2] = {-INFINITY, -INFINITY}, sum[2] = {};
    auto fetch_tile = [&](int i) {
        int key = b.from + i * N, slot = i % SLOTS * SIZE;
        if (i < tiles) fetch<N, D>(K + slot, k, key, b.to - key, kv * d, d);
        if (i < tiles) fetch<N, D>(V + slot, v, key, b.to - key, kv * d, d);
        __pipeline_commit();
    };
    auto next_round = [&](int i) {                      // with tile i; the one behind it is fetched meanwhile
        arrived();
        fetch_tile(i + 1);
    };
    auto begin_scores = [&](int i) { rows_by_rows<N, D>(S, Q, K + i % SLOTS * SIZE); };       // S = q kᵀ
    auto add_values = [&](int i) {
        int key = b.from + i * N;
        finished<0>(S);
        if (!all_seen(own, 16, key, N, window)) hide_unseen<N>(S, own, key, window, false);
        UNROLL for (int j = 0; j < 2; j++) {                                      // the lane's rows
            wide largest = -INFINITY;
            UNROLL for (int n = 0; n < N / 8; n++) largest = fmax(largest, fmax(S[n][j].x, S[n][j].y));
            // m need not be the largest score, only near it, so that no P is beyond 2⁸
            largest = over_row(largest, larger()) * log2_scale;
            bool grows = largest > most[j] + 8;
            if (__any_sync(0xffffffffu, grows)) {
                wide shrink = grows ? fast_exp2(most[j] - largest) : 1;           // exp(m − m')
                if (grows) most[j] = largest;
                sum[j] *= shrink;
                UNROLL for (int n = 0; n < D / 8; n++) o[n][j] = {o[n][j].x * shrink, o[n][j].y * shrink};
            }
            wide base = most[j] == -INFINITY ? 0 : most[j];         // no key seen so far: exp2(−∞) is 0
            UNROLL for (int n = 0; n < N / 8; n++) {
                wide_pair &x = S[n][j];
                x.x = fast_exp2(x.x * log2_scale - base);                         // P = exp(S − m)
                x.y = fast_exp2(x.y * log2_scale - base);
                sum[j] += x.x + x.y;                                              // l, this lane's part
            }
        }
        add_product<N, D>(o, S, V + i % SLOTS * SIZE);                            // o += P v
    };
    fetch<QUERIES, D>(Q, q, b.row, b.n, head * d, d);
    fetch_tile(0);
    if (is_first_group())
        for (int i = 0; i < tiles; i++) {
            next_round(i);
            begin_scores(i);
            add_values(i);
            finished<0>(o);
        }
    else {
        next_round(0);
        begin_scores(0);
        for (int i = 1; i < tiles; i++) {
            next_round(i);
            add_values(i - 1);
            begin_scores(i);
            finished<1>(o);
        }
        add_values(tiles - 1);
        finished<0>(o);
    }
    wide inverse[2];
    UNROLL for (int i = 0; i < 2; i++) {
        place p = place_of(0, i);
        wide l = over_row(sum[i], plus());
        inverse[i] = 1 / l;
        wide *at = (wide *)lse.p + index_of(lse, 0, row + p.row, head);
        if (p.col == 0 && p.row < rows) *at = most[i] / LOG2E + log(l);
    }
    write_rows<D>(out, row, rows, head * d, d, o, inverse);
}

//  out = P v:         dv = Pᵀ dout,   dP = dout vᵀ
//  P = softmax(S):    dS = P ⊙ (dP − Δ),   Δ = Σ_c dP P = dout · out, a number a row
//  S = q kᵀ/√d:       dq = dS k/√d,   dk = dSᵀ q/√d
//                     (Σ_c P[c] Σ_i dout[i] v[c, i] = Σ_i dout[i] Σ_c P[c] v[c, i] = Σ_i dout[i] out[i])
//
// dq is a sum over keys, and dk and dv are sums over queries. A block that made all three would have to add
// to rows that other blocks add to, in an order that chance decides. So there are two kernels, each with its
// sum in registers, and both make S and dP: seven products instead of five.

// One block: QUERIES queries of a span in one head. Keys and values stream past, N at a time, and the groups
// take turns as in attention_kernel. It also leaves Δ.
template <int D, int N = TILE> __global__ static void __launch_bounds__(ATTENTION_THREADS, 1)
attention_dq_kernel(mat dq, mat delta, mat dout, mat q, mat k, mat v, mat out, mat lse,
                    int d, int window, wide scale, const span_rows *blocks)
{
    SHARED_MEMORY(real, memory);
    constexpr int KEPT_SIZE = tile_size<QUERIES, D>(), SIZE = tile_size<N, D>();
    real *Q = memory, *G = Q + KEPT_SIZE, *K = G + KEPT_SIZE, *V = K + SLOTS * SIZE;
    const query_block b(blocks[blockIdx.x], window);
    const int head = blockIdx.y, kv = head / (q.cols / k.cols), tiles = (b.to - b.from + N - 1) / N;
    const int warp_row = threadIdx.x / WARP * 16, lane = threadIdx.x % WARP;
    const int row = b.row + warp_row, rows = b.n - warp_row, own = b.own + warp_row;
    const wide log2_scale = scale * LOG2E;

    wide Delta[2] = {}, L[2] = {};                      // of the lane's rows; a quarter of a row is its own
    wide_pair sum[D / 8][2] = {}, S[N / 8][2], dS[N / 8][2];
    auto fetch_tile = [&](int i) {
        int key = b.from + i * N, slot = i % SLOTS * SIZE;
        if (i < tiles) fetch<N, D>(K + slot, k, key, b.to - key, kv * d, d);
        if (i < tiles) fetch<N, D>(V + slot, v, key, b.to - key, kv * d, d);
        __pipeline_commit();
    };
    auto next_round = [&](int i) {
        arrived();
        fetch_tile(i + 1);
    };
    auto begin_scores = [&](int i) {
        rows_by_rows<N, D>(S, Q, K + i % SLOTS * SIZE);                                // S  = q kᵀ
        rows_by_rows<N, D>(dS, G, V + i % SLOTS * SIZE);                               // dP = dout vᵀ
    };
    auto add_keys = [&](int i) {
        int key = b.from + i * N;
        finished<0>(S);
        finished<0>(dS);
        if (!all_seen(own, 16, key, N, window)) hide_unseen<N>(S, own, key, window, false);
        UNROLL for (int j = 0; j < N / 4; j++) {
            wide_pair &x = S[j / 2][j % 2];
            x.x = fast_exp2(x.x * log2_scale - L[j % 2]);                              // P = exp(S − lse)
            x.y = fast_exp2(x.y * log2_scale - L[j % 2]);
        }
        UNROLL for (int j = 0; j < N / 4; j++) {
            wide_pair x = S[j / 2][j % 2], &y = dS[j / 2][j % 2];
            y = {x.x * (y.x - Delta[j % 2]), x.y * (y.y - Delta[j % 2])};              // dS = P ⊙ (dP − Δ)
        }
        add_product<N, D>(sum, dS, K + i % SLOTS * SIZE);                              // dq += dS k
    };
    fetch<QUERIES, D>(Q, q, b.row, b.n, head * d, d);
    fetch<QUERIES, D>(G, dout, b.row, b.n, head * d, d);
    fetch_tile(0);

    constexpr int EACH = (D + 4 * PACK - 1) / (4 * PACK);                 // packs of a row that a lane has
    packed<real> g[2][EACH], o[2][EACH];                // all are on their way before the first is used
    UNROLL for (int i = 0; i < 2; i++) {
        int r = row + place_of(0, i).row;
        UNROLL for (int p = 0; p < EACH; p++) {
            int c = (lane % 4 + 4 * p) * PACK, n = r < row + rows ? d - c : 0;      // numbers that are there
            load_packed(&g[i][p], row_of(dout, r) + head * d + c, n);
            load_packed(&o[i][p], row_of(out, r) + head * d + c, n);
        }
        if (r < row + rows) L[i] = ((const wide *)lse.p)[index_of(lse, 0, r, head)] * LOG2E;
    }
    UNROLL for (int i = 0; i < 2; i++) {
        int r = row + place_of(0, i).row;
        UNROLL for (int p = 0; p < EACH; p++)
            for (int e = 0; e < PACK; e++) Delta[i] += up(g[i][p].x[e]) * up(o[i][p].x[e]);
        Delta[i] = over_row(Delta[i], plus());
        wide *at = (wide *)delta.p + index_of(delta, 0, r, head);
        if (r < row + rows && lane % 4 == 0) *at = Delta[i];
    }

    if (is_first_group())
        for (int i = 0; i < tiles; i++) {
            next_round(i);
            begin_scores(i);
            add_keys(i);
            finished<0>(sum);
        }
    else {
        next_round(0);
        begin_scores(0);
        for (int i = 1; i < tiles; i++) {
            next_round(i);
            add_keys(i - 1);
            begin_scores(i);
            finished<2>(sum);
        }
        add_keys(tiles - 1);
        finished<0>(sum);
    }
    write_rows<D>(dq, row, rows, head * d, d, sum, {scale, scale});
}

// One block: KEYS keys of a span in one head of keys. The queries that see them stream past, of every query
// head that shares the keys, one head after the other. S and dP are made transposed: their rows are keys.
template <int D, int N = TILE> __global__ static void __launch_bounds__(ATTENTION_THREADS, 1)
attention_dkv_kernel(mat dk, mat dv, mat dout, mat q, mat k, mat v, mat lse, mat delta,
                     int d, int window, wide scale, const span_rows *blocks)
{
    SHARED_MEMORY(real, memory);
    constexpr int KEPT_SIZE = tile_size<KEYS, D>(), SIZE = tile_size<N, D>();
    real *K = memory, *V = K + KEPT_SIZE, *Q = V + KEPT_SIZE, *G = Q + SLOTS * SIZE;
    __shared__ wide L[SLOTS][N], Delta[SLOTS][N];
    const span s = blocks[blockIdx.x].s;
    const int first = blocks[blockIdx.x].first, kv = blockIdx.y, sharing = q.cols / k.cols;
    const int keys = s.nk - first < KEYS ? s.nk - first : KEYS;
    const int warp_row = threadIdx.x / WARP * 16;
    const int row = s.k + first + warp_row, rows = keys - warp_row;     // the warp's
    // the first query that sees the first key, and the one behind the last that sees the last
    const int from = first > own_key(s, 0) ? first - own_key(s, 0) : 0;
    const long end = (long)first + keys - 1 + window - own_key(s, 0);
    const int to = end < s.nq ? (int)end : s.nq;
    const int tiles = from < to ? (to - from + N - 1) / N : 0, steps = tiles * sharing;
    const wide log2_scale = scale * LOG2E;

    wide_pair sum_k[D / 8][2] = {}, sum_v[D / 8][2] = {}, P[N / 8][2], dS[N / 8][2];
    auto fetch_tile = [&](int step) {
        int slot = step % SLOTS, query = s.q + from + step % tiles * N, head = kv * sharing + step / tiles;
        int left = s.q + to - query;
        fetch<N, D>(Q + slot * SIZE, q, query, left, head * d, d);
        fetch<N, D>(G + slot * SIZE, dout, query, left, head * d, d);
        for (int r = threadIdx.x; r < N; r += ATTENTION_THREADS) {
            size_t at = index_of(lse, 0, r < left ? query + r : query, head);
            size_t zeros = r < left ? 0 : sizeof(wide);
            __pipeline_memcpy_async(&L[slot][r], (const wide *)lse.p + at, sizeof(wide), zeros);
            __pipeline_memcpy_async(&Delta[slot][r], (const wide *)delta.p + at, sizeof(wide), zeros);
        }
        __pipeline_commit();
    };
    auto next_round = [&](int step) {
        arrived();
        if (step + 1 < steps) fetch_tile(step + 1);
    };
    auto begin_scores = [&](int step) {
        rows_by_rows<N, D>(P, K, Q + step % SLOTS * SIZE);                      // Sᵀ  = k qᵀ
        rows_by_rows<N, D>(dS, V, G + step % SLOTS * SIZE);                     // dPᵀ = v doutᵀ
    };
    auto add_queries = [&](int step) {
        const int slot = step % SLOTS, own = own_key(s, from + step % tiles * N), key = first + warp_row;
        finished<0>(P);
        finished<0>(dS);
        if (!all_seen(own, N, key, 16, window)) hide_unseen<N>(P, own, key, window, true);
        UNROLL for (int j = 0; j < N / 4; j++) {
            wide_pair &x = P[j / 2][j % 2];
            const wide *l = &L[slot][place_of(j / 2, 0).col];
            x.x = fast_exp2(x.x * log2_scale - l[0] * LOG2E);                   // P = exp(S − lse)
            x.y = fast_exp2(x.y * log2_scale - l[1] * LOG2E);
        }
        add_product<N, D>(sum_v, P, G + slot * SIZE);                           // dv += Pᵀ dout
        UNROLL for (int j = 0; j < N / 4; j++) {
            wide_pair x = P[j / 2][j % 2], &y = dS[j / 2][j % 2];
            const wide *D0 = &Delta[slot][place_of(j / 2, 0).col];
            y = {x.x * (y.x - D0[0]), x.y * (y.y - D0[1])};                     // dS = P ⊙ (dP − Δ)
        }
        add_product<N, D>(sum_k, dS, Q + slot * SIZE);                          // dk += dSᵀ q
    };
    fetch<KEYS, D>(K, k, s.k + first, keys, kv * d, d);
    fetch<KEYS, D>(V, v, s.k + first, keys, kv * d, d);
    __pipeline_commit();
    if (steps) fetch_tile(0);
    if (is_first_group())
        for (int i = 0; i < steps; i++) {
            next_round(i);
            begin_scores(i);
            add_queries(i);
            finished<0>(sum_v);
            finished<0>(sum_k);
        }
    else if (steps) {
        next_round(0);
        begin_scores(0);
        for (int i = 1; i < steps; i++) {
            next_round(i);
            add_queries(i - 1);
            begin_scores(i);
            finished<2>(sum_v);
            finished<2>(sum_k);
        }
        add_queries(steps - 1);
        finished<0>(sum_v);
        finished<0>(sum_k);
    }
    arrived();                                          // keys that no query sees are only here now
    write_rows<D>(dv, row, rows, kv * d, d, sum_v, {1, 1});
    write_rows<D>(dk, row, rows, kv * d, d, sum_k, {scale, scale});
}

// The spans that a list on the device was made for. It lies there until spans come that are not these.
struct known_spans {
    span *spans;
    int count;
    bool are(const span *s, int n) const { return count == n && !memcmp(spans, s, n * sizeof *s); }
    void become(const span *s, int n)
    {
        spans = (span *)realloc(spans, n * sizeof *s + 1);
        if (!spans) fail("spans", "out of memory");
        memcpy(spans, s, n * sizeof *s);
        count = n;
    }
};
enum { NONE_LISTED = -1 };

// The blocks of queries of all spans, those with the most keys first, so that no long one is begun last;
// behind them the blocks of keys, likewise.
static struct { known_spans of; int query_blocks, key_blocks; } listed = {{NULL, NONE_LISTED}, 0, 0};

static int by_work(const void *a, const void *b)
{
    const span_rows *x = (const span_rows *)a, *y = (const span_rows *)b;
    return y->first - x->first;
}

static span_rows *list_blocks(const span *spans, int count)
{
    size_t room = 0;
    if (listed.of.are(spans, count)) return (span_rows *)buffers[BLOCKS].p;
    for (int i = 0; i < count; i++)
        room += (spans[i].nq + QUERIES - 1) / QUERIES + (spans[i].nk + KEYS - 1) / KEYS;
    span_rows *list = (span_rows *)malloc(room * sizeof *list + 1), *end = list;
    if (!list) fail("attention", "out of memory");
    for (int i = 0; i < count; i++)
        for (int first = 0; first < spans[i].nq; first += QUERIES) *end++ = {spans[i], first};
    listed.query_blocks = (int)(end - list);
    qsort(list, listed.query_blocks, sizeof *list, by_work);
    for (int i = 0; i < count; i++)                                     // early keys are seen by most queries
        for (int first = 0; first < spans[i].nk; first += KEYS) *end++ = {spans[i], first};
    listed.key_blocks = (int)(end - list) - listed.query_blocks;
    void *there = scratch(BLOCKS, room * sizeof *list);
    check(cudaMemcpy(there, list, room * sizeof *list, cudaMemcpyHostToDevice), "copying to the device");
    listed.of.become(spans, count);
    free(list);
    return (span_rows *)there;
}

// A kernel for heads of at most 32, 64, 96 or 128 numbers; what a head has less is zero in shared memory.
// rows: of shared memory in all, those that a block keeps and SLOTS tiles of each matrix that streams past.
#define RUN_ATTENTION(kernel, d, grid, rows, ...) \
    do { \
        if (d <= 32) RUN_SHARED(kernel<32>, grid, attention_bytes(32, rows), __VA_ARGS__); \
        else if (d <= 64) RUN_SHARED(kernel<64>, grid, attention_bytes(64, rows), __VA_ARGS__); \
        else if (d <= 96) RUN_SHARED(kernel<96>, grid, attention_bytes(96, rows), __VA_ARGS__); \
        else RUN_SHARED(kernel<128>, grid, attention_bytes(128, rows), __VA_ARGS__); \
    } while (0)
#define RUN_SHARED(kernel, grid, bytes, ...) \
    (check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), \
           #kernel ": a block of this GPU has too little shared memory"), \
     LAUNCH_SHARED(kernel, grid, ATTENTION_THREADS, bytes, __VA_ARGS__), check(cudaGetLastError(), #kernel))

static int attention_bytes(int D, int rows) { return rows * (D > 64 ? 128 : 64) * (int)sizeof(real); }

// Whether a block of this GPU has so much shared memory. Those of sm_86, 89 and 120 have 99 KB: too little
// for wide heads in bf16, unless the tiles are a quarter as long, and for Bat-row in float two steps ahead.
template <class Kernel> static bool has_room(Kernel *kernel, int bytes)
{
    if (!cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)) return true;
    cudaGetLastError();                                                 // forgets the error
    return false;
}

static void check_head_dim(int d)
{
    if (d > MOST_HEAD_DIM)
        fail("attention", "heads of more than 128 numbers are not built for a GPU; ./train runs on the CPU");
}

extern "C" void attention_forward(mat out, mat lse, mat q, mat k, mat v, int d, int window,
                                  const span *spans, int count)
{
    check_head_dim(d);
    const span_rows *blocks = list_blocks(spans, count);
    wide scale = (wide)(1 / sqrt((double)d));
    const dim3 of_queries(listed.query_blocks, q.cols / d);
    if (!listed.query_blocks) return;
    if (d > 64 && !has_room(attention_kernel<128>, attention_bytes(128, QUERIES + 2 * SLOTS * TILE)))
        RUN_SHARED((attention_kernel<128, SHORT_TILE>), of_queries,
                   attention_bytes(128, QUERIES + 2 * SLOTS * SHORT_TILE),
                   out, lse, q, k, v, d, window, scale, blocks);
    else
        RUN_ATTENTION(attention_kernel, d, of_queries, QUERIES + 2 * SLOTS * TILE,
                      out, lse, q, k, v, d, window, scale, blocks);
}

extern "C" void attention_backward(mat dq, mat dk, mat dv, mat dout, mat q, mat k, mat v, mat out, mat lse,
                                   int d, int window, const span *spans, int count)
{
    check_head_dim(d);
    const span_rows *blocks = list_blocks(spans, count);
    mat delta = contiguous(lse, scratch(DELTA, bytes_of(lse)), TYPE_OF(wide));
    wide scale = (wide)(1 / sqrt((double)d));
    if (!listed.query_blocks) return;
    const dim3 of_queries(listed.query_blocks, q.cols / d), of_keys(listed.key_blocks, k.cols / d);
    const span_rows *key_blocks = blocks + listed.query_blocks;
    if (d > 64 && !has_room(attention_dkv_kernel<128>, attention_bytes(128, 2 * KEYS + 2 * SLOTS * TILE))) {
        int bytes = attention_bytes(128, 2 * KEYS + 2 * SLOTS * SHORT_TILE);
        RUN_SHARED((attention_dq_kernel<128, SHORT_TILE>), of_queries, bytes,
                   dq, delta, dout, q, k, v, out, lse, d, window, scale, blocks);
        RUN_SHARED((attention_dkv_kernel<128, SHORT_TILE>), of_keys, bytes,
                   dk, dv, dout, q, k, v, lse, delta, d, window, scale, key_blocks);
        return;
    }
    RUN_ATTENTION(attention_dq_kernel, d, of_queries, 2 * QUERIES + 2 * SLOTS * TILE,
                  dq, delta, dout, q, k, v, out, lse, d, window, scale, blocks);
    RUN_ATTENTION(attention_dkv_kernel, d, of_keys, 2 * KEYS + 2 * SLOTS * TILE,
                  dk, dv, dout, q, k, v, lse, delta, d, window, scale, key_blocks);
}

// σ(g) = 1/(1 + e^−g).  The quotient of floats is the fast one, which is right to 2 units in the last place.
__device__ static inline wide sigmoid(wide g)
{
    wide below = 1 + exp(-g);
    return sizeof(wide) == 4 ? __fdividef(1, below) : 1 / below;
}

// out = silu(g) u,  silu(g) = g σ(g).  One block: 32 packs of 8 rows.
__global__ static void swiglu_kernel(mat out, mat gate, mat up_)
{
    FOR_EACH_PACK(out.rows, out.cols, n, c) {
        pack g = load_reals(gate, n, c), u = load_reals(up_, n, c);
        for (int i = 0; i < PACK; i++) u.x[i] *= g.x[i] * sigmoid(g.x[i]);
        store_reals(out, n, c, u);
    }
}

extern "C" void swiglu_forward(mat out, mat gate, mat up_)
{
    RUN(swiglu_kernel, pack_grid(out), THREADS, out, gate, up_);
}

//  dg = dout u σ (1 + g (1 − σ)),   du = dout g σ.  One block: 32 packs of 8 rows.
__global__ static void swiglu_backward_kernel(mat dgate, mat dup, mat dout, mat gate, mat up_)
{
    FOR_EACH_PACK(dout.rows, dout.cols, n, c) {
        pack g = load_reals(gate, n, c), u = load_reals(up_, n, c), d = load_reals(dout, n, c);
        pack dg, du;
        for (int i = 0; i < PACK; i++) {
            wide sigma = sigmoid(g.x[i]);
            dg.x[i] = d.x[i] * u.x[i] * sigma * (1 + g.x[i] * (1 - sigma));
            du.x[i] = d.x[i] * g.x[i] * sigma;
        }
        store_reals(dgate, n, c, dg);
        store_reals(dup, n, c, du);
    }
}

extern "C" void swiglu_backward(mat dgate, mat dup, mat dout, mat gate, mat up_)
{
    RUN(swiglu_backward_kernel, pack_grid(dout), THREADS, dgate, dup, dout, gate, up_);
}

//  loss = log Σ exp(z) − z[label];   dz = scale (softmax(z) − [label]), in z's place.
// One block a row. The first pass finds the largest z and the sum together: each thread keeps the largest z
// it has seen and the sum of exp(z − largest), which it multiplies by exp(old largest − new largest) whenever
// a larger z comes. A second pass writes the gradient.
__global__ static void cross_entropy_kernel(mat losses, mat logits, const int *labels, wide scale)
{
    int n = blockIdx.x, label = labels[n];
    wide mine = -INFINITY, sum = 0, at_label = up(row_of(logits, n)[label]);
    for (int c = threadIdx.x * PACK; c < logits.cols; c += THREADS * PACK) {
        pack z = load_reals(logits, n, c);
        wide before = mine;
        for (int i = 0; i < PACK; i++)
            if (c + i < logits.cols && z.x[i] > mine) mine = z.x[i];
        if (mine > before) sum *= exp(before - mine);
        for (int i = 0; i < PACK; i++)
            if (c + i < logits.cols) sum += exp(z.x[i] - mine);
    }
    wide most = block_reduce(mine, larger());
    sum = block_sum(mine == -INFINITY ? 0 : sum * exp(mine - most));
    if (threadIdx.x == 0) ((wide *)losses.p)[n * losses.ld] = log(sum) + most - at_label;
    if (scale == 0) return;
    for (int c = threadIdx.x * PACK; c < logits.cols; c += THREADS * PACK) {
        pack z = load_reals(logits, n, c);
        for (int i = 0; i < PACK; i++) z.x[i] = scale * (exp(z.x[i] - most) * (1 / sum) - (c + i == label));
        store_reals(logits, n, c, z);
    }
}

extern "C" void cross_entropy(mat losses, mat logits, dev_ints labels, double scale)
{
    RUN(cross_entropy_kernel, logits.rows, THREADS, losses, logits, labels, (wide)scale);
}

// ---- 5  RWKV6 ---------------------------------------------------------------------------------------------

// The parts of a row that are normed alone. A team of threads has one: a block a row, or as many threads a
// head as 64 columns have packs. What their registers hold is a stretch. A part of one stretch is read once,
// as a row of rmsnorm_kernel is, a longer one by each pass anew.
enum { HEAD_TEAM = 64 / PACK, LONGEST_HEAD = 128 };
#define FOR_EACH_OF_STRETCH(part, from, k, c) \
    UNROLL for (int k = 0, c = (from) + (int)threadIdx.x % TEAM * PACK; \
                k < (part).PACKS && c < (part).end; k++, c += TEAM * PACK)

struct normed_rows { mat x, w, dout, dx; };                     // dout and dx on the way back only

template <int TEAM> struct part_of_row {
    enum { PACKS = TEAM < THREADS ? 1 : KEPT, STRETCH = TEAM * PACKS * PACK };
    int n, first, size, end;                // its row, its first column, its columns; 0 beyond the last part
    int held = -1;                          // the first column of the stretch that is held
    packed<real> x[PACKS], dx[PACKS];
    pack g[PACKS] = {};                     // w dout
    wide mean, rho, mean_g, along;          // of x; of g; and mean(g x̂)

    __device__ inline part_of_row(const mat &m, int groups)
    {
        int part = blockIdx.x * (THREADS / TEAM) + threadIdx.x / TEAM;
        bool there = part < m.rows * groups;
        n = there ? part / groups : 0;
        size = m.cols / groups;
        first = part % groups * size;
        end = there ? size : 0;
    }

    // All loads are on their way before the first number is asked for.
    __device__ inline void hold(const normed_rows &rows, int from)
    {
        if (from == held) return;
        held = from;
        packed<real> d[PACKS] = {};
        FOR_EACH_OF_STRETCH(*this, from, k, c) {
            load_packed(&x[k], row_of(rows.x, n) + first + c, end - c);
            if (rows.dout.p) load_packed(&d[k], row_of(rows.dout, n) + first + c, end - c);
            if (rows.dx.p) load_packed(&dx[k], row_of(rows.dx, n) + first + c, end - c);
        }
        if (!rows.dout.p) return;
        FOR_EACH_OF_STRETCH(*this, from, k, c) {
            g[k] = load_pack(rows.w, 0, first + c, end - c);
            for (int i = 0; i < PACK; i++) g[k].x[i] *= up(d[k].x[i]);
        }
    }

    // Adds up a and b over the threads of the team.
    __device__ static inline void team_sums(wide *a, wide *b)
    {
        __shared__ wide of_warp[2][WARPS];
        for (int d = (TEAM < WARP ? TEAM : WARP) / 2; d; d /= 2) {
            *a += __shfl_xor_sync(0xffffffffu, *a, d);
            *b += __shfl_xor_sync(0xffffffffu, *b, d);
        }
        if (TEAM <= WARP) return;
        __syncthreads();                                        // sums before these may still be read
        if (threadIdx.x % WARP == 0) {
            of_warp[0][threadIdx.x / WARP] = *a;
            of_warp[1][threadIdx.x / WARP] = *b;
        }
        __syncthreads();
        *a = *b = 0;
        for (int w = 0; w < WARPS; w++) *a += of_warp[0][w], *b += of_warp[1][w];
    }

    __device__ inline void find(const normed_rows &rows, wide eps)
    {
        wide sum = 0, sum_g = 0, squares = 0, products = 0;
        for (int from = 0; from < end; from += STRETCH) {
            hold(rows, from);
            FOR_EACH_OF_STRETCH(*this, from, k, c)
                for (int i = 0; i < PACK; i++) sum += up(x[k].x[i]), sum_g += g[k].x[i];
        }
        team_sums(&sum, &sum_g);
        mean = sum / size;
        mean_g = sum_g / size;
        for (int from = 0; from < end; from += STRETCH) {
            hold(rows, from);
            FOR_EACH_OF_STRETCH(*this, from, k, c)
                for (int i = 0; i < PACK; i++) {
                    wide centred = c + i < end ? up(x[k].x[i]) - mean : 0;
                    squares += centred * centred;
                    products += g[k].x[i] * centred;
                }
        }
        team_sums(&squares, &products);
        rho = 1 / sqrt(squares / size + eps);
        along = products * rho / size;
    }
};

#define RUN_LAYERNORM(kernel, x, groups, ...) \
    do { \
        int parts = (x).rows * (groups), heads = THREADS / HEAD_TEAM; \
        if ((x).cols / (groups) > LONGEST_HEAD) RUN(kernel<THREADS>, parts, THREADS, __VA_ARGS__); \
        else RUN(kernel<HEAD_TEAM>, (parts + heads - 1) / heads, THREADS, __VA_ARGS__); \
    } while (0)

// out = w x̂ + b,  x̂ = (x − mean) ρ.  One block: a row, or 32 heads (in float and double fewer).
template <int TEAM> __global__ static void
layernorm_kernel(mat out, normed_rows in, mat b, int groups, wide eps)
{
    part_of_row<TEAM> part(in.x, groups);
    normed_rows rows = {in.x, in.w, mat{}, mat{}};
    part.find(rows, eps);
    for (int from = 0; from < part.end; from += part.STRETCH) {
        part.hold(rows, from);
        FOR_EACH_OF_STRETCH(part, from, k, c) {
            int at = part.first + c, left = part.end - c;
            pack y = load_pack(in.w, 0, at, left), shift = load_pack(b, 0, at, left);
            for (int i = 0; i < PACK; i++)
                y.x[i] = y.x[i] * (up(part.x[k].x[i]) - part.mean) * part.rho + shift.x[i];
            store_pack(row_of(out, part.n) + at, y, left);
        }
    }
}

extern "C" void layernorm_forward(mat out, mat x, mat w, mat b, int groups, double eps)
{
    normed_rows in = {x, w, mat{}, mat{}};
    RUN_LAYERNORM(layernorm_kernel, x, groups, out, in, b, groups, (wide)eps);
}

//  dx += ρ (g − mean(g) − x̂ mean(g x̂)),   g = w dout
// One block: as above. Where `found` has memory, it gets mean and ρ of each part.
template <int TEAM> __global__ static void
layernorm_backward_kernel(wide *found, normed_rows in, int groups, wide eps)
{
    part_of_row<TEAM> part(in.x, groups);
    part.find(in, eps);
    int which = 2 * (part.n * groups + part.first / part.size);
    if (found && part.end && threadIdx.x % TEAM == 0) {
        found[which] = part.mean;
        found[which + 1] = part.rho;
    }
    for (int from = 0; from < part.end && in.dx.p; from += part.STRETCH) {
        part.hold(in, from);
        FOR_EACH_OF_STRETCH(part, from, k, c) {
            pack sum;
            for (int i = 0; i < PACK; i++) {
                wide normed = (up(part.x[k].x[i]) - part.mean) * part.rho;
                wide dx = part.rho * (part.g[k].x[i] - part.mean_g - normed * part.along);
                sum.x[i] = up(part.dx[k].x[i]) + dx;
            }
            store_pack(row_of(in.dx, part.n) + part.first + c, sum, part.end - c);
        }
    }
}

//  dw += Σ_n dout x̂.  One block: 32 columns, of which each of the 8 warps adds up every eighth row.
__global__ static void layernorm_weight_kernel(mat dw, const wide *found, mat dout, mat x, int groups)
{
    int c = blockIdx.x * WARP + threadIdx.x % WARP, group = c / (x.cols / groups);
    wide sum = column_sum(x.rows, c < x.cols, [&](int n) {
        const wide *part = found + 2 * (n * groups + group);
        return up(row_of(dout, n)[c]) * (up(row_of(x, n)[c]) - part[0]) * part[1];
    });
    if (c < x.cols && threadIdx.x < WARP) ((wide *)dw.p)[c] += sum;
}

extern "C" void layernorm_backward(mat dx, mat dw, mat db, mat dout, mat x, mat w, int groups, double eps)
{
    bias_backward(db, dout);
    if (!dx.p && !dw.p) return;
    size_t bytes = (size_t)x.rows * groups * 2 * sizeof(wide);
    wide *found = dw.p ? (wide *)scratch(SUMS_OF_ROWS, bytes) : NULL;
    normed_rows in = {x, w, dout, dx};
    RUN_LAYERNORM(layernorm_backward_kernel, x, groups, found, in, groups, (wide)eps);
    if (dw.p) RUN(layernorm_weight_kernel, (x.cols + WARP - 1) / WARP, THREADS, dw, found, dout, x, groups);
}

// The spans, and for each row the one before it: its number; −1 for zeros; −2 − k for row k of `before`.
static struct { known_spans of; int rows; } placed = {{NULL, NONE_LISTED}, 0};
struct texts { const span *spans; const int *prev; };

static texts place_texts(const span *spans, int count, int rows)
{
    if (count > 65535) fail("shift_mix", "65535 texts at a time at most: raise --accum instead of --batch");
    size_t bytes = count * sizeof *spans;
    char *there = (char *)scratch(TEXTS, bytes + rows * sizeof(int));
    texts t = {(const span *)there, (const int *)(there + bytes)};
    if (placed.rows == rows && placed.of.are(spans, count)) return t;
    char *list = (char *)malloc(bytes + rows * sizeof(int) + 1);
    if (!list) fail("shift_mix", "out of memory");
    int *prev = (int *)(list + bytes);
    memcpy(list, spans, bytes);
    for (int n = 0; n < rows; n++) prev[n] = -1;
    for (int i = 0; i < count; i++)
        for (int n = spans[i].q; n < spans[i].q + spans[i].nq; n++)
            prev[n] = n > spans[i].q ? n - 1 : spans[i].nk > spans[i].nq ? -2 - spans[i].k : -1;
    bytes += rows * sizeof(int);
    check(cudaMemcpy(there, list, bytes, cudaMemcpyHostToDevice), "copying to the device");
    placed.of.become(spans, count);
    placed.rows = rows;
    free(list);
    return t;
}

// The row before row n.
__device__ static inline pack load_before(const mat &x, const mat &before, int prev, int c)
{
    if (prev >= 0) return load_reals(x, prev, c);
    if (prev < -1 && before.p) return load_reals(before, -2 - prev, c);
    return {};
}

// f = μ + m[n]
__device__ static inline pack load_mix(const mat &mu, const mat &m, int n, int c)
{
    pack f = load_pack(mu, 0, c);
    if (!m.p) return f;
    pack more = load_reals(m, n, c);
    for (int i = 0; i < PACK; i++) f.x[i] += more.x[i];
    return f;
}

// out[n] = x[n] + (x[n−1] − x[n]) f.  One block: 32 packs of 8 rows.
__global__ static void shift_mix_kernel(mat out, mat x, mat before, mat mu, mat m, const int *prev)
{
    FOR_EACH_PACK(x.rows, x.cols, n, c) {
        pack a = load_reals(x, n, c), b = load_before(x, before, prev[n], c), f = load_mix(mu, m, n, c);
        for (int i = 0; i < PACK; i++) a.x[i] += (b.x[i] - a.x[i]) * f.x[i];
        store_reals(out, n, c, a);
    }
}

extern "C" void shift_mix_forward(mat out, mat x, mat before, mat mu, mat m, const span *s, int spans)
{
    texts t = place_texts(s, spans, x.rows);
    RUN(shift_mix_kernel, pack_grid(x), THREADS, out, x, before, mu, m, t.prev);
}

//  dx[n] += dout[n] (1 − f[n]) + dout[n+1] f[n+1], the next row of the same span
//  dm[n]  = dout[n] (x[n−1] − x[n])
// One block: 32 packs of 8 rows.
__global__ static void shift_mix_backward_kernel(mat dx, mat dm, mat dout, mat x, mat mu, mat m,
                                                 const int *prev)
{
    FOR_EACH_PACK(x.rows, x.cols, n, c) {
        pack d = load_reals(dout, n, c), f = load_mix(mu, m, n, c);
        if (dm.p) {
            pack a = load_reals(x, n, c), b = load_before(x, mat{}, prev[n], c);
            for (int i = 0; i < PACK; i++) a.x[i] = d.x[i] * (b.x[i] - a.x[i]);
            store_reals(dm, n, c, a);
        }
        if (!dx.p) continue;
        pack sum = load_reals(dx, n, c);
        for (int i = 0; i < PACK; i++) sum.x[i] += d.x[i] * (1 - f.x[i]);
        if (n + 1 < x.rows && prev[n + 1] == n) {
            d = load_reals(dout, n + 1, c);
            f = load_mix(mu, m, n + 1, c);
            for (int i = 0; i < PACK; i++) sum.x[i] += d.x[i] * f.x[i];
        }
        store_reals(dx, n, c, sum);
    }
}

//  dμ += Σ_n dout[n] (x[n−1] − x[n]).  One block: 32 columns, of which each warp adds up every eighth row.
__global__ static void shift_mix_weight_kernel(mat dmu, mat dout, mat x, const int *prev)
{
    int c = blockIdx.x * WARP + threadIdx.x % WARP;
    wide sum = column_sum(x.rows, c < x.cols, [&](int n) {
        wide b = prev[n] >= 0 ? up(row_of(x, prev[n])[c]) : 0;
        return up(row_of(dout, n)[c]) * (b - up(row_of(x, n)[c]));
    });
    if (c < x.cols && threadIdx.x < WARP) ((wide *)dmu.p)[c] += sum;
}

extern "C" void shift_mix_backward(mat dx, mat dmu, mat dm, mat dout, mat x, mat mu, mat m,
                                   const span *s, int spans)
{
    texts t = place_texts(s, spans, x.rows);
    if (dx.p || dm.p) RUN(shift_mix_backward_kernel, pack_grid(x), THREADS, dx, dm, dout, x, mu, m, t.prev);
    if (dmu.p) RUN(shift_mix_weight_kernel, (x.cols + WARP - 1) / WARP, THREADS, dmu, dout, x, t.prev);
}

// One block each: 32 packs of 8 rows.
__global__ static void tanh_kernel(mat y, mat x)
{
    FOR_EACH_PACK(x.rows, x.cols, n, c) {
        pack a = load_reals(x, n, c);
        for (int i = 0; i < PACK; i++) a.x[i] = tanh(a.x[i]);
        store_reals(y, n, c, a);
    }
}

__global__ static void tanh_backward_kernel(mat dx, mat dy, mat y)
{
    FOR_EACH_PACK(y.rows, y.cols, n, c) {
        pack a = load_reals(y, n, c), d = load_reals(dy, n, c);
        for (int i = 0; i < PACK; i++) d.x[i] *= 1 - a.x[i] * a.x[i];
        store_reals(dx, n, c, d);
    }
}

__global__ static void relu2_kernel(mat y, mat x)
{
    FOR_EACH_PACK(x.rows, x.cols, n, c) {
        pack a = load_reals(x, n, c);
        for (int i = 0; i < PACK; i++) a.x[i] = a.x[i] > 0 ? a.x[i] * a.x[i] : 0;
        store_reals(y, n, c, a);
    }
}

__global__ static void relu2_backward_kernel(mat dx, mat dy, mat x)
{
    FOR_EACH_PACK(x.rows, x.cols, n, c) {
        pack a = load_reals(x, n, c), d = load_reals(dy, n, c);
        for (int i = 0; i < PACK; i++) d.x[i] = a.x[i] > 0 ? 2 * a.x[i] * d.x[i] : 0;
        store_reals(dx, n, c, d);
    }
}

// y += σ(r) x
__global__ static void sigmoid_gate_kernel(mat y, mat r, mat x)
{
    FOR_EACH_PACK(x.rows, x.cols, n, c) {
        pack sum = load_reals(y, n, c), g = load_reals(r, n, c), a = load_reals(x, n, c);
        for (int i = 0; i < PACK; i++) sum.x[i] += sigmoid(g.x[i]) * a.x[i];
        store_reals(y, n, c, sum);
    }
}

//  dr = dy x σ (1 − σ),   dx = dy σ
__global__ static void sigmoid_gate_backward_kernel(mat dr, mat dx, mat dy, mat r, mat x)
{
    FOR_EACH_PACK(x.rows, x.cols, n, c) {
        pack d = load_reals(dy, n, c), g = load_reals(r, n, c), a = load_reals(x, n, c);
        for (int i = 0; i < PACK; i++) {
            wide sigma = sigmoid(g.x[i]);
            a.x[i] *= d.x[i] * sigma * (1 - sigma);
            d.x[i] *= sigma;
        }
        store_reals(dr, n, c, a);
        store_reals(dx, n, c, d);
    }
}

extern "C" void tanh_forward(mat y, mat x) { RUN(tanh_kernel, pack_grid(x), THREADS, y, x); }
extern "C" void relu2_forward(mat y, mat x) { RUN(relu2_kernel, pack_grid(x), THREADS, y, x); }

extern "C" void tanh_backward(mat dx, mat dy, mat y)
{
    RUN(tanh_backward_kernel, pack_grid(y), THREADS, dx, dy, y);
}

extern "C" void relu2_backward(mat dx, mat dy, mat x)
{
    RUN(relu2_backward_kernel, pack_grid(x), THREADS, dx, dy, x);
}

extern "C" void sigmoid_gate_forward(mat y, mat r, mat x)
{
    RUN(sigmoid_gate_kernel, pack_grid(x), THREADS, y, r, x);
}

extern "C" void sigmoid_gate_backward(mat dr, mat dx, mat dy, mat r, mat x)
{
    RUN(sigmoid_gate_backward_kernel, pack_grid(x), THREADS, dr, dx, dy, r, x);
}

/* The recurrence: y[t] = r[t] (S + diag(u) k[t]ᵀ v[t]),  S = diag(e[t]) S + k[t]ᵀ v[t],  e = exp(−exp(w)).
   One block has one head of one text and walks through its tokens: D threads, a channel of the head each, of
   which those beyond its d are zero. S and its gradient are cut into the registers of the threads. Shared
   memory hands a warp 128 bytes at a time, so what is read there should serve as many numbers of S as it can:
   four neighbouring threads have four lines (rows or columns) of S, and each thread a quarter of all four. */
struct wkv_inputs { mat r, k, v, w, u, dy; };

template <int D> struct quarters {
    enum { ACROSS = D / 4 };
    wide x[4][ACROSS];
    // Which line, and where across it, x[a][b] is. Neighbours read 16 bytes side by side.
    __device__ static inline int line(int a) { return (int)threadIdx.x / 4 * 4 + a; }
    __device__ static inline int across(int b) { return b / 4 * 16 + (int)threadIdx.x % 4 * 4 + b % 4; }

    template <class F> __device__ inline void for_each(F f)
    {
        UNROLL for (int b = 0; b < ACROSS; b++)
            UNROLL for (int a = 0; a < 4; a++) f(line(a), across(b), x[a][b]);
    }

    // Line threadIdx.x times a vector. A thread has a quarter of the sums of four lines: two of them it gives
    // to the thread two lanes off, which gives it the like of the other two, then one to its neighbour.
    __device__ inline wide times(const wide *vector) const
    {
        wide sum[4] = {};
        UNROLL for (int b = 0; b < ACROSS; b++)
            UNROLL for (int a = 0; a < 4; a++) sum[a] += x[a][b] * vector[across(b)];
        bool upper = threadIdx.x & 2, odd = threadIdx.x & 1;    // which of the four lines is the thread's own
        wide x0 = upper ? sum[2] : sum[0], x1 = upper ? sum[3] : sum[1];
        x0 += __shfl_xor_sync(0xffffffffu, upper ? sum[0] : sum[2], 2);
        x1 += __shfl_xor_sync(0xffffffffu, upper ? sum[1] : sum[3], 2);
        return (odd ? x1 : x0) + __shfl_xor_sync(0xffffffffu, odd ? x0 : x1, 1);
    }

    // Each line times its own number of e, or each place across; and an outer product added.
    __device__ inline void fade_lines(const wide *e)
    {
        for_each([&](int line, int, wide &x) { x *= e[line]; });
    }
    __device__ inline void fade_across(const wide *e)
    {
        for_each([&](int, int across, wide &x) { x *= e[across]; });
    }
    __device__ inline void add(const wide *of_line, const wide *of_across)
    {
        for_each([&](int line, int across, wide &x) { x += of_line[line] * of_across[across]; });
    }
};

// The sum of term(i) over all channels i: a thread adds up a quarter, and its neighbours the others.
template <int D, class Term> __device__ static inline wide channel_sum(Term term)
{
    wide sum = 0;
    UNROLL for (int b = 0; b < D / 4; b++) sum += term(quarters<D>::across(b));
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    return sum + __shfl_xor_sync(0xffffffffu, sum, 2);
}

// Tokens are fetched 8 at a time (4 in double): while a block walks through those that lie in shared memory,
// the next are on their way to its registers. So barriers and latency are paid once for all of them. A thread
// fetches a pack of r, k, v, w and dy each; of numbers wider than bf16 two.
enum { FETCHED = 32 / sizeof(wide), FETCHES = FETCHED / PACK };

template <int D> struct alignas(16) wkv_token { wide r[D], k[D], v[D], e[D], dy[D], exp_w[D], Sdy[D]; };

struct wkv_packs {
    packed<real> r, k, v, w, dy;
    packed<wide> Sdy;
    __device__ inline void fetch(const wkv_inputs &in, const mat &sums, int n, int c, int cols)
    {
        load_packed(&r, row_of(in.r, n) + c, cols);
        load_packed(&k, row_of(in.k, n) + c, cols);
        load_packed(&v, row_of(in.v, n) + c, cols);
        load_packed(&w, row_of(in.w, n) + c, cols);
        if (in.dy.p) load_packed(&dy, row_of(in.dy, n) + c, cols);
        if (sums.p) load_packed(&Sdy, (const wide *)sums.p + n * sums.ld + c, cols);
    }
    template <int D> __device__ inline void put(wkv_token<D> *t, int c) const
    {
        for (int i = 0; i < PACK; i++) {
            t->r[c + i] = up(r.x[i]);
            t->k[c + i] = up(k.x[i]);
            t->v[c + i] = up(v.x[i]);
            t->dy[c + i] = up(dy.x[i]);
            t->Sdy[c + i] = Sdy.x[i];
            t->exp_w[c + i] = exp(up(w.x[i]));
            t->e[c + i] = exp(-t->exp_w[c + i]);
        }
    }
};

// Calls token(n, t) for all rows n of a text, in their order (step 1) or the last first (step −1).
template <int D, class Token>
__device__ static inline void walk(wkv_token<D> *t, const wkv_inputs &in, const mat &sums,
                                   const span &s, int step, Token token)
{
    int d = in.u.cols, begin = step > 0 ? s.q : s.q + s.nq - 1;
    int which = threadIdx.x / (D / PACK), c = threadIdx.x % (D / PACK) * PACK;      // this thread's pack
    wkv_packs next[FETCHES] = {};
    auto fetch = [&](int first) {
        UNROLL for (int f = 0; f < FETCHES; f++) {
            int m = first + f * PACK + which;
            next[f].fetch(in, sums, begin + step * m, blockIdx.x * d + c, m < s.nq ? d - c : 0);
        }
    };
    __syncthreads();                                            // what others wrote to `sums` is there
    fetch(0);
    for (int first = 0; first < s.nq; first += FETCHED) {
        __syncthreads();                                        // the tokens before may still be read
        UNROLL for (int f = 0; f < FETCHES; f++) next[f].put(&t[f * PACK + which], c);
        __syncthreads();
        fetch(first + FETCHED);
        for (int i = 0; i < FETCHED && first + i < s.nq; i++) token(begin + step * (first + i), t[i]);
    }
}

template <int D> __device__ static inline wide bonus_of(const wkv_inputs &in, int h)
{
    int i = threadIdx.x;
    return i < in.u.cols ? load(in.u.p, in.u.type, h * in.u.ld + i) : 0;
}

// The lines of S are its columns. state: S of the text comes from there and goes back. That it is read in a
// branch and its places are unsigned is for the compiler: else registers hold all places during the walk.
template <int D> __global__ static void __launch_bounds__(D)
wkv6_kernel(mat y, mat state, wkv_inputs in, const span *spans)
{
    __shared__ wkv_token<D> tokens[FETCHED];
    __shared__ wide u[D];
    int h = blockIdx.x, j = threadIdx.x, d = in.u.cols;
    span s = spans[blockIdx.y];
    wide *kept = state.p ? (wide *)state.p + s.k * state.ld + (size_t)h * d * d : NULL;
    quarters<D> S = {};
    u[j] = bonus_of<D>(in, h);
    auto is_kept = [&](int column, int row) { return kept && column < d && row < d; };
    auto at = [&](int column, int row) { return (unsigned)(row * d + column); };
    if (s.nk > s.nq)
        S.for_each([&](int column, int row, wide &x) {
            if (is_kept(column, row)) x = kept[at(column, row)];
        });
    walk<D>(tokens, in, mat{}, s, 1, [&](int n, const wkv_token<D> &t) {
        wide ruk = channel_sum<D>([&](int i) { return t.r[i] * u[i] * t.k[i]; });
        wide out = S.times(t.r) + ruk * t.v[j];
        S.fade_across(t.e);
        S.add(t.v, t.k);
        if (j < d) down(&row_of(y, n)[h * d + j], out);
    });
    S.for_each([&](int column, int row, wide &x) { if (is_kept(column, row)) kept[at(column, row)] = x; });
}

// A kernel for heads of at most 32, 64 or 128 channels.
#define RUN_WKV(kernel, d, grid, ...) \
    do { \
        if (d <= 32) RUN(kernel<32>, grid, 32, __VA_ARGS__); \
        else if (d <= 64) RUN(kernel<64>, grid, 64, __VA_ARGS__); \
        else RUN(kernel<128>, grid, 128, __VA_ARGS__); \
    } while (0)

extern "C" void wkv6_forward(mat y, mat state, mat r, mat k, mat v, mat w, mat u, const span *s, int spans)
{
    if (u.cols > MOST_HEAD_DIM) fail("wkv6", "heads of more than 128 numbers are not built for a GPU");
    texts t = place_texts(s, spans, r.rows);
    wkv_inputs in = {r, k, v, w, u, mat{}};
    RUN_WKV(wkv6_kernel, u.cols, dim3(u.rows, spans), y, state, in, t.spans);
}

//  dv_j = Σ_i dS[i][j] k_i  + (Σ_i r_i u_i k_i) dy_j,   then   dS[i][j] = e_i dS[i][j] + r_i dy_j
// From the last token to the first. The lines of dS are its columns.
template <int D> __global__ static void __launch_bounds__(D)
wkv6_value_kernel(mat dv, wkv_inputs in, const span *spans)
{
    __shared__ wkv_token<D> tokens[FETCHED];
    __shared__ wide u[D];
    int h = blockIdx.x, j = threadIdx.x, d = in.u.cols;
    quarters<D> dS = {};
    u[j] = bonus_of<D>(in, h);
    walk<D>(tokens, in, mat{}, spans[blockIdx.y], -1, [&](int n, const wkv_token<D> &t) {
        wide ruk = channel_sum<D>([&](int i) { return t.r[i] * u[i] * t.k[i]; });
        wide out = dS.times(t.k) + ruk * t.dy[j];
        dS.fade_across(t.e);
        dS.add(t.dy, t.r);
        if (j < d) down(&row_of(dv, n)[h * d + j], out);
    });
}

struct wkv_grads { mat r, k, w, u; };

//  dr_i = Σ_j S[i][j] dy_j  + u_i k_i (v·dy)
//  dk_i = Σ_j dS[i][j] v_j  + u_i r_i (v·dy),   du_i += r_i k_i (v·dy)
//  dw_i = −exp(w_i) q_i,   q_i = e_i Σ_j dS[i][j] S[i][j]
//  S is known on the way forward only, dS on the way back only. But q needs neither: between two tokens let
//  p_i = Σ_j of S[i][j] times its gradient. Then
//      p behind the token  = Σ_j dS[i][j] (e_i S[i][j] + k_i v_j)   = q_i + k_i Σ_j dS[i][j] v_j
//      p in front of it    = Σ_j (e_i dS[i][j] + r_i dy_j) S[i][j]  = q_i + r_i Σ_j S[i][j] dy_j
//  so p runs from 0 behind the last token to the first, and leaves q on its way. An e that is nothing beside
//  1 leaves none: what rounding leaves there, exp(w) would blow up.
// The lines are rows. The way forward leaves Σ_j S[i][j] dy_j in `sums`, for the way back.
// A block adds up du of its texts in their order.
template <int D> __global__ static void __launch_bounds__(D)
wkv6_backward_kernel(wkv_grads out, mat sums, wkv_inputs in, const span *spans, int count)
{
    __shared__ wkv_token<D> tokens[FETCHED];
    int h = blockIdx.x, i = threadIdx.x, d = in.u.cols, c = h * d + i;
    wide u = bonus_of<D>(in, h), du = 0;
    for (int which = blockIdx.y; which < count; which += gridDim.y) {
        span s = spans[which];
        quarters<D> S = {};
        walk<D>(tokens, in, mat{}, s, 1, [&](int n, const wkv_token<D> &t) {
            wide Sdy = S.times(t.dy);
            S.fade_lines(t.e);
            S.add(t.k, t.v);
            if (i < d) ((wide *)sums.p)[n * sums.ld + c] = Sdy;
        });
        quarters<D> dS = {};
        wide p = 0;
        walk<D>(tokens, in, sums, s, -1, [&](int n, const wkv_token<D> &t) {
            wide vdy = channel_sum<D>([&](int j) { return t.v[j] * t.dy[j]; }), dSv = dS.times(t.v);
            dS.fade_lines(t.e);
            dS.add(t.r, t.dy);
            wide q = 1 + t.e[i] > 1 ? p - t.k[i] * dSv : 0;
            p = q + t.r[i] * t.Sdy[i];
            du += t.r[i] * t.k[i] * vdy;
            if (i >= d) return;
            down(&row_of(out.r, n)[c], t.Sdy[i] + u * t.k[i] * vdy);
            down(&row_of(out.k, n)[c], dSv + u * t.r[i] * vdy);
            down(&row_of(out.w, n)[c], -t.exp_w[i] * q);
        });
    }
    if (out.u.p && i < d) ((wide *)out.u.p)[h * out.u.ld + i] += du;
}

// Where u trains, the texts of a head are one block's, so that their du are added up in one order.
extern "C" void wkv6_backward(mat dr, mat dk, mat dv, mat dw, mat du, mat dy,
                              mat r, mat k, mat v, mat w, mat u, const span *s, int spans)
{
    texts t = place_texts(s, spans, r.rows);
    wkv_inputs in = {r, k, v, w, u, dy};
    wkv_grads out = {dr, dk, dw, du};
    size_t bytes = (size_t)r.rows * r.cols * sizeof(wide);
    mat sums = contiguous(r, scratch(RECURRENT, bytes), TYPE_OF(wide));
    RUN_WKV(wkv6_value_kernel, u.cols, dim3(u.rows, spans), dv, in, t.spans);
    RUN_WKV(wkv6_backward_kernel, u.cols, dim3(u.rows, du.p ? 1 : spans), out, sums, in, t.spans, spans);
}

// ---- 6  adapters ------------------------------------------------------------------------------------------

// s[n, c] = Σ_j x[n, j·r + c].  One block: 8 rows, a warp each. With r of 4 packs, say, the 32 lanes read 8
// shards abreast: lane l adds up pack l % 4 of the shards l / 4, l / 4 + 8, …. Then lanes 0 … 3 add up the 8
// sums of their pack, in order. Where r has more packs than a warp has lanes, it takes 32 of them at a time.
__global__ static void shard_sum_kernel(mat s, mat x)
{
    __shared__ pack of_thread[THREADS];
    int lane = threadIdx.x % WARP, r = s.cols, packs = filled(r) / PACK < WARP ? filled(r) / PACK : WARP;
    int abreast = WARP / packs;
    for (int n = blockIdx.y * WARPS + threadIdx.x / WARP; n < s.rows; n += gridDim.y * WARPS)
        for (int first = 0; first < r; first += packs * PACK) {
            int c = first + lane % packs * PACK;
            pack sum = {};
            for (int i = lane / packs * r + c; i < x.cols && lane < abreast * packs; i += abreast * r) {
                pack term = load_pack(row_of(x, n) + i, x.cols - i);     // beyond r: not stored
                for (int k = 0; k < PACK; k++) sum.x[k] += term.x[k];
            }
            of_thread[threadIdx.x] = sum;
            __syncwarp();
            for (int j = 1; j < abreast && lane < packs; j++)
                for (int k = 0; k < PACK; k++) sum.x[k] += of_thread[threadIdx.x + j * packs].x[k];
            if (lane < packs) store_reals(s, n, c, sum);
            __syncwarp();
        }
}

extern "C" void shard_sum(mat s, mat x)
{
    RUN(shard_sum_kernel, pack_grid(s.rows, 1, 1), THREADS, s, x);
}

__host__ __device__ static inline int shards(int cols, int r) { return (cols + r - 1) / r; }

// x[n, j·r + c] += s[n, c].  One block: 8 rows of x, of each 32 packs, counted as if each shard were filled
// up to whole packs. The dtypes are known to the compiler: asking for them took a third of the time.
template <class X, class S> __global__ static void shard_tile_kernel(mat x, mat s)
{
    int r = s.cols;
    FOR_EACH_PACK(x.rows, shards(x.cols, r) * filled(r), n, p) {
        int c = p % filled(r), col = p / filled(r) * r + c;
        int left = x.cols - col < r - c ? x.cols - col : r - c;
        X *to = (X *)x.p + n * x.ld + col;
        pack sum = load_pack(to, left), term = load_pack((const S *)s.p + n * s.ld + c, r - c);
        for (int i = 0; i < PACK; i++) sum.x[i] += term.x[i];
        store_pack(to, sum, left);
    }
}

extern "C" void shard_tile(mat x, mat s)
{
    if (!x.p) return;
    dim3 grid = pack_grid(x.rows, shards(x.cols, s.cols) * filled(s.cols), 1);
    bool real_x = x.type == TYPE_OF(real), real_s = s.type == TYPE_OF(real);
    if (!(real_x || x.type == TYPE_OF(wide)) || !(real_s || s.type == TYPE_OF(wide)))
        fail("shard_tile", "not built for this dtype");
    if (real_x && real_s) RUN((shard_tile_kernel<real, real>), grid, THREADS, x, s);
    else if (real_s) RUN((shard_tile_kernel<wide, real>), grid, THREADS, x, s);
    else if (real_x) RUN((shard_tile_kernel<real, wide>), grid, THREADS, x, s);
    else RUN((shard_tile_kernel<wide, wide>), grid, THREADS, x, s);
}

// ---- bat-row's block-diagonal products ----
//
//  u_j = x_j B_jᵀ,      x̃ = x + u,             sum = Σ_j u_j
//  du_j = dx̃_j + g,     dB_j += du_jᵀ x_j,     dx_j = or += dx̃_j + du_j B_j
//
// They do little arithmetic with each number of x, so what counts is that x is read once and u and du are
// never in memory. B_j is cut into squares of 64 by 64, which a short last one fills up with zeros:
//
//     x_0    │x_1    │x_2    │           a block of threads has KEPT_ROWS rows, and one square's columns of
//     □ □    │□ □    │□ □    │           each x_j. It walks from left to right, over all squares beside
//     with a rank of 128, say            its own in x_j, and takes its own last. Some blocks of threads share
//                                        the way, an equal part each: one alone would leave memory idle.
enum { SQUARE = 64, OF_ROWS = tile_size<KEPT_ROWS, SQUARE>(), OF_B = tile_size<SQUARE, SQUARE>() };

struct squares {
    int r, across, own, width;                          // its own square begins at column `own` of a block
    __device__ squares(int r, int which)
        : r(r), across((r + SQUARE - 1) / SQUARE), own(which * SQUARE), width(columns(own)) {}
    __device__ int columns(int first) const { return r - first < SQUARE ? r - first : SQUARE; }
    __device__ int block(int step) const { return step / across; }
    __device__ int first(int step) const { return (own / SQUARE + 1 + step % across) % across * SQUARE; }
    __device__ bool is_own(int step) const { return step % across == across - 1; }
    // the steps of this block of threads: its part of all x_j
    __device__ int part(int count) const { return (count + gridDim.z - 1) / gridDim.z * across; }
    __device__ int begin(int count) const { return blockIdx.z * part(count); }
    __device__ int end(int count) const
    {
        int end = begin(count) + part(count);
        return end < count * across ? end : count * across;
    }
};

__device__ static inline mat block_of(mat B, int j)
{
    B.p = (real *)B.p + j * B.stride;
    return B;
}

// The tile, which is x's or dx̃'s own square, + u becomes columns col … of out; and out's own are added.
__device__ static inline
void store_sum(const mat &out, int row, int rows, int col, int cols,
               real *tile, wide_pair (&u)[SQUARE / 8][2], enum mode mode)
{
    constexpr int PACKS = SQUARE / PACK;
    const int warp_row = threadIdx.x / WARP * 16, lane = threadIdx.x % WARP;
    UNROLL for (int n = 0; n < SQUARE / 8; n++)
        UNROLL for (int i = 0; i < 2; i++) {
            place p = place_of(n, i);
            real_pair *at = (real_pair *)(tile + in_tile<KEPT_ROWS>(warp_row + p.row, p.col));
            *at = pair_up<real>(up(at->x) + u[n][i].x, up(at->y) + u[n][i].y);
        }
    __syncwarp();                                       // a warp has all of its 16 rows
    for (int p = lane; p < 16 * PACKS; p += WARP) {
        int r = warp_row + p / PACKS, c = p % PACKS * PACK;
        if (r >= rows || c >= cols) continue;
        real *to = row_of(out, row + r) + col + c;
        pack sum = load_pack(tile + in_tile<KEPT_ROWS>(r, c), PACK), before = {};
        if (mode == ADD) before = load_pack(to, cols - c);
        for (int e = 0; e < PACK; e++) sum.x[e] += before.x[e];
        store_pack(to, sum, cols - c);
    }
}

// What the warps have of a sum of rows: 16 rows a warp, which lies row after row in memory.
template <int N> __device__ static inline
void leave_sum(wide *to, int ld, int rows, int cols, int col, wide_pair (&c)[N][2])
{
    UNROLL for (int j = 0; j < 2 * N; j++) {
        place p = place_of(j / 2, j % 2);
        int c0 = col + p.col;
        if (p.row < rows && c0 < cols) to[(size_t)p.row * ld + c0] = c[j / 2][j % 2].x;
        if (p.row < rows && c0 + 1 < cols) to[(size_t)p.row * ld + c0 + 1] = c[j / 2][j % 2].y;
    }
}

// One block: KEPT_ROWS rows, and one square's columns of its part of the x_j. It leaves its part of Σ_j u_j.
__global__ static void __launch_bounds__(ATTENTION_THREADS, 1)
block_diagonal_kernel(mat x_tilde, wide *sums, mat x, mat B, int r)
{
    SHARED_MEMORY(real, memory);
    enum { AHEAD = 2, ROOMS = AHEAD + 1 };
    real *X = memory, *W = X + ROOMS * OF_ROWS;
    const squares s(r, blockIdx.y);
    const int row = blockIdx.x * KEPT_ROWS, begin = s.begin(x.cols / r), end = s.end(x.cols / r);
    const int rows = x.rows - row < KEPT_ROWS ? x.rows - row : KEPT_ROWS, warp_row = threadIdx.x / WARP * 16;
    auto fetch_step = [&](int step) {
        if (step < end) {
            int j = s.block(step), first = s.first(step), room = step % ROOMS;
            fetch<KEPT_ROWS, SQUARE>(X + room * OF_ROWS, x, row, rows, j * r + first, s.columns(first));
            fetch<SQUARE, SQUARE>(W + room * OF_B, block_of(B, j), s.own, s.width, first, s.columns(first));
        }
        __pipeline_commit();
    };
    wide_pair part[SQUARE / 8][2], u[SQUARE / 8][2] = {}, total[SQUARE / 8][2] = {};
    for (int step = begin; step < begin + AHEAD; step++) fetch_step(step);
    for (int step = begin; step < end; step++) {
        real *tile = X + step % ROOMS * OF_ROWS;
        arrived<AHEAD - 1>();
        fetch_step(step + AHEAD);
        rows_by_rows<SQUARE, SQUARE>(part, tile, W + step % ROOMS * OF_B);              // u_j += x_j B_jᵀ
        finished<0>(part);
        add_pairs(u, part);
        if (!s.is_own(step)) continue;
        add_pairs(total, u);
        store_sum(x_tilde, row, rows, s.block(step) * r + s.own, s.width, tile, u, SET);
        UNROLL for (int n = 0; n < SQUARE / 8; n++) u[n][0] = u[n][1] = {0, 0};
    }
    sums += ((size_t)blockIdx.z * x.rows + row + warp_row) * r + s.own;
    leave_sum(sums, r, rows - warp_row, s.width, 0, total);
}

// dx.  One block: KEPT_ROWS rows, and one square's columns of its part of the dx_j. g has one square as a
// rule, which is then fetched once.
template <int AHEAD> __global__ static void __launch_bounds__(ATTENTION_THREADS, 1)
block_diagonal_dx_kernel(mat dx, mat dx_tilde, mat g, mat B, int r, enum mode mode)
{
    SHARED_MEMORY(real, memory);
    enum { ROOMS = AHEAD + 1 };
    real *X = memory, *W = X + ROOMS * OF_ROWS, *G = W + ROOMS * OF_B;
    const squares s(r, blockIdx.y);
    const int row = blockIdx.x * KEPT_ROWS, begin = s.begin(dx.cols / r), end = s.end(dx.cols / r);
    const int rows = dx.rows - row < KEPT_ROWS ? dx.rows - row : KEPT_ROWS;
    auto room_of_g = [&](int step) { return s.across == 1 ? 0 : step % ROOMS; };
    auto fetch_step = [&](int step) {
        if (step < end) {
            int j = s.block(step), first = s.first(step), n = s.columns(first), room = step % ROOMS;
            fetch<KEPT_ROWS, SQUARE>(X + room * OF_ROWS, dx_tilde, row, rows, j * r + first, n);
            fetch<SQUARE, SQUARE>(W + room * OF_B, block_of(B, j), first, n, s.own, s.width);
            if (step == begin || s.across > 1)
                fetch<KEPT_ROWS, SQUARE>(G + room_of_g(step) * OF_ROWS, g, row, rows, first, n);
        }
        __pipeline_commit();
    };
    wide_pair du[SQUARE / 8][2], v[SQUARE / 8][2] = {};
    for (int step = begin; step < begin + AHEAD; step++) fetch_step(step);
    for (int step = begin; step < end; step++) {
        real *tile = X + step % ROOMS * OF_ROWS;
        arrived<AHEAD - 1>();
        fetch_step(step + AHEAD);
        UNROLL for (int j = 0; j < SQUARE / 4; j++) {                                   // du_j = dx̃_j + g
            place p = place_of(j / 2, j % 2);
            int at = in_tile<KEPT_ROWS>(threadIdx.x / WARP * 16 + p.row, p.col);
            real_pair a = *(real_pair *)(tile + at), b = *(real_pair *)(G + room_of_g(step) * OF_ROWS + at);
            du[j / 2][j % 2] = {up(a.x) + up(b.x), up(a.y) + up(b.y)};
        }
        add_product<SQUARE, SQUARE>(v, du, W + step % ROOMS * OF_B);                    // dx_j += du_j B_j
        finished<0>(v);
        if (!s.is_own(step)) continue;
        store_sum(dx, row, rows, s.block(step) * r + s.own, s.width, tile, v, mode);    // dx_j += dx̃_j
        UNROLL for (int n = 0; n < SQUARE / 8; n++) v[n][0] = v[n][1] = {0, 0};
    }
}

// dB.  One block: a square of one dB_j, from a slice of the rows, of which it leaves the sum. A warp has 16
// of the square's rows.
__global__ static void __launch_bounds__(ATTENTION_THREADS, 1)
block_diagonal_db_kernel(mat dB, wide *sums, mat dx_tilde, mat g, mat x)
{
    SHARED_MEMORY(real, memory);
    enum { ROOMS = 2, COLUMNS = SQUARE / GROUPS };      // of the square: a group of warps has so many
    real *X = memory, *U = X + ROOMS * OF_ROWS, *G = U + ROOMS * OF_ROWS;
    const int r = dB.rows, across = (r + SQUARE - 1) / SQUARE, j = blockIdx.x / (across * across);
    const squares down(r, blockIdx.x / across % across), over(r, blockIdx.x % across);
    const int tiles = (x.rows + KEPT_ROWS - 1) / KEPT_ROWS, each = (tiles + gridDim.y - 1) / gridDim.y;
    const int first = blockIdx.y * each, last = first + each < tiles ? first + each : tiles;
    const int lane = threadIdx.x % WARP, warp_row = threadIdx.x / WARP % 4 * 16;
    const int col = threadIdx.x / WARP / 4 * COLUMNS;
    auto fetch_step = [&](int i) {
        int row = i * KEPT_ROWS, room = i % ROOMS * OF_ROWS;
        if (i < last) {
            fetch<KEPT_ROWS, SQUARE>(X + room, x, row, x.rows - row, j * r + over.own, over.width);
            fetch<KEPT_ROWS, SQUARE>(U + room, dx_tilde, row, x.rows - row, j * r + down.own, down.width);
            fetch<KEPT_ROWS, SQUARE>(G + room, g, row, x.rows - row, down.own, down.width);
        }
        __pipeline_commit();
    };
    wide_pair c[COLUMNS / 8][2] = {};
    fetch_step(first);
    for (int i = first; i < last; i++) {
        const int room = i % ROOMS * OF_ROWS;
        arrived();
        fetch_step(i + 1);
        for (int n = 0; n < KEPT_ROWS; n += 16) {                       // c += (dx̃_j + g)ᵀ x_j
            real_pair u[4], v[4], y[4];
            int at = in_tile<KEPT_ROWS>(n + lane % 8 + lane / 16 * 8, warp_row + lane / 8 % 2 * 8);
            load_transposed(u, U + room + at);
            load_transposed(v, G + room + at);
            UNROLL for (int k = 0; k < COLUMNS; k += 16) {
                load_transposed(y, X + room + in_tile<KEPT_ROWS>(n + lane % 16, col + k + lane / 16 * 8));
                mma(c[k / 8], u, y);
                mma(c[k / 8 + 1], u, y + 2);
                mma(c[k / 8], v, y);
                mma(c[k / 8 + 1], v, y + 2);
            }
        }
    }
    sums += (((size_t)blockIdx.y * dB.batch + j) * r + down.own + warp_row) * r + over.own;
    leave_sum(sums, r, down.width - warp_row, over.width, col, c);
}

// y = or += Σ over the slices, in their order.  One block: 256 numbers, one a thread.
template <class T> __global__ static
void add_slices_kernel(mat y, const wide *sums, int slices, enum mode mode)
{
    size_t i = (size_t)blockIdx.x * THREADS + threadIdx.x, each = (size_t)y.rows * y.cols, n = y.batch * each;
    if (i >= n) return;
    T *to = (T *)y.p + index_of(y, i / each, i / y.cols % y.rows, i % y.cols);
    wide sum = mode == ADD ? up(*to) : 0;
    for (int s = 0; s < slices; s++) sum += sums[s * n + i];
    down(to, sum);
}

static int square_tiles(int of_rows, int of_b)
{
    return (of_rows * OF_ROWS + of_b * OF_B) * (int)sizeof(real);
}

static dim3 square_grid(const mat &x, int r, int parts)
{
    return dim3((x.rows + KEPT_ROWS - 1) / KEPT_ROWS, (r + SQUARE - 1) / SQUARE, parts);
}

// In how many parts work is cut that `blocks` would do: as many as give each multiprocessor of a large card
// four, but no more than the work has, or than there is room for their sums.
static int parts_of(int blocks, int most, size_t room)
{
    enum { ENOUGH_BLOCKS = 512 };
    int parts = ENOUGH_BLOCKS / blocks;
    if (parts > most) parts = most;
    if (parts > (int)room) parts = (int)room;
    return parts > 1 ? parts : 1;
}

template <class T> static void add_slices(mat y, const wide *sums, int slices, enum mode mode)
{
    int blocks = (int)((elements_of(y) + THREADS - 1) / THREADS);
    RUN(add_slices_kernel<T>, blocks, THREADS, y, sums, slices, mode);
}

extern "C" void block_diagonal_forward(mat x_tilde, mat sum, mat x, mat B, mat room)
{
    int r = B.rows;
    mat real_B = factor(B, TYPE_OF(real), FACTOR_B);
    dim3 grid = square_grid(x, r, 1);
    grid.z = parts_of(grid.x * grid.y, B.batch, bytes_of(room) / (elements_of(sum) * sizeof(wide)));
    RUN_SHARED(block_diagonal_kernel, grid, square_tiles(3, 3),
               x_tilde, (wide *)room.p, x, real_B, r);
    add_slices<real>(sum, (wide *)room.p, grid.z, SET);
}

extern "C" void block_diagonal_backward(mat dx, mat dB, mat dx_tilde, mat g, mat x, mat B, mat room,
                                        enum mode mode)
{
    int r = B.rows, across = (r + SQUARE - 1) / SQUARE, squares_of_B = B.batch * across * across;
    int tiles = (x.rows + KEPT_ROWS - 1) / KEPT_ROWS;
    if (dB.p) {
        int slices = parts_of(squares_of_B, tiles, bytes_of(room) / bytes_of(dB));
        RUN_SHARED(block_diagonal_db_kernel, dim3(squares_of_B, slices), square_tiles(6, 0),
                   dB, (wide *)room.p, dx_tilde, g, x);
        add_slices<wide>(dB, (wide *)room.p, slices, ADD);
    }
    if (!dx.p) return;
    mat real_B = factor(B, TYPE_OF(real), FACTOR_B);
    dim3 grid = square_grid(x, r, parts_of(tiles * across, B.batch, B.batch));
    if (across == 1 && has_room(block_diagonal_dx_kernel<2>, square_tiles(4, 3)))
        RUN_SHARED((block_diagonal_dx_kernel<2>), grid, square_tiles(4, 3), dx, dx_tilde, g, real_B, r, mode);
    else
        RUN_SHARED((block_diagonal_dx_kernel<1>), grid, square_tiles(4, 2), dx, dx_tilde, g, real_B, r, mode);
}

// e[i, j] = 1 where i − j is a multiple of r, else 0.  One block: 32 packs of 8 rows.
__global__ static void tiled_identity_kernel(mat e, int r)
{
    FOR_EACH_PACK(e.rows, e.cols, i, j) {
        pack ones;
        for (int k = 0; k < PACK; k++) ones.x[k] = i % r == (j + k) % r;
        store_reals(e, i, j, ones);
    }
}

extern "C" void tiled_identity(mat e)
{
    int r = e.rows < e.cols ? e.rows : e.cols;
    RUN(tiled_identity_kernel, pack_grid(e), THREADS, e, r);
}

// y = or += scale x ⊙ g; g is (1, cols) or (rows, 1), and repeated along the other side.
// One block: 32 packs of 8 rows.
__global__ static void broadcast_mul_kernel(mat y, mat x, mat g, wide scale, enum mode mode)
{
    FOR_EACH_PACK(x.rows, x.cols, n, c) {
        int row_of_g = g.rows > 1 ? n : 0;
        pack product = load_pack(x, n, c), sum = {};
        pack factor = load_pack(g, row_of_g, g.cols > 1 ? c : 0);
        if (mode == ADD) sum = load_pack(y, n, c);
        for (int i = 0; i < PACK; i++)
            sum.x[i] += scale * product.x[i] * factor.x[g.cols > 1 ? i : 0];
        store_pack(y, n, c, sum);
    }
}

extern "C" void broadcast_mul(mat y, mat x, mat g, double scale, enum mode mode)
{
    if (y.p) RUN(broadcast_mul_kernel, pack_grid(x), THREADS, y, x, g, (wide)scale, mode);
}

__device__ static inline wide product_at(const mat &x, const mat &y, int n, int c)
{
    return load(x.p, x.type, index_of(x, 0, n, c)) * load(y.p, y.type, index_of(y, 0, n, c));
}

// g[n] = or += scale x_n · y_n.  One block a row.
__global__ static void row_dots_kernel(mat g, mat x, mat y, wide scale, enum mode mode)
{
    wide sum = 0;
    for (int c = threadIdx.x * PACK; c < x.cols; c += THREADS * PACK) {
        pack a = load_pack(x, blockIdx.x, c), b = load_pack(y, blockIdx.x, c);
        for (int i = 0; i < PACK; i++) sum += a.x[i] * b.x[i];
    }
    sum = scale * block_sum(sum);
    wide *gn = (wide *)g.p + index_of(g, 0, blockIdx.x, 0);
    if (threadIdx.x == 0) *gn = (mode == ADD ? *gn : 0) + sum;
}

// g[c] = or += scale Σ_n x[n, c] y[n, c].  One block: 32 columns, of which each of the 8 warps adds up every
// eighth row.
__global__ static void column_dots_kernel(mat g, mat x, mat y, wide scale, enum mode mode)
{
    int c = blockIdx.x * WARP + threadIdx.x % WARP;
    wide sum = scale * column_sum(x.rows, c < x.cols, [&](int n) { return product_at(x, y, n, c); });
    wide *gc = (wide *)g.p + c;
    if (c < x.cols && threadIdx.x < WARP) *gc = (mode == ADD ? *gc : 0) + sum;
}

extern "C" void broadcast_dot(mat g, mat x, mat y, double scale, enum mode mode)
{
    if (!g.p) return;
    if (g.cols == 1 && g.rows == x.rows) RUN(row_dots_kernel, x.rows, THREADS, g, x, y, (wide)scale, mode);
    else RUN(column_dots_kernel, (x.cols + WARP - 1) / WARP, THREADS, g, x, y, (wide)scale, mode);
}

// g = m q^-½, and 1 where q, a squared length, is 0.  One block: 256 numbers, one a thread.
__global__ static void magnitude_kernel(wide *gain, const wide *m, const wide *squares, int n)
{
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) gain[i] = squares[i] <= 0 ? 1 : m[i] / sqrt(squares[i]);
}

extern "C" void magnitude_forward(mat gain, mat m, mat squares)
{
    int n = gain.rows * gain.cols;
    RUN(magnitude_kernel, (n + THREADS - 1) / THREADS, THREADS,
        (wide *)gain.p, (const wide *)m.p, (const wide *)squares.p, n);
}

//  g = m q^-½:   dm += dg q^-½,   dq = −½ dg m q^-3/2.  One block: 256 numbers, one a thread.
__global__ static void magnitude_backward_kernel(wide *dm, wide *dsquares,
                                                 const wide *dgain, const wide *m, const wide *squares, int n)
{
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    wide q = squares[i], root = sqrt(q);
    bool none = q <= 0;                                     // no length, no gradient
    dm[i] += none ? 0 : dgain[i] / root;
    dsquares[i] = none ? 0 : -dgain[i] * m[i] / (2 * q * root);
}

extern "C" void magnitude_backward(mat dm, mat dsquares, mat dgain, mat m, mat squares)
{
    int n = dgain.rows * dgain.cols;
    RUN(magnitude_backward_kernel, (n + THREADS - 1) / THREADS, THREADS, (wide *)dm.p, (wide *)dsquares.p,
        (const wide *)dgain.p, (const wide *)m.p, (const wide *)squares.p, n);
}

// ---- 7  training ------------------------------------------------------------------------------------------

// An array of n numbers: a thread takes a pack, and further ones where the grid has fewer threads than packs.
#define FOR_EACH_PACK_OF_ARRAY(n, i) \
    for (size_t i = ((size_t)blockIdx.x * THREADS + threadIdx.x) * PACK; i < (n); \
         i += (size_t)gridDim.x * THREADS * PACK)

// The blocks of such a grid: enough for n numbers, one at least, `most` at most.
static int blocks_of_array(size_t n, int most)
{
    size_t blocks = (n + THREADS * PACK - 1) / (THREADS * PACK);
    return blocks > (size_t)most ? most : blocks ? (int)blocks : 1;
}

// Σ x², in double: up to SUMS blocks add up a part each, then one block adds up their sums: always the same
// tree.
enum { SUMS = 1024 };

// One block: 256 packs of the array, and again every SUMS · 256 packs on. It leaves a sum.
__global__ static void squares_kernel(double *sums, const wide *x, size_t n)
{
    double sum = 0;
    FOR_EACH_PACK_OF_ARRAY(n, i) {
        int left = n - i < PACK ? (int)(n - i) : PACK;
        pack a = load_pack(x + i, left);
        for (int k = 0; k < PACK; k++) sum += (double)a.x[k] * (double)a.x[k];
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// One block in all: it adds up the n sums.
__global__ static void sum_kernel(double *total, const double *sums, int n)
{
    double sum = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) sum += sums[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) *total = sum;
}

extern "C" double sum_of_squares(mat x)
{
    double *sums = (double *)scratch(SUMS_OF_ROWS, (SUMS + 1) * sizeof(double)), total;
    size_t n = (size_t)x.batch * x.rows * x.cols;
    int blocks = blocks_of_array(n, SUMS);
    RUN(squares_kernel, blocks, THREADS, sums, (const wide *)x.p, n);
    RUN(sum_kernel, 1, THREADS, sums + SUMS, sums, blocks);
    check(cudaMemcpy(&total, sums + SUMS, sizeof total, cudaMemcpyDeviceToHost), "copying to the host");
    return total;
}

// PyTorch's AdamW (arXiv 1711.05101).  One block: 256 packs of the arrays.
__global__ static void adamw_kernel(wide *w, const wide *dw, wide *m, wide *v, size_t n,
                                    wide shrink, wide rate, wide root, wide grad_scale)
{
    const wide c1 = (wide)(1 - 0.9), b2 = (wide)0.999, c2 = (wide)(1 - 0.999), eps = (wide)1e-8;
    FOR_EACH_PACK_OF_ARRAY(n, i) {
        int left = n - i < PACK ? (int)(n - i) : PACK;
        pack W = load_pack(w + i, left), G = load_pack(dw + i, left);
        pack M = load_pack(m + i, left), V = load_pack(v + i, left);
        for (int k = 0; k < PACK; k++) {
            wide g = grad_scale * G.x[k];
            M.x[k] += c1 * (g - M.x[k]);                                // m = β₁ m + (1 − β₁) g
            V.x[k] = b2 * V.x[k] + c2 * g * g;
            W.x[k] = W.x[k] * shrink - rate * M.x[k] / (sqrt(V.x[k]) / root + eps);
        }
        store_pack(m + i, M, left);
        store_pack(v + i, V, left);
        store_pack(w + i, W, left);
    }
}

extern "C" void adamw(mat w, mat dw, mat m, mat v, double lr, double decay, double grad_scale, int t)
{
    size_t n = (size_t)w.batch * w.rows * w.cols;
    wide shrink = (wide)(1 - lr * decay);
    wide rate = (wide)(lr / (1 - pow(0.9, t)));
    wide root = (wide)sqrt(1 - pow(0.999, t));
    RUN(adamw_kernel, blocks_of_array(n, 65536), THREADS,
        (wide *)w.p, (const wide *)dw.p, (wide *)m.p, (wide *)v.p, n, shrink, rate, root, (wide)grad_scale);
}

// ---- 8  the work space of a run ---------------------------------------------------------------------------
//
//  The bytes that the calls of `scratch` in a step ask for. A product converts a factor whose dtype is not
//  the one it runs in: where real is bf16, what trains (float); where real is float or double, a weight of
//  the base in fewer bits. cublasLt's kernel for large products has its few bytes. Attention has a list of
//  blocks, and of Δ, a number a row and head. RWKV6 has S dy, a number a row and channel.

// The bytes of all buffers together; with `take` they are allocated, so that no step allocates.
extern "C" size_t dev_reserve(needs n, int take)
{
    size_t bytes[BUFFERS] = {}, all = 0;
    size_t converted = sizeof(real) == 2 ? n.trained : n.weight;
    bytes[FACTOR_A] = converted * sizeof(real);
    bytes[FACTOR_B] = converted * sizeof(real);
    if (sizeof(real) == 2 && n.tokens) bytes[SPACE] = LARGE_SPACE;
    bytes[HOST] = n.fetched * sizeof(wide);
    bytes[BLOCKS] = 2 * (size_t)n.tokens * sizeof(span_rows);   // a block has one row at least
    if (take) listed.of.count = placed.of.count = NONE_LISTED;        // the lists' memory is about to change
    if (n.train) {
        bytes[DELTA] = (size_t)n.tokens * n.heads * sizeof(wide);
        bytes[LINKS] = n.normed * sizeof(same_id);              // embedding_backward's, of no more tokens
    }
    if (n.recurrent) bytes[TEXTS] = (size_t)n.tokens * (sizeof(span) + sizeof(int));
    if (n.train) bytes[RECURRENT] = (size_t)n.tokens * n.recurrent * sizeof(wide);
    size_t rhos = n.normed * sizeof(wide);                      // the norms' backward pass
    size_t sums = (SUMS + 1) * sizeof(double);                  // sum_of_squares'
    if (n.normed) bytes[SUMS_OF_ROWS] = rhos > sums ? rhos : sums;
    for (int i = 0; i < BUFFERS; i++) {
        all += bytes[i];
        if (take) resize(i, bytes[i]);
    }
    if (take && all) cublas();                                  // starting it allocates work space of its own
    if (take && bytes[SPACE]) cublas_lt();
    return all;
}
