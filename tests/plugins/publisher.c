/* SPDX-License-Identifier: Apache-2.0 */
/* A core in shared memory: a worker with flows of its own making, and a publisher beside it: publisher NAME */
#include "lbgym_publish.h"

#include "common.h"

#include <pthread.h>
#include <stdatomic.h>

#define NUM_SERVERS 4
#define FLOWS 20 /* at a time */

static _Atomic bool done;

static void *work(void *at)
{
    lbgym_worker *worker = at;
    const struct timespec pause = {0, 1000000};
    uint8_t memory[64];
    uint32_t number = 0;
    while (!atomic_load(&done)) {
        /* One flow begins and the oldest ends; packets are TCP of IPv4, from a client to the VIP. */
        for (uint32_t i = 0; i < 3; i++) {
            static const uint8_t flags[3] = {0x02, 0x10, 0x11};
            const uint32_t flow = i < 2 ? number : number - FLOWS;
            lbgym_packet packet;
            memset(&packet, 0, sizeof packet);
            packet.data = memory;
            packet.length = 40;
            memset(memory, 0, 40);
            memory[0] = 0x45;
            put16(memory + 2, 40);
            memory[9] = 6;
            memcpy(memory + 12, (const uint8_t[8]){11, 0, (uint8_t)(flow >> 16), 1, 10, 77, 1, 100}, 8);
            put16(memory + 20, flow & 0xFFFF);
            put16(memory + 22, 80);
            memory[32] = 0x50;
            memory[33] = flags[i];
            lbgym_worker_run(worker, &packet, 1, lbgym_shm_now());
        }
        number++;
        (void)lbgym_worker_tick(worker, lbgym_shm_now(), 100);
        (void)nanosleep(&pause, NULL);
    }
    return NULL;
}

int main(int argc, char **argv)
{
    static lbgym_publisher publisher;
    const char *const names[NUM_SERVERS] = {"one", "two", "three", "four"};
    lbgym_shm_options options = lbgym_shm_default_options(NUM_SERVERS);
    lbgym_core *core = make_core(LBGYM_DSR, 1, 65536);
    lbgym_core_server servers[NUM_SERVERS];
    pthread_t thread;
    int code;
    CHECK(argc == 2);
    memset(servers, 0, sizeof servers);
    for (uint32_t i = 0; i < NUM_SERVERS; i++) {
        servers[i].present = servers[i].reachable = 1;
        servers[i].active = i < NUM_SERVERS - 1;
        servers[i].safe_weight = i + 1;
        servers[i].cores = 1.0;
    }
    options.publish_interval_ns = LBGYM_SHM_SECOND / 20;
    options.driver = "core";
    code = lbgym_publisher_open(&publisher, core, argv[1], LBGYM_WCMP, 1, servers, names, &options);
    if (code < 0) {
        (void)fprintf(stderr, "%s\n", publisher.driver.region.message);
        return 1;
    }
    lbgym_driver_catch_signals();
    CHECK(pthread_create(&thread, NULL, work, lbgym_core_worker(core, 0)) == 0);
    (void)puts("ready");
    (void)fflush(stdout);
    while (!lbgym_driver_stopped(&publisher.driver)) {
        (void)lbgym_shm_wait_action(&publisher.driver.region, lbgym_publisher_left(&publisher));
        CHECK(lbgym_publisher_work(&publisher) >= 0);
    }
    atomic_store(&done, true);
    (void)pthread_join(thread, NULL);
    lbgym_publisher_close(&publisher);
    lbgym_core_destroy(core);
    return 0;
}
