/* SPDX-License-Identifier: Apache-2.0 */
/* The loop of a driver in C11 or C++17: publications on a grid, heartbeat, the agent's weights and their lease, the end.
 *
 * A program with a loop of its own to give away:
 *
 *     lbgym_driver driver;
 *     lbgym_shm_options options = lbgym_shm_default_options(num_servers);
 *     if (lbgym_driver_create(&driver, "marllb_lb0", &options) < 0) { ... driver.region.message ... }
 *     lbgym_driver_catch_signals();
 *     const lbgym_driver_calls calls = {read_servers, apply_weights, NULL, my_state};
 *     code = lbgym_driver_run(&driver, &calls, LBGYM_DRIVER_FOREVER);
 *     lbgym_driver_close(&driver, &calls);
 *
 * A program that has a loop already, such as a plugin in a packet path, never blocks here. When lbgym_driver_left says
 * that there is something to do, and whenever it likes:
 *
 *     lbgym_driver_poll(&driver);                   1: region.observation.weights have changed, dispatch by them
 *     if (lbgym_driver_due(&driver, &instant)) {
 *         ... lbgym_shm_set_stats, lbgym_shm_set_counters, ...
 *         lbgym_driver_publish(&driver, instant);
 *     }
 *
 * The clock of the data plane begins at 0 with lbgym_driver_create and shows ns; it runs `clock_rate` times as fast as
 * CLOCK_MONOTONIC. Publications are due at whole multiples of the interval. One that is a whole interval late is left
 * out and counted, because real time does not wait. Functions return a negative lbgym_shm_code on failure and leave a
 * sentence in region.message. A driver is used by one thread.
 */
#ifndef LBGYM_DRIVER_H
#define LBGYM_DRIVER_H

#include "lbgym_shm.h"
/* First lbgym_shm.h, which must come before other headers. */
#include <signal.h>

#ifdef __cplusplus
extern "C" {
#endif

#define LBGYM_DRIVER_FOREVER UINT64_MAX
/* Longest time without a heartbeat, ns. */
#define LBGYM_DRIVER_HEARTBEAT (LBGYM_SHM_SECOND / 10)

typedef struct lbgym_driver {
    lbgym_shm_region region;
    uint64_t start;       /* ns of CLOCK_MONOTONIC when the data plane's clock showed 0 */
    uint64_t interval;    /* ns on the data plane's clock */
    double rate;          /* of that clock */
    uint64_t next;        /* when the next publication is due, ns on the data plane's clock */
    uint64_t left_out;    /* publications that were a whole interval late, and so were left out */
    uint64_t last_beat;   /* ns of CLOCK_MONOTONIC */
    volatile bool *stop;  /* set to end lbgym_driver_run; NULL: only signals do */
} lbgym_driver;

/* What a data plane does for lbgym_driver_run. Times are ns on the data plane's clock. */
typedef struct lbgym_driver_calls {
    /* Sets what is published as of `now`: lbgym_shm_set_stats and the others. Negative: the driver ends with that code. */
    int (*read)(lbgym_shm_region *region, uint64_t now, void *context);
    /* region->observation.weights are to be in force from now on, and lbgym_shm_index_in_force where the region was made
     * with takes_index; NULL: the packet path reads them there. */
    int (*apply)(lbgym_shm_region *region, uint64_t now, void *context);
    /* Does what is due up to `now` and returns when it wants to be called again; NULL: nothing. */
    uint64_t (*work)(lbgym_shm_region *region, uint64_t now, void *context);
    void *context;
} lbgym_driver_calls;

static volatile sig_atomic_t lbgym_driver_signal;

static inline void lbgym_driver_on_signal(int number)
{
    lbgym_driver_signal = number;
}

/* SIGTERM, SIGINT and SIGHUP end lbgym_driver_run from now on. A SIGHUP that is ignored, as by nohup, stays so. */
static inline void lbgym_driver_catch_signals(void)
{
    const int numbers[] = {SIGTERM, SIGINT, SIGHUP};
    struct sigaction action, before;
    memset(&action, 0, sizeof action);
    action.sa_handler = lbgym_driver_on_signal;
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) {
        if (numbers[i] == SIGHUP && sigaction(SIGHUP, NULL, &before) == 0 && before.sa_handler == SIG_IGN) {
            continue;
        }
        (void)sigaction(numbers[i], &action, NULL);
    }
}

/* Creates the region; arguments and result as of lbgym_shm_create. The first publication is due at once. */
static inline int lbgym_driver_create(lbgym_driver *driver, const char *name, const lbgym_shm_options *options)
{
    const int code = lbgym_shm_create(&driver->region, name, options);
    driver->start = lbgym_shm_now();
    driver->last_beat = driver->start;
    driver->interval = options->publish_interval_ns;
    driver->rate = options->clock_rate;
    driver->next = 0;
    driver->left_out = 0;
    driver->stop = NULL;
    return code;
}

/* ns that the data plane's clock shows. */
static inline uint64_t lbgym_driver_now(const lbgym_driver *driver)
{
    const uint64_t passed = lbgym_shm_now() - driver->start;
    return driver->rate == 1.0 ? passed : (uint64_t)((double)passed * driver->rate);
}

