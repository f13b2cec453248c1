/*  test_cuda_on_cpu.cpp: what cuda_on_cpu.h claims, and the check of each claim. Small kernels with known answers.

        g++ -std=c++17 -O1 -g -fopenmp dev/test_cuda_on_cpu.cpp -o build/test_cuda_on_cpu && build/test_cuda_on_cpu

    An argument runs the tests whose name contains it; `speed` measures. The exit status is the verdict.               */

#include "cuda_on_cpu.h"
#include <float.h>
#include <string>
#include <sys/wait.h>
#ifdef _OPENMP
#include <omp.h>
#endif

static int failures;                            // of the test that runs
static std::string skipped;                     // why it cannot run here

static void check(double err, double tol, const char *what)
{
    if (err <= tol) return;
    failures++;
    printf("      %s: error %.3g, tolerance %.3g\n", what, err, tol);
}
static void expect(bool ok, const char *what) { check(!ok, 0, what); }

// Device memory that a test can read and write, since it is the CPU's own.
template <class T> struct array {
    T *p;
    size_t n;
    explicit array(size_t n_) : n(n_) { cudaMalloc(&p, n * sizeof(T)); }
    ~array() { cudaFree(p); }
    T &operator[](size_t i) { return p[i]; }
};

static const char *orders[] = {"forward", "reverse", "random:1", "random:2"};
static void set_order(const char *order) { setenv("CUDA_ORDER", order, 1); }

// Runs f in a process of its own, returns what it printed; status as from waitpid.
static std::string in_child(void (*f)(), int *status)
{
    int ends[2];
    fflush(NULL);
    if (pipe(ends)) perror("pipe"), exit(1);
    pid_t child = fork();
    if (child < 0) perror("fork"), exit(1);
    if (!child) {
        dup2(ends[1], 1), dup2(ends[1], 2), close(ends[0]), close(ends[1]);
        f();
        _exit(0);
    }
    close(ends[1]);
    std::string text;
    char buffer[4096];
    for (ssize_t n; (n = read(ends[0], buffer, sizeof buffer)) > 0;) text.append(buffer, n);
    close(ends[0]);
    waitpid(child, status, 0);
    return text;
}

static void expect_stop(void (*f)(), std::initializer_list<const char *> words)
{
    int status;
    std::string text = in_child(f, &status);
    expect(!WIFEXITED(status) || WEXITSTATUS(status) != 0, "the program ends");
    for (const char *word : words)
        if (text.find(word) == std::string::npos) failures++, printf("      expected '%s' in:\n%s", word, text.c_str());
}

/* ---- threads ---------------------------------------------------------------------------------------------------- */

__global__ void index_kernel(int *visits, dim3 grid, dim3 block)
{
    bool right = gridDim.x == grid.x && gridDim.y == grid.y && gridDim.z == grid.z && blockDim.x == block.x && blockDim.y == block.y && blockDim.z == block.z;
    int b = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x, t = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    visits[b * (int)(blockDim.x * blockDim.y * blockDim.z) + t] += right ? 1 : 1000;
}
static void test_indices()
{
    dim3 grid(4, 6, 2), block(6, 4, 10);        // no two of them coprime: a wrong remainder meets another thread
    array<int> visits(48 * 240);
    cudaMemset(visits.p, 0, visits.n * sizeof(int));
    LAUNCH(index_kernel, grid, block, visits.p, grid, block);
    for (size_t i = 0; i < visits.n; i++) check(visits[i] != 1, 0, "visits of a thread");
}

template <class T> __global__ void reduce_kernel(T *out, const T *x)
{
    __shared__ T s[256];
    int t = threadIdx.x;
    s[t] = x[blockIdx.x * 256 + t];
    __syncthreads();
    for (int k = 128; k > 0; k /= 2) {
        if (t < k) s[t] += s[t + k];
        __syncthreads();
    }
    if (t == 0) out[blockIdx.x] = s[0];
}
template <class T> static void reduce()
{
    enum { BLOCKS = 7 };
    array<T> x(BLOCKS * 256), out(BLOCKS);
    for (size_t i = 0; i < x.n; i++) x[i] = (T)(i % 1000);
    LAUNCH(reduce_kernel, BLOCKS, 256, out.p, x.p);
    for (int b = 0; b < BLOCKS; b++) {
        T sum = 0;
        for (int i = 0; i < 256; i++) sum += x[b * 256 + i];
        check(fabs((double)(out[b] - sum)), 0, "sum of a block");
    }
}
static void test_reduction() { reduce<float>(), reduce<double>(), reduce<int>(); }

