// How long all requests since the start took: the buckets of `leanserve_request_duration_seconds`, one ridge a variant.

import { badge, el, say, svg } from "./dom.js";

const WIDTH = 500;
const HEIGHT = 34;
const AXIS = [0.0001, 0.001, 0.01, 0.1, 1, 10];

const x = (seconds) => (WIDTH * (Math.log10(seconds) + 4)) / 5;
const label = (seconds) => (seconds < 1 ? `${Number((1000 * seconds).toPrecision(3))} ms` : `${seconds} s`);

/** The bucket edges of a distribution, with the share of requests per unit of the logarithmic axis. */
function ridge({ bounds_s: bounds, counts }) {
  const total = counts.reduce((sum, each) => sum + each, 0);
  if (!total) return null;
  const edges = [bounds[0] / 1.5, ...bounds, bounds.at(-1) * 1.5].map(x);
  const heights = counts.map((each, index) => each / total / (edges[index + 1] - edges[index]));
  return { edges, heights, most: Math.max(...heights) };
}

function path({ edges, heights, most }) {
  const y = (height) => (HEIGHT + 2 - (height / most) * (HEIGHT - 2)).toFixed(1);
  const steps = heights.map((height, index) => `L${edges[index].toFixed(1)} ${y(height)}H${edges[index + 1].toFixed(1)}`);
  return `M${edges[0].toFixed(1)} ${HEIGHT + 2}${steps.join("")}V${HEIGHT + 2}Z`;
}

function quantile({ bounds_s: bounds, counts }, share) {
  let left = share * counts.reduce((sum, each) => sum + each, 0);
  if (!left) return null;
  const bucket = counts.findIndex((each) => (left -= each) <= 0);
  return bounds[Math.min(Math.max(bucket, 0), bounds.length - 1)];
}

export class LatencyPlot {
  constructor(place, { variants }) {
    this.rows = new Map();
    const lines = [...variants.values()].map((variant) => this.row(variant));
    const axis = el("div", { class: "axis note", "aria-hidden": "true" }, ...AXIS.map((seconds) => el("span", {}, label(seconds))));
    place.replaceChildren(el("div", { class: "ridges" }, ...lines, el("span"), axis));
  }

  row(variant) {
    const area = svg("path", { class: `area c${variant.colour}` });
    const grid = AXIS.map((seconds) => svg("line", { x1: x(seconds), x2: x(seconds), y1: 0, y2: HEIGHT }));
    const told = el("span", { class: "number note" });
    const picture = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img" }, ...grid, area);
    this.rows.set(variant.name, { area, told, picture });
    return [el("span", { class: "who" }, badge(variant), el("span", { class: "narrow-hides" }, variant.name)), picture, told];
  }

  update(snapshot) {
    for (const { name, latency } of snapshot.variants) {
      const row = this.rows.get(name);
      if (!row) continue;
      const found = latency && ridge(latency);
      row.area.setAttribute("d", found ? path(found) : "");
      const median = found && quantile(latency, 0.5);
      say(row.told, found ? label(median) : "–");
      row.picture.setAttribute("aria-label", found ? `${name}: half within ${label(median)}, 99 % within ${label(quantile(latency, 0.99))}` : `${name}: no answers yet`);
    }
  }
}
