/* SPDX-License-Identifier: Apache-2.0 */
/* A data plane in C that an agent can drive, with nothing but lbgym's three headers.
 *
 * Flows arrive at random (Poisson) and are placed on servers of different speeds by the weights in force. The servers
 * are simulated, each a queue served first come, first served, in real time. Everything else is what a driver of a real
 * balancer does: features from the flows it sees (lbgym_features.h), an observation per interval, weights from the agent
 * at once, safe weights when its lease is over (lbgym_driver.h). Replace `arrive` and `depart` by hooks in a packet path.
 */
#include "lbgym_driver.h"
/* First lbgym_driver.h, which must come before other headers. */
#include "lbgym_features.h"

#include <getopt.h>
#include <math.h>

#define QUEUE 1024       /* flows a server holds; a power of two */
#define MEAN_DEMAND 0.05 /* seconds of work per flow on a server of speed 1 */
/* What a rejected flow counts as, so that it does not vanish from the statistics. */
#define REJECT_TIMEOUT (10 * LBGYM_SHM_SECOND)
#define NEVER UINT64_MAX

typedef struct flow {
    uint64_t opened; /* ns since the start, as all times here */
    uint64_t work;   /* ns on a server of speed 1 */
} flow;

typedef struct server {
    lbgym_server features;
    uint64_t started, completed, rejected;
    double speed;
    uint64_t departs; /* when the first flow of the queue is done */
    uint64_t head;    /* flows that have left the queue, and so the first one's place */
    uint64_t length;
    flow queue[QUEUE];
} server;

typedef struct dataplane {
    lbgym_driver driver;
    server *servers;
    uint32_t num_servers;
    bool sed; /* shortest expected delay by the weights; else the alias table */
    double rate;
    uint64_t random;
    uint64_t next_arrival;
    uint64_t unrouted, fct_count, fct_sum;
} dataplane;

/* An exponential time with this mean, ns. */
static uint64_t exponential(uint64_t *random, double mean_seconds)
{
    const double uniform = (double)((lbgym_next(random) >> 11) + 1) * 0x1p-53;
    return (uint64_t)(-log(uniform) * mean_seconds * 1e9);
}

/* Shortest expected delay: argmin (open flows + 1) / weight. */
static uint32_t shortest_expected_delay(const dataplane *d)
{
    const double *weights = d->driver.region.observation.weights;
    uint32_t best = LBGYM_SHM_NO_SERVER;
    double least = INFINITY;
    for (uint32_t i = 0; i < d->num_servers; i++) {
        const double delay = (double)(d->servers[i].features.open_flows + 1) / weights[i];
        if (d->driver.region.observation.active[i] && delay < least) {
            least = delay;
            best = i;
        }
    }
    return best;
}

/* The first flow of the queue is served from `now` on; a balancer sees a packet of it then. */
static void serve(server *s, uint64_t now)
{
    const flow *first = &s->queue[s->head % QUEUE];
    lbgym_server_packet(&s->features, first->opened, now);
    s->departs = now + (uint64_t)((double)first->work / s->speed);
}

static void arrive(dataplane *d, uint64_t now)
{
    const uint64_t hash = lbgym_next(&d->random);
    const uint32_t to = d->sed ? shortest_expected_delay(d) : lbgym_shm_pick(&d->driver.region, hash);
    server *s;
    flow *placed;
    if (to == LBGYM_SHM_NO_SERVER) {
        d->unrouted++;
        return;
    }
    s = &d->servers[to];
    s->started++;
    if (s->length == QUEUE) {
        s->rejected++;
        d->fct_count++;
        d->fct_sum += REJECT_TIMEOUT;
        return;
    }
    placed = &s->queue[(s->head + s->length++) % QUEUE];
    placed->opened = now;
    placed->work = exponential(&d->random, MEAN_DEMAND);
    lbgym_server_flow_opened(&s->features);
    if (s->length == 1) {
        serve(s, now);
    }
}

static void depart(dataplane *d, server *s, uint64_t now)
{
    const uint64_t opened = s->queue[s->head % QUEUE].opened;
    lbgym_server_flow_closed(&s->features, opened, now);
    d->fct_count++;
    d->fct_sum += now - opened;
    s->completed++;
    s->head++;
    s->length--;
    if (s->length > 0) {
        serve(s, now);
    } else {
        s->departs = NEVER;
    }
}

/* The next instant at which something happens; `who` departs then, or NULL: a flow arrives. */
static uint64_t next_event(const dataplane *d, server **who)
{
    uint64_t next = d->next_arrival;
    *who = NULL;
    for (uint32_t i = 0; i < d->num_servers; i++) {
        if (d->servers[i].departs <= next) {
            next = d->servers[i].departs;
            *who = &d->servers[i];
        }
    }
    return next;
}

/* Everything that happens up to an instant, in order; returns when the next thing does. */
static uint64_t run_until(lbgym_shm_region *region, uint64_t now, void *context)
{
    dataplane *const d = (dataplane *)context;
    server *who;
    uint64_t next;
    (void)region;
    while ((next = next_event(d, &who)) <= now) {
        if (who != NULL) {
            depart(d, who, next);
        } else {
            arrive(d, next);
            d->next_arrival = next + exponential(&d->random, 1.0 / d->rate);
        }
    }
    return next;
}

