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
