/* SPDX-License-Identifier: Apache-2.0 */
/* What the balancer in the kernel and its driver share. lbgym.drivers.xdp.layout has the same as NumPy dtypes. */
#ifndef LBGYM_XDP_BALANCER_H
#define LBGYM_XDP_BALANCER_H

#include "lbgym_dispatch.h"
#include "lbgym_tcp.h"

/* Changes with every change of what is here; a driver takes over the pinned maps of its own version only. */
#define VERSION 1

#define MAX_SERVERS 1024 /* a power of two */
#define MAX_VIPS 64      /* a power of two */
#define SLOTS 128        /* of a reservoir; a power of two */
#define NAME_SIZE 64
/* In the table of VIPs, with port 0: the address is a VIP's. */
#define ANY_PORT 0xFFFFFFFF

enum mode { DSR, DNAT };

/* One half of what dispatches flows. */
struct table {
    uint32_t mechanism;     /* enum lbgym_mechanism */
    uint32_t size;          /* entries of the mechanism's table */
    uint32_t rows;          /* servers there are, also those that take no flows */
    uint32_t fallback_size; /* entries of the fallback table, by the configured weights */
};

struct settings {
    uint64_t version;
    uint64_t bank;    /* the half of all tables that is in force, 0 or 1 */
    uint64_t expires; /* ns; without a sign of the driver until then, new flows go by the fallback table */
    uint64_t syn_flows;
    uint32_t mode;
    uint32_t capacity;      /* servers the index table has room for */
    uint32_t lookup_size;   /* entries of one half of the lookup table */
    uint32_t fct_sampling;  /* 2**32 - 1 times the probability to sample */
    uint32_t duration_sampling;
    uint32_t flows; /* entries of the flow table */
    struct table tables[2];
};

struct server {
    uint32_t address[4]; /* as on the wire; IPv4 fills the first word */
    uint16_t port;       /* as on the wire; of DNAT */
    uint8_t mac[6];
    uint8_t own_mac[6]; /* of the interface it is reached by */
    uint16_t unused;
    uint32_t ifindex; /* 0: not reachable */
    uint32_t weight;  /* unused by the program; keeps the size */
    uint64_t unused2[3];
    char name[NAME_SIZE]; /* for a driver that takes over */
};

struct vip {
    uint32_t address[4];
    uint16_t port;
    uint16_t unused;
    uint32_t is_ipv6;
    uint64_t hash; /* of address, port and protocol */
};

/* Of a server, since the program was loaded. started - completed - rejected - failed is what open_flows has. */
struct counters {
    uint64_t started, completed, rejected, failed;
    uint64_t fct_count, fct_sum; /* ns */
    uint64_t unused[2];
};

/* Samples of the FCT or of durations: (time / 2**20 ns + 1) << 32 | value in us. */
struct reservoir {
    uint64_t accepted;
    uint64_t samples[SLOTS];
};

struct totals {
    uint64_t syn_open;       /* flows of which only a SYN was seen, now */
    uint64_t turn;           /* flows placed in turn */
    uint64_t unrouted;       /* flows that found no server */
    uint64_t syn_limited;    /* SYNs that were forwarded without state: too many flows in state SYN */
    uint64_t table_full;     /* SYNs that were forwarded without state: the flow table is full */
    uint64_t untracked;      /* packets without a flow, by the fallback table */
    uint64_t adopted;        /* flows first seen in the middle */
    uint64_t after_close;    /* packets after a flow's end */
    uint64_t reused;         /* SYNs of another flow with the ports of one that had not ended */
    uint64_t conflicts;      /* DNAT: SYNs dropped: from that port the client has a flow to the server by another VIP */
    uint64_t icmp;           /* ICMP errors sent to the server of their flow */
    uint64_t fragments;      /* to a VIP, left to the kernel */
    uint64_t options;        /* to a VIP, with IP options or extension headers, left to the kernel */
    uint64_t malformed;      /* to a VIP, left to the kernel */
    uint64_t unreachable;    /* packets of flows at a server without a link-layer address, dropped */
    uint64_t orphaned;       /* flows placed by the fallback table since no driver was heard of */
};

struct shared {
    struct settings settings;
    uint64_t unused[5];
    struct totals totals;
    /* What dispatch compares, and entries of the flow table, ended flows included. */
    uint64_t open_flows[MAX_SERVERS];
    uint64_t entries[MAX_SERVERS];
    struct counters counters[MAX_SERVERS];
    struct server servers[2][MAX_SERVERS];
    struct lbgym_alias aliases[2][MAX_SERVERS];
    struct vip vip_table[MAX_VIPS];
    struct reservoir reservoirs[MAX_SERVERS][2]; /* of FCTs and of durations */
};

struct flow_key {
    uint32_t client[4];
    uint16_t port; /* of the client, as on the wire */
    uint16_t vip;  /* its index; in the table of replies the server's row */
};

/* `word`: state, 8 bits unused, server (16 bits), initial sequence number (32 bits). All that decides what is counted
 * is in one word, which changes by compare-and-swap only: whoever changes it counts, once. */
struct flow {
    uint64_t word;
    uint64_t started; /* ns */
    uint64_t last;    /* ns, of a coarse clock */
    uint32_t ifindex; /* where the client's packets come in */
    uint8_t client_mac[6];
    uint8_t own_mac[6];
};

struct lookup {
    uint32_t server, fallback;
};

struct collection {
    uint64_t now, syn_timeout, idle_timeout, close_timeout; /* ns */
};

#endif
