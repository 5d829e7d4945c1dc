/* SPDX-License-Identifier: Apache-2.0 */
/* Commands: lbgym vip, lbgym server, lbgym interface, show lbgym. */
#include "lbgym.h"

#include <vnet/format_fns.h>

#include <ctype.h>
#include <stdlib.h>

#define WORD 256
/* VPP's own format writes all digits of a number. */
#define DIGITS 32

/* The next word; an error if there is none, or it is longer than `size`. */
static clib_error_t *next_word(unformat_input_t *input, const char *what, char *to, size_t size)
{
    size_t length = 0;
    uword c;
    while ((c = unformat_get_input(input)) != UNFORMAT_END_OF_INPUT && isspace((int)c)) {
    }
    for (; c != UNFORMAT_END_OF_INPUT && !isspace((int)c); c = unformat_get_input(input)) {
        if (length + 1 >= size) {
            return clib_error_return(0, "%s has at most %u characters", what, (u32)(size - 1));
        }
        to[length++] = (char)c;
    }
    to[length] = '\0';
    return length > 0 ? 0 : clib_error_return(0, "%s is missing", what);
}

static clib_error_t *number(unformat_input_t *input, const char *what, f64 low, f64 high, bool whole, int base,
                            f64 *value)
{
    char text[WORD], *end;
    clib_error_t *error = next_word(input, what, text, sizeof text);
    if (error != 0) {
        return error;
    }
    *value = whole ? (f64)strtoll(text, &end, base) : strtod(text, &end);
    if (*end != '\0' || !(*value >= low && *value <= high)) {
        char bounds[2 * DIGITS];
        (void)snprintf(bounds, sizeof bounds, "%.12g to %.12g", low, high);
        return clib_error_return(0, "%s must be %s from %s, got '%s'", what, whole ? "a whole number" : "a number",
                                 bounds, text);
    }
    return 0;
}

static clib_error_t *address(unformat_input_t *input, const char *what, ip_address_t *to)
{
    char text[WORD];
    clib_error_t *error = next_word(input, what, text, sizeof text);
    unformat_input_t of_text;
    if (error != 0) {
        return error;
    }
    unformat_init_string(&of_text, text, (int)strlen(text));
    if (!unformat(&of_text, "%U", unformat_ip_address, to) ||
        unformat_check_input(&of_text) != UNFORMAT_END_OF_INPUT) {
        error = clib_error_return(0, "%s must be an address of IPv4 or IPv6, got '%s'", what, text);
    }
    unformat_free(&of_text);
    return error;
}

static clib_error_t *failed(int code, const char *message)
{
    return code == 0 ? 0 : clib_error_return_code(0, code, 0, "%s", message);
}

static clib_error_t *end_of_line(unformat_input_t *input)
{
    char text[WORD];
    clib_error_t *error;
    if (unformat_check_input(input) == UNFORMAT_END_OF_INPUT) {
        return 0;
    }
    error = next_word(input, "a word", text, sizeof text);
    if (error != 0) {
        return error;
    }
    return clib_error_return(0, "unknown word '%s'", text);
}

typedef clib_error_t *(lbgym_command_t)(vlib_main_t *vm, unformat_input_t *line);

/* Run `command` on the rest of the line. */
static clib_error_t *on_line(vlib_main_t *vm, unformat_input_t *input, lbgym_command_t *command)
{
    unformat_input_t line;
    clib_error_t *error;
    if (!unformat_user(input, unformat_line_input, &line)) {
        unformat_init_string(&line, "", 0);
    }
    error = command(vm, &line);
    unformat_free(&line);
    return error;
}

