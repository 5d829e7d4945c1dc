/* SPDX-License-Identifier: Apache-2.0 */
/* Dispatch in integers: from the hash of a flow, tables and open flows to a server, bit for bit as lbgym.simulator does.
 *
 * For C11, C++17 and BPF. Include the header that defines uint32_t and uint64_t first where there is no <stdint.h>.
 * Tables are filled in floating point elsewhere: an alias table, a lookup table by hash, or an index table of scores.
 * Scores are the bits of non-negative float64 numbers, which are ordered as integers are.
 */
#ifndef LBGYM_DISPATCH_H
#define LBGYM_DISPATCH_H

#ifndef __bpf__
#include <stdint.h>
#endif

/* Open flows below LBGYM_INDEX_EXACT have an entry each in an index table, more share one with their neighbours: 512 per
 * power of two, so that an entry is at most 0.2 % off. LBGYM_INDEX_MOST and more share the last one. */
#define LBGYM_INDEX_EXACT 1024u
#define LBGYM_INDEX_MOST (1u << 20)
#define LBGYM_INDEX_ENTRIES 6144u
/* The bits of an infinite score, of a server that takes no flows. */
#define LBGYM_INDEX_NEVER 0x7FF0000000000000ull

/** What a balancer does for a new flow: nothing, as no server takes flows; draw from an alias table; look a server up by
 * hash; take turns; take the least score of all servers, or of two. */
enum lbgym_mechanism { LBGYM_NOBODY, LBGYM_ALIAS, LBGYM_LOOKUP, LBGYM_TURNS, LBGYM_INDEX, LBGYM_TWO_CHOICES };

/** A bucket of an alias table: two servers, and 2**32 times the probability to stay, rounded up. */
struct lbgym_alias {
    uint64_t threshold;
    uint32_t stay, other;
};

#ifndef LBGYM_MIX64 /* lbgym_features.h has it, too */
#define LBGYM_MIX64
/** The finaliser of SplitMix64 (Steele, Lea and Flood, 2014). */
static inline uint64_t lbgym_mix64(uint64_t x)
{
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    return x ^ (x >> 31);
}
#endif

/** The 64-bit hash of a flow: of the client's address, four words of which IPv4 fills the first, and port, all as they
 * are on the wire, and of a word that stands for the service's address, port and protocol. */
static inline uint64_t lbgym_flow_hash(uint64_t service, const uint32_t client[4], uint16_t port)
{
    uint64_t h = lbgym_mix64(service ^ ((uint64_t)client[1] << 32 | client[0]));
    h = lbgym_mix64(h ^ ((uint64_t)client[3] << 32 | client[2]));
    return lbgym_mix64(h ^ port);
}

/** The part of a flow's hash that chooses the server. */
static inline uint64_t lbgym_dispatch_hash(uint64_t flow_hash)
{
    return lbgym_mix64(flow_hash ^ 0xD1B54A32D192ED03ull);
}

/** Another one, for the second of two candidates. */
static inline uint64_t lbgym_second_hash(uint64_t h)
{
    return lbgym_mix64(h ^ 0x8CB92BA72F3D8DD7ull);
}

/** A hash to an index below n, from its high 32 bits. */
static inline uint32_t lbgym_to_range(uint64_t h, uint32_t n)
{
    return (uint32_t)(((h >> 32) * n) >> 32);
}

/** The server that a hash has in an alias table. */
static inline uint32_t lbgym_alias_server(const struct lbgym_alias *bucket, uint64_t h)
{
    return (h & 0xFFFFFFFFull) >= bucket->threshold ? bucket->other : bucket->stay;
}

/** The second of two candidates out of n, of which `one` is the first; n is at least 2. */
static inline uint32_t lbgym_second_candidate(uint64_t h, uint32_t one, uint32_t n)
{
    uint32_t two = lbgym_to_range(lbgym_second_hash(h), n - 1);
    return two + (two >= one);
}

/** The entry of an index table for a number of open flows. */
static inline uint32_t lbgym_index_entry(uint64_t open_flows)
{
    const uint32_t q = open_flows < LBGYM_INDEX_MOST ? (uint32_t)open_flows : LBGYM_INDEX_MOST - 1;
    /* shift: log2 of x, rounded down, without a branch, which would depend on the counts; x is below 2**11. */
    uint32_t x = q / (LBGYM_INDEX_EXACT / 2) | 1, shift = ((255u - x) >> 31) << 3, more;
    x >>= shift;
    more = ((15u - x) >> 31) << 2;
    x >>= more;
    shift += more;
    more = ((3u - x) >> 31) << 1;
    x >>= more;
    shift += more + (x >> 1);
    /* For each shift 512 entries, of 1 << shift numbers each; those below 512 have an entry each, too. */
    return (q >> shift) + shift * (LBGYM_INDEX_EXACT / 2);
}

#endif /* LBGYM_DISPATCH_H */
