/*  train.cu: the ops of ops/ops.h, defined for a GPU: kernels and cuBLAS, nothing else. Model, adapters and
    loop run on the CPU and call them by the names and signatures of ops/ops.h, as they would call ops/cpu.c.

    Read in this order:
      1  numbers                        real is stored, wide is computed with
      2  memory
      3  the matrix product             cuBLAS, told about rows instead of columns
      4  Llama2                         each forward with its backward
      5  adapters
      6  training
      7  the work space of a run

    A kernel's comment says what one block does. Kernels are limited by memory, not by arithmetic, so
    neighbouring threads take neighbouring elements, and a row that must be summed belongs to one block. Every
    sum is a tree of fixed shape, and no atomic operation adds floating-point numbers: the same input gives
    the same bits on every run.

    What a pass over memory costs, counted by bytes for Llama2-7B in bf16, 4096 tokens, on a card of 3.35 TB/s
    and 700 TFLOP/s, where a step takes some 160 ms: reading x (4096, 4096) takes 10 µs. RMSNorm copies the
    residual stream in the kernel that reads it, which saves 20 µs a layer, 0.6 ms a step. Two things are not
    built: Bone's S(x) in the kernels of RMSNorm and SwiGLU, which write x, would save 94 µs a layer, 3.0 ms
    or 1.9 % of a step; one product for the x Aᵀ of LoRA's q, k, v (and one for gate, up) 30 µs, 0.6 %.

    Without a GPU this file compiles as C++ against dev/cuda_on_cpu.h, which runs every block and thread.   */

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#ifdef __CUDACC__
#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define LAUNCH(kernel, blocks, threads, ...) kernel<<<blocks, threads>>>(__VA_ARGS__)
#else
#include "dev/cuda_on_cpu.h"
#endif
// RUN(kernel, blocks, threads, arguments …)
#define RUN(kernel, ...) (LAUNCH(kernel, __VA_ARGS__), check(cudaGetLastError(), #kernel))
#include "ops/ops.h"

