// The experiment: how sure each question is by now, the ramp, and the verbs to start, promote and abort.

import { badge, count, el, find, money, number, percent, say, svg } from "./dom.js";
import { get, post } from "./service.js";

const EVERY_MS = 2000;
const WIDTH = 240;
const HEIGHT = 52;
const STATES = { running: "accent", promoted: "good", rejected: "bad", aborted: "muted", inconclusive: "warn" };
const ANSWERS = { passed: "good", failed: "bad", open: "muted" };
const GO_ON = new Set(["keep_looking", null, undefined]);

const time = (at) => new Date(1000 * at).toLocaleTimeString("en-GB");
const shown = (value, unit) => (value === null ? "?" : unit === "share" ? percent(value, value > 0.9 || value < 0.1 ? 2 : 1) : `${number(value)}×`);

/** The interval of one question after every look, the limit, and the side on which it passes. */
function band(question, series) {
  const points = series.map(({ requests, questions }) => [requests, ...(questions[question.question] ?? [null, null, null])]).filter(([, , low, high]) => low !== null || high !== null);
  const known = points.flatMap(([, estimate, low, high]) => [estimate, low, high]).filter((value) => value !== null);
  const settled = points.slice(-Math.ceil(points.length * 0.8)).flatMap(([, , low, high]) => [low, high]).filter((value) => value !== null);
  const isShare = question.unit === "share";
  const bottom = question.good === "above" ? Math.min(question.limit - 0.02, ...settled) : 0;
  const top = question.good === "above" && isShare ? 1 : Math.max(question.limit * 1.5, ...settled);
  const y = (value) => HEIGHT - 2 - (Math.min(top, Math.max(bottom, value)) - bottom) / (top - bottom || 1) * (HEIGHT - 4);
  const last = points.at(-1)?.[0] || 1;
  const x = (requests) => (requests / last) * (WIDTH - 4) + 1;
  const high = points.map(([requests, , , value]) => `${x(requests).toFixed(1)},${y(value ?? top).toFixed(1)}`);
  const low = points.map(([requests, , value]) => `${x(requests).toFixed(1)},${y(value ?? bottom).toFixed(1)}`).reverse();
  const middle = points.filter(([, estimate]) => estimate !== null).map(([requests, estimate]) => `${x(requests).toFixed(1)},${y(estimate).toFixed(1)}`);
  const limit = y(question.limit);
  const allowed = question.good === "above" ? { y: 0, height: limit } : { y: limit, height: HEIGHT - limit };
  return svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: `band ${ANSWERS[question.answer]}`, preserveAspectRatio: "none", "aria-hidden": "true" },
    svg("rect", { class: "allowed", x: 0, width: WIDTH, ...allowed }),
    known.length ? svg("polygon", { class: "sure", points: [...high, ...low].join(" ") }) : null,
    known.length ? svg("polyline", { class: "middle", points: middle.join(" ") }) : null,
    svg("line", { class: "limit", x1: 0, x2: WIDTH, y1: limit, y2: limit }));
}

export class Experiment {
  constructor(place, { report, variants }) {
    this.place = place;
    this.variants = variants;
    this.cheapest = report?.variants.find((variant) => variant.cheapest)?.name;
    this.told = "";
    this.open = new Set();
    this.ask();
    this.timer = setInterval(() => this.ask(), EVERY_MS);
  }

  end() { clearInterval(this.timer); }

  update({ currency }) { this.currency = currency; }

  async ask() {
    if (document.hidden) return;
    const told = await get("v1/experiment").catch((error) => ({ error }));
    if (told.error) this.place.replaceChildren(el("p", { class: "note" }, told.error.message));
    else this.show(told);
  }

  async act(verb, body, button) {
    button.disabled = true;
    try { this.show(await post(`v1/experiment/${verb}`, body)); }
    catch (error) { say(this.error, error.message); }
    button.disabled = false;
  }

