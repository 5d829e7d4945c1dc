/* SPDX-License-Identifier: Apache-2.0 */
/* Packets between VPP's graph and the core. */
#include "lbgym.h"

#include <vnet/feature/feature.h>
#include <vnet/interface_output.h>

#include <time.h>

/* Bytes before a packet that are left for the link layer's header. */
#define LINK_HEADER 32
/* Flows whose time is up that a thread looks at before it looks at packets again. */
#define BUDGET 512

#define foreach_lbgym_error                                                                                            \
    _(DROPPED, dropped, ERROR, "packets without a server, or to one that cannot be reached")                           \
    _(HANDED_OVER, handed_over, INFO, "packets handed over to the thread that has their flow")                         \
    _(CONGESTION, congestion, ERROR, "packets that the thread of their flow had no room for")                          \
    _(SEGMENTS, segments, ERROR, "segments that a device is to cut, which cannot be encapsulated")

typedef enum {
#define _(symbol, name, severity, text) LBGYM_ERROR_##symbol,
    foreach_lbgym_error
#undef _
        LBGYM_NUM_ERRORS
} lbgym_error_t;

static vlib_error_desc_t lbgym_errors[] = {
#define _(symbol, name, severity, text) {#name, text, VL_COUNTER_SEVERITY_##severity},
    foreach_lbgym_error
#undef _
};

typedef struct {
    u32 vip;
    u16 server;
    u8 verdict;
} lbgym_trace_t;

static u8 *format_lbgym_trace(u8 *s, va_list *arguments)
{
    static const char *const verdicts[] = {"pass", "send", "reply", "drop", "hand over"};
    CLIB_UNUSED(vlib_main_t * vm) = va_arg(*arguments, vlib_main_t *);
    CLIB_UNUSED(vlib_node_t * node) = va_arg(*arguments, vlib_node_t *);
    const lbgym_trace_t *const t = va_arg(*arguments, lbgym_trace_t *);
    s = format(s, "lbgym: %s", t->verdict < ARRAY_LEN(verdicts) ? verdicts[t->verdict] : "?");
    if (t->server != LBGYM_CORE_NO_SERVER && !pool_is_free_index(lbgym_main.vips, t->vip)) {
        lbgym_service_server server;
        const lbgym_service *const service = lbgym_main.vips[t->vip].service;
        (void)lbgym_service_read(service, t->server, &server, NULL);
        s = format(s, ", VIP %s, server %s", lbgym_service_name(service), server.name);
    }
    return s;
}

enum { NEXT_DROP, NEXT_LOCAL, NUM_NEXTS };

/* A frame, and what becomes of it. */
typedef struct {
    vlib_buffer_t *buffers[VLIB_FRAME_SIZE];
    u16 nexts[VLIB_FRAME_SIZE];
    lbgym_packet packets[VLIB_FRAME_SIZE];
    u32 vips[VLIB_FRAME_SIZE]; /* whose verdict it is */
    u8 done[VLIB_FRAME_SIZE];
    lbgym_packet some[VLIB_FRAME_SIZE];
    u32 which[VLIB_FRAME_SIZE];
} lbgym_burst_t;

static_always_inline u64 now_ns(void)
{
    struct timespec now;
    (void)clock_gettime(CLOCK_MONOTONIC, &now);
    return (u64)now.tv_sec * 1000000000ull + (u64)now.tv_nsec;
}

static_always_inline bool is_partial(const vlib_buffer_t *b)
{
    return (b->flags & VNET_BUFFER_F_OFFLOAD) != 0 &&
           (vnet_buffer(b)->oflags & (VNET_BUFFER_OFFLOAD_F_TCP_CKSUM | VNET_BUFFER_OFFLOAD_F_UDP_CKSUM)) != 0;
}

static_always_inline void describe(lbgym_packet *p, vlib_buffer_t *b)
{
    const i32 headroom = VLIB_BUFFER_PRE_DATA_SIZE + b->current_data - LINK_HEADER;
    clib_memset(p, 0, sizeof *p);
    p->data = vlib_buffer_get_current(b);
    p->length = b->current_length;
    p->headroom = headroom > 0 ? (u32)headroom : 0;
    p->partial = is_partial(b);
}

