/* SPDX-License-Identifier: Apache-2.0 */
/* VIPs and servers in the FIB, and the process that publishes. */
#include "lbgym.h"

#include <vnet/adj/adj_nbr.h>
#include <vnet/dpo/load_balance.h>
#include <vnet/feature/feature.h>
#include <vnet/fib/fib_entry.h>
#include <vnet/fib/fib_table.h>
#include <vnet/ip-neighbor/ip_neighbor.h>
#include <vnet/plugin/plugin.h>
#include <vlib/stats/stats.h>
#include <vpp/app/version.h>

#ifdef LBGYM_HANDOFF_QUEUES
#include <vlib/handoff.h>
#endif

#define NANOSECONDS 1000000000ull
/* Longest wait for an agent's weights, which wake nobody here. */
#define MOMENT 2e-3
/* Between ticks of workers, which look at their timers. */
#define TICK 10e-3

lbgym_main_t lbgym_main;

/* What callers need */

u64 lbgym_nanoseconds(f64 seconds)
{
    return seconds > 0.0 && seconds < 1e9 ? (u64)(seconds * 1e9 + 0.5) : 0;
}

void lbgym_address_of(ip_address_t *address, const u32 words[4], int is_ipv6)
{
    clib_memset(address, 0, sizeof *address);
    ip_address_set(address, words, is_ipv6 ? AF_IP6 : AF_IP4);
}

void lbgym_words_of(u32 words[4], const ip_address_t *address)
{
    clib_memset(words, 0, 16);
    clib_memcpy(words, ip_addr_bytes((ip_address_t *)address), ip_address_size(address));
}

u32 lbgym_state_of(const lbgym_service_server *server)
{
    /* As the publisher says it: unknown is for nobody, as there are no health checks. */
    return !server->known || !server->reachable ? 3 : server->drained || server->removed ? 2 : 1;
}

lbgym_vip_t *lbgym_vip_find(const char *name)
{
    lbgym_vip_t *vip;
    pool_foreach (vip, lbgym_main.vips) {
        if (strcmp(lbgym_service_name(vip->service), name) == 0) {
            return vip;
        }
    }
    return NULL;
}

__attribute__((format(printf, 3, 4))) static int fail(char *message, int code, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    (void)vsnprintf(message, LBGYM_SERVICE_MESSAGE, format, arguments);
    va_end(arguments);
    return code;
}

static int error_of(int code)
{
    switch (code) {
    case LBGYM_SERVICE_UNKNOWN:
        return VNET_API_ERROR_NO_SUCH_ENTRY;
    case LBGYM_SERVICE_EXISTS:
        return VNET_API_ERROR_VALUE_EXIST;
    case LBGYM_SERVICE_FULL:
        return VNET_API_ERROR_LIMIT_EXCEEDED;
    case LBGYM_SERVICE_SYSTEM:
        return VNET_API_ERROR_SYSCALL_ERROR_1;
    default:
        return VNET_API_ERROR_INVALID_VALUE;
    }
}

static int service_failed(const lbgym_service *service, int code, char *message)
{
    return fail(message, error_of(code), "%s", lbgym_service_message(service));
}

static void prefix_of(fib_prefix_t *prefix, const u32 words[4], int is_ipv6)
{
    ip_address_t address;
    ip46_address_t both;
    lbgym_address_of(&address, words, is_ipv6);
    (void)ip_address_to_46(&address, &both);
    clib_memset(prefix, 0, sizeof *prefix);
    prefix->fp_proto = is_ipv6 ? FIB_PROTOCOL_IP6 : FIB_PROTOCOL_IP4;
    prefix->fp_len = is_ipv6 ? 128 : 32;
    prefix->fp_addr = both;
}

static dpo_proto_t proto_of(const lbgym_vip_t *vip)
{
    return vip->is_ipv6 ? DPO_PROTO_IP6 : DPO_PROTO_IP4;
}

/* The way to servers */

static void leave_adjacency(lbgym_server_t *server)
{
    if (server->adjacency != ADJ_INDEX_INVALID) {
        adj_child_remove(server->adjacency, server->adjacency_sibling);
        adj_unlock(server->adjacency);
        server->adjacency = ADJ_INDEX_INVALID;
    }
}

/* With DSR: to the neighbour, by an adjacency of its own, as packets keep the VIP's address, and the interface of the
 * server's route. */
