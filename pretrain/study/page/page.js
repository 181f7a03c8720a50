(() => {
  const tip = document.getElementById('tip'), reach = 42;
  const name = document.createElement('b'), text = document.createElement('span');
  tip.append(name, text);
  const read = group => group.points || (group.points = JSON.parse(group.dataset.tips));
  let ring = null;
  const hide = () => { tip.hidden = true; if (ring) { ring.remove(); ring = null; } };
  const show = event => {
    const svg = event.target.closest && event.target.closest('svg.plot');
    hide();
    if (!svg) return;
    const matrix = svg.getScreenCTM(), scale = matrix.a;
    const x = (event.clientX - matrix.e) / scale, y = (event.clientY - matrix.f) / scale;
    let best = null, least = reach / scale;
    for (const group of svg.querySelectorAll('[data-tips]')) {
      if (getComputedStyle(group).display === 'none') continue;
      for (const point of read(group)) {
        const far = Math.hypot(point[0] - x, point[1] - y);
        if (far < least) { least = far; best = [group, point]; }
      }
    }
    if (!best) return;
    const [group, [px, py, told]] = best;
    name.textContent = group.dataset.name;
    name.hidden = !group.dataset.name;
    text.textContent = told;
    tip.hidden = false;
    ring = document.createElementNS('http://www.w3.org/2000/svg', 'circle');
    ring.setAttribute('class', 'here');
    ring.setAttribute('cx', px); ring.setAttribute('cy', py); ring.setAttribute('r', 5.5);
    svg.append(ring);
    const left = matrix.e + px * scale, top = matrix.f + py * scale, box = tip.getBoundingClientRect();
    const at = Math.min(Math.max(8, left - box.width / 2), document.documentElement.clientWidth - box.width - 8);
    tip.style.left = at + 'px';
    tip.style.top = (top - box.height - 12 > 56 ? top - box.height - 12 : top + 14) + 'px';
  };
  document.addEventListener('pointermove', event => { if (event.pointerType !== 'touch') show(event); });
  document.addEventListener('pointerdown', show);
  document.addEventListener('scroll', hide, {passive: true});
  document.addEventListener('keydown', event => { if (event.key === 'Escape') hide(); });
  for (const button of document.querySelectorAll('.toggles button')) {
    button.hidden = false;
    button.addEventListener('click', () => {
      for (const box of document.querySelectorAll('.toggles input')) box.checked = button.dataset.set === 'all';
    });
  }
})();
