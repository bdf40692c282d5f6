'use strict';

/** Position of a value between two ends; logarithmic where the values lie more than a factor of 30 apart. */
function scale(values, from, to) {
  let [low, high] = values.reduce(([a, b], value) => [Math.min(a, value), Math.max(b, value)], [Infinity, -Infinity]);
  if (!values.length) [low, high] = [0, 1];
  const log = low > 0 && high / low > 30;
  const turn = log ? Math.log10 : (value) => value;
  let [begin, end] = [turn(low), turn(high)];
  const room = (end - begin) * 0.06 || Math.abs(begin) * 0.1 || 1;
  [begin, end] = [low >= 0 && !log ? Math.max(0, begin - room) : begin - room, end + room];
  const place = (value) => from + ((turn(value) - begin) / (end - begin)) * (to - from);
  place.log = log;
  place.ticks = (wanted) => {
    const found = [];
    if (log) {
      const bases = end - begin > 3 ? [1] : [1, 2, 5];
      for (let power = Math.floor(begin); power <= Math.ceil(end); power += 1) found.push(...bases.map((base) => base * 10 ** power));
    } else {
      const rough = (end - begin) / wanted;
      const power = 10 ** Math.floor(Math.log10(rough));
      const step = [1, 2, 5, 10].map((base) => base * power).find((one) => one >= rough);
      for (let index = Math.ceil(begin / step); index * step <= end; index += 1) found.push(index * step);
    }
    return found.filter((tick) => turn(tick) >= begin && turn(tick) <= end);
  };
  return place;
}

function tickText(tick) {
  return Math.abs(tick) >= 1e6 || (tick !== 0 && Math.abs(tick) < 1e-4) ? tick.toExponential(0)
    : Number(tick.toPrecision(6)).toLocaleString('en-US', { maximumFractionDigits: 6 });
}