static void fail(const char *what, const char *why)
{
    fflush(stdout);
    fprintf(stderr, "error: GPU: %s: %s\n", what, why);
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

// Activations are stored as `real` (float, double, bf16); every kernel computes in `wide` (float, double).
__device__ static inline wide up(real x) { return (wide)x; }
__device__ static inline void down(real *p, wide x) { *p = (real)x; }

static const size_t size_of[DTYPES] = {4, 8, 2, 2};

// Element i of memory of any dtype: weights keep the dtype of their file, and what trains is wide.
__device__ static inline wide load(const void *p, enum dtype type, size_t i)
{
    if (type == F32) return (wide)((const float *)p)[i];
    if (type == F64) return (wide)((const double *)p)[i];
    if (type == BF16) return (wide)(float)((const __nv_bfloat16 *)p)[i];
    return (wide)(float)((const __half *)p)[i];
}

__device__ static inline void store(void *p, enum dtype type, size_t i, wide x)
{
    if (type == F32) ((float *)p)[i] = (float)x;
    else if (type == F64) ((double *)p)[i] = (double)x;
    else if (type == BF16) ((__nv_bfloat16 *)p)[i] = (__nv_bfloat16)(float)x;
    else ((__half *)p)[i] = (__half)(float)x;
}

// Where element (row, col) of matrix b of a batch lies, counted from m.p.
__device__ static inline size_t index_of(const mat &m, int b, int row, int col)
{
    return (m.batch > 1 ? b * m.stride : 0) + row * m.ld + col;
}

__device__ static inline real *row_of(const mat &m, int row) { return (real *)m.p + row * m.ld; }

enum { THREADS = 256, WARP = 32, MOST_ROWS = 65535 };       // MOST_ROWS: the most blocks a grid has along y

// The grid of the kernels that give each element a thread. One block takes THREADS columns of a row:
// blockIdx.x counts columns, y rows, z matrices of the batch. Beyond MOST_ROWS rows a block takes every
// MOST_ROWS-th row.
static dim3 element_grid(const mat &m)
{
    return dim3((m.cols + THREADS - 1) / THREADS, m.rows < MOST_ROWS ? m.rows : MOST_ROWS, m.batch);
}
#define FOR_EACH_ELEMENT(m, row, col) \
    for (int col = blockIdx.x * blockDim.x + threadIdx.x, row = blockIdx.y; \
         col < (m).cols && row < (m).rows; row += gridDim.y)

// The sum (or maximum) of x over the threads of a block; every thread gets it. Each warp combines its own by
// shuffles, then every thread combines the results of the warps.
template <class T, class Op> __device__ static inline T block_reduce(T x, Op op)
{
    __shared__ T of_warp[THREADS / WARP];
    for (int d = WARP / 2; d; d /= 2) x = op(x, __shfl_xor_sync(0xffffffffu, x, d));
    __syncthreads();                                    // a reduction before this one may still be read
    if (threadIdx.x % WARP == 0) of_warp[threadIdx.x / WARP] = x;
    __syncthreads();
    x = of_warp[0];
    for (int w = 1; w < THREADS / WARP; w++) x = op(x, of_warp[w]);
    return x;
}

struct plus { template <class T> __device__ T operator()(T a, T b) const { return a + b; } };
struct larger { template <class T> __device__ T operator()(T a, T b) const { return a > b ? a : b; } };

template <class T> __device__ static inline T block_sum(T x) { return block_reduce(x, plus()); }

// The sum over rows of term(row), for one column a lane. A block has WARP columns; each of its eight warps
// adds up every eighth row, then the eight sums are added in order. Every lane of every warp gets its
// column's sum.
template <class Term> __device__ static inline wide column_sum(int rows, bool there, Term term)
{
    __shared__ wide of_warp[THREADS / WARP][WARP];
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    wide sum = 0;
    for (int n = warp; n < rows && there; n += THREADS / WARP) sum += term(n);
    of_warp[warp][lane] = sum;
    __syncthreads();
    sum = 0;
    for (int w = 0; w < THREADS / WARP; w++) sum += of_warp[w][lane];
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

// Work space of the ops. A run reserves what its steps need (section 7); an op called outside of a run
// enlarges the buffer where it is too small.
enum { FACTOR_A, FACTOR_B, HOST, SCORES, SOFTMAX, DSOFTMAX, DSCORES, SUMS_OF_ROWS, BUFFERS };
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
    return m;
}

static size_t bytes_of(const mat &m) { return (size_t)m.batch * m.rows * m.cols * size_of[m.type]; }

// y = x.  One block: 256 columns of a row, an element a thread.
__global__ static void copy_kernel(mat y, mat x)
{
    FOR_EACH_ELEMENT(y, row, col) {
        wide element = load(x.p, x.type, index_of(x, blockIdx.z, row, col));
        store(y.p, y.type, index_of(y, blockIdx.z, row, col), element);
    }
}

extern "C" void copy(mat y, mat x)
{
    if (y.rows != x.rows || y.cols != x.cols || y.batch != x.batch) fail("copy", "the shapes differ");
    if (y.p) RUN(copy_kernel, element_grid(y), THREADS, y, x);
}

// m has this dtype and no gaps between rows or matrices, like data on the host: one cudaMemcpy can copy it.
static bool as_on_host(const mat &m, enum dtype type)
{
    bool rows_touch = m.ld == (size_t)m.cols;
    bool matrices_touch = m.batch == 1 || m.stride == (size_t)m.rows * m.cols;
    return m.type == type && rows_touch && matrices_touch;
}

// dst = host data of this dtype. Where dst has another dtype, or gaps, the data is copied to the device as it
// is and converted there. That copy is as large as a weight and freed at once; no training step calls put, so
// the reserved work space has no room for it.
extern "C" void put(mat dst, const void *src, enum dtype type)
{
    mat raw = as_on_host(dst, type) ? dst : contiguous(dst, NULL, type);
    if (!raw.p) check(cudaMalloc(&raw.p, bytes_of(raw)), "copying to the device");
    check(cudaMemcpy(raw.p, src, bytes_of(raw), cudaMemcpyHostToDevice), "copying to the device");
    if (raw.p == dst.p) return;
    copy(dst, raw);
    check(cudaFree(raw.p), "freeing memory");
}

extern "C" void get(wide *dst, mat src)
{
    mat raw = as_on_host(src, TYPE_OF(wide)) ? src : contiguous(src, NULL, TYPE_OF(wide));
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

// x = value.  One block: 256 columns of a row, an element a thread.
__global__ static void fill_kernel(mat x, wide value)
{
    FOR_EACH_ELEMENT(x, row, col) store(x.p, x.type, index_of(x, blockIdx.z, row, col), value);
}

extern "C" void zero(mat x) { RUN(fill_kernel, element_grid(x), THREADS, x, (wide)0); }

// y += scale x.  One block: 256 columns of a row, an element a thread.
__global__ static void add_kernel(mat y, mat x, wide scale)
{
    FOR_EACH_ELEMENT(y, row, col) {
        size_t i = index_of(y, 0, row, col);
        store(y.p, y.type, i, load(y.p, y.type, i) + scale * load(x.p, x.type, index_of(x, 0, row, col)));
    }
}

extern "C" void add(mat y, mat x, double scale)
{
    if (y.p) RUN(add_kernel, element_grid(y), THREADS, y, x, (wide)scale);
}

// ---- 3  the matrix product --------------------------------------------------------------------------------
//
//  cuBLAS stores by columns: our y (M, N) is its yᵀ, an N × M matrix with the same ld. So y = a b is asked
//  for as yᵀ = bᵀ aᵀ. CUBLAS_OP_N takes a factor that lies in memory by rows as the product has it,
//  CUBLAS_OP_T one that lies there transposed.

static int tf32;                        // products of floats may round their factors to 10 bits
extern "C" int dev_tf32(void) { return tf32 = sizeof(real) == 4; }

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

// A factor in the dtype that the product runs in: m itself, or its copy in work space.
static mat factor(mat m, enum dtype type, int slot)
{
    if (m.type == type) return m;
    mat f = contiguous(m, NULL, type);
    f.p = scratch(slot, bytes_of(f));
    copy(f, m);
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

// y (M, N) = or += scale a (M, K) b (K, N).  a_across: a lies in memory as (K, M), else as (M, K); b_across:
// b lies as (K, N), else as (N, K). If y is real, both factors are converted to real; if y is wide (a
// gradient), both get the dtype of a, so bf16 activations are multiplied as bf16 and summed in fp32.
static void gemm(mat y, mat a, int a_across, mat b, int b_across, int K, double scale, enum mode mode)
{
    enum dtype type = y.type == TYPE_OF(real) ? y.type : a.type;
    wide alpha = (wide)scale, beta = mode == ADD ? 1 : 0;
    a = factor(a, type, FACTOR_A);
    b = factor(b, type, FACTOR_B);
    cublasOperation_t op_b = b_across ? CUBLAS_OP_N : CUBLAS_OP_T;
    cublasOperation_t op_a = a_across ? CUBLAS_OP_T : CUBLAS_OP_N;
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
    gemm(y, x, 0, w, 0, x.cols, scale, mode);
}

extern "C" void matmul_nn(mat y, mat x, mat w, double scale, enum mode mode)
{
    if (!y.p) return;
    check_shapes(y.rows == x.rows && y.cols == w.cols && x.cols == w.rows, "matmul_nn");
    gemm(y, x, 0, w, 1, x.cols, scale, mode);
}

extern "C" void matmul_tn(mat y, mat x, mat w, double scale, enum mode mode)
{
    if (!y.p) return;
    check_shapes(y.rows == x.cols && y.cols == w.cols && x.rows == w.rows, "matmul_tn");
    gemm(y, x, 1, w, 1, x.rows, scale, mode);
}

// ---- 4  Llama2 --------------------------------------------------------------------------------------------

// y[n] += b.  One block: 256 columns of a row, an element a thread.
__global__ static void bias_kernel(mat y, mat b)
{
    FOR_EACH_ELEMENT(y, row, col) {
        real *element = row_of(y, row) + col;
        down(element, up(*element) + load(b.p, b.type, col));
    }
}

extern "C" void bias_forward(mat y, mat b)
{
    if (b.p) RUN(bias_kernel, element_grid(y), THREADS, y, b);
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

// out[n] = table[ids[n]].  One block: 256 columns of a token's row, an element a thread.
__global__ static void embedding_kernel(mat out, mat table, const int *ids)
{
    FOR_EACH_ELEMENT(out, row, col) {
        wide element = load(table.p, table.type, index_of(table, 0, ids[row], col));
        store(out.p, out.type, index_of(out, 0, row, col), element);
    }
}

extern "C" void embedding_forward(mat out, mat table, dev_ints ids)
{
    RUN(embedding_kernel, element_grid(out), THREADS, out, table, ids);
}

// dtable[id] += Σ dout[n] over the n with that id.  One block a token. The block of the first token with an
// id adds up the rows of all tokens with that id, in their order; the blocks of the later ones return. So no
// two blocks write the same row.
__global__ static void embedding_backward_kernel(mat dtable, mat dout, const int *ids, int N)
{
    int n = blockIdx.x, id = ids[n];
    __shared__ int earlier;
    if (threadIdx.x == 0) earlier = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += blockDim.x)
        if (ids[i] == id) atomicAdd(&earlier, 1);
    __syncthreads();
    if (earlier) return;
    for (int col = threadIdx.x; col < dout.cols; col += blockDim.x) {
        wide sum = load(dtable.p, dtable.type, index_of(dtable, 0, id, col));
        for (int i = n; i < N; i++)
            if (ids[i] == id) sum += up(row_of(dout, i)[col]);
        store(dtable.p, dtable.type, index_of(dtable, 0, id, col), sum);
    }
}

extern "C" void embedding_backward(mat dtable, mat dout, dev_ints ids)
{
    if (dtable.p) RUN(embedding_backward_kernel, dout.rows, THREADS, dtable, dout, ids, dout.rows);
}

// ρ = 1 / √(mean(x²) + ε) of a row x of C elements, which the whole block adds up.
__device__ static inline wide inverse_rms(const real *x, int C, wide eps)
{
    wide sum = 0;
    for (int c = threadIdx.x; c < C; c += blockDim.x) sum += up(x[c]) * up(x[c]);
    return 1 / sqrt(block_sum(sum) / C + eps);
}

// out = w x ρ.  One block a row: a pass for ρ, and one that writes out and, if it is wanted, the copy of x.
__global__ static void rmsnorm_kernel(mat out, mat residual, mat x, mat w, wide eps)
{
    const real *xn = row_of(x, blockIdx.x);
    real *on = row_of(out, blockIdx.x), *kept = residual.p ? row_of(residual, blockIdx.x) : NULL;
    wide rho = inverse_rms(xn, x.cols, eps);
    for (int c = threadIdx.x; c < x.cols; c += blockDim.x) {
        down(&on[c], load(w.p, w.type, c) * up(xn[c]) * rho);
        if (kept) kept[c] = xn[c];
    }
}

extern "C" void rmsnorm_forward(mat out, mat residual, mat x, mat w, double eps)
{
    RUN(rmsnorm_kernel, x.rows, THREADS, out, residual, x, w, (wide)eps);
}

//  dx += ρ (w dout − x ρ² mean(w dout x)),  since dρ/dx_c = −ρ³ x_c / C.
// One block a row. It also writes the row's ρ into rhos, which rmsnorm_weight_kernel reads.
__global__ static void rmsnorm_backward_kernel(mat dx, wide *rhos, mat dout, mat x, mat w, wide eps)
{
    int n = blockIdx.x, C = x.cols;
    const real *xn = row_of(x, n), *dn = row_of(dout, n);
    wide rho = inverse_rms(xn, C, eps), sum = 0;
    if (threadIdx.x == 0) rhos[n] = rho;
    if (!dx.p) return;
    for (int c = threadIdx.x; c < C; c += blockDim.x) sum += load(w.p, w.type, c) * up(dn[c]) * up(xn[c]);
    wide factor = block_sum(sum) / C * rho * rho;
    real *dxn = row_of(dx, n);
    for (int c = threadIdx.x; c < C; c += blockDim.x)
        down(&dxn[c], up(dxn[c]) + rho * (load(w.p, w.type, c) * up(dn[c]) - factor * up(xn[c])));
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
    wide *rhos = (wide *)scratch(SUMS_OF_ROWS, x.rows * sizeof(wide));
    RUN(rmsnorm_backward_kernel, x.rows, THREADS, dx, rhos, dout, x, w, (wide)eps);
    if (dw.p) RUN(rmsnorm_weight_kernel, (x.cols + WARP - 1) / WARP, THREADS, dw, rhos, dout, x);
}

// Elements i and i + half of a head are a pair (a, b), rotated by the angle of the row's position:
// (a cos − b sin, b cos + a sin). The backward rotates by −angle.
// One block a row; a thread takes pairs of any head.
__global__ static void rope_kernel(mat x, const int *pos, mat table, wide sign)
{
    int half = table.cols / 2;
    const real *cosine = row_of(table, pos[blockIdx.x]), *sine = cosine + half;
    for (int p = threadIdx.x; p < x.cols / 2; p += blockDim.x) {
        int i = p % half;
        real *a = row_of(x, blockIdx.x) + p / half * 2 * half + i, *b = a + half;
        wide u = up(*a), v = up(*b), c = up(cosine[i]), s = sign * up(sine[i]);
        down(a, u * c - v * s);
        down(b, v * c + u * s);
    }
}

extern "C" void rope(mat x, dev_ints pos, mat table, int sign)
{
    RUN(rope_kernel, x.rows, THREADS, x, pos, table, (wide)sign);
}

// Attention, by batched products: tensor cores do the work. A batch is QUERIES query rows of a span, in one
// query head of each head of keys. Only its scores (heads of keys, QUERIES, keys) are in memory.
//   S = q kᵀ/√d,  P = softmax(S) over the keys that a row sees,  out = P v
// Kept for the backward: lse = log Σ exp(S), a number a row and head.
// Scores are wide: in 16 bits a score of 20 would be off by 0.06. `group` query heads share a head of keys
// and values, so there are `group` batches, one after the other: batch g has every group-th query head from g
// on. With 4 query heads and 2 key heads, batch 0 has query heads 0 and 2, batch 1 has 1 and 3.
enum { QUERIES = 512 };

// Query rows row … row+n-1, and the keys key … key+keys-1 that some of them see. Among these are `before`
// keys in front of the first query's own. Row r sees block keys seen_from … seen_to − 1, at most `window`.
struct query_block {
    int row, n, key, keys, before, window;
    __device__ int seen_to(int r) const { return before + r + 1; }
    __device__ int seen_from(int r) const { return seen_to(r) > window ? seen_to(r) - window : 0; }
};

static query_block queries_at(span s, int q0, int window)
{
    int n = s.nq - q0 < QUERIES ? s.nq - q0 : QUERIES;
    int own = s.nk - s.nq + q0;                         // the first query's own key, in the span
    int first = own + 1 > window ? own + 1 - window : 0;
    return {s.q + q0, n, s.k + first, own + n - first, own - first, window};
}

// The given rows of heads first, first + step, first + 2 step, …, as a batch of matrices (heads, rows, d).
static mat heads_of(mat m, int row, int rows, int first, int step, int d)
{
    m.p = (char *)m.p + (row * m.ld + (size_t)first * d) * size_of[m.type];
    m.batch = m.cols / d / step;
    m.stride = (size_t)step * d;
    m.rows = rows;
    m.cols = d;
    return m;
}

// The elements from one row of scores to the next: a multiple of 8, so that each row begins at a multiple of
// 16 bytes, as tensor cores require.
static size_t score_row(int keys) { return ((size_t)keys + 7) / 8 * 8; }

static mat scores(int which, enum dtype type, int heads, int n, int keys)
{
    size_t ld = score_row(keys), stride = n * ld;
    return {scratch(which, heads * stride * size_of[type]), type, n, keys, ld, heads, stride, heads * stride};
}

// One block a row of scores of one head: P = softmax over the keys that this query sees, P = 0 for others,
// and lse.
__global__ static void softmax_kernel(mat P, mat S, mat lse, query_block b, int head, int step)
{
    int r = blockIdx.x, h = blockIdx.y, from = b.seen_from(r), to = b.seen_to(r);
    const wide *s = (const wide *)S.p + index_of(S, h, r, 0);
    real *p = (real *)P.p + index_of(P, h, r, 0);
    wide most = -INFINITY, sum = 0;
    for (int c = from + threadIdx.x; c < to; c += blockDim.x) most = s[c] > most ? s[c] : most;
    most = block_reduce(most, larger());
    for (int c = from + threadIdx.x; c < to; c += blockDim.x) sum += exp(s[c] - most);
    sum = block_sum(sum);
    for (int c = threadIdx.x; c < P.cols; c += blockDim.x)
        down(&p[c], c >= from && c < to ? exp(s[c] - most) / sum : 0);
    if (threadIdx.x == 0) ((wide *)lse.p)[index_of(lse, 0, b.row + r, head + h * step)] = most + log(sum);
}

// out = softmax(q kᵀ/√d) v: for each block of query rows and each batch of heads two products, with the
// softmax between.
extern "C" void attention_forward(mat out, mat lse, mat q, mat k, mat v, int d, int window,
                                  const span *spans, int count)
{
    int group = q.cols / k.cols;
    for (int i = 0; i < count; i++)
        for (int q0 = 0; q0 < spans[i].nq; q0 += QUERIES) {
            query_block b = queries_at(spans[i], q0, window);
            mat K = heads_of(k, b.key, b.keys, 0, 1, d), V = heads_of(v, b.key, b.keys, 0, 1, d);
            mat S = scores(SCORES, TYPE_OF(wide), K.batch, b.n, b.keys);
            mat P = scores(SOFTMAX, TYPE_OF(real), K.batch, b.n, b.keys);
            for (int g = 0; g < group; g++) {
                mat Q = heads_of(q, b.row, b.n, g, group, d), O = heads_of(out, b.row, b.n, g, group, d);
                matmul_nt(S, Q, K, 1 / sqrt((double)d), SET);                   // S = q kᵀ/√d
                RUN(softmax_kernel, dim3(b.n, K.batch), THREADS, P, S, lse, b, g, group);   // P = softmax(S)
                matmul_nn(O, P, V, 1, SET);                                     // out = P v
            }
        }
}

//  out = P v:         dv += Pᵀ dout,   dP = dout vᵀ
//  P = softmax(S):    dS = P ⊙ (dP − Δ),   Δ = Σ_c dP P = dout · out, a number a row
//  S = q kᵀ/√d:       dq += dS k/√d,   dk += dSᵀ q/√d
//                     (Σ_c P[c] Σ_i dout[i] v[c, i] = Σ_i dout[i] Σ_c P[c] v[c, i] = Σ_i dout[i] out[i])
// One block a row of scores of one head. It computes P = exp(S − lse) anew, and dS. The subtraction dP − Δ is
// done in wide; only its product with P is rounded to real.
__global__ static void softmax_backward_kernel(mat P, mat dS, mat S, mat dP, mat out, mat dout, mat lse,
                                               query_block b, int head, int step)
{
    int r = blockIdx.x, h = blockIdx.y, from = b.seen_from(r), to = b.seen_to(r);
    const wide *s = (const wide *)S.p + index_of(S, h, r, 0);
    const wide *dp = (const wide *)dP.p + index_of(dP, h, r, 0);
    const real *o = (const real *)out.p + index_of(out, h, r, 0);
    const real *g = (const real *)dout.p + index_of(dout, h, r, 0);
    real *p = (real *)P.p + index_of(P, h, r, 0);
    real *ds = (real *)dS.p + index_of(dS, h, r, 0);
    wide l = ((const wide *)lse.p)[index_of(lse, 0, b.row + r, head + h * step)], delta = 0;
    for (int c = threadIdx.x; c < out.cols; c += blockDim.x) delta += up(o[c]) * up(g[c]);
    delta = block_sum(delta);
    for (int c = threadIdx.x; c < P.cols; c += blockDim.x) {
        bool seen = c >= from && c < to;
        wide pc = seen ? exp(s[c] - l) : 0;
        down(&p[c], pc);
        down(&ds[c], seen ? pc * (dp[c] - delta) : 0);
    }
}

// The equations above, for each block of query rows and each batch of heads, from S and dP on.
extern "C" void attention_backward(mat dq, mat dk, mat dv, mat dout, mat q, mat k, mat v, mat out, mat lse,
                                   int d, int window, const span *spans, int count)
{
    int group = q.cols / k.cols;
    double scale = 1 / sqrt((double)d);
    zero(dq);
    zero(dk);
    zero(dv);
    for (int i = 0; i < count; i++)
        for (int q0 = 0; q0 < spans[i].nq; q0 += QUERIES) {
            query_block b = queries_at(spans[i], q0, window);
            mat K = heads_of(k, b.key, b.keys, 0, 1, d), V = heads_of(v, b.key, b.keys, 0, 1, d);
            mat dK = heads_of(dk, b.key, b.keys, 0, 1, d), dV = heads_of(dv, b.key, b.keys, 0, 1, d);
            mat S = scores(SCORES, TYPE_OF(wide), K.batch, b.n, b.keys);
            mat P = scores(SOFTMAX, TYPE_OF(real), K.batch, b.n, b.keys);
            mat dP = scores(DSOFTMAX, TYPE_OF(wide), K.batch, b.n, b.keys);
            mat dS = scores(DSCORES, TYPE_OF(real), K.batch, b.n, b.keys);
            for (int g = 0; g < group; g++) {
                mat Q = heads_of(q, b.row, b.n, g, group, d), dQ = heads_of(dq, b.row, b.n, g, group, d);
                mat O = heads_of(out, b.row, b.n, g, group, d), dO = heads_of(dout, b.row, b.n, g, group, d);
                matmul_nt(S, Q, K, scale, SET);                                 // S = q kᵀ/√d
                matmul_nt(dP, dO, V, 1, SET);                                   // dP = dout vᵀ
                RUN(softmax_backward_kernel, dim3(b.n, K.batch), THREADS,
                    P, dS, S, dP, O, dO, lse, b, g, group);                     // dS = P ⊙ (dP − Δ)
                matmul_tn(dV, P, dO, 1, ADD);                                   // dv += Pᵀ dout
                matmul_nn(dQ, dS, K, scale, ADD);                               // dq += dS k/√d
                matmul_tn(dK, dS, Q, scale, ADD);                               // dk += dSᵀ q/√d
            }
        }
}

// out = silu(g) u,  silu(g) = g σ(g),  σ(g) = 1/(1 + e^−g).  One block: 256 columns of a row, an element a
// thread.
__global__ static void swiglu_kernel(mat out, mat gate, mat up_)
{
    FOR_EACH_ELEMENT(out, n, c) {
        wide g = up(row_of(gate, n)[c]);
        down(&row_of(out, n)[c], g / (1 + exp(-g)) * up(row_of(up_, n)[c]));
    }
}

extern "C" void swiglu_forward(mat out, mat gate, mat up_)
{
    RUN(swiglu_kernel, element_grid(out), THREADS, out, gate, up_);
}

//  dg = dout u σ (1 + g (1 − σ)),   du = dout g σ.  One block: 256 columns of a row, an element a thread.
__global__ static void swiglu_backward_kernel(mat dgate, mat dup, mat dout, mat gate, mat up_)
{
    FOR_EACH_ELEMENT(dout, n, c) {
        wide g = up(row_of(gate, n)[c]), u = up(row_of(up_, n)[c]), d = up(row_of(dout, n)[c]);
        wide sigma = 1 / (1 + exp(-g));
        down(&row_of(dgate, n)[c], d * u * sigma * (1 + g * (1 - sigma)));
        down(&row_of(dup, n)[c], d * g * sigma);
    }
}

extern "C" void swiglu_backward(mat dgate, mat dup, mat dout, mat gate, mat up_)
{
    RUN(swiglu_backward_kernel, element_grid(dout), THREADS, dgate, dup, dout, gate, up_);
}

//  loss = log Σ exp(z) − z[label];   dz = scale (softmax(z) − [label]), in z's place.
// One block a row. The first pass finds the largest z and the sum together: each thread keeps the largest z
// it has seen and the sum of exp(z − largest), which it multiplies by exp(old largest − new largest) whenever
// a larger z comes. A second pass writes the gradient.
__global__ static void cross_entropy_kernel(mat losses, mat logits, const int *labels, wide scale)
{
    int n = blockIdx.x, label = labels[n];
    real *z = row_of(logits, n);
    wide mine = -INFINITY, sum = 0, at_label = up(z[label]);
    for (int c = threadIdx.x; c < logits.cols; c += blockDim.x) {
        wide x = up(z[c]);
        if (x > mine) {
            sum *= exp(mine - x);
            mine = x;
        }
        sum += exp(x - mine);
    }
    wide most = block_reduce(mine, larger());
    sum = block_sum(mine == -INFINITY ? 0 : sum * exp(mine - most));
    if (threadIdx.x == 0) ((wide *)losses.p)[n * losses.ld] = log(sum) + most - at_label;
    if (scale == 0) return;
    for (int c = threadIdx.x; c < logits.cols; c += blockDim.x)
        down(&z[c], scale * (exp(up(z[c]) - most) / sum - (c == label)));
}

extern "C" void cross_entropy(mat losses, mat logits, dev_ints labels, double scale)
{
    RUN(cross_entropy_kernel, logits.rows, THREADS, losses, logits, labels, (wide)scale);
}

// ---- 5  adapters ------------------------------------------------------------------------------------------

// s[n, c] = Σ_j x[n, j·r + c].  One block: 256 columns of a row of s, an element a thread, which reads one
// element of every shard; neighbouring threads read neighbouring elements.
__global__ static void shard_sum_kernel(mat s, mat x)
{
    FOR_EACH_ELEMENT(s, n, c) {
        const real *xn = row_of(x, n);
        wide sum = 0;
        for (int i = c; i < x.cols; i += s.cols) sum += up(xn[i]);
        down(&row_of(s, n)[c], sum);
    }
}

extern "C" void shard_sum(mat s, mat x)
{
    RUN(shard_sum_kernel, element_grid(s), THREADS, s, x);
}

// x[n, j·r + c] += s[n, c].  One block: 256 columns of a row of x, an element a thread.
__global__ static void shard_tile_kernel(mat x, mat s)
{
    FOR_EACH_ELEMENT(x, n, c) {
        size_t i = index_of(x, 0, n, c);
        store(x.p, x.type, i, load(x.p, x.type, i) + load(s.p, s.type, index_of(s, 0, n, c % s.cols)));
    }
}

extern "C" void shard_tile(mat x, mat s)
{
    if (x.p) RUN(shard_tile_kernel, element_grid(x), THREADS, x, s);
}

// e[i, j] = 1 where i − j is a multiple of r, else 0.  One block: 256 columns of a row, an element a thread.
__global__ static void tiled_identity_kernel(mat e, int r)
{
    FOR_EACH_ELEMENT(e, i, j) down(&row_of(e, i)[j], i % r == j % r);
}

extern "C" void tiled_identity(mat e)
{
    int r = e.rows < e.cols ? e.rows : e.cols;
    RUN(tiled_identity_kernel, element_grid(e), THREADS, e, r);
}

// y = or += scale x ⊙ g; g is (1, cols) or (rows, 1), and repeated along the other side.
// One block: 256 columns of a row, an element a thread.
__global__ static void broadcast_mul_kernel(mat y, mat x, mat g, wide scale, enum mode mode)
{
    FOR_EACH_ELEMENT(x, n, c) {
        size_t i = index_of(y, 0, n, c);
        size_t of_g = index_of(g, 0, g.rows > 1 ? n : 0, g.cols > 1 ? c : 0);
        wide product = scale * load(x.p, x.type, index_of(x, 0, n, c)) * load(g.p, g.type, of_g);
        store(y.p, y.type, i, (mode == ADD ? load(y.p, y.type, i) : 0) + product);
    }
}

extern "C" void broadcast_mul(mat y, mat x, mat g, double scale, enum mode mode)
{
    if (y.p) RUN(broadcast_mul_kernel, element_grid(x), THREADS, y, x, g, (wide)scale, mode);
}

__device__ static inline wide product_at(const mat &x, const mat &y, int n, int c)
{
    return load(x.p, x.type, index_of(x, 0, n, c)) * load(y.p, y.type, index_of(y, 0, n, c));
}

// g[n] = or += scale x_n · y_n.  One block a row.
__global__ static void row_dots_kernel(mat g, mat x, mat y, wide scale, enum mode mode)
{
    wide sum = 0;
    for (int c = threadIdx.x; c < x.cols; c += blockDim.x) sum += product_at(x, y, blockIdx.x, c);
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

// ---- 6  training ------------------------------------------------------------------------------------------

// Σ x², in double: SUMS blocks add up a part each, then one block adds up their sums: always the same tree.
enum { SUMS = 1024 };

// One block: the 256 numbers from 256 blockIdx.x on, and again after every 256 SUMS numbers. It leaves a sum.
__global__ static void squares_kernel(double *sums, const wide *x, size_t n)
{
    double sum = 0;
    size_t first = (size_t)blockIdx.x * blockDim.x + threadIdx.x, stride = (size_t)gridDim.x * blockDim.x;
    for (size_t i = first; i < n; i += stride) sum += (double)x[i] * (double)x[i];
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
    RUN(squares_kernel, SUMS, THREADS, sums, (const wide *)x.p, (size_t)x.batch * x.rows * x.cols);
    RUN(sum_kernel, 1, THREADS, sums + SUMS, sums, SUMS);
    check(cudaMemcpy(&total, sums + SUMS, sizeof total, cudaMemcpyDeviceToHost), "copying to the host");
    return total;
}

// PyTorch's AdamW (arXiv 1711.05101).  One block: 256 numbers, one a thread; with more numbers than 65536
// blocks have threads, every 16777216th number after those, too.
__global__ static void adamw_kernel(wide *w, const wide *dw, wide *m, wide *v, size_t n,
                                    wide shrink, wide rate, wide root, wide grad_scale)
{
    const wide c1 = (wide)(1 - 0.9), b2 = (wide)0.999, c2 = (wide)(1 - 0.999), eps = (wide)1e-8;
    size_t first = (size_t)blockIdx.x * blockDim.x + threadIdx.x, stride = (size_t)gridDim.x * blockDim.x;
    for (size_t i = first; i < n; i += stride) {
        wide g = grad_scale * dw[i];
        m[i] += c1 * (g - m[i]);                                        // m = β₁ m + (1 − β₁) g
        v[i] = b2 * v[i] + c2 * g * g;
        w[i] = w[i] * shrink - rate * m[i] / (sqrt(v[i]) / root + eps);
    }
}

extern "C" void adamw(mat w, mat dw, mat m, mat v, double lr, double decay, double grad_scale, int t)
{
    size_t n = (size_t)w.batch * w.rows * w.cols, blocks = (n + THREADS - 1) / THREADS;
    wide shrink = (wide)(1 - lr * decay);
    wide rate = (wide)(lr / (1 - pow(0.9, t)));
    wide root = (wide)sqrt(1 - pow(0.999, t));
    RUN(adamw_kernel, (int)(blocks < 65536 ? blocks : 65536), THREADS,
        (wide *)w.p, (const wide *)dw.p, (wide *)m.p, (wide *)v.p, n, shrink, rate, root, (wide)grad_scale);
}

// ---- 7  the work space of a run ---------------------------------------------------------------------------
//
//  The bytes that the calls of `scratch` in a step ask for. A product converts a factor whose dtype is not
//  the one it runs in: where real is bf16, what trains (float); where real is float or double, a weight of
//  the base in fewer bits. Attention has the scores of one block of query rows in memory.

// The bytes of all buffers together; with `take` they are allocated, so that no step allocates.
extern "C" size_t dev_reserve(needs n, int take)
{
    size_t bytes[BUFFERS] = {}, all = 0;
    size_t converted = sizeof(real) == 2 ? n.trained : n.weight;
    bytes[FACTOR_A] = converted * sizeof(real);
    bytes[FACTOR_B] = converted * sizeof(real);
    bytes[HOST] = n.fetched * sizeof(wide);
    int queries = n.keys < QUERIES ? n.keys : QUERIES;
    int keys = n.keys - queries < n.window ? n.keys : n.window - 1 + queries;
    size_t score = (size_t)n.heads * queries * score_row(keys);
    bytes[SCORES] = score * sizeof(wide);
    bytes[SOFTMAX] = score * sizeof(real);
    if (n.train) {
        bytes[DSOFTMAX] = score * sizeof(wide);
        bytes[DSCORES] = score * sizeof(real);
    }
    size_t rhos = n.normed * sizeof(wide);                      // rmsnorm_backward's
    size_t sums = (SUMS + 1) * sizeof(double);                  // sum_of_squares'
    if (n.normed) bytes[SUMS_OF_ROWS] = rhos > sums ? rhos : sums;
    for (int i = 0; i < BUFFERS; i++) {
        all += bytes[i];
        if (take) resize(i, bytes[i]);
    }
    if (take && all) cublas();                                  // starting it allocates work space of its own
    return all;
}
