/* SPDX-License-Identifier: Apache-2.0 */
/* libFuzzer: an input is one packet, after a byte of which two bits are the mode of the balancer. */
#include "common.h"

static lbgym_core *cores[4];

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t size)
{
    static uint64_t now;
    lbgym_packet packet;
    lbgym_worker *worker;
    uint8_t *memory;
    if (size < 1) {
        return 0;
    }
    for (uint32_t mode = 0; mode < 4 && cores[mode] == NULL; mode++) {
        cores[mode] = make_core(mode, 1, 256);
        install(cores[mode], UINT64_MAX);
    }
    worker = lbgym_core_worker(cores[input[0] & 3], 0);
    size--;
    /* At the very end of memory of its own. */
    memory = malloc(LBGYM_CORE_HEADROOM + size);
    CHECK(memory != NULL);
    memcpy(memory + LBGYM_CORE_HEADROOM, input + 1, size);
    memset(&packet, 0, sizeof packet);
    packet.data = memory + LBGYM_CORE_HEADROOM;
    packet.length = (uint32_t)size;
    packet.headroom = LBGYM_CORE_HEADROOM;
    packet.partial = input[0] >> 2 & 1;
    lbgym_worker_run(worker, &packet, 1, now);
    CHECK(packet.verdict <= LBGYM_DROP);
    CHECK(packet.data >= memory && packet.data + packet.length == memory + LBGYM_CORE_HEADROOM + size);
    CHECK(packet.verdict != LBGYM_PASS || memcmp(packet.data, input + 1, size) == 0);
    free(memory);
    now += SECOND / 1000;
    (void)lbgym_worker_tick(worker, now, 4);
    return 0;
}