static bool stack_on_neighbour(lbgym_vip_t *vip, lbgym_server_t *server)
{
    const u32 sw_if_index = fib_entry_get_resolving_interface(server->fib_entry);
    dpo_id_t parent = DPO_INVALID;
    adj_index_t adjacency;
    if (sw_if_index == ~0) {
        leave_adjacency(server);
        dpo_reset(&vip->dpos[server->row]);
        return false;
    }
    adjacency = adj_nbr_add_or_lock(server->is_ipv6 ? FIB_PROTOCOL_IP6 : FIB_PROTOCOL_IP4,
                                    vip->is_ipv6 ? VNET_LINK_IP6 : VNET_LINK_IP4, &server->address, sw_if_index);
    if (adjacency == server->adjacency) {
        adj_unlock(adjacency);
    } else {
        leave_adjacency(server);
        server->adjacency = adjacency;
        server->adjacency_sibling =
            adj_child_add(adjacency, lbgym_main.fib_node_type, (u32)(server - lbgym_main.servers));
    }
    dpo_set(&parent, DPO_ADJACENCY, proto_of(vip), adjacency);
    dpo_stack(lbgym_main.dpo_type, proto_of(vip), &vip->dpos[server->row], &parent);
    dpo_reset(&parent);
    return true;
}

static void stack(lbgym_server_t *server)
{
    lbgym_vip_t *const vip = pool_elt_at_index(lbgym_main.vips, server->vip);
    bool reachable;
    if (vip->mode == LBGYM_DSR) {
        reachable = stack_on_neighbour(vip, server);
    } else {
        const dpo_id_t *const route = fib_entry_contribute_ip_forwarding(server->fib_entry);
        dpo_stack(lbgym_main.dpo_type, proto_of(vip), &vip->dpos[server->row], route);
        reachable = !load_balance_is_drop(route);
    }
    (void)lbgym_service_reach(vip->service, server->row, reachable);
}

static fib_node_t *get_node(fib_node_index_t index)
{
    return &pool_elt_at_index(lbgym_main.servers, index)->fib_node;
}

static void last_lock_gone(fib_node_t *node)
{
}

static fib_node_back_walk_rc_t walk_back(fib_node_t *node, fib_node_back_walk_ctx_t *ctx)
{
    stack((lbgym_server_t *)((u8 *)node - STRUCT_OFFSET_OF(lbgym_server_t, fib_node)));
    return FIB_NODE_BACK_WALK_CONTINUE;
}

static const char *const gauge_names[] = {
#define _(name) #name,
    foreach_lbgym_gauge
#undef _
};
static const char *const total_names[] = {
#define _(name) #name,
    foreach_lbgym_total
#undef _
};
STATIC_ASSERT(ARRAY_LEN(total_names) == LBGYM_NUM_TOTALS, "totals of the core");

static void attach(lbgym_vip_t *vip, u32 row)
{
    lbgym_service_server configured;
    lbgym_server_t *server;
    fib_prefix_t prefix;
    (void)lbgym_service_read(vip->service, row, &configured, NULL);
    pool_get_zero(lbgym_main.servers, server);
    fib_node_init(&server->fib_node, lbgym_main.fib_node_type);
    prefix_of(&prefix, configured.address, configured.is_ipv6);
    server->vip = (u32)(vip - lbgym_main.vips);
    server->row = row;
    server->address = prefix.fp_addr;
    server->is_ipv6 = configured.is_ipv6;
    server->adjacency = ADJ_INDEX_INVALID;
    vip->servers[row] = (u32)(server - lbgym_main.servers);
    server->fib_entry = fib_table_entry_special_add(0, &prefix, FIB_SOURCE_RR, FIB_ENTRY_FLAG_NONE);
    server->fib_sibling = fib_entry_child_add(server->fib_entry, lbgym_main.fib_node_type, vip->servers[row]);
    for (u32 i = 0; i < LBGYM_NUM_GAUGES; i++) {
        server->gauges[i] = vlib_stats_add_gauge("/lbgym/%s/%s/%s", lbgym_service_name(vip->service), configured.name,
                                                 gauge_names[i]);
    }
    stack(server);
    /* So that the first packet need not wait. */
    if (server->adjacency != ADJ_INDEX_INVALID && adj_get(server->adjacency)->lookup_next_index == IP_LOOKUP_NEXT_ARP) {
        ip_neighbor_probe(adj_get(server->adjacency));
    }
}

