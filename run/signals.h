//  run/signals.h: Ctrl-C and SIGTERM.

#ifndef SIGNALS_H
#define SIGNALS_H
#include "../lib/directory.h"

// The first Ctrl-C or SIGTERM lets the loop finish its step and save; the next one, or one outside the loop, ends the program.
static volatile sig_atomic_t in_loop, interrupted;
static void on_signal(int signal)
{
    if (in_loop && !interrupted) { interrupted = signal; return; }
    stage_discard();
    _exit(128 + signal);
}

#endif
