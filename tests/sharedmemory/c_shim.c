/* SPDX-License-Identifier: Apache-2.0 */
/* The inline functions of lbgym_shm.h as functions that a test can call; C11 and C++17. */
#include "lbgym_shm.h"
/* A second time, because headers include each other. */
#include "lbgym_shm.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef lbgym_shm_region R;

size_t region_size(void) { return sizeof(R); }
int tries(void) { return LBGYM_SHM_TRIES; }
uint64_t now(void) { return lbgym_shm_now(); }
const char *code_text(int code) { return lbgym_shm_strerror(code); }
uint64_t total_size(uint32_t capacity) { return lbgym_shm_total_size(capacity); }

/* Offsets of all sections, then the size. */
void frame_offsets(uint32_t n, uint64_t out[9])
{
    out[0] = lbgym_shm_frame_active(n);
    out[1] = lbgym_shm_frame_stats(n);
    out[2] = lbgym_shm_frame_ground_truth(n);
    out[3] = lbgym_shm_frame_counters(n);
    out[4] = lbgym_shm_frame_weights(n);
    out[5] = lbgym_shm_frame_safe_weights(n);
    out[6] = lbgym_shm_frame_states(n);
    out[7] = lbgym_shm_frame_ground_truth_age(n);
    out[8] = lbgym_shm_frame_size(n);
}

void action_offsets(uint32_t n, uint64_t out[5])
{
    out[0] = lbgym_shm_action_weights(n);
    out[1] = lbgym_shm_action_threshold(n);
    out[2] = lbgym_shm_action_alias(n);
    out[3] = lbgym_shm_action_index(n);
    out[4] = lbgym_shm_action_size(n);
}

int create(R *r, const char *name, uint32_t n, uint32_t capacity, uint64_t interval, double rate, const double *safe,
           const char *driver, uint32_t mode, int64_t gid, uint32_t features, bool takes_index)
{
    lbgym_shm_options options = lbgym_shm_default_options(n);
    options.capacity = capacity;
    options.publish_interval_ns = interval;
    options.clock_rate = rate;
    options.safe_weights = safe;
    options.driver = driver;
    options.mode = (mode_t)mode;
    options.gid = (gid_t)gid;
    options.features = features;
    options.takes_index = takes_index;
    return lbgym_shm_create(r, name, &options);
}

int attach(R *r, const char *name, int access) { return lbgym_shm_attach(r, name, (lbgym_shm_access)access); }
void close_region(R *r) { lbgym_shm_close(r); }
void forget(R *r) { lbgym_shm_forget(r); }
int unlink_region(R *r) { return lbgym_shm_unlink(r); }
const char *message(const R *r) { return r->message; }
uint32_t capacity(const R *r) { return r->constant.capacity; }
const void *mapping(const R *r) { return r->header; }
const void *frame(const R *r) { return r->observation.frame; }
const void *action(const R *r) { return r->action.action; }
bool safe(const R *r) { return r->safe; }
bool read_only(const R *r) { return r->read_only; }
void table(const R *r, uint32_t *threshold, uint32_t *alias)
{
    memcpy(threshold, r->threshold, r->observation.frame->num_servers * sizeof *threshold);
    memcpy(alias, r->alias, r->observation.frame->num_servers * sizeof *alias);
}

uint64_t latest(const R *r) { return lbgym_shm_latest(r); }
bool is_retired(const R *r) { return lbgym_shm_is_retired(r); }
bool replaced(const R *r) { return lbgym_shm_replaced(r); }
int producer_alive(R *r) { return lbgym_shm_producer_alive(r); }
int agent_alive(R *r) { return lbgym_shm_agent_alive(r); }
uint64_t heartbeat_age(const R *r) { return lbgym_shm_heartbeat_age(r); }
uint64_t agent_heartbeat_age(const R *r) { return lbgym_shm_agent_heartbeat_age(r); }

int read_newest(R *r) { return lbgym_shm_read(r); }
int read_earlier(R *r, uint64_t id) { return lbgym_shm_read_earlier(r, id); }
int wait_observation(R *r, uint64_t after, uint64_t timeout) { return lbgym_shm_wait_observation(r, after, timeout); }
int lock_agent(R *r) { return lbgym_shm_lock_agent(r); }
void unlock_agent(R *r) { lbgym_shm_unlock_agent(r); }
int write_action(R *r, uint64_t id, const double *weights, uint32_t n, uint64_t lease)
{
    return lbgym_shm_write_action(r, id, weights, n, lease);
}
int write_index(R *r, uint64_t id, const double *weights, const double *index, uint32_t n, uint64_t lease)
{
    return lbgym_shm_write_index(r, id, weights, index, n, lease);
}
uint32_t index_in_force(const R *r, double *index)
{
    uint32_t n;
    const double *found = lbgym_shm_index_in_force(r, &n);
    memcpy(index, found != NULL ? found : index, 2 * n * sizeof *index);
    return n;
}
int renew(R *r) { return lbgym_shm_renew(r); }

int set_num_servers(R *r, uint32_t n) { return lbgym_shm_set_num_servers(r, n); }
int set_safe_weights(R *r, const double *weights, uint32_t n) { return lbgym_shm_set_safe_weights(r, weights, n); }
int set_active(R *r, uint32_t server, bool active) { return lbgym_shm_set_active(r, server, active); }
int set_stats(R *r, uint32_t server, const float *stats) { return lbgym_shm_set_stats(r, server, stats); }
int set_ground_truth(R *r, uint32_t server, const float *truth)
{
    return lbgym_shm_set_ground_truth(r, server, truth[0], truth[1], truth[2]);
}
int set_ground_truth_time(R *r, uint32_t server, uint64_t at) { return lbgym_shm_set_ground_truth_time(r, server, at); }
int set_server_state(R *r, uint32_t server, int state)
{
    return lbgym_shm_set_server_state(r, server, (enum lbgym_shm_state)state);
}
int set_server_name(R *r, uint32_t server, const char *name) { return lbgym_shm_set_server_name(r, server, name); }
int read_names(R *r) { return lbgym_shm_read_names(r); }
const char *server_name(const R *r, uint32_t server) { return lbgym_shm_server_name(r, server); }
bool is_real(const R *r, unsigned column) { return lbgym_shm_is_real(r, column); }
int set_counters(R *r, uint32_t server, const uint64_t *counters)
{
    return lbgym_shm_set_counters(r, server, counters[0], counters[1], counters[2], counters[3]);
}
int set_totals(R *r, uint64_t unrouted, uint64_t fct_count, uint64_t fct_sum)
{
    return lbgym_shm_set_totals(r, unrouted, fct_count, fct_sum);
}
int publish(R *r, uint64_t timestamp) { return lbgym_shm_publish(r, timestamp); }
int heartbeat(R *r) { return lbgym_shm_heartbeat(r); }
int poll_action(R *r) { return lbgym_shm_poll_action(r); }
int wait_action(R *r, uint64_t timeout) { return lbgym_shm_wait_action(r, timeout); }
uint64_t lease_left(const R *r) { return lbgym_shm_lease_left(r); }
void pick(const R *r, const uint64_t *hashes, uint32_t *servers, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        servers[i] = lbgym_shm_pick(r, hashes[i]);
    }
}

double largest(const double *weights, size_t n) { return lbgym_shm_largest(weights, n); }
void alias_table(const double *weights, uint32_t n, uint32_t *threshold, uint32_t *alias, uint32_t *stack,
                 double *share)
{
    lbgym_shm_alias_table(weights, n, threshold, alias, stack, share);
}

#ifdef __cplusplus
}
#endif
