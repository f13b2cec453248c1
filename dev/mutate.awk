# dev/mutate.awk: small faults that rules can plant in a C file, one a line: line, column, length, what stands there instead,
# separated by tabs. share: so many of a thousand, from place `from` on, chosen by a hash of the line and the fault, so that a
# change of the file draws anew for the lines it changes, and no others. Comments, strings and preprocessor lines are left alone.
#
#   + and −, * and /, % and /      < and <=, > and >=, == and !=     && and ||      SET and ADD      true and false
#   a minus or a ! in front: dropped        a whole number: one more, and one less        a fraction: twice
#   an index [i]: [i + 1]                   a statement that only calls, continues or breaks: dropped

BEGIN { for (i = 1; i < 256; i++) code[sprintf("%c", i)] = i }

function hash(text,    h, i) {
    for (i = 1; i <= length(text); i++) h = (h * 131 + code[substr(text, i, 1)]) % 1000003
    return h
}

function put(at, long, text,    margin, place) {
    margin = match($0, /[^ ]/)
    place = hash(substr($0, margin) (at - margin) long text) % 1000 - from
    if (place >= 0 && place < share) print place / share "\t" NR "\t" at "\t" long "\t" text
}

# Replaces what a comment or a string holds by spaces, so that columns stay.
function bare(s,    out, i, c, two) {
    out = ""
    for (i = 1; i <= length(s); i++) {
        c = substr(s, i, 1)
        two = substr(s, i, 2)
        if (comment) { if (two == "*/") { comment = 0; out = out " "; i++ } out = out " "; continue }
        if (quote) { if (c == "\\") { out = out " "; i++ } else if (c == quote) quote = ""; out = out " "; continue }
        if (two == "//") { while (length(out) < length(s)) out = out " "; return out }
        if (two == "/*") { comment = 1; out = out "  "; i++; continue }
        if (c == "\"" || c == "'") { quote = c; out = out " "; continue }
        out = out c
    }
    quote = ""
    return out
}

# Each place where `from` stands, spaces and all.
function swap(s, from, to,    at, rest, skipped) {
    for (rest = s; (at = index(rest, from)) > 0; rest = substr(rest, at + length(from))) {
        put(skipped + at, length(from), to)
        skipped += at + length(from) - 1
    }
}

function matches(s, pattern, rule,    rest, skipped, token, before, after) {
    for (rest = s; match(rest, pattern) > 0; rest = substr(rest, at + long)) {
        at = RSTART
        long = RLENGTH
        token = substr(rest, at, long)
        before = substr(s, skipped + at - 1, 1)
        after = substr(s, skipped + at + long, 1)
        if (rule == "number" && before !~ /[A-Za-z0-9_.]/ && after !~ /[A-Za-z0-9_.]/) {
            if (token ~ /[.e]/) put(skipped + at, long, "(2 * " token ")")
            else {
                put(skipped + at, long, token + 1)
                if (token + 0 > 0) put(skipped + at, long, token - 1)
            }
        }
        if (rule == "minus") put(skipped + at + long - 2, 1, "")
        if (rule == "not") put(skipped + at, 1, "")
        if (rule == "index") put(skipped + at, long, "[" substr(token, 2, long - 2) " + 1]")
        skipped += at + long - 1
    }
}

/^[ \t]*#/ { next }
{
    s = bare($0)
    if (s !~ /^ +[^ ]/) next                                                        # outside of functions and tables
    split(" + : - : - : + : * : / : / : * : % : / : += : -= : -= : += : < : <= : <= : < : > : >= : >= : > : == : != : != : == " \
          ": && : || : || : && ", pairs, ":")
    for (k = 1; k in pairs; k += 2) if (k + 1 in pairs) swap(s, pairs[k], pairs[k + 1])
    swap(s, ", SET)", ", ADD)")
    swap(s, ", ADD)", ", SET)")
    swap(s, " true", " false")
    swap(s, " false", " true")
    matches(s, "[(,=] ?-[A-Za-z(]", "minus")
    matches(s, "![A-Za-z(*]", "not")
    matches(s, "\\[[a-z]+\\]", "index")
    if (s !~ /^ *(static |const )*(unsigned )?(char|double|int|size_t|float) [a-z_]+\[/)           # no array's size
        matches(s, "[0-9]+(\\.[0-9]+)?(e-?[0-9]+)?", "number")
    if (s ~ /^ +([a-z_0-9]+\(.*\)|continue|break|return);[ ]*$/ &&
        s !~ /^ +(va_start|va_end|free|printf|fflush|return|die|put)[ (]/)
        put(match(s, /[^ ]/), length(s) - match(s, /[^ ]/) + 1, ";")
}
