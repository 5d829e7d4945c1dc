/* SPDX-License-Identifier: Apache-2.0 */
/* A service whose servers come, drain and go while flows begin and end: service NAME, the name of a region. */
#include "lbgym_publish.h"

#include "lbgym_service.h"

#include "common.h"

static lbgym_service *service;
static lbgym_worker *worker;
static uint64_t now = 100 * SECOND;

/* A packet of flow `number`; the row it goes to, or -1. */
static int send(uint32_t number, uint8_t flags)
{
    uint8_t memory[40] = {0x45, [9] = 6, [32] = 0x50};
    lbgym_packet packet;
    memset(&packet, 0, sizeof packet);
    packet.data = memory;
    packet.length = 40;
    put16(memory + 2, 40);
    memcpy(memory + 12, (const uint8_t[8]){11, 0, 0, 1, 10, 77, 1, 100}, 8);
    put16(memory + 20, number);
    put16(memory + 22, 80);
    memory[33] = flags;
    lbgym_worker_run(worker, &packet, 1, now);
    CHECK(packet.verdict == LBGYM_SEND || packet.verdict == LBGYM_DROP);
    CHECK(packet.verdict == LBGYM_DROP || packet.via == packet.server);
    return packet.verdict == LBGYM_SEND ? packet.server : -1;
}

/* Until so many observations have been published. */
static void publish(int observations)
{
    while (observations > 0) {
        const struct timespec pause = {0, (long)(lbgym_service_left(service) % 1000000)};
        const int code = lbgym_service_work(service);
        CHECK(code >= 0);
        observations -= code;
        (void)lbgym_worker_tick(worker, now, 1000);
        (void)nanosleep(&pause, NULL);
    }
}

static lbgym_service_server server(const char *name, uint8_t last)
{
    lbgym_service_server s;
    memset(&s, 0, sizeof s);
    (void)strcpy(s.name, name);
    memcpy(s.address, (const uint8_t[4]){10, 77, 2, last}, 4);
    s.weight = s.cores = 1.0;
    return s;
}

static int add(const char *name, uint8_t last)
{
    const lbgym_service_server s = server(name, last);
    const int row = lbgym_service_add(service, &s);
    return row < 0 || lbgym_service_reach(service, (uint32_t)row, true) == 0 ? row : -100;
}

static void refuses(int code, int expected, const char *sentence)
{
    if (code != expected || strstr(lbgym_service_message(service), sentence) == NULL) {
        (void)fprintf(stderr, "%d, not %d: %s; not: %s\n", code, expected, lbgym_service_message(service), sentence);
        exit(1);
    }
}

static void refuses_to_begin(const char *name, lbgym_service_options options, int expected, const char *sentence)
{
    char message[LBGYM_SERVICE_MESSAGE];
    lbgym_service *none;
    const int code = lbgym_service_create(&none, name, &options, message, sizeof message);
    if (code != expected || none != NULL || strstr(message, sentence) == NULL) {
        (void)fprintf(stderr, "%d, not %d: %s; not: %s\n", code, expected, message, sentence);
        exit(1);
    }
}

static void check_refusals(const char *name, lbgym_service_options options)
{
    lbgym_service_server s = server("new", 99);
    lbgym_service_options other = options;
    refuses_to_begin(name, options, LBGYM_SERVICE_EXISTS, "belongs to a live region");
    refuses_to_begin("a/b", options, LBGYM_SERVICE_VALUE, "a/b");
    other.vip.port = 0;
    refuses_to_begin("other", other, LBGYM_SERVICE_VALUE, "must have a port");
    other = options;
    other.core.flows = 3;
    refuses_to_begin("other", other, LBGYM_SERVICE_VALUE, "flows must be from 16");
    other = options;
    other.publish_interval = 0;
    refuses_to_begin("other", other, LBGYM_SERVICE_VALUE, "publish_interval_ns must be from 1,000");
    other.rule = LBGYM_NUM_RULES;
    refuses_to_begin("other", other, LBGYM_SERVICE_VALUE, "there is no dispatch rule");

    refuses(add("one", 40), LBGYM_SERVICE_EXISTS, "has a server 'one' already");
    refuses(add("other", 1), LBGYM_SERVICE_EXISTS, "has the same address as 'other'");
    refuses(lbgym_service_find(service, "nobody"), LBGYM_SERVICE_UNKNOWN, "has no server 'nobody'");
    refuses(lbgym_service_drain(service, 3000000000u, true), LBGYM_SERVICE_UNKNOWN, "no server in row 3000000000");
    refuses(lbgym_service_set_weight(service, 0, -1.0), LBGYM_SERVICE_VALUE, "finite and at least 0, got -1");
    refuses(lbgym_service_set_weight(service, 0, 1.0 / 0.0), LBGYM_SERVICE_VALUE, "got inf");
    s.name[0] = ' ';
    refuses(lbgym_service_add(service, &s), LBGYM_SERVICE_VALUE, "printable characters");
    memset(s.name, 'x', sizeof s.name);
    refuses(lbgym_service_add(service, &s), LBGYM_SERVICE_VALUE, "1 to 63 characters");
    s = server("new", 99);
    s.cores = 0.5;
    refuses(lbgym_service_add(service, &s), LBGYM_SERVICE_VALUE, "cores of server 'new' must be from 1");
    s = server("new", 99);
    *(uint8_t *)s.address = 224;
    refuses(lbgym_service_add(service, &s), LBGYM_SERVICE_VALUE, "needs a unicast address");
    memcpy(s.address, (const uint8_t[4]){10, 77, 1, 100}, 4);
    refuses(lbgym_service_add(service, &s), LBGYM_SERVICE_VALUE, "the address of the VIP itself");
}