  /** Show the document; what a visitor is about to choose or has opened stays as it is. */
  show(told) {
    const next = JSON.stringify(told);
    if (next === this.told) return;
    this.told = next;
    const focused = this.place.contains(document.activeElement) ? document.activeElement.id : "";
    this.choice = find("select", this.place)?.value ?? this.choice;
    const problem = this.error?.textContent ?? "";
    this.error = el("p", { class: "caution", role: "alert" }, problem);
    const { experiment } = told;
    const parts = experiment ? this.experiment(experiment) : [el("p", {}, "None is running. A candidate is compared with what answers now: first on copies of the traffic, in idle time of the device, then on a growing share of it, until it is known whether it answers as well and as fast.")];
    this.place.replaceChildren(...parts, ...(experiment?.state === "running" ? this.verbs(experiment) : this.starter(told)), this.error, this.traffic(told.traffic));
    if (focused) document.getElementById(focused)?.focus({ preventScroll: true });
  }

  starter({ candidates, unfit, traffic }) {
    if (!candidates.length) return [el("p", { class: "note" }, "There is no variant to try besides the one that answers.")];
    const wanted = candidates.includes(this.choice) ? this.choice : candidates.includes(this.cheapest) ? this.cheapest : candidates[0];
    const select = el("select", { id: "candidate", "aria-label": "Candidate" }, ...candidates.map((name) => el("option", { value: name, selected: name === wanted }, name === this.cheapest ? `${name} (cheapest)` : name)));
    const start = el("button", { type: "button", class: "primary", id: "start" }, "Start shadow experiment");
    start.addEventListener("click", () => this.act("start", { candidate: select.value }, start));
    const not = Object.entries(unfit ?? {}).filter(([name]) => name !== traffic.base);
    return [el("div", { class: "row" }, select, start),
      not.length ? el("p", { class: "note" }, `Not to be had: ${not.map(([name, why]) => `${name} ${why}`).join("; ")}.`) : null].filter(Boolean);
  }

  verbs(experiment) {
    const promote = el("button", { type: "button", id: "promote" }, `Promote ${experiment.candidate}`);
    const abort = el("button", { type: "button", class: "danger", id: "abort" }, "Abort");
    promote.addEventListener("click", () => this.act("promote", { reason: "asked for on the page" }, promote));
    abort.addEventListener("click", () => this.act("abort", { reason: "asked for on the page" }, abort));
    return [el("div", { class: "row" }, promote, abort)];
  }

  experiment(told) {
    const who = (name) => el("span", { class: "who" }, this.variants.has(name) ? badge(this.variants.get(name)) : null, el("span", {}, name));
    const decides = told.state === "running" ? told.verdict_reason : told.reason;
    return [
      el("div", { class: "versus" }, who(told.candidate), el("span", {}, "against"), who(told.base), el("em", { class: `pill ${STATES[told.state]}`, role: "status" }, told.state)),
      el("p", { class: "why" }, decides ?? ""),
      this.ramp(told),
      el("ul", { class: "questions" }, ...told.questions.map((question) => this.question(question, told.series ?? []))),
      this.progress(told),
      this.cost(told.cost ?? {}),
      ...this.more(told),
    ].filter(Boolean);
  }

  ramp({ stages, stage, state, share }) {
    const steps = stages.map((each, index) => el("li", { class: index < stage || state === "promoted" ? "past" : index === stage && state === "running" ? "now" : "", "aria-current": index === stage && state === "running" ? "step" : null }, percent(each)));
    return el("ol", { class: "ramp", "aria-label": `Share of the traffic: ${percent(share)} now` }, ...steps);
  }

  question(question, series) {
    const { estimate, low, high, unit, limit, good, answer, reason, observations } = question;
    return el("li", {},
      el("div", {}, el("b", {}, question.question), el("em", { class: `pill ${ANSWERS[answer]}` }, answer)),
      band(question, series),
      el("div", { class: "number" }, el("b", {}, shown(estimate, unit)), el("small", {}, `${shown(low, unit)} to ${shown(high, unit)}`)),
      el("p", { class: "note" }, `has to be ${good} ${shown(limit, unit)} · ${count(observations)} seen`, el("span", { class: "unseen" }, `. ${reason}`)));
  }