template <bool BARRIER> __global__ void broadcast_kernel(float *out)
{
    __shared__ float s;
    if (threadIdx.x == 0) s = 42;
    if (BARRIER) __syncthreads();
    out[threadIdx.x] = s;
}
static int wrong_after_broadcast(void (*kernel)(float *))
{
    array<float> out(96);
    int wrong = 0;
    LAUNCH(kernel, 1, 96, out.p);
    for (size_t i = 0; i < out.n; i++) wrong += out[i] != 42;
    return wrong;
}

// Two sums over a block, by shuffles and one shared array: the second may not be written while the first is read.
template <bool BARRIER> __global__ void two_sums_kernel(int *first, int *second)
{
    __shared__ int of_warp[3];
    for (int round = 1; round <= 2; round++) {
        int x = round;
        for (int d = 16; d; d /= 2) x += __shfl_xor_sync(0xffffffff, x, d);
        if (BARRIER) __syncthreads();
        if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = x;
        __syncthreads();
        (round == 1 ? first : second)[blockIdx.x * 96 + threadIdx.x] = of_warp[0] + of_warp[1] + of_warp[2];
    }
}
static int wrong_sums(void (*kernel)(int *, int *))
{
    array<int> first(20 * 96), second(20 * 96);
    int wrong = 0;
    LAUNCH(kernel, 20, 96, first.p, second.p);
    for (size_t i = 0; i < first.n; i++) wrong += first[i] != 96 || second[i] != 192;
    return wrong;
}
static void test_missing_barrier()
{
    expect(wrong_sums(two_sums_kernel<true>) == 0, "two sums are right in every order");
    expect(wrong_sums(two_sums_kernel<false>) > 0, "without a barrier between them, a warp runs ahead and spoils the first");
    expect(wrong_after_broadcast(broadcast_kernel<true>) == 0, "with its barrier it is right in every order");
    if (strcmp(getenv("CUDA_ORDER"), "forward")) expect(wrong_after_broadcast(broadcast_kernel<false>) > 0, "without, it is wrong in this order");
    else expect(wrong_after_broadcast(broadcast_kernel<false>) == 0, "without, chance makes it right in this order");
}

// In a block of 80 the last warp has 16 lanes.
template <class T> __global__ void shuffle_kernel(T *sum, T *below, T *first, T *half)
{
    int t = threadIdx.x, lanes = t < 64 ? 32 : 16;
    T x = (T)(t * t + 1), s = x;
    for (int k = lanes / 2; k > 0; k /= 2) s += __shfl_xor_sync(0xffffffff, s, k);
    sum[t] = s;
    below[t] = __shfl_down_sync(0xffffffff, x, t % 32 + 3 < lanes ? 3 : 0);
    first[t] = __shfl_sync(0xffffffff, x, 0);
    if (t % 32 < 8) half[t] = __shfl_sync(0xff, x, 7);                      // two groups of one warp, at different places
    else half[t] = t < 64 ? __shfl_down_sync(0xffffff00, x, 1) : x;
}
template <class T> static void shuffles()
{
    array<T> sum(80), below(80), first(80), half(80);
    LAUNCH(shuffle_kernel, 1, 80, sum.p, below.p, first.p, half.p);
    for (int t = 0; t < 80; t++) {
        int warp = t / 32 * 32, lanes = t < 64 ? 32 : 16, l = t % 32;
        auto x = [](int i) { return (double)(i * i + 1); };
        double s = 0;
        for (int i = warp; i < warp + lanes; i++) s += x(i);
        check(fabs((double)sum[t] - s), 0, "butterfly sum");
        check(fabs((double)below[t] - x(l + 3 < lanes ? t + 3 : t)), 0, "shuffle down");
        check(fabs((double)first[t] - x(warp)), 0, "broadcast");
        check(fabs((double)half[t] - x(l < 8 ? warp + 7 : t < 64 && l < 31 ? t + 1 : t)), 0, "two groups in a warp");
    }
}
static void test_shuffles() { shuffles<float>(), shuffles<double>(), shuffles<int>(); }

__global__ void warp_kernel(int *out)
{
    __shared__ int s[64];
    int t = threadIdx.x;
    if (t < 32) return;                         // a warp of its own: the others need not come
    s[t] = t;
    __syncwarp();
    out[t] = s[t ^ 31];
}
static void test_syncwarp()
{
    array<int> out(64);
    LAUNCH(warp_kernel, 1, 64, out.p);
    for (int t = 32; t < 64; t++) expect(out[t] == (t ^ 31), "value of another lane");
}

