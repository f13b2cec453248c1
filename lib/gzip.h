//  lib/gzip.h: files that gzip has packed.

#ifndef GZIP_H
#define GZIP_H
#include <zlib.h>
#include "../ops/host.h"

static void *zlib_memory(void *unused, unsigned n, unsigned size) { (void)unused; return alloc(n, size); }
static void zlib_free(void *unused, void *p) { (void)unused; free(p); }

static int is_gzip(const char *file, size_t bytes) { return bytes >= 2 && !memcmp(file, "\x1f\x8b", 2); }

// Unpacks one member of the file into *text, behind the *n bytes that are there. Returns what zlib said last,
// and in *used how many bytes the member has. zlib counts in 32 bits, so a large file goes through in pieces.
static int unpack_member(const char *file, size_t bytes, size_t *used, char **text, size_t *n, size_t *room)
{
    z_stream z = {.zalloc = zlib_memory, .zfree = zlib_free};
    int said = inflateInit2(&z, 16 + MAX_WBITS);                // 16: with gzip's header and its checksum
    *used = 0;
    while (said == Z_OK || said == Z_BUF_ERROR) {
        if (*n + 1 >= *room) *text = resize(*text, *room = 2 * *room + (1 << 16));
        size_t in = bytes - *used < 1 << 30 ? bytes - *used : 1 << 30;
        size_t out = *room - 1 - *n < 1 << 30 ? *room - 1 - *n : 1 << 30;
        z.next_in = (unsigned char *)(uintptr_t)(file + *used);
        z.avail_in = (unsigned)in;
        z.next_out = (unsigned char *)*text + *n;
        z.avail_out = (unsigned)out;
        said = inflate(&z, Z_NO_FLUSH);
        *used += in - z.avail_in;
        *n += out - z.avail_out;
        if (z.avail_out && *used == bytes) break;               // it wants more than there is
    }
    inflateEnd(&z);
    return said;
}

// What gzip has packed, unpacked, with a NUL behind it; any other file as it is. A file may have several
// members, one behind the other, and zeros behind the last. `file` is freed where it is not what comes back.
static char *unpacked(const char *path, char *file, size_t *bytes)
{
    char *text = NULL;
    size_t n = 0, room = 0, at = 0, used;
    if (!is_gzip(file, *bytes)) return file;
    for (; at < *bytes; at += used) {
        size_t zeros = at;
        while (zeros < *bytes && !file[zeros]) zeros++;
        if (at && zeros == *bytes) break;
        int said = unpack_member(file + at, *bytes - at, &used, &text, &n, &room);
        if (said == Z_OK || said == Z_BUF_ERROR)
            die("%s: is gzip's, but cut short behind %zu bytes of its text; get it anew", path, n);
        if (said != Z_STREAM_END)
            die("%s: is gzip's, but damaged behind %zu bytes of its text; get it anew", path, n);
    }
    text[n] = 0;
    *bytes = n;
    free(file);
    return text;
}

#endif
