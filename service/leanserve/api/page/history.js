// Three charts of the last minutes: what every variant answers, how fast, and how busy it keeps the device.

import { badge, colour, el, find, number } from "./dom.js";

const SECONDS = 180;
const LEAST_SECONDS = 60;
const HEIGHT = 168;
const CHARTS = [
  { title: "Requests per second", read: (variant) => variant.requests.per_s },
  { title: "p95, ms", read: (variant) => variant.latency_ms?.p95 ?? null },
  { title: "Device busy, %", read: (variant) => 100 * variant.utilisation },
];

export class History {
  constructor(section, { variants }) {
    this.variants = [...variants.values()];
    this.hidden = new Set();
    this.at = [];
    this.past = CHARTS.map(() => this.variants.map(() => []));
    const places = CHARTS.map(({ title }) => el("figure", { class: "card" }, el("figcaption", {}, title), el("div", { class: "plot", role: "img" })));
    find(".charts", section).replaceChildren(...places);
    this.places = places.map((figure) => find(".plot", figure));
    this.legend(find(".legend", section));
    this.watch = new ResizeObserver(() => this.resize());
    this.watch.observe(section);
    this.recolour();
  }

  end() {
    this.watch.disconnect();
    this.plots.forEach((plot) => plot.destroy());
  }

  legend(place) {
    place.replaceChildren(...this.variants.map((variant, index) => {
      const button = el("button", { type: "button", "aria-pressed": "true" }, badge(variant), variant.name);
      button.addEventListener("click", () => this.toggle(index, button));
      return button;
    }));
  }

  toggle(index, button) {
    const shown = this.hidden.delete(index) || !this.hidden.add(index);
    button.setAttribute("aria-pressed", String(shown));
    this.plots.forEach((plot) => plot.setSeries(index + 1, { show: shown }));
  }

  update(snapshot) {
    this.at.push(snapshot.at);
    const first = this.at.findIndex((at) => at > snapshot.at - SECONDS);
    this.at.splice(0, first);
    const told = new Map(snapshot.variants.map((variant) => [variant.name, variant]));
    CHARTS.forEach(({ read }, chart) => this.variants.forEach(({ name }, index) => {
      const values = this.past[chart][index];
      values.push(told.has(name) ? read(told.get(name)) : null);
      values.splice(0, first);
    }));
    this.draw();
  }

  draw() {
    const now = this.at.at(-1) ?? Date.now() / 1000;
    this.plots.forEach((plot, chart) => {
      plot.setData([this.at, ...this.past[chart]], false);
      const most = Math.max(0, ...this.past[chart].flatMap((values, index) => (this.hidden.has(index) ? [] : values.map((value) => value ?? 0))));
      plot.batch(() => {
        plot.setScale("x", { min: Math.max(now - SECONDS, Math.min(this.at[0] ?? now, now - LEAST_SECONDS)), max: now });
        plot.setScale("y", { min: 0, max: most * 1.1 || 1 });
      });
      this.places[chart].setAttribute("aria-label", this.described(chart));
    });
  }

  described(chart) {
    const last = this.variants.map(({ name }, index) => `${name} ${number(this.past[chart][index].at(-1))}`);
    return `${CHARTS[chart].title}, now: ${last.join(", ")}`;
  }

  /** The charts anew, in the colours of the page as it is now: a canvas does not follow the style sheet. */
  recolour() {
    this.plots?.forEach((plot) => plot.destroy());
    this.plots = this.places.map((place, chart) => new uPlot(this.options(place.clientWidth, chart), [this.at, ...this.variants.map(() => [])], place));
    this.draw();
  }

  options(width, chart) {
    const axis = { stroke: colour("muted"), grid: { stroke: colour("line"), width: 1 }, ticks: { show: false }, font: "11px system-ui, sans-serif" };
    const clock = (_, splits) => splits.map((at) => new Date(at * 1000).toLocaleTimeString("en-GB"));
    const rounded = (_, splits) => splits.map((value) => String(Number(value.toPrecision(3))));
    return {
      width,
      height: HEIGHT,
      padding: [8, 8, 0, 0],
      legend: { show: false },
      cursor: { points: { size: 5 }, drag: { x: false, y: false }, sync: { key: "history" } },
      scales: { x: { time: true, auto: false }, y: { auto: false } },
      axes: [{ ...axis, values: clock, size: 26, space: 90 }, { ...axis, size: 44, values: rounded }],
      series: [{}, ...this.variants.map((variant, index) => ({
        label: variant.name, stroke: colour(`c${variant.colour}`), width: 1.75, spanGaps: false, points: { show: chart === 1, size: 3 }, show: !this.hidden.has(index),
      }))],
    };
  }

  resize() {
    this.plots.forEach((plot, chart) => {
      const width = this.places[chart].clientWidth;
      if (width && width !== plot.width) plot.setSize({ width, height: HEIGHT });
    });
  }
}
