/* SPDX-License-Identifier: Apache-2.0 */
/* Messages of lbgym.api. */
#include "lbgym.h"

#include <vnet/ip/ip_types_api.h>
#include <vnet/format_fns.h>
#include <vlibapi/api.h>
#include <vlibmemory/api.h>

#include <lbgym.api_enum.h>
#include <lbgym.api_types.h>

#define REPLY_MSG_ID_BASE lbgym_main.msg_id_base
#include <vlibapi/api_helper_macros.h>

/* The reply to a request, with a sentence. */
#define REPLY(name, ...)                                                                                               \
    do {                                                                                                               \
        REPLY_MACRO2(name, ({                                                                                          \
                         clib_memset(rmp->message, 0, sizeof rmp->message);                                            \
                         (void)snprintf((char *)rmp->message, sizeof rmp->message, "%s", rv == 0 ? "" : message);      \
                         __VA_ARGS__;                                                                                  \
                     }));                                                                                              \
    } while (0)

/* A text of a message, which need not end in it. False: it does not, or is empty. */
#define TEXT(to, from) text((to), sizeof(to), (from), sizeof(from))

static bool text(char *to, size_t size, const u8 *from, size_t length)
{
    const size_t used = strnlen((const char *)from, length);
    if (used == 0 || used >= length || used >= size) {
        to[0] = '\0';
        return false;
    }
    memcpy(to, from, used + 1);
    return true;
}

static int bad(char *message, const char *what)
{
    (void)snprintf(message, LBGYM_SERVICE_MESSAGE, "%s", what);
    return VNET_API_ERROR_INVALID_VALUE;
}

static const char names_are_missing[] = "names must have 1 to 63 characters";

static bool decode(u32 words[4], u8 *is_ipv6, const vl_api_address_t *from)
{
    ip_address_t address;
    if (from->af != ADDRESS_IP4 && from->af != ADDRESS_IP6) {
        return false;
    }
    ip_address_decode2(from, &address);
    lbgym_words_of(words, &address);
    *is_ipv6 = ip_addr_version(&address) == AF_IP6;
    return true;
}

static void encode(vl_api_address_t *to, const u32 words[4], int is_ipv6)
{
    ip_address_t address;
    lbgym_address_of(&address, words, is_ipv6);
    ip_address_encode2(&address, to);
}

static int decode_vip(lbgym_service_options *options, const vl_api_lbgym_vip_add_t *mp, char *message)
{
    char rule[32];
    int number = LBGYM_SED;
    if (!decode(options->vip.address, &options->vip.is_ipv6, &mp->address)) {
        return bad(message, "the address must be one of IPv4 or IPv6");
    }
    if (mp->rule[0] != '\0' && (!TEXT(rule, mp->rule) || (number = lbgym_rule_named(rule)) < 0)) {
        return bad(message, "there is no such dispatch rule");
    }
    options->vip.port = mp->port;
    options->vip.protocol = mp->protocol;
    options->rule = (lbgym_rule)number;
    options->balancers = ntohl(mp->balancers);
    options->permissions = ntohl(mp->permissions);
    options->publish_interval = lbgym_nanoseconds(mp->interval);
    options->core.mode = mp->mode;
    options->core.servers = ntohl(mp->servers);
    options->core.flows = ntohl(mp->flows);
    options->core.syn_flows = ntohl(mp->syn_flows);
    options->core.syn_timeout = lbgym_nanoseconds(mp->syn_timeout);
    options->core.idle_timeout = lbgym_nanoseconds(mp->idle_timeout);
    options->core.udp_timeout = lbgym_nanoseconds(mp->udp_timeout);
    options->core.close_timeout = lbgym_nanoseconds(mp->close_timeout);
    options->core.fct_sampling = mp->fct_sampling;
    options->core.duration_sampling = mp->duration_sampling;
    clib_memcpy(&options->core.source4, mp->source4, sizeof options->core.source4);
    clib_memcpy(options->core.source6, mp->source6, sizeof options->core.source6);
    return 0;
}

