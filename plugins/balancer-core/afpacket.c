/* SPDX-License-Identifier: Apache-2.0 */
/* Raw sockets around the core. The kernel sees all packets as well: the VIPs must not be its own, and it must not
 * forward; so the plane answers for the VIPs' link-layer addresses itself. Segments that a device is to cut, and
 * checksums that it is to complete, go through as they are (PACKET_VNET_HDR). */
#include "afpacket.h"

#include "lbgym_checksum.h"

#include <arpa/inet.h>
#include <errno.h>
#include <linux/if_packet.h>
#include <linux/virtio_net.h>
#include <net/ethernet.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define BURST 32
#define FRAME 65800     /* bytes; the longest that segmentation offload makes, and its headers */
#define BEFORE 64       /* bytes before a frame, for encapsulation */
#define MOST_LISTENERS 64
#define LINKS 65536u    /* neighbours that flows came from; a power of two */
#define PAUSE 10        /* ms between ticks where no packet comes */
#define BUDGET 512      /* flows looked at in a tick */
#define ETHERNET 14u

#ifndef PACKET_IGNORE_OUTGOING
#define PACKET_IGNORE_OUTGOING 23
#endif

/* Where a flow came from, so that NAT can send answers back. */
struct origin {
    uint32_t ifindex; /* 0: free */
    uint8_t mac[6], own_mac[6];
};

struct listener {
    uint32_t ifindex;
    uint8_t mac[6];
};

struct lbgym_afpacket {
    lbgym_core *core;
    lbgym_worker *worker;
    uint32_t mode, num_vips, num_listeners;
    lbgym_vip vips[LBGYM_CORE_MAX_VIPS];
    struct listener listeners[MOST_LISTENERS];
    struct pollfd sockets[MOST_LISTENERS + 1]; /* the first: an eventfd to wake the thread */
    pthread_t thread;
    bool runs;
    _Atomic bool stop;
    /* A letter box: filled by control while it is empty, emptied by the thread. */
    _Atomic bool has_letter;
    lbgym_hop letter[LBGYM_CORE_MAX_SERVERS];
    lbgym_hop hops[LBGYM_CORE_MAX_SERVERS];
    struct origin *origins; /* NAT: [LINKS] */
    _Atomic uint64_t totals[sizeof(lbgym_afpacket_totals) / sizeof(uint64_t)];
    /* A burst. */
    uint8_t *memory; /* [BURST][BEFORE + FRAME] */
    struct virtio_net_hdr offloads[BURST];
    struct sockaddr_ll from[BURST], to[BURST];
    lbgym_packet packets[BURST];
};

enum { RECEIVED, SENT, FAILED, TOO_LARGE, ANSWERED, UNLINKED };

static void count(lbgym_afpacket *p, int what, uint64_t n)
{
    atomic_store_explicit(&p->totals[what], atomic_load_explicit(&p->totals[what], memory_order_relaxed) + n,
                          memory_order_relaxed);
}

static uint64_t now_ns(void)
{
    struct timespec now;
    (void)clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000ull + (uint64_t)now.tv_nsec;
}

lbgym_afpacket *lbgym_afpacket_create(lbgym_core *core, uint32_t mode, const lbgym_vip *vips, uint32_t num_vips)
{
    lbgym_afpacket *p = calloc(1, sizeof *p);
    const int event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (p == NULL || event < 0) {
        free(p);
        if (event >= 0) {
            (void)close(event);
        }
        return NULL;
    }
    p->core = core;
    p->worker = lbgym_core_worker(core, 0);
    p->mode = mode;
    p->num_vips = num_vips;
    memcpy(p->vips, vips, num_vips * sizeof *vips);
    p->sockets[0].fd = event;
    p->sockets[0].events = POLLIN;
    p->memory = malloc((size_t)BURST * (BEFORE + FRAME));
    p->origins = calloc(mode == LBGYM_NAT ? LINKS : 1, sizeof *p->origins);
    if (p->memory == NULL || p->origins == NULL) {
        lbgym_afpacket_destroy(p);
        errno = ENOMEM;
        return NULL;
    }
    return p;
}

