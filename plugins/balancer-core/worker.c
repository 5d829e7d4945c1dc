/* SPDX-License-Identifier: Apache-2.0 */
/* The packet path: flows, from their first packet to when they are forgotten. */
#include "flows.h"
#include "parse.h"

#include "lbgym_checksum.h"

#include <stdlib.h>
#include <sys/mman.h>

/* Packets that are looked at together, so that their cache misses overlap. */
#define BURST 32

/* Where later fragments go: where the first one went, for a moment. */
#define FRAGMENTS 256u
#define FRAGMENT_TIMEOUT 2000000000ull

struct fragment {
    uint32_t source[4], destination[4];
    uint32_t identification, link;
    uint64_t expires;
    uint16_t server, vip;
    uint8_t protocol, verdict;
};

/* Odd in a burst. On a line of its own, as other threads look at it. */
struct progress {
    _Alignas(CACHE_LINE) _Atomic uint64_t activity;
    _Atomic uint64_t answer; /* the newest of lbgym_core_ask that was answered */
    uint8_t rest[CACHE_LINE - 16];
};

struct lbgym_worker {
    struct progress progress;
    lbgym_core *core;
    const struct snapshot *now_in_force; /* in a burst */
    uint64_t version;                    /* of the last one seen */
    struct index by_client, by_server;
    struct flow *flows;
    uint32_t num_flows, free, syn_flows;
    bool started;
    uint64_t cursor; /* the last tick of the wheel that was dealt with */
    struct link *slots;
    lbgym_core_counters *counters; /* [servers] */
    lbgym_server *servers;
    uint32_t *generations;
    lbgym_core_totals totals;
    lbgym_core_counters *copied_counters;
    lbgym_server *copied_servers;
    lbgym_core_totals copied_totals;
    uint64_t random, fct_threshold, duration_threshold;
    struct fragment *fragments;
    uint32_t number;
    uint16_t identification; /* of the next outer header */
    size_t flows_size, client_size, server_size;
};

/* A packet in a burst. */
struct work {
    struct parsed parsed;
    uint32_t vip; /* or NONE */
    uint32_t row; /* NAT, of a packet from a server; or NONE */
    uint64_t flow_hash; /* of a client's packet: dispatch and table */
    uint64_t hash;
};

struct client_key {
    const uint32_t *client;
    uint16_t port, vip;
};

struct server_key {
    const uint32_t *client;
    const struct snapshot *snapshot;
    uint16_t port, server;
    uint8_t protocol;
};

/* Memory */

static void *zeroed(size_t size)
{
    void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
        return NULL;
    }
#ifdef MADV_HUGEPAGE
    if (size >= 1u << 22) {
        (void)madvise(memory, size, MADV_HUGEPAGE);
    }
#endif
    /* Pages come now, and not one by one as packets need them. */
    memset(memory, 0, size);
    return memory;
}

static bool make_index(struct index *x, uint32_t flows, size_t *size)
{
    uint32_t buckets = 2;
    /* At most three flows in a bucket of eight in the mean: the refusals left are one in ten thousand. */
    while ((uint64_t)buckets * 3 < flows) {
        buckets *= 2;
    }
    *size = (size_t)buckets * sizeof *x->buckets;
    x->buckets = zeroed(*size);
    x->mask = buckets - 1;
    return x->buckets != NULL;
}

static uint64_t threshold_of(double probability)
{
    return (uint64_t)(probability * 9007199254740992.0);
}

static bool reset_samples(lbgym_worker *w, uint32_t row)
{
    const int64_t open = w->servers[row].open_flows;
    /* Another sequence for another server of the row, by which lbgym_worker_tick knows that it has to be copied. */
    const uint64_t seed = lbgym_mix64(lbgym_mix64(w->core->secret + w->number) + row) + w->generations[row];
    const bool good = lbgym_server_init(&w->servers[row], seed, LBGYM_RESERVOIR_SLOTS, 1.0, LBGYM_OVERWRITE);
    w->servers[row].open_flows = open;
    return good;
}

size_t lbgym_worker_size(void)
{
    return sizeof(lbgym_worker);
}

lbgym_worker *lbgym_worker_at(lbgym_core *core, uint32_t number)
{
    return &core->workers[number];
}

