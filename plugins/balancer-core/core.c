/* SPDX-License-Identifier: Apache-2.0 */
/* Control: options, VIPs, servers and weights put in force, and what was counted read. */
#include "internal.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/random.h>
#include <time.h>

/* What other languages have as well. */
_Static_assert(sizeof(lbgym_core_options) == 104 && sizeof(lbgym_core_server) == 64, "layout of control");
_Static_assert(sizeof(lbgym_vip) == 20 && sizeof(lbgym_packet) == 32, "layout of packets");
_Static_assert(sizeof(lbgym_core_counters) == 64 && sizeof(lbgym_core_totals) == 128, "layout of counters");

#define SECOND 1000000000ull
#define LONGEST (1000000 * SECOND)

lbgym_core_options lbgym_core_default_options(void)
{
    lbgym_core_options options;
    memset(&options, 0, sizeof options);
    options.workers = 1;
    options.servers = 64;
    options.flows = 262144;
    options.syn_timeout = 10 * SECOND;
    options.idle_timeout = 300 * SECOND;
    options.udp_timeout = 30 * SECOND;
    options.close_timeout = 10 * SECOND;
    options.fct_sampling = 1.0;
    options.duration_sampling = 1.0 / 64.0;
    return options;
}

static bool within(char *message, size_t size, const char *what, uint64_t value, uint64_t low, uint64_t high)
{
    if (value >= low && value <= high) {
        return true;
    }
    (void)snprintf(message, size, "%s must be from %llu to %llu, got %llu", what, (unsigned long long)low,
                   (unsigned long long)high, (unsigned long long)value);
    return false;
}

static bool is_probability(char *message, size_t size, const char *what, double value)
{
    if (value >= 0.0 && value <= 1.0) {
        return true;
    }
    (void)snprintf(message, size, "%s must be from 0 to 1, got %g", what, value);
    return false;
}

static bool good(const lbgym_core_options *o, char *message, size_t size)
{
    return within(message, size, "workers", o->workers, 1, LBGYM_CORE_MAX_WORKERS) &&
           within(message, size, "servers", o->servers, 1, LBGYM_CORE_MAX_SERVERS) &&
           within(message, size, "flows", o->flows, 16, LBGYM_CORE_MAX_FLOWS) &&
           within(message, size, "syn_flows", o->syn_flows, 0, o->flows) &&
           within(message, size, "mode", o->mode, LBGYM_DSR, LBGYM_NAT) &&
           within(message, size, "owners", o->owners, 0, o->mode == LBGYM_NAT ? o->workers : 0) &&
           within(message, size, "syn_timeout", o->syn_timeout, 1, LONGEST) &&
           within(message, size, "idle_timeout", o->idle_timeout, 1, LONGEST) &&
           within(message, size, "udp_timeout", o->udp_timeout, 1, LONGEST) &&
           within(message, size, "close_timeout", o->close_timeout, 1, LONGEST) &&
           is_probability(message, size, "fct_sampling", o->fct_sampling) &&
           is_probability(message, size, "duration_sampling", o->duration_sampling);
}

static bool make_snapshot(const lbgym_core *core, struct snapshot *s)
{
    const size_t servers = core->options.servers;
    s->aliases = calloc(servers, sizeof *s->aliases);
    s->lookup = calloc(core->lookup_size, sizeof *s->lookup);
    s->fallback = calloc(core->lookup_size, sizeof *s->fallback);
    s->servers = calloc(servers, sizeof *s->servers);
    s->backends = calloc((size_t)core->backend_mask + 1, sizeof *s->backends);
    return s->aliases != NULL && s->lookup != NULL && s->fallback != NULL && s->servers != NULL && s->backends != NULL;
}

