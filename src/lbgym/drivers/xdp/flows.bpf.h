/* SPDX-License-Identifier: Apache-2.0 */
/* The life of flows: beginning, end, collection. */
#ifndef LBGYM_XDP_FLOWS_H
#define LBGYM_XDP_FLOWS_H

#include "dispatch.bpf.h"

/* Beginning and end of flows */

static __always_inline void count_start(uint32_t server)
{
    server &= MAX_SERVERS - 1;
    ADD(shared.counters[server].started, 1);
    ADD(shared.open_flows[server], 1);
    ADD(shared.totals.syn_open, 1);
}

/* An open flow has ended; false if another CPU was faster. */
static __always_inline int end_flow(struct flow *flow, uint64_t word, uint64_t after, enum lbgym_tcp_event how)
{
    if (!replace(flow, word, after))
        return 0;
    struct counters *c = &shared.counters[server_of(word)];
    if (how == LBGYM_COMPLETES)
        ADD(c->completed, 1);
    else if (how == LBGYM_REJECTS)
        ADD(c->rejected, 1);
    else
        ADD(c->failed, 1);
    ADD(shared.open_flows[server_of(word)], -1);
    if (state_of(word) == LBGYM_SYN)
        ADD(shared.totals.syn_open, -1);
    return 1;
}

static __always_inline int is_open(uint64_t word)
{
    return lbgym_is_open(state_of(word));
}

/* Ended by a packet: its FCT is known. */
static __noinline int finish(struct flow *flow, uint64_t word, enum lbgym_tcp_event how)
{
    if (!flow)
        return 0;
    if (!end_flow(flow, word, (word & ~0xFFull) | LBGYM_CLOSED, how))
        return 0;
    uint64_t now = bpf_ktime_get_ns(), fct = now - flow->started;
    uint32_t server = server_of(word);
    if (how != LBGYM_COMPLETES && state_of(word) == LBGYM_SYN)
        return 0; /* it never was a flow */
    ADD(shared.counters[server].fct_count, 1);
    ADD(shared.counters[server].fct_sum, fct);
    if (drawn(shared.settings.fct_sampling))
        sample(server, 0, fct, now);
    return 0;
}

/* DNAT: have the replies of a server find their VIP; false if the client has another VIP's flow there. */
static __noinline int expect_replies(struct packet *p, uint32_t row)
{
    struct flow_key reply = p->key;
    uint32_t vip = p->key.vip;
    reply.vip = row;
    if (bpf_map_update_elem(&replies, &reply, &vip, BPF_NOEXIST) == 0)
        return 1;
    uint32_t *other = bpf_map_lookup_elem(&replies, &reply);
    if (other && *other != vip) {
        struct flow_key key = p->key;
        key.vip = *other;
        struct flow *flow = bpf_map_lookup_elem(&flows, &key);
        if (flow && is_open(READ(flow->word)) && server_of(READ(flow->word)) == row)
            return 0;
    }
    return bpf_map_update_elem(&replies, &reply, &vip, BPF_ANY) == 0;
}

/* The server of a new flow, or NONE. */
static __always_inline int place(struct packet *p, uint64_t now)
{
    uint64_t h = lbgym_dispatch_hash(lbgym_flow_hash(p->service, p->key.client, p->key.port));
    int row;
    if (LIKELY(now < READ(shared.settings.expires))) {
        row = choose(h, p->bank);
    } else {
        ADD(shared.totals.orphaned, 1);
        row = fallback(h, p->bank);
    }
    if (row < 0)
        ADD(shared.totals.unrouted, 1);
    return row;
}

static __always_inline int stateless(struct packet *p)
{
    return fallback(lbgym_dispatch_hash(lbgym_flow_hash(p->service, p->key.client, p->key.port)), p->bank);
}

/* Begin a flow and return its server, or NONE. Where there is no room for it, it goes by the fallback table, and a
 * later packet begins it. One first seen in the middle (`adopted`) was placed by that table, here or by another
 * balancer. It is in state SYN until a second packet comes, so that no flood fills the flow table. */
static __noinline int begin(struct packet *p, uint32_t adopted)
{
    if (READ(shared.totals.syn_open) >= shared.settings.syn_flows) {
        if (adopted)
            ADD(shared.totals.untracked, 1);
        else
            ADD(shared.totals.syn_limited, 1);
        return stateless(p);
    }
    uint64_t now = bpf_ktime_get_ns();
    int row = adopted ? stateless(p) : place(p, now);
    if (row < 0)
        return NONE;
    row &= MAX_SERVERS - 1;
    if (shared.settings.mode == DNAT && !expect_replies(p, row)) {
        ADD(shared.totals.conflicts, 1);
        return NONE;
    }
    struct flow flow = {
        .word = word_of(LBGYM_SYN, row, p->isn),
        .started = now,
        .last = bpf_ktime_get_coarse_ns(),
        .ifindex = p->ifindex,
    };
    __builtin_memcpy(flow.client_mac, p->client_mac, 6);
    __builtin_memcpy(flow.own_mac, p->own_mac, 6);
    if (bpf_map_update_elem(&flows, &p->key, &flow, BPF_NOEXIST)) {
        struct flow *other = bpf_map_lookup_elem(&flows, &p->key);
        if (other)
            return server_of(READ(other->word)); /* another CPU was faster */
        if (adopted)
            ADD(shared.totals.untracked, 1);
        else
            ADD(shared.totals.table_full, 1);
        return stateless(p);
    }
    ADD(shared.entries[row], 1);
    count_start(row);
    if (adopted)
        ADD(shared.totals.adopted, 1);
    return row;
}

