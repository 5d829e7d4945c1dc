/* SPDX-License-Identifier: Apache-2.0 */
/* Made by `python -m lbgym.sharedmemory.generate` from abi.py and lbgym_shm.h.in: change those, not lbgym_shm.h. */
/* The bridge in shared memory between a data plane and an agent, in C11 or C++17 with GCC or Clang, on 64-bit Linux;
 * nothing to link. The same protocol as lbgym.sharedmemory.SharedMemoryRegion, which docs/shared-memory.md explains.
 *
 * A data plane, the producer:
 *
 *     lbgym_shm_region region;
 *     lbgym_shm_options options = lbgym_shm_default_options(4);
 *     if (lbgym_shm_create(&region, "marllb_lb0", &options) < 0) {
 *         fprintf(stderr, "%s\n", region.message);
 *     }
 *     lbgym_shm_set_active(&region, i, true);             on changes; values persist
 *     lbgym_shm_set_stats(&region, i, stats);
 *     lbgym_shm_publish(&region, now_ns);                 once per interval
 *     lbgym_shm_poll_action(&region);                     before that, and when lbgym_shm_wait_action returns 1
 *     server = lbgym_shm_pick(&region, hash);             per flow: alias table of the weights in force
 *     weight = region.observation.weights[i];             or any rule on these weights
 *     lbgym_shm_unlink(&region);
 *     lbgym_shm_close(&region);
 *
 * An agent:
 *
 *     lbgym_shm_attach(&region, "marllb_lb0", LBGYM_SHM_READ_WRITE)
 *     lbgym_shm_wait_observation(&region, region.observation.frame->sequence_id, timeout_ns)
 *     lbgym_shm_read(&region)                             region.observation is now a private copy
 *     lbgym_shm_write_action(&region, sequence_id, weights, n, lease_ns)
 *     lbgym_shm_close(&region)
 *
 * Functions return 0 or more, or a negative lbgym_shm_code, with a sentence in region.message. None aborts, blocks
 * longer than its timeout, prints or keeps anything outside the region it is given. Times are ns; "now" is
 * CLOCK_MONOTONIC. Use a region from one thread at a time, and do not copy it. After fork the child shares the
 * kernel's locks with its parent: it must call lbgym_shm_forget at once.
 *
 * Where it is included does not matter, but with -std=c11 and the like, which hide POSIX: then include it before any
 * other header, or define _GNU_SOURCE on the command line. With -ffast-math alias tables may differ from those of other
 * programs in the last bit.
 */
#ifndef LBGYM_SHM_H
#define LBGYM_SHM_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

#if !defined(__linux__) || !defined(__LP64__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "lbgym_shm.h is for 64-bit little-endian Linux"
#elif !defined(O_CLOEXEC) || !defined(MAP_ANONYMOUS)
#error "lbgym_shm.h must be included before other headers, or with _GNU_SOURCE defined before them"
#else

/* Hidden by the C library if another header came first; all kernels that have them agree on the values. */
#ifndef F_OFD_GETLK
#define F_OFD_GETLK 36
#define F_OFD_SETLK 37
#endif
#ifndef O_TMPFILE
#define O_TMPFILE (020000000 | O_DIRECTORY)
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define LBGYM_SHM_MAGIC UINT64_C(0x4D48534D5947424C) /* the bytes "LBGYMSHM" */
#define LBGYM_SHM_VERSION_MAJOR 1
#define LBGYM_SHM_VERSION_MINOR 1
#define LBGYM_SHM_NUM_FRAMES 4 /* observation frames of a region made here */
#define LBGYM_SHM_NUM_ACTIONS 2 /* actions of a region made here */
#define LBGYM_SHM_NUM_NAMES 2 /* tables of names */
#define LBGYM_SHM_NAME_SIZE 64 /* bytes of a server's name, the last of which is 0 */
#define LBGYM_SHM_DEFAULT_CAPACITY 64 /* servers */
#define LBGYM_SHM_MAX_CAPACITY 65536 /* servers */
#define LBGYM_SHM_LINE 64 /* structs and sections begin on multiples of so many bytes */
#define LBGYM_SHM_STATE_RUNNING 1
#define LBGYM_SHM_STATE_CLOSED 2 /* published no more, or replaced by another region of the same name */
#define LBGYM_SHM_FLAG_GROUND_TRUTH 1 /* of a frame: the section ground_truth is filled */
#define LBGYM_SHM_FLAG_APPLIED 2 /* of a frame: an action has been applied since the producer started */
#define LBGYM_SHM_FLAG_SAFE 4 /* of a frame: the safe weights are in force */
#define LBGYM_SHM_OPTION_INDEX 1 /* of a region: its data plane takes index parameters */
#define LBGYM_SHM_FLAG_INDEX 1 /* of an action: the section index is filled */
#define LBGYM_SHM_GROUND_TRUTH_BIT 16 /* of the header's features: the first column of ground truth */
#define LBGYM_SHM_ALL_FEATURES 0x000707FF /* of the header's features: all of them are measured */
#define LBGYM_SHM_AGE_UNKNOWN UINT64_MAX /* of ground truth */
#define LBGYM_SHM_PRODUCER_LOCK 0 /* byte of the file that the producer locks */
#define LBGYM_SHM_AGENT_LOCK 1 /* byte of the file that the agent locks */

/* Columns of the section stats: counts and seconds. */
enum lbgym_shm_feature {
    LBGYM_SHM_N_FLOW_ON = 0,
    LBGYM_SHM_FCT_MEAN = 1,
    LBGYM_SHM_FCT_P90 = 2,
    LBGYM_SHM_FCT_STD = 3,
    LBGYM_SHM_FCT_MEAN_DECAY = 4,
    LBGYM_SHM_FCT_P90_DECAY = 5,
    LBGYM_SHM_DURATION_MEAN = 6,
    LBGYM_SHM_DURATION_P90 = 7,
    LBGYM_SHM_DURATION_STD = 8,
    LBGYM_SHM_DURATION_MEAN_DECAY = 9,
    LBGYM_SHM_DURATION_P90_DECAY = 10,
    LBGYM_SHM_NUM_FEATURES = 11
};

/* Columns of the section counters: flows since the producer started. */
enum lbgym_shm_counter {
    LBGYM_SHM_STARTED = 0,
    LBGYM_SHM_COMPLETED = 1,
    LBGYM_SHM_REJECTED = 2,
    LBGYM_SHM_FAILED = 3,
    LBGYM_SHM_NUM_COUNTERS = 4
};

#define LBGYM_SHM_NUM_GROUND_TRUTH 3

/* Values of the section states. */
enum lbgym_shm_state {
    LBGYM_SHM_UNKNOWN = 0,
    LBGYM_SHM_UP = 1,
    LBGYM_SHM_DRAINING = 2,
    LBGYM_SHM_DOWN = 3,
};

/* At the beginning of the region. Line 1 and 2 never change after creation; line 3 is written by the producer, line
 * 4 by the agent. */
typedef struct lbgym_shm_header {
    uint64_t magic;               /* the bytes "LBGYMSHM" */
    uint16_t version_major;       /* other values are refused */
    uint16_t version_minor;       /* other values are read */
    uint32_t header_size;         /* bytes of this struct */
    uint64_t total_size;          /* bytes of the region */
    uint32_t capacity;            /* servers there is room for */
    uint32_t num_frames;          /* observation frames in the ring, a power of two */
    uint32_t frames_offset;       /* bytes from the beginning of the region to the first frame */
    uint32_t frame_size;          /* bytes from one frame to the next */
    uint32_t actions_offset;      /* bytes from the beginning of the region to the first action */
    uint32_t action_size;         /* bytes from one action to the next */
    uint32_t num_actions;         /* 2 */
    /* bytes from the beginning of the region to the first table of names; 0: none (1.0) */
    uint32_t names_offset;
    uint32_t names_size;          /* bytes from one table of names to the next; there are 2 */
    uint32_t options;             /* 1 the data plane understands the section index of actions, which is there */
    uint64_t instance;            /* a random number, another one for each creation */
    uint64_t created_at;          /* ns of CLOCK_REALTIME */
    uint64_t publish_interval;    /* ns on the data plane's clock between observations, as planned */
    double clock_rate;            /* seconds of the data plane's clock per second; 1 unless time is scaled */
    uint32_t producer_pid;        /* process that created the region, in its own namespace */
    uint32_t features;            /* real columns: bit i feature i, bit 16 + i ground truth i; in 1.0 all of them are */
    char driver[24];              /* what kind of data plane this is, UTF-8 padded with zeros; for people */
    uint64_t latest;              /* sequence id of the newest observation; 0: none yet */
    uint64_t heartbeat;           /* ns of CLOCK_MONOTONIC at the producer's last sign of life */
    uint32_t observation_event;   /* grows with every observation; the futex that agents wait on */
    uint32_t observation_waiters; /* set by whoever is about to wait, cleared by the producer that wakes them */
    uint32_t state;               /* 1 running, 2 closed or replaced by another region of the same name */
    uint8_t reserved_0[4];
    uint64_t names_version;       /* changes of names so far; the newest are in table names_version % 2; 0: none yet */
    uint8_t reserved_1[24];
    uint64_t action_count;        /* actions written so far; the newest is in slot action_count % 2 */
    uint64_t agent_heartbeat;     /* ns of CLOCK_MONOTONIC at the agent's last sign of life */
    uint32_t action_event;        /* grows with every action; the futex that a producer may wait on */
    uint32_t action_waiters;      /* set by whoever is about to wait, cleared by the agent that wakes them */
    uint32_t agent_pid;           /* process that wrote last, in its own namespace; 0: none yet */
    uint8_t reserved_2[36];
} lbgym_shm_header;
static_assert(sizeof(lbgym_shm_header) == 256, "size of lbgym_shm_header");
static_assert(offsetof(lbgym_shm_header, magic) == 0, "lbgym_shm_header.magic");
static_assert(offsetof(lbgym_shm_header, version_major) == 8, "lbgym_shm_header.version_major");
static_assert(offsetof(lbgym_shm_header, version_minor) == 10, "lbgym_shm_header.version_minor");
static_assert(offsetof(lbgym_shm_header, header_size) == 12, "lbgym_shm_header.header_size");
static_assert(offsetof(lbgym_shm_header, total_size) == 16, "lbgym_shm_header.total_size");
static_assert(offsetof(lbgym_shm_header, capacity) == 24, "lbgym_shm_header.capacity");
static_assert(offsetof(lbgym_shm_header, num_frames) == 28, "lbgym_shm_header.num_frames");
static_assert(offsetof(lbgym_shm_header, frames_offset) == 32, "lbgym_shm_header.frames_offset");
static_assert(offsetof(lbgym_shm_header, frame_size) == 36, "lbgym_shm_header.frame_size");
static_assert(offsetof(lbgym_shm_header, actions_offset) == 40, "lbgym_shm_header.actions_offset");
static_assert(offsetof(lbgym_shm_header, action_size) == 44, "lbgym_shm_header.action_size");
static_assert(offsetof(lbgym_shm_header, num_actions) == 48, "lbgym_shm_header.num_actions");
static_assert(offsetof(lbgym_shm_header, names_offset) == 52, "lbgym_shm_header.names_offset");
static_assert(offsetof(lbgym_shm_header, names_size) == 56, "lbgym_shm_header.names_size");
static_assert(offsetof(lbgym_shm_header, options) == 60, "lbgym_shm_header.options");
static_assert(offsetof(lbgym_shm_header, instance) == 64, "lbgym_shm_header.instance");
static_assert(offsetof(lbgym_shm_header, created_at) == 72, "lbgym_shm_header.created_at");
static_assert(offsetof(lbgym_shm_header, publish_interval) == 80, "lbgym_shm_header.publish_interval");
static_assert(offsetof(lbgym_shm_header, clock_rate) == 88, "lbgym_shm_header.clock_rate");
static_assert(offsetof(lbgym_shm_header, producer_pid) == 96, "lbgym_shm_header.producer_pid");
static_assert(offsetof(lbgym_shm_header, features) == 100, "lbgym_shm_header.features");
static_assert(offsetof(lbgym_shm_header, driver) == 104, "lbgym_shm_header.driver");
static_assert(offsetof(lbgym_shm_header, latest) == 128, "lbgym_shm_header.latest");
static_assert(offsetof(lbgym_shm_header, heartbeat) == 136, "lbgym_shm_header.heartbeat");
static_assert(offsetof(lbgym_shm_header, observation_event) == 144, "lbgym_shm_header.observation_event");
static_assert(offsetof(lbgym_shm_header, observation_waiters) == 148, "lbgym_shm_header.observation_waiters");
static_assert(offsetof(lbgym_shm_header, state) == 152, "lbgym_shm_header.state");
static_assert(offsetof(lbgym_shm_header, names_version) == 160, "lbgym_shm_header.names_version");
static_assert(offsetof(lbgym_shm_header, action_count) == 192, "lbgym_shm_header.action_count");
static_assert(offsetof(lbgym_shm_header, agent_heartbeat) == 200, "lbgym_shm_header.agent_heartbeat");
static_assert(offsetof(lbgym_shm_header, action_event) == 208, "lbgym_shm_header.action_event");
static_assert(offsetof(lbgym_shm_header, action_waiters) == 212, "lbgym_shm_header.action_waiters");
static_assert(offsetof(lbgym_shm_header, agent_pid) == 216, "lbgym_shm_header.agent_pid");

