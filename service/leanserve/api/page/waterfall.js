// What each pass of one variant brought: throughput over the base's as bars, answers as a line of numbers.

import { bytes, el, find, number, percent, say, times } from "./dom.js";

export class Waterfall {
  constructor(section, { report, variants }) {
    this.title = find("h2", section);
    this.place = find("div", section);
    this.yardstick = report?.yardstick;
    this.measured = new Map((report?.variants ?? []).map((variant) => [variant.name, variant]));
    this.variants = variants;
  }

  show(name) {
    const variant = this.measured.get(name);
    say(this.title, `${name}, pass by pass`);
    if (!variant) {
      this.place.replaceChildren(el("p", { class: "note" }, "Nothing was measured of it."));
      return;
    }
    const most = Math.max(...variant.steps.map((step) => step.gain));
    const lines = variant.steps.map((step, index) => this.step(step, variant.steps[index - 1], most));
    this.place.replaceChildren(
      el("table", { class: "waterfall" },
        el("caption", { class: "unseen" }, `Throughput and ${this.yardstick.name} after each pass of ${name}`),
        el("thead", {}, el("tr", {}, ...["after", "throughput", this.yardstick.name, "size"].map((title, index) => el("th", { scope: "col", class: ["", "", "number", "number minor"][index] }, title)))),
        el("tbody", {}, ...lines)),
      el("p", { class: "note" }, `${times(variant.gain)} the throughput of the base (${number(variant.gain_low)} to ${number(variant.gain_high)}), ${number(variant.throughput)} rows per second; built in ${number(variant.build_s)} s.${variant.simulated ? " A part of the gain is simulated." : ""}`),
    );
  }

  step(step, before, most) {
    const from = before ? before.gain / most : 0;
    const to = step.gain / most;
    const bar = el("i", { class: !before ? "base" : to >= from ? "good" : "bad" });
    bar.style.setProperty("--from", String(Math.min(from, to)));
    bar.style.setProperty("--size", String(Math.max(0.004, Math.abs(to - from))));
    const value = step.value === null ? "–" : percent(step.value / 100, 2);
    return el("tr", {},
      el("th", { scope: "row" }, step.label),
      el("td", { class: "gained" }, el("div", { class: "step" }, el("span", { class: "track", "aria-hidden": "true" }, bar), el("b", {}, times(step.gain)))),
      el("td", { class: "number" }, value),
      el("td", { class: "number minor" }, bytes(step.disk_bytes)));
  }
}
