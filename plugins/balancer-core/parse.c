/* SPDX-License-Identifier: Apache-2.0 */
#include "parse.h"

#define MAX_EXTENSIONS 8 /* headers; more than any packet has that means well */

enum { ICMP = 1, ICMPV6 = 58 };
enum { HOP_BY_HOP = 0, ROUTING = 43, FRAGMENTATION = 44, AUTHENTICATION = 51, DESTINATION = 60 };

/* An IP header with what follows it up to L4. */
struct l3 {
    uint8_t protocol;
    bool fragmented, later;
    uint32_t identification;
    uint32_t l4, total;
};

static bool ipv4(const uint8_t *data, uint32_t length, struct l3 *l3)
{
    uint32_t header, offset;
    if (length < 20 || data[0] >> 4 != 4) {
        return false;
    }
    header = (data[0] & 15u) * 4;
    l3->total = swap16(load16(data + 2));
    if (header < 20 || header > length || header > l3->total) {
        return false;
    }
    offset = swap16(load16(data + 6));
    l3->protocol = data[9];
    l3->fragmented = (offset & 0x3FFF) != 0;
    l3->later = (offset & 0x1FFF) != 0;
    l3->identification = load16(data + 4);
    l3->l4 = header;
    return true;
}

static bool ipv6(const uint8_t *data, uint32_t length, struct l3 *l3)
{
    if (length < 40 || data[0] >> 4 != 6) {
        return false;
    }
    l3->total = 40u + swap16(load16(data + 4));
    l3->protocol = data[6];
    l3->fragmented = l3->later = false;
    l3->identification = 0;
    l3->l4 = 40;
    for (int i = 0; i < MAX_EXTENSIONS; i++) {
        const uint8_t *header = data + l3->l4;
        uint32_t size;
        switch (l3->protocol) {
        case HOP_BY_HOP:
        case ROUTING:
        case DESTINATION:
        case FRAGMENTATION:
        case AUTHENTICATION:
            break;
        default:
            return true;
        }
        if (l3->l4 + 8 > length || l3->l4 + 8 > l3->total) {
            return false;
        }
        size = 8u * (header[1] + 1u);
        if (l3->protocol == AUTHENTICATION) {
            size = 4u * (header[1] + 2u);
        } else if (l3->protocol == FRAGMENTATION) {
            const uint16_t offset = swap16(load16(header + 2));
            size = 8;
            l3->fragmented = (offset & 0xFFF9) != 0;
            l3->later = offset >> 3 != 0;
            l3->identification = load32(header + 4);
        }
        l3->protocol = header[0];
        l3->l4 += size;
        if (l3->l4 > length || l3->l4 > l3->total) {
            return false;
        }
        if (l3->later) {
            /* What follows are not headers. */
            return true;
        }
    }
    return false;
}

static bool parse_l3(const uint8_t *data, uint32_t length, bool is_ipv6, struct l3 *l3)
{
    return is_ipv6 ? ipv6(data, length, l3) : ipv4(data, length, l3);
}

static void addresses(const uint8_t *data, bool is_ipv6, uint32_t source[4], uint32_t destination[4])
{
    if (is_ipv6) {
        memcpy(source, data + 8, 16);
        memcpy(destination, data + 24, 16);
    } else {
        source[0] = load32(data + 12);
        destination[0] = load32(data + 16);
    }
}

static bool is_error(uint8_t type, bool is_ipv6)
{
    if (is_ipv6) {
        return type >= 1 && type <= 4;
    }
    return type == 3 || type == 11 || type == 12;
}

static void error(const uint8_t *data, uint32_t end, struct parsed *p)
{
    const uint32_t inner = p->l4 + 8u;
    struct l3 l3;
    if (inner > end) {
        p->kind = MALFORMED;
        return;
    }
    if (!is_error(data[p->l4], p->is_ipv6)) {
        return;
    }
    /* The packet it is about is cut off somewhere, so that its own length is longer than what there is. */
    p->kind = MALFORMED;
    if (!parse_l3(data + inner, end - inner, p->is_ipv6, &l3) || l3.l4 + 8 > end - inner) {
        return;
    }
    if ((l3.protocol != LBGYM_PROTOCOL_TCP && l3.protocol != LBGYM_PROTOCOL_UDP) || l3.later) {
        p->kind = OTHER;
        return;
    }
    p->kind = ERROR;
    p->protocol = l3.protocol;
    p->inner = inner;
    p->inner_l4 = inner + l3.l4;
    addresses(data + inner, p->is_ipv6, p->inner_source, p->inner_destination);
    p->source_port = load16(data + p->inner_l4);
    p->destination_port = load16(data + p->inner_l4 + 2);
}

void lbgym_parse(const uint8_t *data, uint32_t length, struct parsed *p)
{
    struct l3 l3;
    uint32_t end;
    memset(p, 0, sizeof *p);
    p->kind = OTHER;
    if (length < 20 || (data[0] >> 4 != 4 && data[0] >> 4 != 6)) {
        return;
    }
    p->is_ipv6 = data[0] >> 4 == 6;
    if (p->is_ipv6 && length < 40) {
        return;
    }
    addresses(data, p->is_ipv6, p->source, p->destination);
    if (!parse_l3(data, length, p->is_ipv6, &l3)) {
        p->kind = MALFORMED;
        return;
    }
    end = l3.total < length ? l3.total : length;
    p->total = l3.total;
    p->l4 = l3.l4;
    p->protocol = l3.protocol;
    p->fragmented = l3.fragmented;
    p->identification = l3.identification;
    if (l3.later) {
        p->kind = FRAGMENT;
        return;
    }
    data += l3.l4;
    switch (l3.protocol) {
    case LBGYM_PROTOCOL_TCP:
        if (l3.l4 + 20 > end || data[12] >> 4 < 5) {
            p->kind = MALFORMED;
            return;
        }
        p->flags = data[13];
        p->isn = load32(data + 4);
        break;
    case LBGYM_PROTOCOL_UDP:
        if (l3.l4 + 8 > end) {
            p->kind = MALFORMED;
            return;
        }
        break;
    case ICMP:
    case ICMPV6:
        if ((l3.protocol == ICMPV6) == p->is_ipv6 && !l3.fragmented) {
            error(data - l3.l4, end, p);
        }
        return;
    default:
        return;
    }
    p->kind = L4;
    p->source_port = load16(data);
    p->destination_port = load16(data + 2);
}
