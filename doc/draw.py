#!/usr/bin/env python3
"""Draws every picture of doc/ into doc/pictures/. It needs the standard library alone: python3 doc/draw.py

A function a picture. Each SVG is 850 wide, the width of a README, and has its colours twice: for a light
page, and in a media query for a dark one. Shapes name a class, never a colour."""

import pathlib
import re

LIGHT = {"page": "#ffffff", "ink": "#1f2328", "muted": "#59636e", "line": "#7d8790", "grey": "#e7eaee",
         "blue": "#bcd8f7", "orange": "#fbd2a2", "green": "#bfe6c4", "purple": "#dccbf4"}
DARK = {"page": "#0d1117", "ink": "#e6edf3", "muted": "#a3acb6", "line": "#78828d", "grey": "#2b3138",
        "blue": "#1d4b80", "orange": "#7c4a0c", "green": "#1d5f35", "purple": "#573b88"}


def rules(colours):
    fills = "".join(f".{name}{{fill:{value}}}" for name, value in colours.items())
    strokes = f".cell,.edge,.dash{{stroke:{colours['line']}}}.bold,.arrow{{stroke:{colours['ink']}}}"
    return fills + strokes + ".edge,.dash,.bold,.arrow{fill:none}"


STYLE = f"""<style>
text{{font-family:-apple-system,"Segoe UI","DejaVu Sans",Arial,sans-serif}}
.mono{{font-family:ui-monospace,"DejaVu Sans Mono",Consolas,monospace}}
.cell{{stroke-width:1}}.edge,.dash{{stroke-width:1.2}}.bold{{stroke-width:2.2}}
.dash{{stroke-dasharray:4 3}}.arrow{{stroke-width:1.6}}
{rules(LIGHT)}
@media (prefers-color-scheme: dark) {{
{rules(DARK)}
}}
</style>
<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">
<path d="M0 0L8 4L0 8z" class="ink"/></marker></defs>"""