/* Encapsulation hides a checksum that a device is to complete, and segments that it is to cut. */
static_always_inline bool make_whole(vlib_main_t *vm, vlib_buffer_t *b, bool is_ipv6)
{
    if (PREDICT_FALSE(b->flags & VNET_BUFFER_F_GSO)) {
        return false;
    }
    if (PREDICT_FALSE(b->flags & VNET_BUFFER_F_OFFLOAD)) {
        vnet_calc_checksums_inline(vm, b, !is_ipv6, is_ipv6);
    }
    return true;
}

/* The usual case: a whole frame for one VIP. False: it is not that simple. */
static_always_inline bool run_all(vlib_main_t *vm, lbgym_burst_t *burst, const u32 *vips, u32 n, bool is_ipv6, u64 now)
{
    const lbgym_vip_t *vip;
    if (PREDICT_FALSE(vec_len(vips) != 1)) {
        return false;
    }
    vip = pool_elt_at_index(lbgym_main.vips, vips[0]);
    for (u32 i = 0; i < n && (vip->mode == LBGYM_GRE || vip->mode == LBGYM_IPIP); i++) {
        if (PREDICT_FALSE(!make_whole(vm, burst->buffers[i], is_ipv6))) {
            return false;
        }
        burst->packets[i].partial = 0;
    }
    lbgym_worker_run(vip->workers[vm->thread_index], burst->packets, n, now);
    for (u32 i = 0; i < n; i++) {
        burst->vips[i] = vips[0];
    }
    return true;
}

/* Run packets, given by number, by one VIP after another until one of them takes each. */
static_always_inline void run(vlib_main_t *vm, vlib_node_runtime_t *node, lbgym_burst_t *burst, u32 *vips,
                              u32 *which, u32 n, u32 of, bool is_ipv6, u64 now)
{
    u32 *index;
    if (PREDICT_TRUE(n == of && run_all(vm, burst, vips, n, is_ipv6, now))) {
        return;
    }
    vec_foreach (index, vips) {
        const lbgym_vip_t *const vip = pool_elt_at_index(lbgym_main.vips, *index);
        const bool encapsulates = vip->mode == LBGYM_GRE || vip->mode == LBGYM_IPIP;
        u32 left = 0;
        for (u32 k = 0; k < n; k++) {
            lbgym_packet *const packet = &burst->packets[which[k]];
            vlib_buffer_t *const b = burst->buffers[which[k]];
            if (PREDICT_FALSE(encapsulates)) {
                if (!make_whole(vm, b, is_ipv6)) {
                    packet->verdict = LBGYM_DROP;
                    vlib_node_increment_counter(vm, node->node_index, LBGYM_ERROR_SEGMENTS, 1);
                    continue;
                }
                packet->partial = 0;
            }
            which[left] = which[k];
            burst->some[left++] = *packet;
        }
        n = left;
        lbgym_worker_run(vip->workers[vm->thread_index], burst->some, n, now);
        left = 0;
        for (u32 k = 0; k < n; k++) {
            burst->packets[which[k]] = burst->some[k];
            burst->vips[which[k]] = *index;
            if (burst->some[k].verdict == LBGYM_PASS) {
                which[left++] = which[k];
            }
        }
        n = left;
        if (n == 0) {
            return;
        }
    }
}

static_always_inline void trace(vlib_main_t *vm, vlib_node_runtime_t *node, const lbgym_burst_t *burst, u32 n)
{
    for (u32 i = 0; i < n; i++) {
        if (burst->buffers[i]->flags & VLIB_BUFFER_IS_TRACED) {
            lbgym_trace_t *const t = vlib_add_trace(vm, node, burst->buffers[i], sizeof *t);
            t->vip = burst->vips[i];
            t->server = burst->packets[i].server;
            t->verdict = burst->packets[i].verdict;
        }
    }
}

/* Have packets of other threads' flows go there; the rest, to where `nexts` says. */
static_always_inline void leave(vlib_main_t *vm, vlib_node_runtime_t *node, lbgym_burst_t *burst, u32 *from, u32 n,
                                u32 queue)
{
    u32 staying[VLIB_FRAME_SIZE], leaving[VLIB_FRAME_SIZE], num_leaving = 0, num_staying = 0, taken;
    u16 threads[VLIB_FRAME_SIZE], nexts[VLIB_FRAME_SIZE];
    for (u32 i = 0; i < n; i++) {
        if (burst->packets[i].verdict == LBGYM_HANDOVER) {
            threads[num_leaving] = (u16)burst->packets[i].via;
            leaving[num_leaving++] = from[i];
        } else {
            nexts[num_staying] = burst->nexts[i];
            staying[num_staying++] = from[i];
        }
    }
#ifdef LBGYM_HANDOFF_QUEUES
    taken = vlib_buffer_enqueue_to_thread(vm, node, queue, leaving, threads, num_leaving);
#else
    taken = vlib_buffer_enqueue_to_thread(vm, node, queue, leaving, threads, num_leaving, 1);
#endif
    vlib_node_increment_counter(vm, node->node_index, LBGYM_ERROR_HANDED_OVER, taken);
    if (taken < num_leaving) {
        vlib_node_increment_counter(vm, node->node_index, LBGYM_ERROR_CONGESTION, num_leaving - taken);
    }
    vlib_buffer_enqueue_to_next(vm, node, staying, nexts, num_staying);
}