bool lbgym_worker_init(lbgym_worker *w, lbgym_core *core, uint32_t number)
{
    const lbgym_core_options *options = &core->options;
    const uint32_t servers = options->servers;
    memset(w, 0, sizeof *w);
    w->core = core;
    w->number = number;
    w->num_flows = options->flows;
    w->syn_flows = options->syn_flows;
    w->random = lbgym_mix64(core->secret ^ (number + 1));
    w->fct_threshold = threshold_of(options->fct_sampling);
    w->duration_threshold = threshold_of(options->duration_sampling);
    w->flows_size = (size_t)options->flows * sizeof *w->flows;
    w->flows = zeroed(w->flows_size);
    w->slots = malloc(WHEEL_SLOTS * sizeof *w->slots);
    w->counters = calloc(servers, sizeof *w->counters);
    w->servers = calloc(servers, sizeof *w->servers);
    w->generations = calloc(servers, sizeof *w->generations);
    w->copied_counters = calloc(servers, sizeof *w->copied_counters);
    w->copied_servers = calloc(servers, sizeof *w->copied_servers);
    w->fragments = calloc(FRAGMENTS, sizeof *w->fragments);
    if (!make_index(&w->by_client, options->flows, &w->client_size) || w->flows == NULL || w->slots == NULL ||
        w->counters == NULL || w->servers == NULL || w->generations == NULL || w->copied_counters == NULL ||
        w->copied_servers == NULL || w->fragments == NULL ||
        (options->mode == LBGYM_NAT && !make_index(&w->by_server, options->flows, &w->server_size))) {
        return false;
    }
    for (uint32_t i = 0; i < WHEEL_SLOTS; i++) {
        w->slots[i].next = w->slots[i].previous = options->flows + i;
    }
    for (uint32_t i = 0; i < options->flows; i++) {
        w->flows[i].timer.next = i + 1 < options->flows ? i + 1 : NONE;
    }
    for (uint32_t row = 0; row < servers; row++) {
        (void)reset_samples(w, row);
    }
    return true;
}

void lbgym_worker_clear(lbgym_worker *w)
{
    if (w->flows != NULL) {
        (void)munmap(w->flows, w->flows_size);
    }
    if (w->by_client.buckets != NULL) {
        (void)munmap(w->by_client.buckets, w->client_size);
    }
    if (w->by_server.buckets != NULL) {
        (void)munmap(w->by_server.buckets, w->server_size);
    }
    free(w->slots);
    free(w->counters);
    free(w->servers);
    free(w->generations);
    free(w->copied_counters);
    free(w->copied_servers);
    free(w->fragments);
}

uint64_t lbgym_worker_activity(const lbgym_worker *w)
{
    return atomic_load(&w->progress.activity);
}

uint64_t lbgym_worker_answer(const lbgym_worker *w)
{
    return atomic_load_explicit(&w->progress.answer, memory_order_acquire);
}

void lbgym_worker_copied(const lbgym_worker *w, uint32_t row, const lbgym_core_counters **counters,
                         const lbgym_server **features)
{
    *counters = &w->copied_counters[row];
    *features = &w->copied_servers[row];
}

const lbgym_core_totals *lbgym_worker_copied_totals(const lbgym_worker *w)
{
    return &w->copied_totals;
}

/* Timers */

static inline struct link *timer(lbgym_worker *w, uint32_t i)
{
    return i < w->num_flows ? &w->flows[i].timer : &w->slots[i - w->num_flows];
}

static inline void disarm(lbgym_worker *w, uint32_t flow)
{
    const struct link link = w->flows[flow].timer;
    timer(w, link.next)->previous = link.previous;
    timer(w, link.previous)->next = link.next;
}

static inline uint64_t deadline_of(const lbgym_worker *w, const struct flow *flow)
{
    const lbgym_core_options *options = &w->core->options;
    if (flow->state == LBGYM_SYN) {
        return flow->last + options->syn_timeout;
    }
    if (flow->state == LBGYM_CLOSED) {
        return flow->last + options->close_timeout;
    }
    if (w->now_in_force->vips[flow->vip].key.protocol == LBGYM_PROTOCOL_UDP) {
        return flow->last + options->udp_timeout;
    }
    return flow->last + options->idle_timeout;
}

static inline void arm(lbgym_worker *w, uint32_t flow)
{
    const uint64_t due = (deadline_of(w, &w->flows[flow]) >> WHEEL_SHIFT) + 1;
    const uint64_t least = w->cursor + 1, most = w->cursor + WHEEL_SLOTS - 1;
    const uint64_t tick = due < least ? least : due > most ? most : due;
    const uint32_t slot = (uint32_t)(tick % WHEEL_SLOTS), at = w->num_flows + slot;
    const uint32_t next = w->slots[slot].next;
    w->flows[flow].timer.next = next;
    w->flows[flow].timer.previous = at;
    w->slots[slot].next = flow;
    timer(w, next)->previous = flow;
}

/* Hashes */

static inline uint64_t client_hash(const lbgym_worker *w, uint64_t flow_hash)
{
    return lbgym_mix64(flow_hash ^ w->core->secret);
}

static inline uint64_t server_hash(const lbgym_worker *w, const uint32_t client[4], uint16_t port, uint32_t row)
{
    return lbgym_flow_hash(w->core->secret + row, client, port);
}

static inline uint64_t hash_of(const lbgym_worker *w, const struct flow *flow)
{
    const uint64_t service = w->now_in_force->vips[flow->vip].service;
    return client_hash(w, lbgym_flow_hash(service, flow->client, flow->port));
}

static bool is_of_client(const struct flow *flow, const void *at)
{
    const struct client_key *key = at;
    return flow->port == key->port && flow->vip == key->vip && same_address(flow->client, key->client);
}

static bool is_of_server(const struct flow *flow, const void *at)
{
    const struct server_key *key = at;
    return flow->port == key->port && flow->server == key->server && same_address(flow->client, key->client) &&
           key->snapshot->vips[flow->vip].key.protocol == key->protocol;
}

/* Counts */

static inline bool drawn(lbgym_worker *w, uint64_t threshold)
{
    return threshold != 0 && (threshold == UINT64_C(1) << 53 || lbgym_next(&w->random) >> 11 < threshold);
}

