# The page that every plot of this project is drawn on: an SVG as wide as a README. gnuplot draws for a white
# page; on a dark one a filter in the SVG turns light into dark and leaves each hue what it is.
set terminal svg size 850,470 font "sans-serif,13" background "#ffffff"
invert = '<feColorMatrix values="-.93 0 0 0 .98 0 -.93 0 0 .98 0 0 -.93 0 .98 0 0 0 1 0"/>'
same_hue = '<feColorMatrix type="hueRotate" values="180"/>'
filter = '<filter id="dark" color-interpolation-filters="sRGB">'.invert.same_hue.'</filter>'
rule = '<style>@media (prefers-color-scheme: dark) {#gnuplot_canvas {filter: url(#dark)}}</style>'
page = "| sed '/<desc>/a ".filter.rule."' > "         # set output page."name.svg"

# Five colours that the colour-blind tell apart, each with a contrast of 3 and more on the page. Dashes and
# points go by fours, so that of twenty lines no two look alike, and neighbours differ in both.
colours = "#d55e00 #000000 #0072b2 #008a66 #a8478f"
colour(i) = word(colours, i % 5 + 1)
do for [i = 1:20] { set linetype i lc rgb colour(i) }
do for [i = 1:20:4] { set linetype i dashtype solid pointtype 7 }
do for [i = 2:20:4] { set linetype i dashtype (2, 3) pointtype 9 }
do for [i = 3:20:4] { set linetype i dashtype (10, 4) pointtype 5 }
do for [i = 4:20:4] { set linetype i dashtype (10, 3, 2, 3) pointtype 13 }
set linetype cycle 20

set border 3 lc rgb "#444444"
set grid lc rgb "#cccccc" lw 1 dt solid
set tics nomirror
