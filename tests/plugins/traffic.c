/* SPDX-License-Identifier: Apache-2.0 */
/* Random packets, whole, cut off and spoilt, through a core of every mode, for the sanitisers: traffic SEED BURSTS */
#include "common.h"

#define MOST 40
#define ROOM (LBGYM_CORE_HEADROOM + 64)

static void spoil(lbgym_packet *packet, uint64_t *random)
{
    const uint64_t kind = lbgym_next(random) % 16;
    if (kind == 0) {
        packet->length = (uint32_t)(lbgym_next(random) % (packet->length + 1));
    } else if (kind < 3 && packet->length > 0) {
        packet->data[lbgym_next(random) % packet->length] = (uint8_t)lbgym_next(random);
    }
}

int main(int argc, char **argv)
{
    uint64_t random = argc > 1 ? strtoull(argv[1], NULL, 10) : 1;
    const uint64_t bursts = argc > 2 ? strtoull(argv[2], NULL, 10) : 2000;
    for (uint32_t mode = LBGYM_DSR; mode <= LBGYM_NAT; mode++) {
        lbgym_core *core = make_core(mode, 1, mode % 2 ? 64 : 4096);
        lbgym_worker *worker = lbgym_core_worker(core, 0);
        uint64_t now = 0, entries, sent = 0;
        for (uint64_t i = 0; i < bursts; i++) {
            lbgym_packet packets[MOST];
            uint8_t *memory[MOST];
            const uint32_t n = (uint32_t)(lbgym_next(&random) % (MOST + 1));
            if (i % 50 == 0) {
                install(core, lbgym_next(&random));
            }
            memset(packets, 0, sizeof packets);
            for (uint32_t k = 0; k < n; k++) {
                /* Each at the very end of memory of its own. */
                uint8_t made[64];
                uint32_t length = make_packet(made, lbgym_next(&random));
                memory[k] = malloc(LBGYM_CORE_HEADROOM + length);
                CHECK(memory[k] != NULL);
                packets[k].data = memory[k] + LBGYM_CORE_HEADROOM;
                packets[k].headroom = LBGYM_CORE_HEADROOM - (uint32_t)(lbgym_next(&random) % 8 == 0);
                packets[k].length = length;
                packets[k].partial = lbgym_next(&random) % 8 == 0;
                memcpy(packets[k].data, made, length);
                spoil(&packets[k], &random);
            }
            lbgym_worker_run(worker, packets, n, now);
            for (uint32_t k = 0; k < n; k++) {
                CHECK(packets[k].verdict <= LBGYM_DROP);
                CHECK(packets[k].verdict != LBGYM_SEND || packets[k].server < SERVERS);
                sent += packets[k].verdict == LBGYM_SEND;
                free(memory[k]);
            }
            now += lbgym_next(&random) % (SECOND / 4);
            (void)lbgym_worker_tick(worker, now, 10);
            if (i % 100 == 0) {
                lbgym_core_ask(core);
                (void)lbgym_worker_tick(worker, now, 0);
                CHECK(lbgym_core_answered(core));
                CHECK(total_open(core, &entries) <= entries);
            }
        }
        CHECK(sent > bursts);
        for (int i = 0; i < 4; i++) {
            now += 1000 * SECOND;
            (void)lbgym_worker_tick(worker, now, UINT32_MAX);
        }
        lbgym_core_ask(core);
        (void)lbgym_worker_tick(worker, now, 0);
        CHECK(total_open(core, &entries) == 0 && entries == 0);
        lbgym_core_destroy(core);
    }
    return 0;
}
