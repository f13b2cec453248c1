/*  test_cuda_on_cpu.cpp: what cuda_on_cpu.h claims, and the check of each claim. Small kernels with known answers.

        g++ -std=c++17 -O1 -g -fopenmp dev/test_cuda_on_cpu.cpp -o build/test_cuda_on_cpu && build/test_cuda_on_cpu

    An argument runs the tests whose name contains it; `speed` measures. The exit status is the verdict.               */

#include "cuda_on_cpu.h"
#include <chrono>
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
    pid_t child = -1;
    if (!pipe(ends)) child = fork();
    if (child < 0) {
        perror("a child of the test");
        exit(1);
    }
    if (!child) {
        dup2(ends[1], 1);
        dup2(ends[1], 2);
        close(ends[0]);
        close(ends[1]);
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

static void expect_words(const std::string &text, std::initializer_list<const char *> words)
{
    for (const char *word : words) {
        if (text.find(word) != std::string::npos) continue;
        failures++;
        printf("      expected '%s' in:\n%s", word, text.c_str());
    }
}

static void expect_stop(void (*f)(), std::initializer_list<const char *> words)
{
    int status;
    std::string text = in_child(f, &status);
    expect(!WIFEXITED(status) || WEXITSTATUS(status) != 0, "the program ends");
    expect_words(text, words);
}

/* ---- threads ---------------------------------------------------------------------------------------------------- */

__global__ void index_kernel(int *visits, dim3 grid, dim3 block)
{
    auto same = [](dim3 a, dim3 b) { return a.x == b.x && a.y == b.y && a.z == b.z; };
    bool right = same(gridDim, grid) && same(blockDim, block);
    int b = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    int t = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
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
static void test_reduction()
{
    reduce<float>();
    reduce<double>();
    reduce<int>();
}

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
    int wrong = wrong_after_broadcast(broadcast_kernel<false>);
    if (strcmp(getenv("CUDA_ORDER"), "forward")) expect(wrong > 0, "without, it is wrong in this order");
    else expect(wrong == 0, "without, chance makes it right in this order");
}

// In a block of 80 the last warp has 16 lanes. `parts`: two groups of one warp shuffle at different places.
template <class T> __global__ void shuffle_kernel(T *sum, T *parts)
{
    int t = threadIdx.x;
    int lanes = t < 64 ? 32 : 16;
    T x = (T)(t * t + 1);
    T s = x;
    for (int k = lanes / 2; k > 0; k /= 2) s += __shfl_xor_sync(0xffffffff, s, k);
    sum[t] = s;
    if (t % 32 < 8) parts[t] = __shfl_xor_sync(0xff, x, 7);
    else parts[t] = __shfl_xor_sync(0xffffff00, x, 1);
}
template <class T> static void shuffles()
{
    array<T> sum(80), parts(80);
    LAUNCH(shuffle_kernel, 1, 80, sum.p, parts.p);
    for (int t = 0; t < 80; t++) {
        int warp = t / 32 * 32;
        int lanes = t < 64 ? 32 : 16;
        auto x = [](int i) { return (double)(i * i + 1); };
        double s = 0;
        for (int i = warp; i < warp + lanes; i++) s += x(i);
        check(fabs((double)sum[t] - s), 0, "butterfly sum");
        check(fabs((double)parts[t] - x(t % 32 < 8 ? t ^ 7 : t ^ 1)), 0, "two groups in a warp");
    }
}
static void test_shuffles()
{
    shuffles<float>();
    shuffles<double>();
    shuffles<int>();
}

__global__ void warp_kernel(int *out)
{
    int t = threadIdx.x;
    if (t < 32) return;                         // a warp of its own: the others need not come
    out[t] = __shfl_xor_sync(0xffffffff, t, 31);
}
static void test_one_warp()
{
    array<int> out(64);
    LAUNCH(warp_kernel, 1, 64, out.p);
    for (int t = 32; t < 64; t++) expect(out[t] == (t ^ 31), "value of another lane");
}

// Every lane writes, then reads another's: right only if the warp meets in between, and again before the next round.
template <bool BEFORE, bool AFTER> __global__ void turn_kernel(int *wrong)
{
    __shared__ int left[64];
    for (int round = 0; round < 20; round++) {
        left[threadIdx.x] = round;
        if (BEFORE) __syncwarp();
        wrong[threadIdx.x] += left[threadIdx.x ^ 9] != round;
        if (AFTER) __syncwarp();
    }
}
static int wrong_turns(void (*kernel)(int *))
{
    array<int> wrong(64);
    int sum = 0;
    for (int t = 0; t < 64; t++) wrong[t] = 0;
    LAUNCH(kernel, 1, 64, wrong.p);
    for (int t = 0; t < 64; t++) sum += wrong[t];
    return sum;
}
static void test_warp_barrier()
{
    expect(wrong_turns(turn_kernel<true, true>) == 0, "with both barriers all is right");
    expect(wrong_turns(turn_kernel<false, true>) > 0, "without the first, a lane reads what was not yet written");
    expect(wrong_turns(turn_kernel<true, false>) > 0, "without the second, a lane reads what the next round has written");
}
static void test_quotient()
{
    float none = __fdividef(NAN, 2);
    expect(__fdividef(7, 2) == 3.5f && __fdividef(1, INFINITY) == 0 && none != none, "a quotient");
}

__global__ void atomic_kernel(int *i, float *f, double *d, unsigned long long *u)
{
    int seen = atomicAdd(i, 1);
    atomicAdd(f, 0.5f);
    atomicAdd(d, 0.25);
    atomicAdd(u, 1ull << 40);
    if (seen < 0) *i = -1000;
}
static void test_atomics()
{
    array<int> i(1);
    array<float> f(1);
    array<double> d(1);
    array<unsigned long long> u(1);
    i[0] = 0;
    f[0] = 0;
    d[0] = 0;
    u[0] = 0;
    LAUNCH(atomic_kernel, 5, 33, i.p, f.p, d.p, u.p);
    expect(i[0] == 165 && f[0] == 82.5f && d[0] == 41.25 && u[0] == 165ull << 40, "sums");
}

/* ---- what a GPU leaves to chance -------------------------------------------------------------------------------- */

template <class T> __device__ T left_over()
{
    __shared__ T s[40];
    T x = s[threadIdx.x];
    s[threadIdx.x] = 1;
    return x;
}
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
    memset(out.p, 0, out.n * 4);
    memset(out2.p, 0, out2.n * 8);
    LAUNCH(stale_kernel, 3, 40, out.p, out2.p);
    for (size_t i = 0; i < out.n; i++) expect(isnan(out[i]) && isnan(out2[i]), "shared memory is NaN before every block");
}

