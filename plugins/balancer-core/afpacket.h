/* SPDX-License-Identifier: Apache-2.0 */
/* A data plane around the core that needs nothing of the kernel but raw sockets: lbgym dataplane afpacket. */
#ifndef LBGYM_AFPACKET_H
#define LBGYM_AFPACKET_H

#include "lbgym_core.h"

typedef struct lbgym_afpacket lbgym_afpacket;

/** Where packets to a server go; `ifindex` 0: not known. By row. */
typedef struct lbgym_hop {
    uint32_t ifindex;
    uint8_t mac[6], own_mac[6];
} lbgym_hop;

typedef struct lbgym_afpacket_totals {
    uint64_t received, sent;
    uint64_t failed;    /* packets that the kernel did not take */
    uint64_t too_large; /* segments to be cut by the device, which cannot cut what is encapsulated */
    uint64_t answered;  /* questions for the link-layer address of a VIP */
    uint64_t unlinked;  /* NAT: packets from more neighbours than there is room for, dropped */
} lbgym_afpacket_totals;

/** A plane for worker 0 of the core, which has its VIPs; NULL with errno. */
lbgym_afpacket *lbgym_afpacket_create(lbgym_core *core, uint32_t mode, const lbgym_vip *vips, uint32_t num_vips);
/** Takes packets from an interface. A negative errno if it cannot. */
int lbgym_afpacket_listen(lbgym_afpacket *plane, uint32_t ifindex, const uint8_t mac[6]);
/** Begins to forward. A negative errno if it cannot. */
int lbgym_afpacket_start(lbgym_afpacket *plane);
/** In force when this returns. */
void lbgym_afpacket_set_hops(lbgym_afpacket *plane, const lbgym_hop *hops, uint32_t n);
/** lbgym_core_ask, and wait for the answer: false if none comes within `timeout` ns. */
bool lbgym_afpacket_collect(lbgym_afpacket *plane, uint64_t timeout);
void lbgym_afpacket_read(const lbgym_afpacket *plane, lbgym_afpacket_totals *totals);
void lbgym_afpacket_destroy(lbgym_afpacket *plane);

#endif
