/* SPDX-License-Identifier: Apache-2.0 */
/* Two workers, and a publisher that changes weights and reads counters meanwhile, for ThreadSanitizer: threads CHANGES */
#include "common.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>

#define WORKERS 2
#define MOST 32

static _Atomic bool done;
static lbgym_core *core;

static void *work(void *number)
{
    lbgym_worker *worker = lbgym_core_worker(core, (uint32_t)(uintptr_t)number);
    uint64_t random = 7 + (uintptr_t)number, now = SECOND;
    static _Thread_local uint8_t memory[MOST][LBGYM_CORE_HEADROOM + 64];
    while (!atomic_load(&done)) {
        lbgym_packet packets[MOST];
        memset(packets, 0, sizeof packets);
        for (int k = 0; k < MOST; k++) {
            packets[k].data = memory[k] + LBGYM_CORE_HEADROOM;
            packets[k].headroom = LBGYM_CORE_HEADROOM;
            packets[k].length = make_packet(packets[k].data, lbgym_next(&random));
        }
        lbgym_worker_run(worker, packets, MOST, now);
        now += SECOND / 100;
        (void)lbgym_worker_tick(worker, now, 16);
    }
    for (int i = 0; i < 4; i++) {
        now += 1000 * SECOND;
        (void)lbgym_worker_tick(worker, now, UINT32_MAX);
    }
    return NULL;
}

int main(int argc, char **argv)
{
    const uint64_t changes = argc > 1 ? strtoull(argv[1], NULL, 10) : 200;
    pthread_t threads[WORKERS];
    uint64_t random = 3, entries, reads = 0;
    core = make_core(LBGYM_NAT, WORKERS, 512);
    install(core, lbgym_next(&random));
    for (uintptr_t i = 0; i < WORKERS; i++) {
        CHECK(pthread_create(&threads[i], NULL, work, (void *)i) == 0);
    }
    for (uint64_t i = 0; i < changes; i++) {
        install(core, lbgym_next(&random));
        lbgym_core_ask(core);
        while (!lbgym_core_answered(core)) {
            (void)sched_yield();
        }
        CHECK(total_open(core, &entries) <= entries);
        (void)lbgym_core_open_flows(core);
        reads++;
    }
    atomic_store(&done, true);
    for (int i = 0; i < WORKERS; i++) {
        (void)pthread_join(threads[i], NULL);
    }
    lbgym_core_ask(core);
    for (uint32_t i = 0; i < WORKERS; i++) {
        (void)lbgym_worker_tick(lbgym_core_worker(core, i), 10000 * SECOND, 0);
    }
    CHECK(reads == changes && total_open(core, &entries) == 0 && entries == 0);
    for (uint32_t row = 0; row < SERVERS; row++) {
        CHECK(lbgym_core_open_flows(core)[row] == 0);
    }
    lbgym_core_destroy(core);
    return 0;
}
