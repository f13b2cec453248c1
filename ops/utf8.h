//  ops/utf8.h: characters of a text.

#ifndef UTF8_H
#define UTF8_H
#include <stddef.h>
#include <stdint.h>

// Bytes of the character in front, 0 if it is not UTF-8: cut short, over-long, a surrogate, above U+10FFFF.
static inline size_t utf8_length(const char *text, size_t bytes)
{
    const unsigned char *c = (const unsigned char *)text;
    static const uint32_t lowest[] = {0, 0, 0x80, 0x800, 0x10000};
    if (!bytes) return 0;
    if (c[0] < 0x80) return 1;
    size_t n = c[0] < 0xc0 ? 0 : c[0] < 0xe0 ? 2 : c[0] < 0xf0 ? 3 : c[0] < 0xf8 ? 4 : 0;
    if (!n || n > bytes) return 0;
    uint32_t code = c[0] & (0x7fu >> n);
    for (size_t i = 1; i < n; i++) {
        if ((c[i] & 0xc0) != 0x80) return 0;
        code = code << 6 | (c[i] & 0x3f);
    }
    return code >= lowest[n] && code <= 0x10ffff && (code < 0xd800 || code > 0xdfff) ? n : 0;
}

#endif
