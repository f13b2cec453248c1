//  run/ranks_nccl.c: what ranks swap between GPUs, by NCCL: run/ranks.h. One GPU a rank.

#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <nccl.h>
#include "ranks.h"

static ncclComm_t all;

static void check_cuda(cudaError_t e, const char *what)
{
    if (e != cudaSuccess) die("GPU: %s: %s", what, cudaGetErrorString(e));
}

static void check_nccl(ncclResult_t e, const char *what)
{
    if (e != ncclSuccess) die("NCCL: %s: %s", what, ncclGetErrorString(e));
}

// Rank 0 draws a name for the meeting, and the others learn it, each byte as a number that rank 0 alone
// knows.
static ncclUniqueId meeting(void)
{
    ncclUniqueId id;
    double bytes[sizeof id.internal] = {0};
    if (!this_rank()) check_nccl(ncclGetUniqueId(&id), "beginning");
    for (size_t i = 0; i < sizeof id.internal && !this_rank(); i++) bytes[i] = (unsigned char)id.internal[i];
    ranks_add(bytes, sizeof id.internal);
    for (size_t i = 0; i < sizeof id.internal; i++) id.internal[i] = (char)(unsigned char)bytes[i];
    return id;
}

// The first rank of a machine gets its first GPU, and so on.
void gpu_begin(int local)
{
    int devices = 0;
    check_cuda(cudaGetDeviceCount(&devices), "counting devices");
    if (local >= devices)
        die("rank %d is number %d of its machine, which has %d GPUs; start a rank a GPU",
            this_rank(), local + 1, devices);
    check_cuda(cudaSetDevice(local), "choosing a device");
    check_nccl(ncclCommInitRank(&all, ranks(), meeting(), this_rank()), "beginning");
}

// In the stream of all kernels: what they computed is sent, and who reads what came in comes later.
void gpu_swap(dev to, dev from, size_t bytes, int partner)
{
    check_nccl(ncclGroupStart(), "swapping sums");
    check_nccl(ncclSend(from, bytes, ncclChar, partner, all, 0), "swapping sums");
    check_nccl(ncclRecv(to, bytes, ncclChar, partner, all, 0), "swapping sums");
    check_nccl(ncclGroupEnd(), "swapping sums");
}
