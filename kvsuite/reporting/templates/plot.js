'use strict';

const SVG = 'http://www.w3.org/2000/svg';
const X_FIRST = ['mem_measured_peak_bytes', 'kv_bytes_exact', 'mem_weights_bytes', 'cache_tokens_mean'];
const Y_FIRST = ['decode_tok_s_batch', 'decode_tok_s_agg', 'tpot_s', 'ttft_s', 'score_tok_s'];
const Q_FIRST = ['perplexity', 'ppl_ratio', 'kld', 'next_token_acc'];
// from good to bad; told apart by lightness too
const COLOURS = ['#0b5d8a', '#1f8a8c', '#59b26b', '#b9c74a', '#f2b134'];
const [MOST_WHISKERS, MOST_LABELS, MOST_LISTED, REACH] = [200, 12, 30, 28];
// kvsuite.reporting.noise
const MOST_UNCERTAIN = 0.10;

function drawn(tag, attributes, text) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

/** Memory, speed and quality of the cases against each other, and those that no other case beats in all three. */
class TradeOff {
  constructor(root, data, open) {
    Object.assign(this, { root, data, open, focus: -1 });
    this.columns = new Map(data.columns.map((column) => [column.key, column]));
    const sizes = data.plot.groups.map((_, place) => data.plot.group.filter((group) => group === place).length);
    this.group = element('select', { onchange: () => this.choose() },
      ...data.plot.groups.map((name, place) => element('option', { value: place }, `${name} (${count(sizes[place])})`)));
    this.group.value = String(sizes.indexOf(Math.max(...sizes)));
    const select = () => element('select', { onchange: () => this.draw() });
    this.selects = { x: select(), y: select(), q: select() };
    const { x, y, q } = this.selects;
    const controls = element('div', { class: 'controls' },
      data.plot.groups.length > 1 ? element('label', {}, 'Cases ', this.group) : null,
      element('label', {}, 'Across ', x), element('label', {}, 'Up ', y), element('label', {}, 'Colour and size ', q));
    this.svg = drawn('svg', { tabindex: '0', role: 'img' });
    this.tip = element('div', { class: 'tip', role: 'status', hidden: true });
    this.legend = element('p', { class: 'state' });
    this.best = element('div', { class: 'scroll' });
    this.stage = element('div', { class: 'stage' }, this.svg, this.tip);
    root.replaceChildren(controls, this.stage, this.legend, this.best);
    this.svg.addEventListener('pointermove', (event) => this.point(event));
    this.svg.addEventListener('pointerleave', () => this.mark(-1));
    this.svg.addEventListener('click', (event) => { this.point(event); this.enter(); });
    this.svg.addEventListener('keydown', (event) => this.key(event));
    new ResizeObserver(() => { if (this.width() !== this.drawnWidth) this.draw(); }).observe(this.stage);
    this.choose();
  }

  /** Offer the numbers that the chosen cases have, and keep what was chosen where it is among them. */
  choose() {
    const { cells, plot } = this.data;
    const rows = plot.group.flatMap((group, row) => (group === Number(this.group.value || 0) ? [row] : []));
    const axes = plot.axes.filter((key) => rows.some((row) => cells[key][row] !== null));
    const taken = [];
    for (const [name, wanted, group] of [['x', X_FIRST, 'memory'], ['y', Y_FIRST, 'speed'], ['q', Q_FIRST, 'quality']]) {
      const select = this.selects[name];
      const before = select.value;
      select.replaceChildren(...(name === 'q' ? [element('option', { value: '' }, 'none')] : []));
      for (const kind of ['memory', 'speed', 'quality']) {
        const keys = axes.filter((key) => this.columns.get(key).group === kind);
        if (keys.length) {
          select.append(element('optgroup', { label: kind },
            ...keys.map((key) => element('option', { value: key }, this.columns.get(key).title))));
        }
      }
      const free = axes.filter((key) => !taken.includes(key));
      select.value = (axes.includes(before) ? before : null) ?? wanted.find((key) => free.includes(key))
        ?? free.find((key) => this.columns.get(key).group === group) ?? (name === 'q' ? '' : free[0] ?? axes[0] ?? '');
      taken.push(select.value);
    }
    this.draw();
  }

  width() {
    return Math.max(320, Math.min(1100, Math.round(this.stage.clientWidth || 900)));
  }

