/* SPDX-License-Identifier: Apache-2.0 */
/* Reservoir features of servers for data planes in C11 or C++17: what lbgym.features computes in Python, sample by
 * sample and statistic by statistic.
 *
 * In the packet path, integers only, without allocation, a few nanoseconds each:
 *
 *     lbgym_server_flow_opened(&server);
 *     lbgym_server_packet(&server, opened_ns, now_ns);
 *     lbgym_server_flow_closed(&server, opened_ns, now_ns);
 *
 * Outside of it, once per control interval (floating point, link with -lm):
 *
 *     lbgym_weighted_sample scratch[LBGYM_RESERVOIR_SLOTS];
 *     float columns[LBGYM_SERVER_FEATURES];
 *     lbgym_server_stats(&copy, LBGYM_DECAY, scratch, columns);
 *
 * From the packet path to the features. A reservoir has one writer and no lock. The worker that writes it is also the
 * one to copy it: between two bursts of packets, when a control interval has passed, `copy = server;` (4 KB by default)
 * into a buffer that the reader does not use, which it then hands over with a release store of the buffer's number or
 * through a ring. A structure holds no pointer, so that a copy is complete and may live in memory shared with another
 * process. Where another thread must copy, the worker makes a sequence number odd before a burst and even after it, and
 * the reader copies again until the number is even and the same before and after; a copy made without either is a data
 * race, and may pair a value with another sample's time.
 *
 * Several workers: each has its own lbgym_server per server, and a flow stays on the worker that opened it. The counts
 * of open flows add up. Where one statistic per server is wanted, the samples of the workers, one behind the other in
 * one array, go to lbgym_sample_features.
 */
#ifndef LBGYM_FEATURES_H
#define LBGYM_FEATURES_H

/* Needed by lbgym_shm.h, if it is included later. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif

#include <float.h>
#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Room for samples in every reservoir, 16 bytes each. A program that wants larger reservoirs, or smaller ones in less
 * memory, defines it before it includes this file, and the same in all its files. */
#ifndef LBGYM_RESERVOIR_SLOTS
#define LBGYM_RESERVOIR_SLOTS 128
#endif
#if LBGYM_RESERVOIR_SLOTS < 1 || LBGYM_RESERVOIR_SLOTS > 32767
#error "LBGYM_RESERVOIR_SLOTS must be from 1 to 32767"
#endif

/* The customary weight of a sample per second of its age. */
#define LBGYM_DECAY 0.9

/* mean, p90, std, mean_decay, p90_decay */
#define LBGYM_RESERVOIR_FEATURES 5
/* n_flow_on, then the five of FCT (fct_mean ...), then the five of durations (duration_mean ...) */
#define LBGYM_SERVER_FEATURES 11

/** How a full reservoir makes room for a sample. */
typedef enum lbgym_algorithm {
    /* Every sample goes to a random slot: after n further ones it is still there with probability (1 - 1/capacity)^n,
     * so that the reservoir forgets exponentially. */
    LBGYM_OVERWRITE = 0,
    /* Vitter's Algorithm R: all samples ever offered are there with the same probability; it never forgets. */
    LBGYM_UNIFORM = 1
} lbgym_algorithm;

/** A value, and the time at which it was seen. */
typedef struct lbgym_sample {
    uint64_t value_ns;
    uint64_t time_ns;
} lbgym_sample;

/** Random samples of a stream of values. */
typedef struct lbgym_reservoir {
    uint64_t random;    /* state of the random sequence */
    uint64_t accepted;  /* samples taken so far, also those that were overwritten since */
    uint64_t threshold; /* a sample is taken if 53 random bits are below it */
    uint32_t filled;    /* slots that hold a sample: the first ones */
    uint16_t capacity;  /* slots in use, at most LBGYM_RESERVOIR_SLOTS */
    uint16_t algorithm; /* lbgym_algorithm */
    lbgym_sample slots[LBGYM_RESERVOIR_SLOTS];
} lbgym_reservoir;

/** A balancer's state per server. */
typedef struct lbgym_server {
    int64_t open_flows;
    lbgym_reservoir fct;      /* flow completion times */
    lbgym_reservoir duration; /* how long open flows have been open, seen at their packets */
} lbgym_server;

/** An element of the scratch memory of the features. */
typedef struct lbgym_weighted_sample {
    uint64_t value_ns;
    double weight;
} lbgym_weighted_sample;

