/* SPDX-License-Identifier: Apache-2.0 */
/* The inline functions of lbgym_features.h as functions that a test can call; C11 and C++17. */
#include "lbgym_features.h"
/* A second time, because headers include each other. */
#include "lbgym_features.h"

#ifdef __cplusplus
extern "C" {
#endif

size_t reservoir_size(void);
size_t server_size(void);
size_t scratch_size(void);
size_t server_reservoir(int duration);
bool reservoir_init(lbgym_reservoir *r, uint64_t seed, size_t capacity, double probability, int algorithm);
void reservoir_add(lbgym_reservoir *r, const uint64_t *values, const uint64_t *times, size_t n);
size_t reservoir_samples(const lbgym_reservoir *r, uint64_t *values, uint64_t *times);
uint64_t reservoir_random(const lbgym_reservoir *r);
void reservoir_features(const lbgym_reservoir *r, double decay, lbgym_weighted_sample *scratch, float *out);
void sample_features(const lbgym_sample *samples, size_t n, double decay, lbgym_weighted_sample *scratch, float *out);
bool server_init(lbgym_server *server, uint64_t seed, size_t capacity, double probability, int algorithm);
void server_flow_opened(lbgym_server *server);
void server_packet(lbgym_server *server, uint64_t opened, uint64_t now);
void server_flow_closed(lbgym_server *server, uint64_t opened, uint64_t now);
int64_t server_open_flows(const lbgym_server *server);
void server_stats(const lbgym_server *server, double decay, lbgym_weighted_sample *scratch, float *out);

size_t reservoir_size(void) { return sizeof(lbgym_reservoir); }

size_t server_size(void) { return sizeof(lbgym_server); }

size_t scratch_size(void) { return sizeof(lbgym_weighted_sample); }

/* Where in a server a reservoir is. */
size_t server_reservoir(int duration) { return duration ? offsetof(lbgym_server, duration) : offsetof(lbgym_server, fct); }

bool reservoir_init(lbgym_reservoir *r, uint64_t seed, size_t capacity, double probability, int algorithm)
{
    return lbgym_reservoir_init(r, seed, capacity, probability, (lbgym_algorithm)algorithm);
}

void reservoir_add(lbgym_reservoir *r, const uint64_t *values, const uint64_t *times, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        lbgym_reservoir_add(r, values[i], times[i]);
    }
}

size_t reservoir_samples(const lbgym_reservoir *r, uint64_t *values, uint64_t *times)
{
    for (size_t i = 0; i < r->filled; i++) {
        values[i] = r->slots[i].value_ns;
        times[i] = r->slots[i].time_ns;
    }
    return r->filled;
}

uint64_t reservoir_random(const lbgym_reservoir *r) { return r->random; }

void reservoir_features(const lbgym_reservoir *r, double decay, lbgym_weighted_sample *scratch, float *out)
{
    lbgym_reservoir_features(r, decay, scratch, out);
}

void sample_features(const lbgym_sample *samples, size_t n, double decay, lbgym_weighted_sample *scratch, float *out)
{
    lbgym_sample_features(samples, n, decay, scratch, out);
}

bool server_init(lbgym_server *server, uint64_t seed, size_t capacity, double probability, int algorithm)
{
    return lbgym_server_init(server, seed, capacity, probability, (lbgym_algorithm)algorithm);
}

void server_flow_opened(lbgym_server *server) { lbgym_server_flow_opened(server); }

void server_packet(lbgym_server *server, uint64_t opened, uint64_t now) { lbgym_server_packet(server, opened, now); }

void server_flow_closed(lbgym_server *server, uint64_t opened, uint64_t now)
{
    lbgym_server_flow_closed(server, opened, now);
}

int64_t server_open_flows(const lbgym_server *server) { return server->open_flows; }

void server_stats(const lbgym_server *server, double decay, lbgym_weighted_sample *scratch, float *out)
{
    lbgym_server_stats(server, decay, scratch, out);
}

#ifdef __cplusplus
}
#endif
