for (const a of document.querySelectorAll('article')) {
  const v = a.querySelector('video'), svg = a.querySelector('svg'), c = svg.querySelector('.cursor');
  const [left, width, seconds] = [+svg.dataset.left, +svg.dataset.width, +svg.dataset.seconds];
  if (!v) continue;
  const draw = () => {
    const x = left + Math.min(v.currentTime / seconds, 1) * width;
    c.setAttribute('x1', x); c.setAttribute('x2', x); c.removeAttribute('visibility');
    if (!v.paused && !v.ended) requestAnimationFrame(draw);
  };
  for (const e of ['play', 'seeked', 'timeupdate']) v.addEventListener(e, draw);
  v.addEventListener('error', () => v.remove());
  if (v.error) v.remove();
  svg.addEventListener('click', e => {
    const box = svg.getBoundingClientRect(), x = (e.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    v.currentTime = Math.max(0, Math.min(1, (x - left) / width)) * seconds;
  });
}
document.querySelector('select').addEventListener('change', e => {
  const [key, sign] = e.target.value.split(' '), list = document.querySelector('main');
  const value = a => key === 'name' ? +a.dataset.name : sign * a.dataset[key];
  [...list.children].sort((a, b) => value(a) - value(b)).forEach(a => list.append(a));
});
