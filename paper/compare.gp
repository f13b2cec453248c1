# The plots of ./train --compare, from OUT/cells.csv and OUT/steps.csv, with a line that says what was run:
# gnuplot -c paper/compare.gp OUT "base on data/train.jsonl, 50 steps, …"
load "paper/page.gp"
run = ARG2
cd ARG1
# cells.csv: part,method,rank,trains,seed,lr,steps,grad_norm,loss,eval_loss,exact_match,tok_per_s,peak_mb,hits
# steps.csv: part,method,rank,trains,seed,lr,steps,step,loss,grad_norm,tok_per_s
cells = "cells.csv"
steps = "steps.csv"
set datafile separator ","
set datafile columnheaders
set datafile missing NaN                # rows of other methods do not cut a line in two
set key outside right Left reverse samplen 4 noenhanced
set autoscale noextend
set offsets graph 0.02, graph 0.03, graph 0.05, graph 0.05
set tmargin at screen 0.87
set label 2 run at screen 0.02, 0.915 noenhanced

# The methods of each part, in the order of cells.csv. A method's place among all of them is its line's style.
all = ""
main = ""
norms = ""
ranks = ""
sweep = ""
has(list, m) = strstrt(list." ", " ".m." ") > 0
add(list, m) = has(list, m) ? list : list." ".m
note(part, m) = (all = add(all, m), \
    part eq "main" ? (main = add(main, m)) : \
    part eq "norms" ? (norms = add(norms, m)) : \
    part eq "ranks" ? (ranks = add(ranks, m)) : \
    part eq "sweep" ? (sweep = add(sweep, m)) : "")
stats cells using (note(strcol(1), strcol(2)), 1) nooutput
style(m) = sum [i = 1:words(all)] (word(all, i) eq m ? i : 0)
is(part, m) = strcol(1) eq part && strcol(2) eq m

# Solid lines are drawn first and dotted ones last, so that of two that coincide both are seen.
of_kind(list, kind, i) = i > words(list) ? "" : \
    (style(word(list, i)) % 4 == kind ? " ".word(list, i) : "").of_kind(list, kind, i + 1)
solid_first(list) = of_kind(list, 1, 1).of_kind(list, 3, 1).of_kind(list, 0, 1).of_kind(list, 2, 1)

# ordered(list): by value[], the highest first (upward = 1) or the lowest (-1); what has no value comes last.
none = -1e300
array value[words(all)]
upward = 1
key_of(m) = value[style(m)] == value[style(m)] ? upward * value[style(m)] : none
ahead(a, b) = key_of(a) > key_of(b) || (key_of(a) == key_of(b) && style(a) < style(b))
place(list, m) = 1 + sum [i = 1:words(list)] (ahead(word(list, i), m) ? 1 : 0)
at_place(list, k, i) = place(list, word(list, i)) == k ? word(list, i) : at_place(list, k, i + 1)
from_place(list, k) = k > words(list) ? "" : at_place(list, k, 1)." ".from_place(list, k + 1)
ordered(list) = from_place(list, 1)

# The paper's figure 5: the mean of a window of steps, over all seeds, drawn in the window's middle.
stats steps using (strcol(1) eq "main" ? $8 : NaN) nooutput
last = STATS_max
width = ceil(last / 25.0)
window(step) = (first_of(step) + min(first_of(step) + width - 1, last)) / 2.0
first_of(step) = floor((step - 1) / width) * width + 1
min(a, b) = a < b ? a : b
do for [m in main] {
    stats steps using (is("main", m) && window($8) == window(last) ? $9 : NaN) nooutput
    value[style(m)] = exists("STATS_mean") ? STATS_mean : NaN
}
set output page."loss.svg"
of_steps = width > 1 ? sprintf(", mean of %d steps", width) : ""
set label 1 "Training loss".of_steps."; the names in the order in which the lines end" \
    at screen 0.02, 0.965 font ",16"
set xlabel "step"
set ylabel "training loss"
set logscale y
stats steps using (strcol(1) eq "main" ? $9 : NaN) nooutput
highest_end = value[style(word(ordered(main), 1))]
set yrange [*:min(2.5 * highest_end, STATS_max)]        # the first steps may come from above
set ytics (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 8, 10, 15, 20, 30)
plot for [m in solid_first(main)] steps using (is("main", m) ? window($8) : NaN):9 smooth unique \
    with lines lt style(m) lw 2.5 notitle, \
    for [m in ordered(main)] keyentry with lines lt style(m) lw 2.5 \
    title m.(key_of(m) > none ? "" : " (diverged)")
set yrange [*:*]                        # here and below: stats leaves out what is beyond a range

