/* SPDX-License-Identifier: Apache-2.0 */
/* Torture of the sequence locks: a writer at full speed, and readers that know from the sequence id what every byte of an
 * observation or action must be.
 *
 *     tearing write-observations NAME SERVERS CAPACITY      creates the region; until it is killed
 *     tearing read-observations NAME SERVERS READS SECONDS
 *     tearing write-actions NAME SERVERS                    of a region that exists; until it is killed
 *     tearing read-actions NAME SERVERS READS SECONDS
 *
 * A writer says "ready" after its first one. A reader ends after so many copies, of which 20 are of something new, or
 * seconds, and prints
 *
 *     {"reads": copies, "distinct": different ones in a row, "torn": bad ones, "refused": as such, "busy": retries}
 *
 * Compiled with LBGYM_SHM_UNSAFE_NO_LOCK it takes any mixture for a copy, and ends with the first bad one.
 */
#include "lbgym_shm.h"

typedef struct counts {
    uint64_t reads, distinct, torn, refused, busy;
} counts;

/* Every fourth has as many servers as there are, the others up to three fewer. */
static uint32_t servers_of(uint64_t id, uint32_t servers)
{
    const uint32_t fewer = (uint32_t)(id % 4);
    return servers > fewer ? servers - fewer : 1;
}

static float stat_of(uint64_t id, uint32_t k) { return (float)(((uint32_t)id * 31 + k) & 0xFFFFFF); }
static float truth_of(uint64_t id, uint32_t k) { return (float)(((uint32_t)id * 37 + k) & 0xFFFFFF); }
static uint64_t counter_of(uint64_t id, uint32_t k) { return id * 41 + k; }
static double weight_of(uint64_t id, uint32_t i) { return 1.0 + (double)(((uint32_t)id * 13 + i * 7) & 0x3FF); }
static double safe_weight_of(uint64_t id, uint32_t i) { return 2000.0 + (double)(((uint32_t)id * 17 + i) & 0x3FF); }
static uint8_t active_of(uint64_t id, uint32_t i) { return (uint8_t)((id + i) & 1); }

static void fill(lbgym_shm_observation *o, uint64_t id, uint32_t servers)
{
    const uint32_t n = servers_of(id, servers);
    o->frame->num_servers = n;
    o->frame->unrouted = id * 3;
    o->frame->fct_count = id * 5;
    o->frame->fct_sum = id * 7;
    o->frame->flags |= LBGYM_SHM_FLAG_GROUND_TRUTH;
    for (uint32_t i = 0; i < n; i++) {
        o->active[i] = active_of(id, i);
        o->weights[i] = weight_of(id, i);
        o->safe_weights[i] = safe_weight_of(id, i);
    }
    for (uint32_t k = 0; k < n * LBGYM_SHM_NUM_FEATURES; k++) {
        o->stats[k] = stat_of(id, k);
    }
    for (uint32_t k = 0; k < n * LBGYM_SHM_NUM_GROUND_TRUTH; k++) {
        o->ground_truth[k] = truth_of(id, k);
    }
    for (uint32_t k = 0; k < n * LBGYM_SHM_NUM_COUNTERS; k++) {
        o->counters[k] = counter_of(id, k);
    }
}

static bool observation_is_whole(const lbgym_shm_observation *o, uint32_t servers)
{
    const lbgym_shm_frame *f = o->frame;
    const uint64_t id = f->sequence_id;
    const uint32_t n = servers_of(id, servers);
    uint64_t bad;
    if (f->num_servers != n) {
        return false;
    }
    bad = (f->unrouted ^ id * 3) | (f->fct_count ^ id * 5) | (f->fct_sum ^ id * 7) | (f->timestamp ^ id * 1000);
    bad |= f->flags ^ (LBGYM_SHM_FLAG_GROUND_TRUTH | LBGYM_SHM_FLAG_SAFE);
    for (uint32_t i = 0; i < n; i++) {
        bad |= (uint64_t)(o->active[i] != active_of(id, i)) | (uint64_t)(o->weights[i] != weight_of(id, i)) |
               (uint64_t)(o->safe_weights[i] != safe_weight_of(id, i));
    }
    for (uint32_t k = 0; k < n * LBGYM_SHM_NUM_FEATURES; k++) {
        bad |= (uint64_t)(o->stats[k] != stat_of(id, k));
    }
    for (uint32_t k = 0; k < n * LBGYM_SHM_NUM_GROUND_TRUTH; k++) {
        bad |= (uint64_t)(o->ground_truth[k] != truth_of(id, k));
    }
    for (uint32_t k = 0; k < n * LBGYM_SHM_NUM_COUNTERS; k++) {
        bad |= o->counters[k] ^ counter_of(id, k);
    }
    return bad == 0;
}