static int read_servers(lbgym_shm_region *region, uint64_t now, void *context)
{
    const dataplane *const d = (const dataplane *)context;
    lbgym_weighted_sample scratch[LBGYM_RESERVOIR_SLOTS];
    float stats[LBGYM_SERVER_FEATURES];
    int code = lbgym_shm_set_totals(region, d->unrouted, d->fct_count, d->fct_sum);
    (void)now;
    for (uint32_t i = 0; i < d->num_servers && code >= 0; i++) {
        const server *s = &d->servers[i];
        lbgym_server_stats(&s->features, LBGYM_DECAY, scratch, stats);
        code = lbgym_shm_set_stats(region, i, stats);
        if (code >= 0) {
            code = lbgym_shm_set_counters(region, i, s->started, s->completed, s->rejected, 0);
        }
    }
    return code;
}

static void usage(const char *program)
{
    fprintf(stderr,
            "usage: %s [--name NAME] [--servers N] [--rate FLOWS_PER_SECOND] [--interval SECONDS]\n"
            "       [--duration SECONDS] [--rule sed|alias] [--seed N]\n",
            program);
}

int main(int argc, char **argv)
{
    static const struct option known[] = {
        {"name", required_argument, NULL, 'n'},     {"servers", required_argument, NULL, 's'},
        {"rate", required_argument, NULL, 'r'},     {"interval", required_argument, NULL, 'i'},
        {"duration", required_argument, NULL, 'd'}, {"rule", required_argument, NULL, 'u'},
        {"seed", required_argument, NULL, 'e'},     {NULL, 0, NULL, 0},
    };
    static dataplane d;
    const lbgym_driver_calls calls = {read_servers, NULL, run_until, &d};
    lbgym_shm_options options;
    const char *name = "marllb_lb0", *rule = "sed";
    char label[32];
    double interval = 0.05, duration = 0.0, capacity = 0.0, fct;
    long servers = 4;
    int option, code;
    while ((option = getopt_long(argc, argv, "", known, NULL)) != -1) {
        switch (option) {
        case 'n':
            name = optarg;
            break;
        case 's':
            servers = strtol(optarg, NULL, 10);
            break;
        case 'r':
            d.rate = strtod(optarg, NULL);
            break;
        case 'i':
            interval = strtod(optarg, NULL);
            break;
        case 'd':
            duration = strtod(optarg, NULL);
            break;
        case 'u':
            rule = optarg;
            break;
        case 'e':
            d.random = strtoull(optarg, NULL, 10);
            break;
        default:
            usage(argv[0]);
            return 2;
        }
    }
    d.sed = strcmp(rule, "sed") == 0;
    if (optind < argc || servers < 1 || servers > 1024 || !(interval >= 0.001 && interval <= 60.0) ||
        !(d.rate >= 0.0 && d.rate <= 1e5) || !(duration >= 0.0 && duration <= 1e9) ||
        (!d.sed && strcmp(rule, "alias") != 0)) {
        usage(argv[0]);
        fprintf(stderr, "1 to 1024 servers, an interval of 0.001 to 60 s, at most 100000 flows/s\n");
        return 2;
    }
    d.num_servers = (uint32_t)servers;
    d.servers = (server *)calloc(d.num_servers, sizeof *d.servers);
    if (d.servers == NULL) {
        fprintf(stderr, "no memory for %ld servers\n", servers);
        return 1;
    }
    options = lbgym_shm_default_options(d.num_servers);
    options.publish_interval_ns = (uint64_t)(interval * 1e9);
    options.driver = "c_dataplane";
    if (lbgym_driver_create(&d.driver, name, &options) < 0) {
        fprintf(stderr, "%s\n", d.driver.region.message);
        free(d.servers);
        return 1;
    }
    for (uint32_t i = 0; i < d.num_servers; i++) {
        d.servers[i].speed = 1.0 + i % 4;
        d.servers[i].departs = NEVER;
        capacity += d.servers[i].speed / MEAN_DEMAND;
        (void)lbgym_server_init(&d.servers[i].features, i, LBGYM_RESERVOIR_SLOTS, 1.0, LBGYM_OVERWRITE);
        (void)snprintf(label, sizeof label, "server-%u", (unsigned)i);
        (void)lbgym_shm_set_server_name(&d.driver.region, i, label);
        (void)lbgym_shm_set_server_state(&d.driver.region, i, LBGYM_SHM_UP);
        (void)lbgym_shm_set_active(&d.driver.region, i, true);
    }
    /* By default, as many flows as keep the servers busy for 70 % of the time. */
    d.rate = d.rate > 0.0 ? d.rate : 0.7 * capacity;
    d.next_arrival = exponential(&d.random, 1.0 / d.rate);

    lbgym_driver_catch_signals();
    printf("%s: %u servers, %g flows/s of %g, an observation every %g s\n", name, (unsigned)d.num_servers, d.rate,
           capacity, interval);
    (void)fflush(stdout);
    code = lbgym_driver_run(&d.driver, &calls, duration > 0.0 ? (uint64_t)(duration * 1e9) : LBGYM_DRIVER_FOREVER);
    if (code < 0) {
        fprintf(stderr, "%s\n", d.driver.region.message);
    }
    fct = d.fct_count > 0 ? 1e-9 * (double)d.fct_sum / (double)d.fct_count : 0.0;
    printf("%llu observations, %llu flows ended, mean FCT %.4g s\n", (unsigned long long)d.driver.region.sequence_id,
           (unsigned long long)d.fct_count, fct);
    lbgym_driver_close(&d.driver, &calls);
    free(d.servers);
    return code < 0 ? 1 : 0;
}