#ifndef LBGYM_MIX64 /* lbgym_dispatch.h has it, too */
#define LBGYM_MIX64
/** The finaliser of SplitMix64: every bit of x flips half of the bits of the result. */
static inline uint64_t lbgym_mix64(uint64_t x)
{
    x = (x ^ (x >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
    x = (x ^ (x >> 27)) * UINT64_C(0x94D049BB133111EB);
    return x ^ (x >> 31);
}
#endif

/** The next 64 random bits: SplitMix64 (Steele, Lea and Flood, 2014). */
static inline uint64_t lbgym_next(uint64_t *state)
{
    *state += UINT64_C(0x9E3779B97F4A7C15);
    return lbgym_mix64(*state);
}

/** Empties the reservoir and begins the random sequence of `seed`. The capacity is from 1 to LBGYM_RESERVOIR_SLOTS, the
 * probability with which an offered sample is taken above 0 and at most 1. With an argument out of
 * range the result is false and the reservoir takes no samples, like one of zeroed memory. */
static inline bool lbgym_reservoir_init(lbgym_reservoir *r, uint64_t seed, size_t capacity, double probability,
                                        lbgym_algorithm algorithm)
{
    memset(r, 0, sizeof *r);
    if (capacity < 1 || capacity > LBGYM_RESERVOIR_SLOTS) {
        return false;
    }
    if (!(probability > 0.0 && probability <= 1.0)) {
        return false;
    }
    if (algorithm != LBGYM_OVERWRITE && algorithm != LBGYM_UNIFORM) {
        return false;
    }
    r->random = seed;
    r->capacity = (uint16_t)capacity;
    r->algorithm = (uint16_t)algorithm;
    /* With m for the 53 random bits, (m + 1) / 2^53 > p is the same as m + 1 > floor(2^53 p), hence m >= threshold. */
    r->threshold = (uint64_t)(probability * 9007199254740992.0);
    return true;
}

/** Offers a sample. Times need not be in order. A sample far in the future makes all others old, so that it alone
 * determines the decayed features until its slot is overwritten. */
static inline void lbgym_reservoir_add(lbgym_reservoir *r, uint64_t value_ns, uint64_t time_ns)
{
    uint64_t slot;
    /* A probability of 1 draws no random bits, as in Python. */
    if (r->threshold < UINT64_C(1) << 53 && lbgym_next(&r->random) >> 11 >= r->threshold) {
        return;
    }
    r->accepted++;
    if (r->filled < r->capacity) {
        slot = r->filled++;
    } else if (r->algorithm == LBGYM_OVERWRITE) {
        slot = ((lbgym_next(&r->random) >> 32) * r->capacity) >> 32;
    } else {
        slot = lbgym_next(&r->random) % r->accepted;
        if (slot >= r->capacity) {
            return;
        }
    }
    r->slots[slot].value_ns = value_ns;
    r->slots[slot].time_ns = time_ns;
}

/* Lets the sample at `hole` sink to its place in a heap of n samples with the largest on top. */
static inline void lbgym_heap_sink(lbgym_weighted_sample *heap, size_t n, size_t hole)
{
    const lbgym_weighted_sample moved = heap[hole];
    size_t child;
    for (; (child = 2 * hole + 1) < n; hole = child) {
        if (child + 1 < n) {
            /* A sum and not a branch, which would be mispredicted half of the time. */
            child += heap[child].value_ns < heap[child + 1].value_ns;
        }
        if (heap[child].value_ns <= moved.value_ns) {
            break;
        }
        heap[hole] = heap[child];
    }
    heap[hole] = moved;
}

/** The statistics of `n` samples, in seconds: mean, 90th percentile (linear interpolation), population standard
 * deviation; and mean and 90th percentile (inverted distribution function) under weights decay^(age in seconds) divided
 * by their sum. Ages count from the newest sample, so an idle server keeps its features. Always finite; 0
 * without samples. `decay` is above 0 and at most 1, and is moved there if it is not. `scratch` has room for n. */
static inline void lbgym_sample_features(const lbgym_sample *samples, size_t n, double decay,
                                         lbgym_weighted_sample *scratch, float out[LBGYM_RESERVOIR_FEATURES])
{
    const double log_decay = decay < 1.0 ? 1e-9 * log(decay > DBL_MIN ? decay : DBL_MIN) : 0.0;
    const double seconds = 1e-9;
    uint64_t newest = 0, least = UINT64_MAX, p90 = 0, above_p90 = 0, p90_decay = 0;
    double sum = 0.0, squares = 0.0, weight = 0.0, weighted = 0.0, mean, target, weight_below, to_p90 = 0.0;
    bool reached = false;
    size_t i, rank, tenths;

    memset(out, 0, LBGYM_RESERVOIR_FEATURES * sizeof *out);
    if (n == 0) {
        return;
    }
    for (i = 0; i < n; i++) {
        newest = samples[i].time_ns > newest ? samples[i].time_ns : newest;
        least = samples[i].value_ns < least ? samples[i].value_ns : least;
    }
    /* Sums of excesses over the least value lose no digits to what all samples have in common. */
    for (i = 0; i < n; i++) {
        const double excess = (double)(samples[i].value_ns - least);
        scratch[i].value_ns = samples[i].value_ns;
        scratch[i].weight = exp(log_decay * (double)(newest - samples[i].time_ns));
        sum += excess;
        weight += scratch[i].weight;
        weighted += scratch[i].weight * excess;
    }
    mean = sum / (double)n;
    for (i = 0; i < n; i++) {
        const double deviation = (double)(samples[i].value_ns - least) - mean;
        squares += deviation * deviation;
    }
    /* A 90th percentile is a tenth of the way from the top: a heap gives it up after few of its samples, while sorting
     * them all takes several times as long. It needs no further memory, and its worst case is n log n. */
    for (i = n / 2; i-- > 0;) {
        lbgym_heap_sink(scratch, n, i);
    }
    rank = 9 * (n - 1) / 10;
    tenths = 9 * (n - 1) % 10;
    /* The slack decides exact ties (equal weights) for the lower sample, as exact arithmetic would. */
    target = 0.9 * weight * (1.0 - 1e-12);
    weight_below = weight;
    for (i = n; i-- > 0;) {
        const lbgym_weighted_sample top = scratch[0]; /* rank i in ascending order */
        if (!reached) {
            p90_decay = top.value_ns;
            weight_below -= top.weight;
            reached = weight_below < target;
        }
        if (i > rank) {
            above_p90 = top.value_ns;
        } else if (i == rank) {
            p90 = top.value_ns;
        }
        if (reached && i <= rank) {
            break;
        }
        scratch[0] = scratch[i];
        lbgym_heap_sink(scratch, i, 0);
    }
    if (tenths > 0) {
        to_p90 = 0.1 * (double)tenths * (double)(above_p90 - p90);
    }
    out[0] = (float)(seconds * ((double)least + mean));
    out[1] = (float)(seconds * ((double)p90 + to_p90));
    out[2] = (float)(seconds * sqrt(squares / (double)n));
    out[3] = (float)(seconds * ((double)least + weighted / weight));
    out[4] = (float)(seconds * (double)p90_decay);
}

/** The five statistics of a reservoir; `scratch` has room for its capacity. */
static inline void lbgym_reservoir_features(const lbgym_reservoir *r, double decay, lbgym_weighted_sample *scratch,
                                            float out[LBGYM_RESERVOIR_FEATURES])
{
    lbgym_sample_features(r->slots, r->filled, decay, scratch, out);
}

/** Arguments and result as of lbgym_reservoir_init. The seed is mixed before it is split, so that servers may have
 * consecutive seeds and no two of their reservoirs share a random sequence. */
static inline bool lbgym_server_init(lbgym_server *server, uint64_t seed, size_t capacity, double probability,
                                     lbgym_algorithm algorithm)
{
    const uint64_t mixed = lbgym_mix64(seed);
    server->open_flows = 0;
    (void)lbgym_reservoir_init(&server->fct, lbgym_mix64(mixed + 1), capacity, probability, algorithm);
    return lbgym_reservoir_init(&server->duration, lbgym_mix64(mixed + 2), capacity, probability, algorithm);
}

/** The beginning of a flow, which counts as open until lbgym_server_flow_closed. */
static inline void lbgym_server_flow_opened(lbgym_server *server)
{
    server->open_flows++;
}

/** Clocks of several cores may disagree by a little: a flow that ends before it began took no time, not 584 years. */
static inline uint64_t lbgym_elapsed(uint64_t from_ns, uint64_t to_ns)
{
    return to_ns > from_ns ? to_ns - from_ns : 0;
}

/** A packet, at `now_ns`, of an open flow that began at `opened_ns`. */
static inline void lbgym_server_packet(lbgym_server *server, uint64_t opened_ns, uint64_t now_ns)
{
    lbgym_reservoir_add(&server->duration, lbgym_elapsed(opened_ns, now_ns), now_ns);
}

/** The end of a flow. Call it once per opened flow, also for flows that time out (with the time of the last packet), or
 * the count of open flows stays too high for ever. */
static inline void lbgym_server_flow_closed(lbgym_server *server, uint64_t opened_ns, uint64_t now_ns)
{
    lbgym_reservoir_add(&server->fct, lbgym_elapsed(opened_ns, now_ns), now_ns);
    if (server->open_flows > 0) {
        server->open_flows--;
    }
}

/** What a balancer observes of a server, in the order of lbgym.features.FEATURE_NAMES: n_flow_on, the statistics of
 * FCT, the statistics of durations. `scratch` has room for the capacity. */
static inline void lbgym_server_stats(const lbgym_server *server, double decay, lbgym_weighted_sample *scratch,
                                      float out[LBGYM_SERVER_FEATURES])
{
    out[0] = (float)server->open_flows;
    lbgym_reservoir_features(&server->fct, decay, scratch, out + 1);
    lbgym_reservoir_features(&server->duration, decay, scratch, out + 1 + LBGYM_RESERVOIR_FEATURES);
}

#ifdef __cplusplus
}
#endif

#endif