__global__ void atomic_kernel(int *i, float *f, double *d, unsigned long long *u)
{
    int seen = atomicAdd(i, 1);
    atomicAdd(f, 0.5f), atomicAdd(d, 0.25), atomicAdd(u, 1ull << 40);
    if (seen < 0) *i = -1000;
}
static void test_atomics()
{
    array<int> i(1); array<float> f(1); array<double> d(1); array<unsigned long long> u(1);
    i[0] = 0, f[0] = 0, d[0] = 0, u[0] = 0;
    LAUNCH(atomic_kernel, 5, 33, i.p, f.p, d.p, u.p);
    expect(i[0] == 165 && f[0] == 82.5f && d[0] == 41.25 && u[0] == 165ull << 40, "sums");
}

/* ---- what a GPU leaves to chance ---------------------------------------------------------------------------------- */

template <class T> __device__ T left_over() { __shared__ T s[40]; T x = s[threadIdx.x]; s[threadIdx.x] = 1; return x; }
__global__ void stale_kernel(float *out, double *out2)
{
    __shared__ float s[40];
    out[blockIdx.x * 40 + threadIdx.x] = s[threadIdx.x] + left_over<float>();
    out2[blockIdx.x * 40 + threadIdx.x] = left_over<double>();
    s[threadIdx.x] = 1;
}
static void test_poison()
{
    array<float> out(120), fresh(1000);
    array<double> out2(120);
    for (size_t i = 0; i < fresh.n; i++) expect(isnan(fresh[i]), "fresh memory is NaN");
    memset(out.p, 0, out.n * 4), memset(out2.p, 0, out2.n * 8);
    LAUNCH(stale_kernel, 3, 40, out.p, out2.p);
    for (size_t i = 0; i < out.n; i++) expect(isnan(out[i]) && isnan(out2[i]), "shared memory is NaN before every block");
}

__global__ void returned_kernel() { if (threadIdx.x < 33) return; __syncthreads(); }
__global__ void elsewhere_kernel()
{
    if (threadIdx.x % 2) __syncthreads();
    else
        __syncthreads();
}
__global__ void half_warp_kernel(float *out) { if (threadIdx.x < 16) out[threadIdx.x] = __shfl_xor_sync(0xffffffff, 1.f, 1); }
__global__ void absent_lane_kernel(float *out) { out[threadIdx.x] = __shfl_down_sync(0xffffffff, 1.f, 1); }
static void test_divergence()
{
    expect_stop([] { LAUNCH(returned_kernel, dim3(2, 3), 64); }, {"kernel returned_kernel, block (", "of (2,3,1)", "31 of 64 threads", "test_cuda_on_cpu.cpp:", "wait in __syncthreads", "33 of 64 threads", "returned"});
    expect_stop([] { LAUNCH(elsewhere_kernel, 1, 64); }, {"kernel elsewhere_kernel", "different barriers", "32 of 64 threads"});
    expect_stop([] { float out[32]; LAUNCH(half_warp_kernel, 1, 32, out); }, {"kernel half_warp_kernel", "16 of 32 threads", "wait in __shfl_xor_sync, mask ffffffff"});
    expect_stop([] { float out[48]; LAUNCH(absent_lane_kernel, 1, 48, out); }, {"kernel absent_lane_kernel", "a lane that does not take part"});
}

__global__ void beside_kernel(float *x, int i) { if (threadIdx.x == 5 && blockIdx.x == 1) x[i] = 1; }
__device__ __attribute__((noinline)) void write_to(int *x, int i) { x[i] = 1; }
__global__ void beside_shared_kernel(int *out, int i)
{
    __shared__ int s[32];
    write_to(s, threadIdx.x);
    __syncthreads();
    if (threadIdx.x == 5 && blockIdx.x == 1) write_to(s, i);
    out[threadIdx.x] = s[threadIdx.x];
}
__global__ void deep_kernel(int *out)           // frames on the stacks of fibers, and switches between them, trouble nobody
{
    int x[100];
    for (int i = 0; i < 100; i++) x[i] = i + (int)threadIdx.x;
    __syncthreads();
    write_to(x, 7);
    __syncthreads();
    out[threadIdx.x] = x[7] + x[99];
}
__global__ void exit_kernel() { __syncthreads(); if (threadIdx.x == 5) _exit(3); __syncthreads(); }

