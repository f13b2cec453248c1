# The plots of ./train --compare, from OUT/cells.csv and OUT/steps.csv:  gnuplot -c paper/compare.gp OUT
cells = ARG1."/cells.csv"           # part,method,rank,trains,seed,lr,steps,grad_norm,loss,eval_loss,exact_match,tok_per_s,peak_mb
steps = ARG1."/steps.csv"           # part,method,rank,trains,seed,lr,steps,step,loss,grad_norm,tok_per_s

# One colour a method, in every plot. Okabe and Ito's eight and others between them, told apart by their lightness, too.
methods = "full frozen biglora lora rslora lora+ dora pissa olora lora-ga bone mini bat bat-row"
colours = "#000000 #888888 #b8860b #e69f00 #f0b878 #a0522d #882255 #56b4e9 #009e73 #cc79a7 #d55e00 #f7a8a0 #0072b2 #332288"
index(m) = sum [i = 1:words(methods)] (word(methods, i) eq m ? i : 0)
colour(m) = word(colours, index(m))
is(part, m) = strcol(1) eq part && strcol(2) eq m

set datafile separator ","
set datafile columnheaders
set datafile missing NaN             # rows of other methods do not cut a line in two
set terminal pngcairo size 800,440 font "sans,12"
set border 3 lc rgb "#444444"
set grid lc rgb "#dddddd" lw 1
set tics nomirror
set key outside right
set autoscale noextend
set offsets graph 0.03, graph 0.03, graph 0.05, graph 0.05

# The paper's figure 5: windows of a 25th of the steps, the mean over all seeds.
set output ARG1."/loss.png"
stats steps using (strcol(1) eq "main" ? $8 : NaN) nooutput
width = ceil(STATS_max / 25.0)
window(step) = (floor((step - 1) / width) + 0.5) * width
set xlabel "step"
set ylabel "training loss"
set logscale y
set ytics (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 8, 10, 15, 20, 30, 50, 100)
plot for [m in "full lora dora pissa olora lora-ga bone bat"] \
    steps using (is("main", m) ? window($8) : NaN):9 smooth unique with lines lw 2.5 lc rgb colour(m) title m

# Figure 1: the first gradient against the rank.
set output ARG1."/gradient.png"
set xlabel "rank"
set ylabel "norm of the first gradient"
set logscale x 2
stats cells using (strcol(1) eq "norms" ? $3 : NaN) nooutput
set xrange [STATS_min:STATS_max]
levels = "full frozen biglora"
array level[3]
do for [i = 1:3] { stats cells using (is("main", word(levels, i)) ? $8 : NaN) nooutput; level[i] = STATS_mean }
plot for [i = 1:3] level[i] with lines lw 2.5 dt 2 lc rgb colour(word(levels, i)) title word(levels, i), \
    for [m in "bone bat pissa lora"] cells using (is("norms", m) ? $3 : NaN):8 smooth unique with linespoints lw 2.5 pt 7 ps 1.2 lc rgb colour(m) title m

# Exact match, or where there are no answers the loss, against what trains: a point a seed, lines through further ranks.
set output ARG1."/match.png"
unset logscale
set logscale x
set xrange [*:*]
set ytics auto
stats cells using (strstrt(strcol(11), "nan") ? -1 : 1) nooutput
y = STATS_max >= 0 ? 11 : 10
set xlabel "trained parameters, thousands"
set ylabel y == 11 ? "exact match, %" : "eval loss"
plot for [m in "lora pissa bone bat bat-row"] cells using (is("ranks", m) ? $4 / 1000 : NaN):y smooth unique with lines lw 2 lc rgb colour(m) notitle, \
    for [m in methods] cells using (is("main", m) ? $4 / 1000 : NaN):y with points pt 4 + index(m) % 11 ps 1.6 lw 2 lc rgb colour(m) title m

set output ARG1."/cost.png"
unset logscale
unset key
unset xlabel
set offsets 0, 0, graph 0.05, 0
set xtics rotate by 55 right () scale 0
set for [i = 1:words(methods)] xtics add (word(methods, i) i)
set style fill solid
set boxwidth 0.75
set xrange [0.3:words(methods) + 0.7]
set yrange [0:*]
set grid noxtics
set multiplot layout 1,2
do for [k = 12:13] {
    set ylabel k == 12 ? "tokens/s" : "peak memory, MB"
    plot for [m in methods] cells using (is("main", m) ? index(m) : NaN):k smooth unique with boxes lc rgb colour(m)
}
unset multiplot