int lbgym_afpacket_listen(lbgym_afpacket *p, uint32_t ifindex, const uint8_t mac[6])
{
    const int on = 1, buffer = 1 << 23;
    struct sockaddr_ll address;
    struct packet_mreq membership;
    int fd, error;
    if (p->num_listeners == MOST_LISTENERS) {
        return -ENOSPC;
    }
    /* Of no protocol: nothing comes before it is bound to its interface. */
    fd = socket(AF_PACKET, SOCK_RAW | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0) {
        return -errno;
    }
    memset(&address, 0, sizeof address);
    address.sll_family = AF_PACKET;
    address.sll_protocol = htons(ETH_P_ALL);
    address.sll_ifindex = (int)ifindex;
    memset(&membership, 0, sizeof membership);
    membership.mr_ifindex = (int)ifindex;
    /* Questions for the link-layer address of a VIP of IPv6 are multicast to a group that nobody has joined. */
    membership.mr_type = PACKET_MR_ALLMULTI;
    (void)setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &buffer, sizeof buffer);
    (void)setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &buffer, sizeof buffer);
    if (setsockopt(fd, SOL_PACKET, PACKET_VNET_HDR, &on, sizeof on) < 0 ||
        setsockopt(fd, SOL_PACKET, PACKET_AUXDATA, &on, sizeof on) < 0 ||
        setsockopt(fd, SOL_PACKET, PACKET_IGNORE_OUTGOING, &on, sizeof on) < 0 ||
        setsockopt(fd, SOL_PACKET, PACKET_ADD_MEMBERSHIP, &membership, sizeof membership) < 0 ||
        bind(fd, (struct sockaddr *)&address, sizeof address) < 0) {
        error = errno;
        (void)close(fd);
        return -error;
    }
    p->listeners[p->num_listeners].ifindex = ifindex;
    memcpy(p->listeners[p->num_listeners].mac, mac, 6);
    p->num_listeners++;
    p->sockets[p->num_listeners].fd = fd;
    p->sockets[p->num_listeners].events = POLLIN;
    return 0;
}

static const lbgym_vip *vip_of(const lbgym_afpacket *p, const uint8_t *address, bool is_ipv6)
{
    for (uint32_t i = 0; i < p->num_vips; i++) {
        if (p->vips[i].is_ipv6 == is_ipv6 && memcmp(p->vips[i].address, address, is_ipv6 ? 16 : 4) == 0) {
            return &p->vips[i];
        }
    }
    return NULL;
}

static void transmit(lbgym_afpacket *p, const uint32_t *numbers, uint32_t n)
{
    struct mmsghdr messages[BURST];
    struct iovec parts[BURST][2];
    uint32_t done = 0;
    memset(messages, 0, n * sizeof *messages);
    for (uint32_t i = 0; i < n; i++) {
        const uint32_t k = numbers[i];
        parts[i][0].iov_base = &p->offloads[k];
        parts[i][0].iov_len = sizeof p->offloads[k];
        parts[i][1].iov_base = p->packets[k].data - ETHERNET;
        parts[i][1].iov_len = p->packets[k].length + ETHERNET;
        messages[i].msg_hdr.msg_iov = parts[i];
        messages[i].msg_hdr.msg_iovlen = 2;
        messages[i].msg_hdr.msg_name = &p->to[k];
        messages[i].msg_hdr.msg_namelen = sizeof p->to[k];
    }
    while (done < n) {
        const int sent = sendmmsg(p->sockets[1].fd, messages + done, n - done, MSG_DONTWAIT);
        if (sent > 0) {
            count(p, SENT, (uint64_t)sent);
            done += (uint32_t)sent;
        } else if (errno != EINTR) {
            count(p, FAILED, 1);
            done++;
        }
    }
}

/* Have packet `k` leave by an interface. */
static void address_to(lbgym_afpacket *p, uint32_t k, uint32_t ifindex, const uint8_t mac[6], const uint8_t own_mac[6])
{
    uint8_t *const frame = p->packets[k].data - ETHERNET;
    const bool is_ipv6 = p->packets[k].data[0] >> 4 == 6;
    memcpy(frame, mac, 6);
    memcpy(frame + 6, own_mac, 6);
    frame[12] = is_ipv6 ? 0x86 : 0x08;
    frame[13] = is_ipv6 ? 0xDD : 0x00;
    memset(&p->to[k], 0, sizeof p->to[k]);
    p->to[k].sll_family = AF_PACKET;
    p->to[k].sll_ifindex = (int)ifindex;
    p->to[k].sll_halen = 6;
    p->to[k].sll_protocol = htons(is_ipv6 ? ETH_P_IPV6 : ETH_P_IP);
    memcpy(p->to[k].sll_addr, mac, 6);
}

