// The table of all variants, live: one row each, made once, its cells told anew every second.

import { badge, bytes, count, el, find, money, number, percent, say, times } from "./dom.js";

const ms = (value) => number(value);
const score = (quality) => (quality?.score ?? quality?.agreement ?? null);

const COLUMNS = [
  { title: "share", meaning: "of the requests that name no variant", read: (v) => percent(v.share) },
  { title: "req/s", meaning: "requests per second", read: (v) => number(v.requests.per_s) },
  { title: "failed", meaning: "requests refused or failed since the start", read: (v) => count(v.requests.failed), minor: true },
  { title: "p50 ms", meaning: "median time in the service", read: (v) => ms(v.latency_ms?.p50) },
  { title: "p95 ms", meaning: "95 % are answered faster", read: (v) => ms(v.latency_ms?.p95) },
  { title: "p99 ms", meaning: "99 % are answered faster", read: (v) => ms(v.latency_ms?.p99), minor: true },
  { title: "busy", meaning: "share of the device's time", read: (v) => percent(v.utilisation, 1), bar: (v) => v.utilisation },
  { title: "queue", meaning: "rows that wait now", read: (v) => count(v.queue.rows), minor: true },
  { title: "batch", meaning: "mean rows per batch", read: (v) => number(v.batch.rows_mean), minor: true },
  { title: "ms/row", meaning: "milliseconds of the device per row, since the start", read: (v) => ms(v.device_ms_per_row), minor: true },
  { title: "quality", meaning: "score on the gate split, else agreement with the base", read: (v) => percent(score(v.quality), 2) },
  { title: "gain", meaning: "throughput over the base's, as measured", read: (v) => times(v.quality?.speedup) },
  { title: "size", meaning: "on disk", read: (v) => bytes(v.size_bytes) },
  { title: "memory", meaning: "at its peak, as measured", read: (v) => bytes(v.memory_bytes), minor: true },
];
const JOULES = { title: "mJ/row", meaning: "millijoules per row", read: (v) => number(v.joules_per_row === null ? null : 1000 * v.joules_per_row) };
const cost = (currency) => ({ title: "per million", meaning: "cost of a million answers", read: (v) => money(v.cost?.per_million, currency) });

export class VariantTable {
  constructor(table, { variants, report }, chosen) {
    this.table = table;
    this.variants = variants;
    this.cheapest = report?.variants.find((variant) => variant.cheapest)?.name;
    this.chosen = chosen;
    this.columns = null;
    this.rows = new Map();
  }

  choose(name) {
    this.selected = name;
    this.chosen(name);
    for (const [other, row] of this.rows) {
      find("button", row.line).setAttribute("aria-pressed", String(other === name));
      row.line.classList.toggle("chosen", other === name);
    }
  }

  update(snapshot) {
    if (!this.columns) this.build(snapshot);
    for (const variant of snapshot.variants) {
      const row = this.rows.get(variant.name);
      if (!row) continue;
      say(row.state, variant.state === "serving" ? "" : variant.state);
      row.state.title = variant.reason ?? "";
      row.line.classList.toggle("away", variant.state !== "serving");
      this.columns.forEach((column, index) => {
        say(row.cells[index].firstChild, column.read(variant));
        if (column.bar) row.cells[index].style.setProperty("--bar", String(Math.min(1, column.bar(variant) ?? 0)));
      });
    }
  }

  build(snapshot) {
    const extra = [
      ...(snapshot.variants.some((variant) => variant.joules_per_row !== null) ? [JOULES] : []),
      ...(snapshot.price_per_hour !== null ? [cost(snapshot.currency)] : []),
    ];
    this.columns = [...COLUMNS, ...extra];
    const heads = this.columns.map(({ title, meaning }) => el("th", { scope: "col", class: "number" }, el("abbr", { title: meaning }, title)));
    const body = el("tbody");
    for (const { name } of snapshot.variants) body.append(this.row(this.variants.get(name)));
    this.table.replaceChildren(
      el("caption", { class: "unseen" }, "Every variant: its traffic, speed, load and quality"),
      el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "variant"), ...heads)),
      body,
    );
    this.choose(this.selected);
  }

  row(variant) {
    const cells = this.columns.map(({ title, bar, minor }) => el("td", { class: bar ? "number bar" : minor ? "number minor" : "number", "data-title": title }, el("span")));
    const state = el("em", { class: "state" });
    const pill = variant.name === this.cheapest ? el("em", { class: "pill good" }, "cheapest") : null;
    const button = el("button", { type: "button", class: "who", onclick: () => this.choose(variant.name) }, badge(variant), el("span", {}, variant.name));
    const line = el("tr", {}, el("th", { scope: "row" }, button, pill, state), ...cells);
    this.rows.set(variant.name, { line, cells, state });
    return line;
  }
}