static bool make(lbgym_core *core)
{
    const lbgym_core_options *o = &core->options;
    const uint32_t maglev = lbgym_maglev_size(o->servers);
    core->lookup_size = maglev > TURNS ? maglev : TURNS;
    for (core->backend_mask = 3; core->backend_mask < 2 * o->servers; core->backend_mask = 2 * core->backend_mask + 1) {
    }
    core->secret = o->seed;
    if (core->secret == 0 && getrandom(&core->secret, sizeof core->secret, GRND_NONBLOCK) != sizeof core->secret) {
        /* As good as it gets before the machine has gathered noise. */
        struct timespec now;
        (void)clock_gettime(CLOCK_REALTIME, &now);
        core->secret = lbgym_mix64((uint64_t)now.tv_nsec ^ (uint64_t)(uintptr_t)core);
    }
    core->open = calloc(o->servers, sizeof *core->open);
    core->samples = calloc((size_t)o->workers * LBGYM_RESERVOIR_SLOTS, sizeof *core->samples);
    core->weighted = calloc((size_t)o->workers * LBGYM_RESERVOIR_SLOTS, sizeof *core->weighted);
    core->scratch = calloc((size_t)o->servers * 3, sizeof *core->scratch);
    core->active = calloc(o->servers, sizeof *core->active);
    core->unrest = calloc(TURNS, sizeof *core->unrest);
    /* Whole cache lines per worker. */
    core->workers = aligned_alloc(64, (size_t)o->workers * lbgym_worker_size());
    if (core->workers != NULL) {
        memset(core->workers, 0, (size_t)o->workers * lbgym_worker_size());
    }
    if (core->open == NULL || core->samples == NULL || core->weighted == NULL || core->scratch == NULL ||
        core->active == NULL || core->unrest == NULL || core->workers == NULL ||
        !make_snapshot(core, &core->snapshots[0]) || !make_snapshot(core, &core->snapshots[1])) {
        return false;
    }
    for (uint32_t i = 0; i < o->workers; i++) {
        if (!lbgym_worker_init(lbgym_worker_at(core, i), core, i)) {
            return false;
        }
    }
    atomic_store(&core->current, &core->snapshots[0]);
    core->fresh_grace = true;
    return true;
}

lbgym_core *lbgym_core_create(const lbgym_core_options *options, char *message, size_t size)
{
    lbgym_core *core;
    if (!good(options, message, size)) {
        return NULL;
    }
    core = calloc(1, sizeof *core);
    if (core != NULL) {
        core->options = *options;
        if (core->options.syn_flows == 0) {
            core->options.syn_flows = options->flows / 4;
        }
    }
    if (core == NULL || !make(core)) {
        (void)snprintf(message, size, "there is not enough memory for %u flows on each of %u workers and %u servers",
                       options->flows, options->workers, options->servers);
        lbgym_core_destroy(core);
        return NULL;
    }
    return core;
}

void lbgym_core_destroy(lbgym_core *core)
{
    if (core == NULL) {
        return;
    }
    for (uint32_t i = 0; i < core->options.workers && core->workers != NULL; i++) {
        lbgym_worker_clear(lbgym_worker_at(core, i));
    }
    for (int i = 0; i < 2; i++) {
        free(core->snapshots[i].aliases);
        free(core->snapshots[i].lookup);
        free(core->snapshots[i].fallback);
        free(core->snapshots[i].scores);
        free(core->snapshots[i].servers);
        free(core->snapshots[i].backends);
    }
    free(core->workers);
    free((void *)core->open);
    free(core->samples);
    free(core->weighted);
    free(core->scratch);
    free(core->active);
    free(core->unrest);
    free(core);
}

const char *lbgym_core_message(const lbgym_core *core)
{
    return core->message;
}

lbgym_worker *lbgym_core_worker(lbgym_core *core, uint32_t number)
{
    return number < core->options.workers ? lbgym_worker_at(core, number) : NULL;
}

const uint64_t *lbgym_core_open_flows(const lbgym_core *core)
{
    return (const uint64_t *)core->open;
}

__attribute__((format(printf, 2, 3))) static int fail(lbgym_core *core, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    (void)vsnprintf(core->message, sizeof core->message, format, arguments);
    va_end(arguments);
    return -1;
}

/* What is in force */

/* Until no worker is in a burst that may have begun before the last change. */
static void wait_for_grace(lbgym_core *core)
{
    const struct timespec moment = {0, 20000};
    for (uint32_t i = 0; i < core->options.workers && !core->fresh_grace; i++) {
        const lbgym_worker *w = lbgym_worker_at(core, i);
        const uint64_t seen = lbgym_worker_activity(w);
        while (seen % 2 != 0 && lbgym_worker_activity(w) == seen) {
            (void)nanosleep(&moment, NULL);
        }
    }
    core->fresh_grace = true;
}

static struct snapshot *spare(lbgym_core *core)
{
    wait_for_grace(core);
    return &core->snapshots[atomic_load(&core->current) == &core->snapshots[0]];
}

static void put_in_force(lbgym_core *core, struct snapshot *s)
{
    s->version = ++core->version;
    atomic_store(&core->current, s);
    core->fresh_grace = false;
}