/* The number of the neighbour that a frame came from, or LINKS where there is no room. */
static uint32_t origin_of(lbgym_afpacket *p, uint32_t ifindex, const uint8_t *frame)
{
    uint64_t h = ifindex;
    for (int i = 6; i < 12; i++) {
        h = (h ^ frame[i]) * 0x9E3779B97F4A7C15ull;
    }
    for (uint32_t i = 0; i < LINKS; i++) {
        const uint32_t slot = (uint32_t)((h >> 32) + i) % LINKS;
        struct origin *const origin = &p->origins[slot];
        if (origin->ifindex == 0) {
            origin->ifindex = ifindex;
            memcpy(origin->mac, frame + 6, 6);
            memcpy(origin->own_mac, frame, 6);
        }
        if (origin->ifindex == ifindex && memcmp(origin->mac, frame + 6, 6) == 0) {
            return slot;
        }
    }
    return LINKS;
}

/* A frame of control that the plane has made in place: `length` bytes from the IP header, or what is there. */
static void answer(lbgym_afpacket *p, uint32_t k, uint32_t length, const struct listener *listener,
                   const uint8_t to[6], uint16_t type)
{
    uint8_t *const frame = p->packets[k].data - ETHERNET;
    p->packets[k].length = length;
    memset(&p->offloads[k], 0, sizeof p->offloads[k]);
    address_to(p, k, listener->ifindex, to, listener->mac);
    frame[12] = (uint8_t)(type >> 8);
    frame[13] = (uint8_t)type;
    p->to[k].sll_protocol = htons(type);
    count(p, ANSWERED, 1);
    transmit(p, &k, 1);
}

static void arp(lbgym_afpacket *p, uint32_t k, const struct listener *listener)
{
    static const uint8_t request[8] = {0, 1, 8, 0, 6, 4, 0, 1};
    uint8_t *const d = p->packets[k].data;
    uint8_t asked[4], to[6];
    if (p->packets[k].length < 28 || memcmp(d, request, sizeof request) != 0 || vip_of(p, d + 24, false) == NULL) {
        return;
    }
    memcpy(to, d + 8, 6);
    memcpy(asked, d + 24, 4);
    d[7] = 2;
    memcpy(d + 18, d + 8, 10);
    memcpy(d + 8, listener->mac, 6);
    memcpy(d + 14, asked, 4);
    answer(p, k, 28, listener, to, ETH_P_ARP);
}

/* A neighbour solicitation becomes an advertisement. True if it was one for a VIP. */
static bool solicitation(lbgym_afpacket *p, uint32_t k, const struct listener *listener)
{
    static const uint8_t all_nodes[16] = {0xff, 2, [15] = 1}, all_nodes_mac[6] = {0x33, 0x33, 0, 0, 0, 1};
    uint8_t *const d = p->packets[k].data, *const icmp = d + 40;
    uint8_t target[16], to[6];
    uint32_t sum = 58 + 32;
    bool anonymous = true;
    if (p->packets[k].length < 64 || d[6] != 58 || d[7] != 255 || icmp[0] != 135 || icmp[1] != 0 ||
        vip_of(p, icmp + 8, true) == NULL) {
        return false;
    }
    for (int i = 8; i < 24; i++) {
        anonymous = anonymous && d[i] == 0;
    }
    memcpy(target, icmp + 8, 16);
    memcpy(to, anonymous ? all_nodes_mac : d - 8, 6);
    d[4] = 0;
    d[5] = 32;
    memcpy(d + 24, anonymous ? all_nodes : d + 8, 16);
    memcpy(d + 8, target, 16);
    memset(icmp, 0, 32);
    icmp[0] = 136;
    icmp[4] = anonymous ? 0x20 : 0x60;
    memcpy(icmp + 8, target, 16);
    icmp[24] = 2;
    icmp[25] = 1;
    memcpy(icmp + 26, listener->mac, 6);
    for (int i = 8; i < 72; i += 2) {
        sum += (uint32_t)d[i] << 8 | d[i + 1];
    }
    sum = 0xFFFFu & ~(uint32_t)lbgym_sum_folded(sum);
    icmp[2] = (uint8_t)(sum >> 8);
    icmp[3] = (uint8_t)sum;
    answer(p, k, 72, listener, to, ETH_P_IPV6);
    return true;
}

