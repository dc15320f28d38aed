"""Draws the pictures of the pages about layers, from numbers that this script computes with the formulas of the pages:

    python3 dev/plot_pages.py                   writes four SVG files in dev/notes

Needs the Python standard library only.
"""

import cmath
import math
import os

BLUE, RED, GRAY, DARK = "#2b6cb0", "#b0246a", "#9aa7b8", "#1c2733"


class Picture:
    def __init__(self, width, height):
        self.size = width, height
        self.parts = []

    def text(self, x, y, text, size=13, color=DARK, anchor="start"):
        text = text.replace("&", "&amp;").replace("<", "&lt;")
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{color}" '
                          f'text-anchor="{anchor}">{text}</text>')

    def line(self, points, color=DARK, width=1.5, dash="", arrow=False):
        at = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        end = ' marker-end="url(#a)"' if arrow else ""
        self.parts.append(f'<polyline points="{at}" fill="none" stroke="{color}" stroke-width="{width}" '
                          f'stroke-dasharray="{dash}"{end}/>')

    def dot(self, x, y, color, radius=3):
        self.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{color}"/>')

    def box(self, x, y, width, height, fill="#eef2f7", stroke="#4a5a70"):
        self.parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{fill}" '
                          f'stroke="{stroke}"/>')

    def write(self, path):
        w, h = self.size
        with open(path, "w", encoding="utf-8") as file:
            file.write(
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}" '
                'font-family="Helvetica, Arial, sans-serif">\n'
                '<defs><marker id="a" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
                'orient="auto"><path d="M0,1 L10,5 L0,9 z" fill="#4a5a70"/></marker></defs>\n'
                f'<rect width="{w}" height="{h}" fill="#ffffff"/>\n' + "\n".join(self.parts) + "\n</svg>\n")


def timestep_norm(path):
    """Tokens whose level jumps: the statistics of all tokens so far, and the normalized tokens."""
    tokens, jump = 48, 24
    level = [2 if t >= jump else 0 for t in range(tokens)]
    x = [(level[t] + math.sin(2.1 * t), level[t] + math.cos(1.3 * t)) for t in range(tokens)]
    picture = Picture(760, 420)
    at = lambda t: 60 + 14 * t
    upper, lower = (lambda v: 130 - 26 * v), (lambda v: 340 - 22 * v)
    seen, means, deviations, normalized, layer = [], [], [], [], []
    for pair in x:
        seen += pair
        mean = sum(seen) / len(seen)
        deviation = math.sqrt(sum((v - mean) ** 2 for v in seen) / len(seen))
        means.append(mean), deviations.append(deviation)
        normalized.append([(v - mean) / deviation for v in pair])
        own = sum(pair) / 2
        layer.append([(v - own) / (abs(pair[0] - pair[1]) / 2) for v in pair])
    band = [(at(t), upper(m + s)) for t, (m, s) in enumerate(zip(means, deviations))]
    band += [(at(t), upper(m - s)) for t, (m, s) in reversed(list(enumerate(zip(means, deviations))))]
    picture.parts.append('<polygon points="' + " ".join(f"{a:.1f},{b:.1f}" for a, b in band) + '" fill="#d8e6f5"/>')
    picture.line([(at(t), upper(m)) for t, m in enumerate(means)], BLUE, 2)
    for t in range(tokens):
        for i in range(2):
            picture.dot(at(t), upper(x[t][i]), GRAY)
            picture.dot(at(t), lower(normalized[t][i]), BLUE)
            picture.dot(at(t), lower(layer[t][i]), RED, 2)
    picture.text(60, 24, "x (gray: two features a token); mean and mean ± deviation of all tokens so far (blue)")
    picture.text(60, 226, "TimestepNorm (blue) shows the jump; LayerNorm (red) of two features is always -1 and 1")
    for scale, zero in ((upper, "0"), (lower, "0")):
        picture.line([(50, scale(0)), (740, scale(0))], GRAY, 1, "3 4")
        picture.text(44, scale(0) + 4, zero, 12, anchor="end")
    picture.text(740, 408, "token", 12, anchor="end")
    picture.write(path)


def cema(path):
    """The impulse response of the page's mode, in the complex plane and as a kernel, beside one without rotation."""
    picture = Picture(760, 330)
    modes = ((0.75j, "q = 0.75 i: a quarter turn each token"),
             (0.9 * cmath.exp(0.5j), "q = 0.9 e^(0.5 i): slower, and remembers longer"))
    for column, (q, title) in enumerate(modes):
        left = 20 + 375 * column
        centre, radius = (left + 80, 130), 150
        h, points, kernel = 0.5, [], []
        for _ in range(24):
            points.append((centre[0] + radius * h.real, centre[1] - radius * h.imag))
            kernel.append(((1 - 1j) * h).real)
            h = h * q
        picture.line([(left, centre[1]), (left + 160, centre[1])], GRAY, 1)
        picture.line([(centre[0], 50), (centre[0], 215)], GRAY, 1)
        picture.line(points, BLUE, 1.2)
        for point in points:
            picture.dot(*point, BLUE)
        picture.text(left, 28, title)
        picture.text(left, 235, "h after x_1 = 1,", 12)
        picture.text(left, 250, "in the complex plane", 12)
        for j, k in enumerate(kernel):
            x = left + 185 + 7 * j
            picture.line([(x, 130), (x, 130 - 90 * k)], RED, 4)
        picture.line([(left + 178, 130), (left + 350, 130)], GRAY, 1)
        picture.text(left + 185, 235, "kernel k_j = Re(g p q^j),", 12)
        picture.text(left + 185, 250, "g = 1 - i, p = 1/2, j = 0..23", 12)
    picture.text(20, 300, "y = the input convolved with the kernel. What repeats with the kernel's period is added up; "
                          "the rest cancels.")
    picture.write(path)


