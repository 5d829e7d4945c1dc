/* SPDX-License-Identifier: Apache-2.0 */
/* What the parts of the core know of each other. */
#ifndef LBGYM_CORE_INTERNAL_H
#define LBGYM_CORE_INTERNAL_H

#include "lbgym_core.h"
#include "lbgym_dispatch.h"
#include "lbgym_tcp.h"

#include <stdatomic.h>

#define LIKELY(x) __builtin_expect(!!(x), 1)
#define UNLIKELY(x) __builtin_expect(!!(x), 0)

#define NONE UINT32_MAX /* no flow */
#define TURNS 16384     /* most turns of round robin before it begins again */
#define VIP_SLOTS 256   /* a power of two, more than twice LBGYM_CORE_MAX_VIPS */

struct vip {
    lbgym_vip key;
    uint64_t service; /* the word that begins the hash of its flows: the same on every balancer */
};

/* What is in force: written while nobody reads it, then read while nobody writes it. */
struct snapshot {
    uint64_t version; /* grows; there are two snapshots only, and so an address says little */
    uint32_t mechanism, size, rows, fallback_size;
    struct lbgym_alias *aliases; /* [servers] */
    uint32_t *lookup;            /* [lookup_size], and so the next */
    uint32_t *fallback;
    uint64_t *scores;            /* [LBGYM_INDEX_ENTRIES][servers]; NULL until a rule needs them */
    lbgym_core_server *servers;  /* [servers] */
    uint16_t *backends;          /* NAT: rows + 1 by address and port, [backend_mask + 1] */
    uint32_t num_vips;
    struct vip vips[LBGYM_CORE_MAX_VIPS];
    uint8_t vip_slots[VIP_SLOTS]; /* numbers of VIPs + 1 by address, port and protocol */
};

struct lbgym_core {
    lbgym_core_options options;
    uint32_t lookup_size, backend_mask;
    uint64_t secret;
    _Atomic(const struct snapshot *) current;
    struct snapshot snapshots[2];
    uint64_t version;
    bool fresh_grace; /* nobody reads the snapshot that is not current */
    _Atomic uint64_t asked;
    _Atomic uint64_t turn;
    _Atomic uint64_t *open; /* [servers] */
    lbgym_worker *workers;
    lbgym_sample *samples; /* scratch of lbgym_core_read */
    lbgym_weighted_sample *weighted;
    double *scratch; /* of tables: [6][servers] and room for a table of Whittle's index */
    uint32_t *active; /* [servers] */
    double *unrest;   /* [TURNS] */
    char message[256];
};

/* A number in memory that one thread writes and others read. */
static inline uint64_t peek(const _Atomic uint64_t *word)
{
    return atomic_load_explicit(word, memory_order_relaxed);
}

static inline uint64_t service_of(const lbgym_vip *vip)
{
    uint64_t h = lbgym_mix64((uint64_t)vip->address[1] << 32 | vip->address[0]);
    h = lbgym_mix64(h ^ ((uint64_t)vip->address[3] << 32 | vip->address[2]));
    return lbgym_mix64(h ^ ((uint64_t)__builtin_bswap16(vip->port) << 8 | vip->protocol));
}

static inline bool same_address(const uint32_t a[4], const uint32_t b[4])
{
    return ((a[0] ^ b[0]) | (a[1] ^ b[1]) | (a[2] ^ b[2]) | (a[3] ^ b[3])) == 0;
}

/* Where to begin to look for an address and port. */
static inline uint32_t slot_of(const uint32_t address[4], uint16_t port, uint8_t protocol)
{
    const uint64_t low = (uint64_t)address[1] << 32 | address[0], high = (uint64_t)address[3] << 32 | address[2];
    const uint64_t h = (low ^ high ^ ((uint64_t)port << 16 | protocol)) * 0x9E3779B97F4A7C15ull;
    return (uint32_t)(h >> 32);
}

static inline uint32_t find_vip(const struct snapshot *s, const uint32_t address[4], uint16_t port, uint8_t protocol)
{
    uint32_t slot = slot_of(address, port, protocol);
    for (;; slot++) {
        const uint8_t number = s->vip_slots[slot % VIP_SLOTS];
        if (number == 0) {
            return NONE;
        }
        const lbgym_vip *vip = &s->vips[number - 1].key;
        if (vip->port == port && vip->protocol == protocol && same_address(vip->address, address)) {
            return number - 1u;
        }
    }
}

static inline bool is_vip_address(const struct snapshot *s, const uint32_t address[4])
{
    for (uint32_t i = 0; i < s->num_vips; i++) {
        if (same_address(s->vips[i].key.address, address)) {
            return true;
        }
    }
    return false;
}

static inline uint32_t find_backend(const struct snapshot *s, uint32_t mask, const uint32_t address[4], uint16_t port)
{
    uint32_t slot = slot_of(address, port, 0);
    for (;; slot++) {
        const uint16_t row = s->backends[slot & mask];
        if (row == 0) {
            return NONE;
        }
        const lbgym_core_server *server = &s->servers[row - 1];
        if (server->port == port && same_address(server->address, address)) {
            return row - 1u;
        }
    }
}

/* The least prime with at least 100 entries per server: no server is more than about 1 % off its share. */
uint32_t lbgym_maglev_size(uint32_t servers);
/* Fills what a rule needs. */
int lbgym_fill_tables(lbgym_core *core, struct snapshot *s, lbgym_rule rule, uint32_t balancers);
/* The server of a new flow, or NONE. */
uint32_t lbgym_choose(lbgym_core *core, const struct snapshot *s, uint64_t h);

bool lbgym_worker_init(lbgym_worker *worker, lbgym_core *core, uint32_t number);
void lbgym_worker_clear(lbgym_worker *worker);
size_t lbgym_worker_size(void);
lbgym_worker *lbgym_worker_at(lbgym_core *core, uint32_t number);
/* True while the worker is in the burst in which it was when `activity` was read. */
uint64_t lbgym_worker_activity(const lbgym_worker *worker);
uint64_t lbgym_worker_answer(const lbgym_worker *worker);
void lbgym_worker_copied(const lbgym_worker *worker, uint32_t row, const lbgym_core_counters **counters,
                         const lbgym_server **features);
const lbgym_core_totals *lbgym_worker_copied_totals(const lbgym_worker *worker);

#endif