static void vl_api_lbgym_vip_add_t_handler(vl_api_lbgym_vip_add_t *mp)
{
    vl_api_lbgym_vip_add_reply_t *rmp;
    lbgym_service_options options = lbgym_service_default_options();
    char message[LBGYM_SERVICE_MESSAGE] = "", name[LBGYM_SERVICE_NAME];
    int rv = TEXT(name, mp->name) ? decode_vip(&options, mp, message) : bad(message, names_are_missing);
    if (rv == 0) {
        rv = lbgym_vip_add(name, &options, message);
    }
    REPLY(VL_API_LBGYM_VIP_ADD_REPLY);
}

static void vl_api_lbgym_vip_del_t_handler(vl_api_lbgym_vip_del_t *mp)
{
    vl_api_lbgym_vip_del_reply_t *rmp;
    char message[LBGYM_SERVICE_MESSAGE] = "", name[LBGYM_SERVICE_NAME];
    int rv = TEXT(name, mp->name) ? lbgym_vip_del(name, message) : bad(message, names_are_missing);
    REPLY(VL_API_LBGYM_VIP_DEL_REPLY);
}

static void vl_api_lbgym_server_add_t_handler(vl_api_lbgym_server_add_t *mp)
{
    vl_api_lbgym_server_add_reply_t *rmp;
    char message[LBGYM_SERVICE_MESSAGE] = "", vip[LBGYM_SERVICE_NAME];
    lbgym_service_server server = {.port = mp->port, .weight = mp->weight, .cores = mp->cores};
    u32 row = ~0;
    int rv = 0;
    if (!TEXT(vip, mp->vip) || !TEXT(server.name, mp->name)) {
        rv = bad(message, names_are_missing);
    } else if (!decode(server.address, &server.is_ipv6, &mp->address)) {
        rv = bad(message, "the address must be one of IPv4 or IPv6");
    } else {
        rv = lbgym_server_add(vip, &server, &row, message);
    }
    REPLY(VL_API_LBGYM_SERVER_ADD_REPLY, rmp->row = htonl(row));
}

static void vl_api_lbgym_server_del_t_handler(vl_api_lbgym_server_del_t *mp)
{
    vl_api_lbgym_server_del_reply_t *rmp;
    char message[LBGYM_SERVICE_MESSAGE] = "", vip[LBGYM_SERVICE_NAME], name[LBGYM_SERVICE_NAME];
    int rv = TEXT(vip, mp->vip) && TEXT(name, mp->name) ? lbgym_server_del(vip, name, message)
                                                        : bad(message, names_are_missing);
    REPLY(VL_API_LBGYM_SERVER_DEL_REPLY);
}

static void vl_api_lbgym_server_set_t_handler(vl_api_lbgym_server_set_t *mp)
{
    vl_api_lbgym_server_set_reply_t *rmp;
    char message[LBGYM_SERVICE_MESSAGE] = "", vip[LBGYM_SERVICE_NAME], name[LBGYM_SERVICE_NAME];
    const f64 weight = mp->weight;
    int rv = TEXT(vip, mp->vip) && TEXT(name, mp->name) ? lbgym_server_set(vip, name, &weight, mp->drained, message)
                                                        : bad(message, names_are_missing);
    REPLY(VL_API_LBGYM_SERVER_SET_REPLY);
}

static void vl_api_lbgym_interface_enable_disable_t_handler(vl_api_lbgym_interface_enable_disable_t *mp)
{
    vl_api_lbgym_interface_enable_disable_reply_t *rmp;
    char message[LBGYM_SERVICE_MESSAGE] = "";
    int rv = lbgym_interface_enable(ntohl(mp->sw_if_index), mp->enable, message);
    REPLY(VL_API_LBGYM_INTERFACE_ENABLE_DISABLE_REPLY);
}

/* Lists. An unknown name gives an empty one. */

static u64 net64(u64 value)
{
    return clib_host_to_net_u64(value);
}

static void set_text(u8 *to, size_t size, const char *from)
{
    clib_memset(to, 0, size);
    (void)snprintf((char *)to, size, "%s", from);
}