  /** The cases of the chosen group that have all chosen numbers, and how many lack one. */
  points() {
    const { cells, plot } = this.data;
    const [x, y, q] = ['x', 'y', 'q'].map((name) => this.selects[name].value);
    const found = [];
    let lacking = 0;
    plot.group.forEach((group, row) => {
      if (group !== Number(this.group.value || 0)) return;
      const point = { row, x: cells[x][row], y: cells[y][row], q: q ? cells[q][row] : 0 };
      if (point.x === null || point.y === null || point.q === null) lacking += 1;
      else found.push(point);
    });
    return [found.sort((a, b) => a.x - b.x || a.y - b.y), lacking];
  }

  /**
   * Marks `best` on the points that no other one beats. A time that is too uncertain makes no point the best, and one that is
   * better by no more than the intervals of both together is not better; nor is a point beaten by such a time alone.
   */
  judge(points) {
    const names = ['x', 'y', 'q'];
    const timed = names.map((name) => this.column(name)?.timed ?? false);
    const halves = (point) => names.map((name, axis) => {
      const share = timed[axis] ? this.data.spread[this.selects[name].value]?.[point.row] ?? Infinity : 0;
      return { share, half: share ? share * Math.abs(point[name]) : 0 };
    });
    const signs = ['x', 'y', 'q'].map((name) => (this.columns.get(this.selects[name].value)?.better === 'higher' ? -1 : 1));
    const costs = (point) => [signs[0] * point.x, signs[1] * point.y, signs[2] * point.q];
    const sorted = points.map((point) => ({ point, cost: costs(point), half: halves(point) }))
      .sort((a, b) => a.cost[0] - b.cost[0] || a.cost[1] - b.cost[1] || a.cost[2] - b.cost[2]);
    const certain = sorted.filter((one) => one.half.every(({ share }) => share <= MOST_UNCERTAIN));
    for (const one of sorted) one.point.best = false;
    // how far one is worse than another, beyond the noise of both
    const worse = (one, other, axis) => {
      const gap = one.cost[axis] - other.cost[axis];
      return Math.abs(gap) <= Math.hypot(one.half[axis].half, other.half[axis].half) ? 0 : gap;
    };
    const front = certain.filter((one) => !certain.some((other) => {
      const gaps = one.cost.map((_, axis) => worse(one, other, axis));
      return gaps.every((gap) => gap >= 0) && gaps.some((gap) => gap > 0);
    }));
    for (const one of front) one.point.best = true;
    this.uncertain = points.length - certain.length;
    return front.map((one) => one.point);
  }

  draw() {
    const empty = this.selects.x.options.length === 0;
    this.stage.hidden = empty;
    this.best.hidden = empty;
    if (empty) {
      this.legend.textContent = 'No finished case has numbers to set against each other.';
      return;
    }
    const [points, lacking] = this.points();
    const front = this.judge(points);
    this.drawnWidth = this.width();
    const [width, height] = [this.drawnWidth, this.drawnWidth < 600 ? 380 : 480];
    const margin = { left: 74, right: 18, top: 16, bottom: 56 };
    this.svg.setAttribute('viewBox', `0 0 ${width} ${height}`);
    this.svg.setAttribute('aria-label', `${points.length} cases, ${this.title('x')} across, ${this.title('y')} up. Arrow `
      + 'keys go from case to case, Enter opens one.');
    const across = scale(this.reach(points, 'x'), margin.left, width - margin.right);
    const up = scale(this.reach(points, 'y'), height - margin.bottom, margin.top);
    this.svg.replaceChildren(drawn('rect', { class: 'ground', x: margin.left, y: margin.top,
      width: width - margin.left - margin.right, height: height - margin.top - margin.bottom }));
    for (const tick of across.ticks(width < 600 ? 4 : 7)) {
      const at = across(tick);
      this.svg.append(drawn('line', { class: 'grid', x1: at, x2: at, y1: margin.top, y2: height - margin.bottom }),
        drawn('text', { class: 'tick', x: at, y: height - margin.bottom + 18, 'text-anchor': 'middle' }, tickText(tick)));
    }
    for (const tick of up.ticks(6)) {
      const at = up(tick);
      this.svg.append(drawn('line', { class: 'grid', x1: margin.left, x2: width - margin.right, y1: at, y2: at }),
        drawn('text', { class: 'tick', x: margin.left - 8, y: at + 4, 'text-anchor': 'end' }, tickText(tick)));
    }
    const middle = (margin.top + height - margin.bottom) / 2;
    this.svg.append(
      drawn('text', { class: 'axis', x: (margin.left + width - margin.right) / 2, y: height - 12, 'text-anchor': 'middle' },
        this.title('x') + (across.log ? ', log' : '')),
      drawn('text', { class: 'axis', x: 16, y: middle, 'text-anchor': 'middle', transform: `rotate(-90 16 ${middle})` },
        this.title('y') + (up.log ? ', log' : '')));
    this.quality(points);
    for (const point of points) {
      point.left = across(point.x / this.unit('x'));
      point.top = up(point.y / this.unit('y'));
    }
    if (points.length <= MOST_WHISKERS) points.forEach((point) => this.whiskers(point, across, up));
    for (const point of [...points].sort((a, b) => a.best - b.best)) {
      this.svg.append(drawn('circle', { class: point.best ? 'best' : 'beaten', cx: point.left, cy: point.top,
        r: point.radius, fill: point.colour, 'data-row': point.row }));
    }
    this.labels(front, width, margin);
    this.ring = drawn('circle', { class: 'ring', r: 13, visibility: 'hidden' });
    this.svg.append(this.ring);
    this.shown = points;
    this.mark(-1);
    this.explain(points, front, lacking);
  }

