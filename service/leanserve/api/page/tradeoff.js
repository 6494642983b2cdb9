// Answers against cost: the variants that nothing beats in both are joined by a line (the Pareto front).

import { el, find, money, number, svg } from "./dom.js";

const WIDTH = 420;
const HEIGHT = 280;
const LEFT = 52, RIGHT = 16, TOP = 14, BOTTOM = 36;

/** A scale from values to pixels, with some air at both ends, and round numbers on it. */
function scale(values, from, to, logarithmic = false) {
  const by = logarithmic ? Math.log : (value) => value;
  const low = Math.min(...values.map(by)), high = Math.max(...values.map(by));
  const air = (high - low) * 0.12 || Math.abs(high) * 0.05 || 1;
  const place = (value) => from + ((by(value) - (low - air)) / (high - low + 2 * air)) * (to - from);
  const back = logarithmic ? Math.exp : (value) => value;
  place.ticks = ticks(back(low - air), back(high + air), logarithmic);
  return place;
}

function ticks(low, high, logarithmic) {
  if (logarithmic && high / low > 3) {
    const powers = Array.from({ length: 14 }, (_, index) => 10 ** (index - 6));
    const told = (...parts) => powers.flatMap((power) => parts.map((part) => part * power)).filter((value) => value >= low && value <= high);
    return [told(1, 2, 5), told(1, 3), told(1)].find((values) => values.length <= 6) ?? told(1);
  }
  const rough = (high - low) / 4, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((times) => times * power).find((size) => size >= rough);
  const first = Math.ceil(low / step);
  return Array.from({ length: Math.floor(high / step) - first + 1 }, (_, index) => Number(((first + index) * step).toPrecision(8)));
}

/** Those that no other beats in answers at the same or a lower cost, the cheapest first. */
function front(points) {
  const ordered = [...points].sort((one, other) => one.cost - other.cost || other.value - one.value);
  let best = -Infinity;
  return ordered.filter((point) => point.value > best && ((best = point.value), true));
}

export class Tradeoff {
  constructor(section, { report, variants }) {
    this.title = find("h2", section);
    this.place = find("div", section);
    this.variants = variants;
    this.yardstick = report?.yardstick;
    this.measured = (report?.variants ?? []).filter((variant) => variant.value !== null);
    this.drawn = "";
  }

  update(snapshot) {
    const live = new Map(snapshot.variants.map((variant) => [variant.name, variant]));
    const priced = snapshot.price_per_hour !== null && this.measured.every(({ name }) => live.get(name)?.cost || !live.has(name));
    const axis = priced ? `${snapshot.currency} per million answers, as served` : "ms per row at its best batch, as measured";
    const points = this.measured
      .filter(({ name }) => this.variants.has(name))
      .map((variant) => ({ ...variant, ...this.variants.get(variant.name), cost: priced ? live.get(variant.name)?.cost?.per_million : 1000 / variant.throughput }))
      .filter(({ cost }) => Number.isFinite(cost) && cost > 0);
    const told = JSON.stringify([axis, points.map(({ name, cost }) => [name, cost.toPrecision(3)])]);
    if (told === this.drawn) return;
    this.drawn = told;
    const text = (cost) => (priced ? money(cost, snapshot.currency) : number(cost));
    this.place.replaceChildren(points.length ? this.picture(points, axis, text) : el("p", { class: "note" }, "Nothing was measured."));
  }

  picture(points, axis, text) {
    const floor = this.yardstick.floor;
    const ends = points.flatMap(({ value, value_low: low, value_high: high }) => [value, low ?? value, high ?? value]);
    const across = scale(points.map(({ cost }) => cost), LEFT, WIDTH - RIGHT, true);
    const up = scale(floor === null ? ends : [...ends, floor], HEIGHT - BOTTOM, TOP);
    const short = (value) => text(value).replace(/(\.\d*?)0+$/, "$1").replace(/\.$/, "");
    const facts = points.map(({ name, value, cost }) => `${name} ${number(value)} % at ${text(cost)}`).join("; ");
    return svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", class: "tradeoff", "aria-label": `${this.yardstick.name} against ${axis}: ${facts}` },
      ...across.ticks.map((value) => this.tick(across(value), HEIGHT - BOTTOM + 16, "middle", short(value), { x1: across(value), x2: across(value), y1: TOP, y2: HEIGHT - BOTTOM })),
      ...up.ticks.map((value) => this.tick(LEFT - 6, up(value) + 4, "end", String(value), { x1: LEFT, x2: WIDTH - RIGHT, y1: up(value), y2: up(value) })),
      svg("text", { x: WIDTH - RIGHT, y: HEIGHT - 4, "text-anchor": "end" }, `${axis} (left is cheaper)`),
      svg("text", { x: 4, y: 10 }, `${this.yardstick.name} %`),
      floor === null ? null : svg("line", { class: "floor", x1: LEFT, x2: WIDTH - RIGHT, y1: up(floor), y2: up(floor) }),
      svg("polyline", { class: "front", points: front(points).map(({ cost, value }) => `${across(cost)},${up(value)}`).join(" ") }),
      ...points.filter(({ value_low: low }) => low !== null).map((point) => svg("line", { class: `interval c${point.colour}`, x1: across(point.cost), x2: across(point.cost), y1: up(point.value_low), y2: up(point.value_high) })),
      ...apart(points, across, up).map(({ point, x, y }) => svg("g", { class: `mark c${point.colour}`, transform: `translate(${x} ${y})` },
        svg("title", {}, `${point.name}: ${number(point.value)} % at ${text(point.cost)}`), svg("circle", { r: 10 }), svg("text", { y: 4, "text-anchor": "middle" }, String(point.number || "B")))));
  }

  tick(x, y, anchor, text, line) {
    return svg("g", { class: "tick" }, svg("line", line), svg("text", { x, y, "text-anchor": anchor }, text));
  }
}

/** Where the marks are drawn: those that would lie on each other are moved up and down until all can be read. */
function apart(points, across, up) {
  const placed = [];
  for (const point of [...points].sort((one, other) => one.cost - other.cost)) {
    const x = across(point.cost), wanted = up(point.value);
    const free = (y) => placed.every((other) => Math.hypot(other.x - x, other.y - y) >= 20);
    const offsets = Array.from({ length: 40 }, (_, index) => (index % 2 ? 1 : -1) * Math.ceil(index / 2) * 5);
    const y = wanted + (offsets.find((offset) => free(wanted + offset) && wanted + offset > TOP && wanted + offset < HEIGHT - BOTTOM) ?? 0);
    placed.push({ point, x, y });
  }
  return placed;
}