static void test_asan()
{
#ifdef __SANITIZE_ADDRESS__
    array<int> out(1024);
    LAUNCH(deep_kernel, 2, 1024, out.p);
    for (int t = 0; t < 1024; t++) expect(out[t] == 100 + t, "a kernel inside its bounds");
    int status;                                 // it knows on which stack a thread runs: else a call that does not return makes it warn
    expect(in_child([] { LAUNCH(exit_kernel, 1, 32); }, &status).empty() && WEXITSTATUS(status) == 3, "a kernel may end the program");
    expect_stop([] { array<float> x(64); LAUNCH(beside_kernel, 2, 32, x.p, 64); }, {"AddressSanitizer", "kernel beside_kernel, block (1,0,0) of (2,1,1), thread (5,0,0)"});
    expect_stop([] { array<float> x(64); LAUNCH(beside_kernel, 2, 32, x.p, -1); }, {"AddressSanitizer", "kernel beside_kernel"});
    expect_stop([] { array<int> x(64); LAUNCH(beside_shared_kernel, 2, 32, x.p, 32); }, {"AddressSanitizer", "kernel beside_shared_kernel, block (1,0,0) of (2,1,1), thread (5,0,0)"});
#else
    (void)beside_kernel, (void)beside_shared_kernel, (void)deep_kernel, (void)exit_kernel;
    skipped = "this build has no AddressSanitizer";
#endif
}

static void test_gdb()
{
#ifndef __SANITIZE_ADDRESS__
    if (system("gdb --version >/dev/null 2>&1")) { skipped = "no gdb here"; return; }
    int status;
    std::string text = in_child([] {
        char self[4096] = "";
        if (readlink("/proc/self/exe", self, sizeof self - 1) < 0) _exit(1);
        execlp("gdb", "gdb", "-nx", "-batch", "-ex", "set debuginfod enabled off", "-ex", "break 'reduce_kernel<float>' if blockIdx.x == 2 && threadIdx.x == 5", "-ex", "run",
               "-ex", "print threadIdx", "-ex", "next", "-ex", "next", "-ex", "next", "-ex", "next", "-ex", "next", "-ex", "next", "-ex", "print blockIdx.x * 1000 + threadIdx.x",
               "-ex", "kill", "--args", self, "reduction", (char *)NULL);
    }, &status);
    if (text.find("ptrace") != std::string::npos) { skipped = "gdb may not trace here"; return; }
    for (const char *word : {"{x = 5, y = 0, z = 0}", "= 2005"})
        if (text.find(word) == std::string::npos) failures++, printf("      expected '%s' in:\n%s", word, text.c_str());
#else
    skipped = "in the build without sanitizers";
#endif
}

/* ---- numbers of 16 bits -------------------------------------------------------------------------------------------- */

// Every number of 16 bits survives the way to float and back, and what lies between two neighbours goes to the nearer,
// in the middle to the even one.
template <class H> static void round_trips(uint16_t infinity, H (*narrow)(float), float (*widen)(H))
{
    for (unsigned i = 0; i < 65536; i++) {
        H h;
        h.bits = (uint16_t)i;
        float x = widen(h);
        bool nan = (i & 0x7fff) > infinity;
        expect(nan ? isnan(x) && isnan(widen(narrow(x))) : narrow(x).bits == i, "there and back");
        if ((i & 0x7fff) >= infinity) continue;
        H other;                                // the next number; after the last, where it would be
        bool last = (i & 0x7fff) + 1 == infinity;
        other.bits = (uint16_t)(last ? i - 1 : i + 1);
        float middle = (float)(x + (last ? x - (double)widen(other) : (double)widen(other) - x) / 2);
        expect(narrow(middle).bits == (i & 1 ? i + 1 : i), "a tie goes to the even one");
        expect(narrow(nextafterf(middle, x)).bits == i, "just below the tie");
        expect(narrow(nextafterf(middle, copysignf(INFINITY, x))).bits == i + 1, "just above the tie");
    }
    for (float x : {INFINITY, FLT_MAX}) expect(narrow(x).bits == infinity && narrow(-x).bits == (infinity | 0x8000), "too large a number");
}
static void test_bf16()
{
    round_trips<__nv_bfloat16>(0x7f80, __float2bfloat16, __bfloat162float);
    for (uint32_t low : {1u, 0xffffu}) expect(isnan(__bfloat162float(__float2bfloat16(cuda_on_cpu::float_of(0x7f800000 | low)))), "a NaN of low bits stays NaN");
}
static void test_half() { round_trips<__half>(0x7c00, __float2half, __half2float); }

/* ---- the runtime ---------------------------------------------------------------------------------------------------- */