/* An observation; its sections follow. Frame sequence_id % num_frames of the ring. */
typedef struct lbgym_shm_frame {
    uint64_t lock;                /* sequence lock: odd while the producer writes */
    uint64_t sequence_id;         /* 1, 2, 3, ... */
    uint64_t timestamp;           /* ns on the data plane's clock */
    uint64_t published_at;        /* ns of CLOCK_MONOTONIC */
    uint64_t applied_sequence_id; /* sequence id of the last action that was put in force */
    uint64_t applied_at;          /* ns of CLOCK_MONOTONIC when that was */
    uint32_t num_servers;         /* servers known to the data plane, at most the capacity */
    /* 1 ground truth is there, 2 an action has been applied, 4 safe weights are in force */
    uint32_t flags;
    uint64_t unrouted;            /* flows that found no active server, since the producer started */
    uint64_t fct_count;           /* flows that ended since the producer started, as far as it knows their FCT */
    uint64_t fct_sum;             /* ns, sum of those FCTs; a rejected flow counts with the data plane's timeout */
    uint64_t names_version;       /* of the names that belong to these servers; 0: none yet */
    uint8_t reserved_0[40];
} lbgym_shm_frame;
static_assert(sizeof(lbgym_shm_frame) == 128, "size of lbgym_shm_frame");
static_assert(offsetof(lbgym_shm_frame, lock) == 0, "lbgym_shm_frame.lock");
static_assert(offsetof(lbgym_shm_frame, sequence_id) == 8, "lbgym_shm_frame.sequence_id");
static_assert(offsetof(lbgym_shm_frame, timestamp) == 16, "lbgym_shm_frame.timestamp");
static_assert(offsetof(lbgym_shm_frame, published_at) == 24, "lbgym_shm_frame.published_at");
static_assert(offsetof(lbgym_shm_frame, applied_sequence_id) == 32, "lbgym_shm_frame.applied_sequence_id");
static_assert(offsetof(lbgym_shm_frame, applied_at) == 40, "lbgym_shm_frame.applied_at");
static_assert(offsetof(lbgym_shm_frame, num_servers) == 48, "lbgym_shm_frame.num_servers");
static_assert(offsetof(lbgym_shm_frame, flags) == 52, "lbgym_shm_frame.flags");
static_assert(offsetof(lbgym_shm_frame, unrouted) == 56, "lbgym_shm_frame.unrouted");
static_assert(offsetof(lbgym_shm_frame, fct_count) == 64, "lbgym_shm_frame.fct_count");
static_assert(offsetof(lbgym_shm_frame, fct_sum) == 72, "lbgym_shm_frame.fct_sum");
static_assert(offsetof(lbgym_shm_frame, names_version) == 80, "lbgym_shm_frame.names_version");

/* Weights for the servers; its sections follow. */
typedef struct lbgym_shm_action {
    uint64_t lock;          /* sequence lock: odd while the agent writes */
    uint64_t sequence_id;   /* the agent's number of this action; comes back as applied_sequence_id */
    uint64_t written_at;    /* ns of CLOCK_MONOTONIC */
    uint64_t lease;         /* ns after written_at for which the weights are good; 0: for ever */
    uint32_t num_servers;   /* weights given; further servers have their safe weights */
    uint32_t flags;         /* 1 the section index is filled */
    uint8_t reserved_0[24];
} lbgym_shm_action;
static_assert(sizeof(lbgym_shm_action) == 64, "size of lbgym_shm_action");
static_assert(offsetof(lbgym_shm_action, lock) == 0, "lbgym_shm_action.lock");
static_assert(offsetof(lbgym_shm_action, sequence_id) == 8, "lbgym_shm_action.sequence_id");
static_assert(offsetof(lbgym_shm_action, written_at) == 16, "lbgym_shm_action.written_at");
static_assert(offsetof(lbgym_shm_action, lease) == 24, "lbgym_shm_action.lease");
static_assert(offsetof(lbgym_shm_action, num_servers) == 32, "lbgym_shm_action.num_servers");
static_assert(offsetof(lbgym_shm_action, flags) == 36, "lbgym_shm_action.flags");

/* The names of all servers; its section follows. */
typedef struct lbgym_shm_names {
    uint64_t lock;          /* sequence lock: odd while the producer writes */
    uint64_t version;       /* 1, 2, 3, ... */
    uint32_t num_servers;   /* rows that count: the most servers there have been */
    uint8_t reserved_0[44];
} lbgym_shm_names;
static_assert(sizeof(lbgym_shm_names) == 64, "size of lbgym_shm_names");
static_assert(offsetof(lbgym_shm_names, lock) == 0, "lbgym_shm_names.lock");
static_assert(offsetof(lbgym_shm_names, version) == 8, "lbgym_shm_names.version");
static_assert(offsetof(lbgym_shm_names, num_servers) == 16, "lbgym_shm_names.num_servers");

/* Bytes up to the next line. */
static inline uint64_t lbgym_shm_lines(uint64_t size)
{
    return (size + LBGYM_SHM_LINE - 1) / LBGYM_SHM_LINE * LBGYM_SHM_LINE;
}

/* Offset of active in a frame, uint8_t[capacity]: 1: the server takes new flows, 0: it does not. */
static inline uint64_t lbgym_shm_frame_active(uint32_t capacity)
{
    (void)capacity;
    return sizeof(lbgym_shm_frame);
}

/* Offset of stats in a frame, float[capacity][11]: features: n_flow_on, fct_mean, fct_p90, fct_std, fct_mean_decay,
 * fct_p90_decay, duration_mean, duration_p90, duration_std, duration_mean_decay, duration_p90_decay; zero for
 * inactive servers. */
static inline uint64_t lbgym_shm_frame_stats(uint32_t capacity)
{
    return lbgym_shm_frame_active(capacity) + lbgym_shm_lines((uint64_t)capacity * sizeof(uint8_t));
}

/* Offset of ground_truth in a frame, float[capacity][3]: cpu_usage, memory_usage, busy_workers; if the flag says so. */
static inline uint64_t lbgym_shm_frame_ground_truth(uint32_t capacity)
{
    return lbgym_shm_frame_stats(capacity) + lbgym_shm_lines((uint64_t)capacity * 11 * sizeof(float));
}

/* Offset of counters in a frame, uint64_t[capacity][4]: flows started, completed, rejected, failed, since the
 * producer started. */
static inline uint64_t lbgym_shm_frame_counters(uint32_t capacity)
{
    return lbgym_shm_frame_ground_truth(capacity) + lbgym_shm_lines((uint64_t)capacity * 3 * sizeof(float));
}

/* Offset of weights in a frame, double[capacity]: the weights in force. */
static inline uint64_t lbgym_shm_frame_weights(uint32_t capacity)
{
    return lbgym_shm_frame_counters(capacity) + lbgym_shm_lines((uint64_t)capacity * 4 * sizeof(uint64_t));
}

/* Offset of safe_weights in a frame, double[capacity]: the weights that come in force when no agent's are. */
static inline uint64_t lbgym_shm_frame_safe_weights(uint32_t capacity)
{
    return lbgym_shm_frame_weights(capacity) + lbgym_shm_lines((uint64_t)capacity * sizeof(double));
}

/* Offset of states in a frame, uint8_t[capacity]: 0 unknown, 1 up, 2 draining, 3 down; higher values are read as 0. */
static inline uint64_t lbgym_shm_frame_states(uint32_t capacity)
{
    return lbgym_shm_frame_safe_weights(capacity) + lbgym_shm_lines((uint64_t)capacity * sizeof(double));
}

/* Offset of ground_truth_age in a frame, uint64_t[capacity]: ns from the measurement to published_at, below 2^63;
 * 2^64 - 1: unknown. */
static inline uint64_t lbgym_shm_frame_ground_truth_age(uint32_t capacity)
{
    return lbgym_shm_frame_states(capacity) + lbgym_shm_lines((uint64_t)capacity * sizeof(uint8_t));
}

static inline uint64_t lbgym_shm_frame_size(uint32_t capacity)
{
    return lbgym_shm_frame_ground_truth_age(capacity) + lbgym_shm_lines((uint64_t)capacity * sizeof(uint64_t));
}

/* Offset of weights in an action, double[capacity]: at least 0, not all 0. */
static inline uint64_t lbgym_shm_action_weights(uint32_t capacity)
{
    (void)capacity;
    return sizeof(lbgym_shm_action);
}

/* Offset of threshold in an action, uint32_t[capacity]: alias table: 2**32 times the probability to keep the bucket. */
static inline uint64_t lbgym_shm_action_threshold(uint32_t capacity)
{
    return lbgym_shm_action_weights(capacity) + lbgym_shm_lines((uint64_t)capacity * sizeof(double));
}

/* Offset of alias in an action, uint32_t[capacity]: alias table: the server to take otherwise. */
static inline uint64_t lbgym_shm_action_alias(uint32_t capacity)
{
    return lbgym_shm_action_threshold(capacity) + lbgym_shm_lines((uint64_t)capacity * sizeof(uint32_t));
}

/* Offset of index in an action, double[capacity][2]: speed per core (above 0, of a server whose weight is) and
 * background load (flows), for dispatch by index. */
static inline uint64_t lbgym_shm_action_index(uint32_t capacity)
{
    return lbgym_shm_action_alias(capacity) + lbgym_shm_lines((uint64_t)capacity * sizeof(uint32_t));
}

static inline uint64_t lbgym_shm_action_size(uint32_t capacity)
{
    return lbgym_shm_action_index(capacity) + lbgym_shm_lines((uint64_t)capacity * 2 * sizeof(double));
}

/* Offset of names in a table of names, uint8_t[capacity][64]: UTF-8 padded with zeros, at most 63 bytes; empty:
 * unnamed. */
static inline uint64_t lbgym_shm_names_names(uint32_t capacity)
{
    (void)capacity;
    return sizeof(lbgym_shm_names);
}

static inline uint64_t lbgym_shm_names_size(uint32_t capacity)
{
    return lbgym_shm_names_names(capacity) + lbgym_shm_lines((uint64_t)capacity * 64 * sizeof(uint8_t));
}

/* Bytes of a region made here, without index parameters. */
static inline uint64_t lbgym_shm_total_size(uint32_t capacity)
{
    return sizeof(lbgym_shm_header) + LBGYM_SHM_NUM_FRAMES * lbgym_shm_frame_size(capacity) +
           LBGYM_SHM_NUM_ACTIONS * lbgym_shm_action_index(capacity) +
           LBGYM_SHM_NUM_NAMES * lbgym_shm_names_size(capacity);
}

/* Copies that may go wrong before a reader gives up; each takes longer than a writer needs for its next frame. */
#define LBGYM_SHM_TRIES 1000

#define LBGYM_SHM_SECOND UINT64_C(1000000000)
#define LBGYM_SHM_DAY (86400 * LBGYM_SHM_SECOND)

/* Looks at a name that belongs to somebody, a millisecond apart, before it counts as taken: whoever replaces the region
 * of a dead producer holds that region's lock for a moment. */
#define LBGYM_SHM_LOOKS 10

/* Returned by lbgym_shm_pick if no server is active. */
#define LBGYM_SHM_NO_SERVER UINT32_MAX

/** Return values of functions: 0 or more, or one of these. */
typedef enum lbgym_shm_code {
    LBGYM_SHM_OK = 0,
    LBGYM_SHM_NAME = -1,       /* not a valid name of a region */
    LBGYM_SHM_NOT_FOUND = -2,  /* there is no region of that name */
    LBGYM_SHM_EXISTS = -3,     /* the name belongs to a live region, or to another file */
    LBGYM_SHM_FORMAT = -4,     /* not a region, of another version, or with invalid contents */
    LBGYM_SHM_PERMISSION = -5, /* of the file, its directory, or of a region attached to read only */
    LBGYM_SHM_NO_ROOM = -6,    /* not enough memory */
    LBGYM_SHM_BUSY = -7,       /* the region has another agent, or is written to faster than it can be read */
    LBGYM_SHM_WEIGHTS = -8,    /* weights that are negative, not finite, all zero, or not one per server */
    LBGYM_SHM_OPTION = -9,     /* an argument out of range */
    LBGYM_SHM_ROLE = -10,      /* the region is closed, or attached as the other side */
    LBGYM_SHM_SYSTEM = -11     /* an error of the operating system; see errno */
} lbgym_shm_code;

/** A sentence for a code; region.message says more. */
static inline const char *lbgym_shm_strerror(int code)
{
    switch (code) {
    case LBGYM_SHM_NAME:
        return "the name of a region has 1 to 200 letters, digits, '.', '-' or '_' and begins with a letter or digit";
    case LBGYM_SHM_NOT_FOUND:
        return "there is no region of this name";
    case LBGYM_SHM_EXISTS:
        return "the name belongs to a live region, or to a file that is no region";
    case LBGYM_SHM_FORMAT:
        return "this is no region, or one of another version, or it has contents that nobody may write";
    case LBGYM_SHM_PERMISSION:
        return "permission denied";
    case LBGYM_SHM_NO_ROOM:
        return "there is no memory left for the region";
    case LBGYM_SHM_BUSY:
        return "the region has another agent, or is written to faster than it can be read";
    case LBGYM_SHM_WEIGHTS:
        return "weights must be finite numbers of at least 0, one per server, and not all 0";
    case LBGYM_SHM_OPTION:
        return "an argument is outside its range";
    case LBGYM_SHM_ROLE:
        return "the region is closed, or this is for its other side to do";
    case LBGYM_SHM_SYSTEM:
        return "the operating system refused";
    default:
        return code >= 0 ? "no error" : "unknown error";
    }
}

/** Modes of attaching. */
typedef enum lbgym_shm_access {
    LBGYM_SHM_ANY = 0,       /* read and write, or read only if the file's permissions forbid to write */
    LBGYM_SHM_READ_WRITE = 1,
    LBGYM_SHM_READ_ONLY = 2
} lbgym_shm_access;

/** A private frame and its sections. The producer's is what it publishes next, everybody else's what was read last. */
typedef struct lbgym_shm_observation {
    lbgym_shm_frame *frame;
    uint8_t *active;      /* [capacity] */
    float *stats;         /* [capacity][LBGYM_SHM_NUM_FEATURES] */
    float *ground_truth;  /* [capacity][LBGYM_SHM_NUM_GROUND_TRUTH] */
    uint64_t *counters;   /* [capacity][LBGYM_SHM_NUM_COUNTERS] */
    double *weights;      /* [capacity], in force */
    double *safe_weights; /* [capacity] */
    uint8_t *states;      /* [capacity], of enum lbgym_shm_state; all 0, unknown, if the region is of version 1.0 */
    uint64_t *ground_truth_age; /* [capacity], ns at the publication, or LBGYM_SHM_AGE_UNKNOWN */
} lbgym_shm_observation;

