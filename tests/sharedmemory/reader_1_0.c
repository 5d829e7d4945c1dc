/* SPDX-License-Identifier: Apache-2.0 */
/* A reader of version 1.0 of the binary interface, written from the tables of that version and never changed since:
 * prints the newest observation of the region file that it is given, or says why it refuses it. */
#include <stdint.h>
#include <stdio.h>
#include <string.h>

static unsigned char file[1 << 20];

static uint64_t word(size_t at)
{
    uint64_t value;
    memcpy(&value, file + at, sizeof value);
    return value;
}

static uint32_t half(size_t at)
{
    uint32_t value;
    memcpy(&value, file + at, sizeof value);
    return value;
}

static size_t lines(size_t size) { return (size + 63) / 64 * 64; }

int main(int argc, char **argv)
{
    FILE *in = argc == 2 ? fopen(argv[1], "rb") : NULL;
    const size_t size = in != NULL ? fread(file, 1, sizeof file, in) : 0;
    const size_t capacity = half(24), frames = half(28), first = half(32), stride = half(36);
    const size_t actions = half(40), action = half(44), num_actions = half(48);
    const size_t stats = 128 + lines(capacity), truth = stats + lines(44 * capacity);
    const size_t counters = truth + lines(12 * capacity), weights = counters + lines(32 * capacity);
    const size_t safe = weights + lines(8 * capacity), needed = safe + lines(8 * capacity);
    const uint64_t latest = word(128);
    const size_t at = first + (size_t)(latest & (frames - 1)) * stride;
    if (size < 256 || memcmp(file, "LBGYMSHM", 8) != 0 || (half(8) & 0xFFFF) != 1 || word(16) != size) {
        puts("no region");
        return 1;
    }
    if (stride < needed || action < 64 + lines(8 * capacity) + 2 * lines(4 * capacity) ||
        first + frames * stride > actions || actions + num_actions * action > size) {
        puts("sizes and offsets contradict each other");
        return 1;
    }
    if (latest == 0 || (word(at) & 1) != 0 || word(at + 8) != latest) {
        puts("nothing whole");
        return 1;
    }
    printf("%llu %u", (unsigned long long)latest, half(at + 48));
    for (uint32_t i = 0; i < half(at + 48); i++) {
        float mean;
        double in_force, fallback;
        memcpy(&mean, file + at + stats + 44 * i + 4, sizeof mean);
        memcpy(&in_force, file + at + weights + 8 * i, sizeof in_force);
        memcpy(&fallback, file + at + safe + 8 * i, sizeof fallback);
        printf(" %d %g %llu %g %g", file[at + 128 + i], (double)mean, (unsigned long long)word(at + counters + 32 * i),
               in_force, fallback);
    }
    puts("");
    return 0;
}
