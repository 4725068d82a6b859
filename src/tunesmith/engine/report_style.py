"""The style sheet of report.html: light and dark, wide and narrow, screen and paper."""

CSS = """
:root {
  color-scheme: light dark;
  --paper: #f7f5f1; --card: #ffffff; --ink: #22211f; --soft: #6d6a64; --line: #e4e0d8; --shade: #f1eee8;
  --train: #2f6db5; --eval: #d2691e; --good: #2c7a4b; --bad: #c62828; --warn: #fdf3e2; --warn-line: #e2b25c;
  --set0: #0f8578; --set1: #8a4fbf; --set2: #a87900; --set3: #c2185b; --set4: #5b7d1c; --set5: #6a6f78;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #16171a; --card: #1f2125; --ink: #e9e6e0; --soft: #9b978f; --line: #33363c; --shade: #282b30;
    --train: #74a9e6; --eval: #f0995a; --good: #6cc493; --bad: #ff7b72; --warn: #2d2719; --warn-line: #8a6a2c;
    --set0: #4fc3b5; --set1: #bd93ec; --set2: #dcb748; --set3: #f2779f; --set4: #a3c760; --set5: #a9aeb8;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
.plot, .figure, dd { font-variant-numeric: tabular-nums; }
body {
  margin: 0; background: var(--paper); color: var(--ink); line-height: 1.55; font-size: 16px;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Apple SD Gothic Neo", "Malgun Gothic", "Noto Sans KR",
    "Noto Sans CJK KR", "Noto Sans", sans-serif;
}
main { max-width: 1080px; margin: 0 auto; padding: 40px 24px 64px; }
code, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, D2Coding, "Noto Sans Mono CJK KR", monospace; }
h1 { font-size: 2rem; line-height: 1.2; margin: 4px 0 12px; letter-spacing: -0.015em; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 48px 0 14px; letter-spacing: -0.005em; }
h3 { font-size: .95rem; margin: 22px 0 10px; }
p { margin: 0 0 12px; }
.eyebrow { color: var(--eval); font-size: .8rem; font-weight: 650; letter-spacing: .09em; text-transform: uppercase; }
.soft, .sub { color: var(--soft); }
.tags { display: flex; flex-wrap: wrap; gap: 8px; margin: 0 0 12px; }
.tags span { background: var(--shade); border: 1px solid var(--line); border-radius: 99px; padding: 2px 12px; font-size: .86rem; }
.command { display: block; font-size: .84rem; color: var(--soft); overflow-wrap: anywhere; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 18px 20px; }
.card + .card { margin-top: 14px; }

.tiles { display: grid; grid-template-columns: repeat(3, 1fr); gap: 12px; margin-top: 28px; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 14px 18px; }
.tile .name { color: var(--soft); font-size: .84rem; }
.tile .figure { font-size: 1.55rem; font-weight: 620; letter-spacing: -0.02em; }
.tile .from { color: var(--soft); font-weight: 400; }
.tile .sub { font-size: .84rem; }
.good { color: var(--good); }
.bad { color: var(--bad); }

.notes { background: var(--warn); border-color: var(--warn-line); margin-top: 20px; }
.notes ul { margin: 0; padding-left: 20px; }
.notes li { overflow-wrap: anywhere; white-space: pre-line; }

.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(290px, 1fr)); gap: 14px; margin-top: 14px; }
.chart { background: var(--card); border: 1px solid var(--line); border-radius: 12px; margin: 0; padding: 14px 18px 34px 60px; }
.chart figcaption { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 0 0 12px -42px; font-size: .9rem; }
.plot { position: relative; height: 150px; }
.wide .plot { height: 300px; }
.plot svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; }
.plot path { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; vector-effect: non-scaling-stroke; }
.plot path.grid { stroke: var(--line); stroke-width: 1; }
.plot path.train { stroke: var(--train); }
.plot path.raw { stroke-width: 1; opacity: .32; }
.plot path.eval { stroke: var(--eval); }
.plot path.set0 { stroke: var(--set0); }
.plot path.set1 { stroke: var(--set1); }
.plot path.set2 { stroke: var(--set2); }
.plot path.set3 { stroke: var(--set3); }
.plot path.set4 { stroke: var(--set4); }
.plot path.set5 { stroke: var(--set5); }
.plot path.dashed { stroke-dasharray: 7 5; }
.plot path.dot { stroke-width: 9; stroke-dasharray: none; }
.plot path.broken { stroke: var(--bad); stroke-dasharray: 4 4; stroke-width: 1.5; }
.plot > span { position: absolute; color: var(--soft); font-size: .74rem; white-space: nowrap; }
.plot > .y { right: calc(100% + 8px); transform: translateY(-50%); }
.plot > .x { top: calc(100% + 6px); transform: translateX(-50%); }
.plot > i { position: absolute; top: 0; bottom: 0; font-style: normal; }
.plot > i:hover { box-shadow: inset 1px 0 var(--soft); }
.tip { display: none; position: absolute; top: 6px; z-index: 1; pointer-events: none; white-space: nowrap; font-size: .8rem;
  background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 4px 10px; }
.tip.left { left: calc(100% + 6px); }
.tip.right { right: calc(100% + 6px); }
.tip .key { display: block; }
.plot > i:hover .tip { display: block; }
.key { color: var(--soft); font-size: .84rem; }
.key::before { content: ""; display: inline-block; width: 14px; height: 3px; margin-right: 7px; vertical-align: middle; }
.key.train::before { background: var(--train); }
.key.eval::before { background: var(--eval); }
.key.set0::before { background: var(--set0); }
.key.set1::before { background: var(--set1); }
.key.set2::before { background: var(--set2); }
.key.set3::before { background: var(--set3); }
.key.set4::before { background: var(--set4); }
.key.set5::before { background: var(--set5); }
.key.dashed::before { clip-path: polygon(0 0, 40% 0, 40% 100%, 60% 100%, 60% 0, 100% 0, 100% 100%, 0 100%); }
.key.broken::before { background: var(--bad); }

.prompt { margin: 0 0 14px; }
.label { color: var(--soft); font-size: .8rem; font-weight: 600; margin-bottom: 4px; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 22em; overflow-y: auto; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(240px, 1fr)); gap: 12px; }
.answer { background: var(--shade); border-radius: 8px; border-top: 3px solid var(--line); padding: 10px 14px; }
.answer .text { font-size: .93rem; }
.answer.after { border-top-color: var(--eval); }
.answer.reference { background: none; border: 1px solid var(--line); }

.pictures { display: flex; flex-wrap: wrap; gap: 14px; }
.picture { flex: 1 1 auto; max-width: 100%; margin: 0; padding: 14px;
  background: #ffffff; border: 1px solid var(--line); border-radius: 12px; }
.picture figcaption { color: #22211f; font-size: .9rem; font-weight: 600; margin-bottom: 8px; }
.picture img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
.mistake .prompt { font-size: .93rem; }
mark { color: inherit; background: none; border-bottom: 3px solid var(--eval); padding-bottom: 1px; }
mark.right { border-bottom-color: var(--good); }
mark.wrong { border-bottom-color: var(--bad); }
mark sub { color: var(--soft); font-size: .72rem; font-weight: 600; margin-left: 3px; }

.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th { color: var(--soft); font-weight: 600; text-align: left; white-space: nowrap; }
th, td { padding: 6px 14px 6px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child > * { border-bottom: 0; }
table.compact th, table.compact td { white-space: normal; }
table.compact .soft { white-space: nowrap; }
td { overflow-wrap: break-word; }
.num { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(170px, 1fr)); gap: 12px 20px; }
.grid .name { color: var(--soft); font-size: .84rem; }
.grid .value { overflow-wrap: anywhere; }
.panel > :first-child h3 { margin-top: 0; }
.panel .pair { gap: 0 48px; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(400px, 100%), 1fr)); gap: 0 20px; align-items: start; }
dl { display: grid; grid-template-columns: minmax(80px, max-content) 1fr; gap: 5px 20px; margin: 0; font-size: .93rem; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
dd dl { font-size: 1em; }
.lines { margin: 0; padding-left: 20px; font-size: .9rem; overflow-wrap: anywhere; }
.bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: 4px 12px; align-items: center; font-size: .9rem; }
.bars i { display: block; height: 12px; border-radius: 3px; background: var(--train); min-width: 1px; }
pre { margin: 0; font-size: .84rem; line-height: 1.5; white-space: pre-wrap; overflow-wrap: anywhere; }
details { margin-top: 12px; }
details > summary { cursor: pointer; color: var(--soft); font-size: .9rem; }
details[open] > summary { margin-bottom: 10px; }
footer { margin-top: 48px; color: var(--soft); font-size: .84rem; }

@media (max-width: 560px) {
  main { padding: 24px 14px 48px; }
  h1 { font-size: 1.55rem; }
  h2 { margin-top: 36px; }
  .tiles { grid-template-columns: 1fr 1fr; gap: 8px; }
  .tile { padding: 10px 12px; }
  .tile .figure { font-size: 1.2rem; }
  .card { padding: 14px; }
  .chart { padding: 12px 14px 32px 50px; }
  .chart figcaption { margin-left: -36px; }
  .wide .plot { height: 220px; }
  .grid { grid-template-columns: 1fr 1fr; }
  table { font-size: .82rem; }
  th, td { padding-right: 8px; }
}
@media print {
  body { background: none; font-size: 11pt; }
  .card, .tile, .chart { break-inside: avoid; }
  .text { max-height: none; }
}
"""
