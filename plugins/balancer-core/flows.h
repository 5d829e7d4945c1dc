/* SPDX-License-Identifier: Apache-2.0 */
/* A worker's table of flows: one writer, no lock, a cache line per bucket and one per flow. What finds no room is refused;
 * nothing is evicted. Times are ns.
 */
#ifndef LBGYM_CORE_FLOWS_H
#define LBGYM_CORE_FLOWS_H

#include "internal.h"

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#define WAYS 8
#define CACHE_LINE 64

/* The timer wheel: slots of 2^26 ns, 137 s around. Flows that are due later are looked at once per round. */
#define WHEEL_SHIFT 26
#define WHEEL_SLOTS 2048u

struct link {
    uint32_t next, previous;
};

struct flow {
    uint32_t client[4];
    uint32_t link; /* the embedder's */
    uint16_t port;
    uint16_t vip;
    uint16_t server;
    uint8_t state;   /* enum lbgym_flow_state */
    uint8_t replies; /* the server's packets find it */
    uint32_t isn;
    uint64_t opened, last;
    struct link timer; /* in a slot of the wheel; `next` alone in the list of free flows */
    uint32_t unused[2];
};
_Static_assert(sizeof(struct flow) == CACHE_LINE, "a flow is one cache line");

/* A flow is in the first of its two buckets that has room. */
struct bucket {
    uint16_t tags[WAYS];
    uint32_t flows[WAYS];
    uint16_t overflow; /* flows that are in their second bucket because this, their first, was full */
    uint8_t used;      /* bit i: way i */
    uint8_t unused[13];
};
_Static_assert(sizeof(struct bucket) == CACHE_LINE, "a bucket is one cache line");

struct index {
    struct bucket *buckets;
    uint32_t mask;
};

static inline struct bucket *first_bucket(const struct index *x, uint64_t hash)
{
    return &x->buckets[(uint32_t)hash & x->mask];
}

static inline struct bucket *second_bucket(const struct index *x, uint64_t hash)
{
    return &x->buckets[((uint32_t)hash ^ ((uint32_t)(hash >> 16) | 1)) & x->mask];
}

static inline uint16_t tag_of(uint64_t hash)
{
    return (uint16_t)(hash >> 48);
}

/* Ways whose tag is that of the hash. */
static inline uint32_t candidates(const struct bucket *b, uint16_t tag)
{
#ifdef __SSE2__
    const __m128i tags = _mm_load_si128((const __m128i *)(const void *)b->tags);
    const __m128i same = _mm_cmpeq_epi16(tags, _mm_set1_epi16((short)tag));
    return (uint32_t)_mm_movemask_epi8(_mm_packs_epi16(same, _mm_setzero_si128())) & b->used;
#else
    uint32_t same = 0;
    for (uint32_t i = 0; i < WAYS; i++) {
        same |= (uint32_t)(b->tags[i] == tag) << i;
    }
    return same & b->used;
#endif
}

typedef bool (*matcher)(const struct flow *flow, const void *key);

static inline __attribute__((always_inline)) uint32_t find_in(const struct bucket *b, const struct flow *flows,
                                                              uint16_t tag, matcher matches, const void *key)
{
    for (uint32_t ways = candidates(b, tag); ways != 0; ways &= ways - 1) {
        const uint32_t flow = b->flows[__builtin_ctz(ways)];
        if (LIKELY(matches(&flows[flow], key))) {
            return flow;
        }
    }
    return NONE;
}

static inline __attribute__((always_inline)) uint32_t find_flow(const struct index *x, const struct flow *flows,
                                                                uint64_t hash, matcher matches, const void *key)
{
    const struct bucket *first = first_bucket(x, hash);
    const uint32_t found = find_in(first, flows, tag_of(hash), matches, key);
    if (LIKELY(found != NONE || first->overflow == 0)) {
        return found;
    }
    return find_in(second_bucket(x, hash), flows, tag_of(hash), matches, key);
}

/* False if both buckets are full. */
static inline bool put_flow(struct index *x, uint64_t hash, uint32_t flow)
{
    struct bucket *b = first_bucket(x, hash);
    uint32_t way;
    if (UNLIKELY(b->used == 0xFF)) {
        struct bucket *const first = b;
        b = second_bucket(x, hash);
        if (b->used == 0xFF || first->overflow == UINT16_MAX) {
            return false;
        }
        first->overflow++;
    }
    way = (uint32_t)__builtin_ctz(~(uint32_t)b->used);
    b->tags[way] = tag_of(hash);
    b->flows[way] = flow;
    b->used = (uint8_t)(b->used | 1u << way);
    return true;
}

static inline bool take_from(struct bucket *b, uint16_t tag, uint32_t flow)
{
    for (uint32_t ways = candidates(b, tag); ways != 0; ways &= ways - 1) {
        const uint32_t way = (uint32_t)__builtin_ctz(ways);
        if (b->flows[way] == flow) {
            b->used = (uint8_t)(b->used & ~(1u << way));
            return true;
        }
    }
    return false;
}

static inline void take_flow(struct index *x, uint64_t hash, uint32_t flow)
{
    struct bucket *first = first_bucket(x, hash);
    if (!take_from(first, tag_of(hash), flow) && take_from(second_bucket(x, hash), tag_of(hash), flow)) {
        first->overflow--;
    }
}

#endif
