'use strict';

{
  const data = JSON.parse(document.getElementById('data').textContent);
  const cases = caseTable(document.getElementById('case-table'), data.cases);
  new TradeOff(document.getElementById('plot'), data.cases, (row) => cases.show(row));
  if (data.verdicts) verdictTable(document.getElementById('verdict-table'), data.verdicts);
  // paper opens nothing
  addEventListener('beforeprint', () => document.querySelectorAll('details.part, details.mind').forEach((part) => {
    part.open = true;
  }));
  document.documentElement.dataset.ready = 'yes';
}
