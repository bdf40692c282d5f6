'use strict';

/** Make an element. Children and attributes are text, never markup. */
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith('on')) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value === true ? '' : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

function count(number) {
  return number.toLocaleString('en-US');
}

const NATURAL = new Intl.Collator('en', { numeric: true });
const PRINTED_ROWS = 2000;

/**
 * A table that sorts, filters and shows one page of its rows at a time.
 *
 * columns: [{key, title, unit, help, numeric, span, value(row), has(row), fill(cell, row, table)}]; `value` is what is sorted
 * by, null comes last in both directions; where `has` no row of the view, the column is left out. wide(row): text that stands in place of all columns with `span`. text(row): what the search
 * looks in. facets: [{title, value(row), names}], a select each. expand(row): element below an opened row.
 */
class DataTable {
  constructor(root, { label, noun, rows, columns, text, facets = [], wide = () => null, expand = null, choices = null }) {
    Object.assign(this, { root, noun, rows, columns, visible: columns, wide, expand, choices });
    this.haystack = Array.from({ length: rows }, (_, row) => text(row).toLowerCase());
    this.facets = facets.map((facet) => ({ ...facet, chosen: null }));
    this.words = [];
    this.sort = { key: null, descending: false };
    this.page = 0;
    this.size = 100;
    this.opened = new Set();
    this.build(label);
    this.update();
    addEventListener('beforeprint', () => this.draw(0, PRINTED_ROWS));
    addEventListener('afterprint', () => this.draw());
  }

  build(label) {
    const search = element('input', {
      type: 'search', placeholder: `Filter ${this.noun}`, 'aria-label': `Filter ${this.noun}`, autocomplete: 'off',
      oninput: () => {
        this.words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
        this.update();
      },
    });
    this.sorter = element('select', { onchange: () => this.sortBy(this.sorter.value || null, false) });
    const turn = element('button', {
      type: 'button', 'aria-label': 'Turn the order round', title: 'Turn the order round',
      onclick: () => this.sortBy(this.sort.key, !this.sort.descending),
    }, '⇅');
    const controls = element('div', { class: 'controls' }, search, ...this.facets.map((facet) => this.facet(facet)),
      element('span', { class: 'sorter' }, element('label', {}, 'Sort ', this.sorter), turn));
    if (this.choices) controls.append(this.chooser());
    this.head = element('tr', { role: 'row' });
    this.body = element('tbody', { role: 'rowgroup' });
    this.state = element('p', { class: 'state', role: 'status', 'aria-live': 'polite' });
    this.notes = element('ol', { class: 'footnotes' });
    this.pager = element('nav', { class: 'pager', 'aria-label': `Pages of ${this.noun}` });
    this.root.replaceChildren(
      controls,
      this.state,
      element('div', { class: 'scroll', tabindex: '0', role: 'region', 'aria-label': label },
        element('table', { role: 'table' },
          element('caption', { class: 'unseen' }, label),
          element('thead', { role: 'rowgroup' }, this.head), this.body)),
      this.pager, this.notes);
  }

  facet(facet) {
    const counts = new Map();
    for (let row = 0; row < this.rows; row += 1) counts.set(facet.value(row), (counts.get(facet.value(row)) ?? 0) + 1);
    const select = element('select', {
      'aria-label': facet.title,
      onchange: () => {
        facet.chosen = select.selectedIndex === 0 ? null : [...counts.keys()][select.selectedIndex - 1];
        this.update();
      },
    }, element('option', {}, `${facet.title}: all`));
    for (const [value, found] of counts) {
      select.append(element('option', {}, `${facet.names ? facet.names(value) : value ?? 'none'} (${count(found)})`));
    }
    return select;
  }

  chooser() {
    const list = element('div', { class: 'choices' });
    for (const column of this.choices) {
      const box = element('input', {
        type: 'checkbox', checked: this.columns.includes(column),
        onchange: () => {
          const wanted = new Set(box.checked ? [...this.columns, column] : this.columns.filter((other) => other !== column));
          this.columns = [this.columns[0], ...this.choices.filter((other) => wanted.has(other))];
          this.update();
        },
      });
      list.append(element('label', { title: column.help }, box, ` ${column.title}`));
    }
    return element('details', { class: 'chooser' }, element('summary', {}, 'Columns'), list);
  }

  drawHead() {
    this.visible = this.columns.filter((column) => !column.has || this.view.some(column.has));
    this.head.replaceChildren(...this.visible.map((column) => {
      const sorted = this.sort.key === column.key;
      const mark = sorted ? (this.sort.descending ? '▼' : '▲') : '';
      return element('th', {
        scope: 'col', role: 'columnheader', class: column.numeric ? 'number' : null,
        'aria-sort': sorted ? (this.sort.descending ? 'descending' : 'ascending') : 'none',
      }, element('button', { type: 'button', title: column.help, onclick: () => this.cycle(column.key) },
        column.title, element('span', { class: 'mark', 'aria-hidden': 'true' }, mark),
        column.unit ? element('small', {}, column.unit) : null));
    }));
    this.sorter.replaceChildren(element('option', { value: '' }, 'as run'),
      ...this.visible.map((column) => element('option', { value: column.key }, column.title)));
    this.sorter.value = this.sort.key ?? '';
  }

