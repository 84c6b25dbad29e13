"""A diagnosis as a folder: report.html, which needs no network and no other file, its pictures, and the values."""

from __future__ import annotations

import html
import json
import math
import re
import statistics
from pathlib import Path
from typing import Any

from deltaw.diagnose.diagnose import Diagnosis
from deltaw.diagnose.plots import INK, drawn, pictures
from deltaw.diagnose.sites import SiteRow
from deltaw.merge.write import refuse_used
from deltaw.store.files import whole_folder, write_text

CAPTIONS = {
    "loss": "Each dot is one step's loss, on that step's rows. A healthy curve falls and flattens low; one that "
    "flattens early and high had too little room, one that rises had steps that were too large.",
    "spectra": "An update of rank r has r singular values. They fall off where the rank is enough; where the last ones "
    "are nearly as large as the first, the update wanted more of them.",
    "norms": "How much of each weight the update is. In runs that went well, most are between 0.001 and 0.1.",
    "ranks": "How many of the ranks that each place was given it uses. All of them everywhere, with a loss that "
    "stopped high, speaks for a higher rank; few of them, for a lower one.",
}
COLUMNS = ("place", "shape", "rank", "for 90 %", "for 99 %", "last / first", "|dW|", "|dW| / |W|", "rounding's energy")
STYLE = """
:root{color-scheme:light dark;--bg:#fff;--ink:#1b2330;--soft:#5b6675;--line:#d9dee5;--bad:#b3261e;
  --good:#1c6e3d;--box:#f6f7f9}
@media (prefers-color-scheme:dark){:root{--bg:#14181e;--ink:#e6e9ee;--soft:#9aa5b4;--line:#303842;
  --bad:#ff8a80;--good:#7bd89f;--box:#1c222a}}
body{background:var(--bg);color:var(--ink);font:16px/1.5 system-ui,sans-serif;max-width:62rem;
  margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem;margin-bottom:0}
h2{font-size:1.15rem;margin-top:2.2rem}
p.sub,figcaption,small{color:var(--soft)}
.find{border-left:4px solid var(--bad);background:var(--box);padding:.6rem 1rem;margin:.8rem 0}
.find h3{margin:0;font-size:1rem}
.find p{margin:.3rem 0}
.well{border-left:4px solid var(--good);background:var(--box);padding:.6rem 1rem}
figure{margin:1.2rem 0}
figure svg{width:100%;height:auto;color:var(--ink)}
.wide{overflow-x:auto;max-height:34rem}
table{border-collapse:collapse;font-size:.85rem;width:100%}
th,td{padding:.25rem .6rem;text-align:right;border-bottom:1px solid var(--line)}
th{position:sticky;top:0;background:var(--bg)}
th:first-child,td:first-child{text-align:left}
code{overflow-wrap:anywhere}
"""


def write_report(found: Diagnosis, out: str | Path) -> Path:
    """Write report.html, diagnosis.json and each picture as PNG and SVG into `out`, whole or not at all.

    Raises RunError when `out` is there and not an empty folder, WorkFailed when the disk is full.
    """
    out = Path(out)
    refuse_used(out)
    with whole_folder(out) as aside:
        inline = {}
        for name, make in pictures(found).items():
            for kind in ("png", "svg"):
                (aside / f"{name}.{kind}").write_bytes(drawn(make, kind))
            inline[name] = _inline(name, drawn(make, "svg", transparent=True).decode())
        write_text(aside / "diagnosis.json", json.dumps(json_safe(found.as_dict()), indent=1) + "\n")
        write_text(aside / "report.html", page(found, inline))
    return out