static void test_launch_errors()
{
    array<float> x(64);
    auto error_of = [&x](dim3 grid, dim3 block) { LAUNCH(beside_kernel, grid, block, x.p, 0); return cudaGetLastError(); };
    expect(error_of(1, 1024) == cudaSuccess, "1024 threads");
    for (dim3 block : {dim3(1025), dim3(0), dim3(32, 33), dim3(1, 1, 65)}) expect(error_of(1, block) == cudaErrorInvalidConfiguration, "a block that cannot be");
    for (dim3 grid : {dim3(0), dim3(1, 65536), dim3(1, 1, 65536), dim3(0x80000000)}) expect(error_of(grid, 32) == cudaErrorInvalidConfiguration, "a grid that cannot be");
    LAUNCH(beside_kernel, 0, 1, x.p, 0);
    expect(cudaPeekAtLastError() == cudaErrorInvalidConfiguration && cudaGetLastError() == cudaErrorInvalidConfiguration && cudaGetLastError() == cudaSuccess, "peek keeps it, get clears it");
    expect(!strcmp(cudaGetErrorString(cudaErrorInvalidConfiguration), "invalid configuration argument"), "its text");
}

static void test_memory()
{
    size_t before, after, total;
    cudaMemGetInfo(&before, &total);
    int host[12], back[12] = {}, *p, *none;
    for (int i = 0; i < 12; i++) host[i] = i;
    expect(cudaMalloc(&p, sizeof host) == cudaSuccess && (uintptr_t)p % 256 == 0, "aligned memory");
    cudaMemGetInfo(&after, &total);
    expect(before - after == sizeof host, "free memory");
    expect(cudaMalloc(&none, total) == cudaErrorMemoryAllocation && !none && cudaGetLastError() == cudaErrorMemoryAllocation, "more than there is");
    expect(cudaMemcpy(p, host, sizeof host, cudaMemcpyHostToDevice) == cudaSuccess, "to the device");
    expect(cudaMemcpy2D(back, 8, p + 1, 12, 8, 3, cudaMemcpyDeviceToHost) == cudaSuccess, "a part of each row");        // rows of 3, of which the last 2
    for (int i = 0; i < 6; i++) expect(back[i] == host[i / 2 * 3 + i % 2 + 1], "a part of each row");
    expect(cudaMemset(p, 1, 8) == cudaSuccess && p[0] == 0x01010101 && p[1] == p[0] && p[2] == 2, "set bytes");
    expect(cudaMemcpy(host, p, 4, cudaMemcpyHostToDevice) == cudaErrorInvalidValue, "the wrong direction");
    expect(cudaMemcpy(back, host, 4, cudaMemcpyHostToDevice) == cudaErrorInvalidValue, "to no device");
    expect(cudaMemcpy(back, host, 4, cudaMemcpyDeviceToHost) == cudaErrorInvalidValue, "from no device");
    expect(cudaFree(p) == cudaSuccess && cudaFree(p) == cudaErrorInvalidValue && cudaFree(NULL) == cudaSuccess, "freed once");
    cudaGetLastError();
    cudaEvent_t start, end;
    float ms;
    cudaEventCreate(&start), cudaEventCreate(&end);
    cudaEventRecord(start), usleep(20000), cudaEventRecord(end);
    cudaEventElapsedTime(&ms, start, end);
    expect(ms >= 20 && ms < 20000, "time between events");
    cudaEventDestroy(start), cudaEventDestroy(end);
}

/* ---- cuBLAS ----------------------------------------------------------------------------------------------------------- */

static size_t bytes_of(cudaDataType_t t) { return t == CUDA_R_64F ? 8 : t == CUDA_R_32F ? 4 : 2; }
static double get(const void *p, cudaDataType_t t, size_t i)
{
    if (t == CUDA_R_64F) return ((const double *)p)[i];
    if (t == CUDA_R_32F) return ((const float *)p)[i];
    if (t == CUDA_R_16BF) return __bfloat162float(((const __nv_bfloat16 *)p)[i]);
    return __half2float(((const __half *)p)[i]);
}
static void put(void *p, cudaDataType_t t, size_t i, double x)
{
    if (t == CUDA_R_64F) ((double *)p)[i] = x;
    else if (t == CUDA_R_32F) ((float *)p)[i] = (float)x;
    else if (t == CUDA_R_16BF) ((__nv_bfloat16 *)p)[i] = __float2bfloat16((float)x);
    else ((__half *)p)[i] = __float2half((float)x);
}
static double noise() { static uint32_t s = 1; s = s * 1664525 + 1013904223; return s / 2147483648.0 - 1; }