  progress({ state, requests, requests_to_decision: until, verdict, counts }) {
    const shadow = counts?.shadow;
    const dropped = shadow ? Object.values(shadow.dropped).reduce((sum, each) => sum + each, 0) : 0;
    const compared = shadow ? ` ${count(shadow.compared)} answers compared, ${count(dropped)} copies dropped, ${percent(shadow.time_share, 1)} of the device's time.` : "";
    if (state !== "running") return el("p", { class: "note" }, `${count(requests)} requests.${compared}`);
    const about = until && GO_ON.has(verdict) ? ` of about ${count(until)} to a decision` : "";
    return el("div", {}, about ? el("progress", { max: String(until), value: String(requests), "aria-label": "Requests until a decision" }) : null,
      el("p", { class: "note" }, `${count(requests)} requests${about}.${compared}`));
  }

  cost(cost) {
    const known = Object.entries(cost).filter(([, each]) => each);
    if (!known.length) return null;
    return el("p", {}, "Per million answers: ", known.map(([name, each]) => `${name} ${money(each.per_million, this.currency)}${each.high === null ? "" : ` (${number(each.low)} to ${number(each.high)})`}`).join(", "), ".");
  }

  more(told) {
    const weakest = Object.entries(told.slices?.classes ?? {}).flatMap(([, slices]) => slices).concat(told.slices?.lengths ?? []).filter(({ rows, agreed }) => agreed < rows).slice(0, 6);
    const problems = told.self_check?.problems ?? [];
    return [
      problems.length ? el("p", { class: "caution" }, `The base does not agree with itself: ${problems.join("; ")}`) : null,
      weakest.length ? this.details("slices", "Where they differ", el("ul", { class: "list" }, ...weakest.map(({ name, rows, agreed, low, high }) => el("li", {}, `${name}: ${count(agreed)} of ${count(rows)} agree (${percent(low, 1)} to ${percent(high, 1)})`)))) : null,
      told.counts?.pairs && told.counts.pairs.agreed < told.counts.pairs.rows ? this.disagreements() : null,
      this.details("story", "What happened", el("ol", { class: "list" }, ...[...told.history].reverse().map(({ at, who, action, share, reason }) => el("li", {}, `${time(at)} ${action} by ${who}, ${percent(share)} of the traffic${reason ? `: ${reason}` : ""}`)))),
    ].filter(Boolean);
  }

  disagreements() {
    const list = el("ul", { class: "list" }, el("li", {}, "…"));
    const place = this.details("disagreements", "Answers that differ", list);
    const load = async () => {
      if (!place.open) return;
      const told = await get("v1/experiment/disagreements").catch((error) => ({ disagreements: [], error }));
      const words = ({ at, request, outputs }) => `${time(at)} request ${request}: ${Object.entries(outputs).filter(([, one]) => !one.agreed).map(([name, one]) => (one.class === undefined ? `${name} by ${number(one.max_abs)}` : `${one.class} became ${one.other}`)).join(", ")}`;
      list.replaceChildren(...told.disagreements.slice(0, 12).map((one) => el("li", {}, words(one))), ...(told.error ? [el("li", {}, told.error.message)] : []));
    };
    place.addEventListener("toggle", load);
    load();
    return place;
  }

  details(name, title, content) {
    const made = el("details", { open: this.open.has(name) }, el("summary", { id: `more-${name}` }, title), content);
    made.addEventListener("toggle", () => { if (made.isConnected) this.open[made.open ? "add" : "delete"](name); });
    return made;
  }

  traffic({ shares, decided_by: by }) {
    const some = Object.entries(shares).filter(([, share]) => share > 0);
    const parts = some.map(([name, share]) => {
      const part = el("i", { class: `c${this.variants.get(name)?.colour ?? 1}`, title: `${name} ${percent(share)}` });
      part.style.setProperty("--size", String(share));
      return part;
    });
    return el("div", { class: "split" }, el("div", { class: "parts", "aria-hidden": "true" }, ...parts),
      el("p", { class: "note" }, `Traffic, as ${by === "base" ? "the first variant has it all" : by === "weights" ? "the weights say" : "the experiment says"}: ${some.map(([name, share]) => `${name} ${percent(share, share < 0.1 ? 1 : 0)}`).join(", ")}.`));
  }
}