  column(name) {
    return this.columns.get(this.selects[name].value);
  }

  unit(name) {
    return this.column(name)?.scale ?? 1;
  }

  title(name) {
    const { title, unit, better } = this.column(name);
    return `${title}${unit ? `, ${unit}` : ''} (${better} is better)`;
  }

  /** Colour and size by rank, so that one case far off does not make all others look alike. */
  quality(points) {
    const higher = this.column('q')?.better === 'higher';
    const order = [...new Set(points.map((point) => point.q))].sort((a, b) => (higher ? b - a : a - b));
    const place = new Map(order.map((value, rank) => [value, order.length > 1 ? rank / (order.length - 1) : 0]));
    for (const point of points) {
      const share = place.get(point.q);
      point.colour = COLOURS[Math.round(share * (COLOURS.length - 1))];
      point.radius = this.column('q') ? 8 - 4 * share : 5.5;
    }
  }

  /** Both ends of a point's interval, in the unit of the axis. */
  ends(point, name) {
    const share = this.data.spread[this.selects[name].value]?.[point.row] ?? 0;
    const value = point[name] / this.unit(name);
    return [value - Math.min(share, 1) * Math.abs(value), value + share * Math.abs(value)];
  }

  /** What an axis has to hold: the intervals where they are drawn. */
  reach(points, name) {
    if (points.length > MOST_WHISKERS) return points.map((point) => point[name] / this.unit(name));
    return points.flatMap((point) => this.ends(point, name));
  }

  whiskers(point, across, up) {
    const [[left, right], [low, high]] = [this.ends(point, 'x'), this.ends(point, 'y')];
    if (low < high) {
      this.svg.append(drawn('line', { class: 'whisker', x1: point.left, x2: point.left, y1: up(low), y2: up(high) }));
    }
    if (left < right) {
      this.svg.append(drawn('line', { class: 'whisker', y1: point.top, y2: point.top, x1: across(left), x2: across(right) }));
    }
  }

  /** Names beside the best points where there is room for them. */
  labels(front, width, margin) {
    if (front.length > MOST_LABELS) return;
    const taken = this.svg.querySelectorAll('circle');
    const boxes = Array.from(taken, (circle) => [Number(circle.getAttribute('cx')) - 7, Number(circle.getAttribute('cy')) - 7, 14, 14]);
    const clash = ([x, y, w, h]) => x < margin.left || x + w > width - margin.right || y < margin.top
      || boxes.some(([left, top, wide, high]) => x < left + wide && left < x + w && y < top + high && top < y + h);
    for (const point of front) {
      const name = this.data.names[point.row];
      const [wide, high] = [6.6 * name.length, 14];
      const places = [[12, -7], [-12 - wide, -7], [-wide / 2, -26], [-wide / 2, 12], [10, -24], [10, 10]];
      const box = places.map(([x, y]) => [point.left + x, point.top + y, wide, high]).find((one) => !clash(one));
      if (!box) continue;
      boxes.push(box);
      this.svg.append(drawn('text', { class: 'name', x: box[0], y: box[1] + 11 }, name));
    }
  }

