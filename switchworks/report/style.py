"""What the page of a report looks like, and how its charts answer to a pointer."""

STYLE = """
:root { --page:#f6f6f4; --card:#fff; --ink:#1c1d1f; --soft:#5c6066; --line:#dfe0dd; --grid:#ecece9;
  --c0:#0072b2; --c1:#d55e00; --c2:#00855f; --c3:#b0578d; --c4:#a87400; --c5:#4b5563;
  --right:#00704f; --right-back:#d9f2e6; --wrong:#a33f00; --wrong-back:#fde8da; color-scheme:light }
@media screen and (prefers-color-scheme:dark) {
  :root { --page:#131416; --card:#1c1e21; --ink:#eceded; --soft:#a3a8af; --line:#34373c;
  --grid:#292c30; --c0:#56b4e9; --c1:#f28b45; --c2:#2fc196; --c3:#dd8fbc; --c4:#e3b341;
  --c5:#aab2bd; --right:#6fe0b4; --right-back:#123a2c; --wrong:#ffb78a; --wrong-back:#47280f;
  color-scheme:dark } }
* { box-sizing:border-box }
body { margin:0; background:var(--page); color:var(--ink);
  font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif }
main { max-width:1120px; margin:0 auto; padding:28px 16px 60px }
h1 { font-size:1.9rem; line-height:1.2; margin:0; overflow-wrap:anywhere }
h2 { font-size:1.25rem; margin:44px 0 4px } h3 { font-size:1rem; margin:22px 0 8px }
p { margin:6px 0 14px; max-width:72ch } .soft { color:var(--soft) }
.tiles { display:grid; grid-template-columns:repeat(auto-fill,minmax(146px,1fr)); gap:12px;
  margin:22px 0 }
.tile,figure,.card { background:var(--card); border:1px solid var(--line); border-radius:10px }
.tile { padding:12px 14px } .tile div { color:var(--soft); font-size:.84rem }
.tile b { display:block; font-size:1.42rem; font-weight:620; line-height:1.3 }
.tile small { color:var(--soft); font-size:.78rem; line-height:1.35; display:block }
.grid { display:grid; gap:14px;
  grid-template-columns:repeat(auto-fill,minmax(min(100%,440px),1fr)) }
figure { margin:0; padding:14px 14px 8px; min-width:0; break-inside:avoid }
figcaption { line-height:1.35 } figcaption span { color:var(--soft); font-size:.86rem }
svg { display:block; width:100%; height:auto; overflow:visible }
svg text { font-size:12.5px; fill:var(--soft); font-variant-numeric:tabular-nums }
svg text.end { fill:var(--ink); font-weight:600 } svg text.small { font-size:11.5px }
svg svg { overflow:hidden }
path.grid { stroke:var(--grid); display:inline } path.axis,rect.frame { stroke:var(--line) }
rect.frame { fill:none } path.reference { stroke:var(--soft); stroke-dasharray:4 4 }
polyline { fill:none; stroke-linejoin:round; stroke-linecap:round }
.raw { stroke-width:1; opacity:.28 } .curve { stroke-width:2.2 } .curve.smooth { stroke-width:1.4 }
circle { stroke:var(--card); stroke-width:1.5 }
image { image-rendering:pixelated } rect.under { fill:#0072b2 } rect.over { fill:#d55e00 }
.legend { display:flex; flex-wrap:wrap; gap:2px 16px; font-size:.84rem; margin:4px 0 2px }
.legend i { display:inline-block; width:20px; height:0; border-top:3px solid; margin-right:6px;
  vertical-align:middle; position:relative } .legend i.smooth { border-top-width:1.5px }
.legend i.points::after { content:""; position:absolute; left:6px; top:-6px; width:9px; height:9px;
  border-radius:50%; background:currentColor }
.colourbar { display:grid; grid-template-columns:repeat(5,1fr); max-width:480px; margin:8px 0 16px;
  font-size:.82rem; color:var(--soft) }
.colourbar div { grid-column:1/6; height:14px; border:1px solid var(--line); border-radius:3px }
.colourbar span { text-align:center } .colourbar span:nth-child(2) { text-align:left }
.colourbar span:last-child { text-align:right }
.scroll { overflow-x:auto } table { border-collapse:collapse; font-size:.9rem; width:100% }
th,td { text-align:left; padding:6px 14px 6px 0; border-bottom:1px solid var(--line);
  vertical-align:top }
td { overflow-wrap:anywhere; min-width:88px } .card { padding:12px 16px; margin:12px 0 }
th { font-weight:600 } td { font-variant-numeric:tabular-nums } td small { color:var(--soft) }
tr.differs td { font-weight:600; color:var(--c1) }
tbody th { font-weight:400; color:var(--soft); min-width:116px }
th small { font-size:.8rem }
summary { cursor:pointer; font-weight:600; padding:6px 0 }
pre { overflow-x:auto; background:var(--card); border:1px solid var(--line); border-radius:8px;
  padding:10px 14px; font-size:.86rem; white-space:pre-wrap; overflow-wrap:anywhere }
.text { line-height:1.95; max-width:80ch; overflow-wrap:anywhere; break-inside:avoid;
  padding-bottom:10px }
.text+.text { border-top:1px solid var(--line); padding-top:10px }
mark { border-radius:4px; padding:1px 5px; box-decoration-break:clone;
  -webkit-box-decoration-break:clone; color:var(--wrong); background:var(--wrong-back) }
mark.right { color:var(--right); background:var(--right-back) }
mark.right::after { content:"\\a0\\2713" }
ins { text-decoration:none; border-bottom:2px dotted var(--soft); color:var(--soft);
  margin-left:5px }
.notice { border-left:4px solid var(--c1) }
@media screen and (max-width:520px) { svg text { font-size:15px }
  svg text.small { font-size:13.5px }
  figure { padding:12px 8px 6px } .card { padding:10px 12px } h2 { margin-top:34px } }
#tip { position:fixed; pointer-events:none; background:var(--card); border:1px solid var(--line);
  border-radius:8px; padding:6px 10px; font-size:.82rem; line-height:1.45;
  box-shadow:0 3px 14px #0003; display:none; z-index:2; max-width:80vw }
#tip i { display:inline-block; width:9px; height:9px; border-radius:2px; margin-right:6px }
@media print { :root { --page:#fff }
  * { print-color-adjust:exact; -webkit-print-color-adjust:exact }
  body { font-size:11pt } main { max-width:none; padding:0 } h2 { break-after:avoid }
  .grid { grid-template-columns:1fr 1fr } }
"""

