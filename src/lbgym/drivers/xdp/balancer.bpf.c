// SPDX-License-Identifier: Apache-2.0
/* An L4 balancer for TCP in XDP: L2 direct server return or DNAT, IPv4 and IPv6.
 *
 * The driver fills the tables; the program knows no dispatch rule and no floating-point number. Every table has two
 * halves, of which `shared.settings.bank` is in force. A flow keeps its server, whatever happens to the tables.
 */
#include "flows.bpf.h"
#include "lbgym_checksum.h"

/* Its types, of both versions, in <linux/icmp.h> need the C library of another architecture. */
struct icmp {
    uint8_t type, code;
    uint16_t check;
    uint32_t unused;
};
enum { ICMP_DEST_UNREACH = 3, ICMP_TIME_EXCEEDED = 11, ICMP_PARAMETERPROB = 12 };
enum { ICMPV6_DEST_UNREACH = 1, ICMPV6_PARAMPROB = 4 };

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
    uint32_t sum = lbgym_sum_address(0, address, new_address, words);
    if (!is_ipv6) {
        struct iphdr *ip = l3;
        ip->check = lbgym_checksum(ip->check, sum);
    }
    tcp->check = lbgym_checksum(tcp->check, lbgym_sum_port(sum, *port, new_port));
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
    enum lbgym_tcp_event event = lbgym_tcp_from_server(state_of(word), flags);
    if (UNLIKELY(event != LBGYM_GOES_ON) && is_open(word) && server_of(word) == *row)
        finish(flow, word, event);
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
        uint32_t sum = lbgym_sum_address(0, destination, server->address, words);
        if (!is_ipv6)
            *outer_check = lbgym_checksum(*outer_check, sum);
        /* ICMPv6 has a pseudo header with the outer address. */
        uint32_t icmp_sum = is_ipv6 ? sum : 0;
        uint32_t inner = lbgym_sum_address(0, inner_source, server->address, words);
        if (!is_ipv6) {
            uint16_t before = *inner_check;
            *inner_check = lbgym_checksum(before, inner);
            icmp_sum = lbgym_sum_port(icmp_sum, before, *inner_check);
        }
        icmp_sum = lbgym_sum_address(icmp_sum, inner_source, server->address, words);
        icmp_sum = lbgym_sum_port(icmp_sum, ports[0], server->port);
        *icmp_check = lbgym_checksum(*icmp_check, icmp_sum);
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

/* Where frames of a benchmark end. */
SEC("xdp")
int sink(struct xdp_md *ctx)
{
    return XDP_DROP;
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
