'use strict';

const VERDICT_MARKS = { __proto__: null, regression: '✕', unstable: '≈', worse: '↘', information: 'i', better: '↗', same: '=' };

function changeText(change) {
  if (typeof change !== 'number') return change === null || change === undefined ? '–' : String(change);
  if (change === 0) return '0 %';
  return `${change < 0 ? '−' : '+'}${Math.abs(100 * change).toFixed(2)} %`;
}

function verdictTable(root, data) {
  const text = (key, title) => ({
    key, title, numeric: false, value: (row) => data[key][row],
    fill: (cell, row) => { cell.textContent = data[key][row] ?? '–'; },
  });
  const number = (key, title, shown) => ({
    key, title, numeric: true, value: (row) => data[key][row],
    fill: (cell, row) => { cell.textContent = shown(data[key][row], data.unit[row]); },
  });
  const verdict = {
    ...text('verdict', 'Verdict'),
    fill: (cell, row) => cell.append(element('span', { class: 'badge', 'data-verdict': data.verdict[row] },
      `${VERDICT_MARKS[data.verdict[row]] ?? '?'} ${data.verdict[row]}`)),
  };
  const columns = [text('case', 'Case'), text('metric', 'Metric'), number('base', 'Base', freeNumber),
    number('now', 'Now', freeNumber), number('change', 'Change', changeText), verdict, text('rule', 'Rule'),
    text('note', 'Note')];
  return new DataTable(root, {
    label: 'Verdicts of the comparison', noun: 'verdicts', rows: data.case.length,
    columns: columns.filter((column) => !['rule', 'note'].includes(column.key) || data[column.key].some(Boolean)),
    facets: [{ title: 'Verdict', value: (row) => data.verdict[row] }, { title: 'Metric', value: (row) => data.metric[row] }],
    text: (row) => ['case', 'metric', 'verdict', 'rule', 'note'].map((key) => data[key][row] ?? '').join('\n'),
  });
}