static inline void count_open(lbgym_worker *w, uint32_t row, int change)
{
    _Atomic uint64_t *const open = &w->core->open[row];
    w->servers[row].open_flows += change;
    w->counters[row].open += (uint64_t)(int64_t)change;
    if (w->core->options.workers == 1) {
        /* The only writer. */
        atomic_store_explicit(open, peek(open) + (uint64_t)(int64_t)change, memory_order_relaxed);
    } else {
        atomic_fetch_add_explicit(open, (uint64_t)(int64_t)change, memory_order_relaxed);
    }
}

static inline void count_start(lbgym_worker *w, uint32_t row)
{
    w->counters[row].started++;
    w->totals.syn_open++;
    count_open(w, row, 1);
}

static inline void count_fct(lbgym_worker *w, uint32_t row, const struct flow *flow, uint64_t end)
{
    const uint64_t fct = lbgym_elapsed(flow->opened, end);
    w->counters[row].fct_count++;
    w->counters[row].fct_sum += fct;
    if (drawn(w, w->fct_threshold)) {
        lbgym_reservoir_add(&w->servers[row].fct, fct, end);
    }
}

/* An open flow has ended, in whatever way. */
static inline void count_end(lbgym_worker *w, const struct flow *flow, enum lbgym_tcp_event how)
{
    lbgym_core_counters *const c = &w->counters[flow->server];
    if (how == LBGYM_COMPLETES) {
        c->completed++;
    } else if (how == LBGYM_REJECTS) {
        c->rejected++;
    } else {
        c->failed++;
    }
    count_open(w, flow->server, -1);
    if (flow->state == LBGYM_SYN) {
        w->totals.syn_open--;
    }
}

/* Ended by a packet. The entry stays for the packets that still come. */
static void finish(lbgym_worker *w, uint32_t number, enum lbgym_tcp_event how, uint64_t now)
{
    struct flow *const flow = &w->flows[number];
    count_end(w, flow, how);
    if (how == LBGYM_COMPLETES || flow->state != LBGYM_SYN) {
        count_fct(w, flow->server, flow, now);
    }
    flow->state = LBGYM_CLOSED;
    disarm(w, number);
    arm(w, number);
}

/* Beginning */

static inline void forget_replies(lbgym_worker *w, uint32_t number)
{
    struct flow *const flow = &w->flows[number];
    if (flow->replies) {
        take_flow(&w->by_server, server_hash(w, flow->client, flow->port, flow->server), number);
        flow->replies = 0;
    }
}

enum replies { EXPECTED, CONFLICT, FULL };

/* NAT: have the packets of server `row` find the flow, which is not of that server yet. */
static enum replies expect_replies(lbgym_worker *w, uint32_t number, uint32_t row)
{
    struct flow *const flow = &w->flows[number];
    const struct server_key key = {
        flow->client, w->now_in_force, flow->port, (uint16_t)row, w->now_in_force->vips[flow->vip].key.protocol,
    };
    const uint64_t hash = server_hash(w, flow->client, flow->port, row);
    const uint32_t other = find_flow(&w->by_server, w->flows, hash, is_of_server, &key);
    if (other != NONE && other != number) {
        if (lbgym_is_open(w->flows[other].state)) {
            return CONFLICT;
        }
        forget_replies(w, other);
    }
    if (other != number && !put_flow(&w->by_server, hash, number)) {
        return FULL;
    }
    flow->replies = 1;
    return EXPECTED;
}

static inline uint32_t fallback(const struct snapshot *s, uint64_t flow_hash)
{
    if (s->fallback_size == 0) {
        return NONE;
    }
    return s->fallback[lbgym_to_range(lbgym_dispatch_hash(flow_hash), s->fallback_size)];
}

static inline uint32_t place(lbgym_worker *w, const struct work *work)
{
    const uint32_t row = lbgym_choose(w->core, w->now_in_force, lbgym_dispatch_hash(work->flow_hash));
    if (UNLIKELY(row == NONE)) {
        w->totals.unrouted++;
    }
    return row;
}

/* The server of a packet that gets no entry. What a NAT does not know it cannot translate back, so that a flow must not
 * begin without. */
static uint32_t stateless(lbgym_worker *w, const struct work *work, bool begins)
{
    return begins && w->core->options.mode == LBGYM_NAT ? NONE : fallback(w->now_in_force, work->flow_hash);
}

/* Begin a flow and return its server, or NONE. One first seen in the middle (`adopted`) was placed by the fallback table,
 * here or by another balancer. */
