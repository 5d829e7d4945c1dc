/* SPDX-License-Identifier: Apache-2.0 */
/* Internet checksums after a change of some words, without the rest of the packet: RFC 1624.
 *
 * For C11, C++17 and BPF. Include the header that defines uint16_t and uint32_t first where there is no <stdint.h>.
 * Words are as they are in the packet. A sum begins at 0, takes up changes, and then changes checksums.
 */
#ifndef LBGYM_CHECKSUM_H
#define LBGYM_CHECKSUM_H

#ifndef __bpf__
#include <stdint.h>
#endif

#define LBGYM_CHECKSUM_INLINE static inline __attribute__((always_inline))

/** A word of 32 bits was `before` and is `after`. */
LBGYM_CHECKSUM_INLINE uint32_t lbgym_sum_word(uint32_t sum, uint32_t before, uint32_t after)
{
    sum += (~before & 0xFFFFu) + (~before >> 16);
    return sum + (after & 0xFFFFu) + (after >> 16);
}

/** An address of `words` words, 1 or 4. */
LBGYM_CHECKSUM_INLINE uint32_t lbgym_sum_address(uint32_t sum, const uint32_t *before, const uint32_t *after, int words)
{
    for (int i = 0; i < words; i++)
        sum = lbgym_sum_word(sum, before[i], after[i]);
    return sum;
}

/** A word of 16 bits, such as a port. */
LBGYM_CHECKSUM_INLINE uint32_t lbgym_sum_port(uint32_t sum, uint16_t before, uint16_t after)
{
    return sum + (uint16_t)~before + after;
}

LBGYM_CHECKSUM_INLINE uint16_t lbgym_sum_folded(uint32_t sum)
{
    sum = (sum & 0xFFFFu) + (sum >> 16);
    sum = (sum & 0xFFFFu) + (sum >> 16);
    return (uint16_t)sum;
}

/** The checksum that was `check`. */
LBGYM_CHECKSUM_INLINE uint16_t lbgym_checksum(uint16_t check, uint32_t sum)
{
    return (uint16_t)~lbgym_sum_folded(sum + (uint16_t)~check);
}

/** A checksum that the network device is still to complete: the sum of the pseudo header, not its complement. Only
 * changes of what is in the pseudo header, addresses and not ports, belong into the sum. */
LBGYM_CHECKSUM_INLINE uint16_t lbgym_partial_checksum(uint16_t check, uint32_t sum)
{
    return lbgym_sum_folded(sum + check);
}

#endif /* LBGYM_CHECKSUM_H */
