//  run/one_rank.h: run/ranks.h for one rank. Weak: where run/ranks_mpi.c is linked, its functions are called.

#ifndef ONE_RANK_H
#define ONE_RANK_H
#include "ranks.h"

#define ONE_RANK __attribute__((weak))

ONE_RANK int ranks(void) { return 1; }
ONE_RANK int this_rank(void) { return 0; }
ONE_RANK int threads_of_rank(int cpus) { return cpus; }
ONE_RANK int ranks_largest(int x) { return x; }
ONE_RANK void ranks_compare(const char *what, const char *mine) { (void)what, (void)mine; }
ONE_RANK void ranks_add(double *x, int n) { (void)x, (void)n; }
ONE_RANK void ranks_end(void) {}

// There is nobody to swap with.
ONE_RANK void ranks_swap(void *to, const void *from, size_t bytes, int partner)
{
    (void)to, (void)from, (void)bytes, (void)partner;
}
ONE_RANK void ranks_swap_device(dev to, dev from, size_t bytes, int partner)
{
    (void)to, (void)from, (void)bytes, (void)partner;
}

// Several of a program that knows no others would all train the same and write to the same --out.
ONE_RANK void ranks_begin(void)
{
    const char *started = getenv("OMPI_COMM_WORLD_SIZE");
    if (started && atoi(started) > 1)
        die("mpirun started %s of a program for one process; ./train_mpi is for several", started);
}

#endif
