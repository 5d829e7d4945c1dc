/* SPDX-License-Identifier: Apache-2.0 */
/* Servers by name, their rows, and the region. */
#include "lbgym_publish.h"

#include "lbgym_service.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

struct lbgym_service {
    lbgym_core *core;
    lbgym_service_options options;
    bool is_open; /* the region */
    char name[LBGYM_SERVICE_NAME];
    char message[LBGYM_SERVICE_MESSAGE];
    uint32_t num_rows;
    uint64_t published;
    lbgym_service_server *servers;  /* [options.core.servers] */
    uint32_t *generations;          /* a row's servers so far */
    uint8_t *waits;                 /* publications until the counts of a removed server can be believed */
    lbgym_service_status *statuses;
    lbgym_core_totals totals;
    lbgym_core_server *rows;        /* scratch */
    const char **names;
    lbgym_publisher publisher;
};

lbgym_service_options lbgym_service_default_options(void)
{
    lbgym_service_options options;
    memset(&options, 0, sizeof options);
    options.core = lbgym_core_default_options();
    options.vip.protocol = 6;
    options.rule = LBGYM_SED;
    options.balancers = 1;
    options.permissions = 0600;
    options.publish_interval = LBGYM_SHM_SECOND / 5;
    options.driver = "core";
    return options;
}

__attribute__((format(printf, 3, 4))) static int fail(lbgym_service *s, int code, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    (void)vsnprintf(s->message, sizeof s->message, format, arguments);
    va_end(arguments);
    return code;
}

static int shared_memory_failed(lbgym_service *s, int code)
{
    const int which = code == LBGYM_SHM_EXISTS                                   ? LBGYM_SERVICE_EXISTS
                      : code == LBGYM_SHM_NO_ROOM                                ? LBGYM_SERVICE_FULL
                      : code == LBGYM_SHM_SYSTEM || code == LBGYM_SHM_PERMISSION ? LBGYM_SERVICE_SYSTEM
                                                                                 : LBGYM_SERVICE_VALUE;
    return fail(s, which, "%s", s->publisher.driver.region.message);
}

/* Servers as they are, for the core and the region. */
static void list(lbgym_service *s)
{
    double sum = 0.0;
    memset(s->rows, 0, s->num_rows * sizeof *s->rows);
    for (uint32_t row = 0; row < s->num_rows; row++) {
        const lbgym_service_server *from = &s->servers[row];
        lbgym_core_server *to = &s->rows[row];
        memcpy(to->address, from->address, sizeof to->address);
        to->port = from->port;
        to->is_ipv6 = from->is_ipv6;
        to->present = from->known;
        to->reachable = from->known && from->reachable;
        to->active = from->known && from->reachable && !from->drained && !from->removed;
        to->via = row;
        to->generation = s->generations[row];
        to->safe_weight = from->known ? from->weight : 0.0;
        to->cores = from->known ? from->cores : 1.0;
        s->names[row] = from->known ? from->name : "";
        sum += to->safe_weight;
    }
    for (uint32_t row = 0; row < s->num_rows && sum <= 0.0; row++) {
        s->rows[row].safe_weight = 1.0;
    }
}

static int put_in_force(lbgym_service *s)
{
    int code;
    list(s);
    code = lbgym_publisher_set_servers(&s->publisher, s->rows, s->names, s->num_rows);
    return code < 0 ? shared_memory_failed(s, code) : 0;
}

static bool make(lbgym_service *s)
{
    const size_t rows = s->options.core.servers;
    s->servers = calloc(rows, sizeof *s->servers);
    s->generations = calloc(rows, sizeof *s->generations);
    s->waits = calloc(rows, sizeof *s->waits);
    s->statuses = calloc(rows, sizeof *s->statuses);
    s->rows = calloc(rows, sizeof *s->rows);
    s->names = calloc(rows, sizeof *s->names);
    return s->servers != NULL && s->generations != NULL && s->waits != NULL && s->statuses != NULL && s->rows != NULL &&
           s->names != NULL;
}

static bool counts_flows(lbgym_rule rule)
{
    return rule >= LBGYM_LSQ && rule < LBGYM_NUM_RULES;
}