/* A SYN with the addresses and ports of a flow that is known. */
static __noinline int begin_again(struct flow *flow, struct packet *p)
{
    if (!flow)
        return NONE;
    uint64_t word = READ(flow->word);
    uint32_t server = server_of(word), state = state_of(word);
    if (state == LBGYM_DEAD || word >> 32 == p->isn)
        return server; /* sent again */
    int row = server;
    if (state == LBGYM_ESTABLISHED) {
        /* Either the end of the old flow was not seen, or a third party forged the SYN. The server knows. */
        ADD(shared.totals.reused, 1);
    } else {
        if (state == LBGYM_CLOSED && READ(shared.totals.syn_open) >= shared.settings.syn_flows) {
            ADD(shared.totals.syn_limited, 1);
            return server;
        }
        row = place(p, bpf_ktime_get_ns());
        if (row < 0)
            return NONE;
        row &= MAX_SERVERS - 1;
        if (shared.settings.mode == DNAT && !expect_replies(p, row)) {
            ADD(shared.totals.conflicts, 1);
            return NONE;
        }
    }
    uint64_t after = word_of(LBGYM_SYN, row, p->isn);
    if (state == LBGYM_CLOSED ? !replace(flow, word, after) : !end_flow(flow, word, after, LBGYM_FAILS))
        return server_of(READ(flow->word));
    if ((uint32_t)row != server) {
        ADD(shared.entries[server], -1);
        ADD(shared.entries[row & (MAX_SERVERS - 1)], 1);
        if (shared.settings.mode == DNAT) {
            struct flow_key reply = p->key;
            reply.vip = server;
            bpf_map_delete_elem(&replies, &reply);
        }
    }
    flow->started = bpf_ktime_get_ns();
    flow->last = bpf_ktime_get_coarse_ns();
    flow->ifindex = p->ifindex;
    __builtin_memcpy(flow->client_mac, p->client_mac, 6);
    __builtin_memcpy(flow->own_mac, p->own_mac, 6);
    count_start(row);
    return row;
}

/* The server of a packet from a client, or NONE. */
static __always_inline int server_of_packet(struct packet *p, uint8_t flags)
{
    struct flow *flow = bpf_map_lookup_elem(&flows, &p->key);
    int opens = lbgym_tcp_opens(flags);
    if (LIKELY(flow != NULL)) {
        uint64_t word = READ(flow->word);
        if (UNLIKELY(opens))
            return begin_again(flow, p);
        uint32_t server = server_of(word);
        uint64_t now = bpf_ktime_get_coarse_ns();
        if (flow->last != now)
            READ(flow->last) = now;
        if (UNLIKELY(!is_open(word))) {
            ADD(shared.totals.after_close, 1);
            return server;
        }
        enum lbgym_tcp_event event = lbgym_tcp_from_client(state_of(word), flags, shared.settings.mode == DNAT);
        if (UNLIKELY(event >= LBGYM_CLOSES_HALF)) {
            if (event != LBGYM_CLOSES_HALF)
                finish(flow, word, event);
            return server;
        }
        if (event == LBGYM_CONFIRMS && replace(flow, word, (word & ~0xFFull) | LBGYM_ESTABLISHED))
            ADD(shared.totals.syn_open, -1);
        if (drawn(shared.settings.duration_sampling)) {
            uint64_t exact = bpf_ktime_get_ns();
            sample(server, 1, exact - flow->started, exact);
        }
        return server;
    }
    if (opens)
        return begin(p, 0);
    if (lbgym_tcp_adopts(flags))
        return begin(p, 1);
    ADD(shared.totals.untracked, 1);
    return stateless(p);
}

struct bpf_map;

/* Collection of flows that nobody ended, by the driver, in process context */

static long collect_flow(struct bpf_map *map, struct flow_key *key, struct flow *flow, struct collection *c)
{
    uint64_t word = READ(flow->word), last = READ(flow->last);
    int64_t idle = (int64_t)(c->now - last);
    uint32_t state = state_of(word);
    uint64_t limit = state == LBGYM_SYN           ? c->syn_timeout
                     : state == LBGYM_ESTABLISHED ? c->idle_timeout
                                                  : c->close_timeout;
    if (idle < 0 || idle < (int64_t)limit)
        return 0;
    uint64_t dead = (word & ~0xFFull) | LBGYM_DEAD;
    if (state == LBGYM_DEAD)
        return 0;
    if (state == LBGYM_CLOSED ? !replace(flow, word, dead) : !end_flow(flow, word, dead, LBGYM_FAILS))
        return 0;
    if (shared.settings.mode == DNAT) {
        struct flow_key reply = *key;
        reply.vip = server_of(word);
        uint32_t *vip = bpf_map_lookup_elem(&replies, &reply);
        if (vip && *vip == key->vip)
            bpf_map_delete_elem(&replies, &reply);
    }
    ADD(shared.entries[server_of(word)], -1);
    bpf_map_delete_elem(&flows, key);
    return 0;
}

SEC("syscall")
int collect(struct collection *ctx)
{
    struct collection c = *ctx;
    bpf_for_each_map_elem(&flows, collect_flow, &c, 0);
    return 0;
}

#endif
