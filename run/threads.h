//  run/threads.h: how many threads, and how they wait for each other.

#ifndef THREADS_H
#define THREADS_H
#include <omp.h>
#include "../ops/host.h"

// One line of a small file of the kernel's, empty where there is none.
static void kernel_line(char line[128], const char *root, const char *path)
{
    char name[PATH_MAX];
    *line = 0;
    int fits = snprintf(name, sizeof name, "%s%s", root, path) < (int)sizeof name;
    FILE *f = fits ? fopen(name, "r") : NULL;
    if (!f) return;
    if (!fgets(line, 128, f)) *line = 0;
    fclose(f);
}

// CPUs that one control group allows; INFINITY where it sets no quota. `group` is its path, "" for the root that we see.
// Version 2 says "quota period" or "max period" in one file, version 1 has two files and -1 for no quota.
static double group_quota(const char *root, const char *group)
{
    char path[PATH_MAX], line[128];
    double quota = -1, period = -1;
    snprintf(path, sizeof path, "/sys/fs/cgroup%.3000s/cpu.max", group);
    kernel_line(line, root, path);
    if (sscanf(line, "%lf %lf", &quota, &period) == 2) return quota / period;
    snprintf(path, sizeof path, "/sys/fs/cgroup/cpu%.3000s/cpu.cfs_quota_us", group);
    kernel_line(line, root, path);
    if (sscanf(line, "%lf", &quota) != 1 || quota <= 0) return INFINITY;
    snprintf(path, sizeof path, "/sys/fs/cgroup/cpu%.3000s/cpu.cfs_period_us", group);
    kernel_line(line, root, path);
    return sscanf(line, "%lf", &period) == 1 && period > 0 ? quota / period : INFINITY;
}

// The CPUs that this process may use: those of its affinity, and no more than a container's quota (its control group's, and
// those above it). More threads than that would wait for each other. `root` is put before the kernel's paths.
static int usable_cpus(const char *root)
{
    char name[PATH_MAX], line[PATH_MAX], *group;
    double quota = group_quota(root, "");
    snprintf(name, sizeof name, "%.4000s/proc/self/cgroup", root);
    FILE *f = fopen(name, "r");
    while (f && fgets(line, sizeof line, f)) {
        char *kind = strchr(line, ':');                         // 0::/path, or 4:cpu,cpuacct:/path
        if (!kind || !(group = strchr(kind + 1, ':')) || (kind[1] != ':' && strncmp(kind, ":cpu", 4))) continue;
        group++;
        group[strcspn(group, "\n")] = 0;
        for (char *end = group + strlen(group); end > group; end = strrchr(group, '/') ? strrchr(group, '/') : group) {
            *end = 0;
            quota = fmin(quota, group_quota(root, group));
        }
    }
    if (f) fclose(f);
    int cpus = omp_get_num_procs();
    return quota < cpus ? (int)fmax(1, ceil(quota)) : cpus;
}

// A thread of libgomp that waits for the others spins for some ten milliseconds. Where anything else runs, it takes away the
// very CPU that they need, and a step takes ten times as long. A thousand turns, some thirty microseconds, are enough
// between two products. libgomp reads the number before main begins, so the program starts itself again with it.
static void spin_briefly(char **argv)
{
    if (getenv("OMP_WAIT_POLICY") || getenv("GOMP_SPINCOUNT")) return;
    setenv("GOMP_SPINCOUNT", "1000", 1);
    execv("/proc/self/exe", argv);                              // where that is not allowed, it goes on as it is
}

#endif