  /** Ascending, descending, the run's own order. */
  cycle(key) {
    if (this.sort.key !== key) this.sortBy(key, false);
    else if (!this.sort.descending) this.sortBy(key, true);
    else this.sortBy(null, false);
    this.head.children[this.visible.findIndex((column) => column.key === key)].querySelector('button').focus();
  }

  sortBy(key, descending) {
    this.sort = { key, descending };
    this.update();
  }

  update() {
    const kept = [];
    for (let row = 0; row < this.rows; row += 1) {
      if (this.facets.every((facet) => facet.chosen === null || facet.value(row) === facet.chosen)
        && this.words.every((word) => this.haystack[row].includes(word))) kept.push(row);
    }
    const column = this.columns.find((one) => one.key === this.sort.key);
    if (column) {
      const keys = new Array(this.rows);
      for (const row of kept) keys[row] = column.value(row) ?? null;
      const way = this.sort.descending ? -1 : 1;
      kept.sort((a, b) => {
        const [one, other] = [keys[a], keys[b]];
        if (one === null || other === null) return (one === null) - (other === null) || a - b;
        const order = typeof one === 'number' && typeof other === 'number' ? one - other : NATURAL.compare(one, other);
        return way * order || a - b;
      });
    }
    this.view = kept;
    this.page = 0;
    this.drawHead();
    this.draw();
  }

  /** Bring a row onto the page, opened. */
  show(row) {
    if (!this.view.includes(row)) {
      this.words = [];
      this.facets.forEach((facet) => { facet.chosen = null; });
      this.root.querySelectorAll('.controls > select').forEach((select) => { select.selectedIndex = 0; });
      this.root.querySelector('input[type=search]').value = '';
      this.update();
    }
    this.page = Math.floor(this.view.indexOf(row) / this.size);
    this.opened.add(row);
    this.draw();
    const opener = this.body.querySelector(`tr[data-row="${row}"] button`);
    opener.scrollIntoView({ block: 'center' });
    opener.focus();
  }

  draw(page = this.page, size = this.size) {
    this.reasons = new Map();
    const first = page * size;
    const shown = this.view.slice(first, first + size);
    const made = [];
    for (const row of shown) {
      made.push(this.line(row));
      if (this.opened.has(row)) {
        made.push(element('tr', { class: 'opened', role: 'row' },
          element('td', { colspan: this.visible.length, role: 'cell' }, this.expand(row))));
      }
    }
    if (!shown.length) {
      made.push(element('tr', { role: 'row' },
        element('td', { colspan: this.visible.length, class: 'wide', role: 'cell' }, `No ${this.noun} match.`)));
    }
    this.body.replaceChildren(...made);
    this.notes.replaceChildren(...Array.from(this.reasons.keys(), (reason) => element('li', {}, reason)));
    const some = this.view.length === this.rows ? '' : ` (of ${count(this.rows)})`;
    const range = shown.length === this.view.length ? '' : `${count(first + 1)}–${count(first + shown.length)} of `;
    this.state.textContent = `${range}${count(this.view.length)} ${this.noun}${some}`;
    this.drawPager();
  }

  line(row) {
    const wide = this.wide(row);
    const cells = [];
    for (const column of this.visible) {
      const cell = element(cells.length ? 'td' : 'th', {
        scope: cells.length ? null : 'row', role: cells.length ? 'cell' : 'rowheader',
        class: column.numeric ? 'number' : null, 'data-label': column.unit ? `${column.title}, ${column.unit}` : column.title,
      });
      cells.push(cell);
      if (wide !== null && column.span) {
        cell.setAttribute('class', 'wide');
        cell.removeAttribute('data-label');
        cell.setAttribute('colspan', this.visible.length - cells.length + 1);
        cell.textContent = wide;
        break;
      }
      column.fill(cell, row, this);
    }
    return element('tr', { 'data-row': row, role: 'row' }, ...cells);
  }

  /** A button that opens the row, with `text` on it. */
  opener(row, text) {
    return element('button', {
      type: 'button', class: 'opener', 'aria-expanded': String(this.opened.has(row)),
      onclick: () => {
        if (!this.opened.delete(row)) this.opened.add(row);
        this.draw();
        this.body.querySelector(`tr[data-row="${row}"] button`).focus();
      },
    }, text);
  }

  /** Why a cell is empty: a number, explained below the table. */
  missing(cell, reason) {
    if (!this.reasons.has(reason)) this.reasons.set(reason, this.reasons.size + 1);
    cell.append(element('span', { class: 'missing' }, 'n/a', element('sup', {}, String(this.reasons.get(reason)))));
  }

  drawPager() {
    const last = Math.max(0, Math.ceil(this.view.length / this.size) - 1);
    this.pager.hidden = last === 0;
    const go = (name, page) => element('button', {
      type: 'button', disabled: page < 0 || page > last || page === this.page,
      onclick: () => { this.page = page; this.draw(); },
    }, name);
    this.pager.replaceChildren(go('« First', 0), go('‹ Previous', this.page - 1),
      element('span', {}, `Page ${count(this.page + 1)} of ${count(last + 1)}`),
      go('Next ›', this.page + 1), go('Last »', last));
  }
}