static void seat_vips(struct snapshot *s, const struct snapshot *from)
{
    s->num_vips = from->num_vips;
    memcpy(s->vips, from->vips, sizeof s->vips);
    memcpy(s->vip_slots, from->vip_slots, sizeof s->vip_slots);
}

/* All but VIPs. */
static void seat_rest(const lbgym_core *core, struct snapshot *s, const struct snapshot *from)
{
    const uint32_t servers = core->options.servers;
    s->mechanism = from->mechanism;
    s->size = from->size;
    s->rows = from->rows;
    s->fallback_size = from->fallback_size;
    memcpy(s->aliases, from->aliases, servers * sizeof *s->aliases);
    memcpy(s->lookup, from->lookup, core->lookup_size * sizeof *s->lookup);
    memcpy(s->fallback, from->fallback, core->lookup_size * sizeof *s->fallback);
    memcpy(s->servers, from->servers, servers * sizeof *s->servers);
    memcpy(s->backends, from->backends, ((size_t)core->backend_mask + 1) * sizeof *s->backends);
}

int lbgym_core_set_vips(lbgym_core *core, const lbgym_vip *vips, uint32_t n)
{
    const struct snapshot *now = atomic_load(&core->current);
    const size_t scores = (size_t)LBGYM_INDEX_ENTRIES * core->options.servers * sizeof *now->scores;
    struct snapshot *s;
    if (n > LBGYM_CORE_MAX_VIPS) {
        return fail(core, "there can be %d VIPs, got %u", LBGYM_CORE_MAX_VIPS, n);
    }
    if (n < now->num_vips) {
        return fail(core, "there are %u VIPs, and none can be removed", now->num_vips);
    }
    for (uint32_t i = 0; i < n; i++) {
        const lbgym_vip *vip = &vips[i];
        if (vip->port == 0 || (vip->protocol != 6 && vip->protocol != 17) || vip->is_ipv6 > 1) {
            return fail(core, "VIP %u must have a port and the protocol TCP (6) or UDP (17)", i);
        }
        if (!vip->is_ipv6 && (vip->address[1] | vip->address[2] | vip->address[3]) != 0) {
            return fail(core, "VIP %u of IPv4 must have zeros after its address", i);
        }
        if (i < now->num_vips && memcmp(vip, &now->vips[i].key, sizeof *vip) != 0) {
            return fail(core, "VIP %u is there and cannot become another one", i);
        }
        for (uint32_t j = 0; j < i; j++) {
            if (memcmp(vip, &vips[j], sizeof *vip) == 0) {
                return fail(core, "VIPs %u and %u are the same", j, i);
            }
        }
    }
    s = spare(core);
    if (now->scores != NULL && s->scores == NULL && (s->scores = malloc(scores)) == NULL) {
        return fail(core, "there is not enough memory for the scores of %u servers", core->options.servers);
    }
    if (now->scores != NULL) {
        memcpy(s->scores, now->scores, scores);
    }
    seat_rest(core, s, now);
    s->num_vips = n;
    memset(s->vip_slots, 0, sizeof s->vip_slots);
    for (uint32_t i = 0; i < n; i++) {
        uint32_t slot = slot_of(vips[i].address, vips[i].port, vips[i].protocol);
        while (s->vip_slots[slot % VIP_SLOTS] != 0) {
            slot++;
        }
        s->vip_slots[slot % VIP_SLOTS] = (uint8_t)(i + 1);
        s->vips[i].key = vips[i];
        s->vips[i].service = service_of(&vips[i]);
    }
    put_in_force(core, s);
    return 0;
}

static bool is_weight(double value)
{
    return value >= 0.0 && value <= DBL_MAX;
}

static int check_server(lbgym_core *core, const lbgym_core_server *servers, uint32_t row)
{
    const lbgym_core_server *server = &servers[row];
    if (!is_weight(server->weight) || !is_weight(server->safe_weight) || !is_weight(server->background)) {
        return fail(core, "server %u: weights and background loads must be finite and at least 0, got %g, %g and %g",
                    row, server->weight, server->safe_weight, server->background);
    }
    if (!(server->cores >= 1.0 && server->cores <= 1048576.0)) {
        return fail(core, "server %u: cores must be from 1 to 1048576, got %g", row, server->cores);
    }
    if (server->active && !server->present) {
        return fail(core, "server %u is active and not present", row);
    }
    return 0;
}