/** A private action and its sections. The producer's is the newest it has seen, the agent's the last it wrote. */
typedef struct lbgym_shm_weights {
    lbgym_shm_action *action;
    double *weights;     /* [capacity] */
    uint32_t *threshold; /* [capacity] */
    uint32_t *alias;     /* [capacity] */
    double *index;       /* [capacity][2], speed and background load; only if action->flags & LBGYM_SHM_FLAG_INDEX */
} lbgym_shm_weights;

typedef struct lbgym_shm_region {
    lbgym_shm_header *header;  /* the mapping; NULL if the region is closed */
    lbgym_shm_header constant; /* a copy of the header as it was checked: sizes, offsets, capacity, driver, ... */
    lbgym_shm_observation observation;
    lbgym_shm_weights action;
    uint32_t *threshold; /* alias table of the weights in force, for the producer */
    uint32_t *alias;
    uint32_t *stack; /* scratch of alias tables */
    uint64_t *ground_truth_time; /* for the producer: CLOCK_MONOTONIC ns of measurements, or LBGYM_SHM_AGE_UNKNOWN */
    lbgym_shm_names *names;      /* private table, the producer's or the last that was read; its rows follow */
    bool names_changed;          /* the producer's table is to be published */
    double *share;
    uint64_t action_known; /* number of the action in `action`; 0: none */
    uint64_t action_seen;  /* number up to which the producer has looked */
    uint64_t lease_end;    /* of that action, ns; UINT64_MAX: never */
    uint64_t sequence_id;  /* of the last observation published here */
    dev_t device;
    ino_t inode;
    int descriptor;
    bool is_producer;
    bool is_agent;
    bool read_only;
    bool safe; /* the producer's safe weights are in force */
    char name[201];
    char path[4096];
    char message[4608]; /* about the last error */
} lbgym_shm_region;

/** Of a new region. */
typedef struct lbgym_shm_options {
    uint32_t num_servers;         /* known at the beginning */
    uint32_t capacity;            /* servers there is room for; 0: 64, or num_servers if that is more */
    uint64_t publish_interval_ns; /* on the data plane's clock, as planned: 1 us to 1 day */
    double clock_rate;            /* seconds of the data plane's clock per second; 1 unless time is scaled */
    const double *safe_weights;   /* [num_servers], in force without an agent's; NULL: all 1 */
    const char *driver;           /* kind of data plane, at most 24 printable bytes of UTF-8; for people */
    mode_t mode;                  /* permissions of the file */
    gid_t gid;                    /* owning group; (gid_t)-1: the process's */
    uint32_t features;            /* columns that are measured; bits as in the header. LBGYM_SHM_ALL_FEATURES: all */
    bool takes_index;             /* the data plane dispatches by index parameters where an action gives them */
} lbgym_shm_options;

/** The default options for a number of servers. */
static inline lbgym_shm_options lbgym_shm_default_options(uint32_t num_servers)
{
    lbgym_shm_options options;
    options.num_servers = num_servers;
    options.capacity = 0;
    options.publish_interval_ns = LBGYM_SHM_SECOND / 4;
    options.clock_rate = 1.0;
    options.safe_weights = NULL;
    options.driver = "";
    options.mode = 0600;
    options.gid = (gid_t)-1;
    options.features = LBGYM_SHM_ALL_FEATURES;
    options.takes_index = false;
    return options;
}

/** ns of CLOCK_MONOTONIC. */
static inline uint64_t lbgym_shm_now(void)
{
    struct timespec now;
    (void)clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * LBGYM_SHM_SECOND + (uint64_t)now.tv_nsec;
}

/* Writes a message to the region and returns the code. */
__attribute__((cold, format(printf, 3, 4))) static inline int lbgym_shm_fail(lbgym_shm_region *region, int code,
                                                                             const char *format, ...)
{
    const int error = errno;
    va_list arguments;
    va_start(arguments, format);
    (void)vsnprintf(region->message, sizeof region->message, format, arguments);
    va_end(arguments);
    errno = error;
    return code;
}

/* 64-bit and 32-bit numbers in shared memory, which may alias any type. */
typedef uint32_t __attribute__((may_alias)) lbgym_shm_bits32;
typedef uint64_t __attribute__((may_alias)) lbgym_shm_bits64;

/* True if all are finite and at least 0. Compared as integers, which vectorises, and which -ffast-math does not touch;
 * -0.0 is at least 0. */
static inline bool lbgym_shm_floats_good(const float *values, size_t n)
{
    const lbgym_shm_bits32 *bits = (const lbgym_shm_bits32 *)values;
    uint32_t bad = 0;
    for (size_t i = 0; i < n; i++) {
        bad |= (uint32_t)(bits[i] > UINT32_C(0x7F7FFFFF)) & (uint32_t)(bits[i] != UINT32_C(0x80000000));
    }
    return bad == 0;
}

/* The same. */
static inline bool lbgym_shm_doubles_good(const double *values, size_t n)
{
    const lbgym_shm_bits64 *bits = (const lbgym_shm_bits64 *)values;
    uint64_t bad = 0;
    for (size_t i = 0; i < n; i++) {
        bad |= (uint64_t)(bits[i] > UINT64_C(0x7FEFFFFFFFFFFFFF)) &
               (uint64_t)(bits[i] != UINT64_C(0x8000000000000000));
    }
    return bad == 0;
}

/* The largest weight; -1 if one is negative, infinite or NaN. */
static inline double lbgym_shm_largest(const double *weights, size_t n)
{
    double largest = 0.0;
    if (!lbgym_shm_doubles_good(weights, n)) {
        return -1.0;
    }
    for (size_t i = 0; i < n; i++) {
        largest = weights[i] > largest ? weights[i] : largest;
    }
    return largest;
}

/* Vose's alias table (IEEE TSE 17(9), 1991) for n weights, at least 0 and not all 0; the same as Python's, bit for bit.
 * Bucket i is kept with probability threshold[i] / 2^32 (and always if alias[i] is i), else alias[i] is taken. Scratch:
 * `stack` holds servers below their share from the front, those above it from the back. */
static inline void lbgym_shm_alias_table(const double *weights, uint32_t n, uint32_t *threshold, uint32_t *alias,
                                         uint32_t *stack, double *share)
{
    uint32_t small = 0, large = n, best = 0, i, j;
    double largest = 0.0, total = 0.0, scaled;
    for (i = 0; i < n; i++) {
        if (weights[i] > largest) {
            largest = weights[i];
            best = i;
        }
    }
    /* Divided by the largest first, so that no sum overflows. */
    for (i = 0; i < n; i++) {
        share[i] = weights[i] / largest;
        total += share[i];
    }
    for (i = 0; i < n; i++) {
        share[i] = share[i] * (double)n / total;
        if (share[i] < 1.0) {
            stack[small++] = i;
        } else {
            stack[--large] = i;
        }
    }
    while (small > 0 && large < n) {
        i = stack[--small];
        j = stack[large];
        scaled = share[i] * 4294967296.0;
        threshold[i] = (uint32_t)(scaled < 4294967295.0 ? scaled : 4294967295.0);
        alias[i] = j;
        share[j] = (share[j] + share[i]) - 1.0;
        if (share[j] < 1.0) {
            large++;
            stack[small++] = j;
        }
    }
    /* The rest have exactly their share, but for rounding. */
    while (large < n) {
        i = stack[large++];
        threshold[i] = UINT32_MAX;
        alias[i] = i;
    }
    while (small > 0) {
        i = stack[--small];
        threshold[i] = weights[i] > 0.0 ? UINT32_MAX : 0;
        alias[i] = weights[i] > 0.0 ? i : best;
    }
}

/* The system */

/* Sleeps while the word is `value`, at most `timeout` ns; may return for no reason. False if a signal came. */
static inline bool lbgym_shm_futex_wait(uint32_t *word, uint32_t value, uint64_t timeout)
{
    struct timespec relative;
    relative.tv_sec = (time_t)(timeout / LBGYM_SHM_SECOND);
    relative.tv_nsec = (long)(timeout % LBGYM_SHM_SECOND);
    return !(syscall(SYS_futex, word, 0 /* FUTEX_WAIT */, value, &relative, NULL, 0) < 0 && errno == EINTR);
}

/* Wakes everybody who waits. */
static inline void lbgym_shm_futex_wake(uint32_t *word)
{
    (void)syscall(SYS_futex, word, 1 /* FUTEX_WAKE */, INT32_MAX, NULL, NULL, 0);
}

/* An open file description's lock on a byte of a file: 1 if it is taken now, 0 if another one holds it. The kernel
 * drops it when the last copy of the descriptor is closed, however the process ends. */
static inline int lbgym_shm_lock(int descriptor, int type, off_t byte)
{
    struct flock lock;
    memset(&lock, 0, sizeof lock);
    lock.l_type = (short)type;
    lock.l_whence = SEEK_SET;
    lock.l_start = byte;
    lock.l_len = 1;
    if (fcntl(descriptor, F_OFD_SETLK, &lock) == 0) {
        return 1;
    }
    return errno == EAGAIN || errno == EACCES ? 0 : LBGYM_SHM_SYSTEM;
}

/* 1 if another open file description holds the lock on a byte, 0 if none does. */
static inline int lbgym_shm_is_locked(int descriptor, off_t byte)
{
    struct flock lock;
    memset(&lock, 0, sizeof lock);
    lock.l_type = F_WRLCK;
    lock.l_whence = SEEK_SET;
    lock.l_start = byte;
    lock.l_len = 1;
    if (fcntl(descriptor, F_OFD_GETLK, &lock) < 0) {
        return LBGYM_SHM_SYSTEM;
    }
    return lock.l_type != F_UNLCK;
}