static int open_service(lbgym_service *s, const char *name)
{
    const lbgym_service_options *const o = &s->options;
    lbgym_shm_options region = lbgym_shm_default_options(1);
    int code;
    if (lbgym_rule_name((int)o->rule) == NULL || o->balancers < 1) {
        return fail(s, LBGYM_SERVICE_VALUE, "there is no dispatch rule %d for %u balancers", (int)o->rule, o->balancers);
    }
    if (strlen(name) >= sizeof s->name) {
        return fail(s, LBGYM_SERVICE_VALUE, "a name has at most %zu characters, got '%s'", sizeof s->name - 1, name);
    }
    (void)strcpy(s->name, name);
    s->core = lbgym_core_create(&o->core, s->message, sizeof s->message);
    if (s->core == NULL) {
        return LBGYM_SERVICE_VALUE;
    }
    if (!make(s)) {
        return fail(s, LBGYM_SERVICE_FULL, "there is not enough memory for %u servers", o->core.servers);
    }
    if (lbgym_core_set_vips(s->core, &o->vip, 1) < 0) {
        return fail(s, LBGYM_SERVICE_VALUE, "%s", lbgym_core_message(s->core));
    }
    s->num_rows = 1;
    list(s);
    region.capacity = o->core.servers;
    region.publish_interval_ns = o->publish_interval;
    region.driver = o->driver;
    region.mode = (mode_t)o->permissions;
    region.takes_index = counts_flows(o->rule);
    code = lbgym_publisher_open(&s->publisher, s->core, name, o->rule, o->balancers, s->rows, s->names, &region);
    if (code < 0) {
        return shared_memory_failed(s, code);
    }
    s->is_open = true;
    return 0;
}

int lbgym_service_create(lbgym_service **service, const char *name, const lbgym_service_options *options, char *message,
                         size_t size)
{
    lbgym_service *const s = calloc(1, sizeof *s);
    int code;
    *service = NULL;
    if (s == NULL) {
        (void)snprintf(message, size, "there is not enough memory for a service");
        return LBGYM_SERVICE_FULL;
    }
    s->options = *options;
    code = open_service(s, name);
    if (code < 0) {
        (void)snprintf(message, size, "%s", s->message);
        lbgym_service_destroy(s);
        return code;
    }
    *service = s;
    return 0;
}

void lbgym_service_retire(lbgym_service *s)
{
    if (s->is_open) {
        lbgym_publisher_close(&s->publisher);
        s->is_open = false;
    }
}

void lbgym_service_destroy(lbgym_service *s)
{
    if (s == NULL) {
        return;
    }
    lbgym_service_retire(s);
    lbgym_core_destroy(s->core);
    free(s->servers);
    free(s->generations);
    free(s->waits);
    free(s->statuses);
    free(s->rows);
    free(s->names);
    free(s);
}

lbgym_core *lbgym_service_core(const lbgym_service *s)
{
    return s->core;
}

const char *lbgym_service_name(const lbgym_service *s)
{
    return s->name;
}

const lbgym_service_options *lbgym_service_configured(const lbgym_service *s)
{
    return &s->options;
}

const char *lbgym_service_message(const lbgym_service *s)
{
    return s->message;
}

/* Servers */

int lbgym_service_find(lbgym_service *s, const char *name)
{
    for (uint32_t row = 0; row < s->num_rows; row++) {
        if (s->servers[row].known && strcmp(s->servers[row].name, name) == 0) {
            return (int)row;
        }
    }
    return fail(s, LBGYM_SERVICE_UNKNOWN, "'%s' has no server '%.*s'", s->name, LBGYM_SERVICE_NAME - 1, name);
}

static bool is_weight(double weight)
{
    return isfinite(weight) && weight >= 0.0;
}

static bool same_place(const lbgym_service_server *a, const lbgym_service_server *b, bool with_port)
{
    return a->is_ipv6 == b->is_ipv6 && memcmp(a->address, b->address, sizeof a->address) == 0 &&
           (!with_port || a->port == b->port);
}