/* Workers are stopped. */
static void detach(lbgym_vip_t *vip, u32 row)
{
    lbgym_server_t *const server = pool_elt_at_index(lbgym_main.servers, vip->servers[row]);
    dpo_reset(&vip->dpos[row]);
    leave_adjacency(server);
    fib_entry_child_remove(server->fib_entry, server->fib_sibling);
    fib_table_entry_delete_index(server->fib_entry, FIB_SOURCE_RR);
    for (u32 i = 0; i < LBGYM_NUM_GAUGES; i++) {
        vlib_stats_remove_entry(server->gauges[i]);
    }
    vip->servers[row] = ~0;
    fib_node_deinit(&server->fib_node);
    pool_put(lbgym_main.servers, server);
}

/* VIPs */

static void lock_dpo(dpo_id_t *dpo)
{
}

static u8 *format_dpo(u8 *s, va_list *arguments)
{
    const index_t index = va_arg(*arguments, index_t);
    CLIB_UNUSED(u32 indent) = va_arg(*arguments, u32);
    const lbgym_address_t *const address = pool_elt_at_index(lbgym_main.addresses, index);
    u32 *vip;
    s = format(s, "lbgym:");
    vec_foreach (vip, address->vips) {
        s = format(s, " %s", lbgym_service_name(lbgym_main.vips[*vip].service));
    }
    return s;
}

/* The index of a VIP's address, which is added if it is new. */
static u32 enter_address(const lbgym_vip *key)
{
    lbgym_address_t *address;
    dpo_id_t dpo = DPO_INVALID;
    fib_prefix_t prefix;
    prefix_of(&prefix, key->address, key->is_ipv6);
    pool_foreach (address, lbgym_main.addresses) {
        if (fib_prefix_cmp(&address->prefix, &prefix) == 0) {
            return (u32)(address - lbgym_main.addresses);
        }
    }
    pool_get_zero(lbgym_main.addresses, address);
    address->prefix = prefix;
    dpo_set(&dpo, lbgym_main.dpo_type, key->is_ipv6 ? DPO_PROTO_IP6 : DPO_PROTO_IP4,
            (index_t)(address - lbgym_main.addresses));
    (void)fib_table_entry_special_dpo_add(0, &prefix, lbgym_main.fib_source, FIB_ENTRY_FLAG_EXCLUSIVE, &dpo);
    dpo_reset(&dpo);
    return (u32)(address - lbgym_main.addresses);
}

static void remove_from(u32 **list, u32 value)
{
    const u32 at = vec_search(*list, value);
    if (at != ~0) {
        vec_delete(*list, 1, at);
    }
}

static int check_address(const lbgym_vip *key, char *message)
{
    fib_node_index_t entry;
    fib_prefix_t prefix;
    const u8 first = *(const u8 *)key->address;
    if ((key->address[0] | key->address[1] | key->address[2] | key->address[3]) == 0 ||
        (key->is_ipv6 ? first == 0xFF : first >= 224)) {
        return fail(message, VNET_API_ERROR_INVALID_DST_ADDRESS, "a VIP needs a unicast address");
    }
    prefix_of(&prefix, key->address, key->is_ipv6);
    entry = fib_table_lookup_exact_match(0, &prefix);
    if (entry != FIB_NODE_INDEX_INVALID && (fib_entry_get_flags(entry) & FIB_ENTRY_FLAG_LOCAL) != 0) {
        return fail(message, VNET_API_ERROR_ADDRESS_IN_USE, "a VIP cannot have the address of an interface of VPP");
    }
    return 0;
}

static void make_queues(void)
{
    const vlib_node_registration_t *const nodes[] = {&lbgym4_node, &lbgym6_node, &lbgym4_return_node,
                                                     &lbgym6_return_node};
    for (u32 i = 0; i < ARRAY_LEN(nodes) && lbgym_main.queues[i] == ~0; i++) {
#ifdef LBGYM_HANDOFF_QUEUES
        lbgym_main.queues[i] =
            vlib_handoff_alloc_queues(&(vlib_handoff_alloc_queues_args_t){.node_index = nodes[i]->index});
#else
        lbgym_main.queues[i] = vlib_frame_queue_main_init(nodes[i]->index, 0);
#endif
    }
}