static uint32_t begin(lbgym_worker *w, const lbgym_packet *packet, const struct work *work, bool adopted, uint64_t now)
{
    const uint32_t number = w->free;
    struct flow *flow;
    uint32_t row;
    enum replies replies = EXPECTED;
    if (UNLIKELY(w->totals.syn_open >= w->syn_flows)) {
        *(adopted ? &w->totals.untracked : &w->totals.syn_limited) += 1;
        return stateless(w, work, !adopted);
    }
    row = adopted ? fallback(w->now_in_force, work->flow_hash) : place(w, work);
    if (UNLIKELY(row == NONE)) {
        return NONE;
    }
    if (UNLIKELY(number == NONE || !put_flow(&w->by_client, work->hash, number))) {
        *(adopted ? &w->totals.untracked : &w->totals.table_full) += 1;
        return stateless(w, work, !adopted);
    }
    flow = &w->flows[number];
    w->free = flow->timer.next;
    memcpy(flow->client, work->parsed.source, sizeof flow->client);
    flow->port = work->parsed.source_port;
    flow->vip = (uint16_t)work->vip;
    flow->server = (uint16_t)row;
    flow->replies = 0;
    if (w->core->options.mode == LBGYM_NAT) {
        replies = expect_replies(w, number, row);
    }
    if (UNLIKELY(replies != EXPECTED)) {
        take_flow(&w->by_client, work->hash, number);
        flow->state = LBGYM_FREE;
        w->free = number; /* timer.next is as it was */
        *(replies == CONFLICT ? &w->totals.conflicts : &w->totals.table_full) += 1;
        return NONE;
    }
    flow->link = packet->link;
    flow->isn = work->parsed.isn;
    flow->state = LBGYM_SYN;
    flow->opened = flow->last = now;
    arm(w, number);
    w->counters[row].entries++;
    count_start(w, row);
    w->totals.adopted += adopted;
    return row;
}

/* A SYN with the addresses and ports of a flow that is known. */
static uint32_t begin_again(lbgym_worker *w, const lbgym_packet *packet, const struct work *work, uint32_t number,
                            uint64_t now)
{
    struct flow *const flow = &w->flows[number];
    const uint32_t before = flow->server;
    uint32_t row = before;
    if (flow->isn == work->parsed.isn) {
        return before; /* sent again */
    }
    if (flow->state == LBGYM_ESTABLISHED) {
        /* Either the end of the old flow was not seen, or a third party forged the SYN. The server knows. */
        w->totals.reused++;
    } else {
        if (flow->state == LBGYM_CLOSED && w->totals.syn_open >= w->syn_flows) {
            w->totals.syn_limited++;
            return before;
        }
        row = place(w, work);
        if (row == NONE) {
            return NONE;
        }
        if (w->core->options.mode == LBGYM_NAT && (row != before || !flow->replies)) {
            enum replies replies;
            forget_replies(w, number);
            replies = expect_replies(w, number, row);
            if (replies != EXPECTED) {
                *(replies == CONFLICT ? &w->totals.conflicts : &w->totals.table_full) += 1;
                /* The old flow goes on as it was; there was room a moment ago. */
                (void)expect_replies(w, number, before);
                return NONE;
            }
        }
    }
    if (flow->state != LBGYM_CLOSED) {
        count_end(w, flow, LBGYM_FAILS);
    }
    if (row != before) {
        w->counters[before].entries--;
        w->counters[row].entries++;
    }
    flow->server = (uint16_t)row;
    flow->isn = work->parsed.isn;
    flow->link = packet->link;
    flow->state = LBGYM_SYN;
    flow->opened = flow->last = now;
    disarm(w, number);
    arm(w, number);
    count_start(w, row);
    return row;
}

static inline void confirm(lbgym_worker *w, struct flow *flow)
{
    flow->state = LBGYM_ESTABLISHED;
    w->totals.syn_open--;
}

/* The server of a client's packet, or NONE. */
static inline uint32_t server_of(lbgym_worker *w, const lbgym_packet *packet, const struct work *work, uint64_t now)
{
    const struct client_key key = {work->parsed.source, work->parsed.source_port, (uint16_t)work->vip};
    const uint32_t number = find_flow(&w->by_client, w->flows, work->hash, is_of_client, &key);
    const bool is_tcp = work->parsed.protocol == LBGYM_PROTOCOL_TCP;
    const uint8_t flags = work->parsed.flags;
    if (LIKELY(number != NONE)) {
        struct flow *const flow = &w->flows[number];
        enum lbgym_tcp_event event;
        if (UNLIKELY(is_tcp && lbgym_tcp_opens(flags))) {
            return begin_again(w, packet, work, number, now);
        }
        flow->last = now;
        if (UNLIKELY(!lbgym_is_open(flow->state))) {
            w->totals.after_close++;
            return flow->server;
        }
        event = is_tcp ? lbgym_tcp_from_client(flow->state, flags, w->core->options.mode == LBGYM_NAT)
                       : flow->state == LBGYM_SYN ? LBGYM_CONFIRMS
                                                  : LBGYM_GOES_ON;
        if (UNLIKELY(event >= LBGYM_CLOSES_HALF)) {
            if (event != LBGYM_CLOSES_HALF) {
                finish(w, number, event, now);
            }
            return flow->server;
        }
        if (UNLIKELY(event == LBGYM_CONFIRMS)) {
            confirm(w, flow);
        }
        if (drawn(w, w->duration_threshold)) {
            lbgym_server_packet(&w->servers[flow->server], flow->opened, now);
        }
        return flow->server;
    }
    if (!is_tcp || lbgym_tcp_opens(flags)) {
        return begin(w, packet, work, false, now);
    }
    if (lbgym_tcp_adopts(flags)) {
        return begin(w, packet, work, true, now);
    }
    w->totals.untracked++;
    return stateless(w, work, false);
}

/* Translation */

