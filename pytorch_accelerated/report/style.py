"""How the page looks: colours of both themes, layout, and the switches that need no script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

LIGHT = {
    "page": "#f6f7f9",
    "card": "#ffffff",
    "text": "#1b1f24",
    "muted": "#57606a",
    "rule": "#d0d7de",
    "link": "#0b57b0",
    "good": "#116329",
    "bad": "#a40e26",
    "line-0": "#0b62c4",
    "line-1": "#c2410c",
    "line-2": "#0f7a4d",
    "line-3": "#9c27a0",
    "line-4": "#8a6100",
    "line-5": "#0e7490",
    "line-6": "#b4235a",
    "line-7": "#555b66",
    "cell-0": "#ffffff",
    "cell-1": "#dbeafe",
    "cell-2": "#a9cdfb",
    "cell-3": "#6ea8ef",
    "cell-4": "#1f5fb0",
    "cell-5": "#0b3b78",
    "cell-text-0": "#1b1f24",
    "cell-text-1": "#1b1f24",
    "cell-text-2": "#1b1f24",
    "cell-text-3": "#10151b",
    "cell-text-4": "#ffffff",
    "cell-text-5": "#ffffff",
}
"""The colours of the light theme by the names of their variables."""

DARK = {
    "page": "#0f1318",
    "card": "#181d24",
    "text": "#e6eaef",
    "muted": "#a3adb8",
    "rule": "#39424d",
    "link": "#7db7ff",
    "good": "#6fdd8b",
    "bad": "#ff9aa5",
    "line-0": "#6cb0ff",
    "line-1": "#ff9d5c",
    "line-2": "#5fd39b",
    "line-3": "#e28be6",
    "line-4": "#e3b341",
    "line-5": "#56c7e0",
    "line-6": "#ff8fb4",
    "line-7": "#b4bcc8",
    "cell-0": "#181d24",
    "cell-1": "#1d3350",
    "cell-2": "#234a7d",
    "cell-3": "#2a5fa5",
    "cell-4": "#8fc0ff",
    "cell-5": "#c9e1ff",
    "cell-text-0": "#e6eaef",
    "cell-text-1": "#e6eaef",
    "cell-text-2": "#f2f5f8",
    "cell-text-3": "#ffffff",
    "cell-text-4": "#0f1318",
    "cell-text-5": "#0f1318",
}
"""The colours of the dark theme."""

_RULES = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--text);font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif;
overflow-wrap:anywhere}
a{color:var(--link)}
header,main,footer{max-width:1200px;margin:0 auto;padding:0 16px}
header{padding-top:16px}
h1{font-size:1.5rem;margin:.2em 0}
h2{font-size:1.2rem;margin:1.6em 0 .5em}
h3{font-size:1rem;margin:0 0 .4em}
h4{font-size:.95rem;margin:.8em 0 .2em}
p{margin:.4em 0}
.muted,figcaption,footer{color:var(--muted);font-size:.875rem}
.good{color:var(--good)}.bad{color:var(--bad)}
.card{background:var(--card);border:1px solid var(--rule);border-radius:8px;padding:12px;margin:0 0 16px;min-width:0}
.grid-of-cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr));gap:16px;
align-items:start;margin:0 0 16px}
.grid-of-cards .card{margin:0}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:8px;margin:12px 0;padding:0}
.tiles div{background:var(--card);border:1px solid var(--rule);border-radius:8px;padding:8px 12px}
.tiles dt{color:var(--muted);font-size:.875rem}
.tiles dd{margin:0;font-weight:600}
.box{overflow:auto;max-width:100%;max-height:480px;overflow-wrap:normal}
table{border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums}
caption{text-align:left;color:var(--muted);padding-bottom:4px}
th,td{padding:4px 6px;border-bottom:1px solid var(--rule);text-align:left;vertical-align:top}
td.n,th.n{text-align:right;white-space:nowrap}
thead th{position:sticky;top:0;background:var(--card)}
td.wide{min-width:12em;max-width:28em;overflow-wrap:anywhere}
table.matrix td{text-align:center;min-width:2.1em;padding:4px;border:1px solid var(--rule)}
figure{margin:0}
figcaption{margin-top:4px}
img{max-width:100%;height:auto;border-radius:4px}
img.pixels{image-rendering:pixelated;width:100%;background:var(--page)}
.pictures{display:grid;grid-template-columns:repeat(auto-fill,minmax(104px,1fr));gap:10px}
audio{width:100%}
svg{display:block;width:100%;height:auto}
svg text{font-size:12px;fill:var(--muted);font-family:inherit}
svg .grid{stroke:var(--rule);stroke-width:.7;fill:none}
svg .line{fill:none;stroke-width:1.6;stroke-linejoin:round}
svg .again{stroke-dasharray:5 3}
svg .cross{fill:none;stroke-width:1.4}
svg .start{stroke:var(--muted);stroke-width:1.2;stroke-dasharray:3 3;fill:none}
svg .best{fill:none;stroke:var(--text);stroke-width:1.5}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:2px 14px;margin:6px 0 0;padding:0;font-size:.875rem}
.legend svg{display:inline-block;width:22px;height:8px;margin-right:6px}
pre{overflow:auto;max-height:420px;max-width:100%;margin:.4em 0;font-size:.8125rem;background:var(--page);padding:8px;
border-radius:6px;overflow-wrap:normal}
code{font-size:.875em}
details{margin:.4em 0}
summary{cursor:pointer;color:var(--link);padding:4px 0}
ul.settings{list-style:none;margin:0;padding-left:14px;border-left:2px solid var(--rule)}
.card>ul.settings{padding-left:0;border:0}
ul.settings b{font-weight:600}
.notes{list-style:none;margin:6px 0 0;padding:0;color:var(--muted);font-size:.875rem}
.switch{position:absolute;opacity:0;width:1px;height:1px;margin:0}
.bar{position:sticky;top:0;z-index:2;background:var(--page);border-bottom:1px solid var(--rule);padding:6px 0;
display:flex;flex-wrap:wrap;gap:4px 6px;align-items:center;margin:0 0 12px;font-size:.875rem}
.bar label{border:1px solid var(--rule);border-radius:999px;padding:4px 11px;cursor:pointer;background:var(--card);
color:var(--text)}
.view{display:none}
@media print{.bar{position:static}.box,pre{max-height:none}}
"""