#define COMMAND(name)                                                                                                  \
    static clib_error_t *name##_line(vlib_main_t *vm, unformat_input_t *line);                                         \
    static clib_error_t *name(vlib_main_t *vm, unformat_input_t *input, vlib_cli_command_t *command)                   \
    {                                                                                                                  \
        return on_line(vm, input, name##_line);                                                                        \
    }                                                                                                                  \
    static clib_error_t *name##_line(vlib_main_t *vm, unformat_input_t *line)

/* VIPs */

static const char *const modes[] = {"dsr", "gre", "ipip", "nat"};

static clib_error_t *mode(unformat_input_t *line, u32 *to)
{
    char text[WORD];
    clib_error_t *error = next_word(line, "mode", text, sizeof text);
    for (u32 i = 0; error == 0 && i < ARRAY_LEN(modes); i++) {
        if (strcmp(text, modes[i]) == 0) {
            *to = i;
            return 0;
        }
    }
    return error != 0 ? error : clib_error_return(0, "mode must be dsr, gre, ipip or nat, got '%s'", text);
}

static clib_error_t *rule(unformat_input_t *line, lbgym_rule *to)
{
    char text[WORD];
    clib_error_t *error = next_word(line, "rule", text, sizeof text);
    const int found = error == 0 ? lbgym_rule_named(text) : -1;
    u8 *known = 0;
    if (error != 0) {
        return error;
    }
    if (found >= 0) {
        *to = (lbgym_rule)found;
        return 0;
    }
    for (int i = 0; i < LBGYM_NUM_RULES; i++) {
        known = format(known, "%s%s", i > 0 ? ", " : "", lbgym_rule_name(i));
    }
    error = clib_error_return(0, "rule must be one of %v, got '%s'", known, text);
    vec_free(known);
    return error;
}

static clib_error_t *source(unformat_input_t *line, lbgym_core_options *options)
{
    ip_address_t given;
    clib_error_t *error = address(line, "source", &given);
    u32 words[4];
    if (error != 0) {
        return error;
    }
    lbgym_words_of(words, &given);
    if (ip_addr_version(&given) == AF_IP6) {
        clib_memcpy(options->source6, words, sizeof options->source6);
    } else {
        options->source4 = words[0];
    }
    return 0;
}

/* Options that are numbers: name, least, most, whole (with its base) or seconds or a probability, field. */
#define LONGEST 1e6
#define foreach_lbgym_whole                                                                                            \
    _("balancers", 1, 65535, 10, balancers)                                                                            \
    _("servers", 1, LBGYM_CORE_MAX_SERVERS, 10, core.servers)                                                          \
    _("flows", 16, LBGYM_CORE_MAX_FLOWS, 10, core.flows)                                                               \
    _("syn-flows", 0, LBGYM_CORE_MAX_FLOWS, 10, core.syn_flows)                                                        \
    _("permissions", 0, 0777, 8, permissions)
#define foreach_lbgym_seconds                                                                                          \
    _("interval", 1e-3, 86400, publish_interval)                                                                       \
    _("syn-timeout", 1e-3, LONGEST, core.syn_timeout)                                                                  \
    _("idle-timeout", 1e-3, LONGEST, core.idle_timeout)                                                                \
    _("udp-timeout", 1e-3, LONGEST, core.udp_timeout)                                                                  \
    _("close-timeout", 1e-3, LONGEST, core.close_timeout)
#define foreach_lbgym_probability                                                                                      \
    _("fct-sampling", core.fct_sampling)                                                                               \
    _("duration-sampling", core.duration_sampling)

static clib_error_t *option(unformat_input_t *line, const char *key, lbgym_service_options *options)
{
    clib_error_t *error;
    f64 value;
#define _(name, low, high, base, field)                                                                                \
    if (strcmp(key, name) == 0) {                                                                                      \
        error = number(line, name, low, high, true, base, &value);                                                     \
        options->field = error == 0 ? (u32)value : 0;                                                                  \
        return error;                                                                                                  \
    }
    foreach_lbgym_whole
#undef _
#define _(name, low, high, field)                                                                                      \
    if (strcmp(key, name) == 0) {                                                                                      \
        error = number(line, name, low, high, false, 0, &value);                                                       \
        options->field = error == 0 ? lbgym_nanoseconds(value) : 0;                                                    \
        return error;                                                                                                  \
    }
    foreach_lbgym_seconds
#undef _
#define _(name, field)                                                                                                 \
    if (strcmp(key, name) == 0) {                                                                                      \
        return number(line, name, 0, 1, false, 0, &options->field);                                                    \
    }
    foreach_lbgym_probability
#undef _
    if (strcmp(key, "udp") == 0) {
        options->vip.protocol = IP_PROTOCOL_UDP;
        return 0;
    }
    if (strcmp(key, "mode") == 0) {
        return mode(line, &options->core.mode);
    }
    if (strcmp(key, "rule") == 0) {
        return rule(line, &options->rule);
    }
    if (strcmp(key, "source") == 0) {
        return source(line, &options->core);
    }
    return clib_error_return(0, "unknown word '%s'", key);
}

COMMAND(vip_add)
{
    lbgym_service_options options = lbgym_service_default_options();
    char name[LBGYM_SERVICE_NAME], message[LBGYM_SERVICE_MESSAGE], key[WORD];
    ip_address_t given;
    f64 port;
    clib_error_t *error = next_word(line, "the name of the VIP", name, sizeof name);
    if (error == 0) {
        error = address(line, "the address of the VIP", &given);
    }
    if (error == 0) {
        error = number(line, "the port of the VIP", 1, 65535, true, 10, &port);
    }
    while (error == 0 && unformat_check_input(line) != UNFORMAT_END_OF_INPUT) {
        error = next_word(line, "a word", key, sizeof key);
        if (error == 0) {
            error = option(line, key, &options);
        }
    }
    if (error != 0) {
        return error;
    }
    lbgym_words_of(options.vip.address, &given);
    options.vip.is_ipv6 = ip_addr_version(&given) == AF_IP6;
    options.vip.port = clib_host_to_net_u16((u16)port);
    return failed(lbgym_vip_add(name, &options, message), message);
}

VLIB_CLI_COMMAND(lbgym_vip_add_command, static) = {
    .path = "lbgym vip add",
    .short_help = "lbgym vip add <name> <address> <port> [udp] [mode dsr|gre|ipip|nat] [rule <rule>] [balancers <n>] "
                  "[servers <n>] [flows <n>] [syn-flows <n>] [source <address>] [interval <seconds>] "
                  "[syn-timeout|idle-timeout|udp-timeout|close-timeout <seconds>] "
                  "[fct-sampling|duration-sampling <probability>] [permissions <octal>]",
    .function = vip_add,
};

COMMAND(vip_del)
{
    char name[LBGYM_SERVICE_NAME], message[LBGYM_SERVICE_MESSAGE];
    clib_error_t *error = next_word(line, "the name of the VIP", name, sizeof name);
    if (error == 0) {
        error = end_of_line(line);
    }
    return error != 0 ? error : failed(lbgym_vip_del(name, message), message);
}

VLIB_CLI_COMMAND(lbgym_vip_del_command, static) = {
    .path = "lbgym vip del",
    .short_help = "lbgym vip del <name>",
    .function = vip_del,
};

/* Servers */

static clib_error_t *names(unformat_input_t *line, char *vip, char *server)
{
    clib_error_t *error = next_word(line, "the name of the VIP", vip, LBGYM_SERVICE_NAME);
    return error != 0 ? error : next_word(line, "the name of the server", server, LBGYM_SERVICE_NAME);
}

COMMAND(server_add)
{
    char vip[LBGYM_SERVICE_NAME], message[LBGYM_SERVICE_MESSAGE], key[WORD];
    lbgym_service_server server = {.weight = 1.0, .cores = 1.0};
    ip_address_t given;
    u32 row;
    clib_error_t *error = names(line, vip, server.name);
    if (error == 0) {
        error = address(line, "the address of the server", &given);
    }
    while (error == 0 && unformat_check_input(line) != UNFORMAT_END_OF_INPUT) {
        f64 port;
        error = next_word(line, "a word", key, sizeof key);
        if (error != 0) {
            break;
        }
        if (strcmp(key, "port") == 0) {
            error = number(line, "port", 1, 65535, true, 10, &port);
            server.port = error == 0 ? clib_host_to_net_u16((u16)port) : 0;
        } else if (strcmp(key, "weight") == 0) {
            error = number(line, "weight", 0, 1e300, false, 0, &server.weight);
        } else if (strcmp(key, "cores") == 0) {
            error = number(line, "cores", 1, 1048576, false, 0, &server.cores);
        } else {
            error = clib_error_return(0, "unknown word '%s'", key);
        }
    }
    if (error != 0) {
        return error;
    }
    lbgym_words_of(server.address, &given);
    server.is_ipv6 = ip_addr_version(&given) == AF_IP6;
    return failed(lbgym_server_add(vip, &server, &row, message), message);
}

VLIB_CLI_COMMAND(lbgym_server_add_command, static) = {
    .path = "lbgym server add",
    .short_help = "lbgym server add <vip> <name> <address> [port <n>] [weight <w>] [cores <n>]",
    .function = server_add,
};

COMMAND(server_del)
{
    char vip[LBGYM_SERVICE_NAME], name[LBGYM_SERVICE_NAME], message[LBGYM_SERVICE_MESSAGE];
    clib_error_t *error = names(line, vip, name);
    if (error == 0) {
        error = end_of_line(line);
    }
    return error != 0 ? error : failed(lbgym_server_del(vip, name, message), message);
}

VLIB_CLI_COMMAND(lbgym_server_del_command, static) = {
    .path = "lbgym server del",
    .short_help = "lbgym server del <vip> <name>",
    .function = server_del,
};

static clib_error_t *set_drained(unformat_input_t *line, int drained)
{
    char vip[LBGYM_SERVICE_NAME], name[LBGYM_SERVICE_NAME], message[LBGYM_SERVICE_MESSAGE];
    clib_error_t *error = names(line, vip, name);
    if (error == 0) {
        error = end_of_line(line);
    }
    return error != 0 ? error : failed(lbgym_server_set(vip, name, NULL, drained, message), message);
}

COMMAND(server_drain)
{
    return set_drained(line, 1);
}

VLIB_CLI_COMMAND(lbgym_server_drain_command, static) = {
    .path = "lbgym server drain",
    .short_help = "lbgym server drain <vip> <name>",
    .function = server_drain,
    .is_mp_safe = 1,
};

COMMAND(server_undrain)
{
    return set_drained(line, 0);
}

VLIB_CLI_COMMAND(lbgym_server_undrain_command, static) = {
    .path = "lbgym server undrain",
    .short_help = "lbgym server undrain <vip> <name>",
    .function = server_undrain,
    .is_mp_safe = 1,
};

COMMAND(server_weight)
{
    char vip[LBGYM_SERVICE_NAME], name[LBGYM_SERVICE_NAME], message[LBGYM_SERVICE_MESSAGE];
    f64 weight;
    clib_error_t *error = names(line, vip, name);
    if (error == 0) {
        error = number(line, "weight", 0, 1e300, false, 0, &weight);
    }
    if (error == 0) {
        error = end_of_line(line);
    }
    return error != 0 ? error : failed(lbgym_server_set(vip, name, &weight, -1, message), message);
}

VLIB_CLI_COMMAND(lbgym_server_weight_command, static) = {
    .path = "lbgym server weight",
    .short_help = "lbgym server weight <vip> <name> <weight>",
    .function = server_weight,
    .is_mp_safe = 1,
};

COMMAND(interface)
{
    char message[LBGYM_SERVICE_MESSAGE];
    clib_error_t *error;
    u32 sw_if_index;
    int enable = 1;
    if (!unformat(line, "%U", unformat_vnet_sw_interface, vnet_get_main(), &sw_if_index)) {
        return clib_error_return(0, "the name of an interface is missing, or there is no such interface: '%U'",
                                 format_unformat_error, line);
    }
    if (unformat(line, "disable")) {
        enable = 0;
    }
    error = end_of_line(line);
    return error != 0 ? error : failed(lbgym_interface_enable(sw_if_index, enable, message), message);
}

VLIB_CLI_COMMAND(lbgym_interface_command, static) = {
    .path = "lbgym interface",
    .short_help = "lbgym interface <interface> [disable]",
    .function = interface,
};

/* What there is */

static const char *const states[] = {"unknown", "up", "draining", "down"};

static void show_servers(vlib_main_t *vm, const lbgym_vip_t *vip)
{
    lbgym_service_server server;
    lbgym_service_status status;
    vlib_cli_output(vm, "  %-20s %-30s %-9s %8s %8s %8s %10s %10s %8s %8s", "server", "address", "state", "weight",
                    "safe", "open", "started", "completed", "rejected", "failed");
    for (u32 row = 0; lbgym_service_read(vip->service, row, &server, &status); row++) {
        char weight[DIGITS], safe[DIGITS];
        ip_address_t given;
        u8 *place;
        if (!server.known) {
            continue;
        }
        lbgym_address_of(&given, server.address, server.is_ipv6);
        place = format(0, "%U", format_ip_address, &given);
        if (vip->mode == LBGYM_NAT) {
            place = format(place, " port %u", clib_net_to_host_u16(server.port));
        }
        (void)snprintf(weight, sizeof weight, "%.3g", status.weight);
        (void)snprintf(safe, sizeof safe, "%.3g", server.weight);
        vlib_cli_output(vm, "  %-20s %-30v %-9s %8s %8s %8lu %10lu %10lu %8lu %8lu", server.name, place,
                        states[lbgym_state_of(&server)], weight, safe, status.counters.open,
                        status.counters.started, status.counters.completed, status.counters.rejected,
                        status.counters.failed);
        vec_free(place);
    }
}

COMMAND(show)
{
    const int verbose = unformat(line, "verbose");
    clib_error_t *error = end_of_line(line);
    lbgym_vip_t *vip;
    if (error != 0) {
        return error;
    }
    pool_foreach (vip, lbgym_main.vips) {
        const lbgym_service_options *const o = lbgym_service_configured(vip->service);
        lbgym_service_summary summary;
        ip_address_t given;
        lbgym_service_summarize(vip->service, &summary);
        lbgym_address_of(&given, o->vip.address, o->vip.is_ipv6);
        vlib_cli_output(vm, "%s: %U %s port %u, %s, %s, weights of %s, %lu observations, %lu missed",
                        lbgym_service_name(vip->service), format_ip_address, &given,
                        o->vip.protocol == IP_PROTOCOL_UDP ? "UDP" : "TCP", clib_net_to_host_u16(o->vip.port),
                        modes[vip->mode], lbgym_rule_name(o->rule),
                        summary.has_agent ? "the agent" : "the configuration", summary.published, summary.missed);
        show_servers(vm, vip);
        if (verbose) {
#define _(name) vlib_cli_output(vm, "  %-20s %lu", #name, summary.totals.name);
            foreach_lbgym_total
#undef _
        }
    }
    return 0;
}

VLIB_CLI_COMMAND(lbgym_show_command, static) = {
    .path = "show lbgym",
    .short_help = "show lbgym [verbose]",
    .function = show,
};
