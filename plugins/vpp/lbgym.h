/* SPDX-License-Identifier: Apache-2.0 */
/* The VPP plugin: what binds services of the balancer core to VPP's graph, FIB and API. */
#ifndef LBGYM_VPP_H
#define LBGYM_VPP_H

#include <vnet/vnet.h>
#include <vnet/adj/adj.h>
#include <vnet/dpo/dpo.h>
#include <vnet/fib/fib_node.h>
#include <vnet/fib/fib_source.h>
#include <vnet/fib/fib_types.h>
#include <vnet/ip/ip.h>
#include <vnet/ip/ip_types.h>

#include "lbgym_service.h"

/* Counts of a server in the stats segment. */
#define foreach_lbgym_gauge                                                                                            \
    _(open)                                                                                                            \
    _(started)                                                                                                         \
    _(completed)                                                                                                       \
    _(rejected)                                                                                                        \
    _(failed)

enum {
#define _(name) LBGYM_GAUGE_##name,
    foreach_lbgym_gauge
#undef _
        LBGYM_NUM_GAUGES
};

/* Events of a VIP, there and in the API: all fields of lbgym_core_totals. */
#define foreach_lbgym_total                                                                                            \
    _(syn_open)                                                                                                        \
    _(unrouted)                                                                                                        \
    _(syn_limited)                                                                                                     \
    _(table_full)                                                                                                      \
    _(untracked)                                                                                                       \
    _(adopted)                                                                                                         \
    _(after_close)                                                                                                     \
    _(reused)                                                                                                          \
    _(conflicts)                                                                                                       \
    _(icmp)                                                                                                            \
    _(fragments)                                                                                                       \
    _(malformed)                                                                                                       \
    _(unreachable)                                                                                                     \
    _(no_room)                                                                                                         \
    _(bursts)                                                                                                          \
    _(packets)

#define LBGYM_NUM_TOTALS (sizeof(lbgym_core_totals) / sizeof(u64))

/* The way to a server. */
typedef struct {
    fib_node_t fib_node;
    u32 vip, row;
    ip46_address_t address;
    u8 is_ipv6;
    fib_node_index_t fib_entry;
    u32 fib_sibling;
    adj_index_t adjacency; /* with DSR: the neighbour itself, as packets keep the VIP's address */
    u32 adjacency_sibling;
    u32 gauges[LBGYM_NUM_GAUGES];
} lbgym_server_t;

typedef struct {
    lbgym_service *service;
    lbgym_worker **workers; /* by thread */
    dpo_id_t *dpos;         /* by row, as many as there can be */
    u32 *servers;           /* by row, or ~0 */
    u32 address;
    u32 mode;
    u8 is_ipv6;
    u8 failed; /* the last error was logged */
    u32 gauges[LBGYM_NUM_TOTALS];
} lbgym_vip_t;

/* VIPs of one address, which is an entry of the FIB. */
typedef struct {
    fib_prefix_t prefix;
    u32 *vips;
} lbgym_address_t;

typedef struct {
    lbgym_vip_t *vips;           /* pool; it and the next change while workers are stopped */
    lbgym_address_t *addresses;  /* pool */
    u32 *translating;            /* VIPs with NAT, whose servers answer through VPP */
    lbgym_server_t *servers;     /* pool, of the main thread only */
    u8 *interfaces;              /* by sw_if_index: answers come in by it */
    dpo_type_t dpo_type;
    fib_node_type_t fib_node_type;
    fib_source_t fib_source;
    u32 queues[4]; /* to other threads, by node; ~0 until a VIP translates */
    u16 msg_id_base;
    vlib_log_class_t log_class;
} lbgym_main_t;

extern lbgym_main_t lbgym_main;
extern vlib_node_registration_t lbgym4_node, lbgym6_node, lbgym4_return_node, lbgym6_return_node, lbgym_tick_node,
    lbgym_process_node;

/* All return 0 or a VNET_API_ERROR, and a sentence in `message`, of LBGYM_SERVICE_MESSAGE bytes. */
int lbgym_vip_add(const char *name, const lbgym_service_options *options, char *message);
int lbgym_vip_del(const char *name, char *message);
int lbgym_server_add(const char *vip, const lbgym_service_server *server, u32 *row, char *message);
int lbgym_server_del(const char *vip, const char *name, char *message);
/* A weight below 0, and `drained` below 0: as it is. */
int lbgym_server_set(const char *vip, const char *name, const f64 *weight, int drained, char *message);
int lbgym_interface_enable(u32 sw_if_index, int enable, char *message);

lbgym_vip_t *lbgym_vip_find(const char *name);
/* ns; 0, which no option may be, for what is no time. */
u64 lbgym_nanoseconds(f64 seconds);
void lbgym_address_of(ip_address_t *address, const u32 words[4], int is_ipv6);
void lbgym_words_of(u32 words[4], const ip_address_t *address);
/* lbgym_shm_state of a server, and its name. */
u32 lbgym_state_of(const lbgym_service_server *server);

#endif
