/* SPDX-License-Identifier: Apache-2.0 */
/* TCP flows as a balancer sees them. For C11, C++17 and BPF; include what defines uint8_t and uint32_t first in BPF.
 *
 * With direct server return it sees the client's packets only: the client's first FIN or RST ends the flow. As a NAT it
 * sees both directions: the server's FIN or either's RST ends it, as a client may await the answer after its own FIN.
 * A flow is in state SYN until the client acknowledges something, so that a flood of SYNs is known for what it is.
 */
#ifndef LBGYM_TCP_H
#define LBGYM_TCP_H

#ifndef __bpf__
#include <stdint.h>
#endif

#define LBGYM_TCP_FIN 0x01u
#define LBGYM_TCP_SYN 0x02u
#define LBGYM_TCP_RST 0x04u
#define LBGYM_TCP_ACK 0x10u

#define LBGYM_TCP_INLINE static inline __attribute__((always_inline))

/** A flow that is DEAD is about to be deleted. */
enum lbgym_flow_state { LBGYM_FREE, LBGYM_SYN, LBGYM_ESTABLISHED, LBGYM_CLOSED, LBGYM_DEAD };

/** What a packet does to an open flow. */
enum lbgym_tcp_event { LBGYM_GOES_ON, LBGYM_CONFIRMS, LBGYM_CLOSES_HALF, LBGYM_COMPLETES, LBGYM_REJECTS, LBGYM_FAILS };

LBGYM_TCP_INLINE uint8_t lbgym_tcp_control(uint8_t flags)
{
    return flags & (LBGYM_TCP_SYN | LBGYM_TCP_ACK | LBGYM_TCP_RST | LBGYM_TCP_FIN);
}

/** True for a client's packet that begins a flow. */
LBGYM_TCP_INLINE int lbgym_tcp_opens(uint8_t flags)
{
    return lbgym_tcp_control(flags) == LBGYM_TCP_SYN;
}

/** True for a client's packet of a flow that is not known, and that shows that there is one. */
LBGYM_TCP_INLINE int lbgym_tcp_adopts(uint8_t flags)
{
    return lbgym_tcp_control(flags) == LBGYM_TCP_ACK;
}

LBGYM_TCP_INLINE int lbgym_is_open(uint32_t state)
{
    return state == LBGYM_SYN || state == LBGYM_ESTABLISHED;
}

/** A packet from the client, of an open flow, that does not open one. */
LBGYM_TCP_INLINE enum lbgym_tcp_event lbgym_tcp_from_client(uint32_t state, uint8_t flags, int sees_replies)
{
    if (__builtin_expect(flags & (LBGYM_TCP_FIN | LBGYM_TCP_RST), 0)) {
        if (flags & LBGYM_TCP_RST)
            return LBGYM_FAILS;
        return sees_replies ? LBGYM_CLOSES_HALF : LBGYM_COMPLETES;
    }
    if (state == LBGYM_SYN && (flags & (LBGYM_TCP_ACK | LBGYM_TCP_SYN)) == LBGYM_TCP_ACK)
        return LBGYM_CONFIRMS;
    return LBGYM_GOES_ON;
}

/** A packet from the server, of an open flow. */
LBGYM_TCP_INLINE enum lbgym_tcp_event lbgym_tcp_from_server(uint32_t state, uint8_t flags)
{
    if (__builtin_expect(!(flags & (LBGYM_TCP_FIN | LBGYM_TCP_RST)), 1))
        return LBGYM_GOES_ON;
    if (flags & LBGYM_TCP_FIN)
        return LBGYM_COMPLETES;
    return state == LBGYM_SYN ? LBGYM_REJECTS : LBGYM_FAILS;
}

#endif /* LBGYM_TCP_H */
