//  run/ranks.h: several processes train together, each on its share of every step's micro-batches. MPI calls
//  such a process a rank, which has nothing to do with an adapter's --rank. doc/ranks.md has the scheme.
//
//  run/one_rank.h defines these functions for the one rank that ./train is, run/ranks_mpi.c for several. The
//  linker chooses: those of one rank are weak.

#ifndef RANKS_H
#define RANKS_H
#include "../ops/mat.h"

int ranks(void);                        // how many there are
int this_rank(void);                    // 0 … ranks() - 1. Rank 0 alone prints and writes

// Begins, before anything is read or printed. From then on a rank that ends with a status other than 0 ends
// all.
void ranks_begin(void);

// Waits until every rank has come here. From then on each of them may end with any status.
void ranks_end(void);

// How many threads a rank should have where `cpus` may be used: the ranks of a machine share its CPUs.
int threads_of_rank(int cpus);

// Ends the program if this rank's text is not rank 0's. `what` says of what.
void ranks_compare(const char *what, const char *mine);

// Adds up the x of all ranks, in no particular order: they are whole numbers, or one rank alone knows a number
// and the others hold 0.
void ranks_add(double *x, int n);

int ranks_largest(int x);               // of all ranks' x

// Sends to a partner and receives what that one sends: a piece of the host's memory, or of the device's.
void ranks_swap(void *to, const void *from, size_t bytes, int partner);
void ranks_swap_device(dev to, dev from, size_t bytes, int partner);

// Between GPUs, where run/ranks_nccl.c is linked: chooses the device of the rank that has this number on its
// machine, and swaps.
__attribute__((weak)) void gpu_begin(int local);
__attribute__((weak)) void gpu_swap(dev to, dev from, size_t bytes, int partner);

/* The sum over all ranks, in each of them: of x, and of a number, which is returned. Ranks whose numbers differ
   in one bit are partners, and both add what the other has; first those that differ in the lowest bit:

       rank          0     1     2     3
       rank ^ 1      0+1   0+1   2+3   2+3
       rank ^ 2      0+1 + 2+3   everywhere

   This is the top of the tree of sum_gradients() in train.c. a + b is b + a to the last bit, so that all ranks
   hold the same. A piece at a time, so that it takes little memory.                                          */
static inline double sum_over_ranks(mat x, double sum)
{
    enum { ROWS = 1 << 16 };                            // of 16 numbers: 4 MB
    static mat piece;
    if (ranks() > 1 && !piece.p) {
        piece = mat_of(NULL, x.type, SHAPE(ROWS, x.cols));
        piece.p = dev_alloc(elements(piece) * dtypes[x.type].size);
        if (!piece.p) die("out of memory: 4 MB for what ranks send to each other");
    }
    for (int bit = 1; bit < ranks(); bit *= 2) {
        int partner = this_rank() ^ bit;
        double other;
        ranks_swap(&other, &sum, sizeof sum, partner);
        sum += other;
        for (int i = 0; i < x.rows; i += ROWS) {
            int n = x.rows - i < ROWS ? x.rows - i : ROWS;
            mat mine = rows_of(x, i, n), others = rows_of(piece, 0, n);
            ranks_swap_device(others.p, mine.p, elements(mine) * dtypes[x.type].size, partner);
            add(mine, others, 1);
        }
    }
    return sum;
}

#endif