int lbgym_vip_add(const char *name, const lbgym_service_options *wanted, char *message)
{
    const lbgym_vip *const key = &wanted->vip;
    lbgym_service_options options = *wanted;
    lbgym_service *service;
    lbgym_vip_t *vip;
    u32 index;
    int code;
    if (lbgym_vip_find(name) != NULL) {
        return fail(message, VNET_API_ERROR_VALUE_EXIST, "there is a VIP '%s' already", name);
    }
    pool_foreach (vip, lbgym_main.vips) {
        if (memcmp(&lbgym_service_configured(vip->service)->vip, key, sizeof *key) == 0) {
            return fail(message, VNET_API_ERROR_VALUE_EXIST, "VIP '%s' has the same address, port and protocol",
                        lbgym_service_name(vip->service));
        }
    }
    code = check_address(key, message);
    if (code != 0) {
        return code;
    }
    /* A worker of the core for every thread; with several, flows of a NAT belong to all but the main one. */
    options.core.workers = vlib_get_n_threads();
    options.core.owners = options.core.mode == LBGYM_NAT ? options.core.workers - 1 : 0;
    options.driver = "vpp";
    code = lbgym_service_create(&service, name, &options, message, LBGYM_SERVICE_MESSAGE);
    if (code < 0) {
        return error_of(code);
    }
    pool_get_zero(lbgym_main.vips, vip);
    index = (u32)(vip - lbgym_main.vips);
    vip->service = service;
    vip->mode = options.core.mode;
    vip->is_ipv6 = key->is_ipv6;
    for (u32 i = 0; i < options.core.workers; i++) {
        vec_add1(vip->workers, lbgym_core_worker(lbgym_service_core(service), i));
    }
    vec_validate_init_empty(vip->servers, options.core.servers - 1, ~0);
    vec_validate(vip->dpos, options.core.servers - 1);
    for (u32 row = 0; row < options.core.servers; row++) {
        vip->dpos[row] = (dpo_id_t)DPO_INVALID;
    }
    for (u32 i = 0; i < LBGYM_NUM_TOTALS; i++) {
        vip->gauges[i] = vlib_stats_add_gauge("/lbgym/%s/%s", name, total_names[i]);
    }
    vip->address = enter_address(key);
    vec_add1(pool_elt_at_index(lbgym_main.addresses, vip->address)->vips, index);
    if (vip->mode == LBGYM_NAT) {
        if (options.core.workers > 1) {
            make_queues();
        }
        vec_add1(lbgym_main.translating, index);
    }
    vlib_process_signal_event(vlib_get_main(), lbgym_process_node.index, 0, 0);
    return 0;
}

static int no_vip(const char *name, char *message)
{
    return fail(message, VNET_API_ERROR_NO_SUCH_ENTRY, "there is no VIP '%.63s'", name);
}

int lbgym_vip_del(const char *name, char *message)
{
    lbgym_vip_t *const vip = lbgym_vip_find(name);
    lbgym_address_t *address;
    if (vip == NULL) {
        return no_vip(name, message);
    }
    address = pool_elt_at_index(lbgym_main.addresses, vip->address);
    remove_from(&address->vips, (u32)(vip - lbgym_main.vips));
    remove_from(&lbgym_main.translating, (u32)(vip - lbgym_main.vips));
    if (vec_len(address->vips) == 0) {
        fib_table_entry_special_remove(0, &address->prefix, lbgym_main.fib_source);
        vec_free(address->vips);
        pool_put(lbgym_main.addresses, address);
    }
    for (u32 row = 0; row < vec_len(vip->servers); row++) {
        if (vip->servers[row] != ~0) {
            detach(vip, row);
        }
    }
    for (u32 i = 0; i < LBGYM_NUM_TOTALS; i++) {
        vlib_stats_remove_entry(vip->gauges[i]);
    }
    lbgym_service_destroy(vip->service);
    vec_free(vip->workers);
    vec_free(vip->servers);
    vec_free(vip->dpos);
    pool_put(lbgym_main.vips, vip);
    return 0;
}

/* A server that answers two VIPs with NAT by the same port would have flows that its packets cannot tell apart. */
static int check_place(const lbgym_vip_t *vip, const lbgym_service_server *new, char *message)
{
    u32 *index;
    vec_foreach (index, lbgym_main.translating) {
        const lbgym_vip_t *const other = pool_elt_at_index(lbgym_main.vips, *index);
        lbgym_service_server server;
        for (u32 row = 0; other != vip && lbgym_service_read(other->service, row, &server, NULL); row++) {
            if (server.known && server.is_ipv6 == new->is_ipv6 && server.port == new->port &&
                memcmp(server.address, new->address, sizeof server.address) == 0) {
                return fail(message, VNET_API_ERROR_VALUE_EXIST, "server '%s' of VIP '%s' has the same address and port",
                            server.name, lbgym_service_name(other->service));
            }
        }
    }
    return 0;
}