static void set_l4_checksum(uint8_t *at, uint8_t protocol, bool partial, uint32_t address_sum, uint32_t port_sum)
{
    const uint16_t before = load16(at);
    uint16_t after;
    if (partial) {
        store16(at, lbgym_partial_checksum(before, address_sum));
        return;
    }
    if (protocol == LBGYM_PROTOCOL_UDP && before == 0) {
        return; /* without a checksum */
    }
    after = lbgym_checksum(before, address_sum + port_sum);
    if (protocol == LBGYM_PROTOCOL_UDP && after == 0) {
        after = 0xFFFF;
    }
    store16(at, after);
}

/* Give a packet another source or destination: address at offset `address` of its header, port at `port` of L4. A later
 * fragment (l4 == NULL) has no port. */
static void translate(uint8_t *l3, uint8_t *l4, bool is_ipv6, uint8_t protocol, bool partial, bool is_source,
                      const uint32_t new_address[4], uint16_t new_port)
{
    uint8_t *const address = l3 + (is_ipv6 ? (is_source ? 8 : 24) : (is_source ? 12 : 16));
    const int words = is_ipv6 ? 4 : 1;
    uint32_t before[4] = {0}, sum;
    memcpy(before, address, (size_t)words * 4);
    sum = lbgym_sum_address(0, before, new_address, words);
    memcpy(address, new_address, (size_t)words * 4);
    if (!is_ipv6) {
        store16(l3 + 10, lbgym_checksum(load16(l3 + 10), sum));
    }
    if (l4 != NULL) {
        uint8_t *const port = l4 + (is_source ? 0 : 2);
        const uint32_t port_sum = lbgym_sum_port(0, load16(port), new_port);
        set_l4_checksum(l4 + (protocol == LBGYM_PROTOCOL_TCP ? 16 : 6), protocol, partial, sum, port_sum);
        store16(port, new_port);
    }
}

/* An ICMP error about a packet from the VIP: outer destination and inner source become the server's. */
static void translate_error(lbgym_packet *packet, const struct parsed *p, const lbgym_core_server *server)
{
    uint8_t *const l3 = packet->data, *const inner = l3 + p->inner, *const inner_l4 = l3 + p->inner_l4;
    uint8_t *const icmp_check = l3 + p->l4 + 2;
    const int words = p->is_ipv6 ? 4 : 1;
    const uint32_t end = p->total < packet->length ? p->total : packet->length;
    const uint32_t check_at = p->inner_l4 + (p->protocol == LBGYM_PROTOCOL_TCP ? 16u : 6u);
    const uint32_t outer = lbgym_sum_address(0, p->destination, server->address, words);
    const uint32_t quoted = lbgym_sum_address(0, p->inner_source, server->address, words);
    const uint32_t port = lbgym_sum_port(0, p->source_port, server->port);
    /* ICMPv6 has a pseudo header with the outer addresses. */
    uint32_t icmp = (p->is_ipv6 ? outer : 0) + quoted + port;
    uint16_t before;
    if (!p->is_ipv6) {
        store16(l3 + 10, lbgym_checksum(load16(l3 + 10), outer));
        before = load16(inner + 10);
        store16(inner + 10, lbgym_checksum(before, quoted));
        icmp = lbgym_sum_port(icmp, before, load16(inner + 10));
    }
    if (check_at + 2 <= end) {
        before = load16(l3 + check_at);
        set_l4_checksum(l3 + check_at, p->protocol, false, quoted, port);
        icmp = lbgym_sum_port(icmp, before, load16(l3 + check_at));
    }
    store16(icmp_check, lbgym_checksum(load16(icmp_check), icmp));
    memcpy(l3 + (p->is_ipv6 ? 24 : 16), server->address, (size_t)words * 4);
    memcpy(inner + (p->is_ipv6 ? 8 : 12), server->address, (size_t)words * 4);
    store16(inner_l4, server->port);
}

/* Encapsulation */

static bool encapsulate(lbgym_worker *w, lbgym_packet *packet, const struct parsed *p, const lbgym_core_server *server)
{
    const lbgym_core_options *options = &w->core->options;
    const bool gre = options->mode == LBGYM_GRE;
    const uint32_t header = (server->is_ipv6 ? 40u : 20u) + (gre ? 4u : 0u);
    const uint32_t total = p->total + header;
    const uint8_t *const inner = packet->data;
    uint8_t *outer = packet->data - header;
    uint8_t protocol = gre ? 47 : p->is_ipv6 ? 41 : 4;
    if (packet->headroom < header || total > (server->is_ipv6 ? 65575u : 65535u)) {
        return false;
    }
    memset(outer, 0, header);
    if (gre) {
        store16(outer + header - 2, swap16(p->is_ipv6 ? 0x86DD : 0x0800));
    }
    if (server->is_ipv6) {
        const uint32_t traffic_class =
            p->is_ipv6 ? (uint32_t)(load16(inner) & swap16(0x0FF0)) : swap16((uint16_t)(inner[1] << 4));
        store16(outer, (uint16_t)(swap16(0x6000) | traffic_class));
        store16(outer + 4, swap16((uint16_t)(total - 40)));
        outer[6] = protocol;
        outer[7] = 64;
        memcpy(outer + 8, options->source6, 16);
        memcpy(outer + 24, server->address, 16);
    } else {
        uint32_t sum = 0;
        outer[0] = 0x45;
        outer[1] = p->is_ipv6 ? (uint8_t)(swap16(load16(inner)) >> 4) : inner[1];
        store16(outer + 2, swap16((uint16_t)total));
        store16(outer + 4, swap16(w->identification++));
        store16(outer + 6, p->is_ipv6 ? swap16(0x4000) : (uint16_t)(load16(inner + 6) & swap16(0x4000)));
        outer[8] = 64;
        outer[9] = protocol;
        store32(outer + 12, options->source4);
        store32(outer + 16, server->address[0]);
        for (uint32_t i = 0; i < 20; i += 2) {
            sum += load16(outer + i);
        }
        store16(outer + 10, (uint16_t)~lbgym_sum_folded(sum));
    }
    packet->data = outer;
    packet->length += header;
    packet->headroom -= header;
    return true;
}