// A product of every type, each op, batches apart and alike, against three plain loops in double. Gaps between the
// columns (ld > rows) hold NaN in A and B, and must keep what they hold in C.
static void product(cudaDataType_t in, cudaDataType_t out, cublasComputeType_t compute, double tol, bool ta, bool tb, double beta, int batch, bool repeat, int m, int n, int k)
{
    int lda = (ta ? k : m) + 3, ldb = (tb ? n : k) + 1, ldc = m + 2;
    size_t sa = repeat ? 0 : (size_t)lda * (ta ? m : k) + 5, sb = (size_t)ldb * (tb ? k : n), sc = (size_t)ldc * n + 1;
    array<char> a(((size_t)lda * (ta ? m : k) + sa * batch) * bytes_of(in)), b(sb * batch * bytes_of(in)), c(sc * batch * bytes_of(out)), old(c.n);
    for (int i = 0; i < batch; i++) {
        for (int col = 0; col < (ta ? m : k); col++) for (int row = 0; row < (ta ? k : m); row++) put(a.p, in, i * sa + row + (size_t)col * lda, noise());
        for (int col = 0; col < (tb ? k : n); col++) for (int row = 0; row < (tb ? n : k); row++) put(b.p, in, i * sb + row + (size_t)col * ldb, noise());
        for (int col = 0; col < n && beta != 0; col++) for (int row = 0; row < m; row++) put(c.p, out, i * sc + row + (size_t)col * ldc, noise());
    }
    memcpy(old.p, c.p, c.n);
    double alpha = 0.75;
    float alpha32 = 0.75f, beta32 = (float)beta;
    bool f64 = compute == CUBLAS_COMPUTE_64F;
    cublasHandle_t h;
    cublasCreate(&h);
    cublasOperation_t op_a = ta ? CUBLAS_OP_T : CUBLAS_OP_N, op_b = tb ? CUBLAS_OP_T : CUBLAS_OP_N;
    const void *pa = f64 ? (void *)&alpha : &alpha32, *pb = f64 ? (void *)&beta : &beta32;
    cublasStatus_t status = batch == 1
        ? cublasGemmEx(h, op_a, op_b, m, n, k, pa, a.p, in, lda, b.p, in, ldb, pb, c.p, out, ldc, compute, CUBLAS_GEMM_DEFAULT)
        : cublasGemmStridedBatchedEx(h, op_a, op_b, m, n, k, pa, a.p, in, lda, sa, b.p, in, ldb, sb, pb, c.p, out, ldc, sc, batch, compute, CUBLAS_GEMM_DEFAULT);
    cublasDestroy(h);
    expect(status == CUBLAS_STATUS_SUCCESS, "the product runs");
    double diff = 0, norm = 0;
    for (int i = 0; i < batch; i++)
        for (int col = 0; col < n; col++)
            for (int row = 0; row < ldc; row++) {
                size_t at = i * sc + row + (size_t)col * ldc;
                if (row >= m) { expect(!memcmp(c.p + at * bytes_of(out), old.p + at * bytes_of(out), bytes_of(out)), "between the columns of C"); continue; }
                double y = 0;
                for (int l = 0; l < k; l++)
                    y += get(a.p, in, i * sa + (ta ? l + (size_t)row * lda : row + (size_t)l * lda)) * get(b.p, in, i * sb + (tb ? col + (size_t)l * ldb : l + (size_t)col * ldb));
                y = alpha * y + (beta != 0 ? beta * get(old.p, out, at) : 0);
                diff += pow(get(c.p, out, at) - y, 2), norm += y * y;
            }
    if (m && n && (k || beta != 0)) check(sqrt(diff / norm), tol, "relative L2 distance to plain loops");
    else check(diff, 0, "nothing to sum");
    if (m && n && k && compute == CUBLAS_COMPUTE_32F_FAST_TF32) expect(sqrt(diff / norm) > 1e-5, "TF32 shows");
}
static void test_gemm()
{
    struct { cudaDataType_t in, out; cublasComputeType_t compute; double tol; } types[] = {     // the rounding of the result and of sums of 70; TF32: of two factors, 2^-11 each
        {CUDA_R_64F, CUDA_R_64F, CUBLAS_COMPUTE_64F, 1e-15}, {CUDA_R_32F, CUDA_R_32F, CUBLAS_COMPUTE_32F, 4e-7}, {CUDA_R_32F, CUDA_R_32F, CUBLAS_COMPUTE_32F_FAST_TF32, 1e-3},
        {CUDA_R_16BF, CUDA_R_32F, CUBLAS_COMPUTE_32F, 4e-7}, {CUDA_R_16BF, CUDA_R_16BF, CUBLAS_COMPUTE_32F, 3e-3},
        {CUDA_R_16F, CUDA_R_32F, CUBLAS_COMPUTE_32F, 4e-7}, {CUDA_R_16F, CUDA_R_16F, CUBLAS_COMPUTE_32F, 4e-4}};
    for (auto &t : types)
        for (int ops = 0; ops < 4; ops++)
            for (double beta : {0., 1., -0.5})
                for (int batch : {1, 3}) {
                    product(t.in, t.out, t.compute, t.tol, ops & 1, ops & 2, beta, batch, false, 67, 37, 70);
                    product(t.in, t.out, t.compute, t.tol, ops & 1, ops & 2, beta, batch, true, 1, 5, 9);
                    product(t.in, t.out, t.compute, t.tol, ops & 1, ops & 2, beta, batch, false, 4, 3, 0);
                    product(t.in, t.out, t.compute, t.tol, ops & 1, ops & 2, beta, batch, false, 0, 3, 4);
                }
}

