// The table of answers: what every variant says of one input, how sure it is, how long it took, and who differs.

import { badge, el, find, number, percent, say } from "./dom.js";

const cosine = (one, other) => {
  const dot = (left, right) => left.reduce((sum, value, index) => sum + value * right[index], 0);
  return dot(one, other) / Math.sqrt(dot(one, one) * dot(other, other));
};
const flat = (value) => (Array.isArray(value) ? value.flatMap(flat) : [value]);
const HOW = new Set(["variant", "queue_ms", "inference_ms", "batch_rows", "image"]);
const clipped = (text) => (text.length > 160 ? `${text.slice(0, 160)}…` : text);

/** What is read of an answer: in words, how sure it is (0..1, or null), and whether it is that of the base. */
function reading(answer, base) {
  const row = answer.predictions?.[0] ?? answer, first = base?.predictions?.[0] ?? base;
  const more = answer.predictions?.length > 1 ? ` (and ${answer.predictions.length - 1} more rows)` : "";
  if (row.label !== undefined && row.label !== null) {
    const [[, sure] = [], second] = Object.entries(row.scores ?? {}).sort((one, other) => other[1] - one[1]);
    const then = second && second[1] >= 0.005 ? `then ${second[0]}, ${percent(second[1], 1)}` : "";
    return { text: row.label + more, note: then, sure: sure ?? null, same: !first || first.label === row.label };
  }
  if (row.embedding) {
    const near = first?.embedding ? cosine(row.embedding, first.embedding) : 1;
    return { text: `${row.embedding.length} numbers${more}`, note: `cosine to the base ${near.toFixed(4)}`, sure: null, same: near >= 0.99 };
  }
  const told = row.outputs ?? Object.fromEntries(Object.entries(row).filter(([name]) => !HOW.has(name)));
  const theirs = first?.outputs ?? first ?? told;
  const apart = Object.entries(told).flatMap(([name, value]) => {
    const ours = flat(value), base = flat(theirs[name]);
    return ours.map((each, index) => (typeof each === "number" ? Math.abs(each - base[index]) : each === base[index] ? 0 : Infinity));
  });
  const most = Math.max(0, ...apart), size = Math.max(1e-9, ...Object.values(theirs).flatMap(flat).map((each) => Math.abs(Number(each)) || 0));
  return { text: clipped(JSON.stringify(told)) + more, note: first ? `largest difference ${number(most)}` : "", sure: null, same: !(most > 0.05 * size), long: true };
}

const everyone = (count) => (count === 2 ? "Both variants" : `All ${count} variants`);

export class Answers {
  constructor(place, { variants, report }) {
    this.said = find(".said", place);
    this.cheapest = report?.variants.find((variant) => variant.cheapest)?.name;
    this.rows = new Map();
    find("tbody", place).replaceChildren(...[...variants.values()].map((variant) => this.row(variant)));
  }

  row(variant) {
    const cells = ["answer", "sure", "number", "number"].map((kind) => el("td", { class: kind }));
    cells[0].append(el("b"), el("small"));
    cells[1].append(el("span", { class: "track", "aria-hidden": "true", hidden: true }, el("i")), el("span", { class: "number" }));
    const pill = variant.name === this.cheapest ? el("em", { class: "pill good" }, "cheapest") : null;
    const line = el("tr", {}, el("th", { scope: "row" }, el("span", { class: "who" }, badge(variant), el("span", {}, variant.name)), pill), ...cells);
    this.rows.set(variant.name, { line, cells });
    return line;
  }

  /** Begin anew: what is there is grey until the variants have answered. */
  waiting(text) {
    say(this.said, text);
    this.told = new Map();
    for (const { line } of this.rows.values()) line.className = "old";
  }

  clear(text) {
    this.waiting(text);
    for (const { cells } of this.rows.values()) {
      [find("b", cells[0]), find("small", cells[0]), find(".number", cells[1]), cells[2], cells[3]].forEach((cell) => say(cell, ""));
      find(".track", cells[1]).hidden = true;
    }
  }

  show(name, { answer, ms }) {
    this.base ??= name;
    const first = this.told.size ? [...this.told.values()][0].answer : null;
    const read = reading(answer, first);
    this.told.set(name, { answer, read });
    const { line, cells } = this.rows.get(name);
    line.className = read.same ? "" : "differs";
    cells[0].classList.toggle("long", Boolean(read.long));
    say(find("b", cells[0]), read.text);
    say(find("small", cells[0]), read.same ? read.note : ["differs from the base", read.note].filter(Boolean).join(" · "));
    find(".track", cells[1]).hidden = read.sure === null;
    find("i", cells[1]).style.setProperty("--size", String(read.sure ?? 0));
    say(find(".number", cells[1]), read.sure === null ? "" : percent(read.sure, 1));
    say(cells[2], number(answer.inference_ms));
    say(cells[3], number(ms));
  }

  /** A variant that is not asked, as it does not serve. */
  away(name, state) {
    const { line, cells } = this.rows.get(name);
    line.className = "away";
    say(find("small", cells[0]), state);
  }

  refused(name, error) {
    const { line, cells } = this.rows.get(name);
    line.className = "differs";
    say(find("b", cells[0]), "–");
    say(find("small", cells[0]), error.message);
  }

  done() {
    const all = [...this.told.values()];
    const same = all.filter(({ read }) => read.same).length;
    const answer = all[0]?.read;
    if (!answer) say(this.said, "No variant answered.");
    else if (answer.long || answer.sure === null) say(this.said, all.length === 1 ? "It answered." : same === all.length ? `${everyone(all.length)} agree.` : `${same} of ${all.length} variants agree with the base.`);
    else say(this.said, same === all.length ? all.length === 1 ? `It says ${answer.text}.` : `${everyone(all.length)} say ${answer.text}.` : `${same} of ${all.length} variants say ${answer.text}, as the base does.`);
  }
}
