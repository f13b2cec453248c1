# gnuplot paper/plots/scaling.gp: scaling.csv (build/bench scaling > paper/plots/scaling.csv) as scaling.svg.
# Left: the time of a step, and as a line its formula, the multiply-adds at the rate of the first point.
# Right: memory and its plan.
load "paper/page.gp"
set terminal svg size 850,1000 font "sans-serif,13"
set output page."paper/plots/scaling.svg"
csv = "paper/plots/scaling.csv"
set datafile separator ","
sweeps = "'rows of 128 tokens' 'tokens a row (4096 in all)' layers vocabulary rank"
set multiplot layout 5,2 margins 0.09,0.98,0.055,0.955 spacing 0.11,0.06
set key bottom right reverse Left samplen 2
set logscale xy
set format x "%.0f"
unset mxtics
do for [s in sweeps] {
    # The sweep's ends, and the ms that 10⁹ operations take at its first point.
    set xrange [*:*]
    set yrange [*:*]
    first = NaN
    last = NaN
    rate = NaN
    stats csv using (strcol(1) eq s ? (last = $2, rate == rate ? 0 : (first = $2, rate = $3 / $5), 1) : 0):(1) nooutput
    set xrange [first * 0.8 : last * 1.25]
    set xtics first, 2
    set xlabel s offset 0, 0.4
    set title s eq word(sweeps, 1) ? "Time of a step, ms" : ""
    set yrange [20:3000]
    plot csv using (strcol(1) eq s ? $2 : NaN):($5 * rate) with lines lw 3 lc rgb "#888888" title "formula", \
         csv using (strcol(1) eq s ? $2 : NaN):3 with points pt 7 ps 1 lc rgb colour(2) title "measured"
    set title s eq word(sweeps, 1) ? "Peak memory, MB" : ""
    set yrange [20:1000]
    plot csv using (strcol(1) eq s ? $2 : NaN):7 with lines lw 3 lc rgb "#888888" title "plan", \
         csv using (strcol(1) eq s ? $2 : NaN):6 with points pt 7 ps 1 lc rgb colour(0) title "measured"
}
unset multiplot
set output                              # wait until the pipe has written the file