/* Receives a burst; returns how many frames of it are for the core, which are the first ones of p->packets. */
static uint32_t receive(lbgym_afpacket *p, uint32_t which, bool *more)
{
    const struct listener *const listener = &p->listeners[which];
    struct mmsghdr messages[BURST];
    struct iovec parts[BURST][2];
    _Alignas(struct cmsghdr) uint8_t controls[BURST][CMSG_SPACE(sizeof(struct tpacket_auxdata))];
    uint32_t taken = 0;
    int n;
    memset(messages, 0, sizeof messages);
    for (uint32_t k = 0; k < BURST; k++) {
        parts[k][0].iov_base = &p->offloads[k];
        parts[k][0].iov_len = sizeof p->offloads[k];
        parts[k][1].iov_base = p->memory + (size_t)k * (BEFORE + FRAME) + BEFORE;
        parts[k][1].iov_len = FRAME;
        messages[k].msg_hdr.msg_iov = parts[k];
        messages[k].msg_hdr.msg_iovlen = 2;
        messages[k].msg_hdr.msg_name = &p->from[k];
        messages[k].msg_hdr.msg_namelen = sizeof p->from[k];
        messages[k].msg_hdr.msg_control = controls[k];
        messages[k].msg_hdr.msg_controllen = sizeof controls[k];
    }
    n = recvmmsg(p->sockets[which + 1].fd, messages, BURST, MSG_DONTWAIT, NULL);
    *more = n == BURST;
    if (n <= 0) {
        return 0;
    }
    count(p, RECEIVED, (uint64_t)n);
    for (uint32_t i = 0; i < (uint32_t)n; i++) {
        uint8_t *const frame = parts[i][1].iov_base;
        const uint32_t length = messages[i].msg_len;
        const struct cmsghdr *control = CMSG_FIRSTHDR(&messages[i].msg_hdr);
        lbgym_packet *const packet = &p->packets[taken];
        bool is_tagged = false;
        uint16_t type;
        if (control != NULL && control->cmsg_type == PACKET_AUXDATA) {
            struct tpacket_auxdata auxiliary;
            memcpy(&auxiliary, CMSG_DATA(control), sizeof auxiliary);
            is_tagged = (auxiliary.tp_status & TP_STATUS_VLAN_VALID) != 0;
        }
        if (is_tagged || length < sizeof p->offloads[i] + ETHERNET || (messages[i].msg_hdr.msg_flags & MSG_TRUNC) != 0) {
            continue;
        }
        type = (uint16_t)(frame[12] << 8 | frame[13]);
        memset(packet, 0, sizeof *packet);
        packet->data = frame + ETHERNET;
        packet->length = length - (uint32_t)sizeof p->offloads[i] - ETHERNET;
        packet->headroom = BEFORE;
        p->offloads[taken] = p->offloads[i];
        if (type == ETH_P_ARP && p->from[i].sll_pkttype != PACKET_OTHERHOST) {
            arp(p, taken, listener);
            continue;
        }
        if (type == ETH_P_IPV6 && p->from[i].sll_pkttype != PACKET_OTHERHOST && solicitation(p, taken, listener)) {
            continue;
        }
        if (p->from[i].sll_pkttype != PACKET_HOST || (type != ETH_P_IP && type != ETH_P_IPV6) ||
            (packet->length > 0 && packet->data[0] >> 4 != (type == ETH_P_IP ? 4 : 6))) {
            continue;
        }
        packet->partial = (p->offloads[taken].flags & VIRTIO_NET_HDR_F_NEEDS_CSUM) != 0;
        if (p->mode == LBGYM_NAT) {
            packet->link = origin_of(p, listener->ifindex, frame);
            if (packet->link == LINKS) {
                count(p, UNLINKED, 1);
                continue;
            }
        }
        taken++;
    }
    return taken;
}

static void forward(lbgym_afpacket *p, uint32_t n)
{
    const uint8_t *before[BURST];
    uint32_t numbers[BURST], leaving = 0;
    for (uint32_t k = 0; k < n; k++) {
        before[k] = p->packets[k].data;
    }
    lbgym_worker_run(p->worker, p->packets, n, now_ns());
    for (uint32_t k = 0; k < n; k++) {
        const lbgym_packet *const packet = &p->packets[k];
        struct virtio_net_hdr *const offload = &p->offloads[k];
        const uint32_t grown = (uint32_t)(before[k] - packet->data);
        if (packet->verdict == LBGYM_SEND) {
            const lbgym_hop *hop = &p->hops[packet->via % LBGYM_CORE_MAX_SERVERS];
            if (grown > 0 && offload->gso_type != VIRTIO_NET_HDR_GSO_NONE) {
                count(p, TOO_LARGE, 1);
                continue;
            }
            address_to(p, k, hop->ifindex, hop->mac, hop->own_mac);
        } else if (packet->verdict == LBGYM_REPLY) {
            const struct origin *origin = &p->origins[packet->link % LINKS];
            address_to(p, k, origin->ifindex, origin->mac, origin->own_mac);
        } else {
            continue;
        }
        offload->flags &= VIRTIO_NET_HDR_F_NEEDS_CSUM;
        offload->csum_start = (uint16_t)(offload->csum_start + (offload->flags ? grown : 0));
        numbers[leaving++] = k;
    }
    if (leaving > 0) {
        transmit(p, numbers, leaving);
    }
}

