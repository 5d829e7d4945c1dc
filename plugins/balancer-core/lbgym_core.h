/* SPDX-License-Identifier: Apache-2.0 */
/* An L4 balancer that any data plane in userspace can embed. C11 and C++17, 64-bit little-endian, nothing but libc; docs/core.md.
 *
 * A core is one service: some VIPs, the servers behind them, a dispatch rule. Its embedder brings packets and the time:
 *
 *     lbgym_core_options options = lbgym_core_default_options();
 *     lbgym_core *core = lbgym_core_create(&options, message, sizeof message);
 *     lbgym_core_set_vips(core, vips, 1);
 *     lbgym_core_install(core, LBGYM_SED, 1, servers, 4);          again whenever weights or servers change
 *
 *     lbgym_worker *worker = lbgym_core_worker(core, 0);           each on a thread of its own
 *     for (;;) {
 *         lbgym_worker_run(worker, packets, n, now);               verdicts, and packets as they are to be sent
 *         lbgym_worker_tick(worker, now, 256);                     timers, and answers to lbgym_core_ask
 *     }
 *
 *     lbgym_core_ask(core);                                        once per interval, on the thread that publishes
 *     if (lbgym_core_answered(core)) { lbgym_core_read(core, row, &counters, features); ... }
 *
 * Three threads of control, and no lock: a worker is used by one thread, which owns its flows and counters. Everything
 * that changes or reads the core (lbgym_core_*) is called by one other thread, or by the same. Flows stay on the worker
 * that their packets come to: a client's packets must always come to the same, and with NAT its server's as well, unless
 * options.owners has workers hand them over.
 *
 * `now` is in ns of any clock that does not go back, the same for all workers. Addresses and ports are in network byte
 * order; IPv4 fills the first word.
 */
#ifndef LBGYM_CORE_H
#define LBGYM_CORE_H

#include "lbgym_features.h"

