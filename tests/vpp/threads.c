/* SPDX-License-Identifier: Apache-2.0 */
/* For VPP with more threads than the machine has processors: no thread is pinned to one. LD_PRELOAD. */
#define _GNU_SOURCE
#include <pthread.h>

int pthread_setaffinity_np(pthread_t thread, size_t size, const cpu_set_t *set)
{
    (void)thread;
    (void)size;
    (void)set;
    return 0;
}
