/* SPDX-License-Identifier: Apache-2.0 */
/* A balanced service whole: a core for one VIP, its region in shared memory, and servers that come, drain and go.
 *
 * For embedders that are configured by commands, such as the VPP plugin:
 *
 *     lbgym_service_options options = lbgym_service_default_options();
 *     ... options.vip, options.rule, options.core.mode ...
 *     code = lbgym_service_create(&service, "edge", &options, message, sizeof message);
 *     row = lbgym_service_add(service, &server);
 *     lbgym_service_reach(service, row, true);             when the embedder knows the way there
 *     for (;;) {
 *         wait at most lbgym_service_left(service) ns;
 *         lbgym_service_work(service);                     observations, the agent's weights, the end of its lease
 *     }
 *
 * Workers use the core (lbgym_service_core) as lbgym_core.h says; `via` of a packet is the server's row. All functions
 * are for the thread that controls the core. Those that fail return a negative lbgym_service_code, have changed nothing,
 * and leave a sentence in lbgym_service_message.
 */
#ifndef LBGYM_SERVICE_H
#define LBGYM_SERVICE_H

#include "lbgym_core.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Bytes of a name, with the zero at its end. */
#define LBGYM_SERVICE_NAME 64
#define LBGYM_SERVICE_MESSAGE 320

typedef struct lbgym_service lbgym_service;

typedef enum lbgym_service_code {
    LBGYM_SERVICE_VALUE = -1,   /* out of its range */
    LBGYM_SERVICE_UNKNOWN = -2, /* there is no such server */
    LBGYM_SERVICE_EXISTS = -3,  /* the server, its address, or the region is there already */
    LBGYM_SERVICE_FULL = -4,    /* no row is free, or no memory */
    LBGYM_SERVICE_SYSTEM = -5   /* shared memory cannot be used */
} lbgym_service_code;

typedef struct lbgym_service_options {
    lbgym_core_options core;
    lbgym_vip vip;
    lbgym_rule rule;
    uint32_t balancers;       /* of sed_scaled */
    uint32_t permissions;     /* of the region */
    uint64_t publish_interval; /* ns */
    const char *driver;       /* kind of data plane, for people */
} lbgym_service_options;

/** Those of the core; SED, 200 ms, only the process's user may open the region. */
lbgym_service_options lbgym_service_default_options(void);

/** 0, and the service; or a negative code, and a sentence in `message`. Its name is the region's. */
int lbgym_service_create(lbgym_service **service, const char *name, const lbgym_service_options *options, char *message,
                         size_t size);
/** No worker may be in a burst. Removes the region. */
void lbgym_service_destroy(lbgym_service *service);
lbgym_core *lbgym_service_core(const lbgym_service *service);
const char *lbgym_service_name(const lbgym_service *service);
const lbgym_service_options *lbgym_service_configured(const lbgym_service *service);
const char *lbgym_service_message(const lbgym_service *service);

typedef struct lbgym_service_server {
    char name[LBGYM_SERVICE_NAME];
    uint32_t address[4];
    uint16_t port; /* with NAT */
    uint8_t is_ipv6;
    uint8_t known;     /* 0: nobody has this row */
    uint8_t drained;   /* takes no new flows */
    uint8_t removed;   /* leaves with its last flow */
    uint8_t reachable; /* the embedder knows the way there */
    uint8_t unused;
    double weight; /* configured: in force without an agent */
    double cores;
} lbgym_service_server;

/** A new server, or one that is being removed and comes back: name, address, port, weight, cores. Its row. */
int lbgym_service_add(lbgym_service *service, const lbgym_service_server *server);
/** The row of a server by its name. */
int lbgym_service_find(lbgym_service *service, const char *name);
/** Weights that would all be 0 count as 1. */
int lbgym_service_set_weight(lbgym_service *service, uint32_t row, double weight);
int lbgym_service_drain(lbgym_service *service, uint32_t row, bool drained);
/** Sends it no new flows; it leaves, and its row is free, when the last entry of its flows is forgotten. */
int lbgym_service_remove(lbgym_service *service, uint32_t row);
int lbgym_service_reach(lbgym_service *service, uint32_t row, bool reachable);

/** ns until lbgym_service_work has something to do, unless the agent writes. */
uint64_t lbgym_service_left(const lbgym_service *service);
/** Does what is due, without blocking. 1: an observation was published, rows of servers that had left are free; 0: none. */
int lbgym_service_work(lbgym_service *service);

/** True while an observation waits for workers, which are to tick. */
bool lbgym_service_waits(const lbgym_service *service);
/** Removes the region before the service; nothing else may follow but lbgym_service_destroy. Workers may be at work. */
void lbgym_service_retire(lbgym_service *service);

/** Rows so far; never fewer later. */
uint32_t lbgym_service_rows(const lbgym_service *service);

/** As of the last publication. */
typedef struct lbgym_service_status {
    double weight; /* in force */
    lbgym_core_counters counters;
    float features[LBGYM_SERVER_FEATURES];
} lbgym_service_status;

/** Either may be NULL. False: there is no such row. */
bool lbgym_service_read(const lbgym_service *service, uint32_t row, lbgym_service_server *server,
                        lbgym_service_status *status);

typedef struct lbgym_service_summary {
    uint64_t published; /* observations */
    uint64_t missed;    /* for which a worker did not answer in time, or that were a whole interval late */
    uint64_t applied;   /* sequence_id of the newest action that was in force */
    uint8_t has_agent;  /* its weights are in force; 0: the configured ones */
    uint8_t unused[7];
    lbgym_core_totals totals;
} lbgym_service_summary;

void lbgym_service_summarize(const lbgym_service *service, lbgym_service_summary *summary);

#ifdef __cplusplus
}
#endif

#endif