static void fill_vip(vl_api_lbgym_vip_details_t *to, const lbgym_vip_t *vip)
{
    const lbgym_service_options *const o = lbgym_service_configured(vip->service);
    lbgym_service_summary summary;
    lbgym_service_server server;
    u32 servers = 0;
    lbgym_service_summarize(vip->service, &summary);
    for (u32 row = 0; lbgym_service_read(vip->service, row, &server, NULL); row++) {
        servers += server.known;
    }
    set_text(to->name, sizeof to->name, lbgym_service_name(vip->service));
    encode(&to->address, o->vip.address, o->vip.is_ipv6);
    to->port = o->vip.port;
    to->protocol = o->vip.protocol;
    to->mode = vip->mode;
    set_text(to->rule, sizeof to->rule, lbgym_rule_name(o->rule));
    to->servers = htonl(servers);
    to->has_agent = summary.has_agent;
    to->published = net64(summary.published);
    to->missed = net64(summary.missed);
    to->applied = net64(summary.applied);
#define _(name) to->name = net64(summary.totals.name);
    foreach_lbgym_total
#undef _
}

static void fill_server(vl_api_lbgym_server_details_t *to, const lbgym_vip_t *vip, u32 row)
{
    lbgym_service_server server;
    lbgym_service_status status;
    (void)lbgym_service_read(vip->service, row, &server, &status);
    set_text(to->vip, sizeof to->vip, lbgym_service_name(vip->service));
    set_text(to->name, sizeof to->name, server.name);
    to->row = htonl(row);
    encode(&to->address, server.address, server.is_ipv6);
    to->port = server.port;
    to->state = lbgym_state_of(&server);
    to->drained = server.drained;
    to->removed = server.removed;
    to->weight = status.weight;
    to->configured_weight = server.weight;
    to->cores = server.cores;
    to->open_flows = net64(status.counters.open);
    to->started = net64(status.counters.started);
    to->completed = net64(status.counters.completed);
    to->rejected = net64(status.counters.rejected);
    to->failed = net64(status.counters.failed);
    to->entries = net64(status.counters.entries);
    to->fct_mean = status.features[1];
}

static void vl_api_lbgym_vip_dump_t_handler(vl_api_lbgym_vip_dump_t *mp)
{
    const u32 context = mp->context;
    vl_api_registration_t *const client = vl_api_client_index_to_registration(mp->client_index);
    char name[LBGYM_SERVICE_NAME];
    const bool all = mp->name[0] == '\0';
    lbgym_vip_t *vip;
    (void)TEXT(name, mp->name);
    pool_foreach (vip, lbgym_main.vips) {
        if (client != NULL && (all || strcmp(lbgym_service_name(vip->service), name) == 0)) {
            vl_api_lbgym_vip_details_t *rmp;
            REPLY_MACRO_DETAILS4(VL_API_LBGYM_VIP_DETAILS, client, context, fill_vip(rmp, vip));
        }
    }
}

static void vl_api_lbgym_server_dump_t_handler(vl_api_lbgym_server_dump_t *mp)
{
    const u32 context = mp->context;
    vl_api_registration_t *const client = vl_api_client_index_to_registration(mp->client_index);
    char name[LBGYM_SERVICE_NAME];
    const bool all = mp->vip[0] == '\0';
    lbgym_vip_t *vip;
    (void)TEXT(name, mp->vip);
    pool_foreach (vip, lbgym_main.vips) {
        const bool wanted = client != NULL && (all || strcmp(lbgym_service_name(vip->service), name) == 0);
        for (u32 row = 0; wanted && row < lbgym_service_rows(vip->service); row++) {
            vl_api_lbgym_server_details_t *rmp;
            lbgym_service_server server;
            (void)lbgym_service_read(vip->service, row, &server, NULL);
            if (server.known) {
                REPLY_MACRO_DETAILS4(VL_API_LBGYM_SERVER_DETAILS, client, context, fill_server(rmp, vip, row));
            }
        }
    }
}

#include <lbgym.api.c>

static clib_error_t *lbgym_api_init(vlib_main_t *vm)
{
    lbgym_main.msg_id_base = setup_message_id_table();
    /* It changes one number, in memory that no worker reads: no need to stop them. */
    vl_api_set_msg_thread_safe(vlibapi_get_main(), lbgym_main.msg_id_base + VL_API_LBGYM_SERVER_SET, 1);
    return NULL;
}

VLIB_INIT_FUNCTION(lbgym_api_init);
