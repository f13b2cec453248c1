# dev/plant.awk: a C file with many of dev/mutate.awk's faults in it, one of which a run switches on by its number, so that one
# build serves them all. First the list of faults, a number in front of each, then the file; `planted` gets those that found a
# place. A fault goes where it can be chosen at run time:
#
#   a whole statement on its line      if (mutated(7)) { s += a - b; } else { s += a + b; }
#   the same, of an if or a loop       if (mutated(7)) { if (a) b = 2; } else { if (a) b = 1; }
#   a condition, or a first value      if (mutated(8) ? (a <= b) : (a < b))        int n = mutated(9) ? (m - 1) : (m + 1);

function mutated(fault,    f) {
    split(fault, f, "\t")
    return substr($0, 1, f[3] - 1) f[5] substr($0, f[3] + f[4])
}

# Comments and the insides of strings as spaces.
function bare(s,    out, i, c, two, quote) {
    for (i = 1; i <= length(s); i++) {
        c = substr(s, i, 1)
        two = substr(s, i, 2)
        if (comment) { if (two == "*/") { comment = 0; out = out " "; i++ } out = out " "; continue }
        if (quote) {
            if (c == "\\") { out = out " "; i++; out = out " " }
            else if (c == quote) { quote = ""; out = out c }
            else out = out " "
            continue
        }
        if (two == "//") { while (length(out) < length(s)) out = out " "; return out }
        if (two == "/*") { comment = 1; out = out "  "; i++; continue }
        if (c == "\"" || c == "'") quote = c
        out = out c
    }
    return out
}

# The place behind `at` where a top-level `wanted` stands, 0 if there is none.
function top_level(s, at, wanted,    depth, c) {
    for (; at <= length(s); at++) {
        c = substr(s, at, 1)
        if (depth == 0 && c == wanted) return at
        if (index("([{", c)) depth++
        if (index(")]}", c)) depth--
        if (depth < 0) return 0
    }
    return 0
}

# The line with the faults in columns from … to-1, an expression, chosen there.
function choose(line, from, to,    i, n, f, out, text, now) {
    for (i = 1; i <= faults[FNR]; i++) {
        split(fault[FNR, i], f, "\t")
        if (f[3] < from || f[3] + f[4] > to || f[5] == ";") continue
        text = mutated(fault[FNR, i])
        now = substr(text, from, to - from + length(text) - length(line))
        out = out "mutated(" f[1] ") ? (" now ") : "
        print fault[FNR, i] >planted
    }
    return out == "" ? line : substr(line, 1, from - 1) out "(" substr(line, from, to - from) ")" substr(line, to)
}

function statement(line,    i, f, out) {
    for (i = 1; i <= faults[FNR]; i++) {
        split(fault[FNR, i], f, "\t")
        out = out "if (mutated(" f[1] ")) { " strip(mutated(fault[FNR, i])) " } else "
        print fault[FNR, i] >planted
    }
    return out "{ " strip(line) " }"
}

# Are all faults of the line in columns from … to-1?
function all_within(from, to,    i, f) {
    for (i = 1; i <= faults[FNR]; i++) {
        split(fault[FNR, i], f, "\t")
        if (f[3] < from || f[3] + f[4] > to) return 0
    }
    return 1
}

# Does a line that ends with a semicolon hold all of its statement?
function whole(word,    a) { a = word; return gsub(/[({]/, "", a) == gsub(/[)}]/, "", a) }

function strip(line) {
    return substr(line, 1, length(bare(line))) ~ /\/\// ? substr(line, 1, match(bare(line), / *$/) - 1) : line
}

NR == FNR { faults[$2 + 0]++; fault[$2 + 0, faults[$2 + 0]] = $0; next }
{
    was = comment
    s = bare($0)
    code = s
    sub(/ +$/, "", code)
    word = code
    sub(/^ +/, "", word)
    starts = before ~ /[;{}]$/ || before ~ /^(if|for|while|else)[ (]?.*\)$/ || before == "else" || before == "" || before ~ /:$/
    out = $0
    if (faults[FNR] && !was && code ~ /^ / && starts && !tables) {
        at = 0
        if (match(word, /^(else if|if|while) \(/)) {
            at = index(s, "(") + 1
            to = top_level(s, at, ")")
            if (word ~ /;$/ && whole(word) && word !~ /^else/ && !all_within(at, to)) out = "    " statement($0)
            else if (to) out = choose($0, at, to)
        } else if (word ~ /^for \(/) {
            at = top_level(s, index(s, "(") + 1, ";") + 1
            to = top_level(s, at, ";")
            if (word ~ /;$/ && whole(word) && !all_within(at, to)) out = "    " statement($0)
            else if (at > 1 && to) out = choose($0, at, to)
        } else if (match(word, /^(const |unsigned )*[a-z_0-9]+ \**[A-Za-z_0-9]+ = /) &&
                   word !~ /^(return|else|case|static|goto) /) {
            at = index(s, " = ") + 3
            to = top_level(s, at, ";")
            if (to && substr(s, at, 1) != "{" && !top_level(s, at, ",")) out = choose($0, at, to)
        } else if (word ~ /;$/ && whole(word) &&
                   word !~ /^(else|case|default|static|const|unsigned|struct|enum|}|\{|do|goto)/ &&
                   word !~ /^[a-z_0-9]+ \**[A-Za-z_0-9]+( =|\[|,|;)/)
            out = "    " statement($0)
        else if (word ~ /^return .*;$/) out = "    " statement($0)
    }
    print out
    if (word != "") before = word
}