SCRIPT = """
const tip = document.getElementById('tip'), make = (tag, text) => {
  const part = document.createElement(tag); part.textContent = text; return part };
const show = (value) => Math.abs(value) >= 1000 ? Math.round(value).toLocaleString('en')
  : String(+value.toPrecision(4));
for (const chart of document.querySelectorAll('svg.chart')) {
  const [left, right, top, bottom, x0, x1, y0, y1] = chart.dataset.frame.split(' ').map(Number);
  const line = document.createElementNS('http://www.w3.org/2000/svg', 'path');
  line.setAttribute('class', 'reference'); chart.append(line);
  const curves = [...chart.querySelectorAll('.curve')].map(curve => ({
    label: curve.dataset.label, colour: curve.style.stroke,
    points: curve.getAttribute('points').split(' ').map(pair => pair.split(',').map(Number)) }));
  const leave = () => { tip.style.display = 'none'; line.setAttribute('d', '') };
  const move = (event) => {
    const box = chart.getBoundingClientRect();
    const at = (event.clientX - box.left) / box.width * 480;
    if (at < left - 6 || at > right + 6) return leave();
    const x = Math.min(right, Math.max(left, at));
    line.setAttribute('d', `M${x} ${top}V${bottom}`);
    const place = x0 + (x - left) / (right - left) * (x1 - x0), name = chart.dataset.x;
    tip.replaceChildren(make('b', `${name}: ${show(name === 'step' ? Math.round(place) : place)}`));
    for (const { label, colour, points } of curves) {
      const near = points.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a);
      const row = make('div', ''), dot = make('i', '');
      dot.style.background = colour;
      row.append(dot, label + ' ' + show(y0 + (bottom - near[1]) / (bottom - top) * (y1 - y0)));
      tip.append(row);
    }
    tip.style.display = 'block';
    const room = innerWidth - tip.offsetWidth - 8;
    tip.style.left = Math.max(4, Math.min(event.clientX + 14, room)) + 'px';
    tip.style.top = Math.max(4, event.clientY - tip.offsetHeight - 14) + 'px';
  };
  chart.addEventListener('pointermove', move); chart.addEventListener('pointerdown', move);
  chart.addEventListener('pointerleave', leave);
}
addEventListener('beforeprint', () => {
  for (const part of document.querySelectorAll('details')) part.open = true });
"""
