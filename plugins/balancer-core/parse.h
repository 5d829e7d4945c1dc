/* SPDX-License-Identifier: Apache-2.0 */
/* From bytes to addresses and ports. Nothing is read beyond `length`, whatever the bytes say. */
#ifndef LBGYM_CORE_PARSE_H
#define LBGYM_CORE_PARSE_H

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#define LBGYM_PROTOCOL_TCP 6
#define LBGYM_PROTOCOL_UDP 17

enum kind {
    OTHER,     /* nothing that a balancer knows */
    L4,        /* TCP or UDP with its ports, unfragmented or a first fragment */
    FRAGMENT,  /* a later fragment */
    ERROR,     /* an ICMP error about a TCP or UDP packet */
    MALFORMED, /* as if it were one of these, but it is not whole */
};

struct parsed {
    uint8_t kind;
    uint8_t is_ipv6;
    uint8_t protocol;      /* TCP or UDP; of an ICMP error that of the packet it is about */
    uint8_t flags;         /* of TCP */
    bool fragmented;       /* a first or later fragment */
    uint16_t source_port;  /* of an ICMP error: of the packet it is about */
    uint16_t destination_port;
    uint32_t l4;           /* offsets from the IP header */
    uint32_t inner, inner_l4;
    uint32_t total;        /* bytes of the packet, by its header */
    uint32_t isn;
    uint32_t identification;
    uint32_t source[4], destination[4];
    uint32_t inner_source[4], inner_destination[4];
};

static inline uint16_t load16(const uint8_t *at)
{
    uint16_t word;
    memcpy(&word, at, sizeof word);
    return word;
}

static inline uint32_t load32(const uint8_t *at)
{
    uint32_t word;
    memcpy(&word, at, sizeof word);
    return word;
}

static inline void store16(uint8_t *at, uint16_t word)
{
    memcpy(at, &word, sizeof word);
}

static inline void store32(uint8_t *at, uint32_t word)
{
    memcpy(at, &word, sizeof word);
}

static inline uint16_t swap16(uint16_t word)
{
    return __builtin_bswap16(word);
}

/** Fills `p`. The answer is in p->kind. */
void lbgym_parse(const uint8_t *data, uint32_t length, struct parsed *p);

#endif