# Figure 1: the first gradient against the rank; a method that has none to choose is a level line.
if (words(norms) > 0) {
    set output page."gradient.svg"
    stats cells using (strcol(1) eq "norms" ? $3 : NaN) nooutput
    least = STATS_min
    most = STATS_max
    stats cells using (strcol(1) eq "norms" ? $5 : NaN) nooutput
    seed = STATS_min
    level(m) = has(norms, m) ? 0 : 1
    first_norm(m) = strcol(2) eq m && $5 == seed && strcol(1) eq (level(m) ? "main" : "norms")
    do for [m in main] { stats cells using (first_norm(m) ? (value[style(m)] = $8, 1) : 0) nooutput }
    set label 1 "Norm of the first gradient at each rank, one seed; level lines: there is no rank to choose"
    set xlabel "rank"
    set ylabel "norm of the first gradient"
    set ytics (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
    set logscale x 2
    set xrange [least:most]
    plot for [m in main] (level(m) ? value[style(m)] : NaN) with lines lt style(m) lw 2.5 notitle, \
        for [m in solid_first(norms)] cells using (is("norms", m) ? $3 : NaN):8 smooth unique \
        with linespoints lt style(m) lw 2.5 ps 0.8 notitle, \
        for [m in ordered(main)] keyentry with lines lt style(m) lw 2.5 title m
    set xrange [*:*]
}

# Eval loss against the learning rate, the losses of a diverged or hopeless run beyond the page.
if (words(sweep) > 0) {
    do for [m in sweep] {
        stats cells using (is("sweep", m) ? $10 : NaN) nooutput
        value[style(m)] = exists("STATS_min") ? STATS_min : NaN
    }
    stats cells using (strcol(1) eq "sweep" ? $10 : NaN) nooutput
    upward = 1
    least = STATS_min
    most = min(STATS_max, least + 4 * (value[style(word(ordered(sweep), 1))] - least) + 0.02)
    set output page."rate.svg"
    set label 1 "Eval loss at each learning rate, one seed; the names in the order of their lowest"
    set xlabel "learning rate"
    set ylabel "eval loss"
    unset logscale
    set logscale x 2
    set format x "%.1e"
    set ytics auto
    set yrange [least - 0.05 * (most - least):most]
    plot for [m in solid_first(sweep)] cells using (is("sweep", m) ? $6 : NaN):10 smooth unique \
        with linespoints lt style(m) lw 2.5 ps 0.8 notitle, \
        for [m in ordered(sweep)] keyentry with linespoints lt style(m) lw 2.5 ps 0.8 title m
    set yrange [*:*]
    set format x
}

# Left: exact match of each method, a dot a seed. If the best run has fewer than ten right answers, a third of
# them is chance; then the loss stands there: of the rows to evaluate on, or of training where there are none.
# Right: that loss against what trains, at further ranks.
set output page."match.svg"
titles = "'training loss' 'eval loss' 'exact match, %'"
title_of(column) = word(titles, column - 8)
stats cells using 10 nooutput
loss = exists("STATS_mean") ? 10 : 9
stats cells using (strcol(1) eq "main" ? $14 : NaN) nooutput
shown = STATS_max >= 10 ? 11 : loss
upward = shown == 11 ? 1 : -1
array trains[words(all)]
do for [m in main] {
    stats cells using (is("main", m) ? column(shown) : NaN) nooutput
    value[style(m)] = exists("STATS_mean") ? STATS_mean : NaN
    stats cells using (is("main", m) ? (trains[style(m)] = $4, 1) : 0) nooutput
}
unset logscale
set multiplot
further = words(ranks) > 0 ? ". Right: ".title_of(loss)." at further ranks, one seed" : ""
set label 1 "Left: ".title_of(shown).", a dot a seed".further
set lmargin at screen 0.18
set rmargin at screen 0.45
set xlabel title_of(shown)
unset ylabel
n = words(main)
set yrange [0.4:n + 0.6]
set ytics ("" 1) scale 0
short(count) = count < 1000 ? sprintf("%d", count) : sprintf("%.0fK", count / 1000)
set for [m in main] ytics add (m.", ".short(trains[style(m)]) n + 1 - place(main, m))
plot for [m in main] cells using (is("main", m) ? column(shown) : NaN):(n + 1 - place(main, m)) \
    with points pt 7 ps 0.7 lc rgb colour(style(m)) notitle

set yrange [*:*]
do for [m in ranks] {
    most = 0                            # so many train at the largest rank
    stats cells using (is("ranks", m) && $4 >= most ? \
        (most = $4, value[style(m)] = column(loss), 1) : 0) nooutput
}
upward = 1
unset label
set lmargin at screen 0.54
set rmargin at screen 0.83
set xlabel "trained parameters, thousands"
set ylabel title_of(loss)
set logscale x 2
set ytics auto scale 1
if (words(ranks) > 0) {
    plot for [m in solid_first(ranks)] cells using (is("ranks", m) ? $4 / 1000 : NaN):loss smooth unique \
        with linespoints lt style(m) lw 2 ps 0.7 notitle, \
        for [m in ordered(ranks)] keyentry with linespoints lt style(m) lw 2 ps 0.7 title m
}
unset multiplot

# DiSHA's design space: the shards among the methods, disha-AxB, by their loss and what they train.
shard(m) = m[strlen("disha-") + 1:]
a_of(m) = shard(m)[:strstrt(shard(m), "x") - 1]
b_of(m) = shard(m)[strstrt(shard(m), "x") + 1:]
number(side) = side ne "in" && side ne "out"
# Which method of this size it is: a place in the list of names.
corner(a, b) = b eq "out" ? (a eq "in" ? 4 : 2) : a eq "in" ? 3 : number(a) && number(b) ? 1 : 5
corners = "'mini: AxB' 'Bone: Axout' 'its transpose: inxB' 'frozen: inxout' 'other sizes'"
point(k) = word("7 9 11 5 6", k + 0) + 0
shards = ""
sides = ""
kinds = ""
array mean[words(main)]
array least[words(main)]
array most[words(main)]
do for [m in main] {
    stats cells using (is("main", m) && m[:6] eq "disha-" ? column(loss) : NaN) nooutput
    if (exists("STATS_records") && STATS_records > 0) {
        shards = add(shards, m)
        sides = add(sides, a_of(m))
        kinds = add(kinds, sprintf("%d", corner(a_of(m), b_of(m))))
        mean[words(shards)] = STATS_mean
        least[words(shards)] = STATS_min
        most[words(shards)] = STATS_max
    }
}
of_shards = words(shards)
max(a, b) = a > b ? a : b
side(a) = sum [i = 1:words(sides)] (word(sides, i) eq a ? i : 0)
# Shards that train about as many stand in a column. Their names are stacked above it, in the points' order.
count(i) = trains[style(word(shards, i))]
beside(i, j) = abs(log10(count(i) / count(j))) < 0.2
below(i, j) = mean[j] < mean[i] || (mean[j] == mean[i] && j < i)
level(i) = sum [j = 1:of_shards] (beside(i, j) && below(i, j) ? 1 : 0)
top(i, j) = j > of_shards ? most[i] : max(beside(i, j) ? most[j] : most[i], top(i, j + 1))
highest(i) = i > of_shards ? -1e300 : max(most[i], highest(i + 1))
lowest(i) = i > of_shards ? 1e300 : min(least[i], lowest(i + 1))
if (of_shards > 0) {
    line_height = 0.035 * (highest(1) - lowest(1))
    set print $space
    print "a,name,corner,trains,mean,least,most,name_at"
    do for [i = 1:of_shards] {
        m = word(shards, i)
        row = sprintf("%s,%s,%d,%.0f", a_of(m), shard(m), corner(a_of(m), b_of(m)), count(i))
        name_at = top(i, 1) + (level(i) + 1.2) * line_height
        print row.sprintf(",%.9g,%.9g,%.9g,%.9g", mean[i], least[i], most[i], name_at)
    }
    unset print
    seeds = sum [i = 1:of_shards] (most[i] > least[i] ? 1 : 0) > 0
    set output page."space.svg"
    set label 1 "DiSHA's design space, D (A, B): ".title_of(loss)." against what trains".\
        (seeds ? "; bars: lowest to highest seed" : "") at screen 0.02, 0.965 font ",16"
    set label 2 run at screen 0.02, 0.915 noenhanced
    set lmargin at screen 0.09
    set rmargin at screen 0.78
    set xlabel "trained parameters"
    set ylabel title_of(loss)
    set logscale x 10
    set format x "%.0s%c"
    stats $space using 4 nooutput
    set xrange [0.6 * STATS_min:1.7 * STATS_max]
    set xtics auto
    set ytics auto
    of_side(a, value) = strcol(1) eq a ? value : NaN
    plot for [a in sides] $space using (of_side(a, $4)):5 smooth unique \
        with lines lt side(a) lw 2 title "A = ".a, \
        for [a in sides] $space using (of_side(a, $4)):5:6:7 \
        with yerrorbars lt side(a) dt solid pt 0 notitle, \
        for [k in kinds] $space using ($3 == k + 0 ? $4 : NaN):5:(side(strcol(1))) \
        with points pt point(k) ps 0.9 lc variable notitle, \
        for [k in kinds] keyentry with points pt point(k) lc rgb "#444444" title word(corners, k + 0), \
        for [a in sides] $space using (of_side(a, $4)):8:2 \
        with labels font ",10" tc rgb colour(side(a)) noenhanced notitle
    set format x
}

# What a run costs: means over the seeds.
set output page."cost.svg"
unset logscale
unset key
unset xlabel
set label 1 "Speed and memory of each method" at screen 0.02, 0.965 font ",16"
set label 2 run at screen 0.02, 0.915 noenhanced
set offsets 0, 0, graph 0.05, 0
set xtics rotate by 55 right () scale 0
set for [i = 1:n] xtics add (word(main, i) i)
set style fill solid noborder
set boxwidth 0.75
set xrange [0.3:n + 0.7]
set yrange [0:*]
set grid noxtics
set multiplot
do for [k = 12:13] {
    set lmargin at screen (k == 12 ? 0.12 : 0.6)
    set rmargin at screen (k == 12 ? 0.48 : 0.97)
    set ylabel k == 12 ? "tokens/s" : "peak memory, MB"
    plot for [i = 1:n] cells using (is("main", word(main, i)) ? i : NaN):k smooth unique \
        with boxes lc rgb colour(2)
    unset label
}
unset multiplot
set output                              # wait until the pipe has written the file