int lbgym_server_add(const char *vip_name, const lbgym_service_server *server, u32 *row, char *message)
{
    lbgym_vip_t *const vip = lbgym_vip_find(vip_name);
    int code;
    if (vip == NULL) {
        return no_vip(vip_name, message);
    }
    code = vip->mode == LBGYM_NAT ? check_place(vip, server, message) : 0;
    if (code != 0) {
        return code;
    }
    code = lbgym_service_add(vip->service, server);
    if (code < 0) {
        return service_failed(vip->service, code, message);
    }
    *row = (u32)code;
    if (vip->servers[*row] == ~0) {
        attach(vip, *row);
    }
    return 0;
}

/* The row of a server, or a negative VNET_API_ERROR. */
static int find(const char *vip_name, const char *name, lbgym_vip_t **vip, char *message)
{
    int row;
    *vip = lbgym_vip_find(vip_name);
    if (*vip == NULL) {
        return no_vip(vip_name, message);
    }
    row = lbgym_service_find((*vip)->service, name);
    return row < 0 ? service_failed((*vip)->service, row, message) : row;
}

int lbgym_server_del(const char *vip_name, const char *name, char *message)
{
    lbgym_vip_t *vip;
    const int row = find(vip_name, name, &vip, message);
    const int code = row < 0 ? 0 : lbgym_service_remove(vip->service, (u32)row);
    return row < 0 ? row : code < 0 ? service_failed(vip->service, code, message) : 0;
}

int lbgym_server_set(const char *vip_name, const char *name, const f64 *weight, int drained, char *message)
{
    lbgym_vip_t *vip;
    const int row = find(vip_name, name, &vip, message);
    int code = 0;
    if (row < 0) {
        return row;
    }
    if (weight != NULL) {
        code = lbgym_service_set_weight(vip->service, (u32)row, *weight);
    }
    if (code >= 0 && drained >= 0) {
        code = lbgym_service_drain(vip->service, (u32)row, drained != 0);
    }
    return code < 0 ? service_failed(vip->service, code, message) : 0;
}

int lbgym_interface_enable(u32 sw_if_index, int enable, char *message)
{
    int code;
    if (vnet_get_sw_interface_or_null(vnet_get_main(), sw_if_index) == NULL) {
        return fail(message, VNET_API_ERROR_INVALID_SW_IF_INDEX, "there is no interface %u", sw_if_index);
    }
    vec_validate(lbgym_main.interfaces, sw_if_index);
    if (lbgym_main.interfaces[sw_if_index] == (enable != 0)) {
        return 0;
    }
    code = vnet_feature_enable_disable("ip4-unicast", "lbgym4-return", sw_if_index, enable, NULL, 0);
    if (code == 0) {
        code = vnet_feature_enable_disable("ip6-unicast", "lbgym6-return", sw_if_index, enable, NULL, 0);
    }
    if (code != 0) {
        return fail(message, code, "interface %u takes no feature of IP", sw_if_index);
    }
    lbgym_main.interfaces[sw_if_index] = enable != 0;
    return 0;
}

/* An interface of this number that comes later is another one. */
static clib_error_t *forget_interface(vnet_main_t *vnm, u32 sw_if_index, u32 is_add)
{
    char message[LBGYM_SERVICE_MESSAGE];
    if (!is_add && sw_if_index < vec_len(lbgym_main.interfaces)) {
        (void)lbgym_interface_enable(sw_if_index, 0, message);
    }
    return NULL;
}

VNET_SW_INTERFACE_ADD_DEL_FUNCTION(forget_interface);

/* Publication */