def attention(path):
    """Probabilities of eleven tokens in chunks of four, of queries and keys that are equal before the rotation."""
    picture = Picture(760, 330)
    tokens, chunk, cell = 11, 4, 24
    for i in range(tokens):
        start = i // chunk * chunk
        score = [4 * math.cos(i - j) for j in range(start, i + 1)]
        total = sum(math.exp(s) for s in score)
        for j in range(tokens):
            inside = start <= j <= i
            p = math.exp(score[j - start]) / total if inside else 0
            shade = f"rgb({int(255 - 212 * p)},{int(255 - 147 * p)},{int(255 - 79 * p)})" if inside else "#f1f1f1"
            picture.box(60 + cell * j, 40 + cell * i, cell, cell, shade, "#ffffff" if not inside else "#9aa7b8")
        picture.text(52, 57 + cell * i, str(i + 1), 12, anchor="end")
        picture.text(72 + cell * i, 34, str(i + 1), 12, anchor="middle")
    picture.text(60, 16, "key", 12)
    picture.text(18, 36, "query", 12)
    for row, text in enumerate((
            "Tokens 1 to 11, chunks of C = 4; the last chunk is shorter.",
            "Blue: P, the probability with which a query reads a key.",
            "Gray: never read, and never computed for other chunks.",
            "Here q = 4 (1, 0) and k = (1, 0) at all tokens, before the",
            "rotation. So S = 4 cos(distance): the rotation alone", "makes the score depend on the distance.",
            "The chunks have equal rows, since the score depends on",
            "the distance only and no chunk sees the one before.")):
        picture.text(360, 70 + 26 * row, text)
    picture.write(path)


def parallel_in_time(path):
    """The two parts of the page's example: what each computes alone, what is exchanged, and what is combined."""
    q, p, x = 0.75j, 0.5, (4, 8, 4, 0)
    number = lambda c: f"{c.real:g} {'-' if c.imag < 0 else '+'} {abs(c.imag):g} i"
    alone = []
    for part in (x[:2], x[2:]):
        h = 0
        for value in part:
            h = q * h + p * value
        alone.append(h)
    whole = q ** 2 * alone[0] + alone[1]
    picture = Picture(760, 310)
    for k in range(2):
        left = 40 + 370 * k
        picture.box(left, 30, 310, 54)
        picture.text(left + 155, 52, f"part {'AB'[k]}: x = ({x[2 * k]}, {x[2 * k + 1]})", 14, anchor="middle")
        picture.text(left + 155, 72, f"h_alone = {number(alone[k])}", 13, BLUE, "middle")
        picture.line([(left + 155, 84), (left + 155, 122)], "#4a5a70", arrow=True)
        picture.line([(left + 155, 160), (left + 155, 198)], "#4a5a70", arrow=True)
        start = 0 if k == 0 else alone[0]
        picture.box(left, 200, 310, 54, "#fdebd3", "#b06a14")
        picture.text(left + 155, 222, f"starts from h = {number(complex(start)) if k else '0'}", 14, anchor="middle")
        end = alone[0] if k == 0 else whole
        picture.text(left + 155, 242, f"ends at h = {number(end)}", 13, BLUE, "middle")
    picture.box(40, 124, 680, 36, "#e4f3e6", "#3f7a4a")
    picture.text(380, 147, "all-gather: each part gets both h_alone, whatever the number of tokens", 14, anchor="middle")
    picture.text(40, 20, "1. reduce, at the same time", 12)
    picture.text(40, 278, f"2. combine: h after B = q^2 ({number(alone[0])}) + ({number(alone[1])}), "
                          f"with q^2 = {(q ** 2).real:g}", 12)
    picture.text(40, 298, "3. both parts compute their y from the right start, at the same time", 12)
    picture.write(path)


def main():
    folder = os.path.join(os.path.dirname(os.path.abspath(__file__)), "notes")
    timestep_norm(os.path.join(folder, "timestep-norm.svg"))
    cema(os.path.join(folder, "cema-mode.svg"))
    attention(os.path.join(folder, "attention.svg"))
    parallel_in_time(os.path.join(folder, "parallel-in-time.svg"))


main()