/* Verdicts */

static const lbgym_core_server *reachable(lbgym_worker *w, uint32_t row)
{
    const struct snapshot *s = w->now_in_force;
    if (row == NONE) {
        return NULL;
    }
    if (LIKELY(row < s->rows && s->servers[row].reachable)) {
        return &s->servers[row];
    }
    w->totals.unreachable++;
    return NULL;
}

static struct fragment *fragment_of(lbgym_worker *w, const struct parsed *p)
{
    uint64_t h = lbgym_flow_hash(p->identification, p->source, p->protocol);
    h = lbgym_flow_hash(h, p->destination, 0);
    return &w->fragments[h % FRAGMENTS];
}

static void note_fragments(lbgym_worker *w, const lbgym_packet *packet, const struct parsed *p, uint64_t now)
{
    struct fragment *f = fragment_of(w, p);
    memcpy(f->source, p->source, sizeof f->source);
    memcpy(f->destination, p->destination, sizeof f->destination);
    f->identification = p->identification;
    f->protocol = p->protocol;
    f->expires = now + FRAGMENT_TIMEOUT;
    f->verdict = packet->verdict;
    f->server = packet->server;
    f->vip = packet->vip;
    f->link = packet->link;
}

static void to_server(lbgym_worker *w, lbgym_packet *packet, const struct parsed *p, uint32_t row)
{
    const lbgym_core_server *server = reachable(w, row);
    const uint32_t mode = w->core->options.mode;
    packet->verdict = LBGYM_DROP;
    if (UNLIKELY(server == NULL)) {
        return;
    }
    packet->server = (uint16_t)row;
    packet->via = server->via;
    if (mode == LBGYM_NAT) {
        if (UNLIKELY(server->is_ipv6 != p->is_ipv6)) {
            w->totals.unreachable++;
            return;
        }
        if (p->kind == ERROR) {
            translate_error(packet, p, server);
        } else {
            uint8_t *const l4 = p->kind == FRAGMENT ? NULL : packet->data + p->l4;
            translate(packet->data, l4, p->is_ipv6, p->protocol, packet->partial, false, server->address,
                      server->port);
        }
    } else if (mode != LBGYM_DSR && !encapsulate(w, packet, p, server)) {
        w->totals.no_room++;
        return;
    }
    packet->verdict = LBGYM_SEND;
}

/* NAT: a packet from a server; its source becomes the VIP. */
static void reply(lbgym_worker *w, lbgym_packet *packet, const struct work *work, uint64_t now)
{
    const struct parsed *p = &work->parsed;
    const struct server_key key = {
        p->destination, w->now_in_force, p->destination_port, (uint16_t)work->row, p->protocol,
    };
    const uint32_t number = find_flow(&w->by_server, w->flows, work->hash, is_of_server, &key);
    struct flow *flow;
    const lbgym_vip *vip;
    if (number == NONE) {
        return;
    }
    flow = &w->flows[number];
    flow->last = now;
    if (lbgym_is_open(flow->state)) {
        const enum lbgym_tcp_event event = p->protocol == LBGYM_PROTOCOL_TCP
                                               ? lbgym_tcp_from_server(flow->state, p->flags)
                                               : flow->state == LBGYM_SYN ? LBGYM_CONFIRMS
                                                                          : LBGYM_GOES_ON;
        if (UNLIKELY(event == LBGYM_CONFIRMS)) {
            confirm(w, flow);
        } else if (UNLIKELY(event != LBGYM_GOES_ON)) {
            finish(w, number, event, now);
        }
    }
    vip = &w->now_in_force->vips[flow->vip].key;
    packet->server = flow->server;
    packet->vip = flow->vip;
    packet->link = flow->link;
    packet->verdict = LBGYM_REPLY;
    translate(packet->data, packet->data + p->l4, p->is_ipv6, p->protocol, packet->partial, true, vip->address,
              vip->port);
    if (UNLIKELY(p->fragmented)) {
        note_fragments(w, packet, p, now);
    }
}