__global__ void returned_kernel()
{
    if (threadIdx.x < 33) return;
    __syncthreads();
}
__global__ void elsewhere_kernel()
{
    if (threadIdx.x % 2) __syncthreads();
    else
        __syncthreads();
}
__global__ void half_warp_kernel(float *out)
{
    if (threadIdx.x < 16) out[threadIdx.x] = __shfl_xor_sync(0xffffffff, 1.f, 1);
}
__global__ void absent_lane_kernel(float *out) { out[threadIdx.x] = __shfl_xor_sync(0xffffffff, 1.f, 16); }
static void test_divergence()
{
    static float out[48];
    expect_stop([] { LAUNCH(returned_kernel, dim3(2, 3), 64); },
                {"kernel returned_kernel, block (", "of (2,3,1)", "31 of 64 threads", "test_cuda_on_cpu.cpp:",
                 "wait in __syncthreads", "33 of 64 threads", "returned"});
    expect_stop([] { LAUNCH(elsewhere_kernel, 1, 64); },
                {"kernel elsewhere_kernel", "different barriers", "32 of 64 threads"});
    expect_stop([] { LAUNCH(half_warp_kernel, 1, 32, out); },
                {"kernel half_warp_kernel", "16 of 32 threads", "wait in __shfl_xor_sync, mask ffffffff"});
    expect_stop([] { LAUNCH(absent_lane_kernel, 1, 48, out); },
                {"kernel absent_lane_kernel", "a lane that does not take part"});
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
__global__ void exit_kernel()
{
    __syncthreads();
    if (threadIdx.x == 5) _exit(3);
    __syncthreads();
}
static void write_beside(int i)
{
    array<float> x(64);
    LAUNCH(beside_kernel, 2, 32, x.p, i);
}
static void write_beside_shared()
{
    array<int> x(64);
    LAUNCH(beside_shared_kernel, 2, 32, x.p, 32);
}

static void test_asan()
{
#ifdef __SANITIZE_ADDRESS__
    array<int> out(1024);
    LAUNCH(deep_kernel, 2, 1024, out.p);
    for (int t = 0; t < 1024; t++) expect(out[t] == 100 + t, "a kernel inside its bounds");
    // It knows on which stack a thread runs: else a call that does not return makes it warn.
    int status;
    std::string said = in_child([] { LAUNCH(exit_kernel, 1, 32); }, &status);
    expect(said.empty() && WEXITSTATUS(status) == 3, "a kernel may end the program");
    const char *where = "block (1,0,0) of (2,1,1), thread (5,0,0)";
    expect_stop([] { write_beside(64); }, {"AddressSanitizer", "kernel beside_kernel,", where});
    expect_stop([] { write_beside(-1); }, {"AddressSanitizer", "kernel beside_kernel,", where});
    expect_stop(write_beside_shared, {"AddressSanitizer", "kernel beside_shared_kernel,", where});
#else
    (void)deep_kernel;
    (void)exit_kernel;
    (void)write_beside;
    (void)write_beside_shared;
    skipped = "this build has no AddressSanitizer";
#endif
}

static void test_gdb()
{
#ifndef __SANITIZE_ADDRESS__
    if (system("gdb --version >/dev/null 2>&1")) {
        skipped = "no gdb here";
        return;
    }
    int status;
    std::string text = in_child([] {
        char self[4096] = "";
        if (readlink("/proc/self/exe", self, sizeof self - 1) < 0) _exit(1);
        execlp("gdb", "gdb", "-nx", "-batch", "-ex", "set debuginfod enabled off",
               "-ex", "break 'reduce_kernel<float>' if blockIdx.x == 2 && threadIdx.x == 5", "-ex", "run",
               "-ex", "print threadIdx", "-ex", "next 6", "-ex", "print blockIdx.x * 1000 + threadIdx.x",
               "-ex", "kill", "--args", self, "reduction", (char *)NULL);
    }, &status);
    if (text.find("ptrace") != std::string::npos) skipped = "gdb may not trace here";
    else expect_words(text, {"{x = 5, y = 0, z = 0}", "= 2005"});
#else
    skipped = "in the build without sanitizers";
#endif
}

/* ---- numbers of 16 bits ----------------------------------------------------------------------------------------- */

// Every number of 16 bits survives the way to float and back, and what lies between two neighbours goes to the nearer,
// in the middle to the even one.
template <class H> static void round_trips(uint16_t infinity)
{
    auto narrow = [](float x) { return H(x); };
    auto widen = [](H h) { return (float)h; };
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
    for (float x : {INFINITY, FLT_MAX}) {
        expect(narrow(x).bits == infinity, "too large a number");
        expect(narrow(-x).bits == (infinity | 0x8000), "too large a number below zero");
    }
}
static void test_bf16()
{
    round_trips<__nv_bfloat16>(0x7f80);
    for (uint32_t low : {1u, 0xffffu}) {
        __nv_bfloat16 nan = cuda_on_cpu::float_of(0x7f800000 | low);
        expect(isnan((float)nan), "a NaN of low bits stays NaN");
    }
}
static void test_half() { round_trips<__half>(0x7c00); }

/* ---- the runtime ------------------------------------------------------------------------------------------------ */

static cudaError_t error_of(dim3 grid, dim3 block)
{
    array<float> x(64);
    LAUNCH(beside_kernel, grid, block, x.p, 0);
    return cudaGetLastError();
}
static void test_launch_errors()
{
    const cudaError_t refused = cudaErrorInvalidConfiguration;
    expect(error_of(1, 1024) == cudaSuccess, "1024 threads");
    for (dim3 block : {dim3(1025), dim3(0), dim3(32, 33), dim3(1, 1, 65)})
        expect(error_of(1, block) == refused, "a block that cannot be");
    for (dim3 grid : {dim3(0), dim3(1, 65536), dim3(1, 1, 65536), dim3(0x80000000)})
        expect(error_of(grid, 32) == refused, "a grid that cannot be");
    expect(cudaGetLastError() == cudaSuccess, "to ask clears it");
    expect(!strcmp(cudaGetErrorString(refused), "invalid configuration argument"), "its text");
}

static void test_memory()
{
    size_t before, after, total;
    cudaMemGetInfo(&before, &total);
    int host[12], back[12] = {};
    int *p, *none;
    for (int i = 0; i < 12; i++) host[i] = i;
    expect(cudaMalloc(&p, sizeof host) == cudaSuccess && (uintptr_t)p % 256 == 0, "aligned memory");
    cudaMemGetInfo(&after, &total);
    expect(before - after == sizeof host, "free memory");
    expect(cudaMalloc(&none, total) == cudaErrorMemoryAllocation && !none, "more than there is");
    expect(cudaGetLastError() == cudaErrorMemoryAllocation, "its error is kept");
    expect(cudaMemcpy(p, host, sizeof host, cudaMemcpyHostToDevice) == cudaSuccess, "to the device");
    expect(cudaMemcpy(back, p + 2, 40, cudaMemcpyDeviceToHost) == cudaSuccess, "from the device");
    for (int i = 0; i < 10; i++) expect(back[i] == host[i + 2], "from the device");
    expect(cudaMemcpyAsync(p + 6, p, 12, cudaMemcpyDeviceToDevice) == cudaSuccess && p[6] == 0 && p[8] == 2 && p[9] == 9,
           "within the device");
    expect(cudaMemcpyAsync(p, host, 4, cudaMemcpyDeviceToDevice) == cudaErrorInvalidValue, "from the host, not within");
    expect(cudaMemcpyAsync(back, p, 4, cudaMemcpyDeviceToDevice) == cudaErrorInvalidValue, "to the host, not within");
    expect(cudaMemsetAsync(p + 9, 0, 4) == cudaSuccess && p[8] == 2 && p[9] == 0 && p[10] == 10, "set bytes later");
    expect(cudaMemsetAsync(host, 1, 4) == cudaErrorInvalidValue, "set bytes later that are not the device's");
    expect(cudaMemset(p, 1, 8) == cudaSuccess && p[0] == 0x01010101 && p[1] == p[0] && p[2] == 2, "set bytes");
    expect(cudaMemset(host, 1, 4) == cudaErrorInvalidValue, "set bytes that are not the device's");
    expect(cudaMemcpy(host, p, 4, cudaMemcpyHostToDevice) == cudaErrorInvalidValue, "the wrong direction");
    expect(cudaMemcpy(back, host, 4, cudaMemcpyHostToDevice) == cudaErrorInvalidValue, "to no device");
    expect(cudaMemcpy(back, host, 4, cudaMemcpyDeviceToHost) == cudaErrorInvalidValue, "from no device");
    expect(cudaFree(p) == cudaSuccess && cudaFree(p) == cudaErrorInvalidValue, "freed once");
    expect(cudaFree(NULL) == cudaSuccess, "nothing to free");
    cudaGetLastError();
}

/* ---- cuBLAS ----------------------------------------------------------------------------------------------------- */

static size_t bytes_of(cudaDataType_t t) { return t == CUDA_R_64F ? 8 : t == CUDA_R_32F ? 4 : 2; }
static double get(const void *p, cudaDataType_t t, size_t i)
{
    if (t == CUDA_R_64F) return ((const double *)p)[i];
    if (t == CUDA_R_32F) return ((const float *)p)[i];
    if (t == CUDA_R_16BF) return (float)((const __nv_bfloat16 *)p)[i];
    return (float)((const __half *)p)[i];
}
static void put(void *p, cudaDataType_t t, size_t i, double x)
{
    if (t == CUDA_R_64F) ((double *)p)[i] = x;
    else if (t == CUDA_R_32F) ((float *)p)[i] = (float)x;
    else if (t == CUDA_R_16BF) ((__nv_bfloat16 *)p)[i] = (float)x;
    else ((__half *)p)[i] = (float)x;
}
static double noise()
{
    static uint32_t s = 1;
    s = s * 1664525 + 1013904223;
    return s / 2147483648.0 - 1;
}

static cublasHandle_t handle()
{
    static cublasHandle_t h;
    if (!h) cublasCreate(&h);
    return h;
}

// One product of floats, op(A) op(B).
static cublasStatus_t float_product(cublasHandle_t h, cublasOperation_t op_a, cublasOperation_t op_b, int m, int n, int k,
                                    const void *a, cudaDataType_t in, int lda, const void *b, int ldb, float *c, int ldc)
{
    float one = 1;
    float none = 0;
    return cublasGemmStridedBatchedEx(h, op_a, op_b, m, n, k, &one, a, in, lda, 0, b, in, ldb, 0, &none,
                                      c, CUDA_R_32F, ldc, 0, 1, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
}

// A matrix of a batch: `rows` by `cols` by columns, ld apart. Fills it with noise.
static void fill(void *p, cudaDataType_t t, size_t from, int rows, int cols, int ld)
{
    for (int col = 0; col < cols; col++)
        for (int row = 0; row < rows; row++) put(p, t, from + row + (size_t)col * ld, noise());
}

struct types { cudaDataType_t in, out; cublasComputeType_t compute; double tol; };
struct shape { int m, n, k; bool repeat; };     // repeat: one A for the whole batch

// One product: op(A) is m by k, op(B) k by n; the matrices of a batch are sa, sb and sc apart (sa 0: one A for all).
struct product {
    types t;
    shape s;
    bool ta, tb;
    int batch, lda, ldb, ldc;
    size_t sa, sb, sc;
    double alpha, beta;
};

static cublasStatus_t multiply(const product &p, const void *a, const void *b, void *c)
{
    float alpha32 = (float)p.alpha;
    float beta32 = (float)p.beta;
    bool f64 = p.t.compute == CUBLAS_COMPUTE_64F;
    return cublasGemmStridedBatchedEx(
        handle(), p.ta ? CUBLAS_OP_T : CUBLAS_OP_N, p.tb ? CUBLAS_OP_T : CUBLAS_OP_N, p.s.m, p.s.n, p.s.k,
        f64 ? (const void *)&p.alpha : &alpha32, a, p.t.in, p.lda, p.sa, b, p.t.in, p.ldb, p.sb,
        f64 ? (const void *)&p.beta : &beta32, c, p.t.out, p.ldc, p.sc, p.batch, p.t.compute, CUBLAS_GEMM_DEFAULT);
}

// The sum over k of op(A) op(B) at this place, by a plain loop in double.
static double plain_sum(const product &p, const void *a, const void *b, int i, int row, int col)
{
    double y = 0;
    for (int l = 0; l < p.s.k; l++) {
        size_t in_a = i * p.sa + (p.ta ? l + (size_t)row * p.lda : row + (size_t)l * p.lda);
        size_t in_b = i * p.sb + (p.tb ? col + (size_t)l * p.ldb : l + (size_t)col * p.ldb);
        y += get(a, p.t.in, in_a) * get(b, p.t.in, in_b);
    }
    return y;
}

// C against the plain loops; `old` is C as it was, which stands between the columns still.
static void check_product(const product &p, const void *a, const void *b, const char *c, const char *old)
{
    size_t size = bytes_of(p.t.out);
    double diff = 0;
    double norm = 0;
    for (int i = 0; i < p.batch; i++)
        for (int col = 0; col < p.s.n; col++)
            for (int row = 0; row < p.ldc; row++) {
                size_t at = i * p.sc + row + (size_t)col * p.ldc;
                if (row >= p.s.m) {
                    expect(!memcmp(c + at * size, old + at * size, size), "between the columns of C");
                    continue;
                }
                double y = p.alpha * plain_sum(p, a, b, i, row, col);
                if (p.beta != 0) y += p.beta * get(old, p.t.out, at);
                diff += pow(get(c, p.t.out, at) - y, 2);
                norm += y * y;
            }
    if (p.s.m && p.s.n && (p.s.k || p.beta != 0)) check(sqrt(diff / norm), p.t.tol, "relative L2 distance to plain loops");
    else check(diff, 0, "nothing to sum");
    bool tf32 = p.t.compute == CUBLAS_COMPUTE_32F_FAST_TF32;
    if (p.s.m && p.s.n && p.s.k && tf32) expect(sqrt(diff / norm) > 1e-5, "TF32 shows");
}

// A product of every type, each op, batches apart and alike, against three plain loops in double. Gaps between the
// columns (ld > rows) hold NaN in A and B, and must keep what they hold in C.
static void try_product(types t, bool ta, bool tb, double beta, int batch, shape s)
{
    int a_rows = ta ? s.k : s.m;
    int a_cols = ta ? s.m : s.k;
    int b_rows = tb ? s.n : s.k;
    int b_cols = tb ? s.k : s.n;
    product p = {t, s, ta, tb, batch, a_rows + 3, b_rows + 1, s.m + 2, 0, 0, 0, 0.75, beta};
    p.sa = s.repeat ? 0 : (size_t)p.lda * a_cols + 5;
    p.sb = (size_t)p.ldb * b_cols;
    p.sc = (size_t)p.ldc * s.n + 1;
    array<char> a(((size_t)p.lda * a_cols + p.sa * batch) * bytes_of(t.in));
    array<char> b(p.sb * batch * bytes_of(t.in));
    array<char> c(p.sc * batch * bytes_of(t.out));
    array<char> old(c.n);
    for (int i = 0; i < batch; i++) {
        fill(a.p, t.in, i * p.sa, a_rows, a_cols, p.lda);
        fill(b.p, t.in, i * p.sb, b_rows, b_cols, p.ldb);
        if (beta != 0) fill(c.p, t.out, i * p.sc, s.m, s.n, p.ldc);
    }
    memcpy(old.p, c.p, c.n);
    expect(multiply(p, a.p, b.p, c.p) == CUBLAS_STATUS_SUCCESS, "the product runs");
    check_product(p, a.p, b.p, c.p, old.p);
}

static void test_gemm()
{
    // The tolerance is the rounding of the result and of sums of 70; TF32: of two factors, 2^-11 each.
    static const types kinds[] = {
        {CUDA_R_64F, CUDA_R_64F, CUBLAS_COMPUTE_64F, 1e-15},
        {CUDA_R_32F, CUDA_R_32F, CUBLAS_COMPUTE_32F, 4e-7},
        {CUDA_R_32F, CUDA_R_32F, CUBLAS_COMPUTE_32F_FAST_TF32, 1e-3},
        {CUDA_R_16BF, CUDA_R_32F, CUBLAS_COMPUTE_32F, 4e-7},
        {CUDA_R_16BF, CUDA_R_16BF, CUBLAS_COMPUTE_32F, 3e-3},
        {CUDA_R_16F, CUDA_R_32F, CUBLAS_COMPUTE_32F, 4e-7},
        {CUDA_R_16F, CUDA_R_16F, CUBLAS_COMPUTE_32F, 4e-4},
    };
    static const shape shapes[] = {{67, 37, 70, false}, {1, 5, 9, true}, {4, 3, 0, false}, {0, 3, 4, false}};
    for (const types &t : kinds)
        for (int ops = 0; ops < 4; ops++)
            for (double beta : {0., 1., -0.5})
                for (int batch : {1, 3})
                    for (const shape &s : shapes) try_product(t, ops & 1, ops & 2, beta, batch, s);
}

static void test_gemm_arguments()
{
    static const struct {
        const char *what;
        int m, n, k, lda, ldb, ldc;
        cudaDataType_t in;
        cublasOperation_t op;
        cublasStatus_t status;
    } cases[] = {
        {"the smallest ld",       4,  3,  2, 4, 2, 4, CUDA_R_32F, CUBLAS_OP_N, CUBLAS_STATUS_SUCCESS},
        {"the same, transposed",  4,  3,  2, 2, 3, 4, CUDA_R_32F, CUBLAS_OP_T, CUBLAS_STATUS_SUCCESS},
        {"nothing to do",         0,  0,  0, 1, 1, 1, CUDA_R_32F, CUBLAS_OP_N, CUBLAS_STATUS_SUCCESS},
        {"lda too small",         4,  3,  2, 3, 2, 4, CUDA_R_32F, CUBLAS_OP_N, CUBLAS_STATUS_INVALID_VALUE},
        {"ldb too small",         4,  3,  2, 4, 1, 4, CUDA_R_32F, CUBLAS_OP_N, CUBLAS_STATUS_INVALID_VALUE},
        {"ldc too small",         4,  3,  2, 4, 2, 3, CUDA_R_32F, CUBLAS_OP_N, CUBLAS_STATUS_INVALID_VALUE},
        {"lda, transposed",       4,  3,  2, 1, 3, 4, CUDA_R_32F, CUBLAS_OP_T, CUBLAS_STATUS_INVALID_VALUE},
        {"ldb, transposed",       4,  3,  2, 2, 2, 4, CUDA_R_32F, CUBLAS_OP_T, CUBLAS_STATUS_INVALID_VALUE},
        {"ld of 0",               0,  3,  2, 0, 2, 1, CUDA_R_32F, CUBLAS_OP_N, CUBLAS_STATUS_INVALID_VALUE},
        {"m < 0",                -1,  3,  2, 4, 2, 4, CUDA_R_32F, CUBLAS_OP_N, CUBLAS_STATUS_INVALID_VALUE},
        {"n < 0",                 4, -3,  2, 4, 2, 4, CUDA_R_32F, CUBLAS_OP_N, CUBLAS_STATUS_INVALID_VALUE},
        {"k < 0",                 4,  3, -2, 4, 2, 4, CUDA_R_32F, CUBLAS_OP_N, CUBLAS_STATUS_INVALID_VALUE},
        {"double summed in float", 4, 3,  2, 4, 2, 4, CUDA_R_64F, CUBLAS_OP_N, CUBLAS_STATUS_NOT_SUPPORTED},
    };
    float x[64] = {};
    for (auto &c : cases) {
        cublasStatus_t got = float_product(handle(), c.op, c.op, c.m, c.n, c.k, x, c.in, c.lda, x, c.ldb, x, c.ldc);
        expect(got == c.status, c.what);
    }
    cublasStatus_t got = float_product(NULL, CUBLAS_OP_N, CUBLAS_OP_N, 4, 3, 2, x, CUDA_R_32F, 4, x, 2, x, 4);
    expect(got == CUBLAS_STATUS_NOT_INITIALIZED, "no handle");
}

// A product described to cublasLt: the bits of cublasGemmStridedBatchedEx by every kernel that is offered. None is offered where
// shapes do not fit, and one that was offered is refused elsewhere, by memory that begins anywhere, and without its work space.
static void test_gemm_lt()
{
    enum { M = 300, N = 130, K = 70, OFFERS = 4 };
    array<float> a(M * K), b(N * K), want(M * N), got(M * N);
    for (int i = 0; i < M * K; i++) a[i] = (float)noise();
    for (int i = 0; i < N * K; i++) b[i] = (float)noise();
    float_product(handle(), CUBLAS_OP_T, CUBLAS_OP_N, M, N, K, a.p, CUDA_R_32F, K, b.p, K, want.p, M);
    cublasLtHandle_t lt;
    cublasLtMatmulDescOpaque_t d = {};
    cublasLtMatrixLayoutOpaque_t A, B, C;
    cublasLtMatmulPreferenceOpaque_t wish = {};
    cublasLtMatmulHeuristicResult_t offers[OFFERS];
    cublasOperation_t across = CUBLAS_OP_T;
    float one = 1, none = 0;
    int count = 0;
    cublasLtCreate(&lt);
    cublasLtMatmulDescInit(&d, CUBLAS_COMPUTE_32F, CUDA_R_32F);
    cublasLtMatmulDescSetAttribute(&d, CUBLASLT_MATMUL_DESC_TRANSA, &across, sizeof across);
    cublasLtMatrixLayoutInit(&A, CUDA_R_32F, K, M, K);
    cublasLtMatrixLayoutInit(&B, CUDA_R_32F, K, N, K);
    cublasLtMatrixLayoutInit(&C, CUDA_R_32F, M, N, M);
    cublasLtMatmulAlgoGetHeuristic(lt, &d, &A, &B, &C, &C, &wish, OFFERS, offers, &count);
    expect(count == 2 && offers[1].wavesCount > 0, "two kernels are offered");
    for (int i = 0; i < count; i++) {
        memset(got.p, 0xff, M * N * sizeof(float));
        cublasStatus_t status = cublasLtMatmul(lt, &d, &one, a.p, &A, b.p, &B, &none, got.p, &C, got.p, &C, &offers[i].algo,
                                               NULL, 0, 0);
        expect(status == CUBLAS_STATUS_SUCCESS && !memcmp(got.p, want.p, M * N * sizeof(float)), "the same bits");
    }
    auto multiply = [&](const float *from, size_t space) {
        offers[0].algo.work_space = space;
        return cublasLtMatmul(lt, &d, &one, from, &A, b.p, &B, &none, got.p, &C, got.p, &C, &offers[0].algo, NULL, 0, 0);
    };
    expect(multiply(a.p, 0) == CUBLAS_STATUS_SUCCESS, "where all fits");
    expect(multiply(a.p + 1, 0) == CUBLAS_STATUS_INVALID_VALUE, "a factor that does not begin at 256 bytes");
    expect(multiply(a.p, 64) == CUBLAS_STATUS_INVALID_VALUE, "no work space");
    cublasLtMatrixLayoutInit(&B, CUDA_R_32F, K - 1, N, K);
    expect(multiply(a.p, 0) == CUBLAS_STATUS_INVALID_VALUE, "a kernel that was offered for another product");
    cublasLtMatmulAlgoGetHeuristic(lt, &d, &A, &B, &C, &C, &wish, OFFERS, offers, &count);
    expect(count == 0, "none where the shapes do not fit");
}

static void test_gemm_bits()
{
#ifdef _OPENMP
    int n = 131;
    int threads = omp_get_max_threads();
    array<float> a(n * n), b(n * n), c(n * n), alone(n * n);
    for (int i = 0; i < n * n; i++) {
        a[i] = (float)noise();
        b[i] = (float)noise();
    }
    for (int t : {1, 2, 3, 4}) {
        omp_set_num_threads(t);
        float_product(handle(), CUBLAS_OP_T, CUBLAS_OP_N, n, n, n, a.p, CUDA_R_32F, n, b.p, n, t == 1 ? alone.p : c.p, n);
        if (t > 1) expect(!memcmp(c.p, alone.p, n * n * sizeof(float)), "bits of one thread");
    }
    omp_set_num_threads(threads);
#else
    skipped = "this build has no OpenMP";
#endif
}

/* ---- speed: `speed` as argument --------------------------------------------------------------------------------- */

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
    int n = 1 << 20;
    int side = 1024;
    array<float> x(n), y(n), z(n);
    for (int i = 0; i < n; i++) x[i] = y[i] = 1;
    double plain = seconds([&] { LAUNCH(add_kernel, n / 256, 256, y.p, x.p, n); });
    double barriers = seconds([&] { LAUNCH(reduce_kernel<float>, n / 256, 256, y.p, x.p); });
    double shuffles = seconds([&] { LAUNCH(warp_sum_kernel, n / 256, 256, y.p, x.p); });
    printf("%7.1f ns a thread, no barrier\n", plain / n * 1e9);
    printf("%7.1f ns a thread, 9 barriers (reduction of 256)\n", barriers / n * 1e9);
    printf("%7.1f ns a thread, 5 shuffles\n", shuffles / n * 1e9);
    for (cudaDataType_t t : {CUDA_R_32F, CUDA_R_16BF}) {
        double s = seconds([&] {
            float_product(handle(), CUBLAS_OP_T, CUBLAS_OP_N, side, side, side, x.p, t, side, y.p, side, z.p, side);
        });
        double rate = 2.0 * side * side * side / s;
        printf("%7.1f GFLOP/s, product of 1024, %s\n", rate * 1e-9, t == CUDA_R_32F ? "float" : "bf16");
    }
    return 0;
}

/* ---- main ------------------------------------------------------------------------------------------------------- */

static struct { const char *name, *claim; void (*run)(); bool every_order; } tests[] = {
    {"indices", "every thread of a grid runs once and knows its place", test_indices, true},
    {"reduction", "a tree reduction with barriers is exact", test_reduction, true},
    {"missing-barrier", "a missing barrier shows in another order of turns", test_missing_barrier, true},
    {"shuffles", "shuffles carry float, double and int, in parts of a warp and in a short one", test_shuffles, true},
    {"one-warp", "a warp meets without the others", test_one_warp, true},
    {"warp-barrier", "__syncwarp holds back a warp, and that it is missing shows", test_warp_barrier, true},
    {"quotient", "__fdividef divides", test_quotient, false},
    {"atomics", "atomicAdd loses nothing", test_atomics, true},
    {"poison", "shared memory is NaN before every block, and so is fresh device memory", test_poison, true},
    {"divergence", "a barrier or shuffle that only a part reaches ends the program and says where", test_divergence, true},
    {"asan", "AddressSanitizer names kernel, block and thread that leave an array", test_asan, true},
    {"gdb", "a breakpoint with a condition on block and thread, and steps over a barrier", test_gdb, false},
    {"bf16", "all 65536 values there and back, ties to even, NaN stays NaN", test_bf16, false},
    {"half", "all 65536 values there and back, ties to even, NaN stays NaN", test_half, false},
    {"launch-errors", "an impossible launch sets the error that a card would", test_launch_errors, false},
    {"memory", "copies, their direction, sizes", test_memory, false},
    {"gemm", "cuBLAS products of every type equal plain loops, beta 0 reads no C", test_gemm, false},
    {"gemm-arguments", "wrong arguments get the status that cuBLAS gives", test_gemm_arguments, false},
    {"gemm-lt", "a product described to cublasLt is the same", test_gemm_lt, false},
    {"gemm-bits", "the same bits for any number of threads", test_gemm_bits, false},
};

int main(int argc, char **argv)
{
    int passed = 0, failed = 0, left_out = 0;
    if (argc > 1 && !strcmp(argv[1], "speed")) return speed();
    for (auto &test : tests) {
        if (argc > 1 && !strstr(test.name, argv[1])) continue;
        failures = 0;
        skipped.clear();
        for (const char *order : orders) {
            set_order(order);
            int before = failures;
            if (test.every_order || order == orders[0]) test.run();
            if (failures > before) printf("      with CUDA_ORDER=%s\n", order);
        }
        (failures ? failed : !skipped.empty() ? left_out : passed)++;
        printf("%s %-16s %s", failures ? "✗" : skipped.empty() ? "✓" : "-", test.name, test.claim);
        printf("%s%s\n", skipped.empty() ? "" : ": skipped, ", skipped.c_str());
    }
    printf("%d passed, %d failed, %d skipped\n", passed, failed, left_out);
    return failed > 0;
}
