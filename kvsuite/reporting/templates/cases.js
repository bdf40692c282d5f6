'use strict';

const STATUS_MARKS = { __proto__: null, ok: '✓', oom: '▲', error: '✕', crashed: '‡', invalid: '⊘', skipped: '–' };
const MOST_FACETS = 50;
const STATUS_RANK = ['crashed', 'error', 'oom', 'invalid', 'skipped', 'ok'];

/** A number in its column's unit; one that the column's decimals would print as 0 keeps a digit. */
function columnNumber(value, column) {
  const scaled = value / column.scale;
  const text = scaled.toLocaleString('en-US', {
    minimumFractionDigits: column.decimals, maximumFractionDigits: column.decimals,
  });
  return scaled !== 0 && !/[1-9]/.test(text) ? scaled.toPrecision(1) : text;
}

/** A number in a unit of its own size, four digits of it. */
function freeNumber(value, unit) {
  if (typeof value !== 'number') return value === null || value === undefined ? 'n/a' : String(value);
  const sizes = { __proto__: null, bytes: [[2 ** 30, 'GiB'], [2 ** 20, 'MiB'], [2 ** 10, 'KiB']], s: [[1, 's'], [1e-3, 'ms'], [1e-6, 'µs']] };
  const [scale, name] = sizes[unit]?.find(([size]) => Math.abs(value) >= size) ?? [1, unit === '1' ? '' : unit ?? ''];
  const scaled = value / scale;
  const text = Number.isInteger(scaled) || Math.abs(scaled) >= 1e4
    ? scaled.toLocaleString('en-US', { maximumFractionDigits: 1 })
    : String(Number(scaled.toPrecision(4)));
  return name ? `${text} ${name}` : text;
}

function statusBadge(status) {
  return element('span', { class: 'badge', 'data-status': status }, `${STATUS_MARKS[status] ?? '?'} ${status}`);
}

/** What the header of a metric's column says when pointed at. */
function metricHelp(column) {
  const way = { lower: 'lower is better', higher: 'higher is better' }[column.better];
  return [column.key, column.formula, way].filter(Boolean).join(' · ');
}

function caseColumn(data, column) {
  const cells = data.cells[column.key];
  const spread = data.spread[column.key];
  const missing = data.missing[column.key] ?? {};
  const metric = column.kind === 'metric';
  return {
    key: column.key, title: column.title, numeric: column.kind !== 'text', span: metric,
    unit: [column.unit, { lower: '↓', higher: '↑' }[column.better]].filter(Boolean).join(' '),
    help: metric ? metricHelp(column) : null,
    value: (row) => (metric && data.status[row] !== 'ok' ? null : cells[row]),
    has: metric ? (row) => data.status[row] === 'ok' && (cells[row] !== null || missing[row] !== undefined) : null,
    fill(cell, row, table) {
      const value = cells[row];
      if (column.kind === 'text') {
        cell.textContent = value ?? '–';
      } else if (value === null) {
        if (missing[row] === undefined) cell.append(element('span', { class: 'missing undefined' }, '–'));
        else table.missing(cell, data.pool[missing[row]]);
      } else if (typeof value !== 'number') {
        cell.textContent = value;
      } else {
        cell.append(element('span', { class: 'value' }, metric ? columnNumber(value, column) : String(value)));
        if (spread) {
          const share = spread[row];
          cell.append(element('span', { class: 'spread', title: 'half the 95 % interval of the mean' },
            share === null ? '' : `±${(100 * share).toFixed(1)} %`));
        }
      }
    },
  };
}