static_always_inline u32 begin(vlib_main_t *vm, vlib_frame_t *frame, lbgym_burst_t *burst)
{
    u32 *const from = vlib_frame_vector_args(frame);
    const u32 n = frame->n_vectors;
    vlib_get_buffers(vm, from, burst->buffers, n);
    for (u32 i = 0; i < n; i++) {
        if (i + 4 < n) {
            vlib_prefetch_buffer_header(burst->buffers[i + 4], LOAD);
        }
        if (i + 2 < n) {
            CLIB_PREFETCH(burst->buffers[i + 2]->data + burst->buffers[i + 2]->current_data, 2 * CLIB_CACHE_LINE_BYTES,
                          STORE);
        }
        describe(&burst->packets[i], burst->buffers[i]);
        burst->vips[i] = ~0;
    }
    return n;
}

static_always_inline void end(vlib_main_t *vm, vlib_node_runtime_t *node, vlib_frame_t *frame, lbgym_burst_t *burst,
                              u32 handovers, u32 queue)
{
    if (PREDICT_FALSE(node->flags & VLIB_NODE_FLAG_TRACE)) {
        trace(vm, node, burst, frame->n_vectors);
    }
    if (PREDICT_FALSE(handovers != 0)) {
        leave(vm, node, burst, vlib_frame_vector_args(frame), frame->n_vectors, queue);
    } else {
        vlib_buffer_enqueue_to_next(vm, node, vlib_frame_vector_args(frame), burst->nexts, frame->n_vectors);
    }
}

/* Packets to VIPs. */
static_always_inline uword forward(vlib_main_t *vm, vlib_node_runtime_t *node, vlib_frame_t *frame, bool is_ipv6)
{
    lbgym_burst_t burst;
    u32 which[VLIB_FRAME_SIZE], handovers = 0;
    const u32 n = begin(vm, frame, &burst);
    const u64 now = now_ns();
    clib_memset(burst.done, 0, n);
    for (u32 first = 0; first < n; first++) {
        const u32 address = vnet_buffer(burst.buffers[first])->ip.adj_index[VLIB_TX];
        u32 some = 0;
        if (PREDICT_TRUE(burst.done[first])) {
            continue;
        }
        for (u32 i = first; i < n; i++) {
            if (vnet_buffer(burst.buffers[i])->ip.adj_index[VLIB_TX] == address) {
                burst.done[i] = 1;
                which[some++] = i;
            }
        }
        /* It may have been removed while packets waited for another thread. */
        if (PREDICT_TRUE(!pool_is_free_index(lbgym_main.addresses, address))) {
            run(vm, node, &burst, lbgym_main.addresses[address].vips, which, some, n, is_ipv6, now);
        }
    }
    for (u32 i = 0; i < n; i++) {
        const lbgym_packet *const packet = &burst.packets[i];
        vlib_buffer_t *const b = burst.buffers[i];
        burst.nexts[i] = NEXT_DROP;
        b->error = node->errors[LBGYM_ERROR_DROPPED];
        if (PREDICT_TRUE(packet->verdict == LBGYM_SEND)) {
            const dpo_id_t *const dpo = &lbgym_main.vips[burst.vips[i]].dpos[packet->via];
            vlib_buffer_advance(b, (word)(packet->data - (u8 *)vlib_buffer_get_current(b)));
            vnet_buffer(b)->ip.adj_index[VLIB_TX] = dpo->dpoi_index;
            burst.nexts[i] = dpo->dpoi_next_node;
        } else if (packet->verdict == LBGYM_PASS) {
            vnet_buffer(b)->ip.rx_sw_if_index = vnet_buffer(b)->sw_if_index[VLIB_RX];
            burst.nexts[i] = NEXT_LOCAL;
        }
        handovers += packet->verdict == LBGYM_HANDOVER;
    }
    end(vm, node, frame, &burst, handovers, lbgym_main.queues[is_ipv6]);
    return n;
}