/* ns of real time until the data plane's clock shows `instant`; 0 if it has. */
static inline uint64_t lbgym_driver_until(const lbgym_driver *driver, uint64_t instant)
{
    const uint64_t now = lbgym_driver_now(driver);
    if (instant == LBGYM_DRIVER_FOREVER) {
        return LBGYM_DRIVER_FOREVER;
    }
    if (instant <= now) {
        return 0;
    }
    return driver->rate == 1.0 ? instant - now : (uint64_t)((double)(instant - now) / driver->rate) + 1;
}

/* ns of real time until there is something to do: a publication, a heartbeat, or the end of a lease. */
static inline uint64_t lbgym_driver_left(const lbgym_driver *driver)
{
    const uint64_t publication = lbgym_driver_until(driver, driver->next);
    const uint64_t lease = lbgym_shm_lease_left(&driver->region);
    const uint64_t quiet = lbgym_shm_now() - driver->last_beat;
    const uint64_t beat = quiet < LBGYM_DRIVER_HEARTBEAT ? LBGYM_DRIVER_HEARTBEAT - quiet : 0;
    const uint64_t least = publication < lease ? publication : lease;
    return least < beat ? least : beat;
}

/* Takes up a new action or the end of a lease, and gives a sign of life. 1 if the weights may have changed, else 0. */
static inline int lbgym_driver_poll(lbgym_driver *driver)
{
    const uint64_t now = lbgym_shm_now();
    if (now - driver->last_beat >= LBGYM_DRIVER_HEARTBEAT) {
        driver->last_beat = now;
        (void)lbgym_shm_heartbeat(&driver->region);
    }
    return lbgym_shm_poll_action(&driver->region);
}

/* Whether a publication is due, and as of which instant on the data plane's clock. Those before it are left out. */
static inline bool lbgym_driver_due(lbgym_driver *driver, uint64_t *instant)
{
    const uint64_t now = lbgym_driver_now(driver);
    uint64_t passed;
    if (now < driver->next) {
        return false;
    }
    passed = (now - driver->next) / driver->interval;
    driver->left_out += passed;
    *instant = driver->next + passed * driver->interval;
    driver->next = *instant + driver->interval;
    return true;
}

/* Publishes what was set, as lbgym_shm_publish does. */
static inline int lbgym_driver_publish(lbgym_driver *driver, uint64_t instant)
{
    driver->last_beat = lbgym_shm_now();
    return lbgym_shm_publish(&driver->region, instant);
}

static inline bool lbgym_driver_stopped(const lbgym_driver *driver)
{
    return lbgym_driver_signal != 0 || (driver->stop != NULL && *driver->stop);
}

/* Runs until a signal (lbgym_driver_catch_signals), `*driver->stop`, or the data plane's clock shows `duration`: 0. Or
 * until a call fails: its negative code. */
static inline int lbgym_driver_run(lbgym_driver *driver, const lbgym_driver_calls *calls, uint64_t duration)
{
    lbgym_shm_region *const region = &driver->region;
    int code = calls->apply != NULL ? calls->apply(region, 0, calls->context) : 0;
    while (code >= 0 && !lbgym_driver_stopped(driver)) {
        uint64_t instant, next = LBGYM_DRIVER_FOREVER, left, work;
        if (lbgym_driver_due(driver, &instant)) {
            if (instant > duration) {
                break;
            }
            if (calls->work != NULL) {
                (void)calls->work(region, instant, calls->context);
            }
            code = lbgym_driver_poll(driver);
            if (code > 0 && calls->apply != NULL) {
                code = calls->apply(region, instant, calls->context);
            }
            if (code >= 0) {
                code = calls->read(region, instant, calls->context);
            }
            if (code >= 0) {
                code = lbgym_driver_publish(driver, instant);
            }
            continue;
        }
        if (calls->work != NULL) {
            next = calls->work(region, lbgym_driver_now(driver), calls->context);
        }
        left = lbgym_driver_left(driver);
        work = lbgym_driver_until(driver, next);
        /* Woken by the agent, by the clock, or by a signal. */
        (void)lbgym_shm_wait_action(region, work < left ? work : left);
        code = lbgym_driver_poll(driver);
        if (code > 0 && calls->apply != NULL) {
            code = calls->apply(region, lbgym_driver_now(driver), calls->context);
        }
    }
    return code < 0 ? code : LBGYM_SHM_OK;
}

/* Removes and closes the region. Before, a data plane that outlives its driver is given the safe weights by `calls`, if
 * they are not in force; NULL: there is nothing to give. */
static inline void lbgym_driver_close(lbgym_driver *driver, const lbgym_driver_calls *calls)
{
    lbgym_shm_region *const region = &driver->region;
    if (calls != NULL && calls->apply != NULL && region->header != NULL && !region->safe) {
        region->safe = true;
        memcpy(region->observation.weights, region->observation.safe_weights,
               region->observation.frame->num_servers * sizeof *region->observation.weights);
        (void)calls->apply(region, lbgym_driver_now(driver), calls->context);
    }
    if (region->header != NULL) {
        (void)lbgym_shm_unlink(region);
    }
    lbgym_shm_close(region);
}

#ifdef __cplusplus
}
#endif

#endif