static void *run(void *at)
{
    lbgym_afpacket *const p = at;
    while (!atomic_load_explicit(&p->stop, memory_order_relaxed)) {
        bool more = true;
        if (poll(p->sockets, p->num_listeners + 1, PAUSE) > 0 && p->sockets[0].revents != 0) {
            uint64_t woken;
            (void)!read(p->sockets[0].fd, &woken, sizeof woken);
        }
        if (atomic_load_explicit(&p->has_letter, memory_order_acquire)) {
            memcpy(p->hops, p->letter, sizeof p->hops);
            atomic_store_explicit(&p->has_letter, false, memory_order_release);
        }
        for (uint32_t i = 0; i < p->num_listeners; i++) {
            if (p->sockets[i + 1].revents == 0) {
                continue;
            }
            /* All interfaces have their turn, also where one has always more. */
            for (int bursts = 0; bursts < 8 && more; bursts++) {
                const uint32_t n = receive(p, i, &more);
                if (n > 0) {
                    forward(p, n);
                }
            }
            more = true;
        }
        (void)lbgym_worker_tick(p->worker, now_ns(), BUDGET);
    }
    return NULL;
}

int lbgym_afpacket_start(lbgym_afpacket *p)
{
    sigset_t all, before;
    int error;
    /* Signals are for the threads that were there before. */
    (void)sigfillset(&all);
    (void)pthread_sigmask(SIG_SETMASK, &all, &before);
    error = pthread_create(&p->thread, NULL, run, p);
    (void)pthread_sigmask(SIG_SETMASK, &before, NULL);
    p->runs = error == 0;
    return -error;
}

static void wake(lbgym_afpacket *p)
{
    const uint64_t one = 1;
    (void)!write(p->sockets[0].fd, &one, sizeof one);
}

void lbgym_afpacket_set_hops(lbgym_afpacket *p, const lbgym_hop *hops, uint32_t n)
{
    const struct timespec moment = {0, 50000};
    memset(p->letter, 0, sizeof p->letter);
    memcpy(p->letter, hops, n * sizeof *hops);
    if (!p->runs) {
        memcpy(p->hops, p->letter, sizeof p->hops);
        return;
    }
    atomic_store_explicit(&p->has_letter, true, memory_order_release);
    wake(p);
    while (atomic_load_explicit(&p->has_letter, memory_order_acquire)) {
        (void)nanosleep(&moment, NULL);
    }
}

bool lbgym_afpacket_collect(lbgym_afpacket *p, uint64_t timeout)
{
    const struct timespec moment = {0, 50000};
    const uint64_t until = now_ns() + timeout;
    lbgym_core_ask(p->core);
    if (!p->runs) {
        (void)lbgym_worker_tick(p->worker, now_ns(), 0);
    }
    wake(p);
    while (!lbgym_core_answered(p->core)) {
        if (now_ns() > until) {
            return false;
        }
        (void)nanosleep(&moment, NULL);
    }
    return true;
}

void lbgym_afpacket_read(const lbgym_afpacket *p, lbgym_afpacket_totals *totals)
{
    uint64_t *const out = (uint64_t *)totals;
    for (size_t i = 0; i < sizeof *totals / sizeof *out; i++) {
        out[i] = atomic_load_explicit(&p->totals[i], memory_order_relaxed);
    }
}

void lbgym_afpacket_destroy(lbgym_afpacket *p)
{
    if (p == NULL) {
        return;
    }
    if (p->runs) {
        atomic_store_explicit(&p->stop, true, memory_order_relaxed);
        wake(p);
        (void)pthread_join(p->thread, NULL);
    }
    for (uint32_t i = 0; i <= p->num_listeners; i++) {
        (void)close(p->sockets[i].fd);
    }
    free(p->memory);
    free(p->origins);
    free(p);
}