static int check_address(lbgym_service *s, const lbgym_service_server *new)
{
    static const uint32_t nothing[4];
    const lbgym_service_options *const o = &s->options;
    const uint8_t first = *(const uint8_t *)new->address;
    const uint32_t mode = o->core.mode;
    const bool is_nat = mode == LBGYM_NAT;
    if (memcmp(new->address, nothing, sizeof nothing) == 0 || (new->is_ipv6 ? first == 0xFF : first >= 224)) {
        return fail(s, LBGYM_SERVICE_VALUE, "server '%s' needs a unicast address", new->name);
    }
    if (new->is_ipv6 == o->vip.is_ipv6 && memcmp(new->address, o->vip.address, sizeof new->address) == 0) {
        return fail(s, LBGYM_SERVICE_VALUE, "server '%s' has the address of the VIP itself", new->name);
    }
    if (is_nat && (new->port == 0 || new->is_ipv6 != o->vip.is_ipv6)) {
        return fail(s, LBGYM_SERVICE_VALUE, "NAT: server '%s' needs a port, and an address of IPv%d as the VIP",
                    new->name, o->vip.is_ipv6 ? 6 : 4);
    }
    if ((mode == LBGYM_GRE || mode == LBGYM_IPIP) &&
        (new->is_ipv6 ? memcmp(o->core.source6, nothing, sizeof nothing) == 0 : o->core.source4 == 0)) {
        return fail(s, LBGYM_SERVICE_VALUE,
                    "packets to server '%s' need an outer source address of IPv%d, which VIP '%s' was not given",
                    new->name, new->is_ipv6 ? 6 : 4, s->name);
    }
    return 0;
}

static int check(lbgym_service *s, const lbgym_service_server *new)
{
    const size_t length = strnlen(new->name, sizeof new->name);
    if (length < 1 || length >= sizeof new->name) {
        return fail(s, LBGYM_SERVICE_VALUE, "the name of a server has 1 to %zu characters", sizeof new->name - 1);
    }
    for (size_t i = 0; i < length; i++) {
        if (new->name[i] <= ' ' || new->name[i] == 0x7F) {
            return fail(s, LBGYM_SERVICE_VALUE, "the name of a server has printable characters of ASCII and no blanks");
        }
    }
    if (!is_weight(new->weight)) {
        return fail(s, LBGYM_SERVICE_VALUE, "the weight of server '%s' must be finite and at least 0, got %g", new->name,
                    new->weight);
    }
    if (!(new->cores >= 1.0 && new->cores <= 1048576.0)) {
        return fail(s, LBGYM_SERVICE_VALUE, "the cores of server '%s' must be from 1 to 1048576, got %g", new->name,
                    new->cores);
    }
    return check_address(s, new);
}

int lbgym_service_add(lbgym_service *s, const lbgym_service_server *new)
{
    const bool is_nat = s->options.core.mode == LBGYM_NAT;
    const uint32_t rows = s->num_rows;
    lbgym_service_server before;
    uint32_t row = s->options.core.servers, free_row = row, leaving = 0;
    int code = check(s, new);
    if (code < 0) {
        return code;
    }
    for (uint32_t i = s->num_rows; i-- > 0;) {
        const lbgym_service_server *const other = &s->servers[i];
        leaving += other->known && other->removed;
        if (!other->known) {
            free_row = i;
        } else if (strcmp(other->name, new->name) == 0) {
            row = i;
        } else if (same_place(other, new, is_nat)) {
            return fail(s, LBGYM_SERVICE_EXISTS, "server '%s' of '%s' has the same address%s as '%s'", other->name,
                        s->name, is_nat ? " and port" : "", new->name);
        }
    }
    if (row < s->num_rows) {
        if (!s->servers[row].removed) {
            return fail(s, LBGYM_SERVICE_EXISTS, "'%s' has a server '%s' already", s->name, new->name);
        }
        if (!same_place(&s->servers[row], new, is_nat)) {
            return fail(s, LBGYM_SERVICE_EXISTS,
                        "server '%s' is being removed and cannot move meanwhile; give the new one another name",
                        new->name);
        }
    } else if (free_row < s->num_rows) {
        row = free_row;
    } else if (s->num_rows < s->options.core.servers) {
        row = s->num_rows++;
    } else {
        return fail(s, LBGYM_SERVICE_FULL,
                    "no room for server '%s': all %u rows of '%s' are taken, %u of them by servers that are being removed",
                    new->name, s->options.core.servers, s->name, leaving);
    }
    before = s->servers[row];
    s->servers[row] = *new;
    s->servers[row].known = 1;
    s->servers[row].removed = s->servers[row].drained = 0;
    s->servers[row].reachable = before.known && before.reachable;
    code = put_in_force(s);
    if (code < 0) {
        s->servers[row] = before;
        s->num_rows = rows;
        return code;
    }
    return (int)row;
}