/* What only encapsulation and NAT refuse. */
static void check_modes(lbgym_service_options options)
{
    char message[LBGYM_SERVICE_MESSAGE];
    lbgym_service *const before = service;
    lbgym_service_server s = server("new", 99);
    options.core.mode = LBGYM_GRE;
    CHECK(lbgym_service_create(&service, "encapsulates", &options, message, sizeof message) == 0);
    refuses(lbgym_service_add(service, &s), LBGYM_SERVICE_VALUE, "need an outer source address of IPv4");
    lbgym_service_destroy(service);
    options.core.mode = LBGYM_NAT;
    CHECK(lbgym_service_create(&service, "translates", &options, message, sizeof message) == 0);
    refuses(lbgym_service_add(service, &s), LBGYM_SERVICE_VALUE, "needs a port");
    s.port = s.is_ipv6 = 1;
    refuses(lbgym_service_add(service, &s), LBGYM_SERVICE_VALUE, "an address of IPv4 as the VIP");
    lbgym_service_destroy(service);
    service = before;
}

int main(int argc, char **argv)
{
    lbgym_service_options options = lbgym_service_default_options();
    lbgym_service_status status;
    lbgym_service_summary summary;
    lbgym_service_server s;
    char message[LBGYM_SERVICE_MESSAGE] = "";
    int of_flow[10], two = 0;
    CHECK(argc == 2);
    options.core.servers = 3;
    options.core.flows = 256;
    options.rule = LBGYM_LSQ;
    options.publish_interval = SECOND / 500;
    memcpy(options.vip.address, (const uint8_t[4]){10, 77, 1, 100}, 4);
    put16((uint8_t *)&options.vip.port, 80);
    if (lbgym_service_create(&service, argv[1], &options, message, sizeof message) < 0) {
        (void)fprintf(stderr, "%s\n", message);
        return 1;
    }
    worker = lbgym_core_worker(lbgym_service_core(service), 0);
    publish(1);
    CHECK(send(1, 2) == -1); /* nobody is there yet */
    s = server("one", 1);
    CHECK(lbgym_service_add(service, &s) == 0);
    CHECK(send(1, 2) == -1); /* nobody knows the way yet */
    CHECK(lbgym_service_reach(service, 0, true) == 0 && send(1, 2) == 0);
    CHECK(add("two", 2) == 1);
    check_refusals(argv[1], options);
    check_modes(options);
    for (uint32_t i = 0; i < 10; i++) {
        of_flow[i] = send(100 + i, 2);
        CHECK(send(100 + i, 0x10) == of_flow[i]);
        two += of_flow[i];
    }
    CHECK(two >= 5 && two <= 6);

    /* Drained, it keeps its flows and takes none. */
    CHECK(lbgym_service_drain(service, 1, true) == 0);
    for (uint32_t i = 0; i < 10; i++) {
        CHECK(send(200 + i, 2) == 0 && send(100 + i, 0x10) == of_flow[i]);
    }
    CHECK(lbgym_service_drain(service, 1, false) == 0 && send(300, 2) == 1);

    /* Removed, it keeps its row until its last flow is forgotten, and is taken back before. */
    CHECK(lbgym_service_remove(service, 1) == 0);
    refuses(lbgym_service_remove(service, 1), LBGYM_SERVICE_UNKNOWN, "is being removed already");
    refuses(lbgym_service_drain(service, 1, false), LBGYM_SERVICE_UNKNOWN, "is being removed");
    refuses(add("two", 77), LBGYM_SERVICE_EXISTS, "cannot move meanwhile");
    CHECK(add("two", 2) == 1 && send(301, 2) == 1);
    CHECK(lbgym_service_remove(service, 1) == 0 && add("three", 3) == 2);
    refuses(add("four", 4), LBGYM_SERVICE_FULL, "all 3 rows of");
    publish(3);
    CHECK(lbgym_service_find(service, "two") == 1);
    CHECK(lbgym_service_read(service, 1, NULL, &status));
    CHECK(status.counters.started == (uint64_t)two + 2 && status.counters.open == (uint64_t)two + 2);
    now += 1000 * SECOND;
    publish(3);
    CHECK(lbgym_service_find(service, "two") == LBGYM_SERVICE_UNKNOWN && add("four", 4) == 1);
    CHECK(lbgym_service_read(service, 1, &s, &status) && strcmp(s.name, "four") == 0 && !s.removed);
    publish(2);
    CHECK(lbgym_service_read(service, 1, NULL, &status) && status.counters.open == 0 && status.weight == 1.0);
    CHECK(lbgym_service_set_weight(service, 1, 0.0) == 0 && lbgym_service_set_weight(service, 0, 0.0) == 0);
    CHECK(lbgym_service_read(service, 1, NULL, &status) && status.weight == 0.0);
    CHECK(lbgym_service_set_weight(service, 2, 0.0) == 0);
    CHECK(lbgym_service_read(service, 1, NULL, &status) && status.weight == 1.0);
    CHECK(!lbgym_service_read(service, 3, NULL, NULL) && lbgym_service_rows(service) == 3);
    lbgym_service_summarize(service, &summary);
    CHECK(!summary.has_agent && summary.published >= 8 && summary.totals.unrouted == 2);
    CHECK(strcmp(lbgym_service_name(service), argv[1]) == 0);
    lbgym_service_destroy(service);
    return 0;
}