/* An ICMP error about a packet that a server sent from a VIP. */
static void icmp_error(lbgym_worker *w, lbgym_packet *packet, const struct work *work)
{
    const struct parsed *p = &work->parsed;
    const struct snapshot *s = w->now_in_force;
    const uint32_t vip = find_vip(s, p->inner_source, p->source_port, p->protocol);
    if (vip == NONE || !is_vip_address(s, p->destination)) {
        return;
    }
    const struct client_key key = {p->inner_destination, p->destination_port, (uint16_t)vip};
    const uint64_t hash = lbgym_flow_hash(s->vips[vip].service, p->inner_destination, p->destination_port);
    const uint32_t number = find_flow(&w->by_client, w->flows, client_hash(w, hash), is_of_client, &key);
    packet->vip = (uint16_t)vip;
    to_server(w, packet, p, number != NONE ? w->flows[number].server : fallback(s, hash));
    w->totals.icmp += packet->verdict == LBGYM_SEND;
}

static void later_fragment(lbgym_worker *w, lbgym_packet *packet, const struct parsed *p, uint64_t now)
{
    const struct fragment *f = fragment_of(w, p);
    if (f->expires <= now || f->identification != p->identification || f->protocol != p->protocol ||
        !same_address(f->source, p->source) || !same_address(f->destination, p->destination)) {
        w->totals.fragments += is_vip_address(w->now_in_force, p->destination);
        return;
    }
    packet->vip = f->vip;
    if (f->verdict == LBGYM_REPLY) {
        const lbgym_vip *vip = &w->now_in_force->vips[f->vip].key;
        translate(packet->data, NULL, p->is_ipv6, p->protocol, false, true, vip->address, vip->port);
        packet->server = f->server;
        packet->link = f->link;
        packet->verdict = LBGYM_REPLY;
        return;
    }
    to_server(w, packet, p, f->server);
}

/* The worker that has the flow of a packet, by its client's address, as later fragments have no ports. */
static uint32_t owner_of(const lbgym_worker *w, const struct work *work)
{
    const struct parsed *p = &work->parsed;
    const struct snapshot *s = w->now_in_force;
    const lbgym_core_options *options = &w->core->options;
    const uint32_t *client;
    if (work->vip != NONE) {
        client = p->source;
    } else if (work->row != NONE) {
        client = p->destination;
    } else if (p->kind == ERROR && find_vip(s, p->inner_source, p->source_port, p->protocol) != NONE) {
        client = p->inner_destination;
    } else if (p->kind == FRAGMENT) {
        client = is_vip_address(s, p->destination) ? p->source : p->destination;
    } else {
        return w->number;
    }
    return options->workers - options->owners + lbgym_to_range(lbgym_flow_hash(0, client, 0), options->owners);
}

/* First pass: find out what it is, and have the bucket of its flow fetched. */
static inline void look(lbgym_worker *w, lbgym_packet *packet, struct work *work)
{
    const struct snapshot *s = w->now_in_force;
    struct parsed *const p = &work->parsed;
    packet->verdict = LBGYM_PASS;
    packet->server = LBGYM_CORE_NO_SERVER;
    packet->vip = 0;
    work->vip = work->row = NONE;
    lbgym_parse(packet->data, packet->length, p);
    if (LIKELY(p->kind == L4)) {
        work->vip = find_vip(s, p->destination, p->destination_port, p->protocol);
        if (work->vip == NONE && w->core->options.mode == LBGYM_NAT) {
            work->row = find_backend(s, w->core->backend_mask, p->source, p->source_port);
        }
    }
    if (UNLIKELY(w->core->options.owners != 0)) {
        const uint32_t owner = owner_of(w, work);
        if (owner != w->number) {
            packet->verdict = LBGYM_HANDOVER;
            packet->via = owner;
            work->vip = work->row = NONE;
            p->kind = OTHER;
            return;
        }
    }
    if (LIKELY(work->vip != NONE)) {
        work->flow_hash = lbgym_flow_hash(s->vips[work->vip].service, p->source, p->source_port);
        work->hash = client_hash(w, work->flow_hash);
        __builtin_prefetch(first_bucket(&w->by_client, work->hash));
    } else if (work->row != NONE) {
        work->hash = server_hash(w, p->destination, p->destination_port, work->row);
        __builtin_prefetch(first_bucket(&w->by_server, work->hash));
    }
}

/* Second pass: have the flow itself fetched. */
static inline void fetch(const lbgym_worker *w, const struct work *work)
{
    const struct index *x = work->vip != NONE ? &w->by_client : &w->by_server;
    if (work->vip != NONE || work->row != NONE) {
        const struct bucket *b = first_bucket(x, work->hash);
        const uint32_t ways = candidates(b, tag_of(work->hash));
        if (LIKELY(ways != 0)) {
            __builtin_prefetch(&w->flows[b->flows[__builtin_ctz(ways)]], 1);
        }
    }
}

static inline void handle(lbgym_worker *w, lbgym_packet *packet, const struct work *work, uint64_t now)
{
    const struct parsed *p = &work->parsed;
    if (LIKELY(work->vip != NONE)) {
        packet->vip = (uint16_t)work->vip;
        to_server(w, packet, p, server_of(w, packet, work, now));
        if (UNLIKELY(p->fragmented && packet->verdict == LBGYM_SEND)) {
            note_fragments(w, packet, p, now);
        }
        return;
    }
    if (work->row != NONE) {
        reply(w, packet, work, now);
    } else if (p->kind == ERROR) {
        icmp_error(w, packet, work);
    } else if (p->kind == FRAGMENT) {
        later_fragment(w, packet, p, now);
    } else if (p->kind == MALFORMED) {
        w->totals.malformed += is_vip_address(w->now_in_force, p->destination);
    }
}

