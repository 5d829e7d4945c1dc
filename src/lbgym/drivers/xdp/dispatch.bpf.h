/* SPDX-License-Identifier: Apache-2.0 */
/* Maps of the balancer, samples, and the choice of a server. */
#ifndef LBGYM_XDP_DISPATCH_H
#define LBGYM_XDP_DISPATCH_H

#include <linux/types.h>
typedef __u8 uint8_t;
typedef __u16 uint16_t;
typedef __u32 uint32_t;
typedef __u64 uint64_t;
typedef __s64 int64_t;

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/tcp.h>

#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "balancer.h"

#define LIKELY(x) __builtin_expect(!!(x), 1)
#define UNLIKELY(x) __builtin_expect(!!(x), 0)
#define READ(x) (*(volatile typeof(x) *)&(x))
#define ADD(counter, n) ((void)__sync_fetch_and_add(&(counter), (n)))
/* A pointer comparison that the compiler must not rewrite in terms of lengths, which the verifier does not follow. */
#define BEYOND(pointer, end) ((void *)((pointer) + 1) > (end))
#define NONE (-1)

/* All arrays of fixed size, in one map that the driver has in its memory, too. */
struct shared shared;

/* The driver sets the sizes. */
#define MAP(name, map_type, key_type, value_type, ...) \
    struct {                                           \
        __uint(type, map_type);                        \
        __uint(max_entries, 1);                        \
        __type(key, key_type);                         \
        __type(value, value_type);                     \
        __VA_ARGS__                                    \
    } name SEC(".maps")
MAP(lookups, BPF_MAP_TYPE_ARRAY, uint32_t, struct lookup, __uint(map_flags, BPF_F_MMAPABLE););
MAP(indices, BPF_MAP_TYPE_ARRAY, uint32_t, uint64_t, __uint(map_flags, BPF_F_MMAPABLE););
MAP(flows, BPF_MAP_TYPE_HASH, struct flow_key, struct flow, );
MAP(vips, BPF_MAP_TYPE_HASH, struct flow_key, uint32_t, );
/* DNAT: the row of a server by its address and port, and the VIP of a reply by its client and the server's row. */
MAP(backends, BPF_MAP_TYPE_HASH, struct flow_key, uint32_t, );
MAP(replies, BPF_MAP_TYPE_HASH, struct flow_key, uint32_t, );

/* A packet of a flow, or of an ICMP error about it. */
struct packet {
    struct flow_key key;
    uint32_t isn;
    uint64_t service;
    uint32_t ifindex;
    uint8_t client_mac[6];
    uint8_t own_mac[6];
    uint32_t bank;
};

/* Words of flows */

static __always_inline uint64_t word_of(uint32_t state, uint32_t server, uint32_t isn)
{
    return (uint64_t)isn << 32 | (uint64_t)(server & 0xFFFF) << 16 | state;
}

static __always_inline uint32_t state_of(uint64_t word)
{
    return word & 0xFF;
}

static __always_inline uint32_t server_of(uint64_t word)
{
    return (word >> 16) & (MAX_SERVERS - 1);
}

static __always_inline int replace(struct flow *flow, uint64_t before, uint64_t after)
{
    return __sync_val_compare_and_swap(&flow->word, before, after) == before;
}

/* Samples */

/* With a probability of 0, of 1, or in between. */
static __always_inline int drawn(uint32_t probability)
{
    return probability && (probability == 0xFFFFFFFF || bpf_get_prandom_u32() <= probability);
}

static __always_inline void sample(uint32_t server, uint32_t metric, uint64_t value, uint64_t now)
{
    struct reservoir *reservoir = &shared.reservoirs[server & (MAX_SERVERS - 1)][metric & 1];
    uint64_t slot = __sync_fetch_and_add(&reservoir->accepted, 1);
    if (slot >= SLOTS)
        slot = bpf_get_prandom_u32();
    uint64_t us = value / 1000;
    if (us > 0xFFFFFFFF)
        us = 0xFFFFFFFF;
    uint64_t time = (uint32_t)(now >> 20);
    READ(reservoir->samples[slot & (SLOTS - 1)]) = (time + 1) << 32 | us;
}

/* Choice of a server. Global functions are verified by themselves, once. */

