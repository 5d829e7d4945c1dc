/* SPDX-License-Identifier: Apache-2.0 */
/* From weights to tables, and from tables to a server: number by number what lbgym.simulator.dispatch computes.
 *
 * To be compiled without contraction of products and sums (-std=c11 or -ffp-contract=off), which Numba does not do.
 */
#include "internal.h"

#include <stdlib.h>

static const char *const rule_names[LBGYM_NUM_RULES] = {
    "ecmp", "wcmp", "maglev", "round_robin", "lsq", "sed", "sed_scaled", "marginal", "whittle", "p2c", "p2c_sed",
    "p2c_marginal",
};

static const enum lbgym_mechanism mechanisms[LBGYM_NUM_RULES] = {
    LBGYM_LOOKUP, LBGYM_ALIAS, LBGYM_LOOKUP, LBGYM_TURNS, LBGYM_INDEX, LBGYM_INDEX, LBGYM_INDEX, LBGYM_INDEX,
    LBGYM_INDEX, LBGYM_TWO_CHOICES, LBGYM_TWO_CHOICES, LBGYM_TWO_CHOICES,
};

/* Arrival rate that Whittle's index is computed for, and scores in its table beyond a server's cores. */
#define WHITTLE_LOAD 0.8
#define WHITTLE_OVERLOAD 1.5
#define WHITTLE_BEYOND 48

int lbgym_rule_named(const char *name)
{
    for (int i = 0; i < LBGYM_NUM_RULES; i++) {
        if (strcmp(name, rule_names[i]) == 0) {
            return i;
        }
    }
    return -1;
}

const char *lbgym_rule_name(int rule)
{
    return rule >= 0 && rule < LBGYM_NUM_RULES ? rule_names[rule] : NULL;
}

uint32_t lbgym_maglev_size(uint32_t servers)
{
    uint32_t n = 100 * servers > 101 ? 100 * servers : 101;
    for (;; n++) {
        uint32_t d = 2;
        while (d * d <= n && n % d != 0) {
            d++;
        }
        if (d * d > n) {
            return n;
        }
    }
}

/* Vose, 1991. */
static void fill_aliases(lbgym_core *core, struct snapshot *s, const uint32_t *active, uint32_t count)
{
    double *const share = core->scratch;
    uint32_t *const small = (uint32_t *)(void *)(core->scratch + core->options.servers), *const large = small + count;
    uint32_t smalls = 0, larges = 0;
    double total = 0.0;
    for (uint32_t k = 0; k < count; k++) {
        total += s->servers[active[k]].weight;
    }
    for (uint32_t k = 0; k < count; k++) {
        share[k] = total > 0.0 ? s->servers[active[k]].weight * count / total : 1.0;
        s->aliases[k].stay = s->aliases[k].other = active[k];
        if (share[k] < 1.0) {
            small[smalls++] = k;
        } else {
            large[larges++] = k;
        }
    }
    while (smalls > 0 && larges > 0) {
        const uint32_t low = small[--smalls], high = large[larges - 1];
        s->aliases[low].other = active[high];
        share[high] -= 1.0 - share[low];
        if (share[high] < 1.0) {
            larges--;
            small[smalls++] = high;
        }
    }
    /* What is left is 1 but for rounding. */
    while (smalls > 0) {
        share[small[--smalls]] = 1.0;
    }
    while (larges > 0) {
        share[large[--larges]] = 1.0;
    }
    for (uint32_t k = 0; k < count; k++) {
        s->aliases[k].threshold = (uint64_t)ceil((share[k] < 1.0 ? share[k] : 1.0) * 0x1p32);
    }
}

/* Weighted Maglev (Eisenbud et al., NSDI 2016, section 3.4): everyone earns its weight over the largest one per round,
 * and takes its next free entry with every whole turn. Returns the number of entries. */
static uint32_t fill_maglev(lbgym_core *core, const struct snapshot *s, bool safe, const uint32_t *active,
                            uint32_t count, uint32_t *table)
{
    const uint32_t size = lbgym_maglev_size(s->rows);
    double *const credit = core->scratch, *const turn = credit + core->options.servers;
    uint32_t *const position = (uint32_t *)(void *)(turn + core->options.servers), *const skip = position + count;
    double heaviest = 0.0;
    uint32_t taken = 0;
    for (uint32_t k = 0; k < count; k++) {
        const double weight = safe ? s->servers[active[k]].safe_weight : s->servers[active[k]].weight;
        heaviest = weight > heaviest ? weight : heaviest;
    }
    for (uint32_t k = 0; k < count; k++) {
        const double weight = safe ? s->servers[active[k]].safe_weight : s->servers[active[k]].weight;
        const uint64_t name = lbgym_mix64((uint64_t)active[k] + 1);
        position[k] = (uint32_t)(lbgym_mix64(name ^ 0xA0761D6478BD642Full) % size);
        skip[k] = (uint32_t)(lbgym_mix64(name ^ 0xE7037ED1A0B428DBull) % (size - 1)) + 1;
        credit[k] = 0.0;
        turn[k] = heaviest > 0.0 ? weight / heaviest : 1.0;
    }
    memset(table, 0xFF, size * sizeof *table);
    while (taken < size) {
        for (uint32_t k = 0; k < count && taken < size; k++) {
            credit[k] += turn[k];
            if (credit[k] < 1.0) {
                continue;
            }
            credit[k] -= 1.0;
            while (table[position[k]] != NONE) {
                position[k] = (position[k] + skip[k]) % size;
            }
            table[position[k]] = active[k];
            taken++;
        }
    }
    return size;
}