#ifdef __cplusplus
extern "C" {
#endif

#define LBGYM_CORE_MAX_SERVERS 4096
#define LBGYM_CORE_MAX_VIPS 64
#define LBGYM_CORE_MAX_WORKERS 64
#define LBGYM_CORE_MAX_FLOWS (1u << 26) /* of a worker */
#define LBGYM_CORE_NO_SERVER 0xFFFFu
/* Bytes before a packet that encapsulation may take. */
#define LBGYM_CORE_HEADROOM 44

typedef struct lbgym_core lbgym_core;
typedef struct lbgym_worker lbgym_worker;

/** How packets get to servers. */
typedef enum lbgym_mode {
    LBGYM_DSR = 0,  /* unchanged, by the embedder's link layer; servers answer clients directly */
    LBGYM_GRE = 1,  /* in GRE, RFC 2784; servers answer clients directly */
    LBGYM_IPIP = 2, /* in IPv4 or IPv6, RFC 2003, 2473 and 4213; servers answer clients directly */
    LBGYM_NAT = 3   /* the destination becomes the server's, and the source of its answers the VIP */
} lbgym_mode;

/** Dispatch rules, as lbgym.scenarios.RULES has them. */
typedef enum lbgym_rule {
    LBGYM_ECMP,
    LBGYM_WCMP,
    LBGYM_MAGLEV,
    LBGYM_ROUND_ROBIN,
    LBGYM_LSQ,
    LBGYM_SED,
    LBGYM_SED_SCALED,
    LBGYM_MARGINAL,
    LBGYM_WHITTLE,
    LBGYM_P2C,
    LBGYM_P2C_SED,
    LBGYM_P2C_MARGINAL,
    LBGYM_NUM_RULES
} lbgym_rule;

/** The rule's number, or -1. */
int lbgym_rule_named(const char *name);
/** The rule's name; NULL if there is no such rule. */
const char *lbgym_rule_name(int rule);

typedef struct lbgym_core_options {
    uint32_t workers;         /* 1 to LBGYM_CORE_MAX_WORKERS */
    uint32_t servers;         /* there is room for, 1 to LBGYM_CORE_MAX_SERVERS */
    uint32_t flows;           /* of each worker, 16 to LBGYM_CORE_MAX_FLOWS; about 100 bytes each, 140 with NAT */
    uint32_t syn_flows;       /* most of them of which only one packet was seen; 0: a quarter */
    uint32_t mode;            /* lbgym_mode */
    uint32_t owners;          /* NAT: the last so many workers share the flows by the client's address, and give packets
                               * of each other's back as LBGYM_HANDOVER; 0: a flow is its first packet's worker's */
    uint64_t seed;            /* of samples and of the place of flows in the table; 0: a random one */
    uint64_t syn_timeout;     /* ns without a packet after which a flow is forgotten: one of a single packet */
    uint64_t idle_timeout;    /* one that is open */
    uint64_t udp_timeout;     /* the same of UDP */
    uint64_t close_timeout;   /* one that has ended, whose last packets still go to their server */
    double fct_sampling;      /* probability that an FCT is sampled, 0 to 1 */
    double duration_sampling; /* probability that a flow's age is sampled at one of its packets */
    uint32_t source4;         /* outer addresses of encapsulation: the balancer's own */
    uint32_t source6[4];
    uint32_t reserved2;
} lbgym_core_options;

/** One worker, 64 servers, 262,144 flows, DSR, timeouts of 10, 300, 30 and 10 s, samples of all FCTs and of one packet
 * in 64. */
lbgym_core_options lbgym_core_default_options(void);

/** NULL if an option is out of its range or there is no memory: a sentence is in `message`. */
lbgym_core *lbgym_core_create(const lbgym_core_options *options, char *message, size_t size);
void lbgym_core_destroy(lbgym_core *core);
/** About the last error of a function that returned a negative number. */
const char *lbgym_core_message(const lbgym_core *core);
lbgym_worker *lbgym_core_worker(lbgym_core *core, uint32_t number);

typedef struct lbgym_vip {
    uint32_t address[4];
    uint16_t port;
    uint8_t protocol; /* 6 TCP, 17 UDP */
    uint8_t is_ipv6;
} lbgym_vip;

/** Addresses and ports that clients connect to. More can be added at the end later, none changed or removed, because
 * flows know VIPs by their number. -1: the message says why. */
int lbgym_core_set_vips(lbgym_core *core, const lbgym_vip *vips, uint32_t n);

/** A row of the table of servers. A server keeps its row for as long as it has flows. */
typedef struct lbgym_core_server {
    uint32_t address[4];
    uint16_t port;       /* with NAT */
    uint8_t is_ipv6;
    uint8_t present;     /* 0: nobody has this row */
    uint8_t reachable;   /* 0: packets to it are dropped and counted */
    uint8_t active;      /* takes new flows; 0: drained, or down */
    uint16_t reserved;
    uint32_t via;        /* the embedder's: comes back with packets to the server */
    uint32_t generation; /* another number for another server in the same row: samples begin anew */
    double weight;       /* in force, at least 0 */
    double safe_weight;  /* configured: by these, packets without a flow find their server */
    double cores;        /* at least 1; marginal and whittle look at it */
    double background;   /* flows of others that count as if they were the balancer's own, at least 0 */
} lbgym_core_server;

/** Puts servers and weights in force: new flows see all of it or nothing, flows that there are stay. Waits for bursts
 * under way, for a moment, if the last call was moments ago. `balancers` is m of sed_scaled. -1: nothing has changed,
 * the message says why. */
int lbgym_core_install(lbgym_core *core, lbgym_rule rule, uint32_t balancers, const lbgym_core_server *servers,
                       uint32_t n);

/** What becomes of a packet. */
typedef enum lbgym_verdict {
    LBGYM_PASS = 0,  /* none of the balancer's: the host's, or the next node's */
    LBGYM_SEND = 1,  /* to server `server`, by `via` */
    LBGYM_REPLY = 2, /* NAT: to the client; `link` is that of the packet with which the flow began */
    LBGYM_DROP = 3,
    LBGYM_HANDOVER = 4 /* unchanged, to be run again by worker `via`; only with options.owners */
} lbgym_verdict;

typedef struct lbgym_packet {
    uint8_t *data;     /* the IP header; may move by encapsulation */
    uint32_t length;   /* bytes from there that are in memory: all headers at least */
    uint32_t headroom; /* bytes before it that may be written */
    uint32_t link;     /* the embedder's word, such as the neighbour it came from: kept with a flow that begins */
    uint32_t via;      /* of the server; the embedder's, too */
    uint16_t server;   /* row, or LBGYM_CORE_NO_SERVER */
    uint16_t vip;      /* number of the VIP, where there is one */
    uint8_t verdict;   /* lbgym_verdict */
    uint8_t partial;   /* the L4 checksum is left to the network device, and is that of the pseudo header only */
    uint16_t reserved;
} lbgym_packet;

/** A burst. Packets of a flow keep their order. */
void lbgym_worker_run(lbgym_worker *worker, lbgym_packet *packets, uint32_t n, uint64_t now);

/** Forgets flows whose time is up, looking at no more than `budget` of them, and answers lbgym_core_ask. To be called
 * between bursts, and at least once per interval of publication where no packet comes. Returns how many flows it looked
 * at: `budget` means that there may be more. */
uint32_t lbgym_worker_tick(lbgym_worker *worker, uint64_t now, uint32_t budget);

/** Flows of a server since the core was made: started = completed + rejected + failed + open. */
typedef struct lbgym_core_counters {
    uint64_t started, completed, rejected, failed;
    uint64_t fct_count, fct_sum; /* of flows whose FCT is known; ns */
    uint64_t entries;            /* of the flow table now, flows that have ended included: 0 before a row is given away */
    uint64_t open;
} lbgym_core_counters;

/** Events that are nobody's in particular. */
typedef struct lbgym_core_totals {
    uint64_t syn_open;    /* flows of which only one packet was seen, now */
    uint64_t unrouted;    /* flows that found no server */
    uint64_t syn_limited; /* flows that got no entry: too many of a single packet */
    uint64_t table_full;  /* flows that got no entry: no room */
    uint64_t untracked;   /* packets without a flow, by the fallback table */
    uint64_t adopted;     /* flows first seen in the middle */
    uint64_t after_close; /* packets after a flow's end */
    uint64_t reused;      /* SYNs with the ports of an established flow */
    uint64_t conflicts;   /* NAT: SYNs dropped: from that port the client has a flow to the server by another VIP */
    uint64_t icmp;        /* ICMP errors sent to the server of their flow */
    uint64_t fragments;   /* later fragments to a VIP whose first was not seen: passed */
    uint64_t malformed;   /* to a VIP: passed */
    uint64_t unreachable; /* packets to servers that cannot be reached: dropped */
    uint64_t no_room;     /* packets that encapsulation makes too long, or has no headroom for: dropped */
    uint64_t bursts, packets;
} lbgym_core_totals;

/** Has every worker copy what it has counted at its next tick. */
void lbgym_core_ask(lbgym_core *core);
/** True if all workers have. */
bool lbgym_core_answered(const lbgym_core *core);
/** What workers had counted when they answered last, of a row: sums, and the statistics of all their samples, in
 * lbgym_features.h's order. `features` may be NULL. */
void lbgym_core_read(lbgym_core *core, uint32_t row, lbgym_core_counters *counters,
                     float features[LBGYM_SERVER_FEATURES]);
void lbgym_core_read_totals(lbgym_core *core, lbgym_core_totals *totals);
/** Open flows by row as they are now, which is what dispatch compares. Atomic; to look at. */
const uint64_t *lbgym_core_open_flows(const lbgym_core *core);

#ifdef __cplusplus
}
#endif

#endif
