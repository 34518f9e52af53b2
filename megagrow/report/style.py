"""The style sheet of the report, light or dark like the reader's system."""

from __future__ import annotations

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f5f6f8; --card: #ffffff; --text: #1c2330; --soft: #5d6778; --rule: #e3e6eb;
  --grid: #eceef2; --main: #2563c9; --raw: #2563c9; --dots: #d2570c; --marker: #7c3aab;
  --c1: #2563c9; --c2: #d2570c; --c3: #1c7a45; --c4: #7c3aab; --c5: #b3123f; --c6: #00798c;
  --c7: #6b6f00; --rawness: .3;
  --good: #1c7a45; --goodback: #e2f4e9; --warn: #9a5b00; --warnback: #fdf0d8;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #11151c; --card: #1a202a; --text: #e7eaf0; --soft: #9aa5b6; --rule: #2d3542;
    --grid: #262d39; --main: #6ea8ff; --raw: #6ea8ff; --dots: #ff9d5c; --marker: #c79bf2;
    --c1: #6ea8ff; --c2: #ff9d5c; --c3: #7fd6a2; --c4: #c79bf2; --c5: #ff8fa8; --c6: #6fd3e0;
    --c7: #d5da5a; --rawness: .45;
    --good: #7fd6a2; --goodback: #163526; --warn: #f2c069; --warnback: #3b2d12;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif;
  font-variant-numeric: tabular-nums;
}
main { max-width: 1480px; margin: 0 auto; padding: 28px 24px 56px; }
header { margin-bottom: 22px; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 2px 0 8px; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 34px 0 12px; }
h3 { font-size: 1rem; margin: 0; }
p { margin: 0; }
.eyebrow { color: var(--soft); font-size: .8rem; letter-spacing: .08em; text-transform: uppercase; }
.sub { color: var(--soft); display: flex; flex-wrap: wrap; gap: 4px 14px; align-items: center; }
.chip { border-radius: 99px; padding: 1px 11px; font-size: .85rem; font-weight: 600; }
.chip.good { color: var(--good); background: var(--goodback); }
.chip.warn { color: var(--warn); background: var(--warnback); }
.tiles { display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); }
.tile, .chart, .sheet, details {
  background: var(--card); border: 1px solid var(--rule); border-radius: 10px; margin: 0;
}
.tile { padding: 12px 16px; }
.tile dt { color: var(--soft); font-size: .85rem; }
.tile dd { margin: 0; }
.tile .value { font-size: 1.45rem; line-height: 1.3; font-weight: 650; white-space: nowrap; }
.tile .aside { color: var(--soft); font-size: .85rem; }
dl { margin: 0; }
.charts { display: grid; gap: 16px; grid-template-columns: minmax(0, 1fr); }
.charts + .charts { margin-top: 16px; }
.chart { padding: 14px 26px 8px 66px; min-width: 0; display: flex; flex-direction: column; }
svg.plot { margin-top: auto; }
.chart figcaption, .chart .legend, .chart .empty { margin-left: -48px; }
.note { color: var(--soft); font-size: .85rem; }
.legend {
  list-style: none; display: flex; flex-wrap: wrap; gap: 2px 16px;
  padding: 0; margin-top: 8px; margin-bottom: 8px; font-size: .85rem; color: var(--soft);
}
.legend li { display: flex; align-items: center; gap: 6px; }
.empty { color: var(--soft); padding: 18px 0; }
svg.plot { display: block; overflow: visible; }
svg text { font-size: 12px; fill: var(--soft); }
svg .grid { stroke: var(--grid); }
svg .base { stroke: var(--soft); }
svg .line { fill: none; vector-effect: non-scaling-stroke; stroke-linejoin: round; }
svg .main { stroke: var(--main); stroke-width: 2; }
svg .raw { stroke: var(--raw); stroke-width: 1; opacity: var(--rawness); }
svg.key .raw { opacity: .6; }
svg .dots { stroke: var(--dots); stroke-width: 1.5; }
svg .c1 { stroke: var(--c1); stroke-width: 2; }
svg .c2 { stroke: var(--c2); stroke-width: 2; }
svg .c3 { stroke: var(--c3); stroke-width: 2; }
svg .c4 { stroke: var(--c4); stroke-width: 2; }
svg .c5 { stroke: var(--c5); stroke-width: 2; }
svg .c6 { stroke: var(--c6); stroke-width: 2; }
svg .c7 { stroke: var(--c7); stroke-width: 2; }
svg .dot { fill: var(--card); stroke-width: 2; opacity: 1; pointer-events: none; }
svg .marker { stroke: var(--marker); stroke-width: 1.5; stroke-dasharray: 5 3; }
svg .grip { stroke: transparent; stroke-width: 12; }
svg .label {
  fill: var(--marker); font-weight: 600; cursor: default;
  stroke: var(--card); stroke-width: 5; stroke-linejoin: round; paint-order: stroke;
}
svg .band { fill: transparent; }
svg .band:hover { fill: var(--soft); opacity: .18; }
.sheet { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th, td { padding: 8px 14px; text-align: right; white-space: nowrap; }
th {
  color: var(--soft); font-weight: 600; font-size: .82rem; vertical-align: bottom;
  white-space: normal;
}
th:first-child, td:first-child, .left { text-align: left; }
tbody tr, tfoot tr { border-top: 1px solid var(--rule); }
tfoot td { font-weight: 650; }
td small { display: block; color: var(--soft); font-size: .82rem; }
details { padding: 10px 16px; margin-top: 12px; }
summary { cursor: pointer; font-weight: 600; }
pre { overflow-x: auto; font-size: .85rem; line-height: 1.45; margin: 10px 0 4px; }
footer { color: var(--soft); font-size: .85rem; margin-top: 28px; }
@media (min-width: 1140px) {
  .two { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .three { grid-template-columns: repeat(3, minmax(0, 1fr)); }
}
@media (max-width: 560px) {
  main { padding: 18px 10px 40px; }
  .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 8px; }
  .tile { padding: 10px 12px; }
  .tile:first-child { grid-column: 1 / -1; }
  .tile .value { font-size: 1.25rem; }
  .chart { padding-left: 60px; padding-right: 18px; }
}
@media print { body { background: #fff; } .chart, tr { break-inside: avoid; } }
"""
