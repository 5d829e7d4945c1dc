/* How long a C producer takes to write and publish an observation of N servers: publish N. Prints ns. */
#define _GNU_SOURCE
#include <lbgym_shm.h>

int main(int argc, char **argv)
{
    const uint32_t servers = argc > 1 ? (uint32_t)strtoul(argv[1], NULL, 10) : 64;
    const int rounds = 200000;
    lbgym_shm_options options = lbgym_shm_default_options(servers);
    lbgym_shm_region region;
    char name[64];
    uint64_t begin;
    (void)snprintf(name, sizeof name, "bench-publish-%d", (int)getpid());
    if (lbgym_shm_create(&region, name, &options) < 0) {
        fprintf(stderr, "%s\n", region.message);
        return 1;
    }
    begin = lbgym_shm_now();
    for (int round = 0; round < rounds; round++) {
        /* One feature of one server changes each time, so that nothing is left out. */
        region.observation.active[(uint32_t)round % servers] = 1;
        region.observation.stats[(uint32_t)round % servers * LBGYM_SHM_NUM_FEATURES] = (float)round;
        if (lbgym_shm_publish(&region, (uint64_t)round) < 0) {
            fprintf(stderr, "%s\n", region.message);
            return 1;
        }
    }
    printf("%.1f\n", (double)(lbgym_shm_now() - begin) / rounds);
    (void)lbgym_shm_unlink(&region);
    lbgym_shm_close(&region);
    return 0;
}
