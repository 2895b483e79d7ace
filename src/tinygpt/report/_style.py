"""The looks of the page: light, dark, narrow and printed."""

STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1f2328; --muted: #59636e; --line: #d1d9e0; --panel: #f6f8fa;
  --blue: #0a58ca; --band: #9ec5fe; --orange: #b35900; --green: #1a7f37; --purple: #6f42c1; --red: #cf222e; }
@media (prefers-color-scheme: dark) { :root { --page: #0d1117; --ink: #e6edf3; --muted: #9198a1; --line: #3d444d;
  --panel: #151b23; --blue: #58a6ff; --band: #1f4b80; --orange: #f0883e; --green: #3fb950; --purple: #bc8cff;
  --red: #ff7b72; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 66rem; margin: 0 auto; padding: 1.5rem 1.25rem 3rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .8rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); }
header p, footer, figcaption { color: var(--muted); }
header p { margin: .3rem 0 1.2rem; overflow-wrap: anywhere; }
p { margin: .6rem 0; overflow-wrap: anywhere; }
footer { margin-top: 2.5rem; border-top: 1px solid var(--line); padding-top: .8rem; font-size: .85rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .7rem; margin: 0; }
.cards div { background: var(--panel); border: 1px solid var(--line); border-radius: .5rem; padding: .55rem .8rem; }
.cards dt { color: var(--muted); font-size: .8rem; }
.cards dd { margin: 0; font-size: 1.15rem; font-weight: 600; font-variant-numeric: tabular-nums;
  overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: .7rem 0 1.1rem; }
table { border-collapse: collapse; font-size: .9rem; min-width: 50%; }
th, td { text-align: left; padding: .32rem .9rem .32rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td:first-child { min-width: 7rem; }
th { font-weight: 600; color: var(--muted); white-space: nowrap; }
table.numbers td, table.numbers th { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
table.numbers td:first-child, table.numbers th:first-child { text-align: left; }
.remarks { list-style: none; margin: 0; padding: 0; }
.remarks li { display: flex; gap: .7rem; padding: .55rem 0; border-bottom: 1px solid var(--line); }
.remarks li > div { min-width: 0; overflow-wrap: anywhere; }
.mark { flex: none; width: 1.5rem; height: 1.5rem; line-height: 1.5rem; text-align: center; border-radius: 50%;
  color: var(--page); background: var(--muted); }
.good .mark { background: var(--green); }
.warning .mark { background: var(--red); }
details { font-size: .85rem; }
.remarks details { display: inline; color: var(--muted); }
.remarks details[open] { display: block; }
summary { cursor: pointer; color: var(--blue); width: fit-content; }
.remarks summary { display: inline; text-decoration: underline dotted; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1.2rem 1.6rem; }
figure { margin: 0; min-width: 0; }
figure svg { width: 100%; height: auto; display: block; }
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
figcaption { font-size: .85rem; }
figcaption b { color: var(--ink); }
.quote { margin: .9rem 0; }
pre, code { font: .85rem/1.5 ui-monospace, monospace; background: var(--panel); border: 1px solid var(--line);
  border-radius: .4rem; }
pre { padding: .7rem .9rem; margin: .3rem 0 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.command code { display: block; padding: .45rem .8rem; margin-top: .2rem; overflow-wrap: anywhere; }
@media print {
  :root { --page: #fff; --ink: #000; --muted: #444; --line: #bbb; --panel: #f6f6f6; --blue: #0a58ca; --band: #9ec5fe;
    --orange: #b35900; --green: #1a7f37; --purple: #6f42c1; --red: #cf222e; color-scheme: light; }
  body { font-size: 10.5pt; print-color-adjust: exact; }
  main { max-width: none; padding: 0; }
  h2 { break-after: avoid; }
  figure, tr, .remarks li, .command, .cards { break-inside: avoid; }
  .charts { grid-template-columns: 1fr 1fr; }
  .scroll { overflow: visible; }
  table.numbers td, table.numbers th { white-space: normal; }
  .remarks details { display: none; }
  details::details-content { content-visibility: visible; block-size: auto; }
}
"""