  explain(points, front, lacking) {
    const q = this.column('q');
    this.legend.replaceChildren(
      element('span', { class: 'key best' }, `ringed: no other case is as good in all ${q ? 'three' : 'two'} and better in one `
        + `beyond the noise of its rounds (${count(front.length)} of ${count(points.length)})`));
    if (this.uncertain) {
      this.legend.append(` · ${count(this.uncertain)} not ringed, their times are too uncertain to be put in order (95 % interval beyond `
        + `${100 * MOST_UNCERTAIN} % of the mean, or a single round)`);
    }
    if (q) this.legend.append(` · large and dark: better ${q.title}, by rank`);
    if (lacking) this.legend.append(` · ${count(lacking)} without one of the numbers`);
    if (points.length <= MOST_WHISKERS) this.legend.append(' · lines: 95 % interval of the mean, where there are rounds');
    this.best.hidden = !front.length;
    const names = ['x', 'y', ...(q ? ['q'] : [])];
    const listed = [...front].sort((a, b) => a.x - b.x).slice(0, MOST_LISTED);
    const more = front.length - listed.length;
    this.best.replaceChildren(element('table', { class: 'front' },
      element('caption', {}, `Cases that no other one beats${more ? `, the first ${MOST_LISTED} of ${count(front.length)}` : ''}`),
      element('thead', {}, element('tr', {}, element('th', { scope: 'col' }, 'Case'), ...names.map((name) => element('th',
        { scope: 'col', class: 'number' }, `${this.column(name).title} `, element('small', {}, this.column(name).unit))))),
      element('tbody', {}, ...listed.map((point) => element('tr', {}, element('th', { scope: 'row' },
        element('button', { type: 'button', class: 'opener', onclick: () => this.open(point.row) }, this.data.names[point.row])),
      ...names.map((name) => element('td', { class: 'number' }, columnNumber(point[name], this.column(name)))))))));
  }

  point(event) {
    const box = this.svg.getBoundingClientRect();
    const zoom = this.drawnWidth / box.width;
    const [x, y] = [(event.clientX - box.left) * zoom, (event.clientY - box.top) * zoom];
    let [nearest, distance] = [-1, REACH ** 2];
    this.shown.forEach((point, place) => {
      const found = (point.left - x) ** 2 + (point.top - y) ** 2;
      if (found < distance) [nearest, distance] = [place, found];
    });
    this.mark(nearest);
  }

  mark(place) {
    this.focus = place;
    const point = this.shown[place];
    this.tip.hidden = !point;
    this.ring.setAttribute('visibility', point ? 'visible' : 'hidden');
    if (!point) return;
    this.ring.setAttribute('cx', point.left);
    this.ring.setAttribute('cy', point.top);
    const lines = ['x', 'y', 'q'].filter((name) => this.column(name)).map((name) => {
      const column = this.column(name);
      const share = this.data.spread[column.key]?.[point.row];
      return element('div', {}, `${column.title}: `, element('b', {}, `${columnNumber(point[name], column)} ${column.unit}`),
        share ? ` ±${(100 * share).toFixed(1)} %` : '');
    });
    this.tip.replaceChildren(element('strong', {}, this.data.names[point.row]), ...lines);
    const box = this.svg.getBoundingClientRect();
    const zoom = box.width / this.drawnWidth;
    const left = point.left * zoom + (point.left > this.drawnWidth / 2 ? -this.tip.offsetWidth - 16 : 16);
    this.tip.style.left = `${Math.max(0, left)}px`;
    this.tip.style.top = `${Math.max(0, point.top * zoom - this.tip.offsetHeight / 2)}px`;
  }

  key(event) {
    const step = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 }[event.key];
    if (event.key === 'Enter') this.enter();
    if (event.key === 'Escape') this.mark(-1);
    if (!step || !this.shown.length) return;
    event.preventDefault();
    this.mark(this.focus < 0 ? 0 : (this.focus + step + this.shown.length) % this.shown.length);
  }

  enter() {
    if (this.focus >= 0) this.open(this.shown[this.focus].row);
  }
}