static void enter(lbgym_worker *w)
{
    const struct snapshot *s;
    atomic_store(&w->progress.activity, peek(&w->progress.activity) + 1);
    s = w->now_in_force = atomic_load(&w->core->current);
    if (UNLIKELY(s->version != w->version)) {
        w->version = s->version;
        for (uint32_t row = 0; row < s->rows; row++) {
            if (UNLIKELY(w->generations[row] != s->servers[row].generation)) {
                w->generations[row] = s->servers[row].generation;
                (void)reset_samples(w, row);
            }
        }
    }
}

static void leave(lbgym_worker *w)
{
    atomic_store_explicit(&w->progress.activity, peek(&w->progress.activity) + 1, memory_order_release);
}

static void start_clock(lbgym_worker *w, uint64_t now)
{
    if (UNLIKELY(!w->started)) {
        w->started = true;
        w->cursor = now >> WHEEL_SHIFT;
    }
}

void lbgym_worker_run(lbgym_worker *w, lbgym_packet *packets, uint32_t n, uint64_t now)
{
    struct work work[BURST];
    start_clock(w, now);
    enter(w);
    w->totals.bursts++;
    w->totals.packets += n;
    for (uint32_t first = 0; first < n; first += BURST) {
        const uint32_t count = n - first < BURST ? n - first : BURST;
        for (uint32_t i = 0; i < count; i++) {
            look(w, &packets[first + i], &work[i]);
        }
        for (uint32_t i = 0; i < count; i++) {
            fetch(w, &work[i]);
        }
        for (uint32_t i = 0; i < count; i++) {
            handle(w, &packets[first + i], &work[i], now);
        }
    }
    leave(w);
}

/* The end of flows that nobody ended, and of entries. */

static void forget(lbgym_worker *w, uint32_t number)
{
    struct flow *const flow = &w->flows[number];
    if (lbgym_is_open(flow->state)) {
        /* UDP has no other end. Of a flow of one packet nothing was seen to take any time. */
        const bool is_udp = w->now_in_force->vips[flow->vip].key.protocol == LBGYM_PROTOCOL_UDP;
        count_end(w, flow, is_udp ? LBGYM_COMPLETES : LBGYM_FAILS);
        if (is_udp && flow->state == LBGYM_ESTABLISHED) {
            count_fct(w, flow->server, flow, flow->last);
        }
    }
    forget_replies(w, number);
    take_flow(&w->by_client, hash_of(w, flow), number);
    w->counters[flow->server].entries--;
    flow->state = LBGYM_FREE;
    flow->timer.next = w->free;
    w->free = number;
}

static uint32_t expire(lbgym_worker *w, uint64_t now, uint32_t budget)
{
    const uint64_t present = now >> WHEEL_SHIFT;
    uint32_t looked = 0;
    if (present > w->cursor + WHEEL_SLOTS) {
        /* After a long pause every slot is looked at once. */
        w->cursor = present - WHEEL_SLOTS;
    }
    while (w->cursor < present) {
        const uint32_t slot = (uint32_t)((w->cursor + 1) % WHEEL_SLOTS), at = w->num_flows + slot;
        while (w->slots[slot].next != at) {
            const uint32_t number = w->slots[slot].next;
            if (looked == budget) {
                return looked;
            }
            looked++;
            disarm(w, number);
            if (deadline_of(w, &w->flows[number]) <= now) {
                forget(w, number);
            } else {
                w->cursor++; /* so that it gets into a later slot than this */
                arm(w, number);
                w->cursor--;
            }
        }
        w->cursor++;
    }
    return looked;
}

/* Most have not changed: `accepted` moves with every sample, and `random` is another one after a reset. */
static void copy_samples(lbgym_reservoir *to, const lbgym_reservoir *from)
{
    if (from->accepted != to->accepted || from->random != to->random) {
        *to = *from;
    }
}

static void answer(lbgym_worker *w, uint64_t asked)
{
    const uint32_t rows = w->core->options.servers;
    memcpy(w->copied_counters, w->counters, rows * sizeof *w->counters);
    w->copied_totals = w->totals;
    for (uint32_t row = 0; row < rows; row++) {
        const lbgym_server *from = &w->servers[row];
        lbgym_server *to = &w->copied_servers[row];
        to->open_flows = from->open_flows;
        copy_samples(&to->fct, &from->fct);
        copy_samples(&to->duration, &from->duration);
    }
    atomic_store_explicit(&w->progress.answer, asked, memory_order_release);
}

uint32_t lbgym_worker_tick(lbgym_worker *w, uint64_t now, uint32_t budget)
{
    const uint64_t asked = atomic_load_explicit(&w->core->asked, memory_order_acquire);
    uint32_t looked;
    start_clock(w, now);
    enter(w);
    looked = expire(w, now, budget);
    if (UNLIKELY(asked != peek(&w->progress.answer))) {
        answer(w, asked);
    }
    leave(w);
    return looked;
}