static void show_in_stats(lbgym_vip_t *vip)
{
    lbgym_service_summary summary;
    lbgym_service_summarize(vip->service, &summary);
    for (u32 i = 0; i < LBGYM_NUM_TOTALS; i++) {
        vlib_stats_set_gauge(vip->gauges[i], ((const u64 *)&summary.totals)[i]);
    }
    for (u32 row = 0; row < lbgym_service_rows(vip->service); row++) {
        lbgym_service_status status;
        if (vip->servers[row] == ~0) {
            continue;
        }
        (void)lbgym_service_read(vip->service, row, NULL, &status);
#define _(name)                                                                                                        \
    vlib_stats_set_gauge(lbgym_main.servers[vip->servers[row]].gauges[LBGYM_GAUGE_##name], status.counters.name);
        foreach_lbgym_gauge
#undef _
    }
}

/* Servers that have left have no way any more. */
static void release(vlib_main_t *vm, lbgym_vip_t *vip)
{
    for (u32 row = 0; row < lbgym_service_rows(vip->service); row++) {
        lbgym_service_server server;
        (void)lbgym_service_read(vip->service, row, &server, NULL);
        if (!server.known && vip->servers[row] != ~0) {
            vlib_worker_thread_barrier_sync(vm);
            detach(vip, row);
            vlib_worker_thread_barrier_release(vm);
        }
    }
}

/* Returns seconds until there is something to do. */
static f64 work(vlib_main_t *vm)
{
    static f64 next_tick;
    const f64 now = vlib_time_now(vm);
    f64 left = MOMENT;
    bool tick = now >= next_tick;
    lbgym_vip_t *vip;
    pool_foreach (vip, lbgym_main.vips) {
        const int code = lbgym_service_work(vip->service);
        f64 of_vip;
        if (code < 0 && !vip->failed) {
            vlib_log_err(lbgym_main.log_class, "%s: %s", lbgym_service_name(vip->service),
                         lbgym_service_message(vip->service));
        }
        vip->failed = code < 0;
        if (code > 0) {
            release(vm, vip);
            show_in_stats(vip);
        }
        of_vip = (f64)lbgym_service_left(vip->service) * 1e-9;
        left = clib_min(left, of_vip);
        tick = tick || lbgym_service_waits(vip->service);
    }
    if (tick) {
        next_tick = now + TICK;
        for (u32 i = 0; i < vlib_get_n_threads(); i++) {
            vlib_node_set_interrupt_pending(vlib_get_main_by_index(i), lbgym_tick_node.index);
        }
    }
    return clib_max(left, 1e-4);
}

static uword lbgym_process(vlib_main_t *vm, vlib_node_runtime_t *node, vlib_frame_t *frame)
{
    f64 left = 0.0;
    for (;;) {
        if (pool_elts(lbgym_main.vips) == 0) {
            vlib_process_wait_for_event(vm);
        } else {
            vlib_process_wait_for_event_or_clock(vm, left);
        }
        vlib_process_get_events(vm, NULL);
        left = work(vm);
    }
    return 0;
}

VLIB_REGISTER_NODE(lbgym_process_node) = {
    .function = lbgym_process,
    .type = VLIB_NODE_TYPE_PROCESS,
    .name = "lbgym-process",
    .process_log2_n_stack_bytes = 17,
};

static const char *const nodes4[] = {"lbgym4", NULL};
static const char *const nodes6[] = {"lbgym6", NULL};
static const char *const *const dpo_nodes[DPO_PROTO_NUM] = {
    [DPO_PROTO_IP4] = nodes4,
    [DPO_PROTO_IP6] = nodes6,
};

static clib_error_t *lbgym_init(vlib_main_t *vm)
{
    static const dpo_vft_t dpo_functions = {.dv_lock = lock_dpo, .dv_unlock = lock_dpo, .dv_format = format_dpo};
    static const fib_node_vft_t node_functions = {
        .fnv_get = get_node, .fnv_last_lock = last_lock_gone, .fnv_back_walk = walk_back};
    lbgym_main.dpo_type = dpo_register_new_type(&dpo_functions, dpo_nodes);
    lbgym_main.fib_node_type = fib_node_register_new_type("lbgym", &node_functions);
    lbgym_main.fib_source = fib_source_allocate("lbgym", FIB_SOURCE_PRIORITY_HI, FIB_SOURCE_BH_SIMPLE);
    lbgym_main.log_class = vlib_log_register_class("lbgym", 0);
    clib_memset(lbgym_main.queues, 0xFF, sizeof lbgym_main.queues);
    return NULL;
}

VLIB_INIT_FUNCTION(lbgym_init);

/* Regions are removed with their process; agents see the end at once if it is orderly. */
static clib_error_t *lbgym_exit(vlib_main_t *vm)
{
    lbgym_vip_t *vip;
    pool_foreach (vip, lbgym_main.vips) {
        lbgym_service_retire(vip->service);
    }
    return NULL;
}

VLIB_MAIN_LOOP_EXIT_FUNCTION(lbgym_exit);

VLIB_PLUGIN_REGISTER() = {
    .version = VPP_BUILD_VER,
    .description = "lbgym: a load balancer that agents drive through shared memory",
};