/* The order of smooth weighted round robin, from its beginning to where it is most nearly back there. */
static uint32_t fill_turns(lbgym_core *core, struct snapshot *s, const uint32_t *active, uint32_t count)
{
    double *const current = core->scratch, *const unrest = core->unrest;
    double total = 0.0, least = INFINITY;
    uint32_t period;
    for (uint32_t k = 0; k < count; k++) {
        current[k] = 0.0;
        total += s->servers[active[k]].weight;
    }
    for (uint32_t i = 0; i < TURNS; i++) {
        uint32_t best = 0;
        for (uint32_t k = 0; k < count; k++) {
            current[k] += total > 0.0 ? s->servers[active[k]].weight : 1.0;
            if (current[k] > current[best]) {
                best = k;
            }
        }
        current[best] -= total > 0.0 ? total : (double)count;
        s->lookup[i] = active[best];
        unrest[i] = 0.0;
        for (uint32_t k = 0; k < count; k++) {
            unrest[i] += fabs(current[k]);
        }
        if (i + 1 >= count && unrest[i] < least) {
            least = unrest[i];
        }
    }
    least += 1e-9 * (total > 0.0 ? total : (double)count);
    for (period = 0; unrest[period] > least; period++) {
    }
    return period + 1;
}

/* Increase of the total delay by one more flow. */
static double marginal_cost(double flows, double cores)
{
    if (flows + 1.0 <= cores) {
        return cores;
    }
    if (flows >= cores) {
        return 2.0 * flows + 1.0;
    }
    return (flows + 1.0) * (flows + 1.0) - cores * flows;
}

/* Linear between the entries of a table, and beyond the last one. */
static double table_score(const double *table, uint32_t columns, double flows)
{
    const uint32_t q = flows < columns - 2 ? (uint32_t)flows : columns - 2;
    const double score = table[q], part = flows - q, following = table[q + 1];
    if (part == 0.0) {
        return score;
    }
    if (part == 1.0) {
        return following;
    }
    if (part > 1.0) {
        return following + (part - 1.0) * (following - score);
    }
    return score + part * (following - score);
}

/* Whittle's index: see fill_whittle in lbgym.simulator.dispatch. */
static uint32_t fill_whittle(double *table, double cores, double weight, double total)
{
    const uint32_t columns = (uint32_t)cores + WHITTLE_BEYOND;
    const double unit = cores / weight, load = WHITTLE_LOAD * total * unit, most = WHITTLE_OVERLOAD * cores;
    const double rate = load < most ? load : most;
    double probability = 1.0, z = 1.0, held = 0.0, b = 1.0;
    for (uint32_t n = 0; n < columns; n++) {
        const double mu = n + 1.0 < cores ? n + 1.0 : cores;
        const double following = probability * rate / mu;
        if (n < cores) {
            b = z + following - rate / mu * z;
        }
        table[n] = unit * ((n + 1.0) - held / z) * (z / (mu * b));
        probability = following;
        z += probability;
        held += (n + 1.0) * probability;
        if (z > 1e100) {
            probability *= 1e-100;
            z *= 1e-100;
            held *= 1e-100;
            b *= 1e-100;
        }
    }
    return columns;
}

/* The least number of open flows that has an entry. */
static double flows_of(uint32_t entry)
{
    const uint32_t half = LBGYM_INDEX_EXACT / 2, beyond = entry - LBGYM_INDEX_EXACT;
    if (entry < LBGYM_INDEX_EXACT) {
        return entry;
    }
    return (double)((uint64_t)(half + beyond % half) << (beyond / half + 1));
}

static double score(lbgym_rule rule, const lbgym_core_server *server, double weight, uint32_t balancers, double held,
                    const double *table, uint32_t columns)
{
    const double flows = (rule == LBGYM_SED_SCALED ? held * balancers : held) + server->background;
    if (rule == LBGYM_LSQ || rule == LBGYM_P2C) {
        return flows;
    }
    if (!(weight > 0.0)) {
        return INFINITY;
    }
    if (rule == LBGYM_MARGINAL || rule == LBGYM_P2C_MARGINAL) {
        return marginal_cost(flows, server->cores) / weight;
    }
    if (rule == LBGYM_WHITTLE) {
        return table_score(table, columns, flows);
    }
    return (flows + 1.0) / weight;
}