/* NAT: by address and port, to find the flows of packets that servers send. */
static int seat_backends(lbgym_core *core, struct snapshot *s)
{
    memset(s->backends, 0, ((size_t)core->backend_mask + 1) * sizeof *s->backends);
    for (uint32_t row = 0; row < s->rows && core->options.mode == LBGYM_NAT; row++) {
        const lbgym_core_server *server = &s->servers[row];
        uint32_t slot = slot_of(server->address, server->port, 0);
        if (!server->present) {
            continue;
        }
        for (; s->backends[slot & core->backend_mask] != 0; slot++) {
            const uint32_t other = s->backends[slot & core->backend_mask] - 1u;
            if (s->servers[other].port == server->port && same_address(s->servers[other].address, server->address)) {
                return fail(core, "servers %u and %u have the same address and port", other, row);
            }
        }
        s->backends[slot & core->backend_mask] = (uint16_t)(row + 1);
    }
    return 0;
}

int lbgym_core_install(lbgym_core *core, lbgym_rule rule, uint32_t balancers, const lbgym_core_server *servers,
                       uint32_t n)
{
    struct snapshot *s;
    if (n > core->options.servers) {
        return fail(core, "there is room for %u servers, got %u", core->options.servers, n);
    }
    if (lbgym_rule_name((int)rule) == NULL || balancers < 1) {
        return fail(core, "there is no dispatch rule %d for %u balancers", (int)rule, balancers);
    }
    for (uint32_t row = 0; row < n; row++) {
        if (check_server(core, servers, row) < 0) {
            return -1;
        }
    }
    s = spare(core);
    s->rows = n;
    memcpy(s->servers, servers, n * sizeof *servers);
    memset(s->servers + n, 0, (core->options.servers - n) * sizeof *servers);
    if (seat_backends(core, s) < 0) {
        return -1;
    }
    if (lbgym_fill_tables(core, s, rule, balancers) < 0) {
        return fail(core, "there is not enough memory for the scores of %u servers", core->options.servers);
    }
    seat_vips(s, atomic_load(&core->current));
    put_in_force(core, s);
    return 0;
}

/* What was counted */

void lbgym_core_ask(lbgym_core *core)
{
    atomic_fetch_add_explicit(&core->asked, 1, memory_order_release);
}

bool lbgym_core_answered(const lbgym_core *core)
{
    for (uint32_t i = 0; i < core->options.workers; i++) {
        if (lbgym_worker_answer(lbgym_worker_at((lbgym_core *)core, i)) != peek(&core->asked)) {
            return false;
        }
    }
    return true;
}

static size_t gather(lbgym_sample *samples, size_t n, const lbgym_reservoir *reservoir)
{
    memcpy(samples + n, reservoir->slots, reservoir->filled * sizeof *samples);
    return n + reservoir->filled;
}

void lbgym_core_read(lbgym_core *core, uint32_t row, lbgym_core_counters *counters,
                     float features[LBGYM_SERVER_FEATURES])
{
    memset(counters, 0, sizeof *counters);
    if (features != NULL) {
        memset(features, 0, LBGYM_SERVER_FEATURES * sizeof *features);
    }
    if (row >= core->options.servers) {
        return;
    }
    for (int metric = 0; metric < 2; metric++) {
        size_t samples = 0;
        for (uint32_t i = 0; i < core->options.workers; i++) {
            const lbgym_core_counters *c;
            const lbgym_server *server;
            lbgym_worker_copied(lbgym_worker_at(core, i), row, &c, &server);
            samples = gather(core->samples, samples, metric == 0 ? &server->fct : &server->duration);
            if (metric == 0) {
                counters->started += c->started;
                counters->completed += c->completed;
                counters->rejected += c->rejected;
                counters->failed += c->failed;
                counters->fct_count += c->fct_count;
                counters->fct_sum += c->fct_sum;
                counters->entries += c->entries;
                counters->open += c->open;
            }
        }
        if (features != NULL) {
            lbgym_sample_features(core->samples, samples, LBGYM_DECAY, core->weighted,
                                  features + 1 + metric * LBGYM_RESERVOIR_FEATURES);
        }
    }
    if (features != NULL) {
        features[0] = (float)counters->open;
    }
}

void lbgym_core_read_totals(lbgym_core *core, lbgym_core_totals *totals)
{
    uint64_t *const sum = (uint64_t *)totals;
    memset(totals, 0, sizeof *totals);
    for (uint32_t i = 0; i < core->options.workers; i++) {
        const uint64_t *of_worker = (const uint64_t *)lbgym_worker_copied_totals(lbgym_worker_at(core, i));
        for (size_t k = 0; k < sizeof *totals / sizeof *sum; k++) {
            sum[k] += of_worker[k];
        }
    }
}