class Picture:
    """A list of shapes. Positions are pixels; text sits on its middle height."""

    def __init__(self, name, height, title):
        self.name, self.height, self.title, self.shapes = name, height, title, []

    def rect(self, x, y, w, h, fill="grey", kind="cell"):
        self.shapes.append(f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" class="{fill} {kind}"/>')

    def frame(self, x, y, w, h, kind="bold"):
        self.shapes.append(f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" class="{kind}"/>')

    def line(self, points, kind="edge"):
        path = "M" + "L".join(f"{x:g} {y:g}" for x, y in points)
        marker = ' marker-end="url(#head)"' if kind == "arrow" else ""
        self.shapes.append(f'<path d="{path}" class="{kind}"{marker}/>')

    def text(self, x, y, words, size=14, colour="ink", anchor="middle", bold=False):
        """W_{ij} writes ij lower, A^{T} writes T higher: both at 11 pixels. `code` is monospaced."""
        assert size >= 11, words
        def mark(m):
            if m[3]:
                return f'<tspan class="mono">{m[3]}</tspan>'
            down, small = (3, m[1]) if m[1] else (-5, m[2])
            return f'<tspan dy="{down}" font-size="11">{small}</tspan><tspan dy="{-down}">&#8203;</tspan>'
        escaped = words.replace("&", "&amp;").replace("<", "&lt;")
        marked = re.sub(r"_\{([^}]*)\}|\^\{([^}]*)\}|`([^`]*)`", mark, escaped)
        weight = ' font-weight="600"' if bold else ""
        place = f'x="{x:g}" y="{y + 0.35 * size:g}" font-size="{size}" text-anchor="{anchor}"'
        self.shapes.append(f'<text {place} class="{colour}"{weight}>{marked}</text>')

    def left(self, x, y, words, size=14, colour="ink", bold=False):
        self.text(x, y, words, size, colour, "start", bold)

    def box(self, x, y, w, h, words="", fill="grey", size=14):
        self.rect(x, y, w, h, fill)
        if words:
            self.text(x + w / 2, y + h / 2, words, size)

    def save(self, folder):
        head = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 850 {self.height}" width="850" '
                f'height="{self.height}" role="img">\n<title>{self.title}</title>\n{STYLE}\n')
        page = f'<rect width="850" height="{self.height}" class="page"/>\n'
        (folder / f"{self.name}.svg").write_text(head + page + "\n".join(self.shapes) + "\n</svg>\n", "utf-8")


SHARD = ["blue", "orange", "green"]


# ---- shards and S(x): in = 10, r = 4, out = 3 --------------------------------------------------------------

def shards():
    p = Picture("shards", 486, "Bone: W cut into shards along its input, one D for all, x's shards added up")
    r, inputs, out, w = 4, 10, 3, 36
    x0 = 40
    p.left(x0, 22, "in = 10, out = 3, r = 4: shards of 4, 4 and 2 columns", 14, "muted")
    p.text(20, 66, "x", 15, bold=True)
    for i in range(inputs):
        p.box(x0 + i * w, 50, w, 32, f"x_{{{i}}}", SHARD[i // r])
    p.text(20, 149, "W_{0}", 15, bold=True)
    for j, words in enumerate(("shard 0", "shard 1", "shard 2")):
        width = min(r, inputs - j * r) * w
        p.box(x0 + j * r * w, 104, width, 90, words, SHARD[j])
        p.frame(x0 + j * r * w, 104, width, 90)
    p.text(20, 281, "ΔW", 15, bold=True)
    p.left(x0, 220, "expand(D): one D^{T} on every shard, cut off on the last", 14, "muted")
    for o in range(out):
        for i in range(inputs):
            p.box(x0 + i * w, 236 + o * 30, w, 30, f"D_{{{i % r}{o}}}", "purple", 13)
    for j in (0, r, 2 * r):
        p.frame(x0 + j * w, 236, w * min(r, inputs - j), 90)
    p.left(x0, 344, "ΔW has out · in numbers. It is never built:", 14, "muted")
    p.left(x0, 364, "x ΔW^{T} is S(x) D, on the right.", 14, "muted")

    s0, c = 490, 82
    p.left(s0, 22, "S(x): x's shards below each other, added up", 14, "muted")
    for j in range(3):
        for k in range(r):
            i = j * r + k
            if i < inputs:
                p.box(s0 + k * c, 50 + j * 32, c, 32, f"x_{{{i}}}", SHARD[j])
            else:
                p.frame(s0 + k * c, 50 + j * 32, c, 32, "dash")
                p.text(s0 + k * c + c / 2, 66 + j * 32, "0", 14, "muted")
    p.text(s0 - 18, 98, "+", 18)
    p.text(s0 - 18, 130, "+", 18)
    p.line([(s0 - 28, 152), (s0 + r * c, 152)], "bold")
    p.text(s0 - 20, 176, "S(x)", 14, bold=True)
    for k in range(r):
        terms = [f"x_{{{i}}}" for i in range(k, inputs, r)]
        p.box(s0 + k * c, 160, c, 32, "+".join(terms), "grey", 13)
    p.left(s0, 212, "the short last shard counts as padded with zeros", 14, "muted")
    for k in range(r):
        for o in range(out):
            p.box(s0 + 60 + o * 60, 236 + k * 30, 60, 30, f"D_{{{k}{o}}}", "purple", 13)
    p.text(s0 + 40, 296, "D", 15, bold=True)
    p.left(s0 + 252, 274, "(r, out):")
    p.left(s0 + 252, 296, "all that")
    p.left(s0 + 252, 318, "trains")
    p.line([(40, 396), (810, 396)])
    p.text(220, 428, "y = x W_{0}^{T} + S(x) D", 18, bold=True)
    p.text(655, 428, "S(x)[n, c] = Σ_{j} x[n, j·r + c]", 18, bold=True)
    p.text(425, 462, "Step 0: D = 0, so y is the base model's. r · out numbers train; "
           "S(x) costs an addition an input.", 14, "muted")
    return p


# ---- Bat: one B_i per block row, or one B_j per block column -----------------------------------------------

def groupings():
    p = Picture("groupings", 440, "Bat's groupings: a B for each block row of W, or for each block column")
    colours, s = ["blue", "orange", "green", "purple"], 66
    for left, by_row in ((92, True), (522, False)):
        title = "`bat`: a B_{i} for each block row" if by_row else "`bat-row`: a B_{j} for each block column"
        p.text(left + 2 * s, 22, title, 16, bold=True)
        p.text(left + 2 * s, 48, "W, cut into r × r blocks:  in →", 14, "muted")
        top = 126
        for i in range(3):
            for j in range(4):
                p.box(left + j * s, top + i * s, s, s, "", colours[i if by_row else j])
                p.text(left + j * s + s / 2, top + i * s + s / 2, f"W_{{{i}{j}}}", 15)
        p.frame(left, top, 4 * s, 3 * s)
        if by_row:
            for i in range(3):
                p.box(left - 70, top + 9 + i * s, 48, 48, f"B_{{{i}}}", colours[i])
                p.line([(left - 20, top + 33 + i * s), (left - 3, top + 33 + i * s)], "arrow")
        else:
            for j in range(4):
                p.box(left + 9 + j * s, 62, 48, 44, f"B_{{{j}}}", colours[j])
                p.line([(left + 33 + j * s, 107), (left + 33 + j * s, 123)], "arrow")
        k = "i" if by_row else "j"
        p.text(left + 2 * s, 350, f"W'_{{ij}}  =  W_{{ij}} + W_{{ij}} B_{{{k}}} + B_{{{k}}}", 17, bold=True)
        many = "out/r blocks B_{i}: out · r numbers" if by_row else "in/r blocks B_{j}: in · r numbers"
        p.text(left + 2 * s, 380, many)
        how = "one W' for all layers, rebuilt" if by_row else "factors: no W' is ever built"
        p.text(left + 2 * s, 402, how, 14, "muted")
        p.text(left + 2 * s, 422, "PEFT's MiSS with \"bat\"; the paper's figure: col" if by_row else
               "the paper's table 5: row; PEFT has no format", 14, "muted")
    p.text(498, 126 + 1.5 * s, "out ↓", 14, "muted")
    p.text(388, 126 + 1.5 * s, "out ↓", 14, "muted")
    return p


# ---- Bat's V_i: a block row read front to back. W (4, 6), r = 2 --------------------------------------------

def reading():
    p = Picture("reading", 452, "Bat's V_i: a block row of W, read front to back two numbers at a time")
    c, h = 52, 32
    p.left(30, 22, "W (out 4, in 6), r = 2: two block rows of three blocks", 14, "muted")
    for o in range(4):
        for i in range(6):
            p.box(30 + i * c, 42 + o * h, c, h, f"w_{{{o}{i}}}", SHARD[i // 2] if o > 1 else "grey")
    for i in range(2):
        for j in range(3):
            p.frame(30 + 2 * j * c, 42 + 2 * i * h, 2 * c, 2 * h)
    p.left(30 + 6 * c + 10, 42 + h, "W_{0}: block row 0", 14, "muted")
    p.left(30 + 6 * c + 10, 42 + 3 * h, "W_{1}: block row 1  (r, in)")
    p.left(560, 42 + 2.5 * h, "W_{10}, W_{11}, W_{12}: a colour each", 14, "muted")
    p.left(30, 204, "The 12 numbers of W_{1} as they lie in memory, front to back, r = 2 at a time:",
           14, "muted")
    m = 65
    for k in range(12):
        o, i = 2 + k // 6, k % 6
        p.box(30 + k * m, 222, m, h, f"w_{{{o}{i}}}", SHARD[i // 2])
    for k in range(6):
        p.frame(30 + 2 * k * m, 222, 2 * m, h)
        p.text(30 + (2 * k + 1) * m, 270, f"row {k}", 13, "muted")
    p.left(30, 308, "= V_{1} (in, r):", 14, bold=True)
    for k in range(6):
        o, i = 2 + k // 3, k % 3 * 2
        y = 300 + k * 24
        p.box(150, y, 56, 24, f"w_{{{o}{i}}}", SHARD[i // 2], 13)
        p.box(206, y, 56, 24, f"w_{{{o}{i + 1}}}", SHARD[i // 2], 13)
        p.left(272, y + 12, f"row {k // 3} of W_{{1{k % 3}}}", 13, "muted")
    p.frame(150, 300, 112, 144)
    p.text(398, 372, "×", 18)
    for a in range(2):
        for b in range(2):
            p.box(420 + b * 44, 344 + a * 28, 44, 28, f"b_{{{a}{b}}}", "purple", 13)
    p.text(464, 420, "B_{1} (r, r)", 14)
    p.left(540, 318, "row k·in/r + j of V_{i}  is  row k of W_{ij}", 14)
    p.left(540, 346, "so the three products W_{1j} B_{1} are one:", 14)
    p.left(540, 374, "V_{1} + V_{1} B_{1}", 16, bold=True)
    p.left(540, 408, "and backward, in one line:", 14)
    p.left(540, 434, "dB_{i}  +=  V_{i}^{T} dV_{i}  +  dy_{i}^{T} S(x)", 16, bold=True)
    return p


# ---- the memory plan ---------------------------------------------------------------------------------------

def memory():
    p = Picture("memory", 728, "The memory plan: one block a kind; the order of declarations is the lifetime")
    kinds = [("BASE", "grey", "frozen matrices", "stay mapped, in the dtype of their file"),
             ("NORM", "grey", "frozen vectors", "copied as real"),
             ("PARAM", "purple", "what trains", "wide; three blocks more have the same offsets:"),
             ("START", "grey", "A0, B0 of pissa, olora, lora-ga", "wide, frozen"),
             ("ACT", "blue", "activations, one row a token", "real; layer by layer, drawn below"),
             ("STAT", "blue", "statistics, one row a token", "wide: lse, losses"),
             ("WORK", "orange", "work space of all layers", "real: the largest request of a method; logits, RoPE's table"),
             ("AUX", "orange", "the same, wide", "dora's norms"),
             ("CACHE", "green", "keys and values", "of generation alone")]
    p.left(20, 22, "One block of memory a kind: `declare(m, KIND, &t, …)` takes the next place in its block.",
           15, bold=True)
    for i, (name, colour, what, how) in enumerate(kinds):
        y = 42 + i * 25
        p.box(20, y, 76, 22, name, colour, 13)
        p.left(108, y + 11, what, 13)
        p.left(352, y + 11, how, 13, "muted")
    for k, name in enumerate(("grad", "m1", "m2")):
        p.box(716 + k * 40, 42 + 2 * 25, 40, 22, name, "purple", 12)

    p.left(20, 296, "The block ACT: addresses from left to right, layers downwards. Widths are Llama2's.",
           15, bold=True)
    p.left(20, 320, "Bone keeps nothing of its own there. LoRA's h = x A^{T} lies before the next layer's x.",
           14, "muted")
    unit, left = 17.4, 84
    what = ("everything is kept",
            "gate and up make room for the next layer; the backward pass makes them again",
            "only x is kept; the backward pass makes the layer again")
    middle, wide = 5, 2 * 11008 / 4096
    for level in range(3):
        top = 352 + level * 120
        p.left(20, top, f"`--recompute {level}`", 14, bold=True)
        p.left(190, top, what[level], 14, "muted")
        at = 0
        y = top + 16
        for layer in range(3):
            p.left(20, y + 12, f"layer {layer}", 13)
            last = layer == 2
            if layer == 0:
                p.box(left, y, unit, 24, "x_{0}", "blue", 12)
                at = 1
            p.box(left + at * unit, y, unit, 24, f"x_{{{layer + 1}}}", "blue", 12)
            fills = ["blue" if last or level < limit else "orange" for limit in (2, 1)]
            p.box(left + (at + 1) * unit, y, middle * unit, 24, "q k v att mid", fills[0], 11.5)
            p.box(left + (at + 1 + middle) * unit, y, wide * unit, 24, "gate  up", fills[1], 12)
            end = at + 1 + middle + wide
            kept = (end, at + 1 + middle, at + 1)[level]
            at = end if last else kept
            y += 28
        p.box(left + at * unit, y - 28, 118, 24, "xn hid dx … dhid", "green", 12)
    p.box(20, 706, 18, 14, "", "blue")
    p.left(44, 713, "lasts to the backward pass", 13, "muted")
    p.box(246, 706, 18, 14, "", "orange")
    p.left(270, 713, "the next layer writes over it", 13, "muted")
    p.box(480, 706, 18, 14, "", "green")
    p.left(504, 713, "once for all layers: one layer at a time", 13, "muted")
    return p


# ---- a step through the rooms ------------------------------------------------------------------------------

def rooms():
    p = Picture("rooms", 560, "A step goes down through the rooms once, and its gradient comes up once")
    floors = [("train.c", "the loop", "orange", "train_step", "update: clip, AdamW"),
              ("run/rows.h", "micro-batches", "grey", "batch_add", ""),
              ("llama.h", "Llama2", "blue", "llama_forward", "llama_backward"),
              ("adapters.h", "methods", "purple", "bone_forward", "bone_backward"),
              ("ops/ops.h", "the contract", "green", "matmul_nt, …", "matmul_tn, …")]
    top, h, pitch, down, up = 44, 56, 86, 250, 620
    p.text(down, 22, "forward, downwards", 14, "muted")
    p.text(up, 22, "backward, upwards", 14, "muted")
    for i, (name, what, colour, forward, backward) in enumerate(floors):
        y = top + i * pitch
        p.rect(110, y, 630 if backward else 410, h, colour)
        p.text(430, y + 20, f"`{name}`", 15, bold=True)
        p.text(430, y + 41, what, 13)
        p.text(down, y + h / 2, f"`{forward}`", 13)
        p.text(up, y + h / 2, f"`{backward}`" if backward and i else backward, 13)
    for i, words in enumerate(("1   the rows of this step", "2   ids, positions, spans, labels",
                               "3   x (N, in)", "4   x, S(x), W, D: views, no copies")):
        y = top + i * pitch + h
        p.line([(down, y + 2), (down, y + pitch - h - 2)], "arrow")
        p.left(down + 14, y + 15, words, 13, "muted")
    for i, words in ((4, "5   dS, dD"), (3, "6   dx")):
        y = top + i * pitch
        p.line([(up, y - 2), (up, y - pitch + h + 2)], "arrow")
        p.left(up + 14, y - 15, words, 13, "muted")
    p.line([(up, top + 2 * pitch - 2), (up, top + h + 2)], "arrow")
    p.left(up + 14, top + h + 46, "7   Σ loss; the gradients", 13, "muted")
    p.left(up + 14, top + h + 66, "     lie in their block", 13, "muted")
    y = top + 2 * pitch + h / 2
    p.line([(110, y), (92, y), (92, y + 2 * pitch), (107, y + 2 * pitch)], "arrow")
    for i, words in enumerate(("norms,", "RoPE,", "attention,", "loss")):
        p.text(84, y + pitch - 30 + 20 * i, words, 13, "muted", "end")
    y = top + 4 * pitch + h
    p.box(110, y + 6, 311, 44, "`ops/cpu.c`, `ops/gemm.h`: plain C", "green", 13)
    p.box(429, y + 6, 311, 44, "`train.cu`: kernels and cuBLAS", "green", 13)
    p.text(425, y + 68, "one of the two, chosen by the linker", 13, "muted")
    return p


# ---- the tiles of a product: y (M, N) = a (M, K) b (K, N) --------------------------------------------------

def tiles():
    p = Picture("tiles", 470, "The product in tiles: KC by NC of b, MC by KC of a, MR by NR of y")
    ax, ay, bx, by, yx, yy = 40, 196, 330, 40, 330, 196
    p.rect(bx, by, 330, 130, "grey")            # b (K, N): a block of KC rows by NC columns, in slivers
    p.rect(bx, by + 36, 220, 48, "orange")
    for k in range(1, 10):
        p.line([(bx + 22 * k, by + 36), (bx + 22 * k, by + 84)])
    p.rect(bx + 88, by + 36, 22, 48, "purple")
    p.frame(bx, by + 36, 220, 48)
    p.text(bx + 165, by - 16, "b (K, N)", 15, bold=True)
    p.text(bx + 110, by + 20, "NC columns, in slivers NR wide", 13)
    p.left(bx + 228, by + 60, "KC rows", 13)
    p.rect(ax, ay, 250, 210, "grey")            # a (M, K): a block of MC rows by KC columns, in panels
    p.rect(ax + 70, ay + 60, 92, 90, "blue")
    for k in range(1, 5):
        p.line([(ax + 70, ay + 60 + 18 * k), (ax + 162, ay + 60 + 18 * k)])
    p.rect(ax + 70, ay + 60 + 36, 92, 18, "purple")
    p.frame(ax + 70, ay + 60, 92, 90)
    p.text(ax + 125, ay - 16, "a (M, K)", 15, bold=True)
    p.text(ax + 116, ay + 48, "KC columns", 13)
    p.text(ax + 116, ay + 168, "MC rows, in panels MR tall", 13)
    p.rect(yx, yy, 330, 210, "grey")            # y (M, N): what the two blocks touch, and the tile
    p.rect(yx, yy + 60, 220, 90, "green")
    p.rect(yx + 88, yy + 96, 22, 18, "purple")
    p.frame(yx + 88, yy + 96, 22, 18)
    p.line([(ax + 162, yy + 105), (yx + 86, yy + 105)], "dash")
    p.line([(bx + 99, by + 84), (bx + 99, yy + 94)], "dash")
    p.text(yx + 165, yy + 24, "y (M, N)", 15, bold=True)
    p.left(yx + 118, yy + 105, "a tile MR × NR", 13)
    p.left(684, 52, "in the third cache,", 13, "muted")
    p.left(684, 70, "shared by the threads:", 13, "muted")
    p.box(684, 84, 18, 14, "", "orange")
    p.left(710, 91, "b's slivers", 13)
    p.left(684, 132, "in the second cache,", 13, "muted")
    p.left(684, 150, "each thread its own:", 13, "muted")
    p.box(684, 164, 18, 14, "", "blue")
    p.left(710, 171, "a's panels", 13)
    p.left(684, 212, "in registers,", 13, "muted")
    p.left(684, 230, "while k runs:", 13, "muted")
    p.box(684, 244, 18, 14, "", "purple")
    p.left(710, 251, "tile = Σ_{k}", 13)
    p.left(710, 271, "panel_{k} sliver_{k}^{T}", 13)
    sizes = ("floats: KC 512, NC 2048", "AVX-512: MR 12, NR 32,", "MC 192", "AVX2: MR 6, NR 16,", "MC 96")
    for i, words in enumerate(sizes):
        p.left(684, 316 + i * 20, words, 13, "muted")
    p.text(425, 440, "An element of y is the same sum in the same order in every tile, by any number of "
           "threads: they share M and N, never K.", 13, "muted")
    return p


# ---- attention on a GPU: 12 queries, their 12 keys, blocks of 4 by tiles of 2 ------------------------------

def attention():
    p = Picture("attention", 470, "Attention in tiles: which tiles a block of queries takes, and a block of keys")
    for which, x0 in enumerate((60, 480)):
        y0, c = 74, 24
        kept = "blue" if which == 0 else "orange"
        for i in range(12):
            for j in range(12):
                seen = j <= i
                mine = 4 <= i < 8 if which == 0 else 4 <= j < 8
                fill = ("green" if seen else "purple") if mine and tile_seen(which, i, j) else "grey" if seen else "page"
                p.rect(x0 + c * j, y0 + c * i, c, c, fill)
        if which == 0:
            p.rect(x0 - 26, y0 + 4 * c, 14, 4 * c, kept)
            for j in range(0, 8, 2):
                p.frame(x0 + c * j, y0 + 4 * c, 2 * c, 4 * c)
            p.line([(x0, y0 + 12 * c + 14), (x0 + 8 * c, y0 + 12 * c + 14)], "arrow")
            p.text(x0 + 4 * c, y0 + 12 * c + 32, "keys and values stream past", 13)
        else:
            p.rect(x0 + 4 * c, y0 - 26, 4 * c, 14, kept)
            for i in range(4, 12, 2):
                p.frame(x0 + 4 * c, y0 + c * i, 4 * c, 2 * c)
            p.line([(x0 + 12 * c + 14, y0 + 4 * c), (x0 + 12 * c + 14, y0 + 12 * c)], "arrow")
            p.text(x0 + 6 * c, y0 + 12 * c + 32, "queries stream past, downwards", 13)
        p.text(x0 + 6 * c, 24, ("forward, and dq: a block keeps queries", "dk, dv: a block keeps keys")[which], 15, bold=True)
    p.text(34, 74 + 11 * 24, "queries", 13, "muted")
    p.text(480 + 10.5 * 24, 56, "keys", 13, "muted")
    p.text(60 + 10.5 * 24, 56, "keys", 13, "muted")
    for i, (fill, words) in enumerate((("green", "a score that is used"), ("purple", "made, then hidden: exp gives 0"),
                                       ("grey", "another block's"), ("page", "not seen: no tile is made"))):
        x, y = 60 + i % 2 * 420, 418 + i // 2 * 26
        p.box(x, y - 8, 18, 14, "", fill)
        p.left(x + 28, y, words, 13)
    return p


def tile_seen(which, i, j):
    """Whether the warp that has query i, or key j, makes this score: it has a quarter of the block, one query or key here, and
    leaves out a tile of two keys, or queries, of which none is seen."""
    return j // 2 * 2 <= i if which == 0 else j <= i // 2 * 2 + 1


# ---- the sum of eight micro-batches, on one rank and on four ------------------------------------------------

def ranks():
    p = Picture("ranks", 478, "The gradients of eight micro-batches are added as one binary tree, by one rank or by four")
    colours = ["blue", "orange", "green", "purple"]
    x0, w, h, tall = 118, 76, 30, 74
    level = [350 - tall * i for i in range(4)]

    def centre(first, count):
        return x0 + w * (first + count / 2)

    for rank in range(4):
        p.frame(x0 + 2 * w * rank + 3, level[1] - 12, 2 * w - 6, tall + h + 54, "dash")
        p.text(centre(2 * rank, 2), level[0] + h + 26, f"rank {rank}", 14, "muted")
    p.text(60, level[0] + h / 2, "gradients of", 13, "muted")
    p.text(60, level[0] + h / 2 + 17, "micro-batches", 13, "muted")
    p.text(60, level[1] + h / 2, "in each rank", 13, "muted")
    p.text(60, level[2] + h / 2, "rank ^ 1", 13, "muted")
    p.text(60, level[3] + h / 2, "rank ^ 2", 13, "muted")
    for step in range(1, 4):
        for first in range(0, 8, 2 ** step):
            top = (centre(first, 2 ** step), level[step] + h)
            for half in (first, first + 2 ** (step - 1)):
                p.line([(centre(half, 2 ** (step - 1)), level[step - 1]), top])
    for i in range(8):
        p.box(x0 + w * i + 10, level[0], w - 20, h, f"g_{{{i}}}", colours[i // 2])
    for rank in range(4):
        p.box(centre(2 * rank, 2) - 44, level[1], 88, h, f"g_{{{2 * rank}}} + g_{{{2 * rank + 1}}}", colours[rank])
    for pair in range(2):
        x = centre(4 * pair, 4) - 90
        p.rect(x, level[2], 90, h, colours[2 * pair])
        p.rect(x + 90, level[2], 90, h, colours[2 * pair + 1])
        p.text(x + 90, level[2] + h / 2, f"g_{{{4 * pair}}} … g_{{{4 * pair + 3}}}, in both")
    for rank in range(4):
        p.rect(centre(0, 8) - 152 + 76 * rank, level[3], 76, h, colours[rank])
    p.text(centre(0, 8), level[3] + h / 2, "g_{0} … g_{7}, the same bits in all four")
    p.text(425, 24, "Whoever adds which part: the sums are these, in this order.", 15, bold=True)
    p.text(425, 56, "One rank goes through the tree by itself, and keeps an earlier half while it makes the later one.",
           13, "muted")
    p.text(425, 458, "Partners swap what they have, and both add: a + b is b + a to the last bit.", 13, "muted")
    return p


if __name__ == "__main__":
    folder = pathlib.Path(__file__).resolve().parent / "pictures"
    folder.mkdir(exist_ok=True)
    for draw in (shards, groupings, reading, memory, rooms, tiles, attention, ranks):
        draw().save(folder)