/* Empties the region and notes name and path. */
static inline int lbgym_shm_begin(lbgym_shm_region *region, const char *name)
{
    const char *folder = getenv("LBGYM_SHM_DIR");
    size_t length;
    memset(region, 0, sizeof *region);
    region->descriptor = -1;
    region->safe = true;
    for (length = 0; name != NULL && name[length] != '\0' && length <= 200; length++) {
        const char c = name[length];
        const bool plain = (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9');
        if (!plain && (length == 0 || (c != '.' && c != '-' && c != '_'))) {
            length = 0;
            break;
        }
    }
    if (length < 1 || length > 200) {
        return lbgym_shm_fail(region, LBGYM_SHM_NAME, "%s, got '%.201s'", lbgym_shm_strerror(LBGYM_SHM_NAME),
                              name != NULL ? name : "");
    }
    memcpy(region->name, name, length);
    if (folder == NULL || folder[0] == '\0') {
        folder = "/dev/shm";
    }
    if (strlen(folder) + 1 + length >= sizeof region->path) {
        return lbgym_shm_fail(region, LBGYM_SHM_NAME, "LBGYM_SHM_DIR is longer than %zu bytes",
                              sizeof region->path - 1 - length);
    }
    (void)strcpy(region->path, folder);
    (void)strcat(region->path, "/");
    (void)strcat(region->path, region->name);
    return LBGYM_SHM_OK;
}

/* Says why this file is not a usable region. */
#define LBGYM_SHM_REFUSE(region, format, ...)                                                                          \
    lbgym_shm_fail(region, LBGYM_SHM_FORMAT, "%s is no region that this program can use: " format, (region)->path,    \
                   __VA_ARGS__)

/* True if actions have the section index. */
static inline bool lbgym_shm_has_index(const lbgym_shm_header *header)
{
    return header->version_minor > 0 && (header->options & LBGYM_SHM_OPTION_INDEX) != 0;
}

/* Copies the header of the open file to `constant`, if it is a readable region. */
static inline int lbgym_shm_check(lbgym_shm_region *region, const struct stat *status)
{
    lbgym_shm_header *const h = &region->constant;
    const uint64_t size = (uint64_t)status->st_size;
    uint64_t frame, action;
    ssize_t got;
    bool fits;
    if (!S_ISREG(status->st_mode)) {
        return LBGYM_SHM_REFUSE(region, "%s", "it is no regular file");
    }
    got = pread(region->descriptor, h, sizeof *h, 0);
    if (got < (ssize_t)sizeof *h) {
        return LBGYM_SHM_REFUSE(region, "it has %zd bytes, and a header has %zu", got < 0 ? 0 : got, sizeof *h);
    }
    if (h->magic != LBGYM_SHM_MAGIC) {
        return LBGYM_SHM_REFUSE(region, "%s", "it begins with other bytes than 'LBGYMSHM'");
    }
    if (h->version_major != LBGYM_SHM_VERSION_MAJOR) {
        return LBGYM_SHM_REFUSE(region, "it has version %u.%u of the binary interface, this is %d",
                                (unsigned)h->version_major, (unsigned)h->version_minor, LBGYM_SHM_VERSION_MAJOR);
    }
    if (h->total_size != size) {
        return LBGYM_SHM_REFUSE(region, "its header says %llu bytes, the file has %llu",
                                (unsigned long long)h->total_size, (unsigned long long)size);
    }
    if (h->capacity < 1 || h->capacity > LBGYM_SHM_MAX_CAPACITY) {
        return LBGYM_SHM_REFUSE(region, "its capacity is %u, allowed are 1 to %d", (unsigned)h->capacity,
                                LBGYM_SHM_MAX_CAPACITY);
    }
    /* Regions of version 1.0 have fewer sections, and reserved bytes where the options are. */
    frame = h->version_minor == 0 ? lbgym_shm_frame_states(h->capacity) : lbgym_shm_frame_size(h->capacity);
    action = lbgym_shm_has_index(h) ? lbgym_shm_action_size(h->capacity) : lbgym_shm_action_index(h->capacity);
    fits = (h->header_size | h->frames_offset | h->frame_size | h->actions_offset | h->action_size) % LBGYM_SHM_LINE ==
               0 &&
           h->total_size % LBGYM_SHM_LINE == 0 && h->header_size >= sizeof *h && h->header_size <= h->frames_offset &&
           h->frame_size >= frame && h->action_size >= action &&
           h->num_frames >= 2 && h->num_frames <= 1024 && (h->num_frames & (h->num_frames - 1)) == 0 &&
           h->num_actions >= 2 && h->num_actions <= 1024 && (h->num_actions & (h->num_actions - 1)) == 0 &&
           h->frames_offset + (uint64_t)h->num_frames * h->frame_size <= h->actions_offset &&
           h->actions_offset + (uint64_t)h->num_actions * h->action_size <= h->total_size;
    if (h->version_minor > 0) {
        fits = fits && (h->names_offset | h->names_size) % LBGYM_SHM_LINE == 0 &&
               h->names_size >= lbgym_shm_names_size(h->capacity) &&
               h->actions_offset + (uint64_t)h->num_actions * h->action_size <= h->names_offset &&
               h->names_offset + LBGYM_SHM_NUM_NAMES * (uint64_t)h->names_size <= h->total_size;
    }
    if (!fits) {
        return LBGYM_SHM_REFUSE(region, "%s", "its sizes and offsets contradict each other");
    }
    if (!(h->clock_rate >= 1e-6 && h->clock_rate <= 1e6)) {
        return LBGYM_SHM_REFUSE(region, "its clock rate is %g", h->clock_rate);
    }
    if (h->publish_interval < 1 || h->publish_interval > LBGYM_SHM_DAY) {
        return LBGYM_SHM_REFUSE(region, "its publish interval is %llu ns", (unsigned long long)h->publish_interval);
    }
    return LBGYM_SHM_OK;
}

/* Memory for private copies and scratch, all zero. */
static inline bool lbgym_shm_allocate(lbgym_shm_region *region)
{
    const uint32_t n = region->constant.capacity;
    const uint64_t frame = lbgym_shm_frame_size(n), action = lbgym_shm_action_size(n);
    const uint64_t names = lbgym_shm_names_size(n);
    unsigned char *memory = (unsigned char *)calloc(
        1, frame + action + names + n * (sizeof(double) + sizeof(uint64_t) + 3 * (uint64_t)sizeof(uint32_t)));
    if (memory == NULL) {
        return false;
    }
    region->observation.frame = (lbgym_shm_frame *)(void *)memory;
    region->observation.active = memory + lbgym_shm_frame_active(n);
    region->observation.stats = (float *)(void *)(memory + lbgym_shm_frame_stats(n));
    region->observation.ground_truth = (float *)(void *)(memory + lbgym_shm_frame_ground_truth(n));
    region->observation.counters = (uint64_t *)(void *)(memory + lbgym_shm_frame_counters(n));
    region->observation.weights = (double *)(void *)(memory + lbgym_shm_frame_weights(n));
    region->observation.safe_weights = (double *)(void *)(memory + lbgym_shm_frame_safe_weights(n));
    region->observation.states = memory + lbgym_shm_frame_states(n);
    region->observation.ground_truth_age = (uint64_t *)(void *)(memory + lbgym_shm_frame_ground_truth_age(n));
    memory += frame;
    region->action.action = (lbgym_shm_action *)(void *)memory;
    region->action.weights = (double *)(void *)(memory + lbgym_shm_action_weights(n));
    region->action.threshold = (uint32_t *)(void *)(memory + lbgym_shm_action_threshold(n));
    region->action.alias = (uint32_t *)(void *)(memory + lbgym_shm_action_alias(n));
    region->action.index = (double *)(void *)(memory + lbgym_shm_action_index(n));
    memory += action;
    region->names = (lbgym_shm_names *)(void *)memory;
    memory += names;
    region->share = (double *)(void *)memory;
    region->ground_truth_time = (uint64_t *)(void *)(region->share + n);
    region->threshold = (uint32_t *)(void *)(region->ground_truth_time + n);
    region->alias = region->threshold + n;
    region->stack = region->alias + n;
    return true;
}

/* Maps the open file, whose header has been checked. */
static inline int lbgym_shm_map(lbgym_shm_region *region)
{
    void *memory;
    if (!lbgym_shm_allocate(region)) {
        return lbgym_shm_fail(region, LBGYM_SHM_NO_ROOM, "no memory for a copy of an observation of region '%s'",
                              region->name);
    }
    memory = mmap(NULL, region->constant.total_size, region->read_only ? PROT_READ : PROT_READ | PROT_WRITE,
                  MAP_SHARED, region->descriptor, 0);
    if (memory == MAP_FAILED) {
        return lbgym_shm_fail(region, LBGYM_SHM_SYSTEM, "cannot map %s: %s", region->path, strerror(errno));
    }
    region->header = (lbgym_shm_header *)memory;
    return LBGYM_SHM_OK;
}

/* Checks that this region is open, on the given side. */
static inline int lbgym_shm_must_be(lbgym_shm_region *region, bool producer)
{
    if (region->header == NULL) {
        return lbgym_shm_fail(region, LBGYM_SHM_ROLE, "region '%s' is closed", region->name);
    }
    if (producer && !region->is_producer) {
        return lbgym_shm_fail(region, LBGYM_SHM_ROLE,
                              "region '%s' was attached; only its creator is its producer", region->name);
    }
    return LBGYM_SHM_OK;
}

/* 1 if the name belongs to this file, -1 if to another, 0 if to none. */
static inline int lbgym_shm_name_owner(const lbgym_shm_region *region)
{
    struct stat status;
    if (lstat(region->path, &status) < 0) {
        return 0;
    }
    return status.st_dev == region->device && status.st_ino == region->inode ? 1 : -1;
}

/** True if the name now belongs to another file. */
static inline bool lbgym_shm_replaced(const lbgym_shm_region *region)
{
    return lbgym_shm_name_owner(region) < 0;
}

/* Marks a region as retired; wake the waiters afterwards, so that they look up its name again. */
static inline void lbgym_shm_retire(lbgym_shm_region *region)
{
    __atomic_store_n(&region->header->state, LBGYM_SHM_STATE_CLOSED, __ATOMIC_RELEASE);
    (void)__atomic_fetch_add(&region->header->observation_event, 1, __ATOMIC_SEQ_CST);
}

/** Unmaps the region without changing it: for a child after fork, which would otherwise keep the locks of a parent
 * that is killed. */
static inline void lbgym_shm_forget(lbgym_shm_region *region)
{
    if (region->header != NULL) {
        (void)munmap(region->header, region->constant.total_size);
        region->header = NULL;
    }
    if (region->descriptor >= 0) {
        (void)close(region->descriptor);
        region->descriptor = -1;
    }
    free(region->observation.frame);
    memset(&region->observation, 0, sizeof region->observation);
    memset(&region->action, 0, sizeof region->action);
    region->names = NULL;
    region->is_producer = region->is_agent = false;
}

/** Closes the region and releases its locks; a producer also marks it as retired. A region may be closed twice, and
 * after a failed create or attach. */
static inline void lbgym_shm_close(lbgym_shm_region *region)
{
    if (region->header != NULL && region->is_producer) {
        lbgym_shm_retire(region);
        lbgym_shm_futex_wake(&region->header->observation_event);
        /* Explicitly: a child may have a copy of the descriptor. */
        (void)lbgym_shm_lock(region->descriptor, F_UNLCK, LBGYM_SHM_PRODUCER_LOCK);
    }
    if (region->header != NULL && region->is_agent) {
        (void)lbgym_shm_lock(region->descriptor, F_UNLCK, LBGYM_SHM_AGENT_LOCK);
    }
    lbgym_shm_forget(region);
}

/** Removes the region's name, unless it belongs to another file by now; attached processes keep the region. */
static inline int lbgym_shm_unlink(lbgym_shm_region *region)
{
    if (lbgym_shm_name_owner(region) != 1 || unlink(region->path) == 0 || errno == ENOENT) {
        return LBGYM_SHM_OK;
    }
    return lbgym_shm_fail(region, LBGYM_SHM_SYSTEM, "cannot remove %s: %s", region->path, strerror(errno));
}

/** Opens an existing region, as its agent or as an observer. Its producer need not be alive. */
static inline int lbgym_shm_attach(lbgym_shm_region *region, const char *name, lbgym_shm_access access)
{
    const int flags = O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK;
    struct stat status;
    int code = lbgym_shm_begin(region, name);
    if (code < 0) {
        return code;
    }
    if (access != LBGYM_SHM_READ_ONLY) {
        region->descriptor = open(region->path, flags | O_RDWR);
    }
    if (region->descriptor < 0 &&
        (access == LBGYM_SHM_READ_ONLY ||
         (access == LBGYM_SHM_ANY && (errno == EACCES || errno == EPERM || errno == EROFS)))) {
        region->read_only = true;
        region->descriptor = open(region->path, flags | O_RDONLY);
    }
    if (region->descriptor < 0) {
        switch (errno) {
        case ENOENT:
            return lbgym_shm_fail(region, LBGYM_SHM_NOT_FOUND, "there is no region %s", region->path);
        case EACCES:
        case EPERM:
        case EROFS:
            return lbgym_shm_fail(region, LBGYM_SHM_PERMISSION, "no permission for region %s, this process is user %u",
                                  region->path, (unsigned)geteuid());
        case ELOOP:
        case EISDIR:
        case ENXIO:
            return LBGYM_SHM_REFUSE(region, "%s", "it is no regular file");
        default:
            return lbgym_shm_fail(region, LBGYM_SHM_SYSTEM, "cannot open %s: %s", region->path, strerror(errno));
        }
    }
    if (fstat(region->descriptor, &status) < 0) {
        code = lbgym_shm_fail(region, LBGYM_SHM_SYSTEM, "cannot look at %s: %s", region->path, strerror(errno));
    } else {
        region->device = status.st_dev;
        region->inode = status.st_ino;
        code = lbgym_shm_check(region, &status);
        if (code == LBGYM_SHM_OK) {
            code = lbgym_shm_map(region);
        }
    }
    if (code < 0) {
        lbgym_shm_close(region);
    }
    return code;
}

/* Both sides */

/** Sequence id of the newest observation; 0: none yet, or the region is closed. */
static inline uint64_t lbgym_shm_latest(const lbgym_shm_region *region)
{
    return region->header == NULL ? 0 : __atomic_load_n(&region->header->latest, __ATOMIC_ACQUIRE);
}

/** True if the producer has closed the region, or another region has taken the name. */
static inline bool lbgym_shm_is_retired(const lbgym_shm_region *region)
{
    return region->header == NULL ||
           __atomic_load_n(&region->header->state, __ATOMIC_ACQUIRE) != LBGYM_SHM_STATE_RUNNING;
}

/** 1 if the producer's process is alive and has not closed the region, else 0. */
static inline int lbgym_shm_producer_alive(lbgym_shm_region *region)
{
    const int code = lbgym_shm_must_be(region, false);
    if (code < 0) {
        return code;
    }
    if (!region->is_producer) {
        const int locked = lbgym_shm_is_locked(region->descriptor, LBGYM_SHM_PRODUCER_LOCK);
        if (locked <= 0) {
            return locked;
        }
    }
    /* After the lock: a process that replaces a dead producer's region holds it for a moment, after marking the region. */
    return !lbgym_shm_is_retired(region);
}

/** 1 if an agent (this one or another) holds the region, 0 if none does. */
static inline int lbgym_shm_agent_alive(lbgym_shm_region *region)
{
    const int code = lbgym_shm_must_be(region, false);
    if (code < 0) {
        return code;
    }
    return region->is_agent ? 1 : lbgym_shm_is_locked(region->descriptor, LBGYM_SHM_AGENT_LOCK);
}

/** ns since the producer's last heartbeat; UINT64_MAX if the region is closed. */
static inline uint64_t lbgym_shm_heartbeat_age(const lbgym_shm_region *region)
{
    uint64_t beat, now;
    if (region->header == NULL) {
        return UINT64_MAX;
    }
    beat = __atomic_load_n(&region->header->heartbeat, __ATOMIC_ACQUIRE);
    now = lbgym_shm_now();
    return now > beat ? now - beat : 0;
}

/** ns since the agent's last heartbeat; UINT64_MAX if there never was one. */
static inline uint64_t lbgym_shm_agent_heartbeat_age(const lbgym_shm_region *region)
{
    const uint64_t beat =
        region->header == NULL ? 0 : __atomic_load_n(&region->header->agent_heartbeat, __ATOMIC_ACQUIRE);
    const uint64_t now = lbgym_shm_now();
    if (beat == 0) {
        return UINT64_MAX;
    }
    return now > beat ? now - beat : 0;
}

/* Sleeps until `word` is not `after`: 1; or for `timeout` ns, until the region is retired or a signal comes: 0. */
static inline int lbgym_shm_wait(lbgym_shm_region *region, const uint64_t *word, uint32_t *event, uint32_t *waiters,
                                 uint64_t after, uint64_t timeout)
{
    const uint64_t begin = lbgym_shm_now();
    const uint64_t deadline = timeout > UINT64_MAX - begin ? UINT64_MAX : begin + timeout;
    for (;;) {
        uint32_t value = 0;
        uint64_t now;
        /* Without the right to raise the flag nobody would wake us. */
        if (!region->read_only) {
            (void)__atomic_exchange_n(waiters, 1, __ATOMIC_SEQ_CST);
            value = __atomic_load_n(event, __ATOMIC_SEQ_CST);
        }
        if (__atomic_load_n(word, __ATOMIC_ACQUIRE) != after) {
            return 1;
        }
        now = lbgym_shm_now();
        if (now >= deadline || lbgym_shm_is_retired(region)) {
            return 0;
        }
        if (region->read_only) {
            const double eighth = (double)region->constant.publish_interval / region->constant.clock_rate / 8.0;
            const uint64_t nap = eighth > 1e6 ? (eighth < 1e18 ? (uint64_t)eighth : UINT64_C(1) << 60) : 1000000;
            const uint64_t left = deadline - now < nap ? deadline - now : nap;
            struct timespec relative;
            relative.tv_sec = (time_t)(left / LBGYM_SHM_SECOND);
            relative.tv_nsec = (long)(left % LBGYM_SHM_SECOND);
            if (nanosleep(&relative, NULL) < 0) {
                return 0;
            }
        } else if (!lbgym_shm_futex_wait(event, value, deadline - now)) {
            return 0;
        }
    }
}

/* Adds 1 to the event and wakes its waiters. */
static inline void lbgym_shm_tell(uint32_t *event, uint32_t *waiters)
{
    (void)__atomic_fetch_add(event, 1, __ATOMIC_SEQ_CST);
    if (__atomic_exchange_n(waiters, 0, __ATOMIC_SEQ_CST) != 0) {
        lbgym_shm_futex_wake(event);
    }
}

/* The sequence lock. The fences are those of Boehm, "Can seqlocks get along with programming language memory models?"
 * (MSPC 2012). */

/* Makes the lock odd, also if a writer that died left it so, and returns the even value to end with. Another value than
 * before either way: a reader that copies meanwhile sees that it changed. */
static inline uint64_t lbgym_shm_begin_write(uint64_t *lock)
{
    const uint64_t odd = (__atomic_load_n(lock, __ATOMIC_ACQUIRE) + 1) | 1;
    __atomic_store_n(lock, odd, __ATOMIC_RELEASE);
    __atomic_thread_fence(__ATOMIC_RELEASE);
    return odd + 1;
}

static inline void lbgym_shm_end_write(uint64_t *lock, uint64_t even)
{
    __atomic_store_n(lock, even, __ATOMIC_RELEASE);
}

/* Begins a copy; false while the writer is writing. */
static inline bool lbgym_shm_begin_read(const uint64_t *lock, uint64_t *seen)
{
    *seen = __atomic_load_n(lock, __ATOMIC_ACQUIRE);
#ifdef LBGYM_SHM_UNSAFE_NO_LOCK
    return true;
#else
    return (*seen & 1) == 0;
#endif
}

/* True if nothing was written since the copy began. LBGYM_SHM_UNSAFE_NO_LOCK exists for one test, which must find torn
 * copies without this check: it makes readers return any mixture of old and new. Never define it. */
static inline bool lbgym_shm_end_read(const uint64_t *lock, uint64_t seen)
{
#ifdef LBGYM_SHM_UNSAFE_NO_LOCK
    (void)lock;
    (void)seen;
    return true;
#else
    __atomic_thread_fence(__ATOMIC_ACQUIRE);
    return __atomic_load_n(lock, __ATOMIC_ACQUIRE) == seen;
#endif
}

/* Of observation `sequence_id` in the ring. */
static inline unsigned char *lbgym_shm_frame_at(const lbgym_shm_region *region, uint64_t sequence_id)
{
    const uint64_t slot = sequence_id & (region->constant.num_frames - 1);
    return (unsigned char *)region->header + region->constant.frames_offset + slot * region->constant.frame_size;
}

/* Of the `count`-th action. */
static inline unsigned char *lbgym_shm_action_at(const lbgym_shm_region *region, uint64_t count)
{
    const uint64_t slot = count & (region->constant.num_actions - 1);
    return (unsigned char *)region->header + region->constant.actions_offset + slot * region->constant.action_size;
}

/* The sections of a frame for n servers; the private copy has all, a region of version 1.0 (`minor`) not the last. */
static inline void lbgym_shm_copy_frame(unsigned char *to, const unsigned char *from, uint32_t capacity, uint32_t n,
                                        uint32_t minor)
{
    uint64_t at = lbgym_shm_frame_active(capacity);
    memcpy(to + at, from + at, n);
    at = lbgym_shm_frame_stats(capacity);
    memcpy(to + at, from + at, (size_t)n * LBGYM_SHM_NUM_FEATURES * sizeof(float));
    at = lbgym_shm_frame_ground_truth(capacity);
    memcpy(to + at, from + at, (size_t)n * LBGYM_SHM_NUM_GROUND_TRUTH * sizeof(float));
    at = lbgym_shm_frame_counters(capacity);
    memcpy(to + at, from + at, (size_t)n * LBGYM_SHM_NUM_COUNTERS * sizeof(uint64_t));
    at = lbgym_shm_frame_weights(capacity);
    memcpy(to + at, from + at, (size_t)n * sizeof(double));
    at = lbgym_shm_frame_safe_weights(capacity);
    memcpy(to + at, from + at, (size_t)n * sizeof(double));
    if (minor > 0) {
        at = lbgym_shm_frame_states(capacity);
        memcpy(to + at, from + at, n);
        at = lbgym_shm_frame_ground_truth_age(capacity);
        memcpy(to + at, from + at, (size_t)n * sizeof(uint64_t));
    }
}

/* Fills in what an older region lacks, and maps states of later versions to unknown. */
static inline void lbgym_shm_complete_frame(lbgym_shm_observation *o, uint32_t minor)
{
    for (uint32_t i = 0; i < o->frame->num_servers; i++) {
        if (minor == 0) {
            o->ground_truth_age[i] = LBGYM_SHM_AGE_UNKNOWN;
        }
        if (minor == 0 || o->states[i] > LBGYM_SHM_DOWN) {
            o->states[i] = LBGYM_SHM_UNKNOWN;
        }
    }
}

/* The sections of an action for n servers, with or without index parameters. */
static inline void lbgym_shm_copy_action(unsigned char *to, const unsigned char *from, uint32_t capacity, uint32_t n,
                                         bool index)
{
    uint64_t at = lbgym_shm_action_weights(capacity);
    memcpy(to + at, from + at, (size_t)n * sizeof(double));
    at = lbgym_shm_action_threshold(capacity);
    memcpy(to + at, from + at, (size_t)n * sizeof(uint32_t));
    at = lbgym_shm_action_alias(capacity);
    memcpy(to + at, from + at, (size_t)n * sizeof(uint32_t));
    if (index) {
        at = lbgym_shm_action_index(capacity);
        memcpy(to + at, from + at, (size_t)n * 2 * sizeof(double));
    }
}

/* True if index parameters are valid: finite, at least 0, and a speed above 0 wherever there is a weight. */
static inline bool lbgym_shm_index_good(const double *index, const double *weights, uint32_t n)
{
    bool good = lbgym_shm_doubles_good(index, 2 * (size_t)n);
    for (uint32_t i = 0; i < n; i++) {
        good &= index[2 * (size_t)i] > 0.0 || !(weights[i] > 0.0);
    }
    return good;
}

/* True if a private copy is a valid observation. Counters, times and ids are below 2^63. */
static inline bool lbgym_shm_frame_good(const lbgym_shm_observation *o)
{
    const lbgym_shm_frame *f = o->frame;
    const size_t n = f->num_servers;
    uint64_t top = f->sequence_id | f->timestamp | f->published_at | f->applied_sequence_id | f->applied_at |
                   f->unrouted | f->fct_count | f->fct_sum | f->names_version;
    uint8_t active = 0;
    for (size_t i = 0; i < n; i++) {
        active |= o->active[i];
        top |= o->ground_truth_age[i] != LBGYM_SHM_AGE_UNKNOWN ? o->ground_truth_age[i] : 0;
    }
    for (size_t i = 0; i < n * LBGYM_SHM_NUM_COUNTERS; i++) {
        top |= o->counters[i];
    }
    return active <= 1 && top >> 63 == 0 && lbgym_shm_floats_good(o->stats, n * LBGYM_SHM_NUM_FEATURES) &&
           ((f->flags & LBGYM_SHM_FLAG_GROUND_TRUTH) == 0 ||
            lbgym_shm_floats_good(o->ground_truth, n * LBGYM_SHM_NUM_GROUND_TRUTH)) &&
           lbgym_shm_doubles_good(o->weights, n) && lbgym_shm_doubles_good(o->safe_weights, n);
}

/* A server's name in the private table, LBGYM_SHM_NAME_SIZE bytes. */
static inline char *lbgym_shm_name_row(const lbgym_shm_region *region, uint32_t server)
{
    return (char *)region->names + sizeof(lbgym_shm_names) + (size_t)server * LBGYM_SHM_NAME_SIZE;
}

/* The agent's side, and observers */

/* One copy of the frame in slot `sequence_id` to `observation`: 1 if it is whole, 0 if not; `fits` if it could be. */
static inline int lbgym_shm_copy_observation(lbgym_shm_region *region, uint64_t sequence_id, bool *fits)
{
    const unsigned char *from = lbgym_shm_frame_at(region, sequence_id);
    const uint64_t *lock = &((const lbgym_shm_frame *)(const void *)from)->lock;
    unsigned char *to = (unsigned char *)region->observation.frame;
    const uint32_t capacity = region->constant.capacity;
    uint64_t seen;
    uint32_t n;
    if (!lbgym_shm_begin_read(lock, &seen)) {
        return 0;
    }
    memcpy(to, from, sizeof(lbgym_shm_frame));
    n = region->observation.frame->num_servers;
    *fits = n <= capacity;
    if (*fits) {
        lbgym_shm_copy_frame(to, from, capacity, n, region->constant.version_minor);
    }
    if (!lbgym_shm_end_read(lock, seen)) {
        return 0;
    }
    if (*fits) {
        lbgym_shm_complete_frame(&region->observation, region->constant.version_minor);
    }
    return 1;
}

/* Reports invalid contents. */
static inline int lbgym_shm_bad_contents(lbgym_shm_region *region, const char *what)
{
    return lbgym_shm_fail(region, LBGYM_SHM_FORMAT, "region '%s' holds %s", region->name, what);
}

/** Copies the newest observation to region.observation: 1, or 0 if none was published yet. After 0 or an error the copy
 * is undefined. Rows of inactive servers may hold anything. LBGYM_SHM_FORMAT if the observation is invalid,
 * LBGYM_SHM_BUSY if the producer overwrote it during each of 1,000 copies. Not for the producer, whose copy is the
 * one it publishes. */
static inline int lbgym_shm_read(lbgym_shm_region *region)
{
    int code = lbgym_shm_must_be(region, false);
    if (code < 0) {
        return code;
    }
    if (region->is_producer) {
        return lbgym_shm_fail(region, LBGYM_SHM_ROLE, "the producer of region '%s' knows what it published",
                              region->name);
    }
    code = LBGYM_SHM_BUSY;
    for (int tries = 0; tries < LBGYM_SHM_TRIES; tries++) {
        const uint64_t latest = __atomic_load_n(&region->header->latest, __ATOMIC_ACQUIRE);
        bool fits;
        if (latest == 0) {
            return 0;
        }
        if (!lbgym_shm_copy_observation(region, latest, &fits)) {
            continue;
        }
        if (fits && region->observation.frame->sequence_id == latest && lbgym_shm_frame_good(&region->observation)) {
            return 1;
        }
        code = LBGYM_SHM_FORMAT;
        /* The ring may have wrapped since `latest` was read; if not, the region itself is invalid. */
        if (__atomic_load_n(&region->header->latest, __ATOMIC_ACQUIRE) == latest) {
            break;
        }
    }
    if (code == LBGYM_SHM_BUSY) {
        return lbgym_shm_fail(region, code, "region '%s' is written to faster than it can be read", region->name);
    }
    return lbgym_shm_bad_contents(region, "an observation that no data plane may publish");
}

/** Copies observation `sequence_id` if the ring still has it, which it does for the last three: 1, else 0. */
static inline int lbgym_shm_read_earlier(lbgym_shm_region *region, uint64_t sequence_id)
{
    const int code = lbgym_shm_must_be(region, false);
    bool fits;
    if (code < 0) {
        return code;
    }
    if (region->is_producer) {
        return lbgym_shm_fail(region, LBGYM_SHM_ROLE, "the producer of region '%s' knows what it published",
                              region->name);
    }
    if (!lbgym_shm_copy_observation(region, sequence_id, &fits) ||
        region->observation.frame->sequence_id != sequence_id || sequence_id == 0) {
        return 0;
    }
    if (fits && lbgym_shm_frame_good(&region->observation)) {
        return 1;
    }
    return lbgym_shm_bad_contents(region, "an observation that no data plane may publish");
}

/** Copies the servers' names to the region if they have changed: 1, or 0 if no server was ever named.
 * lbgym_shm_server_name returns them. Call it after lbgym_shm_read whenever observation.frame->names_version has
 * changed. LBGYM_SHM_FORMAT and LBGYM_SHM_BUSY as lbgym_shm_read. */
static inline int lbgym_shm_read_names(lbgym_shm_region *region)
{
    const int code = lbgym_shm_must_be(region, false);
    if (code < 0) {
        return code;
    }
    if (region->is_producer || region->constant.version_minor == 0) {
        return region->names->version > 0;
    }
    for (int tries = 0; tries < LBGYM_SHM_TRIES; tries++) {
        const uint64_t version = __atomic_load_n(&region->header->names_version, __ATOMIC_ACQUIRE);
        const unsigned char *from = (unsigned char *)region->header + region->constant.names_offset +
                                    (version & 1) * region->constant.names_size;
        const uint64_t *lock = &((const lbgym_shm_names *)(const void *)from)->lock;
        uint64_t seen;
        bool fits;
        if (version == region->names->version) {
            return version > 0;
        }
        if (!lbgym_shm_begin_read(lock, &seen)) {
            continue;
        }
        memcpy(region->names, from, sizeof *region->names);
        fits = region->names->num_servers <= region->constant.capacity;
        if (fits) {
            memcpy(region->names + 1, from + sizeof *region->names,
                   (size_t)region->names->num_servers * LBGYM_SHM_NAME_SIZE);
        }
        if (lbgym_shm_end_read(lock, seen)) {
            if (fits && region->names->version == version) {
                for (uint32_t i = 0; i < region->names->num_servers; i++) {
                    lbgym_shm_name_row(region, i)[LBGYM_SHM_NAME_SIZE - 1] = '\0';
                }
                return 1;
            }
            if (__atomic_load_n(&region->header->names_version, __ATOMIC_ACQUIRE) == version) {
                memset(region->names, 0, sizeof *region->names);
                return lbgym_shm_bad_contents(region, "names that no data plane may publish");
            }
        }
        memset(region->names, 0, sizeof *region->names);
    }
    memset(region->names, 0, sizeof *region->names);
    return lbgym_shm_fail(region, LBGYM_SHM_BUSY, "region '%s': names change faster than they can be read",
                          region->name);
}

/** A server's name as last read or set; "" if it has none. Valid until the names are read or set again. Written by
 * another process: it may hold control characters. */
static inline const char *lbgym_shm_server_name(const lbgym_shm_region *region, uint32_t server)
{
    return region->names != NULL && server < region->names->num_servers ? lbgym_shm_name_row(region, server) : "";
}

/** True if the data plane measures a feature, by enum lbgym_shm_feature, or ground truth i, as
 * LBGYM_SHM_GROUND_TRUTH_BIT + i; the others are 0. Always true in regions of version 1.0, which do not say. */
static inline bool lbgym_shm_is_real(const lbgym_shm_region *region, unsigned column)
{
    return region->constant.version_minor == 0 || (column < 32 && ((region->constant.features >> column) & 1) != 0);
}

/** Sleeps until there is an observation other than number `after`: 1; 0 after `timeout` ns, at a signal, or when the
 * producer closes the region. */
static inline int lbgym_shm_wait_observation(lbgym_shm_region *region, uint64_t after, uint64_t timeout)
{
    const int code = lbgym_shm_must_be(region, false);
    if (code < 0) {
        return code;
    }
    return lbgym_shm_wait(region, &region->header->latest, &region->header->observation_event,
                          &region->header->observation_waiters, after, timeout);
}

/** Makes this process the region's agent. */
static inline int lbgym_shm_lock_agent(lbgym_shm_region *region)
{
    int code = lbgym_shm_must_be(region, false);
    if (code < 0 || region->is_agent) {
        return code;
    }
    if (region->is_producer) {
        return lbgym_shm_fail(region, LBGYM_SHM_ROLE,
                              "the producer of region '%s' must attach it once more for an agent", region->name);
    }
    if (region->read_only) {
        return lbgym_shm_fail(region, LBGYM_SHM_PERMISSION,
                              "region '%s' was attached read only; an agent must be allowed to write", region->name);
    }
    code = lbgym_shm_lock(region->descriptor, F_WRLCK, LBGYM_SHM_AGENT_LOCK);
    if (code == 0) {
        const uint32_t pid = __atomic_load_n(&region->header->agent_pid, __ATOMIC_RELAXED);
        return lbgym_shm_fail(region, LBGYM_SHM_BUSY,
                              "region '%s' is driven by another agent (process %u); stop it first, there is one agent "
                              "per region",
                              region->name, (unsigned)pid);
    }
    if (code < 0) {
        return lbgym_shm_fail(region, code, "cannot lock %s: %s", region->path, strerror(errno));
    }
    region->is_agent = true;
    __atomic_store_n(&region->header->agent_pid, (uint32_t)getpid(), __ATOMIC_RELAXED);
    return LBGYM_SHM_OK;
}

/** Releases the region for another agent. */
static inline void lbgym_shm_unlock_agent(lbgym_shm_region *region)
{
    if (region->is_agent) {
        region->is_agent = false;
        (void)lbgym_shm_lock(region->descriptor, F_UNLCK, LBGYM_SHM_AGENT_LOCK);
    }
}

/** Writes the last action again, which renews its lease from now on. */
static inline int lbgym_shm_renew(lbgym_shm_region *region)
{
    const int code = lbgym_shm_must_be(region, false);
    lbgym_shm_action *const action = region->action.action;
    const uint64_t now = lbgym_shm_now();
    uint64_t count, even;
    unsigned char *to;
    uint64_t *lock;
    if (code < 0) {
        return code;
    }
    if (!region->is_agent || action->num_servers == 0) {
        return lbgym_shm_fail(region, LBGYM_SHM_ROLE, "region '%s' has no action of this agent to renew", region->name);
    }
    action->written_at = now;
    count = __atomic_load_n(&region->header->action_count, __ATOMIC_ACQUIRE) + 1;
    to = lbgym_shm_action_at(region, count);
    lock = &((lbgym_shm_action *)(void *)to)->lock;
    even = lbgym_shm_begin_write(lock);
    /* All of the head but the lock. */
    memcpy(to + sizeof *lock, (const unsigned char *)action + sizeof *lock, sizeof *action - sizeof *lock);
    lbgym_shm_copy_action(to, (const unsigned char *)action, region->constant.capacity, action->num_servers,
                          (action->flags & LBGYM_SHM_FLAG_INDEX) != 0);
    lbgym_shm_end_write(lock, even);
    __atomic_store_n(&region->header->agent_heartbeat, now, __ATOMIC_RELEASE);
    __atomic_store_n(&region->header->action_count, count, __ATOMIC_RELEASE);
    lbgym_shm_tell(&region->header->action_event, &region->header->action_waiters);
    return LBGYM_SHM_OK;
}

/** Writes n weights and their alias table; n up to the capacity, further servers keep their safe weights. The first
 * call makes this process the region's agent. Without another action the data plane returns to its safe weights after
 * `lease` ns, below 2^63; 0: never. Observations name the action they reflect by its `sequence_id`, below 2^63. `index`,
 * [n][2], gives each server's speed per core (above 0 where the weight is) and background load (flows of others) to a
 * data plane that takes them; NULL: none. */
static inline int lbgym_shm_write_index(lbgym_shm_region *region, uint64_t sequence_id, const double *weights,
                                        const double *index, uint32_t n, uint64_t lease)
{
    lbgym_shm_weights *const mine = &region->action;
    const int code = lbgym_shm_lock_agent(region);
    if (code < 0) {
        return code;
    }
    if (n < 1 || n > region->constant.capacity) {
        return lbgym_shm_fail(region, LBGYM_SHM_WEIGHTS, "weights must be 1 to %u numbers, one per server, got %u",
                              (unsigned)region->constant.capacity, (unsigned)n);
    }
    if (sequence_id >> 63 != 0) {
        return lbgym_shm_fail(region, LBGYM_SHM_OPTION, "sequence_id must be below 2^63, got %llu",
                              (unsigned long long)sequence_id);
    }
    if (lease >> 63 != 0) {
        return lbgym_shm_fail(region, LBGYM_SHM_OPTION, "lease must be below 2^63 ns, got %llu",
                              (unsigned long long)lease);
    }
    if (lbgym_shm_largest(weights, n) <= 0.0) {
        return lbgym_shm_fail(region, LBGYM_SHM_WEIGHTS, "%s", lbgym_shm_strerror(LBGYM_SHM_WEIGHTS));
    }
    if (index != NULL && !lbgym_shm_has_index(&region->constant)) {
        return lbgym_shm_fail(region, LBGYM_SHM_OPTION, "the data plane of region '%s' does not dispatch by index",
                              region->name);
    }
    if (index != NULL && !lbgym_shm_index_good(index, weights, n)) {
        return lbgym_shm_fail(region, LBGYM_SHM_OPTION, "index parameters must be finite numbers of at least 0, with a "
                                                        "speed above 0 where the weight is");
    }
    memmove(mine->weights, weights, n * sizeof *weights);
    lbgym_shm_alias_table(mine->weights, n, mine->threshold, mine->alias, region->stack, region->share);
    mine->action->sequence_id = sequence_id;
    mine->action->lease = lease;
    mine->action->num_servers = n;
    mine->action->flags = 0;
    if (index != NULL) {
        memmove(mine->index, index, 2 * (size_t)n * sizeof *index);
        mine->action->flags = LBGYM_SHM_FLAG_INDEX;
    }
    return lbgym_shm_renew(region);
}

/** The same as lbgym_shm_write_index without index parameters. */
static inline int lbgym_shm_write_action(lbgym_shm_region *region, uint64_t sequence_id, const double *weights,
                                         uint32_t n, uint64_t lease)
{
    return lbgym_shm_write_index(region, sequence_id, weights, NULL, n, lease);
}

/* The producer's side */

/* Weights in force, and their table, from safe weights and action. */
static inline void lbgym_shm_combine(lbgym_shm_region *region)
{
    const uint32_t n = region->observation.frame->num_servers;
    double *const weights = region->observation.weights;
    uint32_t given = region->safe ? 0 : region->action.action->num_servers;
    memcpy(weights, region->observation.safe_weights, n * sizeof *weights);
    memcpy(weights, region->action.weights, (given < n ? given : n) * sizeof *weights);
    if (lbgym_shm_largest(weights, n) <= 0.0) {
        /* The servers that were to take flows have left. */
        region->safe = true;
        given = 0;
        memcpy(weights, region->observation.safe_weights, n * sizeof *weights);
    }
    if (given == n) {
        memcpy(region->threshold, region->action.threshold, n * sizeof *region->threshold);
        memcpy(region->alias, region->action.alias, n * sizeof *region->alias);
    } else {
        lbgym_shm_alias_table(weights, n, region->threshold, region->alias, region->stack, region->share);
    }
}

/** Sets the number of servers, up to the capacity. New ones have a safe weight of 1 and zeros otherwise: they are
 * inactive until lbgym_shm_set_active. Safe weights that would be all 0 become all 1. */
static inline int lbgym_shm_set_num_servers(lbgym_shm_region *region, uint32_t n)
{
    lbgym_shm_observation *const o = &region->observation;
    const int code = lbgym_shm_must_be(region, true);
    if (code < 0) {
        return code;
    }
    if (n < 1 || n > region->constant.capacity) {
        return lbgym_shm_fail(region, LBGYM_SHM_OPTION, "region '%s' has room for 1 to %u servers, got %u",
                              region->name, (unsigned)region->constant.capacity, (unsigned)n);
    }
    for (uint32_t i = o->frame->num_servers; i < n; i++) {
        o->active[i] = 0;
        memset(o->stats + (size_t)i * LBGYM_SHM_NUM_FEATURES, 0, LBGYM_SHM_NUM_FEATURES * sizeof *o->stats);
        memset(o->ground_truth + (size_t)i * LBGYM_SHM_NUM_GROUND_TRUTH, 0,
               LBGYM_SHM_NUM_GROUND_TRUTH * sizeof *o->ground_truth);
        memset(o->counters + (size_t)i * LBGYM_SHM_NUM_COUNTERS, 0, LBGYM_SHM_NUM_COUNTERS * sizeof *o->counters);
        o->safe_weights[i] = 1.0;
        region->ground_truth_time[i] = LBGYM_SHM_AGE_UNKNOWN;
    }
    for (uint32_t i = n; i < o->frame->num_servers; i++) {
        o->states[i] = LBGYM_SHM_UNKNOWN;
        region->names_changed |= lbgym_shm_name_row(region, i)[0] != '\0';
        memset(lbgym_shm_name_row(region, i), 0, LBGYM_SHM_NAME_SIZE);
    }
    if (n > region->names->num_servers) {
        region->names->num_servers = n;
        /* Nothing to write if no server was ever named. */
        region->names_changed |= region->names->version > 0;
    }
    if (n != o->frame->num_servers) {
        if (lbgym_shm_largest(o->safe_weights, n) <= 0.0) {
            for (uint32_t i = 0; i < n; i++) {
                o->safe_weights[i] = 1.0;
            }
        }
        o->frame->num_servers = n;
        lbgym_shm_combine(region);
    }
    return LBGYM_SHM_OK;
}

/** Sets the weights in force while no agent's are, one per server. */
static inline int lbgym_shm_set_safe_weights(lbgym_shm_region *region, const double *weights, uint32_t n)
{
    const int code = lbgym_shm_must_be(region, true);
    if (code < 0) {
        return code;
    }
    if (n != region->observation.frame->num_servers || lbgym_shm_largest(weights, n) <= 0.0) {
        return lbgym_shm_fail(region, LBGYM_SHM_WEIGHTS,
                              "safe weights must be %u finite numbers of at least 0 and not all 0, got %u",
                              (unsigned)region->observation.frame->num_servers, (unsigned)n);
    }
    memcpy(region->observation.safe_weights, weights, n * sizeof *weights);
    lbgym_shm_combine(region);
    return LBGYM_SHM_OK;
}

/* Reports why the file could not be made. */
static inline int lbgym_shm_cannot_create(lbgym_shm_region *region, int error)
{
    errno = error;
    switch (error) {
    case ENOSPC:
    case EFBIG:
    case EDQUOT:
        return lbgym_shm_fail(region, LBGYM_SHM_NO_ROOM, "cannot create region %s: there is no room for its %llu bytes",
                              region->path, (unsigned long long)region->constant.total_size);
    case EACCES:
    case EPERM:
    case EROFS:
        return lbgym_shm_fail(region, LBGYM_SHM_PERMISSION, "cannot create region %s: permission denied", region->path);
    case EOPNOTSUPP:
    case EISDIR:
        return lbgym_shm_fail(region, LBGYM_SHM_SYSTEM,
                              "cannot create region %s: that file system makes no unnamed files; use one like tmpfs",
                              region->path);
    default:
        return lbgym_shm_fail(region, LBGYM_SHM_SYSTEM, "cannot create region %s: %s", region->path, strerror(error));
    }
}

/* An unnamed file with all its memory reserved: nothing is left behind if the process dies now, and no page fault on a
 * full file system kills it later. */
static inline int lbgym_shm_make_file(lbgym_shm_region *region, mode_t mode, gid_t gid)
{
    const size_t folder = strlen(region->path) - strlen(region->name) - 1;
    struct stat status;
    int error = EINTR;
    region->path[folder] = '\0';
    region->descriptor = open(folder > 0 ? region->path : "/", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
    region->path[folder] = '/';
    if (region->descriptor < 0) {
        return lbgym_shm_cannot_create(region, errno);
    }
    for (int tries = 0; tries < LBGYM_SHM_TRIES; tries++) {
        error = posix_fallocate(region->descriptor, 0, (off_t)region->constant.total_size);
        if (error != EINTR) {
            break;
        }
    }
    if (error != 0) {
        return lbgym_shm_cannot_create(region, error);
    }
    if ((gid != (gid_t)-1 && fchown(region->descriptor, (uid_t)-1, gid) < 0) || fchmod(region->descriptor, mode) < 0 ||
        fstat(region->descriptor, &status) < 0) {
        return lbgym_shm_cannot_create(region, errno);
    }
    region->device = status.st_dev;
    region->inode = status.st_ino;
    return LBGYM_SHM_OK;
}

/* Names the new file, replacing a region whose producer is gone. */
static inline int lbgym_shm_take_name(lbgym_shm_region *region)
{
    lbgym_shm_region *old = (lbgym_shm_region *)malloc(sizeof *old);
    char self[40];
    int code = LBGYM_SHM_EXISTS;
    if (old == NULL) {
        return lbgym_shm_fail(region, LBGYM_SHM_NO_ROOM, "no memory to create region '%s'", region->name);
    }
    (void)snprintf(self, sizeof self, "/proc/self/fd/%d", region->descriptor);
    (void)lbgym_shm_fail(region, code, "the name '%s' is taken again and again by other producers", region->name);
    for (int tries = 0; tries < 100; tries++) {
        int locked;
        if (linkat(AT_FDCWD, self, AT_FDCWD, region->path, AT_SYMLINK_FOLLOW) == 0) {
            code = LBGYM_SHM_OK;
            break;
        }
        if (errno != EEXIST) {
            code = lbgym_shm_cannot_create(region, errno);
            break;
        }
        code = lbgym_shm_attach(old, region->name, LBGYM_SHM_READ_WRITE);
        if (code == LBGYM_SHM_NOT_FOUND) {
            code = LBGYM_SHM_EXISTS;
            continue;
        }
        if (code < 0) {
            if (code == LBGYM_SHM_FORMAT) {
                code = LBGYM_SHM_EXISTS;
            }
            (void)lbgym_shm_fail(region, code, "the name is taken: %.4400s; remove that file or use another name",
                                 old->message);
            break;
        }
        locked = lbgym_shm_lock(old->descriptor, F_WRLCK, LBGYM_SHM_PRODUCER_LOCK);
        if (locked == 1) {
            /* Only who holds the old region's lock removes its name, so that two who start at once cannot both; and it
             * is marked first, so that the lock does not look like that of a live producer. */
            lbgym_shm_retire(old);
            code = lbgym_shm_unlink(old);
            lbgym_shm_futex_wake(&old->header->observation_event);
            if (code < 0) {
                (void)lbgym_shm_fail(region, code, "%.4600s", old->message);
            }
        } else if (locked < 0) {
            code = lbgym_shm_fail(region, LBGYM_SHM_SYSTEM, "cannot lock %s: %s", region->path, strerror(errno));
        } else if (tries < LBGYM_SHM_LOOKS) {
            const struct timespec moment = {0, 1000000};
            (void)nanosleep(&moment, NULL);
        } else {
            code = lbgym_shm_fail(region, LBGYM_SHM_EXISTS,
                                  "the name '%s' belongs to a live region (producer process %u, %llu observations); "
                                  "stop that one or use another name",
                                  region->name, (unsigned)old->constant.producer_pid,
                                  (unsigned long long)lbgym_shm_latest(old));
        }
        lbgym_shm_close(old);
        if (code < 0) {
            break;
        }
        code = LBGYM_SHM_EXISTS;
    }
    free(old);
    return code;
}

/* A random number below 2^63. */
static inline uint64_t lbgym_shm_random(void)
{
    uint64_t number = 0;
    /* SYS_getrandom with GRND_NONBLOCK; without it the number still differs from run to run. */
    if (syscall(SYS_getrandom, &number, sizeof number, 1) != (long)sizeof number) {
        number = lbgym_shm_now() * UINT64_C(0x9E3779B97F4A7C15) ^ (uint64_t)getpid() << 40;
    }
    return number >> 1;
}

/* The header of a new region, from checked options. */
static inline int lbgym_shm_fill_header(lbgym_shm_region *region, const lbgym_shm_options *options)
{
    lbgym_shm_header *const h = &region->constant;
    const uint32_t wanted = options->num_servers > LBGYM_SHM_DEFAULT_CAPACITY ? options->num_servers
                                                                              : (uint32_t)LBGYM_SHM_DEFAULT_CAPACITY;
    const uint32_t capacity = options->capacity != 0 ? options->capacity : wanted;
    const char *driver = options->driver != NULL ? options->driver : "";
    struct timespec now;
    size_t length;
    if (options->num_servers < 1 || options->num_servers > LBGYM_SHM_MAX_CAPACITY) {
        return lbgym_shm_fail(region, LBGYM_SHM_OPTION, "num_servers must be from 1 to %d, got %u",
                              LBGYM_SHM_MAX_CAPACITY, (unsigned)options->num_servers);
    }
    if (capacity < options->num_servers || capacity > LBGYM_SHM_MAX_CAPACITY) {
        return lbgym_shm_fail(region, LBGYM_SHM_OPTION, "capacity must be from %u to %d, got %u",
                              (unsigned)options->num_servers, LBGYM_SHM_MAX_CAPACITY, (unsigned)capacity);
    }
    if (options->publish_interval_ns < 1000 || options->publish_interval_ns > LBGYM_SHM_DAY) {
        return lbgym_shm_fail(region, LBGYM_SHM_OPTION, "publish_interval_ns must be from 1,000 to a day, got %llu",
                              (unsigned long long)options->publish_interval_ns);
    }
    if (!(options->clock_rate >= 1e-6 && options->clock_rate <= 1e6)) {
        return lbgym_shm_fail(region, LBGYM_SHM_OPTION, "clock_rate must be from 1e-06 to 1e+06, got %g",
                              options->clock_rate);
    }
    for (length = 0; length <= sizeof h->driver && (unsigned char)driver[length] >= 0x20 && driver[length] != 0x7F;) {
        length++;
    }
    if (length > sizeof h->driver || driver[length] != '\0') {
        return lbgym_shm_fail(region, LBGYM_SHM_OPTION, "driver must be at most %zu bytes of printable text",
                              sizeof h->driver);
    }
    if (options->safe_weights != NULL && lbgym_shm_largest(options->safe_weights, options->num_servers) <= 0.0) {
        return lbgym_shm_fail(region, LBGYM_SHM_WEIGHTS, "safe %s", lbgym_shm_strerror(LBGYM_SHM_WEIGHTS));
    }
    if (options->mode > 0777) {
        return lbgym_shm_fail(region, LBGYM_SHM_OPTION, "mode must be permissions from 0 to 0777, got 0%o",
                              (unsigned)options->mode);
    }
    h->magic = LBGYM_SHM_MAGIC;
    h->version_major = LBGYM_SHM_VERSION_MAJOR;
    h->version_minor = LBGYM_SHM_VERSION_MINOR;
    h->header_size = sizeof *h;
    h->capacity = capacity;
    h->num_frames = LBGYM_SHM_NUM_FRAMES;
    h->frames_offset = sizeof *h;
    h->frame_size = (uint32_t)lbgym_shm_frame_size(capacity);
    h->actions_offset = h->frames_offset + h->num_frames * h->frame_size;
    h->num_actions = LBGYM_SHM_NUM_ACTIONS;
    h->options = options->takes_index ? LBGYM_SHM_OPTION_INDEX : 0;
    h->features = options->features;
    h->action_size =
        (uint32_t)(options->takes_index ? lbgym_shm_action_size(capacity) : lbgym_shm_action_index(capacity));
    h->names_offset = h->actions_offset + h->num_actions * h->action_size;
    h->names_size = (uint32_t)lbgym_shm_names_size(capacity);
    h->total_size = h->names_offset + LBGYM_SHM_NUM_NAMES * (uint64_t)h->names_size;
    h->instance = lbgym_shm_random();
    (void)clock_gettime(CLOCK_REALTIME, &now);
    h->created_at = (uint64_t)now.tv_sec * LBGYM_SHM_SECOND + (uint64_t)now.tv_nsec;
    h->heartbeat = lbgym_shm_now();
    h->publish_interval = options->publish_interval_ns;
    h->clock_rate = options->clock_rate;
    h->producer_pid = (uint32_t)getpid();
    h->state = LBGYM_SHM_STATE_RUNNING;
    memcpy(h->driver, driver, length);
    return LBGYM_SHM_OK;
}

/** Creates a region, as its producer. A region whose producer is gone is replaced, a live one never. The file appears
 * under its name when complete, with all its memory reserved. No server is active yet. */
static inline int lbgym_shm_create(lbgym_shm_region *region, const char *name, const lbgym_shm_options *options)
{
    int code = lbgym_shm_begin(region, name);
    if (code == LBGYM_SHM_OK) {
        code = lbgym_shm_fill_header(region, options);
    }
    if (code == LBGYM_SHM_OK) {
        code = lbgym_shm_make_file(region, options->mode, options->gid);
    }
    if (code == LBGYM_SHM_OK) {
        code = lbgym_shm_map(region);
    }
    if (code == LBGYM_SHM_OK) {
        *region->header = region->constant;
        if (lbgym_shm_lock(region->descriptor, F_WRLCK, LBGYM_SHM_PRODUCER_LOCK) == 1) {
            code = lbgym_shm_take_name(region);
        } else {
            code = lbgym_shm_fail(region, LBGYM_SHM_SYSTEM, "cannot lock %s: %s", region->path, strerror(errno));
        }
    }
    if (code == LBGYM_SHM_OK) {
        region->is_producer = true;
        code = lbgym_shm_set_num_servers(region, options->num_servers);
    }
    if (code == LBGYM_SHM_OK && options->safe_weights != NULL) {
        code = lbgym_shm_set_safe_weights(region, options->safe_weights, options->num_servers);
    }
    if (code < 0) {
        lbgym_shm_close(region);
        return code;
    }
    region->message[0] = '\0';
    return LBGYM_SHM_OK;
}

/* Checks that a server's row may be written. */
static inline int lbgym_shm_must_know(lbgym_shm_region *region, uint32_t server)
{
    const int code = lbgym_shm_must_be(region, true);
    if (code < 0) {
        return code;
    }
    if (server >= region->observation.frame->num_servers) {
        return lbgym_shm_fail(region, LBGYM_SHM_OPTION, "region '%s' has servers 0 to %u, got %u", region->name,
                              (unsigned)region->observation.frame->num_servers - 1, (unsigned)server);
    }
    return LBGYM_SHM_OK;
}

static inline int lbgym_shm_bad_number(lbgym_shm_region *region, const char *what, uint32_t server)
{
    return lbgym_shm_fail(region, LBGYM_SHM_OPTION, "%s of server %u for region '%s' must be at least 0 and finite",
                          what, (unsigned)server, region->name);
}

/* The next observation; values persist until set again. Refused values change nothing. */

/** Sets whether the server takes new flows; lbgym_shm_pick respects it at once. */
static inline int lbgym_shm_set_active(lbgym_shm_region *region, uint32_t server, bool active)
{
    const int code = lbgym_shm_must_know(region, server);
    if (code == LBGYM_SHM_OK) {
        region->observation.active[server] = active;
    }
    return code;
}

/** The features, by enum lbgym_shm_feature. */
static inline int lbgym_shm_set_stats(lbgym_shm_region *region, uint32_t server,
                                      const float stats[LBGYM_SHM_NUM_FEATURES])
{
    const int code = lbgym_shm_must_know(region, server);
    if (code < 0) {
        return code;
    }
    if (!lbgym_shm_floats_good(stats, LBGYM_SHM_NUM_FEATURES)) {
        return lbgym_shm_bad_number(region, "the features", server);
    }
    memcpy(region->observation.stats + (size_t)server * LBGYM_SHM_NUM_FEATURES, stats,
           LBGYM_SHM_NUM_FEATURES * sizeof *stats);
    return LBGYM_SHM_OK;
}

/** CPU and memory in use, 0 to 1, and flows in service, if known. */
static inline int lbgym_shm_set_ground_truth(lbgym_shm_region *region, uint32_t server, float cpu_usage,
                                             float memory_usage, float busy_workers)
{
    const float truth[LBGYM_SHM_NUM_GROUND_TRUTH] = {cpu_usage, memory_usage, busy_workers};
    const int code = lbgym_shm_must_know(region, server);
    if (code < 0) {
        return code;
    }
    if (!lbgym_shm_floats_good(truth, LBGYM_SHM_NUM_GROUND_TRUTH)) {
        return lbgym_shm_bad_number(region, "the ground truth", server);
    }
    memcpy(region->observation.ground_truth + (size_t)server * LBGYM_SHM_NUM_GROUND_TRUTH, truth, sizeof truth);
    region->observation.frame->flags |= LBGYM_SHM_FLAG_GROUND_TRUTH;
    region->ground_truth_time[server] = LBGYM_SHM_AGE_UNKNOWN;
    return LBGYM_SHM_OK;
}

/** The time when the ground truth last set was measured, ns of lbgym_shm_now. Observations carry its age, which is
 * unknown unless this is called after each lbgym_shm_set_ground_truth. */
static inline int lbgym_shm_set_ground_truth_time(lbgym_shm_region *region, uint32_t server, uint64_t measured_at)
{
    const int code = lbgym_shm_must_know(region, server);
    if (code == LBGYM_SHM_OK) {
        region->ground_truth_time[server] = measured_at;
    }
    return code;
}

/** A server's state, of enum lbgym_shm_state; LBGYM_SHM_UNKNOWN until set, and after the server has left. */
static inline int lbgym_shm_set_server_state(lbgym_shm_region *region, uint32_t server, enum lbgym_shm_state state)
{
    const int code = lbgym_shm_must_know(region, server);
    if (code < 0) {
        return code;
    }
    if ((unsigned)state > LBGYM_SHM_DOWN) {
        return lbgym_shm_fail(region, LBGYM_SHM_OPTION,
                              "the state of server %u for region '%s' must be from 0 to %d, got %u", (unsigned)server,
                              region->name, LBGYM_SHM_DOWN, (unsigned)state);
    }
    region->observation.states[server] = (uint8_t)state;
    return LBGYM_SHM_OK;
}

/** A server's address or label, at most 63 printable bytes of UTF-8; "": unnamed, as all are at first and
 * after they have left. */
static inline int lbgym_shm_set_server_name(lbgym_shm_region *region, uint32_t server, const char *name)
{
    const int code = lbgym_shm_must_know(region, server);
    size_t length = 0;
    if (code < 0) {
        return code;
    }
    while (name != NULL && length < LBGYM_SHM_NAME_SIZE && (unsigned char)name[length] >= 0x20 &&
           name[length] != 0x7F) {
        length++;
    }
    if (name == NULL || length >= LBGYM_SHM_NAME_SIZE || name[length] != '\0') {
        return lbgym_shm_fail(region, LBGYM_SHM_OPTION,
                              "the name of server %u for region '%s' must be at most %d bytes of printable text",
                              (unsigned)server, region->name, LBGYM_SHM_NAME_SIZE - 1);
    }
    if (strcmp(lbgym_shm_name_row(region, server), name) != 0) {
        memset(lbgym_shm_name_row(region, server), 0, LBGYM_SHM_NAME_SIZE);
        memcpy(lbgym_shm_name_row(region, server), name, length);
        region->names_changed = true;
    }
    return LBGYM_SHM_OK;
}

/** Flows since the producer started, each below 2^63; started = completed + rejected + failed + open. */
static inline int lbgym_shm_set_counters(lbgym_shm_region *region, uint32_t server, uint64_t started,
                                         uint64_t completed, uint64_t rejected, uint64_t failed)
{
    const int code = lbgym_shm_must_know(region, server);
    uint64_t *row;
    if (code < 0) {
        return code;
    }
    if ((started | completed | rejected | failed) >> 63 != 0) {
        return lbgym_shm_bad_number(region, "a counter", server);
    }
    row = region->observation.counters + (size_t)server * LBGYM_SHM_NUM_COUNTERS;
    row[LBGYM_SHM_STARTED] = started;
    row[LBGYM_SHM_COMPLETED] = completed;
    row[LBGYM_SHM_REJECTED] = rejected;
    row[LBGYM_SHM_FAILED] = failed;
    return LBGYM_SHM_OK;
}

/** Totals since the producer started: flows that found no active server, flows of known FCT that ended, and the sum of
 * their FCTs, ns. */
static inline int lbgym_shm_set_totals(lbgym_shm_region *region, uint64_t unrouted, uint64_t fct_count,
                                       uint64_t fct_sum)
{
    const int code = lbgym_shm_must_be(region, true);
    if (code < 0) {
        return code;
    }
    if ((unrouted | fct_count | fct_sum) >> 63 != 0) {
        return lbgym_shm_fail(region, LBGYM_SHM_OPTION, "totals for region '%s' must be below 2^63", region->name);
    }
    region->observation.frame->unrouted = unrouted;
    region->observation.frame->fct_count = fct_count;
    region->observation.frame->fct_sum = fct_sum;
    return LBGYM_SHM_OK;
}

/* Writes the private table of names to the region as the next version. */
static inline void lbgym_shm_publish_names(lbgym_shm_region *region)
{
    lbgym_shm_names *const mine = region->names;
    const uint64_t version = mine->version + 1;
    unsigned char *const to =
        (unsigned char *)region->header + region->constant.names_offset + (version & 1) * region->constant.names_size;
    uint64_t *const lock = &((lbgym_shm_names *)(void *)to)->lock;
    const uint64_t even = lbgym_shm_begin_write(lock);
    mine->version = version;
    memcpy(to + sizeof *lock, (const unsigned char *)mine + sizeof *lock,
           sizeof *mine - sizeof *lock + (size_t)mine->num_servers * LBGYM_SHM_NAME_SIZE);
    lbgym_shm_end_write(lock, even);
    __atomic_store_n(&region->header->names_version, version, __ATOMIC_RELEASE);
    region->names_changed = false;
}

/** Publishes the observation, as of `timestamp` (ns on the data plane's clock, below 2^63): 1. Its sequence id, one
 * more than the last, is in region.sequence_id. It reports the action that lbgym_shm_poll_action last found. */
static inline int lbgym_shm_publish(lbgym_shm_region *region, uint64_t timestamp)
{
    const int code = lbgym_shm_must_be(region, true);
    lbgym_shm_frame *const frame = region->observation.frame;
    const uint64_t now = lbgym_shm_now();
    unsigned char *to;
    uint64_t *lock;
    uint64_t even;
    if (code < 0) {
        return code;
    }
    if (timestamp >> 63 != 0) {
        return lbgym_shm_fail(region, LBGYM_SHM_OPTION, "timestamp must be below 2^63 ns, got %llu",
                              (unsigned long long)timestamp);
    }
    for (uint32_t i = 0; i < frame->num_servers; i++) {
        const uint64_t measured = region->ground_truth_time[i];
        region->observation.ground_truth_age[i] =
            measured == LBGYM_SHM_AGE_UNKNOWN ? LBGYM_SHM_AGE_UNKNOWN : now > measured ? now - measured : 0;
    }
    if (region->names_changed) {
        lbgym_shm_publish_names(region);
    }
    frame->names_version = region->names->version;
    frame->sequence_id = ++region->sequence_id;
    frame->timestamp = timestamp;
    frame->published_at = now;
    frame->flags = (frame->flags & ~(uint32_t)LBGYM_SHM_FLAG_SAFE) | (region->safe ? LBGYM_SHM_FLAG_SAFE : 0);
    to = lbgym_shm_frame_at(region, frame->sequence_id);
    lock = &((lbgym_shm_frame *)(void *)to)->lock;
    even = lbgym_shm_begin_write(lock);
    /* All of the head but the lock. */
    memcpy(to + sizeof *lock, (const unsigned char *)frame + sizeof *lock, sizeof *frame - sizeof *lock);
    lbgym_shm_copy_frame(to, (const unsigned char *)frame, region->constant.capacity, frame->num_servers,
                         region->constant.version_minor);
    lbgym_shm_end_write(lock, even);
    __atomic_store_n(&region->header->heartbeat, now, __ATOMIC_RELEASE);
    __atomic_store_n(&region->header->latest, frame->sequence_id, __ATOMIC_RELEASE);
    lbgym_shm_tell(&region->header->observation_event, &region->header->observation_waiters);
    return 1;
}

/** Updates the heartbeat without publishing. */
static inline int lbgym_shm_heartbeat(lbgym_shm_region *region)
{
    const int code = lbgym_shm_must_be(region, true);
    if (code == LBGYM_SHM_OK) {
        __atomic_store_n(&region->header->heartbeat, lbgym_shm_now(), __ATOMIC_RELEASE);
    }
    return code;
}

/* Copies the newest action to region.action unless it is the `known`-th. `number`: action_count at the time; 0: nothing
 * newer than `known`. */
static inline int lbgym_shm_read_action(lbgym_shm_region *region, uint64_t known, uint64_t *number)
{
    lbgym_shm_weights *const mine = &region->action;
    const uint32_t capacity = region->constant.capacity;
    *number = 0;
    for (int tries = 0; tries < LBGYM_SHM_TRIES; tries++) {
        const uint64_t count = __atomic_load_n(&region->header->action_count, __ATOMIC_ACQUIRE);
        const unsigned char *from = lbgym_shm_action_at(region, count);
        const uint64_t *lock = &((const lbgym_shm_action *)(const void *)from)->lock;
        uint64_t seen;
        uint32_t n, top = 0;
        bool fits;
        if (count == known || count == 0) {
            return LBGYM_SHM_OK;
        }
        if (!lbgym_shm_begin_read(lock, &seen)) {
            continue;
        }
        memcpy(mine->action, from, sizeof *mine->action);
        n = mine->action->num_servers;
        fits = n > 0 && n <= capacity;
        if (fits) {
            lbgym_shm_copy_action((unsigned char *)mine->action, from, capacity, n,
                                  lbgym_shm_has_index(&region->constant));
        }
        if (!lbgym_shm_end_read(lock, seen)) {
            continue;
        }
        if (!lbgym_shm_has_index(&region->constant)) {
            /* Reserved bytes in version 1.0. */
            mine->action->flags = 0;
        } else if (fits && (mine->action->flags & LBGYM_SHM_FLAG_INDEX) != 0) {
            fits = lbgym_shm_index_good(mine->index, mine->weights, n);
        }
        if (fits && (count | mine->action->sequence_id | mine->action->written_at | mine->action->lease) >> 63 == 0 &&
            lbgym_shm_largest(mine->weights, n) > 0.0) {
            for (uint32_t i = 0; i < n; i++) {
                top = mine->alias[i] > top ? mine->alias[i] : top;
            }
            if (top < n) {
                *number = count;
                return LBGYM_SHM_OK;
            }
        }
        return lbgym_shm_bad_contents(region, "an action that no agent may write");
    }
    return lbgym_shm_fail(region, LBGYM_SHM_BUSY, "region '%s': actions are written faster than they can be read",
                          region->name);
}

/** Puts weights in force: those of the newest action while its lease lasts, else the safe weights; an unreadable action
 * is ignored. They are in region.observation.weights; region.safe is true if they are the safe ones. 1 if they may
 * have changed, else 0. Call it before each publication and whenever lbgym_shm_wait_action returns 1. */
static inline int lbgym_shm_poll_action(lbgym_shm_region *region)
{
    const int code = lbgym_shm_must_be(region, true);
    const lbgym_shm_action *action = region->action.action;
    uint64_t now, seen, found;
    bool good;
    if (code < 0) {
        return code;
    }
    now = lbgym_shm_now();
    seen = __atomic_load_n(&region->header->action_count, __ATOMIC_ACQUIRE);
    if (lbgym_shm_read_action(region, region->action_known, &found) < 0) {
        /* The copy now holds an invalid action. */
        region->action_known = 0;
    }
    region->action_seen = found != 0 ? found : seen;
    if (found != 0) {
        /* From now on if it was written "later", as by the clock of another time namespace. */
        const uint64_t latest = lbgym_shm_now();
        const uint64_t begin = action->written_at < latest ? action->written_at : latest;
        region->action_known = found;
        region->lease_end = action->lease != 0 ? begin + action->lease : UINT64_MAX;
        if (now < region->lease_end) {
            region->observation.frame->applied_sequence_id = action->sequence_id;
            region->observation.frame->applied_at = now;
            region->observation.frame->flags |= LBGYM_SHM_FLAG_APPLIED;
        }
    }
    good = region->action_known != 0 && now < region->lease_end;
    if (found == 0 && region->safe == !good) {
        return 0;
    }
    region->safe = !good;
    lbgym_shm_combine(region);
    return 1;
}

/** Index parameters of the action in force, [*n][2]: speed per core and background load of the first *n servers; further
 * ones have no background load. NULL if it has none or the safe weights are in force, as lbgym_shm_poll_action last
 * found. */
static inline const double *lbgym_shm_index_in_force(const lbgym_shm_region *region, uint32_t *n)
{
    const lbgym_shm_action *action = region->action.action;
    const uint32_t servers = region->observation.frame->num_servers;
    *n = 0;
    if (!region->is_producer || region->safe || (action->flags & LBGYM_SHM_FLAG_INDEX) == 0) {
        return NULL;
    }
    *n = action->num_servers < servers ? action->num_servers : servers;
    return region->action.index;
}

/** ns from now until the lease of the action in force ends and lbgym_shm_poll_action has something to do; UINT64_MAX if
 * it never does, or no action is in force. */
static inline uint64_t lbgym_shm_lease_left(const lbgym_shm_region *region)
{
    const uint64_t now = lbgym_shm_now();
    if (region->safe || region->lease_end == UINT64_MAX) {
        return UINT64_MAX;
    }
    return now < region->lease_end ? region->lease_end - now : 0;
}

/** Sleeps until the agent has written an action that lbgym_shm_poll_action has not seen: 1; 0 after `timeout` ns, or at
 * a signal. */
static inline int lbgym_shm_wait_action(lbgym_shm_region *region, uint64_t timeout)
{
    const int code = lbgym_shm_must_be(region, true);
    if (code < 0) {
        return code;
    }
    return lbgym_shm_wait(region, &region->header->action_count, &region->header->action_event,
                          &region->header->action_waiters, region->action_seen, timeout);
}

/** The server for a flow, in proportion to the weights in force, from 64 well-mixed bits of its hash: two table
 * look-ups. A server that is not active is passed over by drawing again, from bits derived from the first, so that the
 * active ones share its flows in proportion to their weights; equal hashes give equal servers. After eight draws,
 * needed only where most of the weight is on inactive servers, a walk over all servers finds one.
 * LBGYM_SHM_NO_SERVER if none is active. A server of weight 0 is chosen only if no other is active. */
static inline uint32_t lbgym_shm_pick(const lbgym_shm_region *region, uint64_t hash)
{
    const lbgym_shm_observation *const o = &region->observation;
    double total = 0.0, passed = 0.0, target;
    uint32_t n, active = 0, last = LBGYM_SHM_NO_SERVER;
    if (o->frame == NULL || !region->is_producer) {
        return LBGYM_SHM_NO_SERVER;
    }
    n = o->frame->num_servers;
    for (int draw = 0; draw < 8; draw++) {
        uint32_t i = (uint32_t)(((hash >> 32) * n) >> 32);
        if ((uint32_t)hash >= region->threshold[i]) {
            i = region->alias[i];
        }
        if (o->active[i]) {
            return i;
        }
        /* SplitMix64. */
        hash += UINT64_C(0x9E3779B97F4A7C15);
        hash = (hash ^ (hash >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
        hash = (hash ^ (hash >> 27)) * UINT64_C(0x94D049BB133111EB);
        hash ^= hash >> 31;
    }
    for (uint32_t i = 0; i < n; i++) {
        active += o->active[i];
        total += o->active[i] ? o->weights[i] * 0x1p-17 : 0.0;
    }
    target = (double)(hash >> 11) * 0x1p-53 * (total > 0.0 ? total : (double)active);
    for (uint32_t i = 0; i < n; i++) {
        const double part = total > 0.0 ? o->weights[i] * 0x1p-17 : 1.0;
        if (o->active[i] && part > 0.0) {
            last = i;
            passed += part;
            if (passed > target) {
                break;
            }
        }
    }
    return last;
}

#ifdef __cplusplus
}
#endif

#endif /* of the #error above */

#endif /* LBGYM_SHM_H */
