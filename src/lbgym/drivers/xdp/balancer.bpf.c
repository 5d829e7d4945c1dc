// SPDX-License-Identifier: Apache-2.0
/* An L4 balancer for TCP in XDP: L2 direct server return or DNAT, IPv4 and IPv6.
 *
 * The driver fills the tables; the program knows no dispatch rule and no floating-point number. Every table has two
 * halves, of which `shared.settings.bank` is in force. A flow keeps its server, whatever happens to the tables.
 */
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
#include "lbgym_dispatch.h"

#define LIKELY(x) __builtin_expect(!!(x), 1)
#define UNLIKELY(x) __builtin_expect(!!(x), 0)
#define READ(x) (*(volatile typeof(x) *)&(x))
#define ADD(counter, n) ((void)__sync_fetch_and_add(&(counter), (n)))
/* A pointer comparison that the compiler must not rewrite in terms of lengths, which the verifier does not follow. */
#define BEYOND(pointer, end) ((void *)((pointer) + 1) > (end))
#define NONE (-1)

#define FIN_FLAG 0x01
#define SYN_FLAG 0x02
#define RST_FLAG 0x04
#define ACK_FLAG 0x10

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

/* Its types, of both versions, in <linux/icmp.h> need the C library of another architecture. */
struct icmp {
    uint8_t type, code;
    uint16_t check;
    uint32_t unused;
};
enum { ICMP_DEST_UNREACH = 3, ICMP_TIME_EXCEEDED = 11, ICMP_PARAMETERPROB = 12 };
enum { ICMPV6_DEST_UNREACH = 1, ICMPV6_PARAMPROB = 4 };

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
    case ALIAS: {
        struct alias *bucket = &shared.aliases[bank][lbgym_to_range(h, size) & (MAX_SERVERS - 1)];
        return (lbgym_takes_alias(h, bucket->threshold) ? bucket->other : bucket->stay) & (MAX_SERVERS - 1);
    }
    case LOOKUP:
        return row_of(half + lbgym_to_range(h, size), 0);
    case TURNS:
        return row_of(half + (uint32_t)(__sync_fetch_and_add(&shared.totals.turn, 1) % (size ? size : 1)), 0);
    case INDEX: {
        /* Ties go to the first from the hashed position on. */
        struct scan scan = {.least = LBGYM_INDEX_NEVER, .rows = table->rows, .first = first, .capacity = capacity};
        scan.row = lbgym_to_range(h, scan.rows);
        uint32_t rows = scan.rows < MAX_SERVERS ? scan.rows : MAX_SERVERS;
        /* The last step may look at the first servers again, which are not less than themselves. */
        bpf_loop((rows + SCAN_STEP - 1) / SCAN_STEP, scan_step, &scan, 0);
        return scan.least < LBGYM_INDEX_NEVER ? (int)(scan.best & (MAX_SERVERS - 1)) : NONE;
    }
    case TWO_CHOICES: {
        uint32_t one = lbgym_to_range(h, size);
        int taken = row_of(half + one, 0);
        if (size < 2 || taken < 0)
            return taken;
        uint32_t two = lbgym_to_range(lbgym_second_hash(h), size - 1);
        int other = row_of(half + two + (two >= one), 0);
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

/* Beginning and end of flows */

static __always_inline void count_start(uint32_t server)
{
    server &= MAX_SERVERS - 1;
    ADD(shared.counters[server].started, 1);
    ADD(shared.open_flows[server], 1);
    ADD(shared.totals.syn_open, 1);
}

enum how { COMPLETED, REJECTED, FAILED };

/* An open flow has ended; false if another CPU was faster. */
static __always_inline int end_flow(struct flow *flow, uint64_t word, uint64_t after, uint32_t how)
{
    if (!replace(flow, word, after))
        return 0;
    struct counters *c = &shared.counters[server_of(word)];
    if (how == COMPLETED)
        ADD(c->completed, 1);
    else if (how == REJECTED)
        ADD(c->rejected, 1);
    else
        ADD(c->failed, 1);
    ADD(shared.open_flows[server_of(word)], -1);
    if (state_of(word) == SYN)
        ADD(shared.totals.syn_open, -1);
    return 1;
}

static __always_inline int is_open(uint64_t word)
{
    return state_of(word) == SYN || state_of(word) == ESTABLISHED;
}

/* Ended by a packet: its FCT is known. */
static __noinline int finish(struct flow *flow, uint64_t word, uint32_t how)
{
    if (!flow)
        return 0;
    if (!end_flow(flow, word, (word & ~0xFFull) | CLOSED, how))
        return 0;
    uint64_t now = bpf_ktime_get_ns(), fct = now - flow->started;
    uint32_t server = server_of(word);
    if (how != COMPLETED && state_of(word) == SYN)
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
        .word = word_of(SYN, row, p->isn), .started = now, .last = bpf_ktime_get_coarse_ns(), .ifindex = p->ifindex,
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
    if (state == DEAD || word >> 32 == p->isn)
        return server; /* sent again */
    int row = server;
    if (state == ESTABLISHED) {
        /* Either the end of the old flow was not seen, or a third party forged the SYN. The server knows. */
        ADD(shared.totals.reused, 1);
    } else {
        if (state == CLOSED && READ(shared.totals.syn_open) >= shared.settings.syn_flows) {
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
    uint64_t after = word_of(SYN, row, p->isn);
    if (state == CLOSED ? !replace(flow, word, after) : !end_flow(flow, word, after, FAILED))
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
    int opens = (flags & (SYN_FLAG | ACK_FLAG | RST_FLAG | FIN_FLAG)) == SYN_FLAG;
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
        if (UNLIKELY(flags & (FIN_FLAG | RST_FLAG))) {
            /* Behind DNAT the end of a server's answer is seen, which a client may await after its own. */
            if (flags & RST_FLAG || shared.settings.mode == DSR)
                finish(flow, word, flags & RST_FLAG ? FAILED : COMPLETED);
            return server;
        }
        if (state_of(word) == SYN && flags & ACK_FLAG && !(flags & SYN_FLAG) &&
            replace(flow, word, (word & ~0xFFull) | ESTABLISHED))
            ADD(shared.totals.syn_open, -1);
        if (drawn(shared.settings.duration_sampling)) {
            uint64_t exact = bpf_ktime_get_ns();
            sample(server, 1, exact - flow->started, exact);
        }
        return server;
    }
    if (opens)
        return begin(p, 0);
    if ((flags & (SYN_FLAG | ACK_FLAG | RST_FLAG | FIN_FLAG)) == ACK_FLAG)
        return begin(p, 1);
    ADD(shared.totals.untracked, 1);
    return stateless(p);
}

/* Checksums: RFC 1624. `sum` is of 16-bit words as they are in memory. */

static __always_inline uint32_t changed(uint32_t sum, uint32_t before, uint32_t after)
{
    sum += (~before & 0xFFFF) + (~before >> 16);
    return sum + (after & 0xFFFF) + (after >> 16);
}

static __always_inline uint32_t changed_address(uint32_t sum, const uint32_t *before, const uint32_t *after, int words)
{
    for (int i = 0; i < words; i++)
        sum = changed(sum, before[i], after[i]);
    return sum;
}

static __always_inline uint16_t checksum(uint16_t check, uint32_t sum)
{
    sum += (uint16_t)~check;
    sum = (sum & 0xFFFF) + (sum >> 16);
    sum = (sum & 0xFFFF) + (sum >> 16);
    return ~sum;
}

static __always_inline uint32_t changed_port(uint32_t sum, uint16_t before, uint16_t after)
{
    return sum + (uint16_t)~before + after;
}

/* Sending */

static __always_inline int send(struct xdp_md *ctx, struct ethhdr *eth, const uint8_t *to, const uint8_t *from,
                                uint32_t ifindex)
{
    __builtin_memcpy(eth->h_dest, to, 6);
    __builtin_memcpy(eth->h_source, from, 6);
    return ifindex == ctx->ingress_ifindex ? XDP_TX : bpf_redirect(ifindex, 0);
}

/* Give a packet other addresses: `address` and `port` are its own, and become `new_address` and `new_port`. */
static __always_inline void translate(void *l3, struct tcphdr *tcp, int is_ipv6, uint32_t *address, uint16_t *port,
                                      const uint32_t *new_address, uint16_t new_port)
{
    int words = is_ipv6 ? 4 : 1;
    uint32_t sum = changed_address(0, address, new_address, words);
    if (!is_ipv6) {
        struct iphdr *ip = l3;
        ip->check = checksum(ip->check, sum);
    }
    tcp->check = checksum(tcp->check, changed_port(sum, *port, new_port));
    for (int i = 0; i < words; i++)
        address[i] = new_address[i];
    *port = new_port;
}

static __always_inline struct server *reachable(int row, uint32_t bank)
{
    struct server *server = &shared.servers[bank & 1][row & (MAX_SERVERS - 1)];
    if (row < 0)
        return NULL;
    if (LIKELY(server->ifindex))
        return server;
    ADD(shared.totals.unreachable, 1);
    return NULL;
}

static __always_inline int is_vip(const struct flow_key *key)
{
    uint32_t *index = bpf_map_lookup_elem(&vips, key);
    return index != NULL;
}

/* DNAT: a packet from a server; its source becomes the VIP. */
static __always_inline int reply(struct xdp_md *ctx, struct ethhdr *eth, void *l3, struct tcphdr *tcp, int is_ipv6,
                                 uint32_t *source, uint32_t *client, uint8_t flags)
{
    int words = is_ipv6 ? 4 : 1;
    struct flow_key key = {.port = tcp->source};
    for (int i = 0; i < words; i++)
        key.client[i] = source[i];
    uint32_t *row = bpf_map_lookup_elem(&backends, &key);
    if (!row)
        return XDP_PASS;
    for (int i = 0; i < words; i++)
        key.client[i] = client[i];
    key.port = tcp->dest;
    key.vip = *row;
    uint32_t *index = bpf_map_lookup_elem(&replies, &key);
    if (!index)
        return XDP_PASS;
    key.vip = *index;
    struct flow *flow = bpf_map_lookup_elem(&flows, &key);
    if (!flow)
        return XDP_PASS;
    uint64_t word = READ(flow->word);
    uint64_t now = bpf_ktime_get_coarse_ns();
    if (flow->last != now)
        READ(flow->last) = now;
    if (UNLIKELY(flags & (FIN_FLAG | RST_FLAG)) && is_open(word) && server_of(word) == *row)
        finish(flow, word, flags & FIN_FLAG ? COMPLETED : state_of(word) == SYN ? REJECTED : FAILED);
    struct vip *vip = &shared.vip_table[*index & (MAX_VIPS - 1)];
    translate(l3, tcp, is_ipv6, source, &tcp->source, vip->address, vip->port);
    return send(ctx, eth, flow->client_mac, flow->own_mac, flow->ifindex);
}

static __always_inline void note(struct packet *p, struct xdp_md *ctx, struct ethhdr *eth)
{
    p->ifindex = ctx->ingress_ifindex;
    __builtin_memcpy(p->client_mac, eth->h_source, 6);
    __builtin_memcpy(p->own_mac, eth->h_dest, 6);
    p->bank = READ(shared.settings.bank) & 1;
}

static __always_inline int tcp_packet(struct xdp_md *ctx, struct ethhdr *eth, void *l3, struct tcphdr *tcp, int is_ipv6,
                                      uint32_t *source, uint32_t *destination)
{
    int words = is_ipv6 ? 4 : 1;
    uint8_t flags = ((uint8_t *)tcp)[13];
    struct packet p = {};
    for (int i = 0; i < words; i++)
        p.key.client[i] = destination[i];
    p.key.port = tcp->dest;
    uint32_t *index = bpf_map_lookup_elem(&vips, &p.key);
    if (!index)
        return shared.settings.mode == DNAT ? reply(ctx, eth, l3, tcp, is_ipv6, source, destination, flags) : XDP_PASS;
    struct vip *vip = &shared.vip_table[*index & (MAX_VIPS - 1)];
    for (int i = 0; i < words; i++)
        p.key.client[i] = source[i];
    p.key.port = tcp->source;
    p.key.vip = *index;
    p.isn = tcp->seq;
    p.service = vip->hash;
    note(&p, ctx, eth);
    struct server *server = reachable(server_of_packet(&p, flags), p.bank);
    if (!server)
        return XDP_DROP;
    if (shared.settings.mode == DNAT)
        translate(l3, tcp, is_ipv6, destination, &tcp->dest, server->address, server->port);
    return send(ctx, eth, server->mac, server->own_mac, server->ifindex);
}

/* An ICMP error about a packet that a server sent from a VIP: `inner` is the first part of that packet. */
static __always_inline int icmp_error(struct xdp_md *ctx, struct ethhdr *eth, uint16_t *outer_check,
                                      uint32_t *destination, uint16_t *icmp_check, uint32_t *inner_source,
                                      uint32_t *inner_destination, uint16_t *inner_check, uint16_t *ports, int is_ipv6)
{
    int words = is_ipv6 ? 4 : 1;
    struct packet p = {};
    for (int i = 0; i < words; i++)
        p.key.client[i] = inner_source[i];
    p.key.port = ports[0];
    uint32_t *index = bpf_map_lookup_elem(&vips, &p.key);
    if (!index)
        return XDP_PASS;
    struct vip *vip = &shared.vip_table[*index & (MAX_VIPS - 1)];
    for (int i = 0; i < words; i++)
        p.key.client[i] = inner_destination[i];
    p.key.port = ports[1];
    p.key.vip = *index;
    uint32_t bank = READ(shared.settings.bank) & 1;
    struct flow *flow = bpf_map_lookup_elem(&flows, &p.key);
    int row = flow ? (int)server_of(READ(flow->word))
                   : fallback(lbgym_dispatch_hash(lbgym_flow_hash(vip->hash, p.key.client, p.key.port)), bank);
    struct server *server = reachable(row, bank);
    if (!server)
        return XDP_DROP;
    ADD(shared.totals.icmp, 1);
    if (shared.settings.mode == DNAT) {
        uint32_t sum = changed_address(0, destination, server->address, words);
        if (!is_ipv6)
            *outer_check = checksum(*outer_check, sum);
        /* ICMPv6 has a pseudo header with the outer address. */
        uint32_t icmp_sum = is_ipv6 ? sum : 0;
        uint32_t inner = changed_address(0, inner_source, server->address, words);
        if (!is_ipv6) {
            uint16_t before = *inner_check;
            *inner_check = checksum(before, inner);
            icmp_sum = changed_port(icmp_sum, before, *inner_check);
        }
        icmp_sum = changed_address(icmp_sum, inner_source, server->address, words);
        icmp_sum = changed_port(icmp_sum, ports[0], server->port);
        *icmp_check = checksum(*icmp_check, icmp_sum);
        for (int i = 0; i < words; i++) {
            destination[i] = server->address[i];
            inner_source[i] = server->address[i];
        }
        ports[0] = server->port;
    }
    return send(ctx, eth, server->mac, server->own_mac, server->ifindex);
}

static __always_inline int passed(const struct flow_key *key, uint64_t *counter)
{
    if (is_vip(key))
        ADD(*counter, 1);
    return XDP_PASS;
}

static __always_inline int ipv4(struct xdp_md *ctx, struct ethhdr *eth, void *end)
{
    struct iphdr *ip = (void *)(eth + 1);
    if (BEYOND(ip, end))
        return XDP_PASS;
    struct flow_key address = {.client = {ip->daddr}};
    if (UNLIKELY(ip->frag_off & bpf_htons(0x3FFF)))
        return passed(&address, &shared.totals.fragments);
    if (UNLIKELY(ip->ihl != 5))
        return passed(&address, &shared.totals.options);
    if (LIKELY(ip->protocol == IPPROTO_TCP)) {
        struct tcphdr *tcp = (void *)(ip + 1);
        if (BEYOND(tcp, end))
            return passed(&address, &shared.totals.malformed);
        return tcp_packet(ctx, eth, ip, tcp, 0, &ip->saddr, &ip->daddr);
    }
    if (ip->protocol != IPPROTO_ICMP)
        return XDP_PASS;
    struct {
        struct icmp icmp;
        struct iphdr ip;
        uint16_t ports[2];
        uint32_t seq;
    } *error = (void *)(ip + 1);
    if (BEYOND(error, end))
        return XDP_PASS;
    uint8_t type = error->icmp.type;
    if (type != ICMP_DEST_UNREACH && type != ICMP_TIME_EXCEEDED && type != ICMP_PARAMETERPROB)
        return XDP_PASS;
    if (error->ip.protocol != IPPROTO_TCP || error->ip.ihl != 5 || !is_vip(&address))
        return XDP_PASS;
    return icmp_error(ctx, eth, &ip->check, &ip->daddr, &error->icmp.check, &error->ip.saddr, &error->ip.daddr,
                      &error->ip.check, error->ports, 0);
}

static __always_inline int ipv6(struct xdp_md *ctx, struct ethhdr *eth, void *end)
{
    struct ipv6hdr *ip = (void *)(eth + 1);
    if (BEYOND(ip, end))
        return XDP_PASS;
    uint32_t *source = ip->saddr.in6_u.u6_addr32, *destination = ip->daddr.in6_u.u6_addr32;
    struct flow_key address = {};
    for (int i = 0; i < 4; i++)
        address.client[i] = destination[i];
    if (LIKELY(ip->nexthdr == IPPROTO_TCP)) {
        struct tcphdr *tcp = (void *)(ip + 1);
        if (BEYOND(tcp, end))
            return passed(&address, &shared.totals.malformed);
        return tcp_packet(ctx, eth, ip, tcp, 1, source, destination);
    }
    switch (ip->nexthdr) {
    case IPPROTO_FRAGMENT:
        return passed(&address, &shared.totals.fragments);
    case IPPROTO_HOPOPTS:
    case IPPROTO_ROUTING:
    case IPPROTO_DSTOPTS:
        return passed(&address, &shared.totals.options);
    case IPPROTO_ICMPV6:
        break;
    default:
        return XDP_PASS;
    }
    struct {
        struct icmp icmp;
        struct ipv6hdr ip;
        uint16_t ports[2];
        uint32_t seq;
    } *error = (void *)(ip + 1);
    if (BEYOND(error, end) || error->icmp.type < ICMPV6_DEST_UNREACH ||
        error->icmp.type > ICMPV6_PARAMPROB || error->ip.nexthdr != IPPROTO_TCP || !is_vip(&address))
        return XDP_PASS;
    return icmp_error(ctx, eth, NULL, destination, &error->icmp.check, error->ip.saddr.in6_u.u6_addr32,
                      error->ip.daddr.in6_u.u6_addr32, NULL, error->ports, 1);
}

SEC("xdp")
int balancer(struct xdp_md *ctx)
{
    void *end = (void *)(long)ctx->data_end;
    struct ethhdr *eth = (void *)(long)ctx->data;
    if (BEYOND(eth, end))
        return XDP_PASS;
    if (eth->h_proto == bpf_htons(ETH_P_IP))
        return ipv4(ctx, eth, end);
    if (eth->h_proto == bpf_htons(ETH_P_IPV6))
        return ipv6(ctx, eth, end);
    return XDP_PASS;
}

struct bpf_map;

/* Collection of flows that nobody ended, by the driver, in process context */

static long collect_flow(struct bpf_map *map, struct flow_key *key, struct flow *flow, struct collection *c)
{
    uint64_t word = READ(flow->word), last = READ(flow->last);
    int64_t idle = (int64_t)(c->now - last);
    uint32_t state = state_of(word);
    uint64_t limit = state == SYN ? c->syn_timeout : state == ESTABLISHED ? c->idle_timeout : c->close_timeout;
    if (idle < 0 || idle < (int64_t)limit)
        return 0;
    uint64_t dead = (word & ~0xFFull) | DEAD;
    if (state == DEAD)
        return 0;
    if (state == CLOSED ? !replace(flow, word, dead) : !end_flow(flow, word, dead, FAILED))
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

/* For the far end of a veth pair, which forwards frames of XDP_TX only if it has a program itself. */
SEC("xdp")
int pass(struct xdp_md *ctx)
{
    return XDP_PASS;
}

#ifdef BENCHMARK
/* What every balancer must do at least, for comparison: parse, find the VIP, write the MAC addresses, send. */
SEC("xdp")
int bounce(struct xdp_md *ctx)
{
    void *end = (void *)(long)ctx->data_end;
    struct ethhdr *eth = (void *)(long)ctx->data;
    struct iphdr *ip = (void *)(eth + 1);
    struct tcphdr *tcp = (void *)(ip + 1);
    if (BEYOND(tcp, end) || eth->h_proto != bpf_htons(ETH_P_IP) || ip->ihl != 5 || ip->protocol != IPPROTO_TCP)
        return XDP_PASS;
    struct flow_key key = {.client = {ip->daddr}, .port = tcp->dest};
    if (!is_vip(&key))
        return XDP_PASS;
    return send(ctx, eth, shared.servers[0][0].mac, shared.servers[0][0].own_mac, ctx->ingress_ifindex);
}

/* Every packet is of another client, so that every one begins a flow. */
SEC("xdp")
int fresh(struct xdp_md *ctx)
{
    static uint32_t client = 1 << 24;
    void *end = (void *)(long)ctx->data_end;
    struct ethhdr *eth = (void *)(long)ctx->data;
    struct iphdr *ip = (void *)(eth + 1);
    if (BEYOND(ip, end))
        return XDP_PASS;
    ip->saddr = bpf_htonl(client++);
    return ipv4(ctx, eth, end);
}
#endif

char _license[] SEC("license") = "Apache-2.0";