/* An action's weights, and the alias table of just these. */
static bool action_is_whole(const lbgym_shm_region *region, uint32_t servers)
{
    const lbgym_shm_weights *w = &region->action;
    const uint64_t id = w->action->sequence_id;
    const uint32_t n = servers_of(id, servers);
    uint64_t bad = w->action->lease ^ (id + 1);
    if (w->action->num_servers != n) {
        return false;
    }
    for (uint32_t i = 0; i < n; i++) {
        bad |= (uint64_t)(w->weights[i] != weight_of(id, i));
    }
    lbgym_shm_alias_table(w->weights, n, region->threshold, region->alias, region->stack, region->share);
    return bad == 0 && memcmp(w->threshold, region->threshold, n * sizeof *w->threshold) == 0 &&
           memcmp(w->alias, region->alias, n * sizeof *w->alias) == 0;
}

static int write_observations(lbgym_shm_region *region, const char *name, uint32_t servers, uint32_t capacity)
{
    lbgym_shm_options options = lbgym_shm_default_options(servers);
    options.capacity = capacity;
    options.publish_interval_ns = 1000;
    if (lbgym_shm_create(region, name, &options) < 0) {
        return -1;
    }
    for (uint64_t id = 1;; id++) {
        fill(&region->observation, id, servers);
        if (lbgym_shm_publish(region, id * 1000) < 0) {
            return -1;
        }
        if (id == 1) {
            printf("ready\n");
            (void)fflush(stdout);
        }
    }
}

static int write_actions(lbgym_shm_region *region, const char *name, uint32_t servers)
{
    double *weights = (double *)calloc(servers, sizeof *weights);
    if (weights == NULL || lbgym_shm_attach(region, name, LBGYM_SHM_READ_WRITE) < 0) {
        free(weights);
        return -1;
    }
    for (uint64_t id = 1;; id++) {
        const uint32_t n = servers_of(id, servers);
        for (uint32_t i = 0; i < n; i++) {
            weights[i] = weight_of(id, i);
        }
        if (lbgym_shm_write_action(region, id, weights, n, id + 1) < 0) {
            free(weights);
            return -1;
        }
        if (id == 1) {
            printf("ready\n");
            (void)fflush(stdout);
        }
    }
}

/* One copy: 1, or a negative code. */
static int read_once(lbgym_shm_region *region, bool actions)
{
    uint64_t number;
    int code;
    if (!actions) {
        return lbgym_shm_read(region);
    }
    code = lbgym_shm_read_action(region, 0, &number);
    return code < 0 ? code : 1;
}

static int read_many(lbgym_shm_region *region, const char *name, bool actions, uint32_t servers, uint64_t reads,
                     double seconds)
{
    const uint64_t begin = lbgym_shm_now();
    const uint64_t *id;
    uint64_t last = 0;
    counts c;
    memset(&c, 0, sizeof c);
    if (lbgym_shm_attach(region, name, LBGYM_SHM_ANY) < 0) {
        return -1;
    }
    id = actions ? &region->action.action->sequence_id : &region->observation.frame->sequence_id;
    while ((c.reads < reads || c.distinct < 20) && (double)(lbgym_shm_now() - begin) < seconds * 1e9) {
        for (int k = 0; k < 100; k++) {
            const int code = read_once(region, actions);
            if (code == LBGYM_SHM_BUSY) {
                c.busy++;
                continue;
            }
            c.reads++;
            c.distinct += *id != last;
            last = *id;
            if (code == LBGYM_SHM_FORMAT) {
                c.refused++;
            } else if (!(actions ? action_is_whole(region, servers)
                                 : observation_is_whole(&region->observation, servers))) {
                c.torn++;
            }
        }
#ifdef LBGYM_SHM_UNSAFE_NO_LOCK
        if (c.torn > 0) {
            break;
        }
#endif
    }
    printf("{\"reads\": %llu, \"distinct\": %llu, \"torn\": %llu, \"refused\": %llu, \"busy\": %llu}\n",
           (unsigned long long)c.reads, (unsigned long long)c.distinct, (unsigned long long)c.torn,
           (unsigned long long)c.refused, (unsigned long long)c.busy);
    lbgym_shm_close(region);
    return 0;
}

int main(int argc, char **argv)
{
    static lbgym_shm_region region;
    const char *role = argc > 1 ? argv[1] : "", *name = argc > 2 ? argv[2] : "";
    const uint32_t servers = argc > 3 ? (uint32_t)strtoul(argv[3], NULL, 10) : 0;
    int code;
    if (argc == 5 && strcmp(role, "write-observations") == 0) {
        code = write_observations(&region, name, servers, (uint32_t)strtoul(argv[4], NULL, 10));
    } else if (argc == 4 && strcmp(role, "write-actions") == 0) {
        code = write_actions(&region, name, servers);
    } else if (argc == 6 && (strcmp(role, "read-observations") == 0 || strcmp(role, "read-actions") == 0)) {
        code = read_many(&region, name, strcmp(role, "read-actions") == 0, servers, strtoull(argv[4], NULL, 10),
                         strtod(argv[5], NULL));
    } else {
        fprintf(stderr, "see the beginning of tearing.c\n");
        return 2;
    }
    if (code < 0) {
        fprintf(stderr, "%s\n", region.message);
    }
    return code < 0;
}
