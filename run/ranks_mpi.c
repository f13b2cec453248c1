//  run/ranks_mpi.c: run/ranks.h for several ranks, by MPI. No other file knows of MPI.

#define _GNU_SOURCE
#include <mpi.h>
#include <sched.h>
#include "ranks.h"

static int count = 1, rank;             // until ranks_begin()
static MPI_Comm machine;                // the ranks of this machine
static int begun;                       // and not ended

int ranks(void) { return count; }
int this_rank(void) { return rank; }

// A failure of MPI itself: a cable, a machine that is gone. MPI is told to return then, so that there is one
// line in our words.
static void check(int error, const char *what)
{
    char text[MPI_MAX_ERROR_STRING] = "";
    int n;
    if (error == MPI_SUCCESS) return;
    MPI_Error_string(error, text, &n);
    die("MPI: %s: %s", what, text);
}

void ranks_end(void)
{
    if (!begun) return;
    fflush(stdout);
    begun = 0;
    told = &told_here;
    MPI_Finalize();                     // returns when all ranks are here
}

// Runs at exit(). Who fails ends all: the others may wait for it already. What was half-written is removed
// before.
static void on_end(int status, void *unused)
{
    (void)unused;
    if (begun && status) MPI_Abort(MPI_COMM_WORLD, status);
    ranks_end();
}

// What all ranks of a machine find wrong, a bad option say, is said once: whoever sets this byte first speaks,
// and the others wait to be ended.
static void share_told(void)
{
    MPI_Win window;
    MPI_Aint bytes;
    int unit;
    char *mine;
    check(MPI_Win_allocate_shared(1, 1, MPI_INFO_NULL, machine, &mine, &window), "sharing memory");
    *mine = 0;
    check(MPI_Win_shared_query(window, 0, &bytes, &unit, &told), "sharing memory");
    check(MPI_Barrier(machine), "beginning");
}

// Rank 0 alone prints. What another one has to say before it ends all goes where it always did.
static void fall_silent(void)
{
    int nowhere = open("/dev/null", O_WRONLY);
    errors_to = fcntl(STDERR_FILENO, F_DUPFD_CLOEXEC, STDERR_FILENO + 1);
    if (nowhere < 0 || errors_to < 0 || dup2(nowhere, STDOUT_FILENO) < 0 || dup2(nowhere, STDERR_FILENO) < 0)
        errors_to = STDERR_FILENO, die("a rank without output: %s", strerror(errno));
    close(nowhere);
}

void ranks_begin(void)
{
    setenv("OMPI_MCA_mpi_yield_when_idle", "1", 0);     // a rank that waits leaves its CPU to whoever works
    if (MPI_Init(NULL, NULL) != MPI_SUCCESS) die("MPI does not begin; start with mpirun -n N");
    begun = 1;
    on_exit(on_end, NULL);
    MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
    MPI_Comm_size(MPI_COMM_WORLD, &count);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    if (count == 1) return;
    int local, shared = MPI_COMM_TYPE_SHARED;
    check(MPI_Comm_split_type(MPI_COMM_WORLD, shared, rank, MPI_INFO_NULL, &machine), "beginning");
    MPI_Comm_rank(machine, &local);
    share_told();
    shows_progress = 0;                 // mpirun makes a terminal even where its own output goes to a file
    if (rank) fall_silent();
    if (gpu_begin) gpu_begin(local);
}

// Of a CPU that n ranks of this machine may use, each gets an n-th. mpirun binds ranks to CPUs of their own,
// unless it is told --bind-to none. A container's quota, which makes fewer CPUs than there are, is shared by all.
int threads_of_rank(int cpus)
{
    static int users[CPU_SETSIZE];
    cpu_set_t mine;
    double share = 0;
    int here;
    if (count == 1 || sched_getaffinity(0, sizeof mine, &mine)) return cpus;
    for (int i = 0; i < CPU_SETSIZE; i++) users[i] = CPU_ISSET(i, &mine) != 0;
    check(MPI_Allreduce(MPI_IN_PLACE, users, CPU_SETSIZE, MPI_INT, MPI_SUM, machine), "counting CPUs");
    MPI_Comm_size(machine, &here);
    for (int i = 0; i < CPU_SETSIZE; i++) if (CPU_ISSET(i, &mine)) share += 1.0 / users[i];
    if (cpus < CPU_COUNT(&mine)) share = fmin(share, (double)cpus / here);
    return share < 1 ? 1 : (int)(share + 1e-6);
}

void ranks_compare(const char *what, const char *mine)
{
    enum { MOST = PATH_MAX };
    char first[MOST], own[MOST];
    if (count == 1) return;
    snprintf(first, MOST, "%s", mine);
    memcpy(own, first, MOST);
    check(MPI_Bcast(first, MOST, MPI_CHAR, 0, MPI_COMM_WORLD), "comparing ranks");
    if (strcmp(first, own))
        die("rank %d has %s %s, rank 0 has %s; start all ranks with the same", rank, what, own, first);
}

void ranks_add(double *x, int n)
{
    if (count == 1) return;
    check(MPI_Allreduce(MPI_IN_PLACE, x, n, MPI_DOUBLE, MPI_SUM, MPI_COMM_WORLD), "sharing results");
}

int ranks_largest(int x)
{
    if (count == 1) return x;
    check(MPI_Allreduce(MPI_IN_PLACE, &x, 1, MPI_INT, MPI_MAX, MPI_COMM_WORLD), "agreeing");
    return x;
}

void ranks_swap(void *to, const void *from, size_t bytes, int partner)
{
    int n = (int)bytes;                 // of a piece, or of a number
    check(MPI_Sendrecv(from, n, MPI_BYTE, partner, 0, to, n, MPI_BYTE, partner, 0,
                       MPI_COMM_WORLD, MPI_STATUS_IGNORE), "swapping sums");
}

// The device's memory is the host's, unless run/ranks_nccl.c is linked, which sends from GPU to GPU.
void ranks_swap_device(dev to, dev from, size_t bytes, int partner)
{
    if (gpu_swap) gpu_swap(to, from, bytes, partner);
    else ranks_swap(to, from, bytes, partner);
}
