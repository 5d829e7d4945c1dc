/* SPDX-License-Identifier: Apache-2.0 */
/* What the programs around the core share: a service with servers, and random packets to it. */
#ifndef LBGYM_TEST_COMMON_H
#define LBGYM_TEST_COMMON_H

#include "lbgym_core.h"

#include <stdio.h>
#include <stdlib.h>

#define SERVERS 6
#define SECOND 1000000000ull

#define CHECK(condition)                                                             \
    do {                                                                             \
        if (!(condition)) {                                                          \
            (void)fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);    \
            abort();                                                                 \
        }                                                                            \
    } while (0)

static inline void put16(uint8_t *at, uint32_t word)
{
    at[0] = (uint8_t)(word >> 8);
    at[1] = (uint8_t)word;
}

static inline lbgym_core *make_core(uint32_t mode, uint32_t workers, uint32_t flows)
{
    const uint8_t vip4[4] = {10, 77, 1, 100}, vip6[16] = {0xfd, 0x77, [15] = 1};
    lbgym_core_options options = lbgym_core_default_options();
    lbgym_vip vips[4];
    lbgym_core *core;
    char message[200];
    options.mode = mode;
    options.workers = workers;
    options.flows = flows;
    options.seed = 11;
    options.duration_sampling = 0.25;
    core = lbgym_core_create(&options, message, sizeof message);
    CHECK(core != NULL);
    memset(vips, 0, sizeof vips);
    for (int i = 0; i < 4; i++) {
        memcpy(vips[i].address, i % 2 ? vip6 : vip4, i % 2 ? 16 : 4);
        put16((uint8_t *)&vips[i].port, 80);
        vips[i].protocol = i < 2 ? 6 : 17;
        vips[i].is_ipv6 = (uint8_t)(i % 2);
    }
    CHECK(lbgym_core_set_vips(core, vips, 4) == 0);
    return core;
}

/* Servers of which some take flows, by weights and a rule that depend on `random`. */
static inline void install(lbgym_core *core, uint64_t random)
{
    lbgym_core_server servers[SERVERS];
    memset(servers, 0, sizeof servers);
    for (uint32_t i = 0; i < SERVERS; i++) {
        uint8_t *const address = (uint8_t *)servers[i].address;
        const bool is_ipv6 = i % 3 == 2;
        address[0] = is_ipv6 ? 0xfd : 10;
        address[1] = 77;
        address[is_ipv6 ? 15 : 3] = (uint8_t)(10 + i);
        put16((uint8_t *)&servers[i].port, 8080);
        servers[i].is_ipv6 = is_ipv6;
        servers[i].present = 1;
        servers[i].reachable = random >> (8 + i) & 1;
        servers[i].active = random >> (16 + i) & 1;
        servers[i].generation = (uint32_t)(random >> 30 & 1);
        servers[i].weight = (double)(random >> (2 * i) & 3);
        servers[i].safe_weight = servers[i].cores = 1.0;
    }
    CHECK(lbgym_core_install(core, (lbgym_rule)(random % LBGYM_NUM_RULES), 2, servers, SERVERS) == 0);
}

/* A packet of one of few flows; returns its length. At most 60 bytes. */
static inline uint32_t make_packet(uint8_t *data, uint64_t random)
{
    static const uint8_t flags[8] = {0x02, 0x02, 0x10, 0x10, 0x18, 0x11, 0x04, 0x12};
    const bool is_ipv6 = random & 1, is_udp = (random >> 1 & 7) == 0, from_server = (random >> 4 & 3) == 0;
    const uint32_t header = is_ipv6 ? 40 : 20, l4 = is_udp ? 8 : 20;
    uint8_t *const source = data + (is_ipv6 ? 8 : 12), *const destination = source + (is_ipv6 ? 16 : 4);
    uint8_t *const client = from_server ? destination : source, *const other = from_server ? source : destination;
    memset(data, 0, header + l4);
    data[0] = is_ipv6 ? 0x60 : 0x45;
    put16(data + (is_ipv6 ? 4 : 2), is_ipv6 ? l4 : header + l4);
    data[is_ipv6 ? 6 : 9] = is_udp ? 17 : 6;
    client[0] = is_ipv6 ? 0xfd : 11;
    client[is_ipv6 ? 15 : 3] = (uint8_t)(1 + (random >> 6 & 3));
    other[0] = is_ipv6 ? 0xfd : 10;
    other[1] = 77;
    if (from_server) {
        other[is_ipv6 ? 15 : 3] = (uint8_t)(10 + (random >> 8) % SERVERS);
    } else if (is_ipv6) {
        other[15] = 1;
    } else {
        other[2] = 1;
        other[3] = 100;
    }
    put16(data + header + (from_server ? 2 : 0), 1000 + (random >> 12 & 31));
    put16(data + header + (from_server ? 0 : 2), from_server ? 8080 : 80);
    if (!is_udp) {
        data[header + 7] = (uint8_t)(random >> 20 & 3);
        data[header + 12] = 0x50;
        data[header + 13] = flags[random >> 24 & 7];
    }
    return header + l4;
}

static inline uint64_t total_open(lbgym_core *core, uint64_t *entries)
{
    uint64_t open = 0;
    *entries = 0;
    for (uint32_t row = 0; row < SERVERS; row++) {
        lbgym_core_counters counters;
        float features[LBGYM_SERVER_FEATURES];
        lbgym_core_read(core, row, &counters, features);
        CHECK(counters.started - counters.completed - counters.rejected - counters.failed == counters.open);
        for (int i = 0; i < LBGYM_SERVER_FEATURES; i++) {
            CHECK(features[i] >= 0.0f && features[i] < 1e12f);
        }
        open += counters.open;
        *entries += counters.entries;
    }
    return open;
}

#endif