static void test_gemm_arguments()
{
    float x[64] = {}, one = 1;
    cublasHandle_t h;
    cublasCreate(&h);
    auto status = [&](cublasHandle_t handle, int m, int n, int k, int lda, int ldb, int ldc, cudaDataType_t in = CUDA_R_32F, cublasOperation_t op = CUBLAS_OP_N) {
        return cublasGemmEx(handle, op, op, m, n, k, &one, x, in, lda, x, in, ldb, &one, x, CUDA_R_32F, ldc, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
    };
    expect(status(h, 4, 3, 2, 4, 2, 4) == CUBLAS_STATUS_SUCCESS, "the smallest ld");
    expect(status(h, 4, 3, 2, 2, 3, 4, CUDA_R_32F, CUBLAS_OP_T) == CUBLAS_STATUS_SUCCESS, "the smallest ld, transposed");
    expect(status(h, 0, 0, 0, 1, 1, 1) == CUBLAS_STATUS_SUCCESS, "nothing to do");
    expect(status(h, 4, 3, 2, 3, 2, 4) == CUBLAS_STATUS_INVALID_VALUE, "lda too small");
    expect(status(h, 4, 3, 2, 4, 1, 4) == CUBLAS_STATUS_INVALID_VALUE, "ldb too small");
    expect(status(h, 4, 3, 2, 4, 2, 3) == CUBLAS_STATUS_INVALID_VALUE, "ldc too small");
    expect(status(h, 4, 3, 2, 1, 3, 4, CUDA_R_32F, CUBLAS_OP_T) == CUBLAS_STATUS_INVALID_VALUE, "lda too small, transposed");
    expect(status(h, 4, 3, 2, 2, 2, 4, CUDA_R_32F, CUBLAS_OP_T) == CUBLAS_STATUS_INVALID_VALUE, "ldb too small, transposed");
    expect(status(h, 0, 3, 2, 0, 2, 1) == CUBLAS_STATUS_INVALID_VALUE, "ld of 0");
    expect(status(h, -1, 3, 2, 4, 2, 4) == CUBLAS_STATUS_INVALID_VALUE, "m < 0");
    expect(status(h, 4, -3, 2, 4, 2, 4) == CUBLAS_STATUS_INVALID_VALUE, "n < 0");
    expect(status(h, 4, 3, -2, 4, 2, 4) == CUBLAS_STATUS_INVALID_VALUE, "k < 0");
    expect(status(h, 4, 3, 2, 4, 2, 4, CUDA_R_64F) == CUBLAS_STATUS_NOT_SUPPORTED, "double summed in float");
    expect(status(NULL, 4, 3, 2, 4, 2, 4) == CUBLAS_STATUS_NOT_INITIALIZED, "no handle");
    cublasDestroy(h);
}

static void test_gemm_bits()
{
#ifdef _OPENMP
    int n = 131, threads = omp_get_max_threads();
    array<float> a(n * n), b(n * n), c(n * n), c1(n * n);
    for (int i = 0; i < n * n; i++) a[i] = (float)noise(), b[i] = (float)noise();
    float one = 1, none = 0;
    cublasHandle_t h;
    cublasCreate(&h);
    for (int t : {1, 2, 3, 4}) {
        omp_set_num_threads(t);
        cublasGemmEx(h, CUBLAS_OP_T, CUBLAS_OP_N, n, n, n, &one, a.p, CUDA_R_32F, n, b.p, CUDA_R_32F, n, &none, t == 1 ? c1.p : c.p, CUDA_R_32F, n, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
        if (t > 1) expect(!memcmp(c.p, c1.p, n * n * sizeof(float)), "bits of one thread");
    }
    omp_set_num_threads(threads);
    cublasDestroy(h);
#else
    skipped = "this build has no OpenMP";
#endif
}

/* ---- speed: `speed` as argument ----------------------------------------------------------------------------------------- */

__global__ void add_kernel(float *y, const float *x, int n)
{
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] += x[i];
}
__global__ void warp_sum_kernel(float *y, const float *x)
{
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    float s = x[i];
    for (int k = 16; k > 0; k /= 2) s += __shfl_xor_sync(0xffffffff, s, k);
    y[i] = s;
}
template <class F> static double seconds(F f)   // the best of five
{
    double best = 1e9;
    for (int i = 0; i < 5; i++) {
        auto start = std::chrono::steady_clock::now();
        f();
        best = fmin(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
    return best;
}
static int speed()
{
    int n = 1 << 20, side = 1024;
    array<float> x(n), y(n), z(n);
    for (int i = 0; i < n; i++) x[i] = y[i] = 1;
    printf("%7.1f ns a thread, no barrier\n", seconds([&] { LAUNCH(add_kernel, n / 256, 256, y.p, x.p, n); }) / n * 1e9);
    printf("%7.1f ns a thread, 9 barriers (reduction of 256)\n", seconds([&] { LAUNCH(reduce_kernel<float>, n / 256, 256, y.p, x.p); }) / n * 1e9);
    printf("%7.1f ns a thread, 5 shuffles\n", seconds([&] { LAUNCH(warp_sum_kernel, n / 256, 256, y.p, x.p); }) / n * 1e9);
    cublasHandle_t h;
    cublasCreate(&h);
    float one = 1, none = 0;
    for (cudaDataType_t t : {CUDA_R_32F, CUDA_R_16BF}) {
        double s = seconds([&] { cublasGemmEx(h, CUBLAS_OP_T, CUBLAS_OP_N, side, side, side, &one, x.p, t, side, y.p, t, side, &none, z.p, CUDA_R_32F, side, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT); });
        printf("%7.1f GFLOP/s, product of 1024, %s\n", 2.0 * side * side * side / s * 1e-9, t == CUDA_R_32F ? "float" : "bf16");
    }
    cublasDestroy(h);
    return 0;
}

/* ---- main ----------------------------------------------------------------------------------------------------------------- */

static struct { const char *name, *claim; void (*run)(); bool every_order; } tests[] = {
    {"indices", "every thread of a grid runs once and knows its place", test_indices, true},
    {"reduction", "a tree reduction with barriers is exact", test_reduction, true},
    {"missing-barrier", "a missing barrier shows in another order of turns", test_missing_barrier, true},
    {"shuffles", "shuffles carry float, double and int, in parts of a warp and in a short one", test_shuffles, true},
    {"syncwarp", "a warp meets without the others", test_syncwarp, true},
    {"atomics", "atomicAdd loses nothing", test_atomics, true},
    {"poison", "shared memory is NaN before every block, and so is fresh device memory", test_poison, true},
    {"divergence", "a barrier or shuffle that only a part reaches ends the program and says where", test_divergence, true},
    {"asan", "AddressSanitizer names kernel, block and thread that leave an array", test_asan, true},
    {"gdb", "a breakpoint with a condition on block and thread, and steps over a barrier", test_gdb, false},
    {"bf16", "all 65536 values there and back, ties to even, NaN stays NaN", test_bf16, false},
    {"half", "all 65536 values there and back, ties to even, NaN stays NaN", test_half, false},
    {"launch-errors", "an impossible launch sets the error that a card would", test_launch_errors, false},
    {"memory", "copies, their direction, sizes, events", test_memory, false},
    {"gemm", "cuBLAS products of every type equal plain loops, beta 0 reads no C", test_gemm, false},
    {"gemm-arguments", "wrong arguments get the status that cuBLAS gives", test_gemm_arguments, false},
    {"gemm-bits", "the same bits for any number of threads", test_gemm_bits, false},
};

int main(int argc, char **argv)
{
    int passed = 0, failed = 0, left_out = 0;
    if (argc > 1 && !strcmp(argv[1], "speed")) return speed();
    for (auto &test : tests) {
        if (argc > 1 && !strstr(test.name, argv[1])) continue;
        failures = 0, skipped.clear();
        for (const char *order : orders) {
            set_order(order);
            int before = failures;
            if (test.every_order || order == orders[0]) test.run();
            if (failures > before) printf("      with CUDA_ORDER=%s\n", order);
        }
        (failures ? failed : !skipped.empty() ? left_out : passed)++;
        printf("%s %-16s %s%s%s\n", failures ? "✗" : skipped.empty() ? "✓" : "-", test.name, test.claim, skipped.empty() ? "" : ": skipped, ", skipped.c_str());
    }
    printf("%d passed, %d failed, %d skipped\n", passed, failed, left_out);
    return failed > 0;
}