static int fill_scores(lbgym_core *core, struct snapshot *s, lbgym_rule rule, uint32_t balancers,
                       const uint32_t *active, uint32_t count)
{
    const uint32_t room = core->options.servers;
    bool all_zero = mechanisms[rule] == LBGYM_INDEX;
    double total = 0.0, most_cores = 0.0, *table = NULL;
    if (s->scores == NULL) {
        s->scores = malloc((size_t)LBGYM_INDEX_ENTRIES * room * sizeof *s->scores);
        if (s->scores == NULL) {
            return -1;
        }
    }
    for (uint32_t k = 0; k < count; k++) {
        all_zero = all_zero && !(s->servers[active[k]].weight > 0.0);
        most_cores = s->servers[active[k]].cores > most_cores ? s->servers[active[k]].cores : most_cores;
    }
    if (rule == LBGYM_WHITTLE) {
        table = malloc(((size_t)most_cores + WHITTLE_BEYOND) * sizeof *table);
        if (table == NULL) {
            return -1;
        }
    }
    for (uint32_t k = 0; k < count; k++) {
        total += all_zero ? 1.0 : s->servers[active[k]].weight;
    }
    for (uint32_t j = 0; j < s->rows; j++) {
        const lbgym_core_server *server = &s->servers[j];
        const double weight = all_zero ? 1.0 : server->weight;
        uint32_t columns = 0;
        if (server->active && rule == LBGYM_WHITTLE && weight > 0.0) {
            columns = fill_whittle(table, server->cores, weight, total);
        }
        for (uint32_t i = 0; i < LBGYM_INDEX_ENTRIES; i++) {
            double value = INFINITY;
            if (server->active) {
                value = score(rule, server, weight, balancers, flows_of(i), table, columns);
            }
            memcpy(&s->scores[(size_t)i * room + j], &value, sizeof value);
        }
    }
    free(table);
    return 0;
}

int lbgym_fill_tables(lbgym_core *core, struct snapshot *s, lbgym_rule rule, uint32_t balancers)
{
    uint32_t *const active = core->active;
    uint32_t count = 0;
    for (uint32_t j = 0; j < s->rows; j++) {
        if (s->servers[j].active) {
            active[count++] = j;
        }
    }
    s->mechanism = count > 0 ? (uint32_t)mechanisms[rule] : (uint32_t)LBGYM_NOBODY;
    s->size = count;
    s->fallback_size = count > 0 ? fill_maglev(core, s, true, active, count, s->fallback) : 0;
    if (count == 0) {
        return 0;
    }
    switch (s->mechanism) {
    case LBGYM_ALIAS:
        fill_aliases(core, s, active, count);
        return 0;
    case LBGYM_TURNS:
        s->size = fill_turns(core, s, active, count);
        return 0;
    case LBGYM_LOOKUP:
        if (rule == LBGYM_MAGLEV) {
            s->size = fill_maglev(core, s, false, active, count, s->lookup);
            return 0;
        }
        memcpy(s->lookup, active, count * sizeof *active);
        return 0;
    default:
        memcpy(s->lookup, active, count * sizeof *active);
        return fill_scores(core, s, rule, balancers, active, count);
    }
}

static inline uint64_t score_of(const lbgym_core *core, const struct snapshot *s, uint32_t row)
{
    const uint64_t open = peek(&core->open[row]);
    const uint32_t entry = LIKELY(open < LBGYM_INDEX_EXACT) ? (uint32_t)open : lbgym_index_entry(open);
    /* By entry, then by server: counts are alike, and so a scan has few cache lines to read. */
    return s->scores[(size_t)entry * core->options.servers + row];
}

uint32_t lbgym_choose(lbgym_core *core, const struct snapshot *s, uint64_t h)
{
    switch (s->mechanism) {
    case LBGYM_ALIAS:
        return lbgym_alias_server(&s->aliases[lbgym_to_range(h, s->size)], h);
    case LBGYM_LOOKUP:
        return s->lookup[lbgym_to_range(h, s->size)];
    case LBGYM_TURNS:
        return s->lookup[atomic_fetch_add_explicit(&core->turn, 1, memory_order_relaxed) % s->size];
    case LBGYM_INDEX: {
        /* Ties go to the first from the hashed position on. */
        const uint32_t start = lbgym_to_range(h, s->rows);
        uint64_t least = LBGYM_INDEX_NEVER;
        uint32_t best = NONE;
        for (uint32_t row = start; row < s->rows; row++) {
            const uint64_t value = score_of(core, s, row);
            if (value < least) {
                least = value;
                best = row;
            }
        }
        for (uint32_t row = 0; row < start; row++) {
            const uint64_t value = score_of(core, s, row);
            if (value < least) {
                least = value;
                best = row;
            }
        }
        return best;
    }
    case LBGYM_TWO_CHOICES: {
        const uint32_t one = lbgym_to_range(h, s->size), taken = s->lookup[one];
        uint32_t other;
        if (s->size < 2) {
            return taken;
        }
        other = s->lookup[lbgym_second_candidate(h, one, s->size)];
        return score_of(core, s, other) < score_of(core, s, taken) ? other : taken;
    }
    default:
        return NONE;
    }
}