function caseTable(root, data) {
  const name = {
    key: ' name', title: 'Case', numeric: false, value: (row) => data.names[row],
    fill: (cell, row, table) => cell.append(table.opener(row, data.names[row])),
  };
  const status = {
    key: ' status', title: 'Status', numeric: false, value: (row) => STATUS_RANK.indexOf(data.status[row]),
    fill: (cell, row) => cell.append(statusBadge(data.status[row])),
  };
  const others = data.columns.map((column) => caseColumn(data, column));
  const texts = data.columns.filter((column) => column.kind === 'text').map((column) => data.cells[column.key]);
  const detail = (row, label) => data.pool[data.details[row][label]];
  const facets = [{ title: 'Status', value: (row) => data.status[row] }];
  for (const column of data.columns.filter((one) => one.kind === 'text' && !one.key.startsWith('params.'))) {
    facets.push({ title: column.title, value: (row) => data.cells[column.key][row] });
  }
  return new DataTable(root, {
    label: 'Cases of the run', noun: 'cases', rows: data.names.length,
    columns: [name, status, ...others.filter((_, place) => data.columns[place].shown)],
    choices: [status, ...others],
    facets: facets.filter((facet) => {
      const { size } = new Set(data.names.map((_, row) => facet.value(row)));
      return size > 1 && size <= MOST_FACETS;
    }),
    wide: (row) => (data.failure[row] === null ? null : data.pool[data.failure[row]]),
    text: (row) => [data.names[row], data.status[row], ...texts.map((cells) => cells[row] ?? ''),
      data.failure[row] === null ? '' : data.pool[data.failure[row]], ...(detail(row, 'warnings') ?? [])].join('\n'),
    expand: (row) => caseDetails(data, row),
  });
}

/** Everything the page knows about a case. */
function caseDetails(data, row) {
  const entries = Object.entries(data.details[row]).map(([label, place]) => [label, data.pool[place]]);
  const list = element('dl', { class: 'facts' });
  const add = (label, ...content) => list.append(element('dt', {}, label), element('dd', {}, ...content));
  for (const [label, value] of entries) {
    if (label === 'error') {
      add('error', element('strong', {}, `${value.type ?? ''}`), ` ${value.message ?? ''}`);
      if (value.phase) add('phase', String(value.phase));
      if (value.traceback) add('traceback', element('pre', {}, String(value.traceback)));
    } else if (Array.isArray(value)) {
      add(label, element('ul', {}, ...value.map((item) => element('li', {}, plain(item)))));
    } else if (value !== null && typeof value === 'object') {
      const parts = Object.entries(value).filter(([, item]) => item !== null && plain(item) !== '{}');
      if (parts.length) {
        add(label, element('ul', { class: 'pairs' }, ...parts.map(([key, item]) => element('li', {}, `${key} `,
          element('b', {}, label === 'memory' ? memoryText(item) : plain(item))))));
      }
    } else {
      add(label, plain(value));
    }
  }
  if (data.links[row]) add('raw data', element('a', { href: data.links[row].href }, data.links[row].name));
  add('whole record', element('a', { href: './report.json' }, 'report.json'), `, records[${row}]`);
  const table = element('table', { class: 'metrics' }, element('caption', {}, 'All metrics of the case'));
  const body = element('tbody');
  for (const column of data.columns.filter((one) => one.kind === 'metric')) {
    const value = data.cells[column.key][row];
    const reason = data.missing[column.key][row];
    if (value === null && reason === undefined) continue;
    const share = data.spread[column.key]?.[row] ?? null;
    body.append(element('tr', {}, element('th', { scope: 'row', title: column.formula }, column.key),
      value === null
        ? element('td', { class: 'missing' }, `n/a: ${data.pool[reason]}`)
        : element('td', {}, `${columnNumber(value, column)} ${column.unit}`,
          share === null ? '' : element('span', { class: 'spread' }, ` ±${(100 * share).toFixed(1)} %`))));
  }
  table.append(body);
  return element('div', { class: 'details' }, list, body.children.length ? table : null);
}

function plain(value) {
  return typeof value === 'string' ? value : JSON.stringify(value);
}

function memoryText(items) {
  return Object.entries(items ?? {})
    .map(([key, value]) => `${key} ${key.includes('bytes') ? freeNumber(value, 'bytes') : plain(value)}`).join(', ') || 'nothing';
}