static __always_inline int row_of(uint32_t at, int fallback)
{
    struct lookup *entry = bpf_map_lookup_elem(&lookups, &at);
    return entry ? (int)((fallback ? entry->fallback : entry->server) & (MAX_SERVERS - 1)) : NONE;
}

/* Of counts that share an entry; rare, and below 0 for a moment where the end of a flow was counted first. */
__attribute__((noinline)) int shared_entry(uint64_t open)
{
    return (int64_t)open < 0 ? 0 : (int)lbgym_index_entry(open);
}

static __always_inline uint64_t score_of(uint32_t first, uint32_t capacity, uint32_t row)
{
    uint64_t open = READ(shared.open_flows[row & (MAX_SERVERS - 1)]);
    uint32_t entry = LIKELY(open < LBGYM_INDEX_EXACT) ? (uint32_t)open : (uint32_t)shared_entry(open);
    /* By entry, then by server: counts are alike, and so a scan has few cache lines to read. */
    uint32_t at = first + entry * capacity + row;
    uint64_t *score = bpf_map_lookup_elem(&indices, &at);
    return score ? *score : LBGYM_INDEX_NEVER;
}

struct scan {
    uint64_t least;
    uint32_t best, row, rows, first, capacity;
};

/* Servers looked at by one step of a scan, in registers. */
#define SCAN_STEP 4

static long scan_step(uint32_t i, struct scan *scan)
{
    uint64_t least = scan->least;
    uint32_t best = scan->best, row = scan->row, rows = scan->rows;
    uint32_t first = scan->first, capacity = scan->capacity;
#pragma unroll
    for (int k = 0; k < SCAN_STEP; k++) {
        uint64_t score = score_of(first, capacity, row);
        if (UNLIKELY(score < least)) {
            least = score;
            best = row;
        }
        if (UNLIKELY(++row >= rows))
            row = 0;
    }
    scan->least = least;
    scan->best = best;
    scan->row = row;
    return 0;
}

__attribute__((noinline)) int choose(uint64_t h, uint32_t bank)
{
    bank &= 1;
    struct table *table = &shared.settings.tables[bank];
    uint32_t size = table->size, half = bank * shared.settings.lookup_size;
    uint32_t capacity = shared.settings.capacity, first = bank * LBGYM_INDEX_ENTRIES * capacity;
    switch (table->mechanism) {
    case LBGYM_ALIAS: {
        struct lbgym_alias *bucket = &shared.aliases[bank][lbgym_to_range(h, size) & (MAX_SERVERS - 1)];
        return lbgym_alias_server(bucket, h) & (MAX_SERVERS - 1);
    }
    case LBGYM_LOOKUP:
        return row_of(half + lbgym_to_range(h, size), 0);
    case LBGYM_TURNS:
        return row_of(half + (uint32_t)(__sync_fetch_and_add(&shared.totals.turn, 1) % (size ? size : 1)), 0);
    case LBGYM_INDEX: {
        /* Ties go to the first from the hashed position on. */
        struct scan scan = {.least = LBGYM_INDEX_NEVER, .rows = table->rows, .first = first, .capacity = capacity};
        scan.row = lbgym_to_range(h, scan.rows);
        uint32_t rows = scan.rows < MAX_SERVERS ? scan.rows : MAX_SERVERS;
        /* The last step may look at the first servers again, which are not less than themselves. */
        bpf_loop((rows + SCAN_STEP - 1) / SCAN_STEP, scan_step, &scan, 0);
        return scan.least < LBGYM_INDEX_NEVER ? (int)(scan.best & (MAX_SERVERS - 1)) : NONE;
    }
    case LBGYM_TWO_CHOICES: {
        uint32_t one = lbgym_to_range(h, size);
        int taken = row_of(half + one, 0);
        if (size < 2 || taken < 0)
            return taken;
        int other = row_of(half + lbgym_second_candidate(h, one, size), 0);
        if (other >= 0 && score_of(first, capacity, other) < score_of(first, capacity, taken))
            return other;
        return taken;
    }
    default:
        return NONE;
    }
}

/* The server of packets without a flow: by configured weights, so that it does not change with the agent's. */
static __always_inline int fallback(uint64_t h, uint32_t bank)
{
    bank &= 1;
    uint32_t size = shared.settings.tables[bank].fallback_size;
    return size ? row_of(bank * shared.settings.lookup_size + lbgym_to_range(h, size), 1) : NONE;
}

#endif