static int must_know(lbgym_service *s, uint32_t row)
{
    if (row >= s->num_rows || !s->servers[row].known) {
        return fail(s, LBGYM_SERVICE_UNKNOWN, "'%s' has no server in row %u", s->name, row);
    }
    return 0;
}

int lbgym_service_set_weight(lbgym_service *s, uint32_t row, double weight)
{
    const int code = must_know(s, row);
    if (code < 0) {
        return code;
    }
    if (!is_weight(weight)) {
        return fail(s, LBGYM_SERVICE_VALUE, "the weight of server '%s' must be finite and at least 0, got %g",
                    s->servers[row].name, weight);
    }
    s->servers[row].weight = weight;
    return put_in_force(s);
}

int lbgym_service_drain(lbgym_service *s, uint32_t row, bool drained)
{
    const int code = must_know(s, row);
    if (code < 0) {
        return code;
    }
    if (s->servers[row].removed) {
        return fail(s, LBGYM_SERVICE_UNKNOWN, "server '%s' is being removed", s->servers[row].name);
    }
    s->servers[row].drained = drained;
    return put_in_force(s);
}

int lbgym_service_remove(lbgym_service *s, uint32_t row)
{
    const int code = must_know(s, row);
    if (code < 0) {
        return code;
    }
    if (s->servers[row].removed) {
        return fail(s, LBGYM_SERVICE_UNKNOWN, "server '%s' is being removed already", s->servers[row].name);
    }
    s->servers[row].removed = 1;
    /* Workers may be copying counts from before: the next time that they are asked is the first that is sure. */
    s->waits[row] = 2;
    return put_in_force(s);
}

int lbgym_service_reach(lbgym_service *s, uint32_t row, bool reachable)
{
    const int code = must_know(s, row);
    if (code < 0) {
        return code;
    }
    if (s->servers[row].reachable == reachable) {
        return 0;
    }
    s->servers[row].reachable = reachable;
    return put_in_force(s);
}

/* Publication */

uint64_t lbgym_service_left(const lbgym_service *s)
{
    return lbgym_publisher_left(&s->publisher);
}

bool lbgym_service_waits(const lbgym_service *s)
{
    return s->publisher.asked;
}

static bool release(lbgym_service *s)
{
    bool released = false;
    for (uint32_t row = 0; row < s->num_rows; row++) {
        lbgym_service_server *const server = &s->servers[row];
        if (!server->known || !server->removed) {
            continue;
        }
        s->waits[row] = (uint8_t)(s->waits[row] - (s->waits[row] > 0));
        if (s->waits[row] == 0 && s->statuses[row].counters.entries == 0) {
            memset(server, 0, sizeof *server);
            s->generations[row]++;
            released = true;
        }
    }
    return released;
}

int lbgym_service_work(lbgym_service *s)
{
    const lbgym_shm_region *const region = &s->publisher.driver.region;
    int code = lbgym_publisher_work(&s->publisher);
    if (code < 0) {
        return shared_memory_failed(s, code);
    }
    if (code == 0) {
        return 0;
    }
    s->published++;
    for (uint32_t row = 0; row < s->num_rows; row++) {
        lbgym_core_read(s->core, row, &s->statuses[row].counters, NULL);
        memcpy(s->statuses[row].features, region->observation.stats + (size_t)row * LBGYM_SHM_NUM_FEATURES,
               sizeof s->statuses[row].features);
    }
    lbgym_core_read_totals(s->core, &s->totals);
    if (release(s)) {
        code = put_in_force(s);
    }
    return code < 0 ? code : 1;
}

uint32_t lbgym_service_rows(const lbgym_service *s)
{
    return s->num_rows;
}

bool lbgym_service_read(const lbgym_service *s, uint32_t row, lbgym_service_server *server, lbgym_service_status *status)
{
    if (row >= s->num_rows) {
        return false;
    }
    if (server != NULL) {
        *server = s->servers[row];
    }
    if (status != NULL) {
        *status = s->statuses[row];
        status->weight = s->publisher.driver.region.observation.weights[row];
    }
    return true;
}

void lbgym_service_summarize(const lbgym_service *s, lbgym_service_summary *summary)
{
    const lbgym_shm_region *const region = &s->publisher.driver.region;
    memset(summary, 0, sizeof *summary);
    summary->published = s->published;
    summary->missed = s->publisher.missed + s->publisher.driver.left_out;
    summary->applied = region->observation.frame->applied_sequence_id;
    summary->has_agent = !region->safe;
    summary->totals = s->totals;
}
