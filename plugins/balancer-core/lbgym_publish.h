/* SPDX-License-Identifier: Apache-2.0 */
/* A core in shared memory: observations once per interval, an agent's weights at once, safe weights when its lease ends.
 *
 * For the thread that controls the core, which has a loop of its own. Nothing here blocks:
 *
 *     lbgym_publisher publisher;
 *     lbgym_shm_options options = lbgym_shm_default_options(n);
 *     if (lbgym_publisher_open(&publisher, core, "edge", LBGYM_SED, 1, servers, names, &options) < 0) {
 *         ... publisher.driver.region.message ...
 *     }
 *     for (;;) {
 *         wait at most lbgym_publisher_left(&publisher) ns;
 *         lbgym_publisher_work(&publisher);
 *     }
 *     lbgym_publisher_close(&publisher);
 *
 * Include it, or compile the file that includes it with _GNU_SOURCE defined: see lbgym_shm.h.
 */
#ifndef LBGYM_PUBLISH_H
#define LBGYM_PUBLISH_H

#include "lbgym_driver.h"
/* First lbgym_driver.h, which must come before other headers. */
#include "lbgym_core.h"

typedef struct lbgym_publisher {
    lbgym_driver driver;
    lbgym_core *core;
    lbgym_rule rule;
    uint32_t balancers;
    uint32_t num_servers;
    lbgym_core_server servers[LBGYM_CORE_MAX_SERVERS];
    double safe[LBGYM_CORE_MAX_SERVERS]; /* scratch: an embedder's stack may be small */
    bool asked;       /* workers are copying what they have counted */
    uint64_t instant; /* of the publication that waits for them */
    uint64_t missed;  /* publications for which no answer came in time */
} lbgym_publisher;

/* Where weights and index parameters in force differ from what the core has, it gets them. */
static inline int lbgym_publisher_install(lbgym_publisher *p)
{
    lbgym_shm_region *const region = &p->driver.region;
    uint32_t given;
    const double *const index = lbgym_shm_index_in_force(region, &given);
    for (uint32_t i = 0; i < p->num_servers; i++) {
        p->servers[i].weight = region->observation.weights[i];
        p->servers[i].background = i < given ? index[2 * (size_t)i + 1] : 0.0;
    }
    if (lbgym_core_install(p->core, p->rule, p->balancers, p->servers, p->num_servers) < 0) {
        return lbgym_shm_fail(region, LBGYM_SHM_OPTION, "%s", lbgym_core_message(p->core));
    }
    return LBGYM_SHM_OK;
}

/** Servers, and their names (NULL: none), as they are from now on, rows as they were: `safe_weight` is in force without
 * an agent, `weight` and `background` are the agent's. A negative lbgym_shm_code, and a sentence in
 * driver.region.message. */
static inline int lbgym_publisher_set_servers(lbgym_publisher *p, const lbgym_core_server *servers,
                                              const char *const *names, uint32_t n)
{
    lbgym_shm_region *const region = &p->driver.region;
    int code = n <= LBGYM_CORE_MAX_SERVERS ? lbgym_shm_set_num_servers(region, n) : (int)LBGYM_SHM_OPTION;
    for (uint32_t i = 0; i < n && code >= 0; i++) {
        const enum lbgym_shm_state state = servers[i].active      ? LBGYM_SHM_UP
                                           : servers[i].reachable ? LBGYM_SHM_DRAINING
                                                                  : LBGYM_SHM_DOWN;
        p->servers[i] = servers[i];
        p->safe[i] = servers[i].safe_weight;
        code = lbgym_shm_set_active(region, i, servers[i].active);
        if (code >= 0) {
            code = lbgym_shm_set_server_state(region, i, state);
        }
        if (code >= 0 && names != NULL) {
            code = lbgym_shm_set_server_name(region, i, names[i]);
        }
    }
    if (code >= 0) {
        code = lbgym_shm_set_safe_weights(region, p->safe, n);
    }
    if (code >= 0) {
        p->num_servers = n;
        code = lbgym_publisher_install(p);
    }
    return code;
}

/** Creates the region, arguments and result as of lbgym_shm_create, and puts the safe weights in force. Rules that count
 * flows take background loads where options->takes_index says so. */
static inline int lbgym_publisher_open(lbgym_publisher *p, lbgym_core *core, const char *name, lbgym_rule rule,
                                       uint32_t balancers, const lbgym_core_server *servers, const char *const *names,
                                       const lbgym_shm_options *options)
{
    int code;
    p->core = core;
    p->rule = rule;
    p->balancers = balancers;
    p->asked = false;
    p->missed = 0;
    code = lbgym_driver_create(&p->driver, name, options);
    if (code >= 0) {
        code = lbgym_publisher_set_servers(p, servers, names, options->num_servers);
    }
    return code;
}

/** ns until there is something to do, unless an agent writes (lbgym_shm_wait_action). */
static inline uint64_t lbgym_publisher_left(const lbgym_publisher *p)
{
    const uint64_t left = lbgym_driver_left(&p->driver);
    /* Workers answer within a burst or so. */
    return p->asked && left > LBGYM_SHM_SECOND / 5000 ? LBGYM_SHM_SECOND / 5000 : left;
}

static inline int lbgym_publisher_publish(lbgym_publisher *p)
{
    lbgym_shm_region *const region = &p->driver.region;
    lbgym_core_totals totals;
    uint64_t fct_count = 0, fct_sum = 0;
    lbgym_core_read_totals(p->core, &totals);
    for (uint32_t i = 0; i < p->num_servers; i++) {
        lbgym_core_counters c;
        float stats[LBGYM_SERVER_FEATURES];
        int code;
        lbgym_core_read(p->core, i, &c, stats);
        if (!p->servers[i].active) {
            memset(stats, 0, sizeof stats);
        }
        fct_count += c.fct_count;
        fct_sum += c.fct_sum;
        code = lbgym_shm_set_stats(region, i, stats);
        if (code >= 0) {
            code = lbgym_shm_set_counters(region, i, c.started, c.completed, c.rejected, c.failed);
        }
        if (code < 0) {
            return code;
        }
    }
    (void)lbgym_shm_set_totals(region, totals.unrouted, fct_count, fct_sum);
    return lbgym_driver_publish(&p->driver, p->instant);
}

/** Does what is due. 1: an observation was published, 0: none; or a negative lbgym_shm_code. */
static inline int lbgym_publisher_work(lbgym_publisher *p)
{
    uint64_t instant;
    int code = lbgym_driver_poll(&p->driver);
    if (code > 0) {
        code = lbgym_publisher_install(p);
    }
    if (code < 0) {
        return code;
    }
    if (lbgym_driver_due(&p->driver, &instant)) {
        p->missed += p->asked;
        p->instant = instant;
        p->asked = true;
        lbgym_core_ask(p->core);
    }
    if (!p->asked || !lbgym_core_answered(p->core)) {
        return 0;
    }
    p->asked = false;
    code = lbgym_publisher_publish(p);
    return code < 0 ? code : 1;
}

/** Has the core go on by the safe weights, and removes and closes the region. */
static inline void lbgym_publisher_close(lbgym_publisher *p)
{
    lbgym_shm_region *const region = &p->driver.region;
    if (region->header != NULL && !region->safe) {
        for (uint32_t i = 0; i < p->num_servers; i++) {
            region->observation.weights[i] = p->servers[i].safe_weight;
            p->servers[i].background = 0.0;
        }
        region->safe = true;
        (void)lbgym_publisher_install(p);
    }
    lbgym_driver_close(&p->driver, NULL);
}

#endif