/* Packets that may be answers of servers. Those for a VIP with NAT are translated as well, and routed like all others. */
static_always_inline uword return_(vlib_main_t *vm, vlib_node_runtime_t *node, vlib_frame_t *frame, bool is_ipv6)
{
    lbgym_burst_t burst;
    u32 which[VLIB_FRAME_SIZE], handovers = 0;
    const u32 n = begin(vm, frame, &burst);
    for (u32 i = 0; i < n; i++) {
        which[i] = i;
    }
    run(vm, node, &burst, lbgym_main.translating, which, n, n, is_ipv6, now_ns());
    for (u32 i = 0; i < n; i++) {
        const u8 verdict = burst.packets[i].verdict;
        burst.nexts[i] = NEXT_DROP;
        burst.buffers[i]->error = node->errors[LBGYM_ERROR_DROPPED];
        if (verdict == LBGYM_HANDOVER) {
            handovers++;
        } else if (verdict != LBGYM_DROP) {
            vnet_feature_next_u16(&burst.nexts[i], burst.buffers[i]);
        }
    }
    end(vm, node, frame, &burst, handovers, lbgym_main.queues[2 + is_ipv6]);
    return n;
}

VLIB_NODE_FN(lbgym4_node)(vlib_main_t *vm, vlib_node_runtime_t *node, vlib_frame_t *frame)
{
    return forward(vm, node, frame, false);
}

VLIB_NODE_FN(lbgym6_node)(vlib_main_t *vm, vlib_node_runtime_t *node, vlib_frame_t *frame)
{
    return forward(vm, node, frame, true);
}

VLIB_NODE_FN(lbgym4_return_node)(vlib_main_t *vm, vlib_node_runtime_t *node, vlib_frame_t *frame)
{
    return return_(vm, node, frame, false);
}

VLIB_NODE_FN(lbgym6_return_node)(vlib_main_t *vm, vlib_node_runtime_t *node, vlib_frame_t *frame)
{
    return return_(vm, node, frame, true);
}

/* On every thread, between frames: flows whose time is up, and counts for who publishes them. */
VLIB_NODE_FN(lbgym_tick_node)(vlib_main_t *vm, vlib_node_runtime_t *node, vlib_frame_t *frame)
{
    const u64 now = now_ns();
    lbgym_vip_t *vip;
    pool_foreach (vip, lbgym_main.vips) {
        (void)lbgym_worker_tick(vip->workers[vm->thread_index], now, BUDGET);
    }
    return 0;
}

#define NODE(symbol, text, next_local)                                                                                 \
    VLIB_REGISTER_NODE(symbol) = {                                                                                     \
        .name = text,                                                                                                  \
        .vector_size = sizeof(u32),                                                                                    \
        .format_trace = format_lbgym_trace,                                                                            \
        .type = VLIB_NODE_TYPE_INTERNAL,                                                                               \
        .n_errors = LBGYM_NUM_ERRORS,                                                                                  \
        .error_counters = lbgym_errors,                                                                                \
        .n_next_nodes = NUM_NEXTS,                                                                                     \
        .next_nodes = {[NEXT_DROP] = "error-drop", [NEXT_LOCAL] = next_local},                                         \
    }

NODE(lbgym4_node, "lbgym4", "ip4-local");
NODE(lbgym6_node, "lbgym6", "ip6-local");
NODE(lbgym4_return_node, "lbgym4-return", "ip4-local");
NODE(lbgym6_return_node, "lbgym6-return", "ip6-local");

VNET_FEATURE_INIT(lbgym4_return, static) = {
    .arc_name = "ip4-unicast",
    .node_name = "lbgym4-return",
    .runs_before = VNET_FEATURES("ip4-lookup"),
};

VNET_FEATURE_INIT(lbgym6_return, static) = {
    .arc_name = "ip6-unicast",
    .node_name = "lbgym6-return",
    .runs_before = VNET_FEATURES("ip6-lookup"),
};

VLIB_REGISTER_NODE(lbgym_tick_node) = {
    .name = "lbgym-tick",
    .type = VLIB_NODE_TYPE_INPUT,
    .state = VLIB_NODE_STATE_INTERRUPT,
};