def style_sheet(axes: Sequence[str]) -> str:
    """Return the style sheet of a page whose charts can be drawn over ``axes``."""
    parts = [_variables(":root", LIGHT, "light dark")]
    parts.append(f"@media (prefers-color-scheme:dark){{{_variables(':root', DARK, 'dark')}}}")
    parts.append(_RULES)
    parts += [f".l{n}{{stroke:var(--line-{n})}}.dot.l{n}{{fill:var(--line-{n});stroke:none}}" for n in range(8)]
    parts += [f".c{n}{{background:var(--cell-{n});color:var(--cell-text-{n})}}" for n in range(6)]
    pressed = "{background:var(--text);color:var(--card);border-color:var(--text)}"
    for switch in [f"x-{axis}" for axis in axes] + ["y-linear", "y-log"]:
        parts.append(f'#{switch}:checked~main .bar label[for="{switch}"]{pressed}')
        parts.append(f'#{switch}:focus-visible~main .bar label[for="{switch}"]{{outline:3px solid var(--link)}}')
    for axis in axes:
        for scale in ("linear", "log"):
            chosen = f"#x-{axis}:checked~#y-{scale}:checked~main .view-{axis}-{scale}"
            parts.append(f"{chosen}{{display:block}}")
    return "\n".join(parts)


def _variables(selector: str, colours: Mapping[str, str], scheme: str) -> str:
    lines = "".join(f"--{name}:{colour};" for name, colour in colours.items())
    return f"{selector}{{color-scheme:{scheme};{lines}}}"