def json_safe(value: Any) -> Any:
    """Plain data with numbers that JSON has: null for NaN and Inf."""
    if isinstance(value, dict):
        return {k: json_safe(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def page(found: Diagnosis, inline: dict[str, str]) -> str:
    """The report as one HTML page; `inline`: pictures by name as SVG."""
    title = f"Diagnosis of {Path(found.path).name or found.path}"
    parts = [f"<h1>{_e(title)}</h1>", f"<p class=sub>{_e(_about(found))}</p>", *_findings(found)]
    for name, svg in inline.items():
        parts.append(f"<figure id={name}>{svg}<figcaption>{_e(CAPTIONS[name])}</figcaption></figure>")
    parts += [*_measured(found), *_places(found.rows), *_not_made(found)]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{_e(title)}</title>'
    body = "\n".join(parts)
    return f"<!doctype html>\n<html lang=en><head>{head}<style>{STYLE}</style></head><body>\n{body}\n</body></html>\n"


def _e(text: object) -> str:
    return html.escape(str(text))


def _about(found: Diagnosis) -> str:
    known = [f"method {found.method}"]
    known += [f"adapter {found.adapter[:12]}"] if found.adapter else []
    known += [f"{len(found.rows)} places"] if found.rows else []
    known += [f"scale {found.scale:.4g}"] if found.scale is not None else []
    known += [f"learning rate {found.rate:.3g}"] if found.rate is not None else []
    known += [f"{len(found.log.steps)} steps"] if found.log else []
    return ", ".join(known) + "."


def _findings(found: Diagnosis) -> list[str]:
    if not found.findings:
        return ["<h2>Findings</h2>", "<p class=well>None of the known failures was found.</p>"]
    parts = ["<h2>Findings</h2>"]
    for f in found.findings:
        where = ""
        if f.where:
            names = ", ".join(f.where[:5]) + (" ..." if len(f.where) > 5 else "")
            where = f"<p><small>Places: <code>{_e(names)}</code></small></p>"
        parts.append(
            f"<div class=find><h3>{_e(f.title)}</h3><p>{_e(_sentence(f.message))}</p>"
            f"<p><b>What to do:</b> {_e(f.remedy)}</p>{where}</div>"
        )
    return parts


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _measured(found: Diagnosis) -> list[str]:
    rows: list[tuple[str, str]] = []
    if (c := found.curve) is not None:
        rows.append(("Loss: first, best eighth, last quarter", f"{c.start:.4g}, {c.best:.4g}, {c.final:.4g}"))
        rows.append(("Plateau from step", "none" if c.plateau_step is None else str(c.plateau_step)))
    evals = [e.loss for e in found.log.evals if e.loss is not None] if found.log else []
    if evals:
        three = (evals[0], min(evals), evals[-1])
        rows.append(("Loss on validation rows: first, best, last", ", ".join(f"{v:.4g}" for v in three)))
        if found.curve is not None:
            rows.append(("Gap: validation less training, at the end", f"{evals[-1] - found.curve.final:.4g}"))
    for name, r in found.rounded.items():
        what = "As it was merged" if name == "written" else f"Merged in {name}"
        rows.append((f"{what}: rounding's energy over the update's", f"{r.error:.3g}"))
        rows.append((f"{what}: changed weights that are the base's again", f"{r.lost:.1%}"))
    if (f := found.forgetting) is not None:
        if f.n:
            rows.append((f"General questions right, of {f.n}: before, after", f"{f.right_before}, {f.right_after}"))
        if f.perplexity_before is not None and f.perplexity_after is not None:
            two = f"{f.perplexity_before:.4g}, {f.perplexity_after:.4g}"
            rows.append(("Perplexity on general text: before, after", two))
    if found.data is not None:
        rows.append((f"Loss on {found.data.n} rows: without, with", f"{found.data.before:.4g}, {found.data.after:.4g}"))
    if (t := found.trial) is not None:
        rows.append((f"Loss of the last steps: rank {t.rank}, rank {t.other}", f"{t.loss:.4g}, {t.reached:.4g}"))
    body = "".join(f"<tr><td>{_e(a)}</td><td>{_e(b)}</td></tr>" for a, b in rows)
    return [f"<h2>Measured</h2><table>{body}</table>"] if rows else []


def _places(rows: list[SiteRow]) -> list[str]:
    if not rows:
        return []
    head = "".join(f"<th>{_e(c)}</th>" for c in COLUMNS)
    body = "".join("<tr>" + "".join(f"<td>{_e(v)}</td>" for v in _cells(r)) + "</tr>" for r in rows)
    ratios = [r.ratio for r in rows if r.ratio is not None]
    middle = f" Median of |dW| / |W|: {statistics.median(ratios):.3g}." if ratios else ""
    return [
        f"<h2>Places</h2><p class=sub>One row a linear map that the adapter changes.{middle}</p>",
        f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>",
    ]


def _cells(row: SiteRow) -> list[str]:
    s = row.spectrum
    left = next(iter(row.rounded.values()), None)
    return [
        row.name,
        f"{row.shape[0]} x {row.shape[1]}",
        "" if row.rank is None else str(row.rank),
        "" if s is None else str(s.rank_90),
        "" if s is None else str(s.rank_99),
        "" if s is None else f"{s.last:.3f}",
        f"{row.update_norm:.4g}",
        "" if row.ratio is None else f"{row.ratio:.3g}",
        "" if left is None else f"{left.error:.3g}",
    ]


def _not_made(found: Diagnosis) -> list[str]:
    if not found.not_made:
        return []
    items = "".join(f"<li><b>{_e(n['check'])}</b>: {_e(n['why'])}</li>" for n in found.not_made)
    return [f"<h2>Checks that were not made</h2><ul>{items}</ul>"]


def _inline(name: str, svg: str) -> str:
    """A picture for the page: the page's own ink, and identifiers that no other picture has."""
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    for old in set(re.findall(r'\bid="([^"]+)"', svg)):
        svg = re.sub(rf'(id="|url\(#|href="#){re.escape(old)}(?=["\)])', rf"\g<1>{name}-{old}", svg)
    return svg
