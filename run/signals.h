//  run/signals.h: signals, and descriptors that are closed at the start.

#ifndef SIGNALS_H
#define SIGNALS_H
#include "../lib/directory.h"
#include "ranks.h"

// The first signal lets the loop finish its step and save; the next one, or one outside the loop, ends the program. A
// pipe that nobody reads any more says so at every line: that counts once.
static volatile sig_atomic_t in_loop, interrupted;
static void on_signal(int number)
{
    if (number == SIGPIPE) signal(SIGPIPE, SIG_IGN);
    if (in_loop && !interrupted) {
        interrupted = number;
        return;
    }
    stage_discard();
    _exit(128 + number);
}

// Whether a signal has come to any rank: its number, for all of them. So they stop after the same step.
static int all_interrupted(void)
{
    int number = ranks_largest(interrupted);
    if (number) interrupted = number;
    return number;
}

// Ctrl-C, kill, a terminal that is closed, a reader that is gone, and SIGUSR1, which mpirun hands on to all
// ranks at once. Who started the program with one of them ignored, as nohup does, wants it ignored.
static void catch_signals(void)
{
    static const int numbers[] = {SIGINT, SIGTERM, SIGHUP, SIGPIPE, SIGUSR1};
    for (int i = 0; i < 5; i++) {
        struct sigaction before;
        int ignored = !sigaction(numbers[i], NULL, &before) && before.sa_handler == SIG_IGN;
        struct sigaction ours = {.sa_handler = on_signal, .sa_flags = SA_RESTART};
        if (!ignored) sigaction(numbers[i], &ours, NULL);
    }
    signal(SIGXFSZ, SIG_IGN);           // a file over the limit is an error of write(), like a full disk
}

// Whoever closes the standard descriptors before the start would have the next file that is opened written into by
// printf.
static void open_descriptors(void)
{
    int fd;
    do fd = open("/dev/null", O_RDWR);
    while (fd >= 0 && fd <= STDERR_FILENO);
    if (fd >= 0) close(fd);
}

#endif
