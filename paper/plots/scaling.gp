# gnuplot paper/plots/scaling.gp: scaling.csv (build/bench scaling > paper/plots/scaling.csv) as scaling.png.
# Above: time of a step, and as a line its formula, the multiply-adds at the rate of the first point. Below: memory and its plan.
set datafile separator ","
set terminal pngcairo size 1400,600 font "sans,11"
set output "paper/plots/scaling.png"
csv = "paper/plots/scaling.csv"
sweeps = "'rows of 128 tokens' 'tokens a row (2048 in all)' 'layers' 'vocabulary' 'rank'"
set multiplot layout 2,5 margins 0.05,0.99,0.09,0.96 spacing 0.04,0.1
set logscale xy
set key top left reverse Left samplen 2
set grid lc rgb "#dddddd"
set format x "%.0f"
set xtics rotate by 0 scale 0.5
do for [panel in "time memory"] {
    do for [s in sweeps] {
        set xrange [*:*]; set yrange [*:*]
        first = NaN; last = NaN; rate = NaN      # of this sweep: its ends, and ms per 10⁹ operations at the first
        stats csv using (strcol(1) eq s ? (last = $2, rate == rate ? 0 : (first = $2, rate = $3 / $5), 1) : 0):(1) nooutput
        set xrange [first * 0.8 : last * 1.25]
        set xtics first, 4
        set xlabel s offset 0,0.6
        if (panel eq "time") {
            set ylabel (s eq "rows of 128 tokens" ? "ms a step" : "") offset 1,0
            set yrange [3:6000]
            plot csv using (strcol(1) eq s ? $2 : NaN):($5 * rate) with lines lw 2 lc rgb "#999999" title "formula", \
                 csv using (strcol(1) eq s ? $2 : NaN):3 with points pt 7 ps 1.2 lc rgb "#0072b2" title "measured"
        } else {
            set ylabel (s eq "rows of 128 tokens" ? "MB, peak" : "") offset 1,0
            set yrange [20:2000]
            plot csv using (strcol(1) eq s ? $2 : NaN):7 with lines lw 2 lc rgb "#999999" title "plan", \
                 csv using (strcol(1) eq s ? $2 : NaN):6 with points pt 7 ps 1.2 lc rgb "#d55e00" title "measured"
        }
    }
}
